r"""Curvature along its leading direction: read by products alone, and held down by two gradients.

Dynamic spectral backpropagation (Muthuraman, 2025, arXiv:2505.23369) subtracts
:math:`\lambda_1 e_1 e_1^\top` from the weights, for square layers and whatever the weights are.
Here is a gradient that lowers the leading eigenvalue of the Hessian. With :math:`e_1` its
eigenvector and :math:`\lambda_1` simple, :math:`\nabla \lambda_1 = D^3 f[e_1, e_1]`, so that

.. math:: \tfrac12 \left[\nabla f(w + \rho e_1) + \nabla f(w - \rho e_1)\right]
    = \nabla \left(f + \tfrac{\rho^2}{2} \lambda_1\right)(w) + O(\rho^4).

Derived here; the device of sharpness-aware minimisation (Foret et al., 2021, arXiv:2010.01412; Luo
et al., 2024, arXiv:2501.12666), without its first-order term and without a sign to choose.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from probbp.checks import check_count, check_number, check_rng_key
from probbp.optim.dsbp.tracker import Spectrum
from probbp.types import Estimator, Tree, ValueAndGrad, keyed

Product = Callable[[jax.Array], jax.Array]


def two_point(
    rho: float, direction: jax.Array | None = None, *, num_products: int = 8
) -> Estimator:
    r"""Return the gradient of the function plus :math:`\rho^2 / 2` times its leading curvature.

    Exact: the value, which is the function's own. The gradient is that of the penalised function up
    to :math:`\rho^4`, where the direction is the eigenvector and its eigenvalue is simple; along
    any other direction e it is that of :math:`f + (\rho^2 / 2)\, e^\top H e` with e held fixed. For
    a small rho it is the gradient of the function.

    It feeds whatever takes an estimator: a training loop, and SVI by `probbp.numpyro.Optim`. In a
    Metropolis test it is exact as any estimator is.

    Args:
        rho: how far the two points lie from the parameters; lengths are those of
            `ravel_pytree(params)`.
        direction: (d,) of unit length, in the order of `ravel_pytree`, such as the first of
            `Spectrum.vectors`: a loop that tracks it pays for its products only when it wants to.
            If not given each call finds it anew, from a random start that hangs on the key.
        num_products: Hessian products for that, by Lanczos' method; no more than d are made.

    Returns:
        An estimator, in reverse mode. A call costs one evaluation and two gradients, and without a
        direction `num_products` Hessian products of two gradients each.

    Raises:
        ValueError: for a rho that is not positive, or a direction of another size.
        ImportError: without a direction, where matfree is missing: `pip install probbp[spectra]`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def fun(w):  # a valley along the second axis, narrow where it is far from 0
        ...     return 0.5 * w[0] ** 2 * (1 + w[1] ** 2)
        >>> direction = jnp.array([1.0, 0.0])
        >>> _, grad = two_point(0.1, direction)(fun)(jax.random.key(0), jnp.array([0.0, 2.0]))
        >>> [round(float(g), 4) for g in grad]  # rho^2 / 2 times the slope of 1 + w[1]^2
        [0.0, 0.02]
    """
    check_number("rho", rho, "(0, inf)", "For the plain gradient: reverse().")
    num_products = check_count("num_products", num_products)

    def estimator(fun: Callable, has_aux: bool = False) -> ValueAndGrad:
        def value_and_grad(rng_key, params):
            key_direction, key_fun = jax.random.split(rng_key)
            one_fun = keyed(fun, key_fun)
            flat, unravel = ravel_pytree(params)

            def scalar(flat: jax.Array) -> jax.Array:
                out = one_fun(unravel(flat))
                return out[0] if has_aux else out

            if direction is None:
                product = hessian_product(scalar, flat)
                _, vectors = _lanczos(key_direction, product, flat, num_products)
                along = vectors[:, 0]
            else:
                along = jnp.asarray(direction)
            if along.shape != flat.shape:
                raise ValueError(
                    f"direction has the shape {along.shape}, and the parameters are "
                    f"{flat.shape} in the order of jax.flatten_util.ravel_pytree."
                )
            step = rho * jax.lax.stop_gradient(along).astype(flat.dtype)
            grad = 0.5 * (jax.grad(scalar)(flat + step) + jax.grad(scalar)(flat - step))
            return one_fun(params), unravel(grad)

        return value_and_grad

    return estimator


def hessian_product(fun: Callable[[Tree], jax.Array], params: Tree) -> Product:
    """Return the product with the Hessian, as `tracker.track` takes it.

    Args:
        fun: parameters to a scalar.
        params: where the Hessian is taken.

    Returns:
        `vectors -> H @ vectors` for vectors (d, k) or (d,), in the order of `ravel_pytree`. Forward
        over reverse mode: about two gradients a vector, all of them at once.

    Example:
        >>> import jax.numpy as jnp
        >>> product = hessian_product(lambda w: jnp.sum(w**3), jnp.array([1.0, 2.0]))
        >>> product(jnp.eye(2)).tolist()
        [[6.0, 0.0], [0.0, 12.0]]
    """
    flat, unravel = ravel_pytree(params)
    gradient = jax.grad(lambda flat: fun(unravel(flat)))
    return _columns(lambda v: jax.jvp(gradient, (flat,), (v,))[1])


def gauss_newton_product(
    model_fn: Callable[[Tree], Tree],
    loss_fn: Callable[[Tree], jax.Array],
    params: Tree,
) -> Product:
    r"""Return the product with the Gauss-Newton matrix :math:`J^\top (\nabla^2 \ell) J`.

    Positive semi-definite for a loss that is convex in the model's outputs: the Hessian without the
    curvature of the model.

    Args:
        model_fn: parameters to outputs, a pytree.
        loss_fn: outputs to a scalar.
        params: where it is taken.

    Returns:
        As `hessian_product`.

    Example:
        >>> import jax.numpy as jnp
        >>> product = gauss_newton_product(jnp.sin, lambda y: jnp.sum(y**2), jnp.zeros(2))
        >>> product(jnp.eye(2)).tolist()
        [[2.0, 0.0], [0.0, 2.0]]
    """
    flat, unravel = ravel_pytree(params)

    def through(v: jax.Array) -> jax.Array:
        outputs, tangent = jax.jvp(lambda flat: model_fn(unravel(flat)), (flat,), (v,))
        _, cotangent = jax.jvp(jax.grad(loss_fn), (outputs,), (tangent,))
        return jax.vjp(lambda flat: model_fn(unravel(flat)), flat)[1](cotangent)[0]

    return _columns(through)


def leading_eigenpairs(
    rng_key: jax.Array,
    product: Product,
    params: Tree,
    rank: int,
    *,
    num_products: int | None = None,
    num_probes: int = 10,
) -> Spectrum:
    """Return the largest eigenpairs of a matrix of the parameters' size, and estimate its trace.

    By Lanczos' method with full reorthogonalisation, the trace by Hutchinson's estimator with
    random signs; both are matfree's. Eigenvalues are exact when as many products are made as there
    are parameters, and otherwise no larger than the true ones. Where eigenvalues coincide it takes
    twice the products.

    Args:
        rng_key: of the start and the probes.
        product: `hessian_product(fun, params)`, or any symmetric one of vectors (d,).
        params: a pytree of d numbers.
        rank: k.
        num_products: of Lanczos' method; 2 k + 20 if not given, no more than d.
        num_probes: of the trace, a product each. The standard error of `Spectrum.trace` is the
            matrix's off-diagonal norm times sqrt(2 / num_probes).

    Returns:
        A `Spectrum`, with signed values, the largest first.

    Raises:
        ValueError: for a rank above the number of products or of parameters.
        ImportError: where matfree is missing: `pip install probbp[spectra]`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> fun = lambda w: jnp.sum(jnp.array([1.0, 5.0, 2.0]) * w**2)
        >>> found = leading_eigenpairs(
        ...     jax.random.key(0), hessian_product(fun, jnp.zeros(3)), jnp.zeros(3), rank=1)
        >>> found.values.round(3).tolist(), round(float(found.trace), 3)
        ([10.0], 16.0)
    """
    check_rng_key("rng_key", rng_key)
    rank, num_probes = check_count("rank", rank), check_count("num_probes", num_probes)
    _, stochtrace = _matfree()
    flat, _ = ravel_pytree(params)
    asked = 2 * rank + 20 if num_products is None else check_count("num_products", num_products)
    num_products = min(asked, flat.size)
    if rank > num_products:
        raise ValueError(
            f"rank must be between 1 and the {num_products} products that are made for "
            f"{flat.size} parameters; got {rank}."
        )
    key_start, key_trace = jax.random.split(rng_key)
    values, vectors = _lanczos(key_start, product, flat, num_products)
    probes = stochtrace.sampler_signs(flat, num=num_probes)
    trace = stochtrace.estimator_monte_carlo(stochtrace.monte_carlo_trace(), probes)
    return Spectrum(
        vectors[:, :rank], values[:rank], trace(product, key_trace), jnp.ones((), jnp.int32)
    )


def _lanczos(
    rng_key: jax.Array, product: Product, flat: jax.Array, num_products: int
) -> tuple[jax.Array, jax.Array]:
    """Return Ritz values (n,), the largest first, and vectors (d, n)."""
    decomp, _ = _matfree()
    key_first, key_fresh = jax.random.split(rng_key)
    num_products = min(num_products, flat.size)
    first = jax.random.normal(key_first, flat.shape, flat.dtype)
    rows, tridiagonal, *_ = decomp.tridiag_sym(num_products)(product, first)

    # Where eigenvalues coincide the Krylov space ends early. The rows after its end are rounding
    # errors blown up, and the tridiagonal matrix is then no projection: complete the basis, and
    # project anew.
    def projected() -> tuple[jax.Array, jax.Array]:
        fresh = jax.random.normal(key_fresh, rows.shape, rows.dtype)
        whole = jnp.all(jnp.isfinite(rows), axis=1, keepdims=True)
        frame = jnp.linalg.qr(jnp.where(whole, rows, fresh).T)[0]
        small = frame.T @ _columns(product)(frame)
        return frame, 0.5 * (small + small.T)

    defect = jnp.max(jnp.abs(rows @ rows.T - jnp.eye(num_products)))
    is_frame = defect < jnp.finfo(flat.dtype).eps ** 0.5  # not so where it is NaN
    frame, small = jax.lax.cond(is_frame, lambda: (rows.T, tridiagonal), projected)
    values, turn = jnp.linalg.eigh(small)
    return values[::-1], frame @ turn[:, ::-1]


def _columns(product: Product) -> Product:
    def of(vectors: jax.Array) -> jax.Array:
        return product(vectors) if vectors.ndim == 1 else jax.vmap(product, 1, 1)(vectors)

    return of


def _matfree() -> tuple[Any, Any]:
    try:
        from matfree import decomp, stochtrace
    except ImportError as error:
        raise ImportError(
            "Eigenpairs of a Hessian are matfree's work: pip install 'probbp[spectra]'."
        ) from error
    return decomp, stochtrace
