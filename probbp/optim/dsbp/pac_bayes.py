r"""A certificate on the risk of a network trained in a subspace, computed and not only stated.

Dynamic spectral backpropagation (Muthuraman, 2025, arXiv:2505.23369) argues for generalisation by a
PAC-Bayes bound; the statement here is derived anew. A prior :math:`N(w_0, s^2 I)` and a posterior,
both Gaussian on the subspace :math:`w_0 + \mathrm{col}(E)`, are compared on n examples: with
probability at least :math:`1 - \delta` over these, for all posteriors at once and a loss within 0
and 1,

.. math:: \mathrm{kl}(E_Q L_S \,\|\, E_Q L) \le
        \frac{\mathrm{KL}(Q \| P) + \ln (2 \sqrt n / \delta)}{n}

(Langford & Seeger, 2001; Maurer, 2004). It holds if the prior, its basis E included, does not
depend on these examples. A basis tracked while training on them does depend on them, and then
nothing is certified; `Prior` therefore carries the rows it was made from, and `certificate` refuses
a bound on any of these.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.flatten_util import ravel_pytree

from probbp.checks import check_count, check_number, check_numbers, check_rng_key
from probbp.types import Tree


class Prior(NamedTuple):
    """A Gaussian on a subspace, and what it was made from. Made by `prior`.

    Attributes:
        center: w_0, pytree.
        vectors: E, (parameters, dim).
        scale: s, the standard deviation along each column.
        rows: the rows of the data that center, basis or scale depend on.
        num_candidates: how many such priors the examples will choose from.
    """

    center: Tree
    vectors: jax.Array
    scale: float
    rows: frozenset[int]
    num_candidates: int


class Posterior(NamedTuple):
    """A Gaussian in the coordinates of a prior's subspace; it may depend on anything.

    Attributes:
        mean: (dim,).
        axes: (dim, dim), the orthonormal eigenvectors of its covariance, in columns.
        variances: t, (dim,), its eigenvalues.
    """

    mean: jax.Array
    axes: jax.Array
    variances: jax.Array


class Certificate(NamedTuple):
    """A bound on the risk of a network drawn from the posterior, and its parts.

    Attributes:
        bound: on E_Q L, from the kl-inverse.
        sqrt_bound: the same from Pinsker's inequality, never smaller.
        empirical: the mean loss of the draws on the examples.
        empirical_bound: what E_Q L_S is at most, given how few draws there were.
        kl: KL(Q || P) in nats.
        num_rows: n.
        delta: the probability that the bound is wrong, at most; both parts together.
    """

    bound: jax.Array
    sqrt_bound: jax.Array
    empirical: jax.Array
    empirical_bound: jax.Array
    kl: jax.Array
    num_rows: int
    delta: float


def prior(
    center: Tree,
    vectors: jax.Array,
    scale: float,
    *,
    rows: Sequence[int] | jax.Array | None = None,
    independent: bool = False,
    num_candidates: int = 1,
) -> Prior:
    r"""Return a prior that says what it was made from.

    Everything in it counts: the center, the basis, the scale, and what makes inputs of raw data, a
    scaler's mean too. Inputs without labels are no exception: a basis of the activations of a row
    depends on that row.

    Args:
        center: w_0.
        vectors: E, (parameters, dim), in the order of `jax.flatten_util.ravel_pytree(center)`.
        scale: s.
        rows: the rows that it was made from, in the data that `certificate` will be given.
        independent: the statement that no row of that data had a part in it: random directions, or
            pre-training on other data. Then without `rows`.
        num_candidates: M, if the best of M priors (scales, ranks) is chosen by the bound itself:
            each then holds with probability :math:`1 - \delta / M`.

    Raises:
        ValueError: if it is said neither which rows made it nor that none did, or both; and for
            vectors that do not fit the center.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> basis = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (6, 2)))[0]
        >>> prior(jnp.zeros(6), basis, 1.0, independent=True).rows
        frozenset()
        >>> sorted(prior(jnp.zeros(6), basis, 1.0, rows=range(3)).rows)
        [0, 1, 2]
    """
    if (rows is None) != independent:
        raise ValueError(
            "Say what the prior was made from: rows=..., the rows of the data that its center, "
            "basis or scale depend on, or independent=True if none does. A basis tracked in "
            "training depends on all rows that it was trained on."
        )
    num_params = ravel_pytree(center)[0].size
    if jnp.ndim(vectors) != 2 or len(vectors) != num_params:
        raise ValueError(
            f"vectors must be ({num_params}, dim) for this center, got {jnp.shape(vectors)}."
        )
    check_number("scale", scale, "(0, inf)")
    num_candidates = check_count("num_candidates", num_candidates)
    return Prior(center, vectors, scale, _as_rows(() if rows is None else rows), num_candidates)


def embed(prior: Prior, coordinates: jax.Array) -> Tree:
    """Return the parameters w_0 + E z of coordinates (dim,).

    Example:
        >>> import jax.numpy as jnp
        >>> line = prior({"w": jnp.ones(2)}, jnp.array([[0.0], [1.0]]), 1.0, independent=True)
        >>> embed(line, jnp.array([3.0]))["w"].tolist()
        [1.0, 4.0]
    """
    flat, unravel = ravel_pytree(prior.center)
    return unravel(flat + (prior.vectors @ coordinates).astype(flat.dtype))


def optimal_variances(curvature: jax.Array, scale: float, num_rows: float) -> jax.Array:
    r"""Return :math:`t_i = 1 / (1 / s^2 + n h_i)`, the best variances for a quadratic loss.

    They minimise :math:`n E_Q L_S + \mathrm{KL}` with
    :math:`E_Q L_S = L_S + \frac12 \sum_i t_i h_i`. A negative curvature counts as none.

    Args:
        curvature: h, eigenvalues of the Hessian of the mean loss in the subspace.
        scale: s.
        num_rows: n.

    Example:
        >>> import jax.numpy as jnp
        >>> optimal_variances(jnp.array([0.0, 0.3]), scale=1.0, num_rows=10).tolist()
        [1.0, 0.25]
    """
    check_number("scale", scale, "(0, inf)")
    check_number("num_rows", num_rows, "[0, inf)")
    return 1 / (1 / scale**2 + num_rows * jnp.maximum(curvature, 0.0))


def laplace(
    loss_fn: Callable[[Tree], jax.Array], prior: Prior, mean: jax.Array, num_rows: float
) -> Posterior:
    """Return the posterior with the optimal variances at a mean.

    The axes are eigenvectors of the Hessian within the subspace. That they depend on the examples
    is allowed: the prior is the same in all of them. Costs `dim` Hessian-vector products.

    Args:
        loss_fn: of the params: the mean over the examples of a smooth loss.
        prior: of the subspace.
        mean: (dim,), coordinates where training ended.
        num_rows: n, or another weight of the loss against the KL.

    Example:
        >>> import jax.numpy as jnp
        >>> plane = prior(jnp.zeros(2), jnp.eye(2), 1.0, independent=True)
        >>> posterior = laplace(lambda w: 0.3 * w[0] ** 2 / 2, plane, jnp.zeros(2), num_rows=10)
        >>> [round(float(t), 3) for t in posterior.variances]
        [1.0, 0.25]
    """
    hessian = jax.hessian(lambda z: loss_fn(embed(prior, z)))(mean)
    curvature, axes = jnp.linalg.eigh(hessian)
    return Posterior(mean, axes, optimal_variances(curvature, prior.scale, num_rows))


def divergence(posterior: Posterior, scale: float) -> jax.Array:
    r"""Return KL(Q || P) in nats.

    .. math:: \tfrac12 \Big[|z|^2 / s^2 + \sum_i (t_i / s^2 - 1 - \ln (t_i / s^2))\Big]

    Args:
        posterior: mean z and variances t.
        scale: s, of the prior.

    Example:
        >>> import jax.numpy as jnp
        >>> float(divergence(Posterior(jnp.array([2.0, 0.0]), jnp.eye(2), jnp.ones(2)), scale=1.0))
        2.0
    """
    check_number("scale", scale, "(0, inf)")
    check_numbers("posterior's variances", posterior.variances, "(0, inf)")
    ratio = posterior.variances / scale**2
    distance = jnp.sum(posterior.mean**2) / scale**2
    return (distance + jnp.sum(ratio - 1 - jnp.log(ratio))) / 2


def kl_inverse(risk: jax.typing.ArrayLike, budget: jax.typing.ArrayLike) -> jax.Array:
    r"""Return the largest p with :math:`\mathrm{kl}(q \| p) \le c`, by bisection.

    :math:`\mathrm{kl}(q \| p) = q \ln (q/p) + (1-q) \ln ((1-q)/(1-p))`. What is returned is the
    upper end of the last interval, so that the halving never makes a bound too small.

    Args:
        risk: q, within 0 and 1. Of any shape.
        budget: c, not negative.

    Example:
        >>> round(float(kl_inverse(0.0, 0.1)), 4)  # 1 - exp(-0.1)
        0.0952
    """
    check_numbers("risk", risk, "[0, 1]")
    check_numbers("budget", budget, "[0, inf]")
    risk, budget = jnp.broadcast_arrays(*(jnp.asarray(x, float) for x in (risk, budget)))
    num_halvings = jnp.finfo(risk.dtype).nmant + 1

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        kl = _entropy_term(risk, middle) + _entropy_term(1 - risk, 1 - middle)
        return jnp.where(kl > budget, low, middle), jnp.where(kl > budget, middle, high)

    ends = risk, jnp.ones_like(risk)
    return jax.lax.fori_loop(0, num_halvings, halve, ends)[1]


def certificate(
    rng_key: jax.Array,
    loss_fn: Callable[[Tree, Any], jax.Array],
    prior: Prior,
    posterior: Posterior,
    data: Any,
    rows: Sequence[int] | jax.Array,
    *,
    delta: float = 0.025,
    delta_draws: float = 0.01,
    num_draws: int = 1000,
) -> Certificate:
    r"""Return a bound on the risk of networks drawn from the posterior.

    Their mean loss on the examples is itself an estimate from m draws. By Chernoff's inequality it
    is at most :math:`\mathrm{kl}^{-1}(\hat L, \ln(1 / \delta') / m)` with probability
    :math:`1 - \delta'` (Langford & Caruana, 2002; Dziugaite & Roy, 2017). The bound on the risk
    follows from that, and fails with probability :math:`\delta + \delta'` at most.

    It is one for the drawn networks on average, not for the one at the posterior's mean.

    Args:
        rng_key: of the draws.
        loss_fn: `(params, data[rows]) -> losses (n,)`, each within 0 and 1 whatever the params: the
            zero-one loss, for one.
        prior: see `prior`.
        posterior: of any making: trained on `rows`, and `laplace`.
        data: pytree of arrays with the examples on their first axis.
        rows: the examples that the bound is computed on: independent draws from where new ones come
            from, none of which the prior was made from. Numbers, not traced.
        delta: of the bound.
        delta_draws: delta', of the draws.
        num_draws: m, one after the other in memory.

    Raises:
        ValueError: where rows are among those that the prior was made from, repeated or not there,
            and for losses out of their range. Under `jit`, where these cannot be seen, the bounds
            are then 1, which always holds.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.random.normal(jax.random.key(0), (300, 4))
        >>> data = x, x[:, 0] > 0
        >>> errors = lambda w, batch: ((batch[0] @ w > 0) != batch[1]).astype(float)
        >>> basis = jnp.eye(4)[:, :2]  # chosen after a look at the first 100
        >>> split = prior(jnp.zeros(4), basis, 1.0, rows=range(100))
        >>> posterior = Posterior(jnp.array([2.0, 0.0]), jnp.eye(2), jnp.array([0.5, 0.1]))
        >>> result = certificate(
        ...     jax.random.key(1), errors, split, posterior, data, range(100, 300), num_draws=200)
        >>> 0.0 < float(result.empirical) < float(result.bound) < 0.3
        True
        >>> try:
        ...     certificate(jax.random.key(1), errors, split, posterior, data, range(300))
        ... except ValueError as error:
        ...     print(str(error).split(", ")[0])
        The prior was made from 100 of the 300 rows of the bound
    """
    check_rng_key("rng_key", rng_key)
    check_number("delta", delta, "(0, 1)", "It is the probability that the bound fails.")
    check_number("delta_draws", delta_draws, "(0, 1)")
    num_draws = check_count("num_draws", num_draws)
    num_rows = len(rows)
    used = _as_rows(rows)
    shared = used & prior.rows
    if shared:
        raise ValueError(
            f"The prior was made from {len(shared)} of the {num_rows} rows of the bound, which "
            "then certifies nothing. Split the data: one part for the basis, and `rows` from the "
            "rest. The posterior may be trained on both."
        )
    num_examples = len(jax.tree.leaves(data)[0])
    if not used or len(used) < num_rows or max(used) >= num_examples:
        raise ValueError(f"rows must be from 0 to {num_examples - 1}, none of them twice.")
    index = jnp.asarray(sorted(used))
    examples = jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], data)
    root = posterior.axes * jnp.sqrt(posterior.variances)

    def of_draw(key):
        noise = jax.random.normal(key, posterior.mean.shape, posterior.mean.dtype)
        losses = loss_fn(embed(prior, posterior.mean + root @ noise), examples)
        is_valid = jnp.all((losses >= 0) & (losses <= 1)) & (losses.shape == (num_rows,))
        return jnp.mean(losses), is_valid

    means, are_valid = jax.lax.map(of_draw, jax.random.split(rng_key, num_draws))
    is_valid = jnp.all(are_valid)
    if not isinstance(is_valid, Tracer) and not is_valid:
        raise ValueError(
            f"loss_fn must give {num_rows} losses within 0 and 1, one for each row. Clip or scale "
            "a loss that has no bound."
        )
    empirical = jnp.mean(means)
    # 1. Up from the draws' mean to E_Q L_S; 2. up from that to E_Q L.
    at_most = kl_inverse(empirical, jnp.log(1 / delta_draws) / num_draws)
    kl = divergence(posterior, prior.scale)
    confidence = jnp.log(2 * num_rows**0.5 * prior.num_candidates / delta)
    budget = (kl + confidence) / num_rows
    return Certificate(
        bound=jnp.where(is_valid, kl_inverse(at_most, budget), 1.0),
        sqrt_bound=jnp.where(is_valid, jnp.minimum(at_most + jnp.sqrt(budget / 2), 1.0), 1.0),
        empirical=empirical,
        empirical_bound=at_most,
        kl=kl,
        num_rows=num_rows,
        delta=delta + delta_draws,
    )


def _as_rows(rows):
    with jax.ensure_compile_time_eval():  # numbers stay numbers where the rest is traced
        array = jnp.asarray(rows)
        if array.ndim != 1 or (array.size and not jnp.issubdtype(array.dtype, jnp.integer)):
            raise ValueError(
                f"rows must be the numbers of rows, got {array.dtype} of shape {array.shape}. Of a "
                "mask take jnp.flatnonzero(mask)."
            )
        numbers = array.tolist()
    if numbers and min(numbers) < 0:
        raise ValueError(
            "rows are counted from the first: a negative one is another's second name."
        )
    return frozenset(numbers)


def _entropy_term(a, b):
    """Return a ln(a / b), which is 0 at a = 0."""
    return jnp.where(a > 0, a * jnp.log(jnp.where(a > 0, a, 1.0) / jnp.where(a > 0, b, 1.0)), 0.0)
