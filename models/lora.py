"""Low-rank updates of the weights of a network that is not edited.

W becomes W + scale B A wherever the network multiplies by W: the products are formed with the two
factors, not with a dense update. Hu et al., 2022, arXiv:2106.09685. The network is any JAX function
of a pytree; its weights may be stored (in, out), (out, in), with several input or output axes, as
in attention kernels, or stacked over layers. The replacement is an array type of quax, to which the
function applies itself.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

try:
    import equinox
    import quax
except ImportError as error:
    raise ImportError(
        "Low-rank updates of unedited networks need the package quax: pip install 'probbp[models]'."
    ) from error


class Layout(NamedTuple):
    """What the axes of a weight are for.

    Attributes:
        roles: a letter an axis: "i" for those that its product sums over, "o" for those that
            it leaves, "b" for those along which there are several weights, as in layers that
            `jax.lax.scan` or `jax.vmap` runs over.
        shape: of the weight.
        dtype: of the weight.
    """

    roles: str
    shape: tuple[int, ...]
    dtype: Any

    def sizes(self, role: str) -> tuple[int, ...]:
        """Return the sizes of the axes with this role."""
        return tuple(size for size, r in zip(self.shape, self.roles, strict=True) if r == role)

    @property
    def num_in(self) -> int:
        """Number of inputs, n."""
        return math.prod(self.sizes("i"))

    @property
    def num_out(self) -> int:
        """Number of outputs, m."""
        return math.prod(self.sizes("o"))

    def shape_of_a(self, rank: int) -> tuple[int, ...]:
        """Shape of the factor A: (..., rank, in), with what is stacked in front."""
        return (*self.sizes("b"), rank, self.num_in)

    def shape_of_b(self, rank: int) -> tuple[int, ...]:
        """Shape of the factor B: (..., out, rank), with what is stacked in front."""
        return (*self.sizes("b"), self.num_out, rank)


class Factors(NamedTuple):
    """The factors of one update, B A, or B (A + delta o t s^T) where signs are given.

    Attributes:
        a: (..., rank, in). Several input axes count as one, in the weight's order.
        b: (..., out, rank), likewise.
        delta: (..., rank, in), a deviation of `a` whose signs are flipped.
        in_signs: s, (..., in), +1 or -1.
        out_signs: t, (..., rank), +1 or -1.
    """

    a: Any
    b: Any
    delta: Any = None
    in_signs: Any = None
    out_signs: Any = None


def named_leaves(params: Any) -> dict[str, Any]:
    """Return the leaves of a pytree by the names that `target` is matched with.

    A name is the path joined by dots: `params.Dense_0.kernel` in Flax Linen, `attention.out.kernel`
    in Flax NNX, `layers.0.weight` in Equinox, the key itself in a flat dictionary.

    Raises:
        ValueError: where two leaves have one name.
    """
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    leaves = {_name(path): leaf for path, leaf in paths}
    if len(leaves) < len(paths):
        raise ValueError("Two leaves of params have the same name once their paths are joined.")
    return leaves


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
    for name, leaf in leaves.items():
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(
                f"params must hold arrays only, but {name!r} is {type(leaf).__name__}. Of an "
                "Equinox model take `arrays, rest = equinox.partition(model, equinox.is_array)`, "
                "and in apply_fn `equinox.combine(arrays, rest)`; of a Flax NNX one "
                "`graph, state = nnx.split(model)` and `nnx.merge(graph, state)`."
            )
    found = sorted(
        name for name, leaf in leaves.items() if leaf.ndim > 1 and re.search(target, name)
    )
    if not found:
        matrices = [name for name, leaf in leaves.items() if leaf.ndim > 1]
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
    jaxpr = jax.make_jaxpr(apply_fn)(params, *example).jaxpr
    views = {
        variable: _View(name, tuple(range(leaf.ndim)), ())
        for variable, (name, leaf) in zip(jaxpr.invars, leaves.items(), strict=False)
        if name in found
    }
    uses = {name: _Uses([], []) for name in found}
    _follow(jaxpr, views, uses)
    if not materialise:
        custom = sorted(set(_custom_vjps(jaxpr)))
        if custom:
            raise ValueError(
                f"quax cannot trace functions with a custom_vjp, and apply_fn calls {custom}. "
                f"{_WAY_OUT}"
            )
    return {name: _layout(name, leaves[name], uses[name], materialise) for name in found}


def apply(
    apply_fn: Callable[..., Any],
    layouts: Mapping[str, Layout],
    scale: float,
    params: Any,
    factors: Mapping[str, Factors],
    *inputs: Any,
    materialise: bool = False,
) -> Any:
    """Evaluate the network with W + scale B A in the place of each weight W.

    Exact, and the network itself where B = 0. Beside the network's own products it costs two with
    the rank as inner or outer size, two more with signs. They are formed in the wider of the dtypes
    of factors and activations; the sum has the dtype of the network's own product.

    Args:
        apply_fn: `(params, *inputs) -> output`.
        layouts: from the function `layouts`.
        scale: of the update.
        params: pytree of arrays.
        factors: by name.
        inputs: as `apply_fn` takes them.
        materialise: whether dense weights are formed first, which every function accepts.

    Raises:
        ValueError: where a weight is used by something that has no rule.

    Example:
        >>> import jax.numpy as jnp
        >>> network = lambda params, x: x @ params["w"]
        >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((1, 3))
        >>> factors = {"w": Factors(a=jnp.ones((1, 3)), b=jnp.ones((2, 1)))}
        >>> apply(network, layouts(network, params, "w", (x,)), 10.0, params, factors, x).tolist()
        [[33.0, 33.0]]
    """
    if materialise:
        return apply_fn(merge(params, layouts, factors, scale), *inputs)

    # Modules are put together inside: Flax NNX wants a current trace when it makes its variables.
    leaves, structure = named_leaves(params), jax.tree.structure(params)
    adapted = {
        name: _adapt(name, jnp.asarray(leaves[name]), layout, factors[name], scale)
        for name, layout in layouts.items()
    }
    structures = []

    def network(adapted):
        out = apply_fn(jax.tree.unflatten(structure, (leaves | adapted).values()), *inputs)
        out, out_structure = jax.tree.flatten(out)
        structures.append(out_structure)
        return out

    out = quax.quaxify(network)(adapted)
    return jax.tree.unflatten(structures[0], out)


def merge(
    params: Any, layouts: Mapping[str, Layout], factors: Mapping[str, Factors], scale: float
) -> Any:
    """Return the weights W + scale B A, dense, in the dtype and layout of W.

    Args:
        params: pytree of arrays.
        layouts: from the function `layouts`.
        factors: by name.
        scale: of the update.

    Returns:
        A pytree like `params`.
    """

    def replace(path, leaf):
        name = _name(path)
        if name not in layouts:
            return leaf
        update = scale * _dense(layouts[name], factors[name])
        return (leaf + update).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(replace, params)


_WAY_OUT = (
    "Narrow target, or pass materialise=True: dense weights are then formed, for every example of "
    "the batch, or once with noise='shared'."
)
# A weight stays itself through these, element by element.
_ELEMENTWISE = ("convert_element_type", "copy", "copy_p", "stop_gradient")


class _Adapted(quax.ArrayValue):
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
        return ShapedArray(self.weight.shape, self.weight.dtype)

    def materialise(self):
        raise _no_rule(self.name, "something that needs its dense values")

    @staticmethod
    def default(primitive, values, params):
        """Apply a primitive; quax itself opens `jit`, `scan`, `cond` and `while_loop`."""
        adapted = [value for value in values if isinstance(value, _Adapted)]
        first = adapted[0]
        if primitive.name in _ELEMENTWISE:
            weight = primitive.bind(first.weight, **params)
            return _replace(first, weight, first.factors, _roles(first))
        if primitive.name == "transpose":
            return _transpose(first, params["permutation"])
        if primitive.name == "dot_general" and len(adapted) == 1:
            return _dot_general(*values, **params)
        if primitive.name in ("checkpoint", "remat2", "remat"):
            return _checkpoint(values, **params)
        raise _no_rule(first.name, primitive.name)


def _adapt(name, weight, layout, factors, scale):
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
    return _Adapted(weight, unflattened, layout.roles, name, float(scale), signature)


def _replace(adapted, weight, factors, roles):
    return _Adapted(
        weight, factors, roles, adapted.name, adapted.scale, (*adapted.signature, roles)
    )


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
        lhs.weight if isinstance(lhs, _Adapted) else lhs,
        rhs.weight if isinstance(rhs, _Adapted) else rhs,
    )
    out = jax.lax.dot_general_p.bind(
        *base, dimension_numbers=dimension_numbers, precision=precision, **params
    )
    sides = [(lhs, lhs_contract, lhs_batch), (rhs, rhs_contract, rhs_batch)]
    if not isinstance(lhs, _Adapted):
        sides.reverse()
    (adapted, contract, batch), (x, x_contract, x_batch) = sides
    roles = _roles(adapted)
    ins, batches = _axes(roles, "i"), _axes(roles, "b")
    if sorted(contract) != ins or sorted(batch) != batches:
        raise _no_rule(adapted.name, "a product over other axes than in the example")
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


def _dense(layout, factors):
    a = factors.a
    if factors.delta is not None:
        a = a + factors.delta * factors.out_signs[..., :, None] * factors.in_signs[..., None, :]
    update = factors.b @ a
    update = update.reshape(*(size for role in "boi" for size in layout.sizes(role)))
    stands = [axis for role in "boi" for axis in _axes(layout.roles, role)]
    return update.transpose([stands.index(axis) for axis in range(len(stands))])


def _no_rule(name, primitive):
    return ValueError(
        f"{name!r} enters {primitive}, for which there is no low-rank rule. {_WAY_OUT}"
    )


def _name(path) -> str:
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]  # a variable of Flax NNX
    return jax.tree_util.keystr(path, simple=True, separator=".")


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


def _follow(jaxpr, views, uses) -> list[_View | None]:
    """Follow weights through a jaxpr, note their uses, and return which outputs are weights."""

    def view(atom):
        return None if isinstance(atom, Literal) else views.get(atom)

    for eqn in jaxpr.eqns:
        seen = [view(atom) for atom in eqn.invars]
        present = [v for v in seen if v is not None]
        if not present:
            continue
        name = eqn.primitive.name
        results: list[_View | None] = [None] * len(eqn.outvars)
        if name in _ELEMENTWISE:
            results = [seen[0]]
        elif name == "transpose":
            axes = tuple(present[0].axes[axis] for axis in eqn.params["permutation"])
            results = [present[0]._replace(axes=axes)]
        elif name == "dot_general" and len(present) == 1:
            side = 0 if seen[0] is not None else 1
            (contract, batch) = (pair[side] for pair in eqn.params["dimension_numbers"])
            axes = present[0].axes
            uses[present[0].name].products.append(
                (
                    frozenset(axes[axis] for axis in contract),
                    frozenset(axes[axis] for axis in batch) | frozenset(present[0].stack),
                )
            )
        elif inner := _bodies(eqn, seen):
            outputs = []
            for body, body_seen in inner:
                body_views = {
                    variable: _slice(v, variable.aval.ndim)
                    for variable, v in zip(body.invars, body_seen, strict=True)
                    if v is not None
                }
                outputs = _follow(body, body_views, uses)
            if name not in ("scan", "while", "cond"):
                results = outputs
            else:
                for v in outputs:
                    if v is not None:
                        uses[v.name].others.append(name)
        else:
            for v in present:
                uses[v.name].others.append(name)
        for variable, result in zip(eqn.outvars, results, strict=True):
            if result is not None:
                views[variable] = result
    return [view(atom) for atom in jaxpr.outvars]


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
            raise _no_rule(name, uses.others[0])
        if not products:
            raise ValueError(f"apply_fn multiplies nothing by {name!r}. Narrow target.")
        if len(products) > 1:
            raise ValueError(
                f"{name!r} enters products over different axes, so that input and output are not "
                f"told apart. {_WAY_OUT}"
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
