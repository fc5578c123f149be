"""Feedback weights: the rule and its limits, the theory's closed forms, and its hosts."""

from functools import partial
from typing import Any, NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy.special
from cheap import compiled, fitted, keys_of
from cheap import normal as drawn
from flax import linen, nnx
from numpyro.contrib.module import nnx_module
from numpyro.infer import HMC, MCMC, SVI, Trace_ELBO
from numpyro.infer.util import log_density

import probbp
from probbp.models import bnn
from probbp.models.feedback import (
    Feedback,
    LearntFeedback,
    linen_interceptor,
    linen_weights,
    with_feedback,
)
from probbp.ops import feedback, substitute
from probbp.optim.feedback import alignment_budget, decay_until_aligned, frozen, is_trained

KEYS = keys_of(0, 12)
stop = jax.lax.stop_gradient


def normal(key, *shape):
    return jax.random.normal(key, shape)


class Product(NamedTuple):
    """A bilinear function of JAX's, and ours with feedback weights."""

    exact: Any
    ours: Any
    x: Any
    w: Any


CONV = {
    "window_strides": (2, 1),
    "padding": "SAME",
    "rhs_dilation": (1, 2),
    "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    "feature_group_count": 2,
}
EINSUM, DOT = "btn,nhd->bthd", (((1,), (1,)), ((0,), (0,)))
PRODUCTS = {
    "dense": Product(jnp.matmul, feedback.dense, drawn(0, 2, 3), drawn(1, 3, 4)),
    "conv": Product(
        partial(jax.lax.conv_general_dilated, **CONV),
        lambda x, w, b: feedback.conv_general_dilated(x, w, feedback=b, **CONV),
        drawn(0, 2, 5, 6, 4),
        drawn(1, 3, 2, 2, 4),
    ),
    "einsum": Product(
        partial(jnp.einsum, EINSUM),
        lambda x, w, b: feedback.einsum(EINSUM, x, w, feedback=b),
        drawn(0, 2, 3, 4),
        drawn(1, 4, 2, 3),
    ),
    "dot_general": Product(
        partial(jax.lax.dot_general, dimension_numbers=DOT),
        lambda x, w, b: feedback.dot_general(x, w, DOT, feedback=b),
        drawn(0, 2, 3),
        drawn(1, 2, 3, 4),
    ),
    "any": Product(
        lambda x, w: jnp.outer(x, w[::-1]) + 1.0,
        partial(feedback.through, lambda x, w: jnp.outer(x, w[::-1]) + 1.0),
        drawn(0, 3),
        drawn(1, 2),
    ),
}
every_product = pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def assert_close(a, b, rtol=1e-10, atol=1e-12):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), a, b)


# ---------------------------------------------------------------------------------------
# The rule.


@every_product
def test_with_the_kernel_for_feedback_it_is_backpropagation_to_any_order(product):
    def of_ours(x, w):
        return product.ours(x, w, w)

    def loss(fun, x, w):
        return jnp.sum(jnp.sin(fun(jnp.tanh(x), w)))

    @partial(compiled, static_argnums=0)
    def everything(fun, x, w, direction):
        grad = jax.grad(partial(loss, fun), (0, 1))
        _, tangent = jax.jvp(partial(loss, fun), (x, w), direction)
        _, second = jax.jvp(grad, (x, w), direction)  # forward over reverse
        slope = lambda x, w: jax.jvp(partial(loss, fun), (x, w), direction)[1]
        return fun(x, w), grad(x, w), tangent, second, jax.grad(slope, (0, 1))(x, w)

    direction = jax.tree.map(jnp.cos, (product.x, product.w))
    args = product.x, product.w, direction
    assert_close(everything(of_ours, *args), everything(product.exact, *args))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float64") for name in PRODUCTS]
    + [("dense", "float32"), ("dense", "bfloat16"), ("conv", "bfloat16")],
)
def test_the_value_and_the_kernel_s_gradient_are_exact_and_the_error_takes_the_other_way(
    name, dtype
):
    product = PRODUCTS[name]
    x, w = (a.astype(dtype) for a in (product.x, product.w))
    b = drawn(2, *w.shape)  # of another dtype, to be cast

    @compiled
    def both(x, w, b):
        y, pull = jax.vjp(product.ours, x, w, b)
        _, pull_x = jax.vjp(lambda x: product.exact(x, b.astype(dtype)), x)
        exact, pull_w = jax.vjp(partial(product.exact, x), w)
        ct = jnp.cos(y)
        ours = y, *pull(ct), jax.jvp(product.ours, (x, w, b), (x, w, b))[1]
        linear = jax.jvp(product.exact, (x, b.astype(dtype)), (x, jnp.zeros_like(w)))[1]
        linear += jax.jvp(product.exact, (x, w), (jnp.zeros_like(x), w))[1]
        return ours, (exact, *pull_x(ct), *pull_w(ct), jnp.zeros_like(b), linear)

    ours, theirs = both(x, w, b)
    assert jax.tree.map(lambda leaf: leaf.dtype, ours) == jax.tree.map(
        lambda leaf: leaf.dtype, theirs
    )
    tolerance = 10 * float(jnp.finfo(dtype).eps)
    assert_close(
        *jax.tree.map(lambda leaf: leaf.astype(float), (ours, theirs)), tolerance, tolerance
    )


