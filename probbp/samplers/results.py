"""From the draws of all chains to the object of ArviZ: values derived of them, names, labels."""

from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np

from probbp.checks import check_function
from probbp.samplers.programs import Draws
from probbp.types import Tree


class Result(NamedTuple):
    """What becomes of draws.

    Attributes:
        postprocess: positions (chain, draw, ...) to what is stored, compiled.
        labeled: `(Draws after it, step sizes (chain,)) -> ` the object of ArviZ.
    """

    postprocess: Callable[[Tree], Tree]
    labeled: Callable[[Draws, np.ndarray], Any]

    def as_arviz(self, draws: Draws, step_size: np.ndarray) -> Any:
        """Return the object of ArviZ."""
        return self.labeled(draws._replace(position=self.postprocess(draws.position)), step_size)


def result(
    postprocess_fn: Callable[[Tree], Tree] | None,
    coords: dict[str, Any] | None,
    dims: dict[str, Any] | None,
) -> Result:
    """Say what becomes of draws; the arguments are those of `sample`.

    Raises:
        TypeError: for a `postprocess_fn` that is none.
        ValueError: for labels of the draws.
    """
    # ArviZ is slow to import; a script that only takes kernels is spared it.
    from probbp.diagnostics.arviz import from_blackjax

    if isinstance(coords, Mapping) and "draw" in coords:
        raise ValueError("Draws are numbered: leave 'draw' out of coords, and label the result.")
    if postprocess_fn is not None:
        check_function("postprocess_fn", postprocess_fn, "Pass one that maps a position to a tree.")
    postprocess = lambda positions: positions
    if postprocess_fn is not None:
        # One draw after the other, as in `from_blackjax`, but compiled once.
        postprocess = jax.jit(jax.vmap(partial(jax.lax.map, postprocess_fn)))

    def labeled(draws, step_size):
        stats = {
            "lp": draws.logdensity,
            "step_size": np.broadcast_to(step_size[:, None], np.shape(draws.logdensity)),
        }
        infos = SimpleNamespace(**draws.infos)
        return from_blackjax(draws.position, infos, sample_stats=stats, coords=coords, dims=dims)

    return Result(postprocess, labeled)
