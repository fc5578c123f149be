"""Where the draws of a run go: into memory, or to disk."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from probbp.samplers.programs import Draws
from probbp.samplers.progress import Moments
from probbp.samplers.streams import Stream, moments_like, variables
from probbp.types import Tree


class Sink(NamedTuple):
    """What takes draws, and makes one object of ArviZ of them.

    Attributes:
        is_on_disk: whether draws and moments are written.
        like: shapes (chain, ...) of what the run's moments are taken of.
        add: `(start, Draws, step sizes) -> ` the draws of which they are taken, (chain, draw, ...).
        note: `Moments -> None`, to be kept with the draws.
        count: `() -> ` how many draws of each chain are held in memory.
        read: `step sizes -> ` the object of ArviZ.
    """

    is_on_disk: bool
    like: Tree
    add: Callable[[int, Draws, np.ndarray], Tree]
    note: Callable[[Moments], None]
    count: Callable[[], int]
    read: Callable[[np.ndarray], Any]


def in_memory(as_arviz: Callable[[Draws, np.ndarray], Any], like: Tree) -> Sink:
    """Keep the draws.

    Args:
        as_arviz: `(Draws, step sizes) -> ` an object of ArviZ.
        like: shapes (chain, ...) of positions.
    """
    history = []

    def add(start, draws, step_size):
        del start, step_size
        history.append(draws)
        return draws.position

    def read(step_size):
        draws = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *history)
        history.clear()
        return as_arviz(draws, step_size)

    def count():
        return sum(draws.logdensity.shape[1] for draws in history)

    return Sink(False, like, add, lambda moments: None, count, read)


def on_disk(
    as_arviz: Callable[[Draws, np.ndarray], Any], stream: Stream, template: Any, is_lazy: bool
) -> Sink:
    """Write the draws as they come.

    Args:
        as_arviz: `(Draws, step sizes) -> ` an object of ArviZ.
        stream: the open store.
        template: an object of ArviZ with one draw.
        is_lazy: whether the result stays on disk.
    """

    def add(start, draws, step_size):
        arrays = variables(as_arviz(draws, step_size))
        stream.write(start, arrays)
        return arrays["posterior"]

    def read(step_size):
        del step_size
        data = stream.read()
        # In place for ArviZ 0.23, anew for xarray's DataTree.
        return data if is_lazy else data.load() or data

    return Sink(True, moments_like(template), add, stream.note, lambda: 0, read)
