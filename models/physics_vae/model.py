"""A physical model plus a residual network: NumPyro model and amortised guide."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.handlers import substitute

from probbp.checks import check_count
from probbp.models.physics_vae.checks import check_options, check_physics
from probbp.models.physics_vae.coordinates import Latent, latents_of
from probbp.models.physics_vae.decoder import model_of
from probbp.models.physics_vae.encoder import blocks_of, gaussian_of, guide_of
from probbp.models.physics_vae.labels import Label, standardisation
from probbp.models.physics_vae.networks import all_networks


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
    domain_dim = check_count("domain_dim", domain_dim)
    class_dim = check_count("class_dim", class_dim)
    width = check_count("width", width, 2)
    x, known = np.asarray(x), None if known is None else np.asarray(known)
    labels = {"c": domain, "y": classes}
    labels = {name: label for name, label in labels.items() if label is not None}
    dims = {"c": domain_dim, "y": class_dim}
    dims = {name: dims[name] for name in labels}
    check_options(priors, x, labels, reference, guide, known)
    num_outputs, dtype = x.shape[-1], jnp.result_type(x.dtype, jnp.float32)
    loc, scale = (jnp.asarray(a, dtype) for a in standardisation(x))
    overall = jnp.sqrt(jnp.mean(scale**2))
    # An output that hardly varies is noise, and is not blown up.
    scale = jnp.maximum(scale, overall / 10)

    latents, spread_of_u, spread_of_z = latents_of(priors, dims)
    blocks = blocks_of(latents, priors, guide)
    sizes = _sizes(blocks, labels, dims, num_outputs, spread_of_z.shape[1], width)
    modules = all_networks(sizes, networks, nnx.Rngs(0) if rngs is None else rngs, dtype)
    check_physics(physics, priors, known, num_outputs)

    def net(name):
        return nnx_module(name, modules[name])

    model = model_of(physics, priors, labels, net, reference, overall, num_outputs, spread_of_z)
    gaussian = gaussian_of(net, blocks, loc, scale, spread_of_u.astype(dtype))

    def encode(params, x):
        with substitute(data=dict(params)):
            return gaussian(x)

    def predict_label(params, name, z):
        with substitute(data=dict(params)):
            return labels[name].likelihood(net(f"head_{name}")(z))

    return PhysicsVAE(
        model=model,
        guide=guide_of(gaussian, net, labels, latents),
        encode=encode,
        predict_label=predict_label,
        priors=dict(priors),
        labels=labels,
        latents=latents,
        num_outputs=num_outputs,
    )


def _sizes(blocks, labels, dims, num_outputs, num_parameters, width) -> dict[str, tuple[int, ...]]:
    """Return the layers' sizes of the default networks, by name."""
    half = width // 2
    sizes: dict[str, tuple[int, ...]] = {
        name: (num_outputs, width, width, d * (d + 3) // 2) for name, (_, d) in blocks.items()
    }
    sizes["residual"] = (sum(dims.values()), width, num_outputs)
    for name, label in labels.items():
        sizes[f"prior_{name}"] = (label.num_features, half, 2 * dims[name])
        sizes[f"head_{name}"] = (dims[name], half, label.num_outputs)
        sizes[f"adversary_{name}"] = (num_parameters, half, label.num_outputs)
    return sizes