def test_it_is_what_substitute_defines_under_every_transformation():
    x, w, b = drawn(0, 5, 3), drawn(1, 3, 3), drawn(2, 3, 3)

    def defined(x, w, b):
        return substitute(x @ w, stop(x) @ w + x @ stop(b))

    def loss(dense, w, x, b):
        def layer(h, _):
            return jnp.tanh(jax.checkpoint(dense)(h, w, b)), None

        return jnp.sum(jax.lax.scan(layer, x, length=3)[0] ** 2)

    def over_rows(dense):
        return jax.jit(jax.vmap(jax.value_and_grad(partial(loss, dense)), (None, 0, None)))

    assert_close(over_rows(feedback.dense)(w, x, b), over_rows(defined)(w, x, b))
    forward = compiled(jax.jacfwd(partial(loss, feedback.dense)))(w, x, b)
    assert_close(forward, compiled(jax.grad(partial(loss, defined)))(w, x, b))


def test_what_the_product_closes_over_keeps_its_gradient():
    x, w, b = drawn(0, 4, 3), drawn(1, 3, 2), drawn(2, 3, 2)

    @partial(compiled, static_argnums=0)
    def grad(layer, scale, mask):
        def loss(scale):
            op = lambda x, w: scale * (x @ jnp.where(mask, w, 0)) + scale**2
            return jnp.sum(jnp.sin(layer(op, x, w)))

        return jax.grad(loss)(scale)

    args = np.array(0.7), w > 0
    exact = grad(lambda op, x, w: op(x, w), *args)
    assert_close(grad(lambda op, x, w: feedback.through(op, x, w, b), *args), exact)
    batched = jax.vmap(partial(grad, lambda op, x, w: feedback.through(op, x, w, b)), (0, None))
    assert_close(batched(np.array([0.7, 0.1]), w > 0)[0], exact)

    class Scaled:  # an object that changes has equal methods before and after
        scale = 1.0

        def product(self, x, w):
            return self.scale * (x @ w)

    scaled = Scaled()
    before = feedback.through(scaled.product, x, w, b)
    scaled.scale = np.array(2.0)
    assert_close(feedback.through(scaled.product, x, w, b), 2 * before)
    # Counts and one-hot rows are signals too, without an error of their own.
    counts = np.arange(12).reshape(4, 3)
    to_w = compiled(jax.grad(lambda w: jnp.sum(feedback.dense(counts, w, b))))(w)
    assert_close(to_w, counts.T @ np.ones((4, 2)))


def test_a_second_derivative_is_that_of_the_rule():
    x, w, b = drawn(0, 3), drawn(1, 3, 2), drawn(2, 3, 2)

    def grad(x, w, b):
        return jax.grad(lambda x, w: jnp.sum(feedback.dense(x, w, b) ** 2) / 2, (0, 1))(x, w)

    def rule(x, w, b):  # dx = B y, dw = x y^T; y itself answers to x through B
        y = substitute(x @ w, stop(x) @ w + x @ b)
        return b @ y, jnp.outer(x, y)

    def second(jacobian, fun, to_b):
        return jax.jit(lambda x, w, b: (jacobian(fun, (0, 1))(x, w, b), jacobian(to_b)(b)))

    theirs = second(jax.jacfwd, rule, lambda b: b @ (x @ w))(x, w, b)
    for jacobian in (jax.jacfwd, jax.jacrev):
        ours = second(jacobian, grad, lambda b: grad(x, w, b)[0])(x, w, b)
        assert_close(ours, theirs)


# ---------------------------------------------------------------------------------------
# The rules.


def test_rules_make_weights_of_the_kernel_s_signs_and_scale():
    kernels = {"a": 3 * drawn(0, 40, 50), "b": drawn(1, 40, 50)}
    random = feedback.normal(KEYS[2], kernels)
    uniform = feedback.uniform_sign(kernels)
    fixed = feedback.fixed_magnitude(kernels, random)
    fresh = [feedback.redrawn(key, kernels) for key in KEYS[3:5]]
    for name, kernel in kernels.items():
        assert_close(np.linalg.norm(uniform[name]), np.linalg.norm(kernel))
        assert np.unique(np.abs(uniform[name])).size == 1
        assert_close(np.abs(fixed[name]), np.abs(random[name]))
        # The variance of 2,000 Gaussians has a relative deviation of sqrt(2 / 2000).
        for given in (random, fresh[0]):
            ratio = np.mean(given[name] ** 2) / np.mean(kernel**2)
            assert abs(ratio - 1) < 4 * (2 / 2_000) ** 0.5
        for signed in (uniform, fixed, *fresh):
            assert np.all(np.sign(signed[name]) == np.sign(kernel))
        assert not np.any(fresh[0][name] == fresh[1][name])
        assert abs(feedback.alignment(random, kernels)[name]) < 4 / 2_000**0.5
    # Layers of one shape have draws of their own, and a scale may be given.
    assert abs(feedback.alignment(random["a"], random["b"])) < 4 / 2_000**0.5
    given = feedback.normal(KEYS[2], np.zeros((40, 50)), scale=0.5)
    assert abs(np.std(given) / 0.5 - 1) < 4 / 4_000**0.5


