r"""Steps that stay on the orthogonal matrices: of eigenbases, and of orthogonal weights.

The Lie-algebra extension of dynamic spectral backpropagation (Muthuraman, 2025, arXiv:2505.23369);
the formulas are known ones of numerical linear algebra, or derived here. A skew-symmetric
:math:`\Omega` is a velocity of rotation, and its exponential or its Cayley transform a rotation.
Multiplied by one, a matrix keeps its singular values, its determinant's size, and, where its
columns are orthonormal, that they are.

A QR decomposition tracks a subspace for less. The steps here are for what it does not give: bases
whose columns neither swap nor flip from step to step, and weights that an optimiser keeps
orthogonal with its momentum on the Lie algebra. `geodesics` samples with the same rotations.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from probbp.checks import check_number


def skew(a: jax.Array) -> jax.Array:
    r"""Return :math:`(A - A^\top) / 2`, the part that rotates.

    Args:
        a: square matrices (..., n, n).

    Example:
        >>> import jax.numpy as jnp
        >>> skew(jnp.array([[1.0, 3.0], [1.0, 1.0]])).tolist()
        [[0.0, 1.0], [-1.0, 0.0]]
    """
    return (a - jnp.swapaxes(a, -1, -2)) / 2


def cayley(omega: jax.Array) -> jax.Array:
    r"""Return the rotation :math:`(I - \Omega / 2)^{-1} (I + \Omega / 2)`.

    Orthogonal up to rounding for every skew-symmetric :math:`\Omega`, however long, and its inverse
    is that of :math:`-\Omega`. It agrees with the exponential to second order, an angle
    :math:`\theta` becoming :math:`2 \arctan(\theta / 2)`: it never turns by a half turn. One solve,
    about 8 n^3 / 3 operations, where `jax.scipy.linalg.expm` takes several products and a solve.
    Both AD modes.

    Args:
        omega: (..., n, n), skew-symmetric.

    Example:
        >>> import jax.numpy as jnp
        >>> cayley(jnp.array([[0.0, 2.0], [-2.0, 0.0]])).round(6).tolist()
        [[0.0, 1.0], [-1.0, 0.0]]
    """
    half = omega / 2
    identity = jnp.eye(omega.shape[-1], dtype=omega.dtype)
    return jnp.linalg.solve(identity - half, identity + half)


def low_rank_cayley(a: jax.Array, b: jax.Array, x: jax.Array) -> jax.Array:
    r"""Return the Cayley transform of :math:`A B^\top - B A^\top` times x, by Woodbury's identity.

    With U = [A, B] and V = [B, -A] it is
    :math:`x + U (I - V^\top U / 2)^{-1} V^\top x`: O(n r (r + k)) operations, and no n x n matrix.
    The columns of x stay orthonormal up to rounding (Wen & Yin, 2013). Both AD modes.

    Args:
        a: (n, r).
        b: (n, r).
        x: (n, k).

    Example:
        >>> import jax.numpy as jnp
        >>> x, other = jnp.array([[1.0], [0.0], [0.0]]), jnp.array([[0.0], [2.0], [0.0]])
        >>> low_rank_cayley(other, x, x).round(6).tolist()  # turned towards the other
        [[0.0], [1.0], [0.0]]
    """
    u, v = jnp.concatenate([a, b], -1), jnp.concatenate([b, -a], -1)
    small = jnp.eye(u.shape[-1], dtype=u.dtype) - v.T @ u / 2
    return x + u @ jnp.linalg.solve(small, v.T @ x)


def jacobi_step(basis: jax.Array, matrix: jax.Array) -> jax.Array:
    r"""Turn a basis towards the eigenvectors of a symmetric matrix that has changed a little.

    With :math:`B = Q^\top M Q`, perturbation theory turns the columns i and j by
    :math:`B_{ij} / (B_{jj} - B_{ii})`, which has no bound where eigenvalues meet. The angle that
    makes one such pair diagonal,

    .. math:: \Omega_{ij} = \tfrac12 \arctan \frac{2 B_{ij}}{B_{jj} - B_{ii}},

    agrees with it where it is small and never exceeds an eighth of a turn, so that no gap needs a
    threshold. All pairs turn at once, by the Cayley transform; a lone pair is solved in one step.
    Near the eigenbasis the distance to it is squared in each step; far from it nothing is promised,
    and `brockett_step` is safe. Columns keep their order and their sign: they follow their
    eigenvectors where eigenvalues change places.

    Args:
        basis: Q, (n, n), orthogonal.
        matrix: M, (n, n), symmetric.

    Returns:
        The new basis; about 7 n^3 operations.

    Example:
        >>> import jax.numpy as jnp
        >>> matrix, basis = jnp.array([[1.0, 0.1], [0.1, 2.0]]), jnp.eye(2)
        >>> basis = jacobi_step(basis, matrix)
        >>> [[round(abs(float(x)), 4) for x in row] for row in basis.T @ matrix @ basis]
        [[0.9901, 0.0], [0.0, 2.0099]]
    """
    rotated = basis.T @ matrix @ basis
    values = jnp.diagonal(rotated)
    gap = values - values[:, None]
    sign = jnp.where(gap < 0, -1.0, 1.0)
    # Equal values that are uncoupled are left alone, without the 0 / 0 in the derivative.
    size = jnp.where((gap == 0) & (rotated == 0), 1.0, jnp.abs(gap))
    angle = jnp.triu(jnp.arctan2(2 * rotated * sign, size) / 2, 1)
    omega = 2 * jnp.tan((angle - angle.T) / 2)  # the Cayley transform turns by 2 arctan(omega / 2)
    return basis @ cayley(omega.astype(basis.dtype))


def brockett_step(basis: jax.Array, matrix: jax.Array, step_size: float) -> jax.Array:
    r"""Turn a basis towards the leading eigenvectors, sorted, from wherever it is.

    A step of the flow :math:`\dot Q = M Q N - Q N Q^\top M Q` with N = diag(k, ..., 1) / k, whose
    generator :math:`[M, Q N Q^\top]` has rank 2k (Brockett, 1991; Oja's flow with weights). It
    climbs :math:`\mathrm{tr}(Q^\top M Q N)`; for distinct eigenvalues its one stable rest is the
    basis of the leading k eigenvectors in falling order, up to signs. No gap is divided by.

    Args:
        basis: Q, (n, k), with orthonormal columns.
        matrix: M, (n, n), symmetric, of any sign.
        step_size: below 1 / (largest - smallest eigenvalue) it climbs.

    Returns:
        The new basis; 2 n^2 k operations for the product and O(n k^2) for the step.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> matrix = jnp.diag(jnp.array([1.0, 3.0, 2.0]))
        >>> start = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (3, 2)))[0]
        >>> step = lambda _, basis: brockett_step(basis, matrix, 0.5)
        >>> abs(jax.lax.fori_loop(0, 100, step, start)).round(3).tolist()
        [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    """
    check_number("step_size", step_size, "(0, inf)")
    rank = basis.shape[1]
    weights = jnp.arange(rank, 0, -1, dtype=basis.dtype) / rank
    return low_rank_cayley(step_size * (matrix @ basis) * weights, basis, basis)


def on_lie_algebra(
    optimizer: optax.GradientTransformation,
    retraction: Callable[[jax.Array], jax.Array] = cayley,
) -> optax.GradientTransformationExtraArgs:
    r"""Return the optimiser for weights that only rotate: :math:`W \leftarrow e^{\Omega} W`.

    The gradient G of a weight becomes that of its rotation, :math:`(G W^\top - W G^\top) / 2`. The
    optimiser works on these: its momentum and second moments live on the Lie algebra, which is the
    same at every W, so that none is ever transported or projected. Its update is :math:`\Omega`.
    With `optax.sgd` and a square orthogonal W it is Riemannian gradient descent on the orthogonal
    group, :math:`W \exp(-\eta\, \mathrm{skew}(W^\top G))`.

    Weights that start orthogonal (`jax.nn.initializers.orthogonal`) stay so, all others keep their
    singular values; a determinant keeps its sign. In single precision rounding adds up to what
    `examples/papers/dsbp_rotations.py` prints. A wide matrix turns from the right. The optimiser's
    state and a step cost O(n^2) and O(n^3) for the longer side n.

    Args:
        optimizer: `optax.sgd`, `optax.adam` or any other that needs no parameters. Its learning
            rate is in radians: small whatever the scale of the weights.
        retraction: a rotation from a skew-symmetric matrix: `cayley`, `jax.scipy.linalg.expm`.

    Returns:
        A transformation of gradients of matrices, or stacks of them on leading axes. It needs the
        params; updates are added as everywhere in Optax.

    Raises:
        ValueError: for a leaf that is no matrix, or without params.

    Example:
        Biases and all else go elsewhere:

        >>> import jax.numpy as jnp, optax
        >>> optimiser = optax.partition(
        ...     {"rotate": on_lie_algebra(optax.sgd(0.1, momentum=0.9)), "add": optax.adam(1e-3)},
        ...     {"kernel": "rotate", "bias": "add"},
        ... )
        >>> params = {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}
        >>> grads = {"kernel": jnp.arange(9.0).reshape(3, 3), "bias": jnp.ones(3)}
        >>> updates, _ = optimiser.update(grads, optimiser.init(params), params)
        >>> kernel = optax.apply_updates(params, updates)["kernel"]
        >>> bool(jnp.allclose(kernel.T @ kernel, jnp.eye(3), atol=1e-6))
        True
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params):
        return optimizer.init(jax.tree.map(lambda w: _generator(w, w), params))

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "A rotation's gradient needs the weights: call update(grads, state, params)."
            )
        slopes = jax.tree.map(_generator, updates, params)
        steps, state = optimizer.update(slopes, state, **extra_args)
        return jax.tree.map(move, steps, params), state

    def move(step, w):
        wide = _wide(w)
        return (_rotated(retraction(skew(_wide(step))), wide) - wide).astype(w.dtype)

    return optax.GradientTransformationExtraArgs(init, update)


def _generator(grad, w):
    """Return the gradient with respect to the rotation of the longer side, (..., n, n)."""
    if jnp.ndim(w) < 2:
        raise ValueError(
            f"A leaf of shape {jnp.shape(w)} is no matrix and cannot rotate. Give it another "
            "optimiser by optax.partition."
        )
    grad, w = _wide(grad), _wide(w)
    if w.shape[-2] < w.shape[-1]:
        return skew(jnp.swapaxes(w, -1, -2) @ grad)
    return skew(grad @ jnp.swapaxes(w, -1, -2))


def _wide(x):
    """Cast half precision to single: linear equations are not solved in it, nor squares kept."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def _rotated(rotation, w):
    return w @ rotation if w.shape[-2] < w.shape[-1] else rotation @ w
