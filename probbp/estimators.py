"""Estimators of a gradient: `jax.value_and_grad`, given a key first.

Every estimator returns the exact value of the function and an estimate of its gradient. They
compose (`averaged`, `control_variate`, `through`), and feed whatever takes an `estimator`. They can
be pickled, if what they are made of can: Optax's own transformations can't.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from probbp.checks import check_choice, check_count, check_estimator, check_number
from probbp.types import Estimator, Tree, ValueAndGrad, keyed, ways_out


def reverse() -> Estimator:
    """Return the exact gradient by reverse mode: `jax.value_and_grad`.

    Exact for the function as it is differentiated. Where `fun` has an argument `rng_key`, for
    operations with a random backward pass, that gets the key; otherwise the key is ignored.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> value, grad = reverse()(jnp.sum)(jax.random.key(0), jnp.ones(3))
        >>> grad.tolist()
        [1.0, 1.0, 1.0]
    """
    return _reverse


def _reverse(fun: Callable, has_aux: bool = False) -> ValueAndGrad:
    def value_and_grad(rng_key, params):
        with ways_out():
            return jax.value_and_grad(keyed(fun, rng_key), has_aux=has_aux)(params)

    return value_and_grad


def forward(
    num_tangents: int = 1,
    *,
    tangents: Literal["gaussian", "unit", "orthogonal"] = "gaussian",
    batch_size: int | None = None,
) -> Estimator:
    r"""Estimate the gradient from directional derivatives, in forward mode only.

    The estimate is :math:`\frac{c}{k} \sum_{i=1}^k (\nabla f \cdot v_i)\, v_i`, unbiased for all
    three laws of the tangents: Gaussian (c = 1), uniform on the unit sphere (c = d, the number of
    parameters), and orthonormal (c = d), which is exact when k = d. For Gaussian tangents the
    relative variance is (d + 1) / k, for orthonormal ones d / k - 1. No residual is stored, and
    loops of dynamic length, which reverse mode refuses, are accepted.

    The sphere is that of all leaves together, not of each leaf. Antithetic pairs are not offered:
    the estimate is even in v, so that -v repeats what v said.

    Args:
        num_tangents: k, the directional derivatives per estimate.
        tangents: the law of the tangents.
        batch_size: how many directional derivatives are taken at once; all by default. Memory
            grows with it (orthogonal tangents are all held together); the primal computation is
            repeated for every batch.

    Returns:
        An estimator. A gradient costs about two to three evaluations of the function per tangent.

    Raises:
        ValueError: if `num_tangents` is not positive, or more orthogonal tangents are asked for
            than there are parameters, or `tangents` is none of the three.
        TypeError: if a leaf of the parameters is not floating point, or for `forward` that was not
            called where an estimator is wanted.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> fun = lambda x: jnp.sum(x**2)
        >>> exact = forward(num_tangents=3, tangents="orthogonal")
        >>> _, grad = exact(fun)(jax.random.key(0), jnp.arange(3.0))
        >>> bool(jnp.allclose(grad, 2 * jnp.arange(3.0), atol=1e-5))
        True

    Reference:
        Baydin et al., 2022, arXiv:2202.08587 (forward gradients); Fluegel et al., 2024,
        arXiv:2410.17764 (several orthogonal tangents).
    """
    if callable(num_tangents):
        raise TypeError(
            "forward was given a function in place of num_tangents: call it first, as in "
            "estimator=forward() or forward()(fun)."
        )
    num_tangents = check_count("num_tangents", num_tangents)
    check_choice("tangents", tangents, ("gaussian", "unit", "orthogonal"))
    if batch_size is not None:
        batch_size = check_count("batch_size", batch_size)

    return partial(_forward, num_tangents, tangents, batch_size)


def _forward(
    num_tangents: int,
    law: str,
    batch_size: int | None,
    fun: Callable,
    has_aux: bool = False,
) -> ValueAndGrad:
    def value_and_grad(rng_key, params):
        _require_floating(params)
        num_params = optax.tree.size(params)
        weight = (1.0 if law == "gaussian" else num_params) / num_tangents
        # The tangents must not depend on what the function draws.
        key_tangents, key_fun = jax.random.split(rng_key)
        one_fun = keyed(fun, key_fun)

        def pushforward(tangent):
            with ways_out():
                value, slope, *aux = jax.jvp(one_fun, (params,), (tangent,), has_aux=has_aux)
            return ((value, *aux) if has_aux else value), slope

        def batch_fn(seeds):
            directions = draw(seeds)
            value, slopes = jax.vmap(pushforward, out_axes=(None, 0))(directions)
            return value, jax.tree.map(
                lambda v: jnp.tensordot((weight * slopes).astype(v.dtype), v, axes=1),
                directions,
            )

        # What a batch needs to draw its tangents: keys, but for orthogonal ones the tangents.
        seeds = jax.random.split(key_tangents, num_tangents)
        draw = jax.vmap(partial(_tangent, law, params))
        if law == "orthogonal":
            seeds, draw = _orthonormalised(draw(seeds)), lambda frame: frame
        return _summed(batch_fn, seeds, batch_size)

    return value_and_grad


def _tangent(law: str, params: Tree, rng_key: jax.Array) -> Tree:
    """Draw a Gaussian tangent, or one of unit length."""
    gaussian = optax.tree.random_like(rng_key, params)
    if law != "unit":
        return gaussian
    norm = optax.tree.norm(gaussian)
    return jax.tree.map(lambda z: (z / norm).astype(z.dtype), gaussian)


def spsa(
    num_pairs: int = 1, *, size: float | None = None, batch_size: int | None = None
) -> Estimator:
    r"""Estimate the gradient from values alone, by simultaneous perturbation.

    With random signs s, of which all parameters have one,

    .. math:: \frac1k \sum_{j=1}^k \frac{f(x + c s_j) - f(x - c s_j)}{2 c}\, s_j,

    for what JAX can't differentiate in either mode: a simulator behind `jax.pure_callback`. Where
    it can, `forward` costs no more and has no step to choose.

    Exact: the value. The estimate is unbiased for a quadratic function, whose relative variance is
    (d - 1) / k, and within :math:`O(c^2)` of it for any other; rounding adds noise of the order of
    the function's divided by c.

    Args:
        num_pairs: k.
        size: c, in units of the parameters; the cube root of the rounding of their dtype by
            default, 6e-6 in double precision and 5e-3 in single. Take what changes the function by
            more than its own error, but within which it is near a parabola.
        batch_size: how many pairs are evaluated at once; all by default.

    Returns:
        An estimator, of 1 + 2 k evaluations of the function. Where a parameter is so large that c
        is lost in its rounding, the estimate is NaN.

    Raises:
        ValueError: for a number of pairs or a size that is not positive.
        TypeError: if a leaf of the parameters is not floating point.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np
        >>> def simulator(x):  # JAX sees nothing of it
        ...     out = jax.ShapeDtypeStruct((), x.dtype)
        ...     return jax.pure_callback(
        ...         lambda x: -np.sum(x**2, -1), out, x, vmap_method="expand_dims")
        >>> value, grad = spsa(size=0.01)(simulator)(jax.random.key(0), jnp.array([3.0]))
        >>> round(float(value), 2), round(float(grad[0]), 2)
        (-9.0, -6.0)

    Reference:
        Spall, 1992, IEEE Transactions on Automatic Control 37(3).
    """
    num_pairs = check_count("num_pairs", num_pairs)
    if size is not None:
        check_number("size", size, "(0, inf)", "It is how far the parameters are moved.")
    if batch_size is not None:
        batch_size = check_count("batch_size", batch_size)
    return partial(_spsa, num_pairs, size, batch_size)


def _spsa(
    num_pairs: int,
    size: float | None,
    batch_size: int | None,
    fun: Callable,
    has_aux: bool = False,
) -> ValueAndGrad:
    def value_and_grad(rng_key, params):
        _require_floating(params)
        key_signs, key_fun = jax.random.split(rng_key)
        one_fun = keyed(fun, key_fun)

        def value_of(params):
            out = one_fun(params)
            return out[0] if has_aux else out

        def pair(rng_key):
            signs = optax.tree.random_like(rng_key, params, sampler=jax.random.rademacher)
            ends = jax.tree.map(partial(_ends, size), params, signs)
            values = jax.vmap(value_of)(ends)
            change = values[0] - values[1]
            return jax.tree.map(lambda x: (change / (x[0] - x[1])).astype(x.dtype), ends)

        def batch_fn(keys):
            grads = jax.vmap(pair)(keys)
            return (), jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0) / num_pairs, grads)

        _, grad = _summed(batch_fn, jax.random.split(key_signs, num_pairs), batch_size)
        return one_fun(params), grad

    return value_and_grad


def _ends(size: float | None, x: jax.Array, signs: jax.Array) -> jax.Array:
    """Return x + c s and x - c s, whose distance is what rounding leaves of 2 c."""
    distance = float(jnp.finfo(x.dtype).eps) ** (1 / 3) if size is None else size
    move = (distance * signs).astype(x.dtype)
    return jnp.stack([x + move, x - move])


def averaged(estimator: Estimator, num: int, *, batch_size: int | None = None) -> Estimator:
    """Average an estimator over independent keys: `num` times the cost, a `num`-th of the variance.

    Args:
        estimator: the estimator to repeat.
        num: how many keys.
        batch_size: how many are held in memory at once; all by default.

    Raises:
        ValueError: if `num` is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> estimator = averaged(forward(), num=8)
        >>> value, grad = estimator(jnp.sum)(jax.random.key(0), jnp.ones(3))
    """
    check_estimator(estimator)
    num = check_count("num", num)
    if batch_size is not None:
        batch_size = check_count("batch_size", batch_size)

    return partial(_averaged, estimator, num, batch_size)


def _averaged(
    estimator: Estimator,
    num: int,
    batch_size: int | None,
    fun: Callable,
    has_aux: bool = False,
) -> ValueAndGrad:
    value_and_grad = estimator(fun, has_aux)

    def mean_value_and_grad(rng_key, params):
        def batch_fn(keys):
            values, grads = jax.vmap(value_and_grad, in_axes=(0, None))(keys, params)
            value = jax.tree.map(lambda leaf: leaf[0], values)
            return value, jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0) / num, grads)

        return _summed(batch_fn, jax.random.split(rng_key, num), batch_size)

    return mean_value_and_grad


def control_variate(estimator: Estimator, approximate_grad: Callable[[Tree], Tree]) -> Estimator:
    r"""Estimate only what an approximation of the gradient leaves: less variance, no bias.

    With :math:`c = \tilde\nabla f(x)`, the estimator is applied to
    :math:`x' \mapsto f(x') - c \cdot x'`, and c is added to what it finds. For an estimator that is
    linear in the function, as `forward` and `averaged(forward(...))` are, the expectation stays
    what it was for any c, and the variance is that of a gradient of length
    :math:`|\nabla f - c|`: none for the exact gradient.

    Args:
        estimator: an estimator linear in the function; `through` a clipping is not.
        approximate_grad: parameters to a tree like them: the gradient of a prior, of a Gaussian
            approximation, of a cheaper model. It must not depend on the key.

    Returns:
        An estimator, at the cost of one more call of `approximate_grad`. In `probbp.mala` it needs
        the position's own coordinates, that is no inverse mass matrix (`metric=None`).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> fun = lambda x: jnp.sum(x**2 + 0.1 * jnp.sin(x))
        >>> estimator = control_variate(forward(), lambda x: 2 * x)
        >>> value, grad = estimator(fun)(jax.random.key(0), jnp.ones(3))
    """
    check_estimator(estimator)
    return partial(_controlled, estimator, approximate_grad)


def _controlled(
    estimator: Estimator, approximate_grad: Callable, fun: Callable, has_aux: bool = False
) -> ValueAndGrad:
    def controlled_value_and_grad(rng_key, params):
        approximation = approximate_grad(params)

        def rest(params, rng_key=rng_key):
            out = keyed(fun, rng_key)(params)
            value = out[0] if has_aux else out
            return value - optax.tree.vdot(approximation, params), out

        (_, out), grad = estimator(rest, has_aux=True)(rng_key, params)
        grad = jax.tree.map(lambda g, c: g + c.astype(g.dtype), grad, approximation)
        return out, grad

    return controlled_value_and_grad


def through(transformation: optax.GradientTransformation, estimator: Estimator) -> Estimator:
    """Send an estimate through an Optax transformation, started afresh at every call.

    The transformation's state is not kept, so that the result is still a function of key and
    parameters alone, as a sampler needs: `optax.clip_by_global_norm`, `optax.scale`, `optax.sign`.
    In SVI a transformation may remember; it then belongs before the optimiser, which keeps its
    state: `probbp.numpyro.Optim(optax.chain(transformation, optax.adam(1e-2)), estimator)`.

    Args:
        transformation: what each estimate passes through.
        estimator: where the estimate comes from.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> estimator = through(optax.clip_by_global_norm(1.0), reverse())
        >>> _, grad = estimator(jnp.sum)(jax.random.key(0), jnp.ones(4))
        >>> grad.tolist()
        [0.5, 0.5, 0.5, 0.5]
    """
    check_estimator(estimator)
    return partial(_transformed, transformation, estimator)


def _transformed(
    transformation: optax.GradientTransformation,
    estimator: Estimator,
    fun: Callable,
    has_aux: bool = False,
) -> ValueAndGrad:
    value_and_grad = estimator(fun, has_aux)

    def transformed_value_and_grad(rng_key, params):
        value, grad = value_and_grad(rng_key, params)
        grad, _ = transformation.update(grad, transformation.init(params), params)
        return value, grad

    return transformed_value_and_grad


def _summed(batch_fn: Callable, items: Tree, batch_size: int | None) -> tuple:
    """Sum the gradients of batches of items, holding those of one batch at a time."""
    num = jax.tree.leaves(items)[0].shape[0]
    batch_size = min(batch_size or num, num)
    num_first = num - batch_size * ((num - 1) // batch_size)
    value, grad = batch_fn(jax.tree.map(lambda leaf: leaf[:num_first], items))
    if num_first == num:
        return value, grad
    batches = jax.tree.map(
        lambda leaf: leaf[num_first:].reshape(-1, batch_size, *leaf.shape[1:]), items
    )
    grad, _ = jax.lax.scan(
        lambda grad, batch: (optax.tree.add(grad, batch_fn(batch)[1]), None), grad, batches
    )
    return value, grad


def _orthonormalised(tangents: Tree) -> Tree:
    """Turn k Gaussian tangents, stacked along a first axis of every leaf, into a random frame."""
    num = jax.tree.leaves(tangents)[0].shape[0]
    one = jax.tree.map(lambda leaf: leaf[0], tangents)
    if num > optax.tree.size(one):
        raise ValueError(
            f"{num} orthogonal tangents do not fit into {optax.tree.size(one)} parameters: "
            "lower num_tangents, or use tangents='gaussian'."
        )
    _, unravel = ravel_pytree(one)
    flat = jax.vmap(lambda tangent: ravel_pytree(tangent)[0])(tangents)
    wide = flat.astype(jnp.promote_types(flat.dtype, jnp.float32))  # LAPACK knows no half precision
    return jax.vmap(unravel)(jnp.linalg.qr(wide.T)[0].T.astype(flat.dtype))


def _require_floating(params: Tree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"Gradients are estimated for floating-point leaves only, but "
                f"params{jax.tree_util.keystr(path)} has dtype {jnp.result_type(leaf)}: cast it, "
                "or close over it."
            )
