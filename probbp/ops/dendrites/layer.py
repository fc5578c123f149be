r"""A layer whose neurons have dendrites: dense, or any operation that is linear in its kernel."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probbp.checks import check_count

Activation = Callable[[jax.Array], jax.Array]
Linear = Callable[[jax.Array, jax.Array], jax.Array]
Layer = Callable[..., jax.Array]
"""`layer(name, x, kernel, bias=None, *, linear=jnp.matmul, axis=-1) -> z`, from `grown`."""


class Dendrites(NamedTuple):
    """The dendrites of one layer of n neurons: `slots` of them for each.

    The number of slots is part of the shapes, so that another one is another program. Slots that
    wait with mask 0 keep one program for a whole run, at the price of computing them.

    Attributes:
        kernel: U `(slots, *kernel)`, the layer's kernel with its neurons on the last axis.
        bias: c (slots, n).
        cascade: Gamma (slots, slots, n), what dendrite k hears of dendrite j. Only j < k is read.
        weight: v (slots, n), the neuron's weight of the dendrite.
        mask: (slots, n), 1 where the dendrite is there and 0 where it is not; never differentiated.
    """

    kernel: jax.Array
    bias: jax.Array
    cascade: jax.Array
    weight: jax.Array
    mask: jax.Array


class Candidate(NamedTuple):
    """One dendrite for each of n neurons, not yet connected.

    Attributes:
        kernel: `(*kernel)`.
        bias: (n,).
        cascade: (slots, n), what it hears of the dendrites that are there.
    """

    kernel: jax.Array
    bias: jax.Array
    cascade: jax.Array


def empty(kernel: jax.Array, slots: int = 0) -> Dendrites:
    """Return no dendrites for a layer, with room for some.

    Args:
        kernel: the layer's, (m, n) or `(*window, m, n)`.
        slots: how many masked slots to lay out.

    Raises:
        ValueError: for a kernel with fewer than two axes.

    Example:
        >>> import jax.numpy as jnp
        >>> empty(jnp.ones((3, 2)), slots=4).weight.shape
        (4, 2)
    """
    slots = check_count("slots", slots, 0)
    if jnp.ndim(kernel) < 2:
        raise ValueError(
            f"A layer's kernel has inputs and, last, neurons; got shape {jnp.shape(kernel)}."
        )
    n, dtype = kernel.shape[-1], kernel.dtype
    return Dendrites(
        jnp.zeros((slots, *kernel.shape), dtype),
        jnp.zeros((slots, n), dtype),
        jnp.zeros((slots, slots, n), dtype),
        jnp.zeros((slots, n), dtype),
        jnp.zeros((slots, n), dtype),
    )


def grow(
    dendrites: Dendrites,
    candidate: Candidate,
    mask: jax.Array | None = None,
    weight: jax.Array | None = None,
    *,
    slot: int | None = None,
) -> Dendrites:
    """Return the dendrites with one more for each neuron that the mask names.

    With the weight left at 0 it adds exactly 0. The layer's values do not change, to the bit where
    a waiting slot is filled or the first is appended; beside others an appended slot makes another
    program, in which their sums may round otherwise.

    Args:
        dendrites: of the layer.
        candidate: made for as many slots as `dendrites` has.
        mask: (n,), the neurons that get it; all by default.
        weight: (n,), its weight; 0 by default.
        slot: a waiting slot to fill. By default a slot is appended.

    Raises:
        ValueError: where the shapes are not those of one layer.

    Example:
        >>> import jax.numpy as jnp
        >>> kernel = jnp.ones((3, 2))
        >>> candidate = Candidate(kernel, jnp.zeros(2), jnp.zeros((0, 2)))
        >>> grow(empty(kernel), candidate, mask=jnp.array([1, 0])).mask.tolist()
        [[1.0, 0.0]]
    """
    slots, n = dendrites.bias.shape
    expected = dendrites.kernel.shape[1:], (n,), (slots, n)
    shapes = tuple(leaf.shape for leaf in candidate)
    if shapes != expected:
        raise ValueError(
            f"The candidate has shapes {shapes}, and these dendrites take {expected}. "
            "Its cascade has a row for each slot that is there."
        )
    dtype = dendrites.bias.dtype
    mask = jnp.ones(n, dtype) if mask is None else jnp.asarray(mask, dtype)
    weight = jnp.zeros(n, dtype) if weight is None else jnp.asarray(weight, dtype)
    if slot is None:
        wider = jnp.pad(dendrites.cascade, ((0, 0), (0, 1), (0, 0)))
        row = jnp.pad(candidate.cascade, ((0, 1), (0, 0)))
        new = Dendrites(candidate.kernel, candidate.bias, row, weight, mask)
        old = dendrites._replace(cascade=wider)
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), old, new)
    slot = check_count("slot", slot, -slots, slots - 1, "slot=None makes a new one.")
    new = Dendrites(*candidate, weight, mask)
    return jax.tree.map(lambda a, b: a.at[slot].set(b), dendrites, new)


def num_params(dendrites: Dendrites) -> jax.Array:
    """Return how many numbers the dendrites that are there consist of, cascade and weight included.

    For a dense layer with K of them everywhere it is K (m n + n) + K n + n K (K - 1) / 2.

    Args:
        dendrites: of one layer.

    Example:
        >>> import jax.numpy as jnp
        >>> kernel = jnp.ones((3, 2))
        >>> candidate = Candidate(kernel, jnp.zeros(2), jnp.zeros((0, 2)))
        >>> int(num_params(grow(empty(kernel), candidate)))
        10
    """
    there = (dendrites.mask > 0).astype(jnp.int32)
    per_neuron = dendrites.kernel[0, ..., 0].size if dendrites.kernel.shape[0] else 0
    count = there.sum(0)
    return jnp.sum(count * (per_neuron + 2) + count * (count - 1) // 2)


def outputs(
    x: jax.Array,
    dendrites: Dendrites,
    *,
    activation: Activation = jnp.tanh,
    linear: Linear = jnp.matmul,
    axis: int = -1,
) -> jax.Array:
    """Return d (slots, ..., n), what each dendrite says: 0 where the mask is.

    Args:
        x: what the layer gets, (..., m) for a dense one.
        dendrites: of the layer.
        activation: phi.
        linear: `(x, kernel) -> s`, linear in the kernel; each neuron's column alone makes its s.
        axis: the neurons' axis in s.

    Example:
        >>> import jax.numpy as jnp
        >>> kernel = jnp.ones((3, 2))
        >>> candidate = Candidate(kernel, jnp.zeros(2), jnp.zeros((0, 2)))
        >>> outputs(jnp.ones((5, 3)), grow(empty(kernel), candidate)).shape
        (1, 5, 2)
    """
    slots = dendrites.kernel.shape[0]
    if not slots:
        return jnp.zeros((0, *jax.eval_shape(linear, x, dendrites.kernel[0:1].sum(0)).shape))
    s = jax.vmap(partial(linear, x))(dendrites.kernel)
    along = partial(_along, axis=axis, ndim=s.ndim - 1)
    mask = jax.lax.stop_gradient(dendrites.mask)
    d = []
    for k in range(slots):
        s_k = s[k] + along(dendrites.bias[k])
        for j in range(k):
            s_k = s_k + along(dendrites.cascade[k, j]) * d[j]
        d.append(along(mask[k]) * activation(s_k))
    return jnp.stack(d)


def dense(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    dendrites: Dendrites | None = None,
    *,
    activation: Activation = jnp.tanh,
    freeze: bool = False,
    perforate: bool = False,
    linear: Linear = jnp.matmul,
    axis: int = -1,
) -> jax.Array:
    r"""`x @ kernel + bias`, and what the neurons' dendrites add.

    .. math:: z = W x + b + \sum_k v_k \odot d_k, \qquad
        d_k = \phi\Big(U_k x + c_k + \sum_{j<k} \Gamma_{kj} \odot d_j\Big)

    The value is the same under both switches; they say what is differentiated:

    - `freeze`: U, c and Gamma are constants. W, b and v are not.
    - `perforate`: no error goes through a dendrite to x. The layers below then learn from
      :math:`W^T \delta` alone. That is no gradient of any loss: it may do for training, and as the
      drift of a sampler that has a Metropolis test; it biases a variational fit.

    The paper sets both. With both off, the default, it is a plain JAX function with its gradient;
    without dendrites, or where all are masked, it is the plain layer to the bit, whatever the
    switches. Both AD modes, `jit`, `vmap`. Cost: 1 + slots products in the place of one.

    Args:
        x: (..., m).
        kernel: W (m, n).
        bias: b (n,).
        dendrites: from `empty` and `grow`.
        activation: phi; the authors' own default is `jax.nn.sigmoid`.
        freeze: whether the dendrites' own parameters are constants.
        perforate: whether the way through them to `x` is cut.
        linear: another operation than the product, linear in its kernel, whose last axis is that
            of the neurons. `conv_general_dilated` here is one line with it.
        axis: the neurons' axis in what `linear` returns.

    Returns:
        z (..., n), before the network's own activation.

    Raises:
        ValueError: for dendrites of another layer's shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> kernel = jnp.ones((3, 2))
        >>> candidate = Candidate(jnp.ones((3, 2)), jnp.zeros(2), jnp.zeros((0, 2)))
        >>> branches = grow(empty(kernel), candidate, mask=jnp.array([1, 0]), weight=jnp.ones(2))
        >>> z = dense(jnp.full((1, 3), 0.1), kernel, None, branches)
        >>> [round(float(value), 3) for value in z[0]]
        [0.591, 0.3]

    Reference:
        Brenner & Itti, 2025, arXiv:2501.18018; Fahlman & Lebiere, 1989, for the cascade.
    """
    z = linear(x, kernel)
    along = partial(_along, axis=axis, ndim=z.ndim)
    if bias is not None:
        z = z + along(bias)
    if dendrites is None:
        return z
    if dendrites.kernel.shape[1:] != kernel.shape:
        raise ValueError(
            f"The dendrites have kernels {dendrites.kernel.shape[1:]} and the layer has "
            f"{kernel.shape}. Make them by `empty(kernel)` of this layer."
        )
    if freeze:
        kernels, biases, cascade = jax.lax.stop_gradient(dendrites[:3])
        dendrites = dendrites._replace(kernel=kernels, bias=biases, cascade=cascade)
    if perforate:
        x = jax.lax.stop_gradient(x)
    if dendrites.kernel.shape[0]:
        d = outputs(x, dendrites, activation=activation, linear=linear, axis=axis)
        for d_k, weight in zip(d, dendrites.weight, strict=True):
            z = z + along(weight) * d_k
    return z


def conv_general_dilated(
    x: jax.Array,
    kernel: jax.Array,
    window_strides: Any,
    padding: Any,
    bias: jax.Array | None = None,
    dendrites: Dendrites | None = None,
    *,
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    dimension_numbers: tuple[str, str, str] = ("NHWC", "HWIO", "NHWC"),
    activation: Activation = jnp.tanh,
    freeze: bool = False,
    perforate: bool = False,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` whose channels have dendrites.

    A neuron is a channel: its dendrite is a convolution of its own with one output, and v and Gamma
    are one number a channel. All else as in `dense`, which a window of 1 is.

    Args:
        x: images, as `dimension_numbers` says.
        kernel: with the outputs on the last axis.
        window_strides: as in JAX.
        padding: as in JAX.
        bias: (n,).
        dendrites: from `empty(kernel)` and `grow`.
        lhs_dilation: as in JAX.
        rhs_dilation: as in JAX.
        dimension_numbers: as in JAX; channels last by default.
        activation: phi.
        freeze: as in `dense`.
        perforate: as in `dense`.

    Raises:
        ValueError: where the kernel's outputs are not its last axis.

    Returns:
        As JAX's, and what the channels' dendrites add.

    Example:
        >>> import jax.numpy as jnp
        >>> kernel = jnp.ones((3, 3, 1, 2))
        >>> images = jnp.ones((5, 8, 8, 1))
        >>> conv_general_dilated(images, kernel, (1, 1), "SAME", None, empty(kernel)).shape
        (5, 8, 8, 2)
    """
    if dimension_numbers[1][-1] != "O":
        raise ValueError(
            f"Dendrites want the kernel's outputs last, such as 'HWIO', not "
            f"{dimension_numbers[1]!r}: transpose the kernel."
        )
    linear = partial(
        jax.lax.conv_general_dilated,
        window_strides=window_strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
    )
    return dense(
        x,
        kernel,
        bias,
        dendrites,
        activation=activation,
        freeze=freeze,
        perforate=perforate,
        linear=linear,
        axis=dimension_numbers[2].index("C"),
    )


