r"""Coordinates in which the learnt scale is the identity.

With :math:`M^{-1} = L L^\top` the inverse mass matrix, a sampler moves :math:`\xi` in
:math:`x + L \xi`. BlackJAX's metrics (diagonal, dense, low-rank) hold the factors.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from blackjax.mcmc.metrics import default_metric
from jax.flatten_util import ravel_pytree

from probbp.types import Tree


class Whitening(NamedTuple):
    """The three maps that a sampler needs.

    Attributes:
        unwhiten: a displacement in white coordinates to one of the position, L.
        pull: a gradient at the position to one in white coordinates, L^T.
        push: the inverse of `pull`.
    """

    unwhiten: Callable[[Tree], Tree]
    pull: Callable[[Tree], Tree]
    push: Callable[[Tree], Tree]


IDENTITY = Whitening(*[lambda tree: tree] * 3)
"""The position's own coordinates."""


def whitening(inverse_mass_matrix: Any, position: Tree) -> Whitening:
    """Return the maps for an inverse mass matrix.

    Args:
        inverse_mass_matrix: `None` for the identity; otherwise what BlackJAX takes: an array
            (d,) or (d, d), a `LowRankInverseMassMatrix` or a `Metric`, in the order of
            `jax.flatten_util.ravel_pytree(position)`.
        position: a pytree of the chain's structure.
    """
    if inverse_mass_matrix is None:
        return IDENTITY
    scale = default_metric(inverse_mass_matrix).scale

    def scaled(tree: Tree, **factor) -> Tree:
        flat, unravel = ravel_pytree(tree)
        wide = flat.astype(jnp.promote_types(flat.dtype, jnp.result_type(float)))
        return unravel(scale(position, wide, **factor).astype(flat.dtype))

    return Whitening(
        unwhiten=partial(scaled, inv=True, trans=False),
        pull=partial(scaled, inv=True, trans=True),
        push=partial(scaled, inv=False, trans=False),
    )
