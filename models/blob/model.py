"""A pretrained network with a distribution over its low-rank update: model and guide."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.core import Tracer
from numpyro.handlers import scale as scaled

from probbp.checks import check_choice, check_count, check_number
from probbp.models import lora as low_rank
from probbp.models.blob.divergence import divergence, std
from probbp.models.lora import Factors, Layout

Noise = Literal["flipout", "independent", "shared"]


class BayesianLora(NamedTuple):
    """A network with a distribution over its low-rank update, from `bayesian_lora`.

    Attributes:
        model: `(base, *inputs, y=None, num_data=None, kl_weight=1.0, noise=...)`, for NumPyro.
        guide: called as the model is.
        apply: `(base, factors, *inputs) -> output`, the adapted network for one value of A and B.
        layouts: of the adapted weights, by name.
        rank: r.
        scale: s = alpha / r, of the update.
        prior_scale: standard deviation of A before data.
        dtypes: of the factors, by name.
    """

    model: Callable[..., None]
    guide: Callable[..., None]
    apply: Callable[..., Any]
    layouts: dict[str, Layout]
    rank: int
    scale: float
    prior_scale: float
    dtypes: dict[str, Any]


def categorical(logits: jax.Array) -> dist.Distribution:
    """Return the likelihood of class labels, the default: logits (batch, classes).

    Args:
        logits: (batch, classes).

    Returns:
        A NumPyro distribution.
    """
    return dist.Categorical(logits=logits)


def bayesian_lora(
    apply_fn: Callable[..., Any],
    params: Any,
    *,
    target: str,
    example: tuple[Any, ...],
    rank: int = 8,
    alpha: float = 16.0,
    prior_scale: float = 0.2,
    init_std: float = 0.0025,
    noise: Noise = "flipout",
    likelihood: Callable[[Any], dist.Distribution] = categorical,
    dtype: jax.typing.DTypeLike | None = None,
    materialise: bool = False,
) -> BayesianLora:
    r"""Turn a pretrained network into a NumPyro model and guide of its low-rank adaptation.

    .. math::
        A \sim N(0, \sigma_p^2), \qquad y_i \sim p(y \mid f(x_i;\, W + s B A)), \qquad
        q(A) = N(M, (G \circ G)^2)

    for each weight whose name matches, all factors independent. The network is any JAX function
    and is not edited: of a Flax Linen module take `module.apply`; of an NNX one
    `graph, state = nnx.split(model)` and `lambda state, x: nnx.merge(graph, state)(x)`; of an
    Equinox one `arrays, rest = equinox.partition(model, equinox.is_array)` and
    `lambda arrays, x: jax.vmap(equinox.combine(arrays, rest))(x)`. Its own parameters are the
    model's first argument: frozen, not known to the optimiser, and not compiled into the program.

    **Sites.** For a weight `w` the sample site `w_A` (rank, in) and the parameters `w_B` (out,
    rank) of the model, `w_loc` and `w_g` (rank, in) of the guide; with the stacked axes in front
    where layers are stacked. `logits` is deterministic, `y` observed.

    **Noise.** How :math:`E_q \log p(y \mid A)` is estimated from one draw of A. All three have the
    same mean; model, divergence and optimum are not touched by the choice.

    - "shared": the draw for all examples. Their errors add up.
    - "flipout": the deviation A - M of the draw with random signs of rows and columns for each
      example, :math:`(A - M) \circ t_i s_i^T` (Wen et al., 2018, arXiv:1803.04386). It has the law
      of the posterior, because that is symmetric and factorised, and is uncorrelated between
      examples. An example keeps its signs at all its tokens: attention makes the likelihood a
      function of all of them, and signs for each token would be weights that no draw has, which
      biases the expectation. Two more products of the size of the rank.
    - "independent": a draw for each example. As many random numbers as A has entries, times the
      batch.

    With one example, or as the posterior's scale goes to zero, the three are the same. The latter
    two evaluate examples one by one under `jax.vmap`, so that statistics over the batch (batch
    norm in training) are those of one example. Where the guide is not in play (prior predictive,
    MCMC over A), the model takes A as it is.

    **Objective.** With `TraceMeanField_ELBO` the divergence is exact:

    .. math::
        KL = \sum_{ij} \log\frac{\sigma_p}{\Omega_{ij}}
            + \frac{\Omega_{ij}^2 + M_{ij}^2}{2 \sigma_p^2} - \frac12

    It is the divergence between distributions of the whole weight as well (theorems 3.1 and 3.2 of
    the paper): q(W) is Gaussian with mean :math:`W + s B M` and, columns stacked, covariance
    :math:`s^2 (I \otimes B)\, \mathrm{diag}(\Omega)^2\, (I \otimes B)^T`; the prior is
    :math:`N(W, \sigma_p^2 s^2\, I \otimes B B^T)`. Both are images of q(A) and p(A) under one
    affine map, which leaves the divergence as it is where B has full column rank. Where it has not,
    as at B = 0 or with a rank above the number of outputs, it is an upper bound of that of W.

    The prior of W depends on B, which is fitted: this is empirical Bayes. For the same reason
    `prior_scale` is no modelling choice: scaling A by c, B by 1 / c and `prior_scale` by c changes
    neither likelihood nor divergence. It acts through the learning rates alone, unless B is held
    by weight decay.

    Args:
        apply_fn: `(params, *inputs) -> logits`, with the examples on the first axis of each input
            and of what it returns.
        params: pytree of arrays, or of their shapes.
        target: regular expression, searched for in the names of `probbp.models.lora.named_leaves`.
        example: inputs of any batch, or their shapes. Traced, not computed.
        rank: r.
        alpha: the update is scaled by alpha / rank.
        prior_scale: sigma_p.
        init_std: where the posterior's standard deviation starts: G is uniform between
            sqrt(init_std / 2) and sqrt(init_std). M is uniform in +-1 / sqrt(in), and B zero.
        noise: as above.
        likelihood: of what `apply_fn` returns, one distribution an example: batch shape (batch,).
            Tokens of a sequence belong to its event, by `to_event(1)`.
        dtype: of the factors; by default that of each weight, at least single precision.
        materialise: whether to form dense weights and evaluate the network with them, for networks
            that quax cannot trace: those with a `custom_vjp`, convolutions, embeddings. One weight
            an example, or one for all with `noise="shared"`.

    Returns:
        Model and guide, which ignore what the other needs, so that both are called with
        `(base, *inputs, y=None, num_data=None, kl_weight=1.0, noise=noise)`:

        - `base`: the network's parameters, as `params`.
        - `y`: (batch, ...) or `None` to predict.
        - `num_data`: examples in all; the log likelihood of the batch is multiplied by num_data /
          batch, which makes the objective an unbiased estimate of the whole ELBO. The batch itself
          by default.
        - `kl_weight`: factor of the divergence in SVI, a temperature: below 1 the posterior is
          sharper than Bayes' rule has it. The exact ELBO by default.
        - `noise`: instead of the one given here.

    Raises:
        ValueError: for options out of range, and as `probbp.models.lora.layouts` does.
        TypeError: for parameters that are not arrays.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from numpyro.infer import SVI, TraceMeanField_ELBO
        >>> network = lambda params, x: jnp.tanh(x @ params["hidden"]) @ params["head"]
        >>> params = {"hidden": jnp.eye(4), "head": jnp.ones((4, 2))}
        >>> x, y = jnp.tile(jnp.eye(4), (9, 1)), jnp.tile(jnp.array([0, 0, 1, 1]), 9)
        >>> lora = bayesian_lora(network, params, target="head", example=(x,), rank=2)
        >>> svi = SVI(lora.model, lora.guide, optax.adam(0.1), TraceMeanField_ELBO())
        >>> result = svi.run(jax.random.key(0), 200, params, x, y=y, progress_bar=False)
        >>> sorted(result.params)
        ['head_B', 'head_g', 'head_loc']
        >>> from probbp.models.blob import predict
        >>> logits = predict(lora, jax.random.key(1), result.params, params, x[:4])
        >>> jax.nn.softmax(logits).mean(0).argmax(-1).tolist()
        [0, 0, 1, 1]
    """
    check_number("alpha", alpha, "(0, inf)")
    check_number("prior_scale", prior_scale, "(0, inf)")
    check_number("init_std", init_std, "(0, inf)")
    rank = check_count("rank", rank)
    _check_noise(noise)
    layouts = low_rank.layouts(apply_fn, params, target, example, materialise=materialise)
    clash = [name for name in layouts if f"{name}_B" in layouts]
    if clash:
        raise ValueError(
            f"{clash[0]!r} and {clash[0] + '_B'!r} would share the name of a parameter. Narrow "
            "target, or rename one."
        )
    if dtype is not None and jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"The factors need at least single precision, not {jnp.dtype(dtype)}: their deviations "
            "are small. The network's own weights may be of any dtype."
        )
    dtypes = {
        name: jnp.dtype(dtype or jnp.promote_types(layout.dtype, jnp.float32))
        for name, layout in layouts.items()
    }
    scale = alpha / rank
    apply = partial(low_rank.apply, apply_fn, layouts, scale, materialise=materialise)

    def model(base, *inputs, y=None, num_data=None, kl_weight=1.0, noise=noise):
        _check_noise(noise)
        if num_data is not None:
            check_number("num_data", num_data, "(0, inf)")
        batch = _batch_size(inputs)
        factors, axes = {}, {}
        for name, layout in layouts.items():
            shape, dtype = layout.shape_of_a(rank), dtypes[name]
            prior = dist.Normal(jnp.zeros(shape, dtype), jnp.asarray(prior_scale, dtype))
            a = _sample(name, prior, kl_weight).astype(dtype)
            b = numpyro.param(f"{name}_B", jnp.zeros(layout.shape_of_b(rank), dtype))
            # The guide's parameters, where there is a guide.
            loc, g = numpyro.param(f"{name}_loc"), numpyro.param(f"{name}_g")
            factors[name], axes[name] = Factors(a, b), None
            if noise != "shared" and loc is not None and g is not None:
                draw = _flipout if noise == "flipout" else _independent
                key = numpyro.prng_key()
                if key is None:
                    raise ValueError(
                        f"noise={noise!r} needs a key for the examples: put the model inside "
                        "numpyro.handlers.seed, or pass noise='shared'."
                    )
                factors[name], axes[name] = draw(key, batch, a, b, loc, g)
        if any(axis is not None for axis in axes.values()):
            logits = _each_example(apply, base, factors, axes, inputs)
        else:
            logits = apply(base, factors, *inputs)
        numpyro.deterministic("logits", logits)
        likelihood_of_batch = likelihood(logits)
        if likelihood_of_batch.batch_shape != (batch,):
            raise ValueError(
                f"likelihood has batch shape {likelihood_of_batch.batch_shape}, but there are "
                f"{batch} examples: give one distribution an example, its further axes by to_event."
            )
        weight = 1.0 if num_data is None else num_data / batch
        with scaled(scale=weight), numpyro.plate("examples", batch):
            numpyro.sample("y", likelihood_of_batch, obs=y)

    def guide(base, *inputs, y=None, num_data=None, kl_weight=1.0, noise=noise):
        for name, layout in layouts.items():
            shape, dtype = layout.shape_of_a(rank), dtypes[name]
            bound, root = layout.num_in**-0.5, math.sqrt(init_std)
            loc = numpyro.param(f"{name}_loc", _uniform(shape, dtype, -bound, bound))
            g = numpyro.param(f"{name}_g", _uniform(shape, dtype, root / math.sqrt(2), root))
            _sample(name, dist.Normal(loc, std(g)), kl_weight)

    lora = BayesianLora(model, guide, apply, layouts, rank, scale, prior_scale, dtypes)
    _check_network(lora, params, example)
    return lora


def kl(lora: BayesianLora, params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the divergence of posterior from prior, in nats, for each adapted weight.

    Exact, and the term of `TraceMeanField_ELBO`.

    Args:
        lora: from `bayesian_lora`.
        params: of SVI.

    Returns:
        Names to scalars.

    Example:
        >>> import jax.numpy as jnp
        >>> network, base = lambda params, x: x @ params["w"], {"w": jnp.zeros((4, 2))}
        >>> lora = bayesian_lora(network, base, target="w", example=(jnp.eye(4),), rank=2)
        >>> params = {"w_loc": jnp.zeros((2, 4)), "w_g": jnp.ones((2, 4)), "w_B": jnp.ones((2, 2))}
        >>> sorted(kl(lora, params))
        ['w']
    """
    return {
        name: divergence(params[f"{name}_loc"], params[f"{name}_g"], lora.prior_scale)
        for name in lora.layouts
    }


