"""Many chains in one call: dispersed starts, warm-up, sampling, and the result for ArviZ."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm.auto import tqdm

from probbp.samplers import checks
from probbp.samplers.adaptation import Metric, adaptation, parameters, warmup_step
from probbp.samplers.algorithm import target_acceptance_rate as best_acceptance_rate
from probbp.types import Tree

NUM_UPDATES = 40
"""How often a phase comes back to the host: for the progress bar, and to free the device."""


def sample(
    rng_key: jax.Array,
    algorithm: Callable,
    position: Tree | Callable[[jax.Array], Tree],
    *,
    num_warmup: int = 1000,
    num_samples: int = 1000,
    num_chains: int = 4,
    thinning: int = 1,
    metric: Metric = "diag",
    target_acceptance_rate: float | None = None,
    initial_step_size: float = 1.0,
    dispersion: float = 1.0,
    postprocess_fn: Callable[[Tree], Tree] | None = None,
    coords: dict[str, Any] | None = None,
    dims: dict[str, Any] | None = None,
    progress_bar: bool = True,
) -> Any:
    """Run many chains of an algorithm, vectorised, and return what ArviZ reads.

    Each chain learns its own step size and scale in warm-up; both are frozen for the draws that are
    kept. The same key gives the same draws.

    Args:
        rng_key: key of the whole run.
        algorithm: `(step_size=..., inverse_mass_matrix=...) -> SamplingAlgorithm`, such as
            `functools.partial(probbp.fmala, logdensity_fn)`; BlackJAX's own work too.
        position: one position around which the chains start, or `rng_key -> position`, which is
            asked for each chain's start.
        num_warmup: steps of warm-up per chain, rounded up to a multiple of the chunk in which the
            run comes back to the host (a fortieth of the phase).
        num_samples: draws kept per chain.
        num_chains: number of chains.
        thinning: steps per draw that is kept.
        metric: the scale to learn: "diag", "dense", "low_rank", a `MetricRecipe`, or `None`.
        target_acceptance_rate: by default the algorithm's best, known for ours.
        initial_step_size: where the search for the step size starts.
        dispersion: standard deviation of the starts around `position`; halved for a chain until its
            log density is finite.
        postprocess_fn: applied to each position before it is stored in `posterior`.
        coords: as in ArviZ.
        dims: as in ArviZ.
        progress_bar: whether to show progress, acceptance rate and step size.

    Returns:
        ArviZ's object, with `posterior` (chain, draw, ...) and in `sample_stats` the acceptance
        rate, step size, log density `lp` and `diverging` (a proposal that was NaN or infinite).

    Raises:
        TypeError: for integer positions, and a log density that is no scalar.
        ValueError: where no finite start is found, and for counts that are not positive.

    Example:
        >>> import jax, jax.numpy as jnp, probbp
        >>> from functools import partial
        >>> logdensity_fn = lambda x: -0.5 * jnp.sum(x["a"] ** 2)
        >>> data = probbp.sample(
        ...     jax.random.key(0), partial(probbp.line_fmala, logdensity_fn), {"a": jnp.zeros(2)},
        ...     num_warmup=100, num_samples=50, progress_bar=False)
        >>> data.posterior["a"].shape
        (4, 50, 2)
    """
    # ArviZ is slow to import; a script that only takes kernels is spared it.
    from probbp.diagnostics.arviz import from_blackjax

    for name, count in {
        "num_samples": num_samples,
        "num_chains": num_chains,
        "thinning": thinning,
    }.items():
        checks.check_count(name, count)
    if target_acceptance_rate is None:
        target_acceptance_rate = best_acceptance_rate(algorithm)
    warmup_chunk = -(-num_warmup // NUM_UPDATES)
    num_warmup = warmup_chunk * (-(-num_warmup // warmup_chunk)) if num_warmup else 0
    if not callable(position):
        position = jax.tree.map(jnp.asarray, position)
        checks.check_position(position)
    one = position(rng_key) if callable(position) else position
    adapt = adaptation(
        optax.tree.size(one),
        num_warmup,
        target_acceptance_rate,
        metric=metric,
        initial_step_size=initial_step_size,
    )
    key_init, key_warmup, key_sample = jax.random.split(rng_key, 3)

    def init(key):
        key_start, key_state = jax.random.split(key)
        init_state = algorithm(**parameters(adapt.initial)).init
        if callable(position):
            start = position(key_start)
        else:
            start = _disperse(key_start, lambda p: init_state(p, key_state), position, dispersion)
        return init_state(start, key_state), adapt.initial

    @partial(jax.jit, donate_argnums=0)
    def run_warmup(carry, keys, schedule):
        scan = partial(jax.lax.scan, partial(warmup_step, algorithm, adapt))
        return jax.vmap(lambda c, k: scan(c, (k, schedule)))(carry, keys)

    @partial(jax.jit, donate_argnums=0)
    def run_samples(states, learnt, keys):
        def chain(state, learnt, keys):
            step = algorithm(**learnt).step

            def draw(state, key):
                if thinning == 1:
                    state, info = step(key, state)
                    return state, (state, info)
                state, infos = jax.lax.scan(
                    lambda s, k: step(k, s), state, jax.random.split(key, thinning)
                )
                return state, (state, _thinned(infos))

            return jax.lax.scan(draw, state, keys)

        return jax.vmap(chain)(states, learnt, keys)

    carry = jax.jit(jax.vmap(init))(jax.random.split(key_init, num_chains))
    checks.check_start(carry[0].logdensity)
    total = num_warmup + num_samples
    with tqdm(total=total, disable=not progress_bar, desc="warm-up") as bar:
        keys = _keys(key_warmup, num_chains, num_warmup)
        for i in range(0, num_warmup, warmup_chunk or 1):
            window = slice(i, i + warmup_chunk)
            carry, acceptance = run_warmup(carry, keys[:, window], adapt.schedule[window])
            _show(bar, warmup_chunk, acceptance, carry[1].step_size)

        states, adapted = carry
        learnt = parameters(jax.vmap(adapt.final)(adapted) if num_warmup else adapted)
        bar.set_description("sampling")
        chunk = -(-num_samples // NUM_UPDATES)
        keys = _keys(key_sample, num_chains, chunk * (-(-num_samples // chunk)))
        history = []
        for i in range(0, num_samples, chunk):
            states, draws = run_samples(states, learnt, keys[:, i : i + chunk])
            history.append(jax.device_get(draws))
            shown = min(chunk, num_samples - i)
            _show(bar, shown, draws[1].acceptance_rate, learnt["step_size"])

    kept_states, infos = jax.tree.map(
        lambda *chunks: np.concatenate(chunks, axis=1)[:, :num_samples], *history
    )
    step_size = np.asarray(learnt["step_size"])[:, None]
    return from_blackjax(
        kept_states,
        infos,
        postprocess_fn=postprocess_fn,
        sample_stats={"step_size": np.broadcast_to(step_size, (num_chains, num_samples))},
        coords=coords,
        dims=dims,
    )


def _disperse(rng_key, init_fn, position, dispersion):
    """Draw a start around `position`, closer to it until its log density is finite."""
    noise = optax.tree.random_like(rng_key, position)

    def at(spread):
        return jax.tree.map(lambda x, z: (x + spread * z).astype(x.dtype), position, noise)

    def is_lost(spread):
        return ~jnp.isfinite(init_fn(at(spread)).logdensity) & (spread > 0)

    def closer(spread):
        return jnp.where(spread > dispersion / 2**20, spread / 2, 0.0)

    return at(jax.lax.while_loop(is_lost, closer, jnp.asarray(dispersion, dtype=float)))


def _thinned(infos):
    """Summarise the infos of the steps between two draws: means of rates, any of flags."""

    def summary(leaf):
        return jnp.any(leaf, axis=0) if leaf.dtype == bool else jnp.mean(leaf, axis=0)

    return jax.tree.map(summary, infos)


def _keys(rng_key, num_chains, num_steps):
    return jax.random.split(rng_key, (num_chains, num_steps))


def _show(bar, num_steps, acceptance, step_size):
    bar.update(num_steps)
    if not bar.disable:
        bar.set_postfix_str(
            f"acceptance {np.mean(acceptance):.2f}, step size {np.mean(step_size):.2e}"
        )
