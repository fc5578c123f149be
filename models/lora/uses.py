"""Which products a weight enters: found by following it through the traced network."""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from probbp.models.lora.layout import ELEMENTWISE, WAY_OUT, Layout, named_leaves, no_rule


def layouts(
    apply_fn: Callable[..., Any],
    params: Any,
    target: str,
    example: tuple[Any, ...],
    *,
    materialise: bool = False,
) -> dict[str, Layout]:
    """Find the weights whose names match, and what their axes are for.

    One abstract pass: the function is traced and not computed, and each weight is followed through
    transpositions, conversions of dtype, `jit`, `checkpoint`, `scan`, `cond` and `while_loop` to
    the products it enters.

    Args:
        apply_fn: `(params, *inputs) -> output`.
        params: pytree of arrays, or of their `jax.ShapeDtypeStruct`.
        target: regular expression, searched for in the names of `named_leaves`. Vectors are left
            alone: they have no low-rank factors.
        example: the inputs, or their shapes.
        materialise: whether what `apply` could not replace is accepted. A weight that enters no
            product on its way is then taken as (in, ..., in, out).

    Returns:
        Names to layouts, sorted by name.

    Raises:
        TypeError: for a leaf of `params` that is not an array.
        ValueError: where no weight matches, or one that does is not of floating point, is used in
            no product, in two different ones or by something that has no rule, each by its name.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"up": jnp.ones((3, 5)), "down": jnp.ones((2, 5)), "bias": jnp.ones(2)}
        >>> network = lambda params, x: (x @ params["up"]) @ params["down"].T + params["bias"]
        >>> found = layouts(network, params, "up|down", (jnp.ones((1, 3)),))
        >>> {name: layout.roles for name, layout in found.items()}
        {'down': 'oi', 'up': 'io'}
    """
    leaves = named_leaves(params)
    _check_arrays(leaves)
    found = _matching(leaves, target)
    jaxpr = jax.make_jaxpr(apply_fn)(params, *example).jaxpr
    views = {
        variable: _View(name, tuple(range(leaf.ndim)), ())
        for variable, (name, leaf) in zip(jaxpr.invars, leaves.items(), strict=False)
        if name in found
    }
    uses = {name: _Uses([], []) for name in found}
    _follow(jaxpr, views, uses)
    if not materialise:
        _check_custom_vjps(jaxpr)
    return {name: _layout(name, leaves[name], uses[name], materialise) for name in found}


class _View(NamedTuple):
    """A variable of a jaxpr that is a weight: its axes, as numbers of the weight's own.

    `stack` are the axes along which a `scan` has taken a slice.
    """

    name: str
    axes: tuple[int, ...]
    stack: tuple[int, ...]


class _Uses(NamedTuple):
    """What happens to a weight: products (axes summed over, axes stacked), and others by name."""

    products: list[tuple[frozenset[int], frozenset[int]]]
    others: list[str]


def _check_arrays(leaves):
    for name, leaf in leaves.items():
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(
                f"params must hold arrays only, but {name!r} is {type(leaf).__name__}. Of an "
                "Equinox model take `arrays, rest = equinox.partition(model, equinox.is_array)`, "
                "and in apply_fn `equinox.combine(arrays, rest)`; of a Flax NNX one "
                "`graph, state = nnx.split(model)` and `nnx.merge(graph, state)`."
            )


def _matching(leaves, target) -> list[str]:
    """Return the names of the matrices that match, sorted."""
    matrices = [name for name, leaf in leaves.items() if leaf.ndim > 1]
    found = sorted(name for name in matrices if re.search(target, name))
    if not found:
        raise ValueError(
            f"No weight's name matches target={target!r}. There are {matrices[:8]}"
            f"{' and others' if len(matrices) > 8 else ''}; vectors are not adapted."
        )
    for name in found:
        if not jnp.issubdtype(leaves[name].dtype, jnp.floating):
            raise ValueError(
                f"{name!r} is of {leaves[name].dtype}. Only weights of floating point are adapted: "
                "narrow target, or take the weights before they are quantised."
            )
    return found


def _check_custom_vjps(jaxpr):
    custom = sorted(set(_custom_vjps(jaxpr)))
    if custom:
        raise ValueError(
            f"quax cannot trace functions with a custom_vjp, and apply_fn calls {custom}. {WAY_OUT}"
        )


