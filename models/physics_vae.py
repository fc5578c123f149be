r"""A variational autoencoder whose decoder is a physical model plus a residual, kept apart.

Koune & Cicirello, 2025, arXiv:2506.13658. A response x is what an incomplete physical model makes
of its parameters, plus what a network makes of two further latents that know about the domain c
(temperature, speed) and the class y (damage):

.. math::
    x \sim N(g(z_x) + h(z_c, z_y),\ \sigma_x^2), \qquad
    z_c \sim p(z_c \mid c), \qquad z_y \sim p(z_y \mid y)

A flexible h would explain what the physics could. Hence the gradient of the response is reversed,
or cut, on its way from h into the encoder: the latents of the residual are left to what predicts c
and y.

    vae = physics_vae(physics, priors, x, domain=continuous(c), classes=continuous(y))
    result = svi(vae, optax.adam(1e-3), strength=0.0).run(rng_key, 10_000, x, c, y)
    draws = predict(vae, rng_key, result.params, x_test)
"""

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.distributions import biject_to
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.util import compute_log_probs

from probbp.ops import gradient_reversal

Schedule = Callable[[Any], Any]

_RESERVED = {
    *("x", "c", "y", "z_c", "z_y", "noise", "physics", "residual", "prediction", "sigma_x"),
    *("c_missing", "y_missing", "c_mean", "y_mean", "c_adversary", "y_adversary", "records"),
}


class Label(NamedTuple):
    """What is observed of the domain or the class, from `continuous`, `categorical` or your own.

    Attributes:
        num_features: numbers that stand for a value in the network of the conditional prior.
        features: `(values (..., *event)) -> (..., num_features)`.
        num_outputs: outputs of the network that predicts the label.
        likelihood: `(outputs (..., num_outputs)) -> distribution` of the label.
        mean: `(outputs) -> mean`, or the classes' probabilities.
        marginal: prior of values that are missing. Where it has a finite support, they are summed
            over, and otherwise sampled.
    """

    num_features: int
    features: Callable[[jax.Array], jax.Array]
    num_outputs: int
    likelihood: Callable[[jax.Array], dist.Distribution]
    mean: Callable[[jax.Array], jax.Array]
    marginal: dist.Distribution


class PhysicsVAE(NamedTuple):
    """A physical model with a residual, from `physics_vae`.

    Attributes:
        model: for NumPyro, as `physics_vae` describes.
        guide: called as the model is.
        encode: `(params, x (records, outputs)) -> mean (records, d), factor (records, d, d)`, the
            encoder's Gaussian in unconstrained coordinates, in the order of `latents`.
        predict_label: `(params, "c" or "y", z (records, n)) -> distribution` of the label.
        priors: of the physics' parameters.
        labels: "c" and "y", those that there are.
        latents: the latent sites in the order of the unconstrained coordinates, each with the
            transform of its own.
        num_outputs: of a response.
    """

    model: Callable[..., None]
    guide: Callable[..., None]
    encode: Callable[[Mapping[str, Any], jax.Array], tuple[jax.Array, jax.Array]]
    predict_label: Callable[[Mapping[str, Any], str, jax.Array], dist.Distribution]
    priors: dict[str, dist.Distribution]
    labels: dict[str, Label]
    latents: dict[str, "Latent"]
    num_outputs: int


class Latent(NamedTuple):
    """Where a latent site lies among the unconstrained coordinates.

    Attributes:
        start: its first coordinate.
        shape: unconstrained.
        transform: from unconstrained to the site's values.
        event_dim: of the site.
    """

    start: int
    shape: tuple[int, ...]
    transform: Any
    event_dim: int

    @property
    def coordinates(self) -> slice:
        """The coordinates of the site."""
        return slice(self.start, self.start + math.prod(self.shape))


class Refinement(NamedTuple):
    """The posterior of one record, for a sampler.

    Attributes:
        logdensity_fn: of unconstrained coordinates (dim,), up to a constant.
        position: the encoder's mean.
        inverse_mass_matrix: the encoder's covariance (dim, dim).
        constrain_fn: `(position) -> sites`: latents in their units, `physics`, `residual`,
            `prediction`.
    """

    logdensity_fn: Callable[[jax.Array], jax.Array]
    position: jax.Array
    inverse_mass_matrix: jax.Array
    constrain_fn: Callable[[jax.Array], dict[str, jax.Array]]


class MLP(nnx.Module):
    """A multilayer perceptron with the last layer linear."""

    def __init__(
        self,
        sizes: tuple[int, ...],
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
    ):
        """Draw the weights.

        Args:
            sizes: of input, hidden layers and output.
            rngs: keys of the weights.
            dtype: of the weights.
            activation: after each layer but the last.
        """
        self.activation = activation
        self.layers = nnx.List(
            nnx.Linear(num_in, num_out, rngs=rngs, param_dtype=dtype)
            for num_in, num_out in zip(sizes[:-1], sizes[1:], strict=True)
        )

    def __call__(self, x):
        """Map (..., sizes[0]) to (..., sizes[-1])."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


def continuous(values: jax.typing.ArrayLike) -> Label:
    """Return a label of real numbers, with a heteroscedastic normal likelihood.

    Args:
        values: those of the training records (records, n), for mean and standard deviation.

    Raises:
        ValueError: for values that are not finite or of another shape.
    """
    values = np.asarray(values)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError(
            f"values must be finite and (records, n), got shape {values.shape}. Leave out the "
            "records without a value."
        )
    loc, scale = (jnp.asarray(a) for a in _standardisation(values))
    n = values.shape[-1]

    def likelihood(outputs):
        # The scale is bounded: one record that is predicted by luck would else dwarf the others.
        mean, log_scale = outputs[..., :n], jnp.clip(outputs[..., n:], -7.0, 3.0)
        return dist.Normal(loc + scale * mean, scale * jnp.exp(log_scale)).to_event(1)

    return Label(
        num_features=n,
        features=lambda values: (values - loc) / scale,
        num_outputs=2 * n,
        likelihood=likelihood,
        mean=lambda outputs: loc + scale * outputs[..., :n],
        marginal=dist.Normal(loc, scale).to_event(1),
    )


def categorical(num_classes: int, probs: jax.typing.ArrayLike | None = None) -> Label:
    """Return a label of classes 0, ..., num_classes - 1.

    Args:
        num_classes: how many.
        probs: their prior probabilities; uniform by default.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}.")
    probs = jnp.full(num_classes, 1 / num_classes) if probs is None else jnp.asarray(probs)
    return Label(
        num_features=num_classes,
        features=lambda values: jax.nn.one_hot(values, num_classes, dtype=probs.dtype),
        num_outputs=num_classes,
        likelihood=lambda outputs: dist.Categorical(logits=outputs),
        mean=lambda outputs: jax.nn.softmax(outputs),
        marginal=dist.Categorical(probs=probs),
    )


