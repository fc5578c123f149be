"""The programs of a run, each for all chains: start, warm-up, draws, and their keys."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from probbp.runs.fingerprints import constants, program_text, same_bits
from probbp.samplers.adaptation import Adaptation, parameters, warmup_step
from probbp.samplers.algorithm import Warmup
from probbp.types import Tree


class Programs(NamedTuple):
    """Pure functions, whose arguments and outputs have the chains as leading axis.

    Attributes:
        init: `(keys, position) -> carry`, a pair of the kernel's and the warm-up's state.
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
    start_fn: Callable[[jax.Array], Tree] | None,
    dispersion: float,
    thinning: int,
    batch_size: int | None,
) -> Programs:
    """Write the programs of a run; the arguments are those of `sample`.

    `start_fn` is its `position` where that is a function. The chains run all at once, or
    `batch_size` at a time.
    """

    def init(key, position):
        init_state = algorithm(**parameters(adapt.initial)).init
        start, key_state = _start(key, init_state, position, start_fn, dispersion)
        return init_state(start, key_state), adapt.initial

    def warm_up(carry, keys, schedule):
        return jax.lax.scan(partial(warmup_step, algorithm, adapt), carry, (keys, schedule))

    def learn(adapted):
        return parameters(adapt.final(adapted) if len(adapt.schedule) else adapted)

    def draw(state, learnt, keys):
        return _draw(algorithm(**learnt).step, thinning, state, keys)

    over_chains = partial(_over_chains, batch_size=batch_size)
    return Programs(
        over_chains(init, 1), over_chains(warm_up, 1), over_chains(learn), over_chains(draw)
    )


def pooled_programs(
    algorithm: Callable,
    warmup: Warmup,
    start_fn: Callable[[jax.Array], Tree] | None,
    dispersion: float,
    thinning: int,
    batch_size: int | None,
) -> Programs:
    """Write the programs of a run of an algorithm that brings its own warm-up, of all chains."""
    over_chains = partial(_over_chains, batch_size=batch_size)

    def start(key, position):
        return _start(key, algorithm().init, position, start_fn, dispersion)[0]

    def init(keys, position):
        return warmup.init(over_chains(start, 1)(keys, position))

    def warm_up(carry, keys, schedule):
        return warmup.run(keys[0, 0], carry, schedule)

    def learn(rest):
        return warmup.parameters(rest) | {"step_size": rest.step_size}

    def draw(states, learnt, keys):
        shared = learnt | {"step_size": learnt["step_size"][0]}
        step = algorithm(**shared).step
        return over_chains(partial(_draw, step, thinning))(states, keys)

    return Programs(init, warm_up, learn, draw)


def latest(sizes: tuple, described: dict[str, tuple[Callable, tuple]], programs: Any) -> Any:
    """Return the programs of the latest call where they are the same as these, else these.

    JAX keeps what it has compiled with the function that it has compiled. Whether they are the same
    is read from what they are traced to, with all the data that they close over, so that no other
    data are ever taken for them: one array of JAX is known by its identity, others are compared to
    the last bit. Side effects are not seen: programs that call back are not kept, nor are those of
    a call that is being traced.

    Threads share the latest call. Each gets its own programs, or some that are the same.

    Args:
        sizes: what else the programs depend on.
        described: names to functions and their arguments, of which the shapes count.
        programs: what is returned, now or at the next call.
    """
    traced = [jax.make_jaxpr(fun)(*args) for fun, args in described.values()]
    texts = tuple(program_text(closed) for closed in traced)
    if any("callback" in text for text in texts):
        return programs
    ours = _Kept((sizes, texts), [const for t in traced for const in constants(t)], programs)
    if any(isinstance(const, Tracer) for const in ours.constants):
        return programs
    with _lock:
        kept = _latest[0] if _latest else None
    if kept is not None and _is_same(kept, ours):
        return kept.programs
    with _lock:
        _latest[:] = [ours]
    return programs


class _Kept(NamedTuple):
    """Programs, and what tells them from others.

    Attributes:
        key: compared by `==`.
        constants: what they close over.
        programs: of the call.
    """

    key: tuple
    constants: list[Any]
    programs: Any


_latest: list[_Kept] = []
_lock = threading.Lock()


def _is_same(kept, ours):
    if kept.key != ours.key or len(kept.constants) != len(ours.constants):
        return False
    return all(map(same_bits, kept.constants, ours.constants))


def step_keys(
    rng_key: jax.Array, start: jax.Array, *, num_chains: int, num_steps: int, num: int
) -> jax.Array:
    """Return the keys of each chain's steps `start` to `start + num`, of `num_steps`.

    They are those of `jax.random.split(rng_key, (num_chains, num_steps))`, for the default kind of
    keys, without the memory for all of them. There must be fewer than 2**32.
    """
    chains = jnp.arange(num_chains, dtype=jnp.uint32)[:, None]
    steps = start + jnp.arange(num, dtype=jnp.uint32)[None]
    index = chains * jnp.uint32(num_steps) + steps
    return jax.vmap(jax.vmap(partial(jax.random.fold_in, rng_key)))(index)


def _over_chains(fun, num_shared=0, *, batch_size):
    """Run a function over the leading axis of its arguments, but for the last `num_shared`."""

    def all_chains(*args):
        chains, shared = args[: len(args) - num_shared], args[len(args) - num_shared :]

        def one_chain(chain):
            return fun(*chain, *shared)

        if batch_size is None:
            return jax.vmap(one_chain)(chains)
        return jax.lax.map(one_chain, chains, batch_size=batch_size)

    return all_chains


def _draw(step, thinning, state, keys):
    """Make the draws of one chain."""

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


def _start(key, init_state, position, start_fn, dispersion):
    """Return where a chain starts, and the key of its first state."""
    key_start, key_state = jax.random.split(key)
    if start_fn is not None:
        return start_fn(key_start), key_state
    start = _disperse(key_start, lambda p: init_state(p, key_state), position, dispersion)
    return start, key_state


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