@pytest.mark.parametrize(
    "optimiser",
    [
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.05, momentum=0.9)),
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.05)),
        optax.adamw(0.05, weight_decay=0.1),
    ],
    ids=["momentum", "sgd", "adamw"],
)
def test_kolen_pollack_weights_come_together_at_the_rate_of_the_decay(optimiser, request):
    x = drawn(0, 20, 3)
    kernels = [drawn(1, 3, 5), drawn(2, 5, 2)]
    params = {"kernels": kernels, "feedback": feedback.normal(KEYS[3], kernels)}

    def loss(params):
        h = x
        for kernel, b in zip(params["kernels"], params["feedback"], strict=True):
            h = feedback.dense(jnp.tanh(h), feedback.kolen_pollack(kernel, b), b)
        return jnp.mean((h - 1) ** 2)

    @compiled
    def step(carry, _):
        params, state = carry
        updates, state = optimiser.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), jax.tree.map(jnp.subtract, params["kernels"], params["feedback"])

    _, gaps = jax.lax.scan(step, (params, optimiser.init(params)), length=60)
    start = jax.tree.map(jnp.subtract, params["kernels"], params["feedback"])
    steps = np.arange(1, 61)
    shrink = (1 - 0.05 * 0.1) ** steps
    if request.node.callspec.id == "momentum":
        # The decay goes through the momentum here, as sgd has it: the same linear recursion.
        def heavy_ball(carry, _):
            gap, trace = carry
            trace = 0.9 * trace + 0.1 * gap
            return (gap - 0.05 * trace, trace), gap - 0.05 * trace

        shrink = jax.lax.scan(heavy_ball, (1.0, 0.0), length=60)[1]
    for gap, first in zip(gaps, start, strict=True):
        assert_close(gap, shrink[:, None, None] * first)


# ---------------------------------------------------------------------------------------
# Direct feedback.


def layers_of(params, between=lambda h: h):
    *hidden, last = params
    return [*(lambda h, w=w: between(jnp.tanh(h @ w)) for w in hidden), lambda h: h @ last]


def cross_entropy(labels, logits):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def explicit(params, x, labels, weights, between=lambda h: h):
    """Return the gradient of direct feedback alignment, layer by layer."""
    signals, *_ = [[x]]
    for w in params[:-1]:
        signals.append(between(jnp.tanh(signals[-1] @ w)))
    logits = signals[-1] @ params[-1]
    error = (jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[-1])) / len(x)
    grads = []
    for w, b, h in zip(params, weights, signals, strict=False):
        grads.append(h.T @ ((error @ b) * (1 - jnp.tanh(h @ w) ** 2)))
    return [*grads, signals[-1].T @ error]


def direct_weights(seed, params, x):
    return compiled(lambda key: feedback.direct_weights(key, layers_of(params), x))(KEYS[seed])


def test_direct_weights_send_a_unit_error_back_at_unit_length():
    """Their entries have the variance 1 / features, whatever follows the axes of the error."""
    layers = [
        lambda x: jnp.ones((*x.shape[:-1], 20, 30)) * x[..., :1, None],
        lambda h: h[..., 0, :5],
    ]
    shape = jax.ShapeDtypeStruct((7, 4), jnp.float32)
    (b,) = compiled(lambda key: feedback.direct_weights(key, layers, shape))(KEYS[0])
    assert b.shape == (5, 20, 30)
    assert abs(np.mean(b**2) * 600 - 1) < 4 * (2 / b.size) ** 0.5
    assert abs(np.mean(b)) * 600**0.5 < 4 / b.size**0.5


def test_direct_feedback_is_the_explicit_rule():
    x, labels = drawn(0, 8, 5), np.arange(8) % 3
    params = [drawn(1, 5, 6), drawn(2, 6, 6), drawn(3, 6, 3)]
    weights = direct_weights(4, params, x)
    assert [b.shape for b in weights] == [(3, 6), (3, 6)]
    assert not np.any(weights[0] == weights[1])

    def loss(params, fun=feedback.direct):
        return fun(partial(cross_entropy, labels), layers_of(params), x, weights)

    @compiled
    def everything(params):
        logits = jnp.tanh(jnp.tanh(x @ params[0]) @ params[1]) @ params[2]
        value, grad = jax.value_and_grad(loss)(params)
        by_hand = cross_entropy(labels, logits), explicit(params, x, labels, weights)
        return (value, grad), jax.jacfwd(loss)(params), by_hand

    ours, forward, by_hand = everything(params)
    assert_close(ours, by_hand, rtol=1e-12)
    assert_close(forward, ours[1], rtol=1e-12)
    for twice in (jax.jacfwd(jax.grad(loss)), jax.jacrev(jax.jacfwd(loss))):
        with pytest.raises(TypeError, match="first derivatives only"):
            jax.eval_shape(twice, params)