def physics_vae(
    physics: Callable[..., jax.Array],
    priors: Mapping[str, dist.Distribution],
    x: jax.typing.ArrayLike,
    *,
    domain: Label | None = None,
    classes: Label | None = None,
    known: jax.typing.ArrayLike | None = None,
    domain_dim: int = 2,
    class_dim: int = 2,
    reference: Mapping[str, Any] | None = None,
    guide: Literal["joint", "partitioned"] = "joint",
    width: int = 128,
    networks: Mapping[str, nnx.Module] | None = None,
    rngs: nnx.Rngs | None = None,
) -> PhysicsVAE:
    r"""Turn a physical model into a NumPyro model and guide with a residual.

    .. math::
        z_x \sim p(z_x), \qquad z_c \sim N(\mu_c(c), \mathrm{diag}\, s_c(c)^2), \qquad
        z_y \sim N(\mu_y(y), \mathrm{diag}\, s_y(y)^2), \\
        x \sim N(g(z_x) + h(R_\lambda(z_c, z_y)),\ \sigma_x^2 I), \qquad
        c \sim p(c \mid z_c), \qquad y \sim p(y \mid z_y)

    :math:`R_\lambda` is `probbp.ops.gradient_reversal`: the identity, whose derivative is
    :math:`-\lambda`. The value of the ELBO does not depend on the strength :math:`\lambda`, nor do
    the gradients of g, h and :math:`\sigma_x`; that of the encoder is affine in it. At -1, the
    limit, it is that of the plain variational autoencoder; at 0 the encoder of z_c and z_y does not
    hear from x; above, the residual's latents and the residual are adversaries, and no function
    decreases.

    **Sites.** The physics' parameters under their own names, in their own units, on the supports of
    their priors; `z_c`, `z_y`; deterministic `physics`, `residual` and their sum `prediction`; `x`;
    and the labels `c` and `y`, with their means (or probabilities) `c_mean` and `y_mean`. Sites of
    the labels are training terms: c and y are conditioned on already, in the priors of z_c and z_y.
    With `heads=False` they are left out, which is the model for MCMC, calibration and likelihoods.

    **Guide.** A Gaussian in unconstrained coordinates, whose mean and full Cholesky factor a
    network reads off x alone, mapped onto the supports by `biject_to`, Jacobian included.
    "partitioned": three networks, for the three groups of latents, independent given x. As in
    NumPyro's autoguides the Gaussian is an auxiliary site (`noise`), and the latents are transforms
    of it: the density is exact, and nothing is inverted, which at the edge of a support could not
    be.

    **Missing labels.** `has_c`, `has_y` say which rows have them; without c (or y) no row has. What
    is not there may be NaN. Those of finite support are summed over exactly; others are drawn from
    p(c | z_c) in the guide (Ilse et al., 2020, arXiv:1905.10427).

    Args:
        physics: `(parameters) -> response` for one record, any JAX function that is differentiable,
            with `parameters` a dictionary like `priors` and the response (outputs,); with `known`,
            `(parameters, known) -> response`. It may solve a differential equation or evaluate a
            trained surrogate. It is mapped over records by `jax.vmap`.
        priors: of the physics' parameters, by name, without batch shape.
        x: responses (records, outputs) of the training records, for shape, location and scale.
        domain: what is observed of the domain; `None` for no z_c.
        classes: what is observed of the class; `None` for no z_y.
        known: inputs of the physics (records, n) of the training records.
        domain_dim: dimension of z_c.
        class_dim: dimension of z_y.
        reference: `{"c": ..., "y": ...}`, the labels of a record at which the physics is exact: the
            residual of the mean latents there is subtracted. It is an assumption of yours; a wrong
            one biases the physics' parameters. The strength then acts on the conditional priors'
            networks too, as on the encoder.
        guide: whose Gaussian has all correlations, or those within groups.
        width: of the two hidden layers of the encoder and the one of the residual; half of it in
            the other networks.
        networks: instead of the default ones, by name: "encoder" (outputs to d (d + 3) / 2 for d
            latent coordinates: mean, logarithms of the factor's diagonal plus two, what is below it
            by rows), or "encoder_x", "encoder_c", "encoder_y" of the partitioned guide; "residual"
            (z_c and z_y to outputs); "prior_c", "prior_y" (features to twice the latent's
            dimension); "head_c", "head_y" (latent to the label's outputs); "adversary_c",
            "adversary_y" (parameters of the physics to the label's outputs). Each takes (records,
            n) to (records, m).
        rngs: keys of the default networks' weights.

    Returns:
        Model and guide, both called with `(x, c=None, y=None, *, known=None, has_c=None,
        has_y=None, subsample_size=None, num_records=None, strength=-1.0, relative=False,
        invariance=None, label_weight=1.0, heads=True)`:

        - `x` (records, outputs), c and y with the records on their first axis, `known` (records,
          n), `has_c` and `has_y` (records,) boolean. Without x, `num_records` are drawn.
        - `subsample_size`: how many of the records a step sees; their terms are scaled up. Batches
          of your own need no such factor: all latents belong to records, and it would be common
          to the whole loss.
        - `strength`: lambda, which may be traced: a schedule does not recompile. The default, -1,
          leaves the model as it is, for MCMC, where a reversed gradient would be none of the
          density's. `svi` sets it.
        - `relative`: whether the strength is in units of :math:`\sigma_x^2 / n`, n the outputs.
        - `invariance`: if given, networks predict c and y from z_x, whose gradient comes back to
          z_x with this factor reversed: z_x is to tell nothing of domain and class (Ganin et al.,
          2016, arXiv:1505.07818). Only right where they are independent in truth. Their
          likelihood enters the loss, which then is no ELBO.
        - `label_weight`: factor of the labels' likelihood given z_c and z_y. Where the gradient of
          x is cut or reversed, z_y learns from its label alone, and a label of few nats (a class)
          loses against the divergence: z_y comes out empty. Watch that labels are predicted, and
          weigh them more if not, by 10 or 30.
        - `heads`: whether labels, and adversaries, are part of the model.

    Raises:
        ValueError: for options, shapes or names that do not fit.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, optax
        >>> times = jnp.linspace(0, 3, 16)
        >>> physics = lambda parameters: jnp.exp(-parameters["rate"] * times)
        >>> priors = {"rate": dist.LogNormal(0.0, 0.5)}
        >>> rate, c = jnp.linspace(0.5, 2, 64), jnp.tile(jnp.array([0.0, 1.0]), 32)[:, None]
        >>> x = jax.vmap(physics)({"rate": rate}) + 0.2 * c
        >>> vae = physics_vae(physics, priors, x, domain=continuous(c), domain_dim=1)
        >>> optimiser = svi(vae, optax.adam(3e-3), strength=0.0)
        >>> result = optimiser.run(jax.random.key(0), 500, x, c, progress_bar=False)
        >>> draws = predict(vae, jax.random.key(1), result.params, x, num_samples=20)
        >>> draws["rate"].shape, draws["physics"].shape
        ((20, 64), (20, 64, 16))

    Reference:
        Koune & Cicirello, 2025, arXiv:2506.13658. Its reversal was put before a classifier of
        domains by Ganin et al., 2016; its labels and conditional priors are those of Ilse et al.,
        2020. The reference, `invariance` and `relative` are additions.
    """
    x, known = np.asarray(x), None if known is None else np.asarray(known)
    labels = {"c": domain, "y": classes}
    labels = {name: label for name, label in labels.items() if label is not None}
    dims = {"c": domain_dim, "y": class_dim}
    _check_options(priors, x, labels, reference, guide, known)
    num_outputs, dtype = x.shape[-1], jnp.result_type(x.dtype, jnp.float32)
    loc, scale = (jnp.asarray(a, dtype) for a in _standardisation(x))
    overall = jnp.sqrt(jnp.mean(scale**2))
    # An output that hardly varies is noise, and is not blown up.
    scale = jnp.maximum(scale, overall / 10)

    latents, spread_of_u, spread_of_z = _latents(priors, {name: dims[name] for name in labels})
    num_physics = sum(math.prod(latents[name].shape) for name in priors)
    starts = {"x": (0, num_physics)} | {
        name: (latents[f"z_{name}"].start, dims[name]) for name in labels
    }
    num_latent = sum(size for _, size in starts.values())
    blocks = starts if guide == "partitioned" else {"": (0, num_latent)}
    blocks = {"encoder" + ("_" + name if name else ""): block for name, block in blocks.items()}

    sizes: dict[str, tuple[int, ...]] = {
        name: (num_outputs, width, width, d * (d + 3) // 2) for name, (_, d) in blocks.items()
    }
    sizes["residual"] = (sum(dims[name] for name in labels), width, num_outputs)
    for name, label in labels.items():
        half = width // 2
        sizes[f"prior_{name}"] = (label.num_features, half, 2 * dims[name])
        sizes[f"head_{name}"] = (dims[name], half, label.num_outputs)
        sizes[f"adversary_{name}"] = (spread_of_z.shape[1], half, label.num_outputs)
    modules = _networks(sizes, networks, nnx.Rngs(0) if rngs is None else rngs, dtype)
    _check_physics(physics, priors, known, num_outputs)

    def net(name):
        return nnx_module(name, modules[name])

    def prior(name, features):
        mean, log_scale = jnp.split(net(f"prior_{name}")(features), 2, -1)
        return dist.Normal(mean, jnp.exp(jnp.clip(log_scale, -7.0, 3.0))).to_event(1)

    def conditional_prior(name, value, has):
        """Return p(z | label), the label summed over or sampled in rows that lack it."""
        label = labels[name]
        if has is None:
            return prior(name, label.features(value))
        if label.marginal.has_enumerate_support:
            support = label.marginal.enumerate_support(expand=False)
            weights = label.marginal.log_prob(support) + jnp.zeros((*has.shape, 1))
            # Finite, so that no derivative is 0 * inf.
            is_value = value[:, None] == support
            weights = jnp.where(has[:, None], jnp.where(is_value, 0.0, -1e9), weights)
            components = prior(name, label.features(support)).expand(weights.shape)
            return dist.MixtureSameFamily(dist.Categorical(logits=weights), components)
        missing = numpyro.sample(f"{name}_missing", label.marginal.mask(~has))
        has = has.reshape(has.shape + (1,) * (missing.ndim - has.ndim))
        return prior(name, label.features(jnp.where(has, value, missing)))

    def anchor():
        """Return the residual's latents at the reference."""
        if reference is None:
            return None
        values = {name: jnp.asarray(reference[name])[None] for name in labels}
        means = [prior(name, labels[name].features(values[name])).mean for name in labels]
        return jnp.concatenate(means, -1)

    def model(
        x=None,
        c=None,
        y=None,
        *,
        known=None,
        has_c=None,
        has_y=None,
        subsample_size=None,
        num_records=None,
        strength=-1.0,
        relative=False,
        invariance=None,
        label_weight=1.0,
        heads=True,
    ):
        rows = _rows(labels, x, c, y, known, has_c, has_y, num_records)
        sigma = numpyro.param("sigma_x", overall, constraint=dist.constraints.positive)
        if relative:
            strength = strength * jax.lax.stop_gradient(sigma) ** 2 / num_outputs
        with _records(rows, subsample_size) as rows:
            x, known = rows["x"], rows["known"]
            parameters = {name: numpyro.sample(name, p) for name, p in priors.items()}
            z = {
                name: numpyro.sample(
                    f"z_{name}", conditional_prior(name, rows[name], rows[f"has_{name}"])
                )
                for name in labels
            }
            if known is None:
                response = jax.vmap(physics)(parameters)
            else:
                response = jax.vmap(physics)(parameters, known)
            residual_net, z_ref = net("residual"), anchor()
            together = gradient_reversal(jnp.concatenate(list(z.values()), -1), strength)
            residual = residual_net(together)
            if z_ref is not None:
                residual = residual - residual_net(gradient_reversal(z_ref, strength))
            residual = overall * residual
            numpyro.deterministic("physics", response)
            numpyro.deterministic("residual", residual)
            prediction = numpyro.deterministic("prediction", response + residual)
            numpyro.sample("x", dist.Normal(prediction, sigma).to_event(1), obs=x)
            if not heads:
                return
            for name, label in labels.items():
                outputs = net(f"head_{name}")(z[name])
                numpyro.deterministic(f"{name}_mean", label.mean(outputs))
                # Without x all is drawn, and a label is what the draws are conditioned on.
                value, has = (None, None) if x is None else (rows[name], rows[f"has_{name}"])
                with numpyro.handlers.scale(scale=label_weight):
                    _observe(name, label.likelihood(outputs), value, has)
                if invariance is not None and x is not None:
                    shift, spread = spread_of_z
                    told = jnp.concatenate(
                        [value.reshape(len(x), -1) for value in parameters.values()], -1
                    )
                    told = gradient_reversal((told - shift) / spread, invariance)
                    outputs = net(f"adversary_{name}")(told)
                    _observe(f"{name}_adversary", label.likelihood(outputs), value, has)

    def amortised(
        x,
        c=None,
        y=None,
        *,
        known=None,
        has_c=None,
        has_y=None,
        subsample_size=None,
        num_records=None,
        strength=-1.0,
        relative=False,
        invariance=None,
        label_weight=1.0,
        heads=True,
    ):
        if x is None:
            raise ValueError("The guide reads the responses: pass x.")
        rows = _rows(labels, x, c, y, known, has_c, has_y, None)
        with _records(rows, subsample_size) as rows:
            mean, factor = gaussian(rows["x"])
            standard = dist.Normal(jnp.zeros_like(mean), 1.0).to_event(1)
            noise = numpyro.sample("noise", standard, infer={"is_auxiliary": True})
            u = mean + (factor @ noise[..., None])[..., 0]
            log_diagonal = jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1))
            for name, latent in latents.items():
                value, log_det = _constrain(latent, u)
                log_det = log_det + log_diagonal[..., latent.coordinates].sum(-1)
                value = numpyro.sample(name, dist.Delta(value, -log_det, latent.event_dim))
                label = name.removeprefix("z_")
                has = rows[f"has_{label}"] if label in labels else None
                if has is None or labels[label].marginal.has_enumerate_support:
                    continue
                likelihood = labels[label].likelihood(net(f"head_{label}")(value))
                numpyro.sample(f"{label}_missing", likelihood.mask(~has))

    def gaussian(x):
        standardised = (x - loc) / scale
        mean = jnp.zeros((*x.shape[:-1], num_latent), dtype)
        factor = jnp.zeros((*mean.shape, num_latent), dtype)
        for name, (start, d) in blocks.items():
            outputs = net(name)(standardised)
            mean = mean.at[..., start : start + d].set(outputs[..., :d])
            diagonal = jnp.arange(start, start + d)
            # A wide posterior drowns what a new network tells of the labels: it starts narrow.
            scales = jnp.exp(jnp.clip(outputs[..., d : 2 * d] - 2.0, -7.0, 3.0))
            factor = factor.at[..., diagonal, diagonal].set(scales)
            rows, columns = (start + index for index in np.tril_indices(d, -1))
            factor = factor.at[..., rows, columns].set(outputs[..., 2 * d :])
        # In units of the prior's spread, so that a new network's guess lies in its middle.
        shift, spread = spread_of_u.astype(dtype)
        return shift + spread * jnp.clip(mean, -50.0, 50.0), spread[:, None] * factor

    def encode(params, x):
        with substitute(data=dict(params)):
            return gaussian(x)

    def predict_label(params, name, z):
        with substitute(data=dict(params)):
            return labels[name].likelihood(net(f"head_{name}")(z))

    return PhysicsVAE(
        model, amortised, encode, predict_label, dict(priors), labels, latents, num_outputs
    )


