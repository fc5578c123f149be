"""A physical model plus a residual network: NumPyro model and amortised guide."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.handlers import substitute

from probbp.models.physics_vae.checks import check_options, check_physics
from probbp.models.physics_vae.coordinates import Latent, constrain, latents_of
from probbp.models.physics_vae.labels import Label, standardisation
from probbp.models.physics_vae.networks import all_networks
from probbp.models.physics_vae.records import observe, records_plate, rows_of
from probbp.ops import gradient_reversal


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
        >>> from probbp.models.physics_vae import continuous, predict, svi
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
    check_options(priors, x, labels, reference, guide, known)
    num_outputs, dtype = x.shape[-1], jnp.result_type(x.dtype, jnp.float32)
    loc, scale = (jnp.asarray(a, dtype) for a in standardisation(x))
    overall = jnp.sqrt(jnp.mean(scale**2))
    # An output that hardly varies is noise, and is not blown up.
    scale = jnp.maximum(scale, overall / 10)

    latents, spread_of_u, spread_of_z = latents_of(priors, {name: dims[name] for name in labels})
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
    modules = all_networks(sizes, networks, nnx.Rngs(0) if rngs is None else rngs, dtype)
    check_physics(physics, priors, known, num_outputs)

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
        rows = rows_of(labels, x, c, y, known, has_c, has_y, num_records)
        sigma = numpyro.param("sigma_x", overall, constraint=dist.constraints.positive)
        if relative:
            strength = strength * jax.lax.stop_gradient(sigma) ** 2 / num_outputs
        with records_plate(rows, subsample_size) as rows:
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
                residual -= residual_net(gradient_reversal(z_ref, strength))
            residual *= overall
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
                    observe(name, label.likelihood(outputs), value, has)
                if invariance is not None and x is not None:
                    shift, spread = spread_of_z
                    told = jnp.concatenate(
                        [value.reshape(len(x), -1) for value in parameters.values()], -1
                    )
                    told = gradient_reversal((told - shift) / spread, invariance)
                    outputs = net(f"adversary_{name}")(told)
                    observe(f"{name}_adversary", label.likelihood(outputs), value, has)

    def amortised(
        x,
        c=None,
        y=None,
        *,
        known=None,
        has_c=None,
        has_y=None,
        subsample_size=None,
        **of_the_model,
    ):
        if x is None:
            raise ValueError("The guide reads the responses: pass x.")
        rows = rows_of(labels, x, c, y, known, has_c, has_y, None)
        with records_plate(rows, subsample_size) as rows:
            mean, factor = gaussian(rows["x"])
            standard = dist.Normal(jnp.zeros_like(mean), 1.0).to_event(1)
            noise = numpyro.sample("noise", standard, infer={"is_auxiliary": True})
            u = mean + (factor @ noise[..., None])[..., 0]
            log_diagonal = jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1))
            for name, latent in latents.items():
                value, log_det = constrain(latent, u)
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

    parts = (model, amortised, encode, predict_label)
    return PhysicsVAE(*parts, dict(priors), labels, latents, num_outputs)