def _follow(jaxpr, views, uses) -> list[_View | None]:
    """Follow weights through a jaxpr, note their uses, and return which outputs are weights."""

    def view(atom):
        return None if isinstance(atom, Literal) else views.get(atom)

    for eqn in jaxpr.eqns:
        seen = [view(atom) for atom in eqn.invars]
        if any(v is not None for v in seen):
            for variable, result in zip(eqn.outvars, _results(eqn, seen, uses), strict=True):
                if result is not None:
                    views[variable] = result
    return [view(atom) for atom in jaxpr.outvars]


def _results(eqn, seen, uses) -> list[_View | None]:
    """Note what an equation does with weights, and return which of its outputs are weights."""
    name = eqn.primitive.name
    weights = [v for v in seen if v is not None]
    if name in ELEMENTWISE:
        return [seen[0]]
    if name == "transpose":
        axes = tuple(weights[0].axes[axis] for axis in eqn.params["permutation"])
        return [weights[0]._replace(axes=axes)]
    if name == "dot_general" and len(weights) == 1:
        _note_product(eqn, seen, uses)
    elif inner := _bodies(eqn, seen):
        outputs = [_follow_inside(body, body_seen, uses) for body, body_seen in inner][-1]
        if name not in ("scan", "while", "cond"):
            return outputs
        _note_others(name, outputs, uses)
    else:
        _note_others(name, weights, uses)
    return [None] * len(eqn.outvars)


def _note_product(eqn, seen, uses):
    """Note over which axes of its only weight a product sums, and which it stacks."""
    side = 0 if seen[0] is not None else 1
    weight = seen[side]
    contract, batch = (
        frozenset(weight.axes[axis] for axis in pair[side])
        for pair in eqn.params["dimension_numbers"]
    )
    uses[weight.name].products.append((contract, batch | frozenset(weight.stack)))


def _note_others(name, weights, uses):
    for weight in weights:
        if weight is not None:
            uses[weight.name].others.append(name)


def _follow_inside(body, seen, uses) -> list[_View | None]:
    """Follow weights through a jaxpr inside an equation."""
    views = {
        variable: _slice(v, variable.aval.ndim)
        for variable, v in zip(body.invars, seen, strict=True)
        if v is not None
    }
    return _follow(body, views, uses)


def _slice(view, ndim):
    """Return the view of a slice along the first axis, where there is one."""
    num = len(view.axes) - ndim
    return view._replace(axes=view.axes[num:], stack=(*view.stack, *view.axes[:num]))


def _jaxprs(eqn) -> Iterator[Any]:
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner


def _bodies(eqn, seen) -> list[tuple[Any, list]]:
    """Return the jaxprs inside an equation, each with what its inputs are."""
    if eqn.primitive.name == "while":
        num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carry = seen[num_cond + num_body :]
        cond, body = (eqn.params[f"{k}_jaxpr"].jaxpr for k in ("cond", "body"))
        return [(cond, seen[:num_cond] + carry), (body, seen[num_cond:])]
    if eqn.primitive.name == "cond":
        return [(branch, seen[1:]) for branch in _jaxprs(eqn)]
    return [(body, seen) for body in _jaxprs(eqn) if len(body.invars) == len(seen)]


def _custom_vjps(jaxpr) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        inner = list(_jaxprs(eqn))
        if eqn.primitive.name.startswith("custom_vjp"):
            yield from (str(getattr(body.debug_info, "func_name", "?")) for body in inner[:1])
        for body in inner:
            yield from _custom_vjps(body)


def _layout(name, leaf, uses, materialise) -> Layout:
    products = set(uses.products)
    if not materialise:
        if uses.others:
            raise no_rule(name, uses.others[0])
        if not products:
            raise ValueError(f"apply_fn multiplies nothing by {name!r}. Narrow target.")
        if len(products) > 1:
            raise ValueError(
                f"{name!r} enters products over different axes, so that input and output are not "
                f"told apart. {WAY_OUT}"
            )
    if products:
        contract, batch = uses.products[0]
    else:
        contract, batch = frozenset(range(leaf.ndim - 1)), frozenset()
    roles = "".join(
        "i" if axis in contract else "b" if axis in batch else "o" for axis in range(leaf.ndim)
    )
    if "i" not in roles or "o" not in roles:
        raise ValueError(
            f"{name!r} with shape {leaf.shape} has no axis of inputs or none of outputs, and so no "
            "low-rank factors. Narrow target."
        )
    return Layout(roles, tuple(leaf.shape), leaf.dtype)
