"""Spiking networks: the value of the simulation, and a gradient of rates with known limits."""

import warnings
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap import compiled, keys_of
from cheap import normal as draw

from probbp.ops import rate, substitute

KEYS = keys_of(0, 8)
BATCH, NUM_STEPS = 6, 9
SIZES = (5, 7, 4, 3)
X = np.random.default_rng(0).uniform(0.2, 1.5, (BATCH, SIZES[0]))
Y = np.arange(BATCH) % SIZES[-1]


def dense_weights(sizes=SIZES):
    return [
        {"w": 1.4 * draw((1, i), n, m) / n**0.5, "b": np.full(m, 0.2)}
        for i, (n, m) in enumerate(pairwise(sizes))
    ]


def dense(weights, spike, x):
    *hidden, last = weights
    for layer in hidden:
        x = spike(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def residual(weights, spike, x):
    first = spike(x @ weights["in"])
    second = spike(first @ weights["middle"] + first)
    both = spike(second * first)  # a join that is not linear
    return jnp.concatenate([both, second], -1) @ weights["out"]


def convolutional(weights, spike, x):
    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x = spike(conv(x.reshape(-1, 4, 4, 1), weights["first"]))
    x = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
    x = spike(conv(x, weights["second"]))
    return x.reshape(x.shape[0], -1) @ weights["out"]


def normalised(weights, spike, x):
    current = x @ weights["in"]
    centred = current - current.mean(-1, keepdims=True)
    current = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3)
    return spike(current * weights["scale"] + 0.5) @ weights["out"]


CASES = {
    "dense": (dense, dense_weights(), X),
    "residual": (
        residual,
        {
            "in": draw(2, 5, 5),
            "middle": draw(3, 5, 5),
            "out": draw(4, 10, 3),
        },
        X,
    ),
    "convolutional": (
        convolutional,
        {
            "first": draw(2, 3, 3, 1, 2),
            "second": draw(3, 3, 3, 2, 2),
            "out": draw(4, 8, 3),
        },
        np.random.default_rng(5).uniform(size=(BATCH, 16)),
    ),
    "normalised": (
        normalised,
        {"in": draw(2, 5, 6), "scale": np.ones(6), "out": draw(4, 6, 3)},
        X,
    ),
}


def by_hand(network, x_of, num_steps, neuron=None):
    """Return the outputs of all steps: a plain loop that knows no traces."""
    neuron = rate.lif() if neuron is None else neuron
    states, outputs = {}, []
    for t in range(num_steps):
        calls = []

        def spike(current, calls=calls):
            number = len(calls)
            state = states.get(number, jnp.zeros_like(current))
            states[number], spikes = neuron.step(neuron.params, state, current)
            calls.append(number)
            return spikes

        outputs.append(network(spike, x_of(t)))
    return jnp.stack(outputs)


def loss_of(network, inputs, num_steps, **options):
    def loss(weights):
        logits = rate.simulate(partial(network, weights), inputs, num_steps, **options)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), Y[:, None], 1))

    return loss


def grad_of(loss):
    return compiled(jax.grad(loss))


def assert_close(a, b, rtol=1e-10, atol=1e-12):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), a, b)


def cosine(a, b):
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (a, b))
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


# ---------------------------------------------------------------------------------------
# The value.


@pytest.mark.parametrize(
    ("name", "dtype"), [("dense", "float32"), *((name, "float64") for name in CASES)]
)
def test_the_value_is_the_simulated_network_s(name, dtype):
    network, *rest = CASES[name]
    weights, x = jax.tree.map(lambda leaf: leaf.astype(dtype), rest)
    several = (
        {},
        {"order": "layer"},
        {"gradient": "bptt"},
        {"gradient": "bptt", "order": "layer"},
        {"gradient": "bptt", "checkpoint": True},
    )

    @compiled
    def everything(weights, x):
        spiking, inputs = partial(network, weights), rate.constant(x)
        values = [rate.simulate(spiking, inputs, NUM_STEPS, **options) for options in several]
        return by_hand(spiking, inputs, NUM_STEPS).mean(0), values

    expected, values = everything(weights, x)
    for value in values:
        assert value.dtype == dtype
        assert_close(value, expected, rtol=1e-5 if dtype == "float32" else 1e-12)


