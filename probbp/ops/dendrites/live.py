"""Candidates that learn in the same backward pass as the network they are not connected to."""

import jax
import jax.numpy as jnp

from probbp.ops.dendrites.layer import (
    Activation,
    Candidate,
    Dendrites,
    grow,
    outputs,
)
from probbp.ops.substitute import substitute


def live(
    z: jax.Array,
    x: jax.Array,
    dendrites: Dendrites,
    candidate: Candidate,
    sign: jax.Array,
    *,
    activation: Activation = jnp.tanh,
) -> jax.Array:
    r"""Return z, through which one `jax.grad` also trains a candidate by Cascade-Correlation.

    With the covariance of the candidate's output d and the neuron's error
    :math:`\delta = \partial \ell / \partial z` over the rows of the batch,

    .. math:: C_i = \sum_p (d_{pi} - \bar d_i)(\delta_{pi} - \bar\delta_i), \qquad S_i = |C_i|,

    the gradient that reaches the candidate is that of :math:`-\sum_i \sigma_i C_i`, hence of
    :math:`-\sum_i S_i` where :math:`\sigma` has the sign of C; the one that reaches `sign` is -C,
    from which the next step takes its sign, `-jnp.sign(grad)`. All else, the network's own
    gradient, is as if the candidate were not there. In words of code it is
    `substitute(z, z - sign * (d - mean(d)))` with x cut off: centring d centres the error, because
    d - mean(d) sums to 0. Exact in both AD modes.

    Args:
        z: (..., n), the layer's output with the dendrites that it has.
        x: (..., m), the layer's input, with all the rows that the covariance is over.
        dendrites: of the layer, for the cascade.
        candidate: for each neuron.
        sign: (n,) of +-1.
        activation: phi.

    Returns:
        z, to the bit.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from probbp.ops.dendrites import empty
        >>> x, kernel = jnp.array([[-1.0], [0.0], [2.0]]), jnp.ones((1, 1))
        >>> candidate = Candidate(jnp.ones((1, 1)), jnp.zeros(1), jnp.zeros((0, 1)))
        >>> def loss(sign):
        ...     z = live(x @ kernel, x, empty(kernel), candidate, sign)
        ...     return jnp.sum(z**2) / 2
        >>> error = x[:, 0]
        >>> d = jnp.tanh(x[:, 0])
        >>> float(-jax.grad(loss)(jnp.ones(1))[0] - jnp.sum((d - d.mean()) * error)) < 1e-6
        True

    Reference:
        Fahlman & Lebiere, 1989; Brenner & Itti, 2025, arXiv:2501.18018, for one covariance a
        neuron.
    """
    constant = jax.lax.stop_gradient(dendrites)
    d = outputs(jax.lax.stop_gradient(x), grow(constant, candidate), activation=activation)[-1]
    centred = d - d.mean(axis=tuple(range(d.ndim - 1)))
    return substitute(z, (z - sign * centred).astype(z.dtype))
