r"""The stochastic differential equation that preconditioned gradient descent follows, to an order.

The theory of dynamic spectral backpropagation (Muthuraman, 2025, arXiv:2505.23369) as one can
check it; the equations are derived here after Li, Tai & E (2017, arXiv:1511.06251). The descent

.. math:: w' = w - \eta P (\nabla f(w) + \Sigma(w)^{1/2} \xi), \qquad \xi \sim N(0, I),

with P symmetric and constant, follows at the times :math:`t = k \eta`

.. math:: dw = -P \Big[\nabla f + \frac{\eta}{2} (\nabla^2 f) P \nabla f\Big] dt
        + \sqrt{\eta}\, P \Sigma^{1/2} dB,

up to :math:`O(\eta^2)` in the expectation of a smooth function of w, and up to :math:`O(\eta)`
without the second term. That term is the gradient of :math:`\eta \nabla f^\top P \nabla f / 4`: a
projected descent is drawn to where its own gradient is short, which is no penalty on curvature.
Such a penalty comes from the symmetric two-point gradient along the leading eigenvector
:math:`e_1` of the Hessian,

.. math:: \tfrac12 [\nabla f(w + \rho e_1) + \nabla f(w - \rho e_1)]
        = \nabla \Big(f + \frac{\rho^2}{2} \lambda_1\Big) + O(\rho^4), \qquad
    \nabla \lambda_1 = D^3 f[e_1, e_1],

and only as far as P lets it through.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from probbp.checks import check_count, check_number, check_rng_key
from probbp.types import Tree


class Equation(NamedTuple):
    """A stochastic differential equation on a pytree, in Itô's sense.

    Attributes:
        drift: params -> like the params, a unit of time.
        diffusion: `(params, noise) -> like the params`, linear in the noise, which is a standard
            normal tree like the params; a root of a unit of time.
    """

    drift: Callable[[Tree], Tree]
    diffusion: Callable[[Tree, Tree], Tree]


def modified_equation(
    loss_fn: Callable[[Tree], jax.Array],
    step_size: float,
    *,
    project: Callable[[Tree], Tree] = lambda grad: grad,
    noise_root: Callable[[Tree, Tree], Tree] | None = None,
    order: int = 2,
    leading_fn: Callable[[Tree], Tree] | None = None,
    rho: float = 0.0,
) -> Equation:
    r"""Return the equation that a descent follows, at weak order 1 or 2 in the step size.

    With `leading_fn` it is that of a descent by the two-point gradient: the field
    :math:`\nabla f + \frac{\rho^2}{2} D^3 f[e_1, e_1]` takes the place of the gradient, in the
    second term too, and an error of :math:`O(\rho^4)` is added. The noise's covariance needs no
    correction at order 2: what it changes in a step is of third order.

    Args:
        loss_fn: f, of a pytree.
        step_size: eta.
        project: P, linear and symmetric on trees like the params: a projection, any other
            preconditioner, `functools.partial(meta.precondition, ...)`.
        noise_root: `(params, noise) -> like the params`, the root of the gradient noise's
            covariance times a standard normal tree. None is no noise.
        order: 1 or 2.
        leading_fn: params to e_1, like the params, of unit length. At order 2 it is differentiated.
        rho: the two-point gradient's distance.

    Returns:
        The equation. A drift costs a gradient at order 1 and a Hessian-vector product more at
        order 2; the penalty adds third derivatives.

    Raises:
        ValueError: for another order, and for one of `leading_fn` and `rho` without the other.

    Example:
        Gradient descent on a quadratic shrinks w by 0.9 a step of 0.1, thus by 1.0536 a unit of
        time, where the gradient flow has 1:

        >>> import jax.numpy as jnp
        >>> loss_fn = lambda w: w**2 / 2
        >>> for order in (1, 2):
        ...     print(round(float(modified_equation(loss_fn, 0.1, order=order).drift(1.0)), 4))
        -1.0
        -1.05
    """
    check_number("step_size", step_size, "(0, inf)")
    check_number("rho", rho, "[0, inf)")
    order = check_count("order", order, 1, 2)
    if (leading_fn is None) != (rho == 0):
        raise ValueError("The penalty takes both leading_fn and a rho above zero, or neither.")

    def field(params):
        grad = jax.grad(loss_fn)(params)
        if leading_fn is None:
            return grad
        penalty = third_derivative(loss_fn, params, leading_fn(params))
        return jax.tree.map(lambda g, p: g + rho**2 / 2 * p, grad, penalty)

    def drift(params):
        params = jax.tree.map(jnp.asarray, params)
        slope = field(params)
        if order == 2:
            _, turn = jax.jvp(field, (params,), (project(slope),))
            slope = jax.tree.map(lambda g, t: g + step_size / 2 * t, slope, turn)
        return jax.tree.map(jnp.negative, project(slope))

    def diffusion(params, noise):
        if noise_root is None:
            return jax.tree.map(jnp.zeros_like, params)
        projected = project(noise_root(params, noise))
        return jax.tree.map(lambda leaf: step_size**0.5 * leaf, projected)

    return Equation(drift, diffusion)


def third_derivative(loss_fn: Callable[[Tree], jax.Array], params: Tree, direction: Tree) -> Tree:
    r"""Return :math:`D^3 f[e, e] = \nabla (e^\top \nabla^2 f\, e)` at fixed e.

    For the leading eigenvector of the Hessian, where its eigenvalue is simple, it is the gradient
    of that eigenvalue. The work of a few gradients.

    Args:
        loss_fn: f.
        params: where.
        direction: e, like the params.

    Example:
        A valley whose walls are steeper away from y = 0:

        >>> import jax.numpy as jnp
        >>> valley = lambda w: w["x"] ** 2 / 2 * (1 + w["y"] ** 2)
        >>> w, e = {"x": 0.0, "y": 0.5}, {"x": 1.0, "y": 0.0}
        >>> {name: float(leaf) for name, leaf in third_derivative(valley, w, e).items()}
        {'x': 0.0, 'y': 1.0}
    """
    params, direction = jax.tree.map(jnp.asarray, (params, direction))

    def slope(w):
        return jax.jvp(loss_fn, (w,), (direction,))[1]

    return jax.grad(lambda w: jax.jvp(slope, (w,), (direction,))[1])(params)


def simulate(
    rng_key: jax.Array, equation: Equation, params: Tree, time: float, num_steps: int
) -> Tree:
    r"""Return a solution at a time: Heun's rule for the drift, Euler-Maruyama's for the noise.

    .. math:: w^* = w + h b(w) + S(w) \Delta B, \qquad
        w' = w + \frac{h}{2} (b(w) + b(w^*)) + S(w) \Delta B.

    The error is :math:`O(h^2)` without noise and, as the noise of a modified equation is of the
    size :math:`\sqrt\eta`, weakly :math:`O(h^2 + \eta h)` with it: steps of a fraction of eta show
    either order. Any solver of `diffrax` takes the same drift and diffusion.

    Args:
        rng_key: of the Brownian motion.
        equation: drift and diffusion.
        params: where it starts.
        time: where it ends; k steps of gradient descent take k eta.
        num_steps: of the solver.

    Example:
        >>> import jax
        >>> equation = modified_equation(lambda w: w**2 / 2, 0.1, order=2)
        >>> end = simulate(jax.random.key(0), equation, 1.0, time=1.0, num_steps=50)
        >>> round(float(end), 3), round(0.9**10, 3)
        (0.35, 0.349)
    """
    check_rng_key("rng_key", rng_key)
    params = jax.tree.map(jnp.asarray, params)
    check_number("time", time, "[0, inf)")
    num_steps = check_count("num_steps", num_steps)
    h = time / num_steps

    def step(w, key):
        noise = optax.tree.random_like(key, w, sampler=jax.random.normal)
        kick = jax.tree.map(lambda s: h**0.5 * s, equation.diffusion(w, noise))
        slope = equation.drift(w)
        guess = jax.tree.map(lambda w, b, s: w + h * b + s, w, slope, kick)
        end = equation.drift(guess)
        return jax.tree.map(lambda w, b, c, s: w + h / 2 * (b + c) + s, w, slope, end, kick), None

    return jax.lax.scan(step, params, jax.random.split(rng_key, num_steps))[0]