def test_direct_feedback_with_the_kernel_above_is_backpropagation_of_two_layers():
    x, labels = drawn(0, 8, 5), np.arange(8) % 3
    params = [drawn(1, 5, 6), drawn(3, 6, 3)]

    def loss(params, weights):
        return feedback.direct(partial(cross_entropy, labels), layers_of(params), x, weights)

    def exact(params):
        return cross_entropy(labels, jnp.tanh(x @ params[0]) @ params[1])

    assert_close(
        compiled(jax.grad(loss))(params, [params[1].T]),
        compiled(jax.grad(exact))(params),
        rtol=1e-12,
    )


def test_layers_of_direct_feedback_do_not_wait_for_each_other():
    """What reverse mode refuses may lie between them: here spikes, by a loop of dynamic length."""

    def between(h):
        halved = jax.lax.while_loop(lambda h: jnp.max(jnp.abs(h)) > 0.5, lambda h: h / 2, stop(h))
        return h + stop(jnp.sign(halved)) * 0.1

    x, labels = drawn(0, 8, 5), np.arange(8) % 3
    params = [drawn(1, 5, 6), drawn(2, 6, 6), drawn(3, 6, 3)]
    weights = direct_weights(4, params, x)

    def spiking(params):
        first, *rest = layers_of(params)
        loop = lambda h: jax.lax.while_loop(lambda h: jnp.max(jnp.abs(h)) > 0.5, lambda h: h / 2, h)
        layers = [first, lambda h: rest[0](loop(h)), rest[1]]
        return feedback.direct(partial(cross_entropy, labels), layers, x, weights)

    grad = compiled(jax.grad(spiking))(params)
    assert all(np.all(np.isfinite(leaf)) for leaf in grad)
    # The first layer hears of the others by the error alone.
    h = np.tanh(x @ params[0])
    while np.max(np.abs(h)) > 0.5:
        h = h / 2
    logits = np.tanh(h @ params[1]) @ params[2]
    error = (scipy.special.softmax(logits, -1) - np.eye(3)[labels]) / len(x)
    first = x.T @ ((error @ weights[0]) * (1 - np.tanh(x @ params[0]) ** 2))
    assert_close(grad[0], first, rtol=1e-12)


def test_direct_feedback_takes_convolutions_and_flax_modules():
    conv = nnx.Conv(1, 3, (3, 3), rngs=nnx.Rngs(0))
    readout = nnx.Linear(3, 4, rngs=nnx.Rngs(1))
    x, y = drawn(0, 2, 5, 5, 1), drawn(1, 2, 4)

    def layers(modules):
        conv, readout = modules
        return [lambda x: nnx.relu(conv(x)), lambda h: readout(h.mean((1, 2)))]

    modules = nnx.List([conv, readout])
    weights = feedback.direct_weights(KEYS[2], layers(modules), x)
    assert [b.shape for b in weights] == [(4, 5, 5, 3)]

    @nnx.jit
    @nnx.grad
    def grad(modules):
        return feedback.direct(lambda out: jnp.sum((out - y) ** 2), layers(modules), x, weights)

    grads = grad(modules)
    error = 2 * (readout(nnx.relu(conv(x)).mean((1, 2))) - y)
    sent = jnp.einsum("bk,khwc->bhwc", error, weights[0]) * (conv(x) > 0)
    assert_close(grads[0]["bias"][...], sent.sum((0, 1, 2)), rtol=1e-5)


# ---------------------------------------------------------------------------------------
# Instruments.


def test_alignment_is_the_cosine_and_zero_has_none():
    a, b = drawn(0, 4, 3), drawn(1, 4, 3)
    rows = feedback.alignment({"w": a}, {"w": b}, axis=-1)["w"]
    cosine = [x @ y / (np.linalg.norm(x) * np.linalg.norm(y)) for x, y in zip(a, b, strict=True)]
    assert_close(rows, np.array(cosine))
    assert_close(feedback.alignment(a, 2 * a), 1.0)
    assert feedback.alignment(a, 0 * a) == 0
    assert np.all(np.isfinite(compiled(jax.grad(lambda a: feedback.alignment(a, b)))(0 * a)))


def test_the_recipe_spends_the_budget_and_no_more():
    rate, decay, width = 0.02, 0.3, 50
    for budget in (0.0, 0.5, 1.0):
        schedule = decay_until_aligned(budget, rate, decay, width)
        spent = alignment_budget(rate, schedule, 5_000, width)
        assert budget <= spent + 1e-12 < budget + rate * decay / width**0.5
        assert schedule(4_999) == 0
    falling = optax.linear_schedule(rate, 0.0, 1_000)
    assert_close(alignment_budget(falling, decay, 1_000, width), 500.5 * rate * decay / width**0.5)


