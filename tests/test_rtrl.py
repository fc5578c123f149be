"""Gradients carried forward are those of `jax.lax.scan`, whatever the loop and its length."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap import compiled
from cheap import normal as draw
from jax.flatten_util import ravel_pytree

from probbp.ops import rtrl


def series(length, key=0):
    return draw(key, length)


def two_loops(scan, params, length, dtype=float):
    """A slow loop and a fast one that act on each other, in turn."""

    def step(carry, u):
        slow, fast, total = carry
        slow = jnp.tanh(params["slow"] @ slow + params["down"] * fast[:3])
        fast = jnp.tanh(params["up"] @ slow + 0.5 * fast + u)
        return (slow, fast, total + jnp.sum(fast**2)), None

    init = jnp.zeros(3, dtype), params["start"], jnp.zeros((), dtype)
    return scan(step, init, series(length).astype(dtype))[0][2]


def drifting(scan, params, length):
    """Parameters on a known schedule."""

    def step(carry, u):
        x, total = carry
        drift, u = u
        x = jnp.sin((params["rate"] + drift) * x) + u
        return (x, total + x**2), None

    xs = 0.1 * jnp.sin(jnp.arange(length)), series(length)
    return scan(step, (params["start"], 0.0), xs)[0][1]


def diagonal(scan, params, length):
    def step(carry, u):
        h, total = carry
        h = jax.nn.sigmoid(params["leak"]) * h + params["gain"] * u
        return (h, total + jnp.tanh(h @ params["readout"])), None

    return scan(step, (jnp.zeros(4), 0.0), series(length))[0][1]


def complex_state(scan, params, length):
    """A rotation that decays: complex numbers in the carry, real parameters."""

    def step(carry, u):
        z = carry["z"] * jax.lax.complex(params["real"], params["imag"]) + u
        return {"z": z, "total": carry["total"] + jnp.abs(z)}, None

    start = {"z": jnp.zeros((), complex), "total": 0.0}
    return scan(step, start, series(length))[0]["total"]


def integers(scan, params, length):
    """A regime counted by integers, a table indexed by them, and outputs nobody differentiates."""

    def step(carry, event):
        x, count, total = carry
        x = params["table"][count % 3] * jnp.cos(x) + event
        return (x, count + event, total + x**2), count

    events = (draw(1, length) > 0.5).astype(int)
    (_, _, total), counts = scan(step, (params["start"], 0, 0.0), events)
    return total + 0 * counts[-1]


def normal(*shape, key=0):
    return 0.4 * draw(key, *shape)


# name -> (loss of a scan, parameters and a length; parameters)
SYSTEMS = {
    "two loops": (
        two_loops,
        {"slow": normal(3, 3), "down": normal(3), "up": normal(5, 3), "start": normal(5, key=1)},
    ),
    "drifting": (drifting, {"rate": np.array(0.8), "start": np.array(0.3)}),
    "diagonal": (diagonal, {"leak": normal(4), "gain": normal(4, key=1), "readout": normal(4)}),
    "complex state": (complex_state, {"real": np.array(0.6), "imag": np.array(0.7)}),
    "integers": (integers, {"table": normal(3), "start": np.array(0.1)}),
}

every_system = pytest.mark.parametrize("name", SYSTEMS)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def assert_same(tree, other, rtol=1e-12):
    """Relative to the largest entry: small ones are differences of large ones."""
    np.testing.assert_allclose(flat(tree), flat(other), rtol=0, atol=rtol * abs(flat(other)).max())


LENGTHS = [1, 1_000, *(pytest.param(n, marks=pytest.mark.slow) for n in (10, 100_000))]


@every_system
@pytest.mark.parametrize("length", LENGTHS)
def test_value_and_gradient_are_those_of_lax_scan(name, length):
    loss, params = SYSTEMS[name]
    ours, plain = (
        compiled(jax.value_and_grad(lambda p, scan=scan: loss(scan, p, length)))(params)
        for scan in (rtrl.scan, jax.lax.scan)
    )
    assert ours[0] == plain[0]
    assert_same(ours[1], plain[1])


@pytest.mark.parametrize("name", ["drifting", "complex state", "integers"])
def test_both_modes_and_higher_derivatives(name):
    loss, params = SYSTEMS[name]
    vector, unravel = ravel_pytree(params)
    ours, plain = (
        lambda p, scan=scan: loss(scan, unravel(p), 20) for scan in (rtrl.scan, jax.lax.scan)
    )
    direction = np.cos(np.arange(vector.size))

    @compiled
    def derivatives(x):
        first = [(jax.jvp(f, (x,), (direction,)), jax.jacfwd(f)(x)) for f in (ours, plain)]
        second = jax.hessian(ours)(x), jax.jacrev(jax.jacrev(ours))(x), jax.hessian(plain)(x)
        return first, second

    first, (hessian, by_reverse, expected) = derivatives(vector)
    for mine, exact in zip(*first, strict=True):
        assert_same(mine, exact)
    assert_same(hessian, expected)
    assert_same(by_reverse, expected)


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 1}, {"batch_size": 5}, {"by_leaf": True}, {"by_leaf": True, "batch_size": 2}],
    ids=str,
)
def test_columns_may_come_in_parts(options):
    loss, params = SYSTEMS["two loops"]
    scan = partial(rtrl.scan, **options)
    ours, plain = (
        compiled(jax.value_and_grad(partial(loss, s, length=30)))(params)
        for s in (scan, jax.lax.scan)
    )
    assert_same(ours, plain)


def test_by_leaf_carries_what_a_leaf_reaches():
    """A cascade: the first loop drives the second, whose weights do not reach the first."""

    def loss(params, by_leaf):
        def step(carry, u):
            first, second, total = carry
            first = jnp.tanh(params[0] @ first + u)
            second = jnp.tanh(params[1] * second + jnp.sum(first))
            return (first, second, total + second), None

        init = jnp.zeros(30), jnp.zeros(()), jnp.zeros(())
        return rtrl.scan(step, init, series(50), by_leaf=by_leaf)[0][2]

    params = 0.1 * np.eye(30), np.full((), 0.5)
    jaxprs = [jax.make_jaxpr(jax.grad(partial(loss, by_leaf=b)))(params) for b in (False, True)]
    # Sensitivities of the first loop's thirty numbers: to all 901 parameters, or to its own 900.
    assert "f64[901,30]" in str(jaxprs[0])
    assert "f64[901,30]" not in str(jaxprs[1])
    assert "f64[900,30]" in str(jaxprs[1])


@pytest.mark.parametrize("options", [{"reverse": True}, {"unroll": 3}], ids=str)
def test_the_options_of_lax_scan(options):
    def loss(rate, scan):
        def step(carry, x):
            return (rate * carry[0] + x, carry[1] + carry[0] ** 2), x

        (_, total), ys = scan(step, (0.1, 0.0), series(20), **options)
        return total, ys

    ours, plain = (
        compiled(jax.value_and_grad(loss, has_aux=True))(0.7, scan)
        for scan in (rtrl.scan, jax.lax.scan)
    )
    assert_same(ours, plain)


def test_a_length_instead_of_inputs():
    def last(rate, scan):
        return scan(lambda carry, _: (jnp.sin(rate * carry), None), 0.9, length=7)[0]

    assert_same(
        compiled(jax.grad(last))(0.7, rtrl.scan), compiled(jax.grad(last))(0.7, jax.lax.scan)
    )


def test_vmap_over_parameters_and_over_data():
    def loss(rate, counts, scan):
        def step(carry, x):
            return (jnp.sin(rate * carry[0]) + x * counts, carry[1] + carry[0] ** 2), None

        return scan(step, (0.1, 0.0), series(20))[0][1]

    rates, counts = np.linspace(0.1, 0.9, 3), np.arange(3)
    for axes in ((0, None), (None, 0), (0, 0)):
        args = [a if axis == 0 else a[1] for a, axis in zip((rates, counts), axes, strict=True)]
        ours, plain = (
            compiled(jax.vmap(jax.value_and_grad(partial(loss, scan=scan)), axes))(*args)
            for scan in (rtrl.scan, jax.lax.scan)
        )
        assert_same(ours, plain)


def test_inside_a_larger_graph_in_reverse_mode():
    """A network makes the parameters, and what the loop returns goes on."""

    def loss(weights, scan):
        rates = jax.nn.sigmoid(weights @ jnp.arange(5.0))

        def step(carry, x):
            return rates * carry + x, None

        last, _ = scan(step, jnp.ones(3), series(50))
        return jnp.sum(jax.checkpoint(jnp.tanh)(last) ** 2)

    weights = normal(3, 5)
    assert_same(
        compiled(jax.grad(loss))(weights, rtrl.scan),
        compiled(jax.grad(loss))(weights, jax.lax.scan),
    )


def test_single_precision():
    _, params = SYSTEMS["two loops"]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    loss = partial(two_loops, length=30, dtype=jnp.float32)
    ours, plain = (compiled(jax.grad(partial(loss, s)))(params) for s in (rtrl.scan, jax.lax.scan))
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {jnp.dtype("float32")}
    assert_same(ours, plain, rtol=1e-5)


def test_without_cross_terms_the_gradient_is_wrong():
    """What the block form adds to a sensitivity for each loop by itself."""
    _, params = SYSTEMS["two loops"]

    def loss(params, cut):
        def step(carry, u):
            slow, fast, total = carry
            slow = jnp.tanh(params["slow"] @ slow + params["down"] * cut(fast)[:3])
            fast = jnp.tanh(params["up"] @ cut(slow) + 0.5 * fast + u)
            return (slow, fast, total + jnp.sum(fast**2) + jnp.sum(slow**2)), None

        init = jnp.zeros(3), params["start"], 0.0
        return rtrl.scan(step, init, series(200))[0][2]

    exact, without = (
        flat(compiled(jax.grad(loss))(params, cut)) for cut in (lambda x: x, jax.lax.stop_gradient)
    )
    assert np.linalg.norm(without - exact) > 0.1 * np.linalg.norm(exact)


# ---------------------------------------------------------------------------------------
# Memory and cost.


def temporary_bytes(fun, *args):
    return jax.jit(fun).lower(*args).compile().memory_analysis().temp_size_in_bytes


def volatility(params, xs, scan, has_outputs=True):
    """GARCH, with the variances as outputs that the loss does not use."""

    def step(carry, x):
        variance, total = carry
        total = total + jnp.log(variance) + x**2 / variance
        variance = params[0] + params[1] * x**2 + params[2] * variance
        return (variance, total), variance if has_outputs else None

    (_, total), variances = scan(step, (params[3], 0.0), xs)
    return total, variances


PARAMS = np.array([0.1, 0.1, 0.8, 1.0])


def test_memory_does_not_grow_with_the_length():
    grad = jax.grad(lambda p, xs, scan=rtrl.scan: volatility(p, xs, scan)[0])
    short, long = (temporary_bytes(grad, PARAMS, np.zeros(n)) for n in (1_000, 1_000_000))
    assert short == long
    plain = temporary_bytes(partial(grad, scan=jax.lax.scan), PARAMS, np.zeros(100_000))
    assert long < plain / 1_000
    hessian = jax.hessian(lambda p, xs: volatility(p, xs, rtrl.scan)[0])
    short, long = (temporary_bytes(hessian, PARAMS, np.zeros(n)) for n in (1_000, 1_000_000))
    assert short == long


def test_data_add_no_columns():
    """What the loop closes over without being differentiated costs nothing, traced or not."""
    table = np.linspace(0.0, 1.0, 1_000)

    def loss(rate, table):
        def step(carry, index):
            return jnp.sin(rate * carry) + table[index], None

        return rtrl.scan(step, 0.1, jnp.arange(1_000))[0]

    memory = temporary_bytes(jax.grad(loss), 0.5, table)
    assert memory < 2 * table.nbytes
    assert temporary_bytes(jax.grad(loss, argnums=1), 0.5, table) > 1_000 * table.nbytes


def test_without_a_derivative_it_is_lax_scan():
    programs = [
        jax.jit(lambda p, scan=scan: volatility(p, series(100), scan)).lower(PARAMS).compile()
        for scan in (rtrl.scan, jax.lax.scan)
    ]
    assert programs[0].cost_analysis()["flops"] == programs[1].cost_analysis()["flops"]


# ---------------------------------------------------------------------------------------
# What is refused.


def test_outputs_have_a_forward_derivative_and_refuse_a_backward_one():
    def mean_variance(params, scan):
        return volatility(params, series(50), scan)[1].mean()

    tangent = np.ones(4)
    ours, plain = (
        compiled(partial(jax.jvp, partial(mean_variance, scan=s)))((PARAMS,), (tangent,))
        for s in (rtrl.scan, jax.lax.scan)
    )
    assert_same(ours, plain)
    for transformed in (jax.jit, jax.checkpoint):
        with pytest.raises(TypeError, match="Put the running loss in the carry"):
            jax.grad(transformed(partial(mean_variance, scan=rtrl.scan)))(PARAMS)


def test_inputs_are_refused_unless_stopped():
    def loss(scale, stop):
        return volatility(PARAMS, stop(scale * series(50)), rtrl.scan)[0]

    with pytest.raises(TypeError, match="stop_gradient"):
        jax.grad(loss)(2.0, lambda x: x)
    assert compiled(jax.grad(loss))(2.0, jax.lax.stop_gradient) == 0


def test_complex_parameters_are_refused():
    def loss(z):
        last, _ = rtrl.scan(lambda carry, _: (carry * z, None), z, length=3)
        return jnp.abs(last)

    with pytest.raises(TypeError, match="real and imaginary parts"):
        jax.grad(loss)(1.0 + 1.0j)


# ---------------------------------------------------------------------------------------
# Diagonal recurrences.


def unit(params, state, x):
    """A damped rotation in each unit: two numbers of state, five of parameters."""
    a, b = state
    decay, angle = jax.nn.sigmoid(params["decay"]), params["angle"]
    drive = params["gain"] @ x
    return decay * (a * jnp.cos(angle) - b * jnp.sin(angle)) + drive, decay * (
        a * jnp.sin(angle) + b * jnp.cos(angle)
    )


UNITS = {"decay": normal(6), "angle": normal(6, key=1), "gain": normal(6, 3, key=2)}
STATES = normal(6, key=3), normal(6, key=4)


def readout_loss(readout, states, x):
    return jnp.tanh(readout @ states[0] - x[0]) ** 2 + 0.01 * jnp.sum(states[1] ** 2)


def of_units(params, init, readout, xs):
    total, last = rtrl.diagonal_scan(unit, params, init, xs, partial(readout_loss, readout))
    return total + jnp.sum(last[0] ** 3)


def of_units_by_lax_scan(params, init, readout, xs):
    def step(carry, x):
        states, total = carry
        states = jax.vmap(unit, (0, 0, None))(params, states, x)
        return (states, total + readout_loss(readout, states, x)), None

    (last, total), _ = jax.lax.scan(step, (init, 0.0), xs)
    return total + jnp.sum(last[0] ** 3)


@pytest.mark.parametrize("length", [1, 10, 1_000])
def test_diagonal_units_have_the_gradient_of_lax_scan(length):
    xs, readout = normal(length, 3, key=5), normal(6, key=6)
    ours, plain = (
        compiled(jax.value_and_grad(f, argnums=(0, 1, 2)))(UNITS, STATES, readout, xs)
        for f in (of_units, of_units_by_lax_scan)
    )
    assert_same(ours, plain)


def test_diagonal_units_in_other_transformations():
    readout, xs = normal(6, key=6), normal(20, 3, key=5)

    def by_angle(angle, fun):
        return fun(UNITS | {"angle": angle}, STATES, readout, xs)

    angle = UNITS["angle"]
    mapped = lambda f: jax.vmap(jax.grad(f))
    for transform, point in (
        (jax.jacfwd, angle),
        (jax.hessian, angle),
        (mapped, jnp.stack([angle, 2 * angle])),
    ):
        ours, plain = (
            compiled(transform(partial(by_angle, fun=f)))(point)
            for f in (of_units, of_units_by_lax_scan)
        )
        assert_same(ours, plain)


def test_diagonal_units_take_the_memory_of_their_parameters():
    grad = jax.grad(of_units, argnums=(0, 1, 2))
    short, long = (
        temporary_bytes(grad, UNITS, STATES, normal(6), np.zeros((n, 3))) for n in (1_000, 100_000)
    )
    assert short == long


def test_diagonal_units_refuse_what_they_would_lose():
    def loss(rate):
        return rtrl.diagonal_scan(
            lambda params, state, x: rate * state + params,
            jnp.ones(3),
            jnp.ones(3),
            jnp.ones(5),
            lambda states, x: jnp.sum(states),
        )[0]

    with pytest.raises(TypeError, match="give the cell its parameters by params"):
        jax.grad(loss)(0.5)
    add = lambda carry, x: (carry + 1, None)
    for length, words in (
        (-1, "length must be .* at least 0, got -1"),
        (None, "length"),
    ):
        with pytest.raises(ValueError, match=words):
            rtrl.scan(add, 0.0, None, length)
    with pytest.raises(ValueError, match="leading axes"):
        rtrl.scan(add, 0.0, (np.ones(3), np.ones(4)))
    with pytest.raises(ValueError, match="units on the first axis"):
        rtrl.diagonal_scan(unit, UNITS, (np.ones(5), np.ones(5)), np.ones((2, 3)), None)


# ---------------------------------------------------------------------------------------
# Curvature, and streams.


def predict(params, carry, x):
    """A moving average with a rate and a spread, as natural parameters of a normal."""
    mean, count = carry
    precision = jnp.exp(params["log_precision"])
    rate = jax.nn.sigmoid(params["rate"])
    return (mean + rate * (x - mean), count + 1.0), (precision * mean, precision)


def loss_of_prediction(y, x):
    shift, precision = y
    return 0.5 * (shift**2 / precision - jnp.log(precision) + precision * x**2) - shift * x


def test_gauss_newton_is_that_of_the_stacked_jacobian():
    params = {"rate": np.array(0.3), "log_precision": np.array(-0.2)}
    xs = series(200)
    vector, unravel = ravel_pytree(params)

    def outputs(vector):
        _, (shift, precision) = jax.lax.scan(
            lambda carry, x: predict(unravel(vector), carry, x), (0.0, 0.0), xs
        )
        return jnp.stack([shift, precision], -1)

    def total(vector):
        return jnp.sum(jax.vmap(lambda y, x: loss_of_prediction(tuple(y), x))(outputs(vector), xs))

    found = rtrl.gauss_newton(predict, params, (0.0, 0.0), xs, loss_of_prediction)
    jacobian = compiled(jax.jacfwd(outputs))(vector)
    curvature = compiled(jax.vmap(jax.hessian(lambda y, x: loss_of_prediction(tuple(y), x))))(
        outputs(vector), xs
    )
    expected = jnp.einsum("tip,tij,tjq->pq", jacobian, curvature, jacobian)
    assert_same(found.matrix, expected, rtol=1e-10)
    assert_same(found.value, compiled(total)(vector), rtol=1e-10)
    assert_same(found.grad, unravel(compiled(jax.grad(total))(vector)), rtol=1e-10)
    assert found.carry[1] == 200


def filtered(params, carry, x):
    mean, total = carry
    error = x - mean
    return mean + jax.nn.sigmoid(params["rate"]) * error, total + jnp.cosh(
        params["scale"]
    ) * error**2


def test_stretches_of_a_stream_are_the_whole():
    params, xs = {"rate": np.array(0.3), "scale": np.array(0.5)}, series(60)

    def whole(params):
        step = lambda carry, x: (filtered(params, carry, x), None)
        return jax.lax.scan(step, (jnp.zeros(()), jnp.zeros(())), xs)[0]

    carry, sensitivity = (np.zeros(()), np.zeros(())), None
    for stretch in jnp.split(xs, [10, 11, 40]):
        carry, sensitivity = rtrl.advance(filtered, params, carry, sensitivity, stretch)
    assert_same(carry, whole(params))
    assert_same(sensitivity, compiled(jax.jacfwd(whole))(params))
    attached = compiled(jax.jacrev(lambda p: rtrl.attach(carry, sensitivity, p)))(params)
    assert_same(attached, sensitivity)


def test_moving_parameters_are_shifted_together():
    """What a sensitivity means where parameters were updated on the way."""
    xs = series(60)
    moved = [{"rate": np.array(r), "scale": np.array(1 - r)} for r in (0.1, 0.5, 0.8)]

    def shifted(shift):
        carry = jnp.zeros(()), jnp.zeros(())
        for params, stretch in zip(moved, jnp.split(xs, 3), strict=True):
            params = jax.tree.map(jnp.add, params, shift)
            for x in stretch:
                carry = filtered(params, carry, x)
        return carry

    carry, sensitivity = (np.zeros(()), np.zeros(())), None
    for params, stretch in zip(moved, jnp.split(xs, 3), strict=True):
        carry, sensitivity = rtrl.advance(filtered, params, carry, sensitivity, stretch)
    zero = {"rate": np.zeros(()), "scale": np.zeros(())}
    assert_same(sensitivity, compiled(jax.jacfwd(shifted))(zero))


def test_the_choice():
    assert rtrl.recommended(num_states=8, num_params=4, length=1_000) == "rtrl.scan"
    assert rtrl.recommended(num_states=9, num_params=60, length=10_000) == "lax.scan"
    assert rtrl.recommended(num_states=9, num_params=60, length=10_000_000) == "rtrl.scan"
    assert rtrl.recommended(num_states=9, num_params=128, length=10_000_000) == "checkpoint"
