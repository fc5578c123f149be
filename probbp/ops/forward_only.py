"""The identity of a tangent that reverse mode may not pass: it says what to do instead."""

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from probbp.types import Tree


def forward_only(tangents: Tree, reason: str) -> Tree:
    """Return `tangents`, which raise `TypeError(reason)` where reverse mode would transpose them.

    For derivatives that are right in forward mode and of no use in reverse mode, such as one whose
    memory is what an operation exists to save. What is not used is not transposed, and does not
    raise. Both modes of higher derivatives see the identity.

    Args:
        tangents: pytree of floating-point or complex arrays.
        reason: what is wrong, and the way out.
    """
    return jax.tree.map(lambda leaf: _forward_only_p.bind(leaf, reason=reason), tangents)


def _refuse(cotangent, operand, *, reason):
    raise TypeError(reason)


_forward_only_p = Primitive("forward_only")
_forward_only_p.def_impl(lambda operand, *, reason: operand)
_forward_only_p.def_abstract_eval(lambda operand, *, reason: operand)
ad.deflinear2(_forward_only_p, _refuse)
batching.defvectorized(_forward_only_p)
mlir.register_lowering(
    _forward_only_p, mlir.lower_fun(lambda operand, *, reason: operand, multiple_results=False)
)