def _check_noise(noise):
    check_choice("noise", noise, get_args(Noise))


def _batch_size(inputs) -> int:
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(inputs)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "The examples are the first axis of every input, but the inputs have shapes "
            f"{[jnp.shape(leaf) for leaf in jax.tree.leaves(inputs)]}. What is the same for all "
            "examples belongs into apply_fn, by functools.partial."
        )
    return sizes.pop()[0]


def _check_network(lora, params, example):
    """Trace the adapted network, so that what cannot be traced fails here."""
    batch = _batch_size(example)
    factors = {
        name: Factors(
            jax.ShapeDtypeStruct(layout.shape_of_a(lora.rank), lora.dtypes[name]),
            jax.ShapeDtypeStruct(layout.shape_of_b(lora.rank), lora.dtypes[name]),
        )
        for name, layout in lora.layouts.items()
    }
    out = jax.eval_shape(lora.apply, params, factors, *example)
    shapes = [leaf.shape for leaf in jax.tree.leaves(out)]
    if any(shape[:1] != (batch,) for shape in shapes):
        raise ValueError(
            f"apply_fn must return the {batch} examples on the first axis, but returns {shapes}."
        )


def _uniform(shape, dtype, low, high):
    return lambda key: jax.random.uniform(key, shape, dtype, low, high)


