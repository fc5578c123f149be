"""What every neuron of a network gets and what its error is, from one backward pass."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probbp.ops.dendrites.layer import Layer


class Observation(NamedTuple):
    """What one layer saw.

    Attributes:
        inputs: (examples, ..., m), what each neuron gets; for a convolution the window at every
            position.
        errors: (examples, ..., n), the loss differentiated by z.
    """

    inputs: jax.Array
    errors: jax.Array


def observe(
    loss: Callable[[Layer], Any], layer: Layer, *, has_aux: bool = False
) -> tuple[Any, dict[str, Observation]]:
    r"""Return a loss, and the error :math:`\partial \ell / \partial z` of each layer's neurons.

    Exact, and for each example apart, as long as the loss is a sum over examples that do not meet
    in the network: a probe of zeros is added to every z, and the loss is differentiated by the
    probes. One forward and one backward pass.

    Args:
        loss: `layer -> sum over examples of the loss`: the network with its layers handed in.
        layer: from `grown`.
        has_aux: whether `loss` returns (loss, aux).

    Returns:
        The loss, or (loss, aux), and an `Observation` for each name.

    Raises:
        ValueError: where a name is called twice.

    Example:
        >>> import jax.numpy as jnp
        >>> from probbp.ops.dendrites import grown
        >>> x, y = jnp.array([[1.0], [2.0]]), jnp.array([[0.0], [1.0]])
        >>> def loss(layer):
        ...     return jnp.sum((layer("out", x, jnp.ones((1, 1))) - y) ** 2) / 2
        >>> value, observed = observe(loss, grown({}))
        >>> observed["out"].errors[:, 0].tolist()
        [1.0, 1.0]
    """
    probed, probes = _probed(loss, layer, has_aux)
    (value, (aux, inputs)), errors = jax.value_and_grad(probed, has_aux=True)(probes)
    observed = {name: Observation(inputs[name], errors[name]) for name in inputs}
    return ((value, aux) if has_aux else value), observed


def sensitivities(
    fun: Callable[[Layer], jax.Array], layer: Layer, factor: jax.Array
) -> dict[str, jax.Array]:
    r"""Return roots of the Gauss-Newton curvature of a loss in each layer's z.

    With the network's outputs f (examples, outputs) and the likelihood's curvature
    :math:`-\partial^2 \log p(y \mid f) / \partial f^2 = L L^T`, the neurons' curvature at an
    example is :math:`\sum_a r_a r_a^T` with the rows :math:`r_a = L_{\cdot a}^T\, \partial f /
    \partial z`. One backward pass for each column of L: exact, and dear with many outputs. The
    errors themselves in the place of r, one row, are the empirical Fisher information.

    Args:
        fun: `layer -> f` (examples, outputs).
        layer: from `grown`.
        factor: L (examples, outputs, columns). A Gaussian of scale s has 1 / s, one with logits
            and probabilities p has `diag(sqrt(p)) - p sqrt(p)^T`.

    Returns:
        r (columns, examples, ..., n) of each layer, by name.

    Example:
        >>> import jax.numpy as jnp
        >>> from probbp.ops.dendrites import grown
        >>> def network(layer):
        ...     return layer("out", jnp.ones((5, 3)), jnp.ones((3, 2)))
        >>> factor = jnp.tile(jnp.eye(2) / 0.5, (5, 1, 1))  # a Gaussian of scale 0.5
        >>> sensitivities(network, grown({}), factor)["out"].shape
        (2, 5, 2)
    """
    probed, probes = _probed(fun, layer, False)
    _, transpose = jax.vjp(lambda probes: probed(probes)[0], probes)
    return jax.vmap(lambda column: transpose(column)[0])(jnp.moveaxis(factor, -1, 0))


def _probed(fun, layer, has_aux):
    """Return `fun` of probes that are added to each z, and probes of zeros."""

    def tapped(look):
        seen = {}

        def tap(name, x, kernel, bias=None, *, linear=jnp.matmul, axis=-1):
            if name in seen:
                raise ValueError(
                    f"The layer {name!r} is called twice, and an error belongs to one call. Give "
                    "each call its own name, or fold the calls into one batch."
                )
            z = layer(name, x, kernel, bias, linear=linear, axis=axis)
            seen[name], z = look(name, x, kernel, linear, axis, z)
            return z

        out = fun(tap)
        value, aux = out if has_aux else (out, None)
        return value, (aux, seen)

    def probed(probes):
        def look(name, x, kernel, linear, axis, z):
            # The probe has its neurons last, as the observation has.
            return _windows(x, kernel, linear, axis), z + jnp.moveaxis(probes[name], -1, axis)

        return tapped(look)

    def look_at_shapes(name, x, kernel, linear, axis, z):
        return jnp.moveaxis(jnp.zeros_like(z), axis, -1), z

    probes = jax.eval_shape(lambda: tapped(look_at_shapes))[1][1]
    return probed, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), probes)


def _windows(x, kernel, linear, axis):
    """Return what a neuron's kernel is multiplied with: any linear map shows it to unit kernels."""
    if linear is jnp.matmul:
        return x
    size = math.prod(kernel.shape[:-1])
    units = jnp.eye(size, dtype=x.dtype).reshape(size, *kernel.shape[:-1], 1)
    shown = jax.vmap(lambda unit: linear(x, unit))(units)
    return jnp.moveaxis(jnp.squeeze(shown, axis % (shown.ndim - 1) + 1), 0, -1)
