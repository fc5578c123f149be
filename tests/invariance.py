"""Does a Markov kernel keep its target? The paired z-test from exact draws.

Independent chains start at exact draws X_0 and make K steps. If the kernel is right, X_K
has the law of X_0 and D = φ(X_K) - φ(X_0) has mean zero for every φ.

For a reversible kernel (X_0, X_K) is exchangeable, so D is symmetric about zero, and
z = ΣD / √ΣD² obeys P(|z| > t) <= 2 exp(-t²/2) for every N and every φ, heavy tails
included (Hoeffding given |D|). For φ of finite variance z tends to N(0, 1).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# A right kernel stays below PASS. The normal law gives P(|z| > 4.5) = 6.8e-6. The four targets
# have 73 statistics together, so a right kernel fails on one of them with probability below
# 5e-4 (Bonferroni), and a table of ten kernels with 5e-3. A wrong kernel must exceed FAIL on
# the target named for it: the test has power to spare.
PASS = 4.5
FAIL = 6.0


def largest_z(
    rng_key: jax.Array,
    step: Callable[[jax.Array, jax.Array], jax.Array],
    target: Any,
    num_chains: int,
    num_steps: int,
    dtype: Any = float,
) -> float:
    """Largest |z| over the statistics of `target`; compare with `PASS`.

    Args:
        rng_key: key of the draws and of the chains.
        step: one step of one chain, `(rng_key, position (d,)) -> position (d,)`.
        target: a `targets.Target`.
        num_chains: number N of independent chains.
        num_steps: number K of steps each.
        dtype: of the positions; `float` is the default one of JAX.

    Returns:
        The largest |z|, infinite where a statistic is not finite.
    """
    z = z_scores(rng_key, step, target, num_chains, num_steps, dtype)
    return max(abs(value) for value in z.values())


def largest_z_of(
    rng_key: jax.Array,
    algorithm: Any,
    target: Any,
    num_chains: int,
    num_steps: int,
    dtype: Any = float,
) -> float:
    """`largest_z` of a `blackjax.SamplingAlgorithm` on flat positions.

    `algorithm.init(position, rng_key)` runs at the exact draws, with a key for what the
    state holds beyond a position, and `algorithm.step(rng_key, state)` thereafter.
    """
    z = z_scores_of(rng_key, algorithm, target, num_chains, num_steps, dtype)
    return max(abs(value) for value in z.values())


def z_scores(
    rng_key: jax.Array,
    step: Callable[[jax.Array, jax.Array], jax.Array],
    target: Any,
    num_chains: int,
    num_steps: int,
    dtype: Any = float,
) -> dict[str, float]:
    """The z-score of each statistic, by name. Arguments as in `largest_z`."""
    key_draw, key_run = jax.random.split(rng_key)
    first = jnp.asarray(target.draw(key_draw, num_chains), dtype)

    def chain(rng_key, position):
        keys = jax.random.split(rng_key, num_steps)
        return jax.lax.scan(lambda x, key: (step(key, x), None), position, keys)[0]

    last = _compile(jax.vmap(chain))(jax.random.split(key_run, num_chains), first)
    return paired_z(target.statistics, first, last)


def z_scores_of(
    rng_key: jax.Array,
    algorithm: Any,
    target: Any,
    num_chains: int,
    num_steps: int,
    dtype: Any = float,
) -> dict[str, float]:
    """The z-score of each statistic, by name. Arguments as in `largest_z_of`."""
    key_draw, key_run = jax.random.split(rng_key)
    first = jnp.asarray(target.draw(key_draw, num_chains), dtype)

    def chain(rng_key, position):
        key_init, key_steps = jax.random.split(rng_key)
        state = algorithm.init(position, key_init)
        keys = jax.random.split(key_steps, num_steps)
        step = algorithm.step
        return jax.lax.scan(lambda s, k: (step(k, s)[0], None), state, keys)[0].position

    last = _compile(jax.vmap(chain))(jax.random.split(key_run, num_chains), first)
    return paired_z(target.statistics, first, last)


def paired_z(statistics: dict, first: Any, last: Any) -> dict[str, float]:
    """ΣD / √ΣD² of each statistic, for paired positions of shape (N, d).

    Zero where nothing moved, infinite where a position or a statistic is not finite.
    """
    first, last = np.asarray(first, float), np.asarray(last, float)
    if not np.isfinite(last).all():
        return dict.fromkeys(statistics, np.inf)
    with np.errstate(all="ignore"):
        return {
            name: _z(np.asarray(statistic(last), float) - np.asarray(statistic(first), float))
            for name, statistic in statistics.items()
        }


def _z(difference: np.ndarray) -> float:
    scale = np.abs(difference).max()  # keeps the squares from overflowing
    if scale == 0:
        return 0.0
    difference = difference / scale
    z = difference.sum() / np.sqrt((difference**2).sum())
    return float(z) if np.isfinite(z) else np.inf


def _compile(fun: Callable) -> Callable:
    # A table of kernels spends its time in LLVM, not in the chains: unoptimised code
    # compiles twice as fast and runs half as fast.
    return jax.jit(fun, compiler_options={"xla_backend_optimization_level": 0})
