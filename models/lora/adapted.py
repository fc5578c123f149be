"""A weight that stands for W + scale B A in the products it enters: an array type of quax."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from probbp.models.lora.layout import ELEMENTWISE, Factors, no_rule

try:
    import equinox
    import quax
except ImportError as error:
    raise ImportError(
        "Low-rank updates of unedited networks need the package quax: pip install 'probbp[models]'."
    ) from error


class Adapted(quax.ArrayValue):
    """A weight W that stands for W + scale B A, in the products it enters.

    `roles` has a letter an axis of `weight` as it stands; `factors` have unflattened axes in the
    same order: a (*b, rank, *i), b (*b, *o, rank), delta as a, in_signs (*b, *i), out_signs
    (*b, rank). So a transposition permutes both, and a `scan` that takes slices along the first
    axis, which has the role "b", takes those of the factors too; `roles` then is longer than
    `weight` has axes, and its end counts.

    `signature` tells weights of one structure and different shapes apart: quax keeps traced bodies
    of loops by structure alone.
    """

    weight: jax.Array
    factors: Factors
    roles: str = equinox.field(static=True)
    name: str = equinox.field(static=True)
    scale: float = equinox.field(static=True)
    signature: tuple = equinox.field(static=True)

    def aval(self):
        """The shape that JAX sees."""
        return ShapedArray(self.weight.shape, self.weight.dtype)

    def materialise(self):
        """Refuse: dense values are what this type is there to avoid."""
        raise no_rule(self.name, "something that needs its dense values")

    @staticmethod
    def default(primitive, values, params):
        """Apply a primitive; quax itself opens `jit`, `scan`, `cond` and `while_loop`."""
        adapted = [value for value in values if isinstance(value, Adapted)]
        first = adapted[0]
        if primitive.name in ELEMENTWISE:
            weight = primitive.bind(first.weight, **params)
            return _replace(first, weight, first.factors, _roles(first))
        if primitive.name == "transpose":
            return _transpose(first, params["permutation"])
        if primitive.name == "dot_general" and len(adapted) == 1:
            return _dot_general(*values, **params)
        if primitive.name in ("checkpoint", "remat2", "remat"):
            return _checkpoint(values, **params)
        raise no_rule(first.name, primitive.name)


def adapt(name, weight, layout, factors, scale):
    """Return the weight with its factors, their axes unflattened."""
    batch, ins, outs = (layout.sizes(role) for role in "bio")
    rank = factors.a.shape[-2]
    shapes = Factors(
        a=(*batch, rank, *ins),
        b=(*batch, *outs, rank),
        delta=(*batch, rank, *ins),
        in_signs=(*batch, *ins),
        out_signs=(*batch, rank),
    )
    unflattened = Factors(
        *(
            None if leaf is None else leaf.reshape(shape)
            for leaf, shape in zip(factors, shapes, strict=True)
        )
    )
    leaves = jax.tree.leaves((weight, unflattened))
    signature = tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
    return Adapted(weight, unflattened, layout.roles, name, float(scale), signature)


def _replace(adapted, weight, factors, roles):
    return Adapted(weight, factors, roles, adapted.name, adapted.scale, (*adapted.signature, roles))


def _roles(adapted):
    """Roles of the axes that are left: `scan` took the first ones."""
    return adapted.roles[len(adapted.roles) - adapted.weight.ndim :]


def _axes(roles, role):
    return [axis for axis, r in enumerate(roles) if r == role]


def _transpose(adapted, permutation):
    roles = _roles(adapted)
    order = {  # of the axes with one role, among themselves
        role: [_axes(roles, role).index(axis) for axis in permutation if roles[axis] == role]
        for role in "bio"
    }

    def permute(leaf, groups):
        if leaf is None:
            return None
        axes, start = [], 0
        for group in groups:
            group_order = [0] if group == "r" else order[group]
            axes += [start + axis for axis in group_order]
            start += len(group_order)
        return leaf.transpose(axes)

    factors = Factors(*map(permute, adapted.factors, ("bri", "bor", "bri", "bi", "br")))
    weight = adapted.weight.transpose(permutation)
    return _replace(adapted, weight, factors, "".join(roles[axis] for axis in permutation))


def _dot_general(lhs: Any, rhs: Any, *, dimension_numbers, precision, **params):
    """W x + scale B [A x + (delta (x o s)) o t], in whatever order the axes come."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    base = (
        lhs.weight if isinstance(lhs, Adapted) else lhs,
        rhs.weight if isinstance(rhs, Adapted) else rhs,
    )
    out = jax.lax.dot_general_p.bind(
        *base, dimension_numbers=dimension_numbers, precision=precision, **params
    )
    sides = [(lhs, lhs_contract, lhs_batch), (rhs, rhs_contract, rhs_batch)]
    if not isinstance(lhs, Adapted):
        sides.reverse()
    (adapted, contract, batch), (x, x_contract, x_batch) = sides
    roles = _roles(adapted)
    ins, batches = _axes(roles, "i"), _axes(roles, "b")
    if sorted(contract) != ins or sorted(batch) != batches:
        raise no_rule(adapted.name, "a product over other axes than in the example")
    a, b, delta, in_signs, out_signs = adapted.factors
    x = jnp.asarray(x, jnp.promote_types(x.dtype, a.dtype))
    num_batch = len(batches)
    batch_of_factor = [batches.index(axis) for axis in batch]
    ins_of_factor = [num_batch + 1 + ins.index(axis) for axis in contract]

    def times(x, a):  # (batch..., rest of x..., rank)
        numbers = ((x_contract, ins_of_factor), (x_batch, batch_of_factor))
        return jax.lax.dot_general(x, a, numbers, precision=precision)

    inner = times(x, a)
    if delta is not None:
        # The sign of each input, laid along the axes of x.
        order = batch_of_factor + [axis - 1 for axis in ins_of_factor]
        signs = _along(in_signs.transpose(order), (*x_batch, *x_contract), x.ndim)
        last = (*range(num_batch), inner.ndim - 1)
        flips = _along(out_signs.transpose(*batch_of_factor, num_batch), last, inner.ndim)
        inner = inner + times(x * signs, delta) * flips
    update = jax.lax.dot_general(
        inner,
        b,
        (((inner.ndim - 1,), (b.ndim - 1,)), (tuple(range(num_batch)), tuple(batch_of_factor))),
        precision=precision,
    )
    if adapted is lhs:  # the outputs come before the rest of x
        num_outs = roles.count("o")
        update = jnp.moveaxis(
            update,
            range(update.ndim - num_outs, update.ndim),
            range(num_batch, num_batch + num_outs),
        )
    return out + (adapted.scale * update).astype(out.dtype)


def _along(leaf, axes, ndim):
    """Return `leaf` with its axes at the places `axes` among `ndim`, and ones elsewhere."""
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    places = sorted(axes)
    leaf = leaf.transpose(order)
    return leaf.reshape(
        [leaf.shape[places.index(axis)] if axis in places else 1 for axis in range(ndim)]
    )


def _checkpoint(values, *, jaxpr, prevent_cse, policy, **_):
    body = quax.quaxify(jaxpr_as_fun(ClosedJaxpr(jaxpr, ())))
    return jax.checkpoint(body, prevent_cse=prevent_cse, policy=policy)(*values)
