"""The programs of a run, each for all chains at once: start, warm-up, draws, and their keys."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from probbp.samplers.adaptation import Adaptation, parameters, warmup_step
from probbp.types import Tree


class Programs(NamedTuple):
    """Pure functions, whose arguments and outputs have the chains as leading axis.

    Attributes:
        init: `keys -> carry`, a pair of the kernel's and the warm-up's state.
        warm_up: `(carry, keys, schedule) -> (carry, acceptance rates)`, keys (chain, step).
        learn: `warm-up's state -> parameters` of the algorithm.
        draw: `(kernel's state, parameters, keys) -> (kernel's state, Draws)`, keys (chain, draw).
    """

    init: Callable
    warm_up: Callable
    learn: Callable
    draw: Callable


class Draws(NamedTuple):
    """What is kept of a run, with leading axes (chain, draw).

    Attributes:
        position: of the chain.
        logdensity: there.
        infos: the scalars of the kernel's info, by name.
    """

    position: Tree
    logdensity: jax.Array
    infos: dict[str, Any]


def programs(
    algorithm: Callable,
    adapt: Adaptation,
    position: Tree | Callable[[jax.Array], Tree],
    dispersion: float,
    thinning: int,
) -> Programs:
    """Write the programs of a run; the arguments are those of `sample`."""

    def init(key):
        key_start, key_state = jax.random.split(key)
        init_state = algorithm(**parameters(adapt.initial)).init
        if callable(position):
            start = position(key_start)
        else:
            start = _disperse(key_start, lambda p: init_state(p, key_state), position, dispersion)
        return init_state(start, key_state), adapt.initial

    def warm_up(carry, keys, schedule):
        return jax.lax.scan(partial(warmup_step, algorithm, adapt), carry, (keys, schedule))

    def learn(adapted):
        return parameters(adapt.final(adapted) if len(adapt.schedule) else adapted)

    def draw(state, learnt, keys):
        step = algorithm(**learnt).step

        def body(state, key):
            if thinning == 1:
                state, info = step(key, state)
            else:
                state, infos = jax.lax.scan(
                    lambda s, k: step(k, s), state, jax.random.split(key, thinning)
                )
                info = _thinned(infos)
            scalars = {k: v for k, v in info._asdict().items() if getattr(v, "shape", None) == ()}
            return state, Draws(state.position, state.logdensity, scalars)

        return jax.lax.scan(body, state, keys)

    return Programs(
        jax.vmap(init), jax.vmap(warm_up, in_axes=(0, 0, None)), jax.vmap(learn), jax.vmap(draw)
    )


def step_keys(
    rng_key: jax.Array, start: jax.Array, *, num_chains: int, num_steps: int, num: int
) -> jax.Array:
    """Return the keys of each chain's steps `start` to `start + num`, of `num_steps`.

    They are those of `jax.random.split(rng_key, (num_chains, num_steps))`, for the default kind of
    keys, without the memory for all of them. There must be fewer than 2**32.
    """
    chains = jnp.arange(num_chains, dtype=jnp.uint32)[:, None]
    index = chains * jnp.uint32(num_steps) + start + jnp.arange(num, dtype=jnp.uint32)
    return jax.vmap(jax.vmap(partial(jax.random.fold_in, rng_key)))(index)


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