def test_feedback_weights_neither_decay_nor_train():
    params = {"layer": {"kernel": np.ones((2, 2)), "feedback": np.full((2, 2), 3.0)}}
    grads = jax.tree.map(jnp.ones_like, params)
    mask = is_trained(params)
    assert mask == {"layer": {"kernel": True, "feedback": False}}

    def moved(optimiser, grads):
        state = optimiser.init(params)
        return optimiser.update(grads, state, params)[0]["layer"]

    zero = jax.tree.map(lambda g, m: g * m, grads, mask)  # what the op gives
    by_accident = moved(optax.adamw(0.1), zero)
    assert np.all(by_accident["feedback"] != 0)
    masked = moved(optax.adamw(0.1, mask=is_trained), zero)
    assert np.all(masked["feedback"] == 0)
    assert_close(masked["kernel"], by_accident["kernel"])
    for optimiser in (optax.adamw(0.1), optax.noisy_sgd(0.1, key=0), optax.lamb(0.1)):
        kept = frozen(optimiser)
        assert np.all(moved(kept, grads)["feedback"] == 0)
        assert np.all(moved(kept, grads)["kernel"] != 0)
    moments = jax.tree.leaves(frozen(optax.adam(0.1)).init(params))
    assert sum(leaf.size for leaf in moments) == 2 * 4 + 1


# ---------------------------------------------------------------------------------------
# Theory: f(x) = beta^T psi(W x) / sqrt(p), errors sent back through b.


def network(params, b, x, psi):
    hidden = psi(x @ params["w"].T)
    return feedback.dense(hidden, params["beta"][:, None], b[:, None])[:, 0] / b.size**0.5


def descend(key, width, x, y, num_steps, rate, decay=0.0, psi=lambda h: h):
    """Return cos(b, beta) and the error's norm before each step of gradient descent."""
    key_w, key_beta, key_b = jax.random.split(key, 3)
    params = {"w": normal(key_w, width, x.shape[1]), "beta": normal(key_beta, width)}
    b = normal(key_b, width)
    schedule = decay if callable(decay) else lambda step: decay

    def loss(params):
        error = network(params, b, x, psi) - y
        return jnp.sum(error**2) / 2, error

    def step(params, i):
        grad, error = jax.grad(loss, has_aux=True)(params)
        seen = feedback.alignment(params["beta"], b), jnp.linalg.norm(error), error
        grad["beta"] += schedule(i) * params["beta"]
        return jax.tree.map(lambda p, g: p - rate * g, params, grad), seen

    return jax.lax.scan(step, params, jnp.arange(num_steps))[1]


def solved(decay, kappa, gamma=1.0, length=1.0):
    """Return the alignment and the relative error of the closed form, by Cardano's formula."""
    p, q = 3 * (decay + gamma) / gamma**2, 3 * length * kappa / gamma**2
    root = np.sqrt(q**2 / 4 + p**3 / 27)
    q = np.cbrt(q / 2 + root) + np.cbrt(q / 2 - root)
    return (
        np.sqrt(gamma) * q / np.sqrt(1 + gamma * q**2),
        decay / (decay + gamma + gamma**2 * q**2),
    )


def test_with_decay_the_linear_network_aligns_by_the_closed_form():
    width, rate, decay, kappas = 3_000, 0.1, 0.5, (0.125, 0.25, 0.5, 1.0)
    x, y = np.eye(4), np.array([4.0, 0.0, 0.0, 0.0])
    schedule = decay_until_aligned(1.0, rate, decay, width)
    off = round(width**0.5 / (rate * decay))
    assert schedule(off) == decay  # the step in which the budget is reached
    run = compiled(
        partial(descend, width=width, x=x, y=y, num_steps=off + 200, rate=rate, decay=schedule)
    )
    cosine, error, _ = run(KEYS[9])
    for kappa in kappas:
        step = round(kappa * width**0.5 / (rate * decay))
        theory = solved(decay, kappa, length=4.0)
        # beta's own start must have decayed: e^-S sqrt(p) is 0.05 at the first.
        assert abs(cosine[step] - theory[0]) < 0.02
        assert abs(error[step] / 4 - theory[1]) < 0.02
    # Off, the error goes and the alignment stays.
    assert error[-1] < 1e-6
    assert abs(cosine[-1] - solved(decay, 1.0, length=4.0)[0]) < 0.02


@pytest.mark.slow
def test_without_decay_the_linear_network_s_alignment_falls_like_one_over_the_width():
    x = np.eye(4)
    y = 8 * np.array([1.0, 0.0, 0.0, 0.0])
    for width in (300, 3_000):
        run = partial(descend, width=width, x=x, y=y, num_steps=120, rate=0.1)
        cosine, length, error = compiled(jax.vmap(run))(jax.random.split(KEYS[6], 16))
        gain = width * (cosine[:, -1] - cosine[:, 0])
        # e_0^T (X X^T)^-1 e_0 / 2, in steps of finite size.
        predicted = jnp.sum(error[:, 0] ** 2, -1) * (1 - 0.1) / (2 - 0.1)
        deviation = gain - predicted
        standard_error = deviation.std(ddof=1) / 16**0.5
        # The formula is the leading term for e_0^2 / p small: the next is of that relative size.
        assert abs(deviation.mean()) < 4 * standard_error + predicted.mean() * 64 / width
        assert np.all(length[:, -1] < 1e-4 * length[:, 0])