NEURONS = {
    "soft, detached": rate.lif(leak=0.6),
    "soft": rate.lif(leak=0.6, detach_reset=False),
    "hard, detached": rate.lif(leak=0.6, reset="hard", threshold=0.8),
    "hard": rate.lif(leak=0.6, reset="hard", threshold=0.8, detach_reset=False),
    "another surrogate": rate.lif(surrogate=lambda x: jnp.arctan(3 * x) / jnp.pi),
}
every_neuron = pytest.mark.parametrize("neuron", NEURONS.values(), ids=NEURONS)


def test_the_neurons_follow_their_equations():
    current = np.array([0.9, 0.9, 0.0, 0.9])
    expected = {
        "soft, detached": [0.0, 1.0, 0.0, 1.0],  # u: .9, 1.44, .264, 1.0584
        "hard": [1.0, 1.0, 0.0, 1.0],
    }
    for name, spikes in expected.items():
        trains, _ = rate.spike_trains(
            lambda spike, x: spike(x), rate.events(current), 4, neuron=NEURONS[name]
        )
        assert trains[0].tolist() == spikes
    potential = 0.0
    for x in current:  # the soft reset, with a threshold that is not 1
        potential, _ = rate.lif(leak=0.5, threshold=0.7).step(
            {"leak": 0.5, "threshold": 0.7}, potential, x
        )
    assert np.isclose(potential, 0.5 * (0.5 * (0.5 * 0.2 + 0.2)) + 0.9 - 0.7)


# ---------------------------------------------------------------------------------------
# The gradient, where it is exact.


@pytest.mark.parametrize(
    ("case", "neuron"),
    [(name, "soft") for name in CASES] + [("dense", name) for name in NEURONS if name != "soft"],
)
def test_one_step_is_backpropagation(case, neuron):
    network, weights, x = CASES[case]
    loss = partial(loss_of, network, rate.constant(x), 1, neuron=NEURONS[neuron])
    assert_close(grad_of(loss())(weights), grad_of(loss(gradient="bptt"))(weights))


@every_neuron
def test_one_layer_with_a_constant_current_is_exact(neuron):
    network, weights, x = CASES["normalised"]
    loss = partial(loss_of, network, rate.constant(x), 30, neuron=neuron)
    assert_close(grad_of(loss())(weights), grad_of(loss(gradient="bptt"))(weights))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if name == "residual" else pytest.mark.slow)
        for name, case in CASES.items()
    ],
)
def test_the_readout_s_gradient_is_exact(case):
    network, weights, x = case
    inputs = rate.bernoulli(KEYS[6], x / 1.6)
    grads = [
        grad_of(loss_of(network, inputs, 12, gradient=gradient))(weights)
        for gradient in ("rate", "bptt")
    ]
    out = [grad[-1] if isinstance(grad, list) else grad["out"] for grad in grads]
    assert_close(*out)


@every_neuron
def test_the_gain_sums_the_jacobian_of_the_spikes(neuron):
    """Backpropagation through time, entry by entry, against the tangent that is carried."""
    current = np.array([0.9, 0.3, 1.4, 0.8])
    num_steps = 6

    def train(currents):
        state, spikes = jnp.zeros(4), []
        for row in currents:
            state, spike = neuron.step(neuron.params, state, row)
            spikes.append(spike)
        return jnp.stack(spikes)

    noise = 0.2 * draw(7, num_steps, 4)
    jacobian = compiled(jax.jacobian(train))(current + noise)
    expected = jnp.einsum("tiui->i", jacobian) / num_steps
    inputs = rate.events(noise)
    gain = compiled(
        jax.grad(
            lambda c: rate.simulate(
                lambda spike, x: spike(x + c), inputs, num_steps, neuron=neuron
            ).sum()
        )
    )(current)
    assert_close(gain, expected)


