"""Truncation: the certificate is the error measured, and no kernel of the rank has less."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cheap import compiled, key_of
from sklearn.datasets import load_digits

from probbp.optim.dsbp.truncation import (
    SecondMoment,
    end_to_end_bound,
    error_on,
    patches,
    second_moment,
    truncate,
)

SCALES = 3.0 ** -np.arange(12)


shortened = compiled(truncate, static_argnames="rank")
moment_of = compiled(second_moment)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def inputs(key, n, size):
    """Return correlated inputs with a mean, of a falling spectrum."""
    mix = normal(100 + key, size, size)
    return normal(key, n, size) * SCALES[:size] @ mix + 0.3


def dead(x):
    x = x.copy()
    x[:, ::2] = 0
    return x


# name -> inputs (n, in) and kernel (in, out)
LAYERS = {
    "tall": (inputs(0, 200, 12), normal(1, 12, 5)),
    "wide": (inputs(0, 200, 5), normal(1, 5, 12)),
    "dead inputs": (dead(inputs(0, 200, 12)), normal(1, 12, 8)),
    "fewer examples than inputs": (inputs(2, 6, 12), normal(1, 12, 8)),
}
every_layer = pytest.mark.parametrize(("x", "kernel"), LAYERS.values(), ids=LAYERS)


def measured(x, kernel, other):
    return np.mean(np.sum((x @ kernel - x @ np.asarray(other)) ** 2, axis=-1))


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, "float64") for name in LAYERS] + [("dead inputs", "float32")]
)
def test_the_certificate_is_what_is_measured_and_the_best_there_is(name, dtype):
    x, kernel = (a.astype(dtype) for a in LAYERS[name])
    # The outputs themselves, without a second moment: no matrix of rank r is nearer to them.
    best = np.append(np.cumsum(np.linalg.svd(x @ kernel)[1][::-1] ** 2)[::-1], 0) / len(x)
    best = np.append(best, np.zeros(len(kernel)))
    # Twice the rounding of each, as shares of all that is squared and of their square roots.
    atol = 50 * np.finfo(dtype).eps * np.sum(np.abs(x) ** 2) * np.sum(kernel**2) / len(x)
    moment = moment_of(x)
    for rank in (0, 2, min(kernel.shape)):
        low = jax.tree.map(np.asarray, shortened(kernel, moment, rank=rank))
        assert low.left.dtype == low.error.dtype == dtype
        assert low.left.shape == (len(kernel), rank)
        np.testing.assert_allclose(low.right @ low.right.T, np.eye(rank), atol=100 * atol)
        error = measured(x, kernel, low.left @ low.right)
        np.testing.assert_allclose(low.error, error, rtol=1e-4, atol=atol)
        np.testing.assert_allclose(low.error, best[rank], rtol=1e-4, atol=atol)
        np.testing.assert_allclose(low.error, np.sum(low.spectrum[rank:]), rtol=1e-4, atol=atol)
    np.testing.assert_allclose(np.sum(low.spectrum), best[0], rtol=1e-5)
    assert measured(x, kernel, low.left @ low.right) < atol  # at full rank


@every_layer
def test_plain_truncation_is_never_better_and_other_kernels_are_not(x, kernel):
    u, s, vt = np.linalg.svd(kernel, full_matrices=False)
    low = jax.tree.map(np.asarray, shortened(kernel, moment_of(x), rank=2))
    plain = u[:, :2] * s[:2] @ vt[:2]
    assert low.error < measured(x, kernel, plain)
    for seed in range(20, 40):  # near the optimum
        left = low.left + 1e-2 * normal(seed, *low.left.shape)
        right = low.right + 1e-2 * normal(40 + seed, *low.right.shape)
        assert low.error < measured(x, kernel, left @ right)


@every_layer
def test_a_bias_can_take_the_mean_s_error_away(x, kernel):
    mean = x.mean(0)
    low = shortened(kernel, moment_of(x - mean), rank=2)
    low_kernel = np.asarray(low.left) @ np.asarray(low.right)
    with_bias = x @ low_kernel + mean @ (kernel - low_kernel)
    error = np.mean(np.sum((x @ kernel - with_bias) ** 2, axis=-1))
    y = x @ kernel
    best = np.sum(np.linalg.svd(y - y.mean(0))[1][2:] ** 2) / len(x)
    np.testing.assert_allclose(low.error, error, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(low.error, best, rtol=1e-9, atol=1e-12)
    assert error <= shortened(kernel, moment_of(x), rank=2).error + 1e-12


def test_a_tolerance_gives_the_least_rank_that_keeps_it():
    x, kernel = LAYERS["tall"]
    moment = second_moment(x)
    assert truncate(kernel, moment, tolerance=0.0).right.shape[0] == 5
    assert truncate(kernel, moment, tolerance=1.0).right.shape[0] == 0
    for tolerance in (0.1, 1e-3):
        low = truncate(kernel, moment, tolerance=tolerance)
        rank, total = len(low.right), np.sum(low.spectrum)
        assert low.error <= tolerance * total < shortened(kernel, moment, rank=rank - 1).error


CONVOLUTIONS = {
    "two axes": ((4, 7, 6, 3), (3, 2), (2, 1), "SAME", None),
    "valid, dilated": ((4, 9, 8, 2), (2, 3), None, "VALID", (2, 2)),
    "padded": ((4, 7, 5, 2), (3, 3), None, [(1, 2), (0, 1)], None),
    "one axis": ((4, 9, 3), (4,), (2,), "SAME", None),
    "three axes": ((2, 4, 4, 3, 2), (2, 2, 2), None, "VALID", None),
}


@pytest.mark.parametrize(
    ("shape", "size", "strides", "padding", "dilation"), CONVOLUTIONS.values(), ids=CONVOLUTIONS
)
def test_a_convolution_is_a_product_with_patches(shape, size, strides, padding, dilation):
    images = normal(4, *shape)
    kernel = normal(5, *size, shape[-1], 6)
    letters = "DHW"[-len(size) :]

    @compiled
    def convolve(kernel):
        return jax.lax.conv_general_dilated(
            images,
            kernel,
            strides or (1,) * len(size),
            padding,
            rhs_dilation=dilation,
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        )

    options = {"window_strides": strides, "padding": padding, "rhs_dilation": dilation}

    @compiled
    def everything(images, kernel):
        rows = patches(images, size, **options)
        moment = second_moment(rows)
        low = truncate(kernel, moment, rank=2)
        return rows, low, error_on(kernel, low.left @ low.right, moment)

    rows, low, again = everything(images, kernel)
    y = np.asarray(convolve(kernel))
    np.testing.assert_allclose(np.asarray(rows) @ kernel.reshape(-1, 6), y, atol=1e-12)
    difference = y - np.asarray(convolve(low.left)) @ np.asarray(low.right)
    np.testing.assert_allclose(low.error, np.mean(np.sum(difference**2, -1)), rtol=1e-9)
    np.testing.assert_allclose(again, low.error, rtol=1e-9)


def test_it_maps_over_batches_pytrees_and_stacks_and_compiles():
    (x, kernel), (z, other) = LAYERS["tall"], LAYERS["dead inputs"]
    whole = second_moment(x)
    parts = second_moment(x[150:], second_moment(x[:150].reshape(3, 50, 12)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), parts, whole)

    moments = {"a": whole, "b": second_moment(z)}
    tree = jax.tree.map(partial(truncate, rank=2), {"a": kernel, "b": other}, moments)
    low = shortened(other, moments["b"], rank=2)
    np.testing.assert_allclose(tree["b"].error, low.error, rtol=1e-9)

    kernels = np.stack([other, 2 * other])
    moments = SecondMoment(jnp.stack([whole.total, moments["b"].total]), np.array([200, 200]))
    stacked = compiled(jax.vmap(partial(truncate, rank=2)))(kernels, moments)
    np.testing.assert_allclose(stacked.error[1], 4 * tree["b"].error, rtol=1e-9)
    assert stacked.pays
    # 12 inputs and 8 outputs: 20 r < 96 up to a rank of 4.
    assert [shortened(other, whole, rank=r).pays for r in (0, 4, 5)] == [True, True, False]
    images = np.ones((2, 5, 5, 3))
    low = shortened(normal(5, 3, 3, 3, 8), second_moment(patches(images, (3, 3))), rank=6)
    assert low.pays  # 6 (27 + 8) = 210 < 216


def network(layers, x, act):
    for i, (kernel, bias) in enumerate(layers):
        x = x @ kernel + bias
        x = act(x) if i < len(layers) - 1 else x
    return x


def relu(x):
    return np.maximum(x, 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(("act", "lipschitz"), [(relu, 1.0), (np.tanh, 1.0), (sigmoid, 0.25)])
def test_the_bound_holds_at_the_end(act, lipschitz):
    sizes = [12, 10, 9, 4]
    layers = [(normal(i, *s), normal(10 + i, s[1])) for i, s in enumerate(pairwise(sizes))]
    x = inputs(6, 300, 12)
    hidden, lows, errors = x, [], []
    held_out = hidden_out = inputs(7, 100, 12)
    for kernel, bias in layers:
        lows.append(jax.tree.map(np.asarray, shortened(kernel, moment_of(hidden), rank=3)))
        low = lows[-1].left @ lows[-1].right
        errors.append(measured(hidden_out, kernel, low))
        hidden, hidden_out = act(hidden @ kernel + bias), act(hidden_out @ kernel + bias)
    small = [(low.left @ low.right, bias) for low, (_, bias) in zip(lows, layers, strict=True)]
    for data, given in ((x, None), (held_out, errors)):
        difference = network(small, data, act) - network(layers, data, act)
        rms = np.sqrt(np.mean(np.sum(difference**2, -1)))
        bound = end_to_end_bound(lows, lipschitz=lipschitz, errors=given)
        assert 0 < rms <= bound
    np.testing.assert_allclose(end_to_end_bound(lows[:1]), np.sqrt(lows[0].error), rtol=1e-12)
    # Two linear layers of one unit: the bound is what it says, and attained.
    one = truncate(np.eye(2), second_moment(np.eye(2)), rank=1)
    scaled = truncate(3 * np.eye(2), second_moment(np.eye(2)), rank=1)
    expected = 0.25 * 3 * jnp.sqrt(one.error) + jnp.sqrt(scaled.error)
    np.testing.assert_allclose(end_to_end_bound([one, scaled], lipschitz=0.25), expected)


@pytest.mark.slow
def test_on_digits_it_loses_less_than_plain_truncation_out_of_sample():
    data = load_digits()
    x, y = data.data / 16, jax.nn.one_hot(data.target, 10)
    train, test = slice(0, 1_000), slice(1_000, None)

    def logits(params, x):
        return jnp.tanh(x @ params["kernel"] + params["bias"]) @ params["head"]

    @compiled
    def fit(key):
        keys = jax.random.split(key)
        params = {
            "kernel": jax.random.normal(keys[0], (64, 48)) / 8,
            "bias": jnp.zeros(48),
            "head": jax.random.normal(keys[1], (48, 10)) / 7,
        }
        optimiser = optax.adam(1e-2)

        def step(carry, _):
            params, state = carry
            loss = lambda p: optax.softmax_cross_entropy(logits(p, x[train]), y[train]).mean()
            updates, state = optimiser.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimiser.init(params)), length=80)[0][0]

    gains = []
    for key in jax.random.split(key_of(0), 3):
        params = fit(key)
        kernel, full = params["kernel"], logits(params, x[test])
        accuracy = jnp.mean(jnp.argmax(full, -1) == data.target[test])
        assert accuracy > 0.85
        moment = second_moment(x[train] - x[train].mean(0))
        u, s, vt = jnp.linalg.svd(kernel, full_matrices=False)
        low = shortened(kernel, moment, rank=8)
        pair = {"ours": low.left @ low.right, "plain": u[:, :8] * s[:8] @ vt[:8]}
        errors = []
        for low_kernel in pair.values():  # the bias takes the mean's error in both
            bias = params["bias"] + x[train].mean(0) @ (kernel - low_kernel)
            small = logits({**params, "kernel": low_kernel, "bias": bias}, x[test])
            errors.append(jnp.mean((small - full) ** 2))
        gains.append(errors[1] / errors[0])
    assert min(gains) > 1


x, kernel = LAYERS["tall"]
REFUSED = {
    "Give a rank or a tolerance": lambda m: truncate(kernel, m),
    "one of them": lambda m: truncate(kernel, m, rank=1, tolerance=0.1),
    "rank must be an integer from 0 to 5": lambda m: truncate(kernel, m, rank=6),
    "tolerance must be between 0 and 1, got 2": lambda m: truncate(kernel, m, tolerance=2),
    "transpose": lambda m: truncate(kernel.T, m, rank=1),
    "Biases stay": lambda m: truncate(kernel[0], m, rank=1),
    "one SecondMoment for each layer": lambda m: second_moment(x[:, :3], m),
    r"takes 4: \(batch": lambda m: patches(x, (3, 3)),
    "dense layers": lambda m: end_to_end_bound([truncate(normal(0, 3, 4, 5), m, rank=1)]),
}


@pytest.mark.parametrize(("message", "call"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_is_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call(second_moment(x))