def _sample(name, distribution, kl_weight):
    event = distribution.to_event(len(distribution.batch_shape))
    check_number("kl_weight", kl_weight, "[0, inf)")
    if not isinstance(kl_weight, Tracer) and kl_weight == 1:
        return numpyro.sample(f"{name}_A", event)
    # A scale must be positive; this one leaves nothing of the divergence.
    with scaled(scale=jnp.maximum(kl_weight, jnp.finfo(jnp.float32).tiny)):
        return numpyro.sample(f"{name}_A", event)


def _flipout(key, batch, a, b, loc, g):
    key_in, key_out = jax.random.split(key)
    in_signs = jax.random.rademacher(key_in, (batch, *a.shape[:-2], a.shape[-1]), a.dtype)
    out_signs = jax.random.rademacher(key_out, (batch, *a.shape[:-1]), a.dtype)
    return (
        Factors(loc, b, a - loc, in_signs, out_signs),
        Factors(None, None, None, 0, 0),
    )


def _independent(key, batch, a, b, loc, g):
    draws = loc + std(g) * jax.random.normal(key, (batch, *a.shape), a.dtype)
    return Factors(draws, b), Factors(0, None)


def _each_example(apply, base, factors, axes, inputs):
    def one(factors, inputs):
        out = apply(base, factors, *jax.tree.map(lambda leaf: leaf[None], inputs))
        return jax.tree.map(lambda leaf: leaf[0], out)

    return jax.vmap(one, in_axes=(axes, 0))(factors, inputs)