@pytest.mark.parametrize(
    ("name", "slope"),
    [
        ("soft, detached", lambda u, s, k, threshold: 1),
        ("soft", lambda u, s, k, threshold: 1 - threshold * k),
        ("hard, detached", lambda u, s, k, threshold: 1 - s),
        ("hard", lambda u, s, k, threshold: 1 - s - u * k),
    ],
)
def test_the_gain_follows_the_paper_s_recursion(name, slope):
    """rho_t = 1 + a_t rho_{t-1} with a_t = leak du_t / dv_{t-1}, and the mean of k_t rho_t."""
    neuron, leak = NEURONS[name], 0.6
    threshold = 0.8 if "hard" in name else 1.0
    currents = np.array([0.9, 0.3, 1.4, 0.8, 1.1])
    v, rho, a, total = 0.0, 0.0, 0.0, 0.0
    for current in currents:
        u = leak * v + current
        s = float(u >= threshold)
        p = 1 / (1 + np.exp(-4 * (u - threshold)))
        k = 4 * p * (1 - p)
        rho = 1 + a * rho
        total += k * rho
        a = leak * slope(u, s, k, threshold)
        v = u - threshold * s if "soft" in name else u * (1 - s)
    inputs = rate.events(np.asarray(currents))
    gain = compiled(
        jax.grad(lambda c: rate.simulate(lambda spike, x: spike(x + c), inputs, 5, neuron=neuron))
    )(0.0)
    assert np.isclose(gain, total / 5, rtol=1e-12)


@pytest.mark.parametrize("reset", ["soft", "hard"])
def test_leak_and_threshold_can_be_trained(reset):
    """With a constant current, exactly; plain numbers cost nothing."""

    def loss(params, gradient):
        neuron = rate.lif(**params, reset=reset, detach_reset=False)
        out = rate.simulate(
            lambda spike, x: spike(x, neuron), rate.constant(jnp.asarray(X)), 25, gradient=gradient
        )
        return jnp.sum(out**2)

    params = {"leak": np.array(0.7), "threshold": np.linspace(0.6, 1.2, SIZES[0])}
    by_rates, through_time = (
        compiled(jax.grad(loss))(params, gradient) for gradient in ("rate", "bptt")
    )
    assert_close(by_rates, through_time)
    assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(by_rates))


def test_inputs_are_differentiated():
    weights = dense_weights((5, 4))
    network = partial(dense, [*weights, {"w": np.ones((4, 2)), "b": np.zeros(2)}])

    def loss(x, gradient, encode):
        return jnp.sum((rate.simulate(network, encode(x), 8, gradient=gradient) + 1) ** 2)

    # One layer of neurons, moved by the same amount in every step: exact, random or not.
    for encode in (rate.constant, partial(rate.bernoulli, KEYS[6])):
        by_rates, through_time = (
            compiled(jax.grad(loss))(X / 1.6, gradient, encode) for gradient in ("rate", "bptt")
        )
        assert_close(by_rates, through_time)
        assert np.all(by_rates != 0)


# ---------------------------------------------------------------------------------------
# The gradient elsewhere.


BERNOULLI = partial(rate.bernoulli, KEYS[6])


@pytest.mark.parametrize(
    ("case", "encode"),
    [
        ("dense", rate.constant),
        *(pytest.param(case, BERNOULLI, marks=pytest.mark.slow) for case in CASES),
    ],
)
def test_both_orders_have_one_gradient(case, encode):
    network, weights, x = CASES[case]
    inputs = encode(jnp.asarray(x) / 1.6)
    losses = [loss_of(network, inputs, 7, order=order) for order in ("time", "layer")]
    losses += [
        loss_of(network, inputs, 7, gradient="bptt", **options)
        for options in ({}, {"order": "layer"}, {"checkpoint": True})
    ]
    *by_rates, first, second, third = compiled(
        lambda w: [jax.value_and_grad(f)(w) for f in losses]
    )(weights)
    assert_close(*by_rates)
    assert_close(first, second)
    assert_close(first, third)
    assert cosine(by_rates[0][1], first[1]) > 0.8


