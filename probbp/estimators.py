"""Estimators of a gradient: `jax.value_and_grad`, given a key first.

Every estimator returns the exact value of the function and an estimate of its gradient. They
compose (`averaged`, `through`), and feed whatever takes an `estimator`.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from probbp.types import Estimator, Tree, ValueAndGrad, keyed


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

    def estimator(fun: Callable, has_aux: bool = False) -> ValueAndGrad:
        def value_and_grad(rng_key, params):
            return jax.value_and_grad(keyed(fun, rng_key), has_aux=has_aux)(params)

        return value_and_grad

    return estimator


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
            grows with it; the primal computation is repeated for every batch.

    Returns:
        An estimator. A gradient costs about two to three evaluations of the function per tangent.

    Raises:
        ValueError: if `num_tangents` is not positive, or more orthogonal tangents are asked for
            than there are parameters, or `tangents` is none of the three.
        TypeError: if a leaf of the parameters is not floating point.

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
    if num_tangents < 1:
        raise ValueError(f"forward needs at least one tangent, got num_tangents={num_tangents}.")
    if tangents not in ("gaussian", "unit", "orthogonal"):
        raise ValueError(
            f"Unknown tangents={tangents!r}: choose 'gaussian', 'unit' or 'orthogonal'."
        )

    def estimator(fun: Callable, has_aux: bool = False) -> ValueAndGrad:
        def value_and_grad(rng_key, params):
            _require_floating(params)
            num_params = optax.tree.size(params)
            directions = _tangents(rng_key, params, num_tangents, tangents)
            weight = (1.0 if tangents == "gaussian" else num_params) / num_tangents
            # The tangents must not depend on what the function draws.
            one_fun = keyed(fun, jax.random.fold_in(rng_key, 0))

            def pushforward(tangent):
                value, slope, *aux = jax.jvp(one_fun, (params,), (tangent,), has_aux=has_aux)
                return ((value, *aux) if has_aux else value), slope

            if batch_size is None or batch_size >= num_tangents:
                value, slopes = jax.vmap(pushforward, out_axes=(None, 0))(directions)
            else:
                values, slopes = jax.lax.map(pushforward, directions, batch_size=batch_size)
                value = jax.tree.map(lambda leaf: leaf[0], values)
            grad = jax.tree.map(
                lambda v: jnp.tensordot((weight * slopes).astype(v.dtype), v, axes=1), directions
            )
            return value, grad

        return value_and_grad

    return estimator


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
    if num < 1:
        raise ValueError(f"averaged needs at least one key, got num={num}.")

    def averaged_estimator(fun: Callable, has_aux: bool = False) -> ValueAndGrad:
        value_and_grad = estimator(fun, has_aux)

        def mean_value_and_grad(rng_key, params):
            keys = jax.random.split(rng_key, num)
            values, grads = jax.lax.map(
                lambda key: value_and_grad(key, params), keys, batch_size=batch_size or num
            )
            value = jax.tree.map(lambda leaf: leaf[0], values)
            return value, jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), grads)

        return mean_value_and_grad

    return averaged_estimator


def through(transformation: optax.GradientTransformation, estimator: Estimator) -> Estimator:
    """Send an estimate through an Optax transformation, started afresh at every call.

    The transformation's state is not kept, so that the result is still a function of key and
    parameters alone, as a sampler needs: `optax.clip_by_global_norm`, `optax.scale`, `optax.sign`.

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

    def transformed_estimator(fun: Callable, has_aux: bool = False) -> ValueAndGrad:
        value_and_grad = estimator(fun, has_aux)

        def transformed_value_and_grad(rng_key, params):
            value, grad = value_and_grad(rng_key, params)
            grad, _ = transformation.update(grad, transformation.init(params), params)
            return value, grad

        return transformed_value_and_grad

    return transformed_estimator


def _tangents(rng_key: jax.Array, params: Tree, num: int, law: str) -> Tree:
    """Draw `num` tangents, stacked along a new first axis of every leaf."""
    gaussian = jax.vmap(lambda key: optax.tree.random_like(key, params))(
        jax.random.split(rng_key, num)
    )
    if law == "gaussian":
        return gaussian
    if law == "unit":
        return jax.vmap(lambda v: optax.tree.scale(1 / optax.tree.norm(v), v))(gaussian)
    if num > optax.tree.size(params):
        raise ValueError(
            f"{num} orthogonal tangents do not fit into {optax.tree.size(params)} parameters: "
            "lower num_tangents, or use tangents='gaussian'."
        )
    _, unravel = ravel_pytree(params)
    flat = jax.vmap(lambda tangent: ravel_pytree(tangent)[0])(gaussian)
    return jax.vmap(unravel)(jnp.linalg.qr(flat.T)[0].T)


def _require_floating(params: Tree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"forward differentiates floating-point leaves only, but "
                f"params{jax.tree_util.keystr(path)} has dtype {jnp.result_type(leaf)}: cast it, "
                "or close over it."
            )
