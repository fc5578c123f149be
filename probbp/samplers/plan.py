"""What a run will do, settled before its first step: programs, keys, shapes, and the result."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from probbp.checks import check_count, check_number
from probbp.runs.fingerprints import fingerprint
from probbp.runs.loop import NUM_UPDATES
from probbp.samplers import checks
from probbp.samplers.programs import Programs, latest, step_keys
from probbp.samplers.results import Result
from probbp.samplers.tuning import Tuning
from probbp.types import Tree


class Start(NamedTuple):
    """Where chains start.

    Attributes:
        position: one position; where there is a function, one of its.
        fn: `rng_key -> position`, or `None`.
        dispersion: of the starts around the position, where there is no function.
    """

    position: Tree
    fn: Callable[[jax.Array], Tree] | None
    dispersion: float


class Keys(NamedTuple):
    """Keys (chain, step) from the key of a phase and the number of its first step."""

    start: Callable[[jax.Array], jax.Array]
    warm_up: Callable[[jax.Array, jax.Array], jax.Array]
    draw: Callable[[jax.Array, jax.Array], jax.Array]


class Plan(NamedTuple):
    """All that a run is made of.

    Attributes:
        num_warmup, num_samples: of each chain.
        warmup_chunk, chunk: steps and draws between two returns to the host.
        schedule: of the warm-up, (num_warmup, ...).
        start: of the chains.
        program: for all chains.
        keys: of all chains.
        result: what becomes of the draws.
        carry: shapes of what warm-up carries.
        template: the object that is returned, of one draw.
        described: names to programs and their arguments: what a checkpoint is of.
        settings: names to numbers: the same.
    """

    num_warmup: int
    num_samples: int
    warmup_chunk: int
    chunk: int
    schedule: np.ndarray
    start: Start
    program: Programs
    keys: Keys
    result: Result
    carry: Tree
    template: Any
    described: dict[str, tuple[Callable, tuple]]
    settings: dict[str, Any]


def start_of(
    rng_key: jax.Array, position: Tree | Callable[[jax.Array], Tree], dispersion: float
) -> Start:
    """Say where chains start; the arguments are those of `sample`."""
    check_number("dispersion", dispersion, "[0, inf)")
    if callable(position):
        return Start(position(rng_key), position, dispersion)
    checks.check_position(position)
    return Start(jax.tree.map(jnp.asarray, position), None, dispersion)


def plan(
    rng_key: jax.Array,
    tuning: Tuning,
    start: Start,
    result: Result,
    *,
    num_samples: int,
    num_chains: int,
    thinning: int,
    every: int | None,
    batch_size: int | None,
    mesh: Mesh | None,
) -> Plan:
    """Settle a run; the arguments are those of `sample`.

    Args:
        rng_key: any, for its type.
        tuning: the warm-up.
        start: of the chains.
        result: what becomes of the draws.
        num_samples: draws of each chain.
        num_chains: how many.
        thinning: steps a draw.
        every: draws between two returns to the host.
        batch_size: how many chains run at once.
        mesh: devices to run on. Without one the programs may be those of the call before.

    Raises:
        ValueError: for names and labels that ArviZ would refuse or lose.
    """
    num_samples = check_count("num_samples", num_samples)
    num_chains = check_count("num_chains", num_chains)
    thinning = check_count("thinning", thinning)
    every = None if every is None else check_count("every", every)
    if mesh is not None and not isinstance(mesh, Mesh):
        raise TypeError(
            f"mesh must be one of JAX, such as jax.make_mesh((8,), ('chains',)), got {mesh!r}."
        )
    if mesh is not None and batch_size is not None:
        raise ValueError("A mesh splits the chains over devices: give it no batch_size beside.")
    schedule = np.asarray(tuning.schedule)
    num_warmup = len(schedule)
    chunk = -(-num_samples // NUM_UPDATES)
    # The keys hang on this number, and so not on `every`.
    num_keys = chunk * (-(-num_samples // chunk))
    chunk = min(every or chunk, num_samples)
    checks.check_num_keys(num_chains, max(num_warmup, num_keys))
    keys_of = partial(partial, step_keys, num_chains=num_chains)
    keys = Keys(
        partial(jax.random.split, num=num_chains),
        keys_of(num_steps=num_warmup, num=tuning.chunk),
        keys_of(num_steps=num_keys, num=chunk),
    )
    program = tuning.programs(start.fn, start.dispersion, thinning, batch_size)

    # The shapes of all that follows: what a checkpoint and a store must hold.
    warmup_keys, draw_keys = (
        jax.eval_shape(keys_fn, rng_key, np.uint32(0)) for keys_fn in (keys.warm_up, keys.draw)
    )
    start_args = jax.eval_shape(keys.start, rng_key), start.position
    carry = jax.eval_shape(program.init, *start_args)
    learnt = jax.eval_shape(program.learn, carry[1])
    draw_args = carry[0], learnt, draw_keys
    draws = jax.eval_shape(program.draw, *draw_args)[1]
    described = {
        "the program of the start": (program.init, start_args),
        "the program of the draws": (program.draw, draw_args),
        "postprocess_fn": (result.postprocess, (_one_draw(draws.position),)),
    }
    if num_warmup:
        warmup_args = carry, warmup_keys, schedule[: tuning.chunk]
        described["the program of the warm-up"] = program.warm_up, warmup_args
    sizes = {"num_samples": num_samples, "num_chains": num_chains, "thinning": thinning}
    template = _template(result, draws, learnt["step_size"])
    if mesh is None:
        program, keys, postprocess = latest(
            (num_chains, num_warmup, tuning.chunk, num_keys, chunk),
            described,
            (program, keys, result.postprocess),
        )
        result = result._replace(postprocess=postprocess)
    return Plan(
        num_warmup,
        num_samples,
        tuning.chunk,
        chunk,
        schedule,
        start,
        program,
        keys,
        result,
        carry,
        template,
        described,
        sizes | {"num_warmup": num_warmup, "every": chunk},
    )


def prints_of(
    plan: Plan, rng_key: jax.Array, coords: dict[str, Any] | None, dims: dict[str, Any] | None
) -> dict[str, str]:
    """Return the fingerprint of a run; the arguments are those of `sample`."""
    values = rng_key, plan.schedule, plan.start.position
    return fingerprint(plan.described, values, plan.settings | {"coords": coords, "dims": dims})


def _template(result, draws, step_size):
    """Build the very object that is returned, so that what ArviZ would refuse is refused now."""
    blank = _one_draw(draws)
    named = blank._replace(position=_one_draw(jax.eval_shape(result.postprocess, blank.position)))
    return result.labeled(named, np.zeros(step_size.shape, step_size.dtype))


def _one_draw(shapes):
    """Return zeros (chain, 1, ...) in the place of shapes (chain, draw, ...)."""
    return jax.tree.map(
        lambda leaf: np.zeros((leaf.shape[0], 1, *leaf.shape[2:]), leaf.dtype), shapes
    )