def test_through_time_is_the_gradient_of_the_plain_loop():
    network, weights, x = CASES["dense"]
    inputs = rate.bernoulli(KEYS[6], x / 1.6)
    neuron = NEURONS["soft"]

    def plain(weights):
        return jnp.sum(by_hand(partial(network, weights), inputs, 7, neuron).mean(0) ** 2)

    def ours(weights):
        out = rate.simulate(partial(network, weights), inputs, 7, neuron=neuron, gradient="bptt")
        return jnp.sum(out**2)

    assert_close(compiled(jax.grad(ours))(weights), compiled(jax.grad(plain))(weights))


def test_the_gradient_is_of_the_size_of_that_through_time():
    """And close to it in direction, with a constant input."""
    weights = dense_weights((5, 40, 40, 3))
    inputs = rate.constant(X)
    by_rates, through_time = (
        grad_of(loss_of(dense, inputs, 32, gradient=gradient))(weights)
        for gradient in ("rate", "bptt")
    )
    norms = [
        jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(g))) for g in (by_rates, through_time)
    ]
    assert 0.9 < norms[0] / norms[1] < 1.1
    assert cosine(by_rates, through_time) > 0.99


def test_transformations_and_both_modes():
    network, weights, x = CASES["dense"]
    loss = loss_of(network, rate.constant(x), 8)
    two = jax.tree.map(lambda leaf: np.stack([leaf, 0.5 * leaf]), weights)
    tangent = jax.tree.map(np.cos, weights)

    @compiled
    def everything(weights):
        remat, several = jax.grad(jax.checkpoint(loss)), jax.vmap(jax.grad(loss))
        _, slope = jax.jvp(loss, (weights,), (tangent,))
        return jax.grad(loss)(weights), remat(weights), several(two), slope

    grad, remat, batch, slope = everything(weights)
    assert_close(remat, grad)
    assert_close(jax.tree.map(lambda leaf: leaf[0], batch), grad)
    products = jax.tree.map(lambda g, t: np.sum(g * t), grad, tangent)
    assert np.isclose(slope, sum(jax.tree.leaves(products)), rtol=1e-10)


def temporaries(loss, weights):
    compiled = jax.jit(jax.grad(loss)).lower(weights).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_the_number_of_steps():
    weights = dense_weights((5, 64, 64, 3))

    def bytes_of(num_steps, **options):
        return temporaries(loss_of(dense, rate.constant(X), num_steps, **options), weights)

    assert bytes_of(2048) == bytes_of(32)
    assert bytes_of(2048) < bytes_of(2048, gradient="bptt") / 100
    assert bytes_of(1024, gradient="bptt", checkpoint=True) < bytes_of(1024, gradient="bptt") / 8


def test_half_precision_counts_beyond_256():
    one = np.ones(2, jnp.bfloat16)

    def total(weight):
        out = rate.simulate(
            lambda spike, x: weight * spike(2 * x), rate.constant(jnp.asarray(one)), 1000
        )
        assert out.dtype == jnp.bfloat16
        return jnp.sum(out)

    value, rates = compiled(jax.value_and_grad(total))(one)
    assert value == 2
    assert rates.tolist() == [1.0, 1.0]


def test_averages_over_time():
    """A batch norm over time: value from the simulation, slope from the mean inputs."""

    def network(spike, x, scale):
        current = scale * x
        mean = spike.average(current.mean(0))
        var = spike.average(((current - mean) ** 2).mean(0))
        return (current - mean) * spike.average(jax.lax.rsqrt(var + 0.1))

    train = draw(3, 8, 5, 2)
    scale = np.array([0.7, 1.9])
    inputs = rate.events(train)

    def output(scale, **options):
        run = partial(rate.simulate, partial(network, scale=scale), inputs, 8, **options)
        return run()

    block = scale * train
    axes = {"layer": (0, 1), "time": 1}
    for order, axis in axes.items():
        mean, var = block.mean(axis, keepdims=True), block.var(axis, keepdims=True)
        expected = ((block - mean) / jnp.sqrt(var + 0.1)).mean(0)
        assert_close(compiled(partial(output, order=order))(scale), expected)

        def surrogate(scale, order=order, mean=mean, var=var):
            """Return what the derivative is of, written out."""
            rates = scale * train.mean(0)

            def as_found(value, of_rates):
                return substitute(jax.lax.stop_gradient(value), of_rates)

            centre = as_found(mean.mean(0)[0], rates.mean(0))
            spread = as_found(var.mean(0)[0], ((rates - centre) ** 2).mean(0))
            inverse = as_found((1 / jnp.sqrt(var + 0.1)).mean(0)[0], (spread + 0.1) ** -0.5)
            return (rates - centre) * inverse

        assert_close(
            compiled(jax.jacobian(partial(output, order=order)))(scale),
            compiled(jax.jacobian(surrogate))(scale),
        )


