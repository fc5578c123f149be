"""How many weights to keep: the fewest whose noise is small beside that of the batches."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from probbp.checks import check_count, check_number, check_rng_key
from probbp.types import Tree


def suggested_keep(
    rng_key: jax.Array,
    loss_fn: Callable[..., jax.Array],
    params: Tree,
    batch: Tree,
    *,
    tolerance: float = 0.05,
    keeps: Sequence[float] = (8, 16, 32, 64, 128),
    num_draws: int = 4,
) -> tuple[float | None, dict[float, float]]:
    r"""Suggest `keep` from the variance of the gradient, as measured on a batch.

    The gradient of a step varies with the examples that are drawn, by :math:`E|g - \bar g|^2` an
    example, and with the weights that are kept, by :math:`E|\hat g - g|^2`. Both fall with the size
    of the batch. Where their ratio is small, sampling is hardly noticed. Estimated: the ratio, from
    a few examples and draws of a heavy-tailed estimator; take it for its order of magnitude.

    Args:
        rng_key: a key.
        loss_fn: `loss_fn(params, example, keep=..., rng_key=...)`, the loss of one example. It
            hands both to the attention, with a key of its own for each layer.
        params: pytree of floating-point arrays, trained at least a little: attention is more peaked
            then.
        batch: pytree of arrays (examples, ...), at least two.
        tolerance: the largest ratio.
        keeps: what to try.
        num_draws: how often, for each example.

    Returns:
        The smallest of `keeps` whose ratio is at most `tolerance`, `None` (the exact gradient) if
        there is none; and the ratios of all. Cost: 1 + `num_draws` x `len(keeps)` gradients of each
        example, one after the other.

    Raises:
        ValueError: for a batch of fewer than two examples.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from probbp.ops import sus
        >>> def loss_fn(scale, x, *, keep, rng_key):
        ...     query = scale * x[:, None]
        ...     mixed = sus.dot_product_attention(query, query, query, keep=keep, rng_key=rng_key)
        ...     return jnp.mean(mixed**3)
        >>> x = jax.random.normal(jax.random.key(0), (4, 256, 16))
        >>> keep, added = sus.suggested_keep(jax.random.key(1), loss_fn, jnp.ones(16), x)
        >>> sorted(added) == [8, 16, 32, 64, 128]
        True

    Reference:
        Pankov & Harik, 2025, arXiv:2505.15080, compare the two variances; the rule is ours.
    """
    check_rng_key("rng_key", rng_key)
    num_draws = check_count("num_draws", num_draws)
    check_number("tolerance", tolerance, "(0, inf)")
    keeps = list(keeps)
    for keep in keeps:
        check_number("keeps", keep, "(0, inf)")
    num_examples = jax.tree.leaves(batch)[0].shape[0]
    if num_examples < 2:
        raise ValueError(f"The variance between examples takes two of them, got {num_examples}.")

    def squares(tree):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))

    def measure(args):
        example, keys = args
        grad_fn = jax.grad(loss_fn)
        exact = grad_fn(params, example, keep=None, rng_key=None)

        def error(keep, key):
            estimate = grad_fn(params, example, keep=keep, rng_key=key)
            return squares(jax.tree.map(jnp.subtract, estimate, exact))

        return exact, [jax.lax.map(partial(error, keep), keys).mean() for keep in keeps]

    draw_keys = jax.random.split(rng_key, (num_examples, num_draws))
    grads, errors = jax.lax.map(measure, (batch, draw_keys))
    centred = jax.tree.map(lambda leaf: leaf - leaf.mean(0), grads)
    between = squares(centred) / (num_examples - 1)
    added = {keep: float(e.mean() / between) for keep, e in zip(keeps, errors, strict=True)}
    enough = [keep for keep in sorted(keeps) if added[keep] <= tolerance]
    return (enough[0] if enough else None), added
