"""Direct feedback alignment: the output's error is sent to every layer at once."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from probbp.checks import check_rng_key
from probbp.ops.substitute import substitute

Layer = Callable[[jax.Array], jax.Array]


def direct(
    loss: Callable[[jax.Array], jax.Array],
    layers: Sequence[Layer],
    x: jax.Array,
    feedback: Sequence[jax.Array],
) -> jax.Array:
    r"""Return `loss(layers(x))`, differentiated by direct feedback alignment.

    With the output's error :math:`e = \partial L / \partial \mathrm{outputs}`, a hidden layer of
    output :math:`h_l` learns as if its own loss were

    .. math:: \langle h_l, e B_l \rangle,

    its input and e held fixed, and the last layer learns by its exact gradient. No layer waits for
    the backward pass of another, and what lies between two layers need not be differentiable.

    Exact: the value, the gradient of the last layer, and that of all else the loss closes over,
    such as a prior. Not exact: that of hidden layers. `x` gets no gradient. The limit is one hidden
    layer whose B is the last kernel, transposed.

    Args:
        loss: outputs (..., k) to a scalar, such as a cross entropy of a batch.
        layers: functions of the signal alone, from the first to the last, with their parameters in
            them: partials, closures, or Flax's NNX modules. A layer holds its parameters and what
            comes after them up to the next layer, the activation included.
        x: the first layer's input.
        feedback: B, one for each layer but the last, `(k, *features)` where the layer's output is
            `(..., *features)` and has the leading axes of e. `direct_weights` draws them.

    Returns:
        The loss. Both AD modes, `jit`. First derivatives only. On one device a step costs about
        what backpropagation's does, with up to half as much memory again
        (`tests/benchmarks/feedback.py`): what the layers' independence is good for is running
        side by side.

    Raises:
        ValueError: where the shapes do not fit.
        TypeError: where a second derivative is taken.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def network(params):
        ...     return [lambda x: jnp.tanh(x @ params[0]), lambda h: h @ params[1]]
        >>> params, x = [jnp.ones((3, 4)), jnp.ones((4, 2))], jnp.ones((5, 3))
        >>> weights = direct_weights(jax.random.key(0), network(params), x)
        >>> def loss(params):
        ...     return direct(lambda y: jnp.sum(y**2), network(params), x, weights)
        >>> [grad.shape for grad in jax.grad(loss)(params)]
        [(3, 4), (4, 2)]

    Reference:
        Nokland, 2016, arXiv:1609.01596.
    """
    *hidden, last = layers
    if len(feedback) != len(hidden):
        raise ValueError(
            f"{len(layers)} layers take {len(hidden)} feedback weights, one for each but the last; "
            f"got {len(feedback)}."
        )
    signal, outputs = _cut(x), []
    for layer in hidden:
        outputs.append(layer(signal))
        signal = _cut(outputs[-1])
    logits = last(signal)
    value = loss(logits)
    error = jax.grad(loss)(jax.lax.stop_gradient(logits))
    lessons = [
        jnp.sum(h * _cut(_sent(i, error, b, h)))
        for i, (h, b) in enumerate(zip(outputs, feedback, strict=True))
    ]
    return substitute(value, sum(lessons, value))


def direct_weights(rng_key: jax.Array, layers: Sequence[Layer], x: jax.Array) -> list[jax.Array]:
    """Draw the feedback weights of `direct`.

    Those of a layer with n outputs an example are N(0, 1 / n), the scale of the kernel that would
    carry the error there if this were the last hidden layer.

    Args:
        rng_key: a key.
        layers: as in `direct`.
        x: the first layer's input, (batch, ...), or its `jax.ShapeDtypeStruct`.

    Returns:
        `(k, *features)` for each layer but the last.
    """
    check_rng_key("rng_key", rng_key)
    shapes = []
    for layer in layers:
        x = jax.eval_shape(layer, x)
        shapes.append(x)
    *hidden, outputs = shapes
    keys = jax.random.split(rng_key, max(len(hidden), 1))
    leading = outputs.ndim - 1

    def draw(key, h):
        features = h.shape[leading:]
        scale = math.prod(features) ** -0.5
        return scale * jax.random.normal(key, (outputs.shape[-1], *features), h.dtype)

    return [draw(key, h) for key, h in zip(keys, hidden, strict=False)]


def _sent(layer, error, b, h):
    if b.shape[:1] != error.shape[-1:] or (*error.shape[:-1], *b.shape[1:]) != h.shape:
        raise ValueError(
            f"feedback[{layer}] has shape {b.shape}, where the outputs' error is {error.shape} and "
            f"the layer's output {h.shape}. It must be (outputs, *features), the features being "
            "what follows the axes that both have in common."
        )
    return jnp.tensordot(error, b.astype(error.dtype), axes=1).astype(h.dtype)


@jax.custom_jvp
def _cut(x):
    """The identity without a derivative, and with none to be taken of what it has."""
    return x


@_cut.defjvp
def _cut_jvp(primals, tangents):
    # A first derivative sees zero. A second one differentiates the first's values: they come from
    # here, and would lack all that was cut.
    return _once(primals[0]), jnp.zeros_like(tangents[0])


@jax.custom_jvp
def _once(x):
    return x


@_once.defjvp
def _once_jvp(primals, tangents):
    raise TypeError(
        "feedback.direct has first derivatives only: it cuts the layers apart, and a second one "
        "would be blind to it. Use feedback.through where second derivatives are taken."
    )