@pytest.mark.parametrize(
    "psi", [jnp.tanh, pytest.param(jax.nn.relu, marks=pytest.mark.slow)], ids=["tanh", "relu"]
)
def test_wide_networks_converge_at_the_rate_of_the_theorem(psi):
    num, dim, width, rate = 8, 20, 2_000, 0.1
    x = drawn(7, num, dim) / dim**0.5
    y = drawn(8, num)
    w = drawn(9, 100_000, dim)
    gram = psi(x @ w.T) @ psi(x @ w.T).T / len(w)
    gamma = jnp.linalg.eigvalsh(gram)[0]
    run = compiled(partial(descend, width=width, x=x, y=y, num_steps=400, rate=rate, psi=psi))
    _, length, _ = run(KEYS[10])
    bound = (1 - rate * gamma / 4) ** np.arange(400) * length[0]
    assert np.all(length <= bound * (1 + 1e-12))


# ---------------------------------------------------------------------------------------
# Hosts.

CHOLESKY = np.linalg.inv(np.linalg.cholesky(np.array([[1.0, 0.8], [0.8, 1.5]]))).T
SENT_BACK = CHOLESKY + np.array([[0.3, -0.5], [0.6, 0.2]])


def wrong_force(x):
    """N(0, [[1, .8], [.8, 1.5]]), whose force is linear, and the gradient of nothing."""
    return -0.5 * jnp.sum(feedback.dense(x, CHOLESKY, SENT_BACK) ** 2)


def blackjax_draws(algorithm, key, num_chains=100, num_steps=500):
    def chain(key):
        key_start, key_init, key_steps = jax.random.split(key, 3)
        start = jnp.linalg.solve(CHOLESKY.T, normal(key_start, 2))  # exact draws: no warm-up
        state = algorithm.init(start, key_init)

        def step(state, key):
            state, info = algorithm.step(key, state)
            return state, (state.position, info.acceptance_rate)

        return jax.lax.scan(step, state, jax.random.split(key_steps, num_steps))[1]

    run = compiled(lambda key: jax.vmap(chain)(jax.random.split(key, num_chains)))
    return run(key)


def assert_moments(draws):
    """Mean and second moments of chains (chains, draws, 2) within their Monte Carlo error."""
    products = np.stack(
        [
            draws[..., 0],
            draws[..., 1],
            draws[..., 0] ** 2,
            draws[..., 0] * draws[..., 1],
            draws[..., 1] ** 2,
        ],
        -1,
    )
    means = products.mean(1)
    z = (means.mean(0) - np.array([0, 0, 1, 0.8, 1.5])) / (means.std(0) / len(means) ** 0.5)
    assert np.all(np.abs(z) < 4), z


def test_the_force_is_no_gradient():
    jacobian = compiled(jax.vmap(jax.grad(wrong_force)))(np.eye(2)).T  # it is linear
    assert_close(jacobian, -SENT_BACK @ CHOLESKY.T)
    assert abs(jacobian[0, 1] - jacobian[1, 0]) > 0.1