def svi(
    vae: PhysicsVAE,
    optimiser: Any,
    *,
    strength: float | Schedule = 0.0,
    invariance: float | Schedule | None = None,
    relative: bool = False,
    loss: Any = None,
) -> SVI:
    """Return NumPyro's SVI with a strength that follows its steps.

    `SVI(vae.model, vae.guide, optimiser, loss)` with `strength=...` in each call of `update` does
    the same. Here `run` takes a schedule too: a step's strength is computed in the compiled step.

    The optimiser sees a vector field that is no gradient where the strength is above 0. As a game
    of two players it has its own rules: `optax.multi_transform({...}, roles)` gives each player an
    optimiser, and `optax.optimistic_gradient_descent` or `optax.optimistic_adam_v2` are updates
    that do not circle around a saddle.

    A model is not to be chosen by its loss or by its reconstruction: the plain autoencoder,
    strength -1, has the best of both and the worst physics.

    Args:
        vae: from `physics_vae`.
        optimiser: of Optax or NumPyro.
        strength: lambda, or a function of the number of steps made. Useful strengths are small: the
            reversed gradient sums over all outputs, and grows as 1 / sigma_x^2. The paper takes
            values with lambda * outputs from 1 / 16 to 1 / 2. The default cuts the gradient.
        invariance: factor of the adversary on z_x, or a schedule; `None` for no adversary.
        relative: whether the strength is in units of sigma_x^2 / outputs.
        loss: an ELBO; by default `Trace_ELBO` with four particles.

    Warns:
        UserWarning: for a constant strength above 1 / outputs, unless relative: it overpowers the
            labels, and the fit collapses.

    Example:
        >>> schedule = dann_schedule(1 / 256, num_steps=1000)
        >>> float(schedule(0)), round(256 * float(schedule(1000)), 3)
        (0.0, 1.0)
    """
    is_number = isinstance(strength, float | int)
    if is_number and not relative and strength > 1 / vae.num_outputs:
        warnings.warn(
            f"strength={strength} is {strength * vae.num_outputs:.3g} / outputs. The reversed "
            "gradient sums over outputs: above 1 / outputs it overpowers the labels' and the fit "
            "collapses. Take less, or relative=True.",
            stacklevel=2,
        )
    loss = Trace_ELBO(num_particles=4) if loss is None else loss
    return _ScheduledSVI(vae, optimiser, loss, strength, invariance, relative)