def grown(
    dendrites: Mapping[str, Dendrites],
    *,
    activation: Activation = jnp.tanh,
    freeze: bool = False,
    perforate: bool = False,
) -> Layer:
    """Return the layer that a network calls by name, with the dendrites of that name.

    A network that is to grow takes its layers as an argument, so that it is written once:

        def network(params, x, layer=grown({})):
            hidden = jnp.tanh(layer("hidden", x, params["w0"], params["b0"]))
            return layer("out", hidden, params["w1"], params["b1"])

    Args:
        dendrites: of each layer, by name; a name that is not there is a plain layer.
        activation: phi.
        freeze: as in `dense`.
        perforate: as in `dense`.

    Returns:
        `layer(name, x, kernel, bias=None, *, linear=jnp.matmul, axis=-1)`, with the last two as in
        `dense`.

    Example:
        >>> import jax.numpy as jnp
        >>> layer = grown({"out": empty(jnp.ones((3, 2)))}, freeze=True, perforate=True)
        >>> layer("out", jnp.ones((5, 3)), jnp.ones((3, 2))).shape
        (5, 2)
    """

    def layer(name, x, kernel, bias=None, *, linear=jnp.matmul, axis=-1):
        return dense(
            x,
            kernel,
            bias,
            dendrites.get(name),
            activation=activation,
            freeze=freeze,
            perforate=perforate,
            linear=linear,
            axis=axis,
        )

    return layer


def _along(vector, *, axis, ndim):
    """Return a vector as the axis of an array of `ndim`, to be broadcast."""
    shape = [1] * ndim
    shape[axis] = -1
    return vector.reshape(shape)