ALGORITHMS = {
    "mala": lambda: probbp.mala(wrong_force, step_size=0.3),
    "blackjax.hmc": lambda: blackjax.hmc(
        wrong_force,
        step_size=0.35,
        inverse_mass_matrix=np.ones(2),
        num_integration_steps=5,
    ),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_chains_with_a_wrong_force_have_the_right_moments(name):
    draws, acceptance = blackjax_draws(ALGORITHMS[name](), KEYS[11])
    assert 0.2 < acceptance.mean() < 0.99  # else the test could not tell
    assert_moments(draws)


@pytest.mark.slow
def test_numpyro_s_hmc_with_a_wrong_force_has_the_right_moments():
    mcmc = MCMC(
        HMC(
            potential_fn=lambda x: -wrong_force(x),
            step_size=0.35,
            num_steps=5,
            trajectory_length=None,
            adapt_step_size=False,
            adapt_mass_matrix=False,
        ),
        num_warmup=0,
        num_samples=500,
        num_chains=100,
        chain_method="vectorized",
        progress_bar=False,
    )
    start = jnp.linalg.solve(CHOLESKY.T, drawn(0, 2, 100)).T
    mcmc.run(KEYS[1], init_params=start, extra_fields=("accept_prob",))
    assert 0.2 < mcmc.get_extra_fields()["accept_prob"].mean() < 0.99
    assert_moments(mcmc.get_samples(group_by_chain=True))


def test_a_bayesian_network_takes_an_op_for_all_its_layers_or_one_for_each():
    x, y = drawn(0, 10, 2), drawn(1, 10)

    z = {}
    for i, (n, m) in enumerate(((2, 4), (4, 4), (4, 1))):
        z |= {f"weight_{i}": drawn(2 + i, n, m), f"bias_{i}": drawn(5 + i, m)}

    def value_and_grad(**options):
        model = partial(bnn.model, widths=(4, 4), noise_scale=0.5, **options)
        return jax.jit(jax.value_and_grad(lambda z: log_density(model, (x, y), {}, z)[0]))(z)

    value, exact = value_and_grad()
    kernels = [z[f"weight_{i}"] for i in range(3)]
    random = feedback.normal(KEYS[8], kernels)
    of_each = [partial(feedback.dense, feedback=b) for b in random]
    rules = {
        "signs": lambda x, w: feedback.dense(x, w, feedback.uniform_sign(w)),
        "random": of_each,
        "exact": [partial(feedback.dense, feedback=w) for w in kernels],
    }
    grads = {}
    for name, dense in rules.items():
        same, grads[name] = value_and_grad(dense=dense)
        assert_close(same, value)
    assert_close(grads["exact"], exact)
    for name in ("signs", "random"):  # the readout's gradient is exact, those below are not
        assert_close(grads[name]["weight_2"], exact["weight_2"])
        assert not np.any(np.isclose(grads[name]["weight_0"], exact["weight_0"], rtol=1e-3))
    assert feedback.alignment(grads["signs"]["weight_0"], exact["weight_0"]) > 0
    with pytest.raises(ValueError, match="3 layers, but dense has 2"):
        value_and_grad(dense=of_each[:2])


def mlp(*sizes, key=0):
    rngs = nnx.Rngs(key)
    linears = [nnx.Linear(n, m, rngs=rngs) for n, m in zip(sizes[:-1], sizes[1:], strict=True)]
    return nnx.Sequential(*[part for linear in linears for part in (linear, jnp.tanh)][:-1])


@pytest.mark.slow
def test_a_guide_learns_through_feedback_weights_beside_an_exact_model():
    x = drawn(0, 16, 6)

    def model(x):
        loading = numpyro.param("loading", jnp.full((2, 6), 0.5))
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
            numpyro.sample("x", dist.Normal(z @ loading, 1.0).to_event(1), obs=x)

    def guide_of(encoder):
        def guide(x):
            out = nnx_module("encoder", encoder)(x)
            with numpyro.plate("rows", len(x)):
                numpyro.sample("z", dist.Normal(out[:, :2], jnp.exp(out[:, 2:])).to_event(1))

        return guide

    encoder = mlp(6, 8, 8, 4)

    def svi_of(encoder):
        return SVI(model, guide_of(encoder), optax.adam(0.01), Trace_ELBO())

    def value_and_grad(svi, params, fixed):
        def loss(params):
            return Trace_ELBO().loss(KEYS[2], params | fixed, model, svi.guide, x)

        return jax.value_and_grad(loss)(params)

    plain, ours = svi_of(encoder), svi_of(with_feedback(encoder, KEYS[3]))

    @compiled
    def everything():
        found = []
        for svi in (plain, ours):
            state = svi.init(KEYS[1], x)
            found.append(value_and_grad(svi, svi.get_params(state), state.mutable_state or {}))
        return *found, fitted(ours, KEYS[1], 100, x)[1]

    (exact, exact_grads), (value, grads), losses = everything()
    assert_close(value, exact, rtol=1e-6)
    assert_close(grads["loading"], exact_grads["loading"], rtol=1e-5, atol=1e-5)
    mine, theirs = (flat(g["encoder$params"]) for g in (grads, exact_grads))
    same = np.isclose(mine, theirs, rtol=1e-4, atol=1e-5)
    readout = 8 * 4 + 4
    assert np.sum(same) >= readout
    assert np.sum(~same) > 6 * 8
    assert losses[-20:].mean() < losses[:20].mean()


def test_an_nnx_network_is_not_edited_and_its_feedback_weights_do_not_train():
    x, y = drawn(0, 20, 3).astype("float32"), drawn(1, 20, 2).astype("float32")
    net = mlp(3, 5, 2)
    ours = with_feedback(net, KEYS[2])
    first, second = jax.tree.leaves(nnx.state(with_feedback(mlp(3, 3, 3), KEYS[2]), Feedback))
    assert feedback.alignment(first, second) < 0.99  # draws of their own
    assert_close(ours(x), net(x), rtol=0)
    assert net.layers[0].dot_general is jax.lax.dot_general

    def loss(net):
        return jnp.sum((net(x) - y) ** 2)

    b = ours.layers[2].dot_general.weights[...]
    grads = nnx.grad(loss)(ours)
    hidden = jnp.tanh(x @ net.layers[0].kernel[...] + net.layers[0].bias[...])
    error = 2 * (net(x) - y)
    sent = (error @ b.T) * (1 - hidden**2)
    assert_close(grads["layers"][0]["kernel"][...], x.T @ sent, rtol=1e-4, atol=1e-4)
    assert_close(grads["layers"][2]["kernel"][...], hidden.T @ error, rtol=1e-4, atol=1e-4)

    optimiser = nnx.Optimizer(ours, optax.adamw(0.01, weight_decay=0.1), wrt=nnx.Param)
    before = nnx.to_pure_dict(nnx.state(ours, Feedback))
    first = loss(ours)

    @nnx.jit
    def step(model, optimiser):
        optimiser.update(model, nnx.grad(loss)(model))

    for _ in range(20):
        step(ours, optimiser)
    assert loss(ours) < first
    assert_close(nnx.to_pure_dict(nnx.state(ours, Feedback)), before, rtol=0, atol=0)


def test_feedback_weights_of_an_nnx_network_may_learn_or_follow_the_kernel_s_signs():
    x = drawn(0, 4, 6, 6, 1).astype("float32")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(1, 3, (3, 3), rngs=rngs)
            self.attention = nnx.MultiHeadAttention(1, 3, decode=False, rngs=rngs)
            self.out = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            h = jnp.tanh(self.conv(x)).reshape(len(x), -1, 3)
            return self.out(self.attention(h).mean(1))

    @nnx.jit
    @nnx.grad
    def grad(net):
        return jnp.sum(net(x) ** 2)

    net = Net(nnx.Rngs(0))
    learns = with_feedback(net, KEYS[1], learns=True)
    grads = grad(learns)
    for layer in (grads["out"], grads["conv"], grads["attention"]["query"]):
        product = layer.get("dot_general", layer.get("conv_general_dilated"))
        assert_close(layer["kernel"][...], product["weights"][...], rtol=1e-6)
    assert len(jax.tree.leaves(nnx.state(learns, LearntFeedback))) == 6
    # With the kernel itself for a rule it is backpropagation, through attention too.
    exact = with_feedback(net, KEYS[1], rule=lambda kernel, _: kernel)
    ours, theirs = (nnx.to_pure_dict(grad(n)) for n in (exact, net))
    assert_close(ours["conv"]["kernel"], theirs["conv"]["kernel"], rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="got Dense. For Linen: linen_weights"):
        with_feedback(linen.Dense(3), KEYS[0])
    with pytest.raises(ValueError, match="no Linear, LinearGeneral or Conv"):
        with_feedback(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), KEYS[0])