class _ScheduledSVI(SVI):
    """SVI that hands each step its strengths."""

    def __init__(self, vae, optimiser, loss, strength, invariance, relative):
        super().__init__(vae.model, vae.guide, optimiser, loss, relative=relative)
        self._schedules = {"strength": strength}
        if invariance is not None:
            self._schedules["invariance"] = invariance

    def _at(self, svi_state):
        step = svi_state.optim_state[0]
        return {name: s(step) if callable(s) else s for name, s in self._schedules.items()}

    def init(self, rng_key, *args, **kwargs):
        options = {name: s(0) if callable(s) else s for name, s in self._schedules.items()}
        return super().init(rng_key, *args, **options | kwargs)

    def update(self, svi_state, *args, **kwargs):
        return super().update(svi_state, *args, **self._at(svi_state) | kwargs)

    def stable_update(self, svi_state, *args, **kwargs):
        return super().stable_update(svi_state, *args, **self._at(svi_state) | kwargs)

    def evaluate(self, svi_state, *args, **kwargs):
        return super().evaluate(svi_state, *args, **self._at(svi_state) | kwargs)


def dann_schedule(peak: float, num_steps: int, *, sharpness: float = 10.0) -> Schedule:
    r"""Return the schedule :math:`\lambda_p = \lambda (2 / (1 + e^{-\gamma p}) - 1)` of a strength.

    Args:
        peak: lambda, reached up to a factor tanh(gamma / 2).
        num_steps: at which p, the share of them that is made, is one; there it stays.
        sharpness: gamma.

    Reference:
        Ganin et al., 2016, arXiv:1505.07818, section 5.2.2.
    """

    def schedule(step):
        p = jnp.minimum(step / num_steps, 1.0)
        return peak * (2 / (1 + jnp.exp(-sharpness * p)) - 1)

    return schedule


