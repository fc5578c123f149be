"""How a run tunes its algorithm: by BlackJAX's schedule, or by the algorithm's own warm-up."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh

from probbp.checks import check_count
from probbp.runs.loop import NUM_UPDATES
from probbp.samplers.adaptation import Metric, adaptation
from probbp.samplers.algorithm import Warmup, own_warmup
from probbp.samplers.algorithm import target_acceptance_rate as best_acceptance_rate
from probbp.samplers.programs import Programs, pooled_programs, programs
from probbp.types import Tree

NUM_WARMUP = 1000
OWN_NUM_WARMUP = 2900
"""Steps of warm-up, by default: of BlackJAX's schedule, and of an algorithm that brings its own."""


class Tuning(NamedTuple):
    """A warm-up, whoever brings it.

    Attributes:
        schedule: what each step is for, an array (num_warmup, ...).
        chunk: steps between two returns to the host, a divisor of their number.
        programs: `(start_fn, dispersion, thinning, batch_size) -> Programs`.
        own: the warm-up that the algorithm brings, or `None`.
    """

    schedule: jax.Array
    chunk: int
    programs: Callable[..., Programs]
    own: Warmup | None


def tuning(
    algorithm: Callable,
    position: Tree,
    num_warmup: int | None,
    *,
    metric: Metric,
    target_acceptance_rate: float | None,
    initial_step_size: float,
    batch_size: int | None,
    mesh: Mesh | None,
) -> Tuning:
    """Return the warm-up of an algorithm; the arguments are those of `sample`.

    Raises:
        ValueError: for counts that are not positive, and for what does not concern an algorithm
            that brings its own warm-up.
    """
    if num_warmup is not None:
        num_warmup = check_count("num_warmup", num_warmup, 0)
    num_steps = OWN_NUM_WARMUP if num_warmup is None else num_warmup
    own = own_warmup(algorithm, num_steps, batch_size=batch_size)
    if own is not None:
        _refuse_beside_own(metric, target_acceptance_rate, initial_step_size, mesh)
        return Tuning(own.schedule, own.chunk, partial(pooled_programs, algorithm, own), own)

    num_steps = NUM_WARMUP if num_warmup is None else num_warmup
    chunk = -(-num_steps // NUM_UPDATES)
    if target_acceptance_rate is None:
        target_acceptance_rate = best_acceptance_rate(algorithm)
    adapt = adaptation(
        optax.tree.size(position),
        chunk * (-(-num_steps // chunk)) if num_steps else 0,
        target_acceptance_rate,
        metric=metric,
        initial_step_size=initial_step_size,
    )
    return Tuning(adapt.schedule, chunk, partial(programs, algorithm, adapt), None)


def _refuse_beside_own(metric, target_acceptance_rate, initial_step_size, mesh):
    given = {
        "metric": not (isinstance(metric, str) and metric == "diag"),
        "target_acceptance_rate": target_acceptance_rate is not None,
        "initial_step_size": initial_step_size != 1.0,
        "mesh": mesh is not None,
    }
    names = [name for name, is_given in given.items() if is_given]
    if names:
        raise ValueError(
            "This algorithm learns from all chains by a warm-up of its own: leave out "
            f"{', '.join(names)}."
        )