def test_a_linen_network_is_not_edited():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            h = jnp.tanh(linen.Conv(3, (3, 3))(x)).reshape(len(x), -1)
            h = jnp.tanh(linen.Dense(5)(h))
            return linen.Dense(2)(h)

    net, x = Net(), drawn(0, 4, 4, 4, 1).astype("float32")
    params = net.init(KEYS[1], x)
    weights = linen_weights(KEYS[2], params["params"])
    assert sorted(weights) == ["Conv_0", "Dense_0", "Dense_1"]

    @partial(compiled, static_argnums=(2, 3))
    def value_and_grad(params, weights, rule, learns):
        def loss(params, weights):
            options = {"learns": learns} | ({"rule": rule} if rule else {})
            with linen.intercept_methods(linen_interceptor(weights, **options)):
                return jnp.sum(net.apply(params, x) ** 2)

        return jax.value_and_grad(loss, (0, 1))(params, weights)

    value, theirs = compiled(jax.value_and_grad(lambda params: jnp.sum(net.apply(params, x) ** 2)))(
        params
    )
    same, (exact, _) = value_and_grad(params, weights, lambda kernel, _: kernel, False)
    assert_close(same, value, rtol=1e-6)
    assert_close(exact, theirs, rtol=1e-4, atol=1e-5)
    same, (grads, to_weights) = value_and_grad(params, weights, None, True)
    assert_close(same, value, rtol=1e-6)
    assert_close(grads["params"]["Dense_1"], theirs["params"]["Dense_1"], rtol=1e-4, atol=1e-5)
    for name in ("Conv_0", "Dense_0"):
        kernel = grads["params"][name]["kernel"]
        assert feedback.alignment(kernel, theirs["params"][name]["kernel"]) < 0.99
        assert_close(kernel, to_weights[name]["kernel"], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------
# The door.


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: feedback.dense(np.ones(3), np.ones((3, 2)), np.ones((2, 3))),
            ValueError,
            "the kernel's own shape, not that of its transpose",
        ),
        (
            lambda: feedback.dense(np.ones(3), np.ones((3, 2)), np.ones((3, 2), int)),
            TypeError,
            "must be floating-point numbers",
        ),
        (lambda: feedback.normal(KEYS[0], np.zeros((3, 2))), ValueError, "Pass scale="),
        (lambda: feedback.kolen_pollack(np.ones(3), np.ones(2)), ValueError, "shape"),
        (
            lambda: feedback.direct(jnp.sum, [jnp.tanh, jnp.sin], np.ones((4, 3)), []),
            ValueError,
            "2 layers take 1 feedback weights",
        ),
        (
            lambda: feedback.direct(
                jnp.sum, [jnp.tanh, jnp.sin], np.ones((4, 3)), [np.ones((2, 3))]
            ),
            ValueError,
            r"feedback\[0\] has shape \(2, 3\)",
        ),
        (lambda: decay_until_aligned(1.0, 0.1, 0.0, 10), ValueError, "No decay is budget=0"),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()