def cyclical_schedule(peak: float, period: int, *, ramp: float = 0.5) -> Schedule:
    """Return a schedule that climbs from 0 to `peak` in each period, and stays for its rest.

    Args:
        peak: the largest strength.
        period: steps of a cycle.
        ramp: share of the period in which it climbs.
    """
    return lambda step: peak * jnp.minimum((step % period) / (ramp * period), 1.0)


def roles(params: Mapping[str, Any]) -> dict[str, str]:
    """Name the players to whom parameters belong, as labels for `optax.multi_transform`.

    Args:
        params: of SVI, by name.

    Returns:
        "encoder", which the reversed gradients reach; "adversary", the networks that read z_x;
        "noise", sigma_x; "decoder", the rest.

    Example:
        >>> roles({"encoder$params": 0, "residual$params": 0, "sigma_x": 0})
        {'encoder$params': 'encoder', 'residual$params': 'decoder', 'sigma_x': 'noise'}
    """

    def role(name):
        if name.startswith(("encoder", "adversary")):
            return name.split("_")[0].split("$")[0]
        return "noise" if name == "sigma_x" else "decoder"

    return {name: role(name) for name in params}


def decode(
    vae: PhysicsVAE,
    params: Mapping[str, Any],
    position: jax.Array,
    known: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Return the sites at unconstrained coordinates: latents, `physics`, `residual`, `prediction`.

    Args:
        vae: from `physics_vae`.
        params: of SVI.
        position: (records, d), such as the encoder's mean.
        known: inputs of the physics (records, n).
    """
    values = {name: _constrain(latent, position)[0] for name, latent in vae.latents.items()}
    # Labels that are missing are drawn, but do not enter, given z_c and z_y.
    model = substitute(seed(vae.model, 0), {**params, **values})
    traced = trace(model).get_trace(num_records=len(position), known=known, heads=False)
    sites = ("physics", "residual", "prediction")
    return values | {name: traced[name]["value"] for name in sites}


def predict(
    vae: PhysicsVAE,
    rng_key: jax.Array,
    params: Mapping[str, Any],
    x: jax.Array,
    c: jax.Array | None = None,
    y: jax.Array | None = None,
    *,
    known: jax.Array | None = None,
    num_samples: int = 100,
) -> dict[str, jax.Array]:
    """Return draws of the amortised posterior of new responses, and what they predict.

    With c, z_c is drawn from p(z_c | c) instead of from the encoder, as the paper does: this is
    prediction where the domain is known, and if c is not that of x, an answer to "what if": what
    the same structure would respond in that domain. The other latents, and with them `physics`, are
    those that the same key gives without c, to the bit, unless `known` is changed as well. In the
    same way with y.

    The class or domain of x is predicted by the draws of `c` and `y`, or the mean over draws of
    `c_mean` and `y_mean`: locations or probabilities.

    Args:
        vae: from `physics_vae`.
        rng_key: a key.
        params: of SVI.
        x: (records, outputs).
        c: (records, ...), the domain to be in.
        y: (records, ...), the class to be in.
        known: inputs of the physics (records, n).
        num_samples: draws.

    Returns:
        Sites, with the draws on their first axis and the records on the second.
    """
    key_guide, key_model = jax.random.split(rng_key)
    draws = Predictive(vae.guide, params=dict(params), num_samples=num_samples)(key_guide, x)
    given = {name for name, value in (("c", c), ("y", y)) if value is not None}
    dropped = {"noise"} | {f"z_{name}" for name in given} | {f"{name}_missing" for name in given}
    latents = {name: draw for name, draw in draws.items() if name not in dropped}
    model = Predictive(vae.model, posterior_samples=latents, params=dict(params))
    drawn = model(key_model, None, c, y, known=known, num_records=len(x))
    sites = {name: draw for name, draw in (latents | drawn).items() if "missing" not in name}
    return {name: jnp.asarray(draw) for name, draw in sites.items()}


def refinement(
    vae: PhysicsVAE,
    params: Mapping[str, Any],
    x: jax.Array,
    c: jax.Array | None = None,
    y: jax.Array | None = None,
    *,
    known: jax.Array | None = None,
) -> Refinement:
    """Return the true posterior of one record, with the encoder's Gaussian as start and scale.

    The networks are frozen, the labels' training terms left out and no gradient is reversed. A
    sampler corrects what amortisation did to the posterior; it cannot correct a decoder whose
    physics is wrong. `probbp.mala(r.logdensity_fn, step_size, r.inverse_mass_matrix)`,
    `blackjax.nuts(...)` and `probbp.sample(..., postprocess_fn=r.constrain_fn)` take it as it is,
    and `jax.vmap` maps it over records.

    Args:
        vae: from `physics_vae`.
        params: of SVI.
        x: one response (outputs,).
        c: its domain; `None` if unknown.
        y: its class; `None` if unknown.
        known: inputs of the physics (n,).

    Returns:
        A `Refinement`. Labels that are missing and continuous follow as further coordinates.
    """
    given = {"c": c, "y": y}
    mean, factor = (a[0] for a in vae.encode(params, x[None]))
    position, covariance, starts = mean, factor @ factor.T, {}
    for name, label in vae.labels.items():
        if given[name] is not None or label.marginal.has_enumerate_support:
            continue
        z, _ = _constrain(vae.latents[f"z_{name}"], mean[None])
        predicted = vae.predict_label(params, name, z)
        starts[name] = len(position)
        location, variance = (jnp.ravel(a) for a in (predicted.mean, predicted.variance))
        position = jnp.concatenate([position, location.astype(position.dtype)])
        covariance = jax.scipy.linalg.block_diag(covariance, jnp.diag(variance))

    rows = {name: None if v is None else jnp.asarray(v)[None] for name, v in given.items()}
    inputs = None if known is None else known[None]

    def logdensity_fn(position):
        values, log_det = dict(params), jnp.zeros((), position.dtype)
        for name, latent in vae.latents.items():
            values[name], term = _constrain(latent, position[None])
            log_det = log_det + term[0]
        for name, start in starts.items():
            shape = vae.labels[name].marginal.event_shape
            part = position[start : start + math.prod(shape)]
            values[f"{name}_missing"] = part.reshape(1, *shape)
        options = {"known": inputs, "heads": False}
        log_probs, _ = compute_log_probs(
            vae.model, (x[None], rows["c"], rows["y"]), options, values
        )
        return jnp.asarray(log_det + sum(log_probs.values()))

    def constrain_fn(position):
        sites = decode(vae, params, position[None], inputs)
        return {name: site[0] for name, site in sites.items()}

    return Refinement(logdensity_fn, position, covariance, constrain_fn)


def pareto_k(
    vae: PhysicsVAE,
    rng_key: jax.Array,
    params: Mapping[str, Any],
    x: jax.Array,
    c: jax.Array | None = None,
    y: jax.Array | None = None,
    *,
    known: jax.Array | None = None,
    num_samples: int = 1000,
) -> np.ndarray:
    """Return, for each record, how far the amortised posterior is from the true one.

    The shape of the Pareto tail of the ratios of the two, by ArviZ. Below 0.7 the encoder's draws
    can stand for the posterior, or be reweighted to it; above they cannot, and `refinement` is
    needed. It is about amortisation: it does not know whether the physics is right.

    Args:
        vae: from `physics_vae`.
        rng_key: a key.
        params: of SVI.
        x: (records, outputs).
        c: (records, ...), `None` if unknown.
        y: (records, ...), `None` if unknown.
        known: inputs of the physics (records, n).
        num_samples: draws for each record, some hundreds at least.

    Returns:
        (records,).

    Reference:
        Yao, Vehtari, Simpson & Gelman, 2018, arXiv:1802.02538.
    """
    options = {"known": known, "heads": False}

    def log_ratio(key):
        guide = trace(substitute(seed(vae.guide, key), dict(params)))
        sites = guide.get_trace(x, c, y, **options)
        sites = {name: site for name, site in sites.items() if site["type"] == "sample"}
        values = {name: site["value"] for name, site in sites.items()}
        log_q = sum(site["fn"].log_prob(site["value"]) for site in sites.values())
        log_p, _ = compute_log_probs(
            vae.model, (x, c, y), options, {**params, **values}, sum_log_prob=False
        )
        return sum(log_p.values()) - log_q

    keys = jax.random.split(rng_key, num_samples)
    ratios = jax.jit(lambda keys: jax.lax.map(log_ratio, keys))(keys)
    return _psis_k(np.asarray(ratios).T)


def leakage(
    vae: PhysicsVAE,
    params: Mapping[str, Any],
    x: jax.Array,
    known: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Return the shares of a variation that the physics and the residual take for theirs.

    Give it responses in groups, within which one cause alone varies. Where it is the physics'
    parameters (many structures, one domain and class), the share of the residual is leakage. Where
    it is domain and class (one structure), the share of the physics is: far above zero the
    confounder lies in the span of the physics, or the decoder has not been told otherwise, and
    parameters are not identified under it, whatever the posterior's width.

    Args:
        vae: from `physics_vae`.
        params: of SVI.
        x: (groups, members, outputs), best without noise.
        known: inputs of the physics (groups, members, n).

    Returns:
        "physics" and "residual": variance within groups of each, at the encoder's mean, over that
        of x. They may add up to more than one where they cancel.
    """
    flat = x.reshape(-1, x.shape[-1])
    inputs = None if known is None else known.reshape(-1, known.shape[-1])
    sites = decode(vae, params, vae.encode(params, flat)[0], inputs)
    total = jnp.var(x, axis=1).mean()
    return {
        name: jnp.var(sites[name].reshape(x.shape), axis=1).mean() / total
        for name in ("physics", "residual")
    }


def disentanglement(
    latents: Mapping[str, Any], factors: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Return how well each factor is predicted from each group of latents, linearly.

    Args:
        latents: group to (records,) or (records, n): one draw of each record's posterior, or its
            mean.
        factors: true ones by name, each (records,).

    Returns:
        Group to factor to R^2 of the second half of the records, by least squares on the first.

    Example:
        >>> import numpy as np
        >>> z = np.random.default_rng(0).normal(size=(100, 2))
        >>> table = disentanglement({"z": z}, {"a": z[:, 0] - 2 * z[:, 1]})
        >>> round(table["z"]["a"], 6)
        1.0
    """
    table = {}
    for group, values in latents.items():
        values = np.asarray(values, float)
        design = np.column_stack([np.ones(len(values)), values.reshape(len(values), -1)])
        half = len(design) // 2
        table[group] = {}
        for name, factor in factors.items():
            factor = np.asarray(factor, float)
            weights, *_ = np.linalg.lstsq(design[:half], factor[:half])
            errors = factor[half:] - design[half:] @ weights
            table[group][name] = float(1 - np.mean(errors**2) / np.var(factor[half:]))
    return table


def to_arviz(draws: Mapping[str, Any], observed: Mapping[str, Any] | None = None) -> Any:
    """Turn draws of `predict` into ArviZ's object, one chain.

    Args:
        draws: sites with the draws on the first axis.
        observed: data under the names of their sites, `x`, `c`, `y`.

    Returns:
        An `arviz.InferenceData` (ArviZ 0.x) or `xarray.DataTree` (ArviZ 1.x): `x`, `c` and `y` in
        `posterior_predictive`, latents and the split of the response in `posterior`.
    """
    import arviz

    groups: dict[str, Any] = {"posterior": {}, "posterior_predictive": {}}
    for name, draw in draws.items():
        group = "posterior_predictive" if name in ("x", "c", "y") else "posterior"
        groups[group][name] = np.asarray(draw)[None]
    if observed:
        groups["observed_data"] = {name: np.asarray(value) for name, value in observed.items()}
    groups = {name: group for name, group in groups.items() if group}
    if int(arviz.__version__.split(".")[0]) >= 1:
        return arviz.from_dict(groups)
    return arviz.from_dict(**groups)


# ---------------------------------------------------------------------------------------
# Coordinates.


def _latents(priors, dims):
    """Return the latent sites, and location and scale of u, and of the physics' parameters."""
    latents, start, of_u, of_z = {}, 0, [], []
    for name, prior in priors.items():
        transform = biject_to(prior.support)
        # By quantiles of draws, as some priors have no moments.
        values = prior.sample(jax.random.key(0), (1000,))
        u = transform.inv(values)
        latents[name] = Latent(start, u.shape[1:], transform, len(prior.event_shape))
        start += math.prod(u.shape[1:])
        of_u.append(_middle(u))
        of_z.append(_middle(values))
    for name, dim in dims.items():
        identity = biject_to(dist.constraints.real_vector)
        latents[f"z_{name}"] = Latent(start, (dim,), identity, 1)
        start += dim
        of_u.append(jnp.stack([jnp.zeros(dim), jnp.ones(dim)]))
    return latents, jnp.concatenate(of_u, 1), jnp.concatenate(of_z, 1)


def _middle(draws):
    """Return median and spread (2, n) of draws (draws, ...)."""
    quantiles = jnp.array([0.25, 0.5, 0.75])
    low, middle, high = jnp.quantile(draws.reshape(len(draws), -1), quantiles, axis=0)
    return jnp.stack([middle, (high - low) / 1.349])


def _constrain(latent, position):
    """Return a site's values, and the logarithm of the Jacobian, of coordinates (records, d)."""
    u = position[..., latent.coordinates].reshape(*position.shape[:-1], *latent.shape)
    value = latent.transform(u)
    log_det = latent.transform.log_abs_det_jacobian(u, value)
    return value, log_det.reshape(*position.shape[:-1], -1).sum(-1)


# ---------------------------------------------------------------------------------------
# Records and labels.


def _rows(labels, x, c, y, known, has_c, has_y, num_records):
    """Return all that has a first axis of records, what is missing filled up."""
    rows = {"x": x, "known": known, "c": c, "y": y, "has_c": has_c, "has_y": has_y}
    sizes = {name: len(value) for name, value in rows.items() if value is not None}
    if num_records is not None:
        sizes["num_records"] = num_records
    if len(set(sizes.values())) != 1:
        raise ValueError(
            f"All arrays have the records on their first axis, but these have {sizes}. Without x, "
            "c and y, pass num_records."
        )
    num = next(iter(sizes.values()))
    for name in ("c", "y"):
        value = rows[name]
        if name not in labels:
            if value is not None or rows[f"has_{name}"] is not None:
                raise ValueError(f"{name} is given, but physics_vae got no label for it.")
            continue
        marginal = labels[name].marginal
        shape = (num, *marginal.event_shape)
        if value is None:
            dtype = int if marginal.support.is_discrete else float
            rows[name], rows[f"has_{name}"] = jnp.zeros(shape, dtype), jnp.zeros(num, bool)
            continue
        if jnp.shape(value) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {jnp.shape(value)}.")
    return num, rows


@contextmanager
def _records(num_and_rows, subsample_size):
    num, rows = num_and_rows
    with numpyro.plate("records", num, subsample_size) as index:
        if subsample_size is not None and subsample_size < num:
            rows = {name: None if v is None else jnp.asarray(v)[index] for name, v in rows.items()}
        yield rows


def _observe(name, distribution, value, has):
    distribution = distribution if has is None else distribution.mask(has)
    numpyro.sample(name, distribution, obs=value)


# ---------------------------------------------------------------------------------------
# Statistics.


def _standardisation(values):
    scale = values.std(0)
    return values.mean(0), np.where(scale > 0, scale, 1.0).astype(scale.dtype)


def _psis_k(log_ratios):
    """Return the tails' shapes of log ratios (records, draws)."""
    import arviz

    if int(arviz.__version__.split(".")[0]) >= 1:
        from arviz_stats.base.array import array_stats  # pyright: ignore[reportMissingImports]

        # It takes log likelihoods, the negative log ratios of leaving one out.
        return np.asarray(array_stats.psislw(-log_ratios)[1])
    return np.asarray(arviz.psislw(log_ratios)[1])


# ---------------------------------------------------------------------------------------
# Networks and checks.


def _networks(sizes, networks, rngs, dtype):
    networks = dict(networks or {})
    if unknown := sorted(networks.keys() - sizes.keys()):
        raise ValueError(f"networks has {unknown}, but the names are {sorted(sizes)}.")
    for name, module in networks.items():
        num_in, num_out = sizes[name][0], sizes[name][-1]
        graph, state = nnx.split(module)
        example = jax.ShapeDtypeStruct((3, num_in), dtype)
        out = jax.eval_shape(lambda s, x, graph=graph: nnx.merge(graph, s)(x), state, example)
        if out.shape != (3, num_out):
            raise ValueError(f"networks[{name!r}] must map (3, {num_in}) to (3, {num_out}), and "
                             f"maps it to {out.shape}.")  # fmt: skip
    return {name: MLP(size, rngs, dtype) for name, size in sizes.items()} | networks


def _check_options(priors, x, labels, reference, guide, known):
    if x.ndim != 2 or not np.isfinite(x).all():
        raise ValueError(f"x must be finite and (records, outputs), got shape {x.shape}.")
    if guide not in ("joint", "partitioned"):
        raise ValueError(f"guide must be 'joint' or 'partitioned', got {guide!r}.")
    if not labels:
        raise ValueError("Give a domain, classes or both: the residual is a function of them.")
    if taken := sorted(priors.keys() & _RESERVED):
        raise ValueError(f"priors has {taken}, which are names of other sites: choose others.")
    for name, prior in priors.items():
        if prior.batch_shape or prior.support.is_discrete:
            raise ValueError(
                f"The prior of {name!r} must be continuous and have no batch shape, got "
                f"{prior.batch_shape}: use to_event(1)."
            )
    if reference is not None and reference.keys() != labels.keys():
        raise ValueError(f"reference must have {sorted(labels)}, got {sorted(reference)}.")
    if known is not None and (known.ndim != 2 or len(known) != len(x)):
        raise ValueError(f"known must be ({len(x)}, n), got {known.shape}.")


def _check_physics(physics, priors, known, num_outputs):
    dtype = jnp.result_type(float)
    one = {name: jax.ShapeDtypeStruct(p.event_shape, dtype) for name, p in priors.items()}
    inputs = () if known is None else (jax.ShapeDtypeStruct(known.shape[1:], dtype),)
    out = jax.eval_shape(physics, one, *inputs)
    if getattr(out, "shape", None) != (num_outputs,):
        raise ValueError(
            f"physics must return one response ({num_outputs},) for the parameters of one record, "
            f"but returns {jax.tree.map(jnp.shape, out)}. physics_vae maps it over records."
        )
