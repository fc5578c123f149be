r"""A Gaussian posterior over all low-rank factors, fitted by natural gradients at the cost of Adam.

IVON, the improved variational online Newton method, Shen et al., 2024, arXiv:2402.17641; for
low-rank adaptation, Cong et al., 2025, arXiv:2506.14280. Where BLoB has noise on A and a point for
B, here both have it. Neither a parameter of scale nor its gradient: the variances come out of the
curvature, which the gradient at a draw and the draw's noise estimate together.

    optimiser = ivon(0.1, num_data=len(y))
    factors = init(lora, rng_key)
    state = optimiser.init(factors)
    ...
    draw = optimiser.sample(key, factors, state)
    grads = jax.grad(mean_loss(lora))(draw, base, x, y=y)
    updates, state = optimiser.update(grads, state, factors, draw=draw)
    factors = optax.apply_updates(factors, updates)
    ...
    logits = blob.predict(lora, key, posterior(lora, factors, optimiser.std(state)), base, x)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from numpyro.handlers import substitute, trace

from probbp.checks import check_number, check_rng_key
from probbp.models.blob import BayesianLora, root_of_std


class IvonState(NamedTuple):
    """State of `ivon`.

    Attributes:
        count: steps made.
        momentum: running mean of the gradient.
        hessian: running mean of the diagonal of the mean loss's second derivative.
    """

    count: jax.Array
    momentum: Any
    hessian: Any


class Ivon(NamedTuple):
    """An optimiser whose parameters are the mean of a Gaussian, from `ivon`.

    Attributes:
        init: `(mean) -> state`, as in Optax.
        update: `(grads, state, mean, *, draw) -> (updates, state)`, as in Optax, with the gradient
            of the mean loss at `draw`.
        sample: `(rng_key, mean, state) -> draw`, like `mean`.
        std: `(state) -> standard deviations`, like `mean`.
    """

    init: Callable[[Any], IvonState]
    update: Callable[..., tuple[Any, IvonState]]
    sample: Callable[[jax.Array, Any, IvonState], Any]
    std: Callable[[IvonState], Any]


def ivon(
    learning_rate: float | Callable[[jax.Array], Any],
    *,
    num_data: float | jax.Array,
    prior_scale: float = 1.0,
    kl_weight: float | jax.Array = 1.0,
    hessian_init: float | jax.Array = 1.0,
    decay: tuple[float, float] = (0.9, 0.999),
) -> Ivon:
    r"""Fit :math:`q = N(m, \sigma^2)`, independent entries, by the variational online Newton rule.

    It descends :math:`\lambda\, E_q[\bar\ell] + KL(q \| N(0, \sigma_p^2))`, with the mean loss
    :math:`\bar\ell` of an example and :math:`\lambda = N / \tau` for N data and the divergence's
    weight :math:`\tau`. With :math:`\delta = 1 / (\lambda \sigma_p^2)` and the gradient g at a draw
    :math:`\theta = m + \sigma \epsilon`, a step (algorithm 1) is

    .. math::
        \hat h = g\, \epsilon / \sigma, \qquad
        h \leftarrow h + (1 - \beta_2) (\hat h - h)
            + \frac{(1 - \beta_2)^2}{2} \frac{(\hat h - h)^2}{h + \delta}, \qquad
        m \leftarrow m - \alpha\, (h_0 + \delta) \frac{\bar g + \delta m}{h + \delta}, \qquad
        \sigma = \frac{1}{\sqrt{\lambda (h + \delta)}}

    with a mean :math:`\bar g` over steps, as in Adam. :math:`\hat h` is unbiased for the diagonal
    of :math:`E_q \nabla^2 \bar\ell` (theorem of Price; Stein's identity), with g of a batch as
    well. The square in the second equation keeps :math:`h + \delta` above half of what it was, and
    so positive, whatever the estimate.

    For a quadratic loss with second derivative H the rule comes to rest, but for the noise of its
    estimates, at the mean-field posterior: the exact mean, and the precisions
    :math:`\lambda\, \mathrm{diag}(H) + 1 / \sigma_p^2`. The square makes h too large by
    :math:`(1 - \beta_2) \mathrm{Var}(\hat h) / 2 (h + \delta)`, which is the price of its sign.

    One gradient a step, and memory for two more copies of the parameters, as Adam. `jit`, `vmap`,
    both AD modes.

    Args:
        learning_rate: alpha, or a function of the number of steps made. At the start a step is
            alpha times the gradient.
        num_data: N, examples in all.
        prior_scale: sigma_p.
        kl_weight: tau, a temperature: below 1 the posterior is sharper than Bayes' rule has it.
        hessian_init: h_0. It sets where sigma starts: with 80 data and the defaults at 0.11.
        decay: beta_1 of the gradient, beta_2 of the second derivative. The latter's memory,
            1 / (1 - beta_2) steps, is to be shorter than the run.

    Raises:
        ValueError: for options out of range.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> curvature = jnp.array([1.0, 4.0])
        >>> loss = lambda x: 0.5 * jnp.sum(curvature * (x - 1) ** 2)
        >>> optimiser = ivon(0.1, num_data=100)
        >>> def step(carry, key):
        ...     mean, state = carry
        ...     draw = optimiser.sample(key, mean, state)
        ...     updates, state = optimiser.update(jax.grad(loss)(draw), state, mean, draw=draw)
        ...     return (optax.apply_updates(mean, updates), state), None
        >>> carry = jnp.zeros(2), optimiser.init(jnp.zeros(2))
        >>> (mean, state), _ = jax.lax.scan(step, carry, jax.random.split(jax.random.key(0), 5_000))
        >>> exact = (100 * curvature + 1) ** -0.5
        >>> bool(jnp.all(abs(optimiser.std(state) / exact - 1) < 0.1))
        True
    """
    for name, value in (
        ("num_data", num_data),
        ("prior_scale", prior_scale),
        ("kl_weight", kl_weight),
        ("hessian_init", hessian_init),
    ):
        check_number(name, value, "(0, inf)")
    if not callable(learning_rate):
        check_number("learning_rate", learning_rate, "[0, inf)")
    if not isinstance(decay, Sequence) or len(decay) != 2:
        raise ValueError(f"decay must be two numbers, of gradient and curvature, got {decay}.")
    for beta in decay:
        check_number("decay", beta, "[0, 1)")
    beta1, beta2 = decay
    weight = num_data / kl_weight  # lambda
    delta = 1 / (weight * prior_scale**2)

    def init(mean):
        hessian = jax.tree.map(lambda leaf: jnp.full_like(leaf, hessian_init), mean)
        return IvonState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(mean), hessian)

    def std(state):
        return jax.tree.map(lambda h: 1 / jnp.sqrt(weight * (h + delta)), state.hessian)

    def sample(rng_key, mean, state):
        noise = optax.tree.random_like(rng_key, mean)
        return jax.tree.map(lambda m, s, e: m + s * e, mean, std(state), noise)

    def update(grads, state, mean=None, *, draw):
        if mean is None:
            raise ValueError("ivon needs the mean: update(grads, state, mean, draw=draw).")
        count = state.count + 1
        momentum = optax.tree.update_moment(grads, state.momentum, beta1, 1)
        debiased = optax.tree.bias_correction(momentum, beta1, count)
        rate: Any = learning_rate(state.count) if callable(learning_rate) else learning_rate
        rate = rate * (hessian_init + delta)

        def curvature(h, g, m, theta):
            precision = weight * (h + delta)
            change = (1 - beta2) * (g * (theta - m) * precision - h)
            return (h + change + change**2 / (2 * (h + delta))).astype(h.dtype)

        def move(h, g, m):
            return (-rate * (g + delta * m) / (h + delta)).astype(m.dtype)

        hessian = jax.tree.map(curvature, state.hessian, grads, mean, draw)
        updates = jax.tree.map(move, hessian, debiased, mean)
        return updates, IvonState(count, momentum, hessian)

    return Ivon(init, update, sample, std)


def init(lora: BayesianLora, rng_key: jax.Array) -> dict[str, jax.Array]:
    """Return factors to start from: A uniform in +-1 / sqrt(in), B zero.

    Args:
        lora: from `bayesian_lora`.
        rng_key: a key.

    Returns:
        Arrays under the names of the sites: `w_A` (..., rank, in) and `w_B` (..., out, rank).
    """
    check_rng_key("rng_key", rng_key)
    factors = {}
    keys = jax.random.split(rng_key, len(lora.layouts))
    for (name, layout), key in zip(lora.layouts.items(), keys, strict=True):
        shape, dtype, bound = layout.shape_of_a(lora.rank), lora.dtypes[name], layout.num_in**-0.5
        factors[f"{name}_A"] = jax.random.uniform(key, shape, dtype, -bound, bound)
        factors[f"{name}_B"] = jnp.zeros(layout.shape_of_b(lora.rank), dtype)
    return factors


def mean_loss(lora: BayesianLora) -> Callable[..., jax.Array]:
    """Return the mean negative log likelihood of an example as a function of the factors.

    The likelihood is that of `bayesian_lora`.

    Args:
        lora: from `bayesian_lora`.

    Returns:
        `(factors, base, *inputs, y) -> loss`, with factors like those of `init`.
    """

    def loss(factors, base, *inputs, y):
        model = substitute(lora.model, factors)
        site = trace(model).get_trace(base, *inputs, y=y, noise="shared")["y"]
        return -site["fn"].log_prob(y).mean()

    return loss


def posterior(
    lora: BayesianLora, factors: Mapping[str, jax.Array], std: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Return a posterior of both factors as parameters for `blob.predict`, `merge` and `save`.

    Args:
        lora: from `bayesian_lora`.
        factors: the mean, as `init` names it.
        std: standard deviations, likewise.

    Returns:
        `w_loc` and `w_g` of A as in `bayesian_lora`, `w_B` and beside it `w_B_g`, of the same kind.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from probbp.models import blob
        >>> network, base = lambda params, x: x @ params["w"], {"w": jnp.zeros((4, 2))}
        >>> x, y = jnp.eye(4), jnp.array([0, 0, 1, 1])
        >>> lora = blob.bayesian_lora(network, base, target="w", example=(x,), rank=2)
        >>> factors = init(lora, jax.random.key(0))
        >>> round(float(mean_loss(lora)(factors, base, x, y=y)), 3)  # log 2
        0.693
        >>> optimiser = ivon(0.1, num_data=4)
        >>> params = posterior(lora, factors, optimiser.std(optimiser.init(factors)))
        >>> sorted(params)
        ['w_B', 'w_B_g', 'w_g', 'w_loc']
        >>> blob.predict(lora, jax.random.key(1), params, base, x, num_samples=3).shape
        (3, 4, 2)
    """
    params = {}
    for name in lora.layouts:
        params[f"{name}_loc"] = factors[f"{name}_A"]
        params[f"{name}_g"] = root_of_std(std[f"{name}_A"])
        params[f"{name}_B"] = factors[f"{name}_B"]
        params[f"{name}_B_g"] = root_of_std(std[f"{name}_B"])
    return params