# ---------------------------------------------------------------------------------------
# Where it can't work, and what is refused.


def latency(x, num_steps):
    """One spike for each input, the sooner the larger."""
    when = jnp.round((1 - x) * (num_steps - 1)).astype(int)
    return (jnp.arange(num_steps)[:, None, None] == when).astype(x.dtype)


@pytest.mark.slow
def test_timed_spikes_are_not_seen_and_the_diagnostic_says_so():
    num_steps = 16
    x = np.random.default_rng(4).uniform(size=(BATCH, 20))
    weights = dense_weights((20, 32, 3))
    inputs = rate.events(latency(x, num_steps))

    def loss(weights, gradient):
        neuron = rate.lif(leak=0.9)
        return loss_of(dense, inputs, num_steps, gradient=gradient, neuron=neuron)(weights)

    grad = compiled(jax.grad(loss))(weights, "rate")
    rows = grad[0]["w"]
    assert np.max(np.abs(rows - rows[0])) < 1e-12 * np.max(np.abs(rows))
    assert np.max(np.abs(rows)) > 0
    through_time = compiled(jax.grad(loss))(weights, "bptt")[0]["w"]
    assert np.max(np.abs(through_time - through_time[0])) > 0.5 * np.max(np.abs(through_time))
    with pytest.warns(UserWarning, match=r"\[0\]\['w'\] 0\.\d\d.*timed"):
        cosines = rate.agreement(loss, weights)
    assert cosines[0]["w"] < 0.9
    assert np.isclose(cosines[-1]["w"], 1)


def test_the_diagnostic_is_silent_where_rates_are_enough():
    network, weights, x = CASES["normalised"]

    @partial(jax.jit, static_argnums=1)
    def loss(weights, gradient):
        return loss_of(network, rate.constant(x), 8, gradient=gradient)(weights)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cosines = rate.agreement(loss, weights)
    assert all(np.isclose(leaf, 1) for leaf in jax.tree.leaves(cosines))


# What a type checker would not let pass.
simulate: Any = rate.simulate
lif: Any = rate.lif


def changing(spike, x, calls=[]):  # noqa: B006  a state is what is tested
    calls.append(None)
    return spike(spike(x)) if len(calls) % 2 else spike(x)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda net: simulate(net, rate.constant(X), 0), "num_steps must be a positive integer"),
        (
            lambda net: simulate(net, rate.constant(X), 4, gradient="ottt"),
            "choose 'rate' or 'bptt'",
        ),
        (lambda net: simulate(net, rate.constant(X), 4, order="both"), "'time' or 'layer'"),
        (lambda net: simulate(net, rate.constant(X), 4, checkpoint=True), "nothing is stored"),
        (lambda net: lif(reset="none"), "'soft' or 'hard'"),
        (lambda net: simulate(net, rate.constant(Y), 4), "floating-point arrays"),
        (lambda net: simulate(lambda s, x: s(Y), rate.constant(X), 4), "floating-point JAX"),
        (
            lambda net: simulate(changing, rate.constant(jnp.asarray(X)), 4),
            "differently from run to run",
        ),
    ],
)
def test_bad_input(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call(lambda spike, x: spike(x))


def test_a_stream_that_is_too_short_shows():
    out = simulate(lambda spike, x: x, rate.events(np.ones((3, 2))), 4)
    assert np.all(np.isnan(out))
