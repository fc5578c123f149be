"""The learned surrogate transition: exact whatever was learned, and what it learns."""

from functools import partial
from typing import NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from invariance import FAIL, PASS, largest_z_of
from scipy import optimize
from tables import members
from targets import TARGETS, anisotropic

import probbp
from probbp.samplers.surrogate import inner, kernel, polynomial, regression, transport, warmup
from probbp.samplers.surrogate.kernel import WALK, whiten
from probbp.samplers.surrogate.least_squares import least_squares
from probbp.samplers.surrogate.transport import Transport

NUM_CHAINS, NUM_STEPS = 20_000, 8
KEY = jax.random.key(0)


def absurd_transport(dim, seed=0):
    """Return a map that has nothing to do with any target, every part of it in use."""
    rng = np.random.default_rng(seed)
    num = max(1, dim // 3)
    drivers = np.arange(dim)[::-1][:num]
    is_driver = np.isin(np.arange(dim), drivers)
    factor = np.tril(0.3 * rng.normal(size=(dim, dim))) * (is_driver[:, None] == is_driver)
    np.fill_diagonal(factor, rng.uniform(0.6, 1.3, dim))
    num_features = (num + 1) * (num + 2) // 2
    marginals = np.stack(
        [
            0.2 * rng.normal(size=dim),
            rng.uniform(0.8, 1.2, dim),
            0.3 * rng.normal(size=dim),
            rng.uniform(0.8, 1.2, dim),
        ]
    )
    mean = np.where(is_driver, 0, 0.3 * rng.normal(size=(num_features, dim)))
    log_scale = np.where(is_driver, 0, 0.4 * rng.normal(size=(num, dim)))
    return jax.tree.map(
        jnp.asarray,
        Transport(
            0.2 * rng.normal(size=dim),
            rng.uniform(0.7, 1.5, dim),
            0.1 * rng.normal(size=dim),
            factor,
            np.linalg.inv(factor),
            marginals,
            drivers,
            np.ones(num, bool),
            mean,
            log_scale,
        ),
    )


def absurd_surrogate(dim, seed=0, degree=4, size=1.0):
    """Return a polynomial that has nothing to do with any target."""
    rng = np.random.default_rng(seed)
    parts = [
        size * rng.normal(size=(polynomial.num_monomials(dim, k) - (k > 0) * previous)) / 4**k
        for k in range(degree + 1)
        for previous in [polynomial.num_monomials(dim, k - 1) if k else 0]
    ]
    return polynomial.from_coefficients(jnp.asarray(np.concatenate(parts)), dim, degree)


class Setting(NamedTuple):
    """Parameters under which a bug shows: a coarse inner step, a heavy walk."""

    step_size: float = 0.45
    weights: tuple = (0.4, 0.2, 0.2, 0.2)
    size: float = 1.0
    num_steps: int = NUM_STEPS


COARSE = Setting(step_size=1.5, weights=(0.8, 0.05, 0.05, 0.1), size=5.0)
ROUGH = Setting(step_size=0.8, weights=(0.9, 0.0, 0.0, 0.1), size=5.0, num_steps=20)
HEAVY_WALK = Setting(weights=(0.2, 0.05, 0.05, 0.7), size=2.0)


def absurd(target, setting, seed=0):
    return probbp.surrogate(
        target.logdensity_fn,
        setting.step_size,
        absurd_transport(target.dim, seed),
        absurd_surrogate(target.dim, seed, min(4, 20 // target.dim), setting.size),
        setting.weights,
    )


# ---------------------------------------------------------------------------------------
# Exactness.


@pytest.mark.parametrize(
    ("seed", "dtype", "name", "setting"),
    [
        (0, "float64", "g2", ROUGH),
        (1, "float32", "f2", COARSE),
        (2, "float64", "mix", HEAVY_WALK),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (3, "float64", "f10", Setting()),
                (4, "float64", "mix", COARSE),
                (5, "float32", "g2", Setting()),
            )
        ),
    ],
)
def test_the_target_is_invariant_under_absurd_maps_and_surrogates(seed, dtype, name, setting):
    target = TARGETS[name]
    algorithm = absurd(target, setting, seed)
    assert (
        largest_z_of(jax.random.key(seed), algorithm, target, NUM_CHAINS, NUM_STEPS, dtype) < PASS
    )


def test_the_target_is_invariant_under_no_map_and_no_surrogate():
    target = TARGETS["mix"]
    algorithm = probbp.surrogate(target.logdensity_fn)
    assert largest_z_of(KEY, algorithm, target, NUM_CHAINS, NUM_STEPS) < PASS


def patched(module, name, replacement):
    """Return a builder of the algorithm with a function of a module replaced."""

    def build(monkeypatch, target, setting):
        monkeypatch.setattr(module, name, replacement)
        return absurd(target, setting)

    return build


def with_state_dependent(parameter):
    """Return a builder of an algorithm whose parameters depend on its state."""

    def build(monkeypatch, target, setting):
        right = absurd(target, setting)

        def step(rng_key, state):
            parameters = {
                "step_size": setting.step_size,
                "transport": absurd_transport(target.dim),
                "surrogate": absurd_surrogate(target.dim, size=setting.size),
                "weights": jnp.asarray(setting.weights),
            }
            name, change = parameter
            parameters[name] = change(parameters[name], state)
            if name == "transport":
                state = whiten(parameters[name], state.position, state.logdensity)
            return kernel.build_kernel()(rng_key, state, target.logdensity_fn, **parameters)

        return blackjax.SamplingAlgorithm(right.init, step)

    return build


def without_the_surrogate(kind, state, proposal, here, there):
    return kernel.log_density(proposal) - kernel.log_density(state)


def with_the_wrong_sign(kind, state, proposal, here, there):
    change = kernel.surrogate_logdensity(there) - kernel.surrogate_logdensity(here)
    ratio = kernel.log_density(proposal) - kernel.log_density(state)
    return ratio + jnp.where(kind == WALK, 0, change)


def with_the_surrogate_on_walks(kind, state, proposal, here, there):
    change = kernel.surrogate_logdensity(there) - kernel.surrogate_logdensity(here)
    return kernel.log_density(proposal) - kernel.log_density(state) - change


def always_accept(rng_key, log_ratio, point, end):
    return end, jnp.ones_like(log_ratio)


def a_kick_too_few(predict, point, momentum, step_size):
    momentum = momentum + step_size / 2 * point.grad
    cos, sin = jnp.cos(step_size), jnp.sin(step_size)
    rotated = cos * point.whitened + sin * momentum
    return inner.point_at(predict, rotated), cos * momentum - sin * point.whitened


def long_then_short(rng_key, predict, point, step_size, num_transitions, num_steps):
    rates = []
    for i, key in enumerate(jax.random.split(rng_key, num_transitions)):
        size = step_size * (1.0 if i == 0 else 0.1)
        point, rate = inner.inner_transition(key, predict, point, size, num_steps)
        rates.append(rate)
    return point, jnp.mean(jnp.stack(rates))


def stale(part):
    """Return a builder of an algorithm that took a part of its state from an older map."""

    def build(monkeypatch, target, setting):
        right = absurd(target, setting)
        old = absurd_transport(target.dim, seed=1)

        def init(position, rng_key=None):
            state = right.init(position)
            older = whiten(old, position, state.logdensity)
            return state._replace(**{name: getattr(older, name) for name in part})

        return blackjax.SamplingAlgorithm(init, right.step)

    return build


WRONG = {
    "no surrogate ratio": (patched(kernel, "log_ratio", without_the_surrogate), "mix", Setting()),
    "sign of the ratio": (patched(kernel, "log_ratio", with_the_wrong_sign), "mix", Setting()),
    "no log determinant": (
        patched(kernel, "log_density", lambda state: state.logdensity),
        "mix",
        Setting(),
    ),
    "step size from the state": (
        with_state_dependent(("step_size", lambda h, s: h * (0.2 + jnp.tanh(s.whitened[0]) ** 2))),
        "mix",
        Setting(),
    ),
    "kind from the state": (
        with_state_dependent(
            (
                "weights",
                lambda w, s: jnp.where(s.whitened[0] > 0, w, jnp.roll(w, 1)),
            )
        ),
        "mix",
        Setting(),
    ),
    "map from the state": (
        with_state_dependent(
            ("transport", lambda t, s: t._replace(loc=t.loc + jnp.tanh(s.position)))
        ),
        "mix",
        Setting(),
    ),
    "inner transitions not tested": (patched(inner, "accept_inner", always_accept), "mix", COARSE),
    "a kick too few": (patched(inner, "leapfrog", a_kick_too_few), "g2", COARSE),
    "surrogate ratio on walks": (
        patched(kernel, "log_ratio", with_the_surrogate_on_walks),
        "mix",
        HEAVY_WALK,
    ),
    "inner steps of two sizes in a fixed order": (
        patched(kernel, "inner_transitions", long_then_short),
        "g2",
        ROUGH,
    ),
    "stale log determinant": (stale(["log_det"]), "mix", Setting()),
    "stale whitened point": (stale(["whitened", "log_det"]), "mix", Setting()),
}


@members(WRONG, quick=list(WRONG)[:2])
def test_the_invariance_test_rejects_every_planted_bug(name, monkeypatch):
    build, target_name, setting = WRONG[name]
    target = TARGETS[target_name]
    algorithm = build(monkeypatch, target, setting)
    assert largest_z_of(KEY, algorithm, target, NUM_CHAINS, setting.num_steps) > FAIL


# ---------------------------------------------------------------------------------------
# The kernel as a host's.


def test_one_evaluation_a_step():
    calls = []

    def counted(x):
        jax.debug.callback(lambda: calls.append(1))
        return -jnp.sum(x**2) / 2

    algorithm = probbp.surrogate(counted, 0.4, absurd_transport(3), absurd_surrogate(3))
    state = algorithm.init(jnp.ones(3))
    jax.effects_barrier()
    calls.clear()
    jax.block_until_ready(
        jax.lax.scan(lambda s, k: (algorithm.step(k, s)[0], None), state, jax.random.split(KEY, 50))
    )
    jax.effects_barrier()
    assert len(calls) == 50


def test_the_log_density_is_traced_once_and_not_differentiated():
    @jax.custom_jvp
    def no_derivative(x):
        return -jnp.sum(x**2) / 2

    @no_derivative.defjvp
    def _(primals, tangents):
        raise AssertionError("differentiated")

    algorithm = probbp.surrogate(no_derivative, 0.4, absurd_transport(2), absurd_surrogate(2))
    jax.jit(algorithm.step)(KEY, algorithm.init(jnp.ones(2)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_positions_keep_structure_and_dtype(dtype):
    """Whatever the dtype of what was learned, which is double here."""
    position = {"a": jnp.ones((2, 2), dtype), "b": jnp.zeros((), dtype)}
    algorithm = probbp.surrogate(
        lambda p: -jnp.sum(p["a"] ** 2) - p["b"] ** 2, 0.4, absurd_transport(5), absurd_surrogate(5)
    )
    state = algorithm.init(position)
    step = jax.jit(algorithm.step)
    new, info = step(KEY, state)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    leaves = jax.tree.leaves(new)
    assert all(leaf.dtype == dtype for leaf in leaves)
    assert [leaf.shape for leaf in leaves] == [leaf.shape for leaf in jax.tree.leaves(state)]
    assert all(info._asdict()[name].shape == () for name in info._fields if name != "proposal")
    step(KEY, new)
    assert step._cache_size() == 1


def test_info_tells_the_weights():
    """Target over surrogate, at the state that the step leads to and at the proposal."""
    target, t, g = TARGETS["mix"], absurd_transport(2), absurd_surrogate(2)
    algorithm = probbp.surrogate(target.logdensity_fn, 0.4, t, g)
    state = algorithm.init(jnp.zeros(2))
    for key in jax.random.split(KEY, 20):
        state, info = algorithm.step(key, state)
        for at, log_weight in (
            (state, info.log_weight),
            (info.proposal, info.proposal_log_weight),
        ):
            x, log_det = transport.forward(t, at.whitened)
            g_z = g.value_and_grad(at.whitened)[0] - at.whitened @ at.whitened / 2
            np.testing.assert_allclose(x, at.position, atol=1e-12)
            np.testing.assert_allclose(target.logdensity_fn(x) + log_det - g_z, log_weight)


def test_a_log_density_that_is_no_number_is_a_rejection():
    algorithm = probbp.surrogate(lambda x: jnp.where(x[0] > 0.5, jnp.nan, -jnp.sum(x**2) / 2))
    state = algorithm.init(jnp.zeros(2))
    _, (states, infos) = jax.lax.scan(
        lambda s, k: (lambda out: (out[0], out))(algorithm.step(k, s)),
        state,
        jax.random.split(KEY, 200),
    )
    assert jnp.all(states.position[:, 0] <= 0.5)
    assert jnp.any(infos.is_divergent)
    assert not jnp.any(infos.is_divergent & infos.is_accepted)


@pytest.mark.slow
def test_blackjax_smc_takes_it():
    t, g = absurd_transport(2), absurd_surrogate(2, size=0.3)
    smc = blackjax.adaptive_tempered_smc(
        logprior_fn=lambda x: -jnp.sum(x**2) / 2,
        loglikelihood_fn=lambda x: -jnp.sum((x - 2) ** 2) / 2,
        mcmc_step_fn=partial(probbp.surrogate.build_kernel(), transport=t, surrogate=g),
        mcmc_init_fn=partial(probbp.surrogate.init, transport=t),
        mcmc_parameters={"step_size": jnp.array([0.4])},
        resampling_fn=blackjax.smc.resampling.systematic,
        target_ess=0.7,
        num_mcmc_steps=10,
    )
    state, step = smc.init(jax.random.normal(KEY, (2000, 2))), jax.jit(smc.step)
    for i in range(50):
        if state.tempering_param >= 1:
            break
        state, _ = step(jax.random.key(i), state)
    assert state.tempering_param >= 1
    # N(1, 1/2); resampling leaves an effective size of some hundreds.
    np.testing.assert_allclose(state.particles.mean(0), 1, atol=4.5 * 0.7 / 500**0.5)
    np.testing.assert_allclose(state.particles.var(0), 0.5, atol=4.5 * 0.7 / 500**0.5)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"step_size": 0.0}, ValueError, "positive"),
        ({"weights": (0.5, 0.5)}, ValueError, "4 probabilities"),
        ({"weights": (0.5, 0.5, 0.5, 0.5)}, ValueError, "sum to one"),
        ({"metric": "dense"}, TypeError, "no option"),
    ],
)
def test_bad_options_raise(options, error, words):
    with pytest.raises(error, match=words):
        probbp.surrogate(lambda x: -jnp.sum(x**2), **options)


# ---------------------------------------------------------------------------------------
# What is learned: the map, the polynomial, the regression.


@pytest.mark.parametrize("dim", [5, *(pytest.param(d, marks=pytest.mark.slow) for d in (1, 2, 10))])
@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_the_map_is_a_bijection(dim, seed):
    t = absurd_transport(dim, seed) if dim > 1 else transport.fit(jax.random.gamma(KEY, 2, (99, 1)))
    z = jax.random.normal(jax.random.key(seed), (dim,))
    x, log_det = transport.forward(t, z)
    back, log_det_back = transport.inverse(t, x)
    jacobian = jax.jacfwd(lambda z: transport.forward(t, z)[0])(z)
    np.testing.assert_allclose(back, z, atol=1e-9)
    np.testing.assert_allclose(log_det, jnp.linalg.slogdet(jacobian)[1], atol=1e-9)
    np.testing.assert_allclose(log_det_back, log_det, atol=1e-9)


def test_the_affine_map():
    factor = jnp.linalg.cholesky(jnp.asarray(anisotropic(4).covariance))
    t = transport.affine(jnp.arange(4.0), factor)
    z = jax.random.normal(KEY, (4,))
    x, log_det = transport.forward(t, z)
    np.testing.assert_allclose(x, jnp.arange(4) + factor @ z)
    np.testing.assert_allclose(log_det, jnp.linalg.slogdet(factor)[1], atol=1e-9)
    np.testing.assert_allclose(transport.inverse(t, x)[0], z, atol=1e-12)


def funnel_draws(num, dim):
    key_v, key_x = jax.random.split(KEY)
    v = jax.random.normal(key_v, (num, 1))
    x = jnp.exp(v / 2) * jax.random.normal(key_x, (num, dim - 1))
    return jnp.concatenate([x, v], axis=1)


def banana_draws(num, dim):
    z = jax.random.normal(KEY, (num, dim))
    return z.at[:, 0].set(z[:, 1] ** 2 + 0.3 * z[:, 0])


@pytest.mark.parametrize(
    ("draw", "driver"), [(funnel_draws, 3), pytest.param(banana_draws, 1, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
def test_the_map_finds_its_driver_and_whitens(draw, driver, dtype):
    """New draws come out as a Gaussian's, up to the inflation of the base."""
    draws = draw(6000, 4).astype(dtype)
    t = jax.jit(transport.fit)(draws[:3000])
    assert list(t.drivers[t.is_used]) == [driver]
    z = transport.INFLATION * jax.vmap(partial(transport.inverse, t))(draws[3000:])[0]
    assert z.dtype == dtype
    error = 1 / 3000**0.5
    for moment, expected, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        # Draws and fit have errors of the same size; the marginals are shrunk.
        limit = 4.5 * (2 * spread) ** 0.5 * error + 0.1
        assert jnp.all(jnp.abs(jnp.mean(z**moment, axis=0) - expected) < limit), moment
    products = z.T @ z / len(z) - jnp.diag(jnp.mean(z**2, axis=0))
    assert jnp.all(jnp.abs(products) < 0.15)
    # What the driver did to the others' squares is gone.
    others = np.setdiff1d(np.arange(4), [driver])
    squares = jnp.corrcoef(z[:, driver] ** 2, z[:, others].T ** 2)[0, 1:]
    assert jnp.all(jnp.abs(squares) < 0.15)


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
def test_values_refine_the_map_where_no_draw_has_been(dtype):
    """A funnel of whose neck no draw is: values elsewhere say where it leads."""

    def logdensity_fn(x):
        return -(x[0] ** 2) / 18 - jnp.sum(x[1:] ** 2) * jnp.exp(-x[0]) / 2 - 3 * x[0] / 2

    noise = jax.random.normal(KEY, (400, 4), dtype)
    v = 3 * jnp.maximum(noise[:, :1], -0.3 - 0.2 * jnp.abs(noise[:, 1:2]))
    x = jnp.concatenate([v, noise[:, 1:] * jnp.exp(v / 2)], axis=1)
    values = jax.vmap(logdensity_fn)(x).astype(dtype).at[0].set(jnp.nan)
    weights = jnp.ones(400, dtype).at[0].set(0)
    first = transport.fit(x, inflation=1.0)
    refined = transport.refine(first, x, values, weights)
    assert refined.loc.dtype == dtype
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(refined))

    def spread(t, v):
        z = jax.random.normal(jax.random.key(1), (200, 3), dtype)
        x = jnp.concatenate([jnp.full((200, 1), v, dtype), z * np.exp(v / 2)], axis=1)
        z, log_det = jax.vmap(partial(transport.inverse, t))(x)
        return jnp.std(jax.vmap(logdensity_fn)(x) + log_det + jnp.sum(z**2, axis=1) / 2)

    if dtype == "float64":
        assert spread(refined, 3.0) < 0.05 < 0.3 < spread(first, 3.0)
        assert spread(refined, -6.0) < 50 < 1e3 < spread(first, -6.0)
    else:  # rounding ends the search early
        assert spread(refined, 3.0) < spread(first, 3.0)


@pytest.mark.slow
def test_what_the_map_leaves_widens_it():
    """A Gaussian that fits is kept as it is, one that does not is a tenth wider."""
    z = jax.random.normal(KEY, (400, 3))
    first = transport.fit(z, inflation=1.0)
    values = -jnp.sum(z**2, axis=1) / 2
    for noise, width in ((0.0, 1.0), (1.0, 1.1)):
        t = transport.refine(first, z, values + noise * jnp.cos(9 * z[:, 0]), jnp.ones(400))
        x, _ = jax.vmap(partial(transport.forward, t))(z)
        found = jnp.std(x, axis=0) / jnp.std(z, axis=0)
        np.testing.assert_allclose(found, width, rtol=0.01 + 0.05 * noise)


def bump(params, point):
    """A Gaussian bump with noise, less what the data say."""
    x, y = point
    return 3 * (params["height"] * jnp.exp(-((x - params["loc"]) ** 2)) - y)


def test_least_squares_against_scipy():
    """The loss is SciPy's soft_l1; outliers count little."""
    rng = np.random.default_rng(0)
    x = np.linspace(-2, 2, 40)
    y = 1.5 * np.exp(-((x - 0.4) ** 2)) + 0.02 * rng.normal(size=40)
    y[::9] += 2
    weights = np.full(40, 1 / 32)
    weights[::5] = 0
    first = {"height": jnp.array(1.0), "loc": jnp.array(0.0)}
    found, start, end = jax.jit(partial(least_squares, bump))(
        first, (jnp.asarray(x), jnp.asarray(y)), jnp.asarray(weights)
    )

    def residuals(p):
        r = np.asarray(bump({"height": p[0], "loc": p[1]}, (x, y)))
        return (r - weights @ r)[weights > 0]

    expected = optimize.least_squares(residuals, [1.0, 0.0], loss="soft_l1").x
    np.testing.assert_allclose([found["height"], found["loc"]], expected, atol=3e-3)
    np.testing.assert_allclose(end[weights > 0], residuals(expected), atol=0.1)
    np.testing.assert_allclose(start[weights > 0], residuals([1.0, 0.0]), atol=1e-6)
    # A point without weight is predicted, not fitted.
    there = jnp.asarray(y).at[0].add(100)
    again, *_ = least_squares(bump, first, (jnp.asarray(x), there), jnp.asarray(weights))
    np.testing.assert_allclose(again["loc"], found["loc"], rtol=1e-6)


def test_least_squares_of_more_parameters_than_points():
    """Zero is reached, by the smallest change."""
    rng = np.random.default_rng(0)
    matrix, target = jnp.asarray(rng.normal(size=(10, 30))), jnp.asarray(rng.normal(size=10))
    found, _, end = least_squares(
        lambda p, point: point[0] @ p - point[1], jnp.zeros(30), (matrix, target), jnp.full(10, 0.1)
    )
    assert jnp.abs(end).max() < 1e-3
    centered = matrix - matrix.mean(axis=0)
    smallest = jnp.linalg.pinv(centered) @ (target - target.mean())
    np.testing.assert_allclose(found, smallest, atol=1e-3)


def test_an_inflated_map():
    t = absurd_transport(6)
    z = jax.random.normal(KEY, (6,))
    x, log_det = transport.forward(transport.inflate(t, 1.3), z)
    expected, plain = transport.forward(t, 1.3 * z)
    np.testing.assert_allclose(x, expected)
    np.testing.assert_allclose(log_det, plain + 6 * np.log(1.3))


def test_a_gaussian_has_no_driver():
    t = transport.fit(anisotropic(6).draw(KEY, 2000))
    assert not jnp.any(t.is_used)
    np.testing.assert_array_equal(t.marginals[2:], [[0.0] * 6, [1.0] * 6])


@pytest.mark.optimised  # the fault is of XLA's optimisations
def test_degrees_that_were_not_chosen_are_zero_as_constants_too():
    """XLA left what multiplies a tensor of zeros uninitialised, for many points at once."""
    rng = np.random.default_rng(0)
    tensors = [jnp.asarray(rng.normal(size=(2,) * k)) for k in range(5)]
    chosen = polynomial.Polynomial(tuple(tensors))
    padded = polynomial.Polynomial((*tensors, jnp.zeros((2,) * 5), jnp.zeros((2,) * 6)))
    z = jnp.asarray(rng.normal(size=(10_000, 2)))
    expected = jax.jit(jax.vmap(polynomial.Polynomial.value_and_grad, (None, 0)))(chosen, z)[0]
    for _ in range(30):
        found = jax.jit(jax.vmap(lambda z: inner.predictor(padded)(z)[0]))(z)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("dim", "degree"),
    [
        (4, 3),
        *(
            pytest.param(*sizes, marks=pytest.mark.slow)
            for sizes in ((1, 6), (3, 6), (10, 4), (20, 2))
        ),
    ],
)
def test_the_polynomial_and_its_gradient(dim, degree):
    coefficients = jax.random.normal(KEY, (polynomial.num_monomials(dim, degree),))
    g = polynomial.from_coefficients(coefficients, dim, degree)
    z = jax.random.normal(jax.random.key(1), (dim,))
    value, grad = g.value_and_grad(z)
    expected = lambda z: polynomial.monomials(polynomial.squash(z), degree) @ coefficients
    np.testing.assert_allclose(value, expected(z), rtol=1e-9)
    np.testing.assert_allclose(grad, jax.grad(expected)(z), rtol=1e-9, atol=1e-9)
    for tensor in g.tensors[2:]:
        np.testing.assert_array_equal(tensor, jnp.swapaxes(tensor, 0, -1))


def test_degrees():
    assert [polynomial.largest_degree(d) for d in (1, 4, 10, 16, 17, 100, 101)] == [
        *(6, 6, 4, 3, 2, 2, 0)
    ]


@pytest.mark.parametrize(
    ("dtype", "error"), [("float64", 1e-4), pytest.param("float32", 2e-2, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("degree", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_the_regression_recovers_a_polynomial(degree, dtype, error):
    dim, num = 3, 3000
    g = absurd_surrogate(dim, degree=degree)
    z = jax.random.normal(KEY, (num, dim))
    values = jax.vmap(g.value_and_grad)(z)[0] - jnp.sum(z**2, axis=1) / 2
    values = values.at[:5].set(jnp.array([jnp.nan, jnp.inf, -jnp.inf, -1e9, jnp.nan]))
    core = jnp.quantile(values[5:], 0.02)
    fit = jax.jit(partial(regression.fit, anchor_weight=0.0))
    fitted = fit(KEY, z.astype(dtype), values.astype(dtype), core.astype(dtype))
    assert fitted.degree >= degree
    assert fitted.held_out_std < error
    predicted = jax.vmap(fitted.surrogate.value_and_grad)(z.astype(dtype))[0]
    remainder = jax.vmap(g.value_and_grad)(z)[0]
    # The constant is free.
    inside = jnp.all(jnp.abs(z) < 2, axis=1)
    assert jnp.std((predicted - remainder)[inside]) < error


@pytest.mark.slow
def test_a_gaussian_needs_no_polynomial():
    z = jax.random.normal(KEY, (2000, 3))
    fitted = regression.fit(KEY, z, -jnp.sum(z**2, axis=1) / 2, jnp.asarray(-9.0))
    assert fitted.degree == 0
    assert all(jnp.all(tensor == 0) for tensor in fitted.surrogate.tensors)


def test_too_few_points_give_the_base():
    z = jax.random.normal(KEY, (8, 3))
    fitted = regression.fit(KEY, z, -jnp.sum(z**4, axis=1), jnp.asarray(-9.0))
    assert fitted.degree == 0
    assert len(fitted.surrogate.tensors) == 1


def test_the_curvature_of_a_gaussian_is_exact():
    target = anisotropic(12)
    points = 3 * jax.random.normal(KEY, (400, 12)) + 1
    values = jax.vmap(target.logdensity_fn)(points)
    loc, factor = regression.curvature(
        jnp.ones(12), 2 * jnp.eye(12), points, values, jnp.asarray(-jnp.inf)
    )
    np.testing.assert_allclose(loc, 0, atol=1e-4)
    np.testing.assert_allclose(factor @ factor.T, target.covariance, atol=1e-3)


# ---------------------------------------------------------------------------------------
# Warm-up.


def test_stages():
    for num_steps in (0, 1, 28, 29, 100, 1000, 2900):
        plan = warmup.stages(num_steps)
        assert sum(stage.num_steps for stage in plan) == num_steps
        assert plan[-1].kind == "freeze"
        assert len({stage for stage in plan if stage.num_steps}) <= 3
    assert [s.kind for s in warmup.stages(2900) if not s.num_steps] == [
        *["rescale"] * 3,
        *["refit"] * 4,
        "freeze",
    ]


def banana(x):
    return -(x[1] ** 2) / 2 - (x[0] - x[1] ** 2) ** 2 / 0.18


def mild_funnel(x):
    return -(x[0] ** 2) / 2 - 2 * x[0] - jnp.exp(-x[0]) * jnp.sum(x[1:] ** 2) / 2


GAUSSIAN = anisotropic(5)

# name -> (log density, dimension, statistics, their means)
POSTERIORS = {
    "gaussian": (
        GAUSSIAN.logdensity_fn,
        5,
        lambda x: jnp.concatenate([x, x**2]),
        [*[0.0] * 5, *np.diag(GAUSSIAN.covariance)],
    ),
    "banana": (banana, 2, lambda x: jnp.array([*x, x[1] ** 2, x[0] ** 2]), [1, 0, 1, 3.09]),
    "funnel": (
        mild_funnel,
        5,
        lambda x: jnp.array([x[0], x[0] ** 2, x[1], x[1] ** 2 * jnp.exp(-x[0])]),
        [0, 1, 0, 1],
    ),
}


def sampled(rng_key, logdensity_fn, starts, num_warmup, num_draws):
    key_warmup, key_draws = jax.random.split(rng_key)
    states, parameters, report = warmup.adapt(key_warmup, logdensity_fn, starts, num_warmup)
    step = probbp.surrogate(logdensity_fn, **parameters._asdict()).step

    @jax.jit
    @jax.vmap
    def chains(key, state):
        return jax.lax.scan(
            lambda s, k: (lambda out: (out[0], (out[0].position, out[1])))(step(k, s)),
            state,
            jax.random.split(key, num_draws),
        )[1]

    draws, infos = chains(jax.random.split(key_draws, len(states.logdensity)), states)
    return draws, infos, report


@pytest.mark.slow
@pytest.mark.parametrize("name", POSTERIORS)
def test_warm_up_finds_the_posterior(name):
    """By the z-scores of means over chains and batches of draws, and by the rate it predicts."""
    logdensity_fn, dim, statistic, expected = POSTERIORS[name]
    starts = jax.random.uniform(KEY, (8, dim), minval=-2, maxval=2)
    draws, infos, report = sampled(KEY, logdensity_fn, starts, 1450, 1000)
    values = jax.vmap(jax.vmap(statistic))(draws).reshape(8 * 20, 50, -1).mean(axis=1)
    error = jnp.std(values, axis=0) / len(values) ** 0.5
    assert jnp.all(jnp.abs(jnp.mean(values, axis=0) - jnp.asarray(expected)) < PASS * error)
    assert report.num_evaluations == 8 * 1451
    assert report.held_out_std < 0.5
    assert jnp.mean(infos.acceptance_rate[infos.kind == 0]) > 0.6


@pytest.mark.slow
def test_warm_up_counts_its_evaluations():
    """Every one of them, and of a single chain, on a pytree in single precision."""
    calls = []

    def counted(p):
        jax.debug.callback(lambda: calls.append(1))
        return -jnp.sum(p["a"] ** 2) / 2 - (p["b"] - 1) ** 2

    starts = {"a": jnp.ones((1, 2), "float32"), "b": jnp.zeros(1, "float32")}
    states, parameters, report = warmup.adapt(KEY, counted, starts, 300)
    jax.effects_barrier()
    assert len(calls) == report.num_evaluations == 301
    assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(states))
    assert jax.tree.map(jnp.shape, states.position) == {"a": (1, 2), "b": (1,)}
    # The states are whitened by the map that was learned.
    again = jax.vmap(partial(whiten, parameters.transport))(states.position, states.logdensity)
    np.testing.assert_allclose(again.whitened, states.whitened, rtol=1e-5, atol=1e-5)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(parameters))
    np.testing.assert_allclose(jnp.sum(parameters.weights), 1, rtol=1e-6)


def test_a_lost_chain_is_moved_and_counted():
    """A second mode without weight, from which no walk returns."""
    carry = warmup.init(lambda x: -jnp.sum(x**2), jnp.arange(8.0).reshape(4, 2) / 8, 10)
    values = jnp.tile(jnp.array([0.0, -1000.0, -1.0, -2.0]), (10, 1))
    carry = carry._replace(
        history=carry.history._replace(draw_logdensity=values), num_since=jnp.asarray(10)
    )
    moved = warmup.relocate(KEY, carry)
    assert moved.report.num_relocated == 1
    kept = np.array([0, 2, 3])
    np.testing.assert_array_equal(moved.states.position[kept], carry.states.position[kept])
    assert moved.states.position[1].tolist() in carry.states.position[kept].tolist()


@pytest.mark.slow
def test_many_dimensions_take_an_affine_map():
    """Whose curvature comes from values alone."""
    target = anisotropic(24)
    starts = jax.random.normal(KEY, (4, 24))
    _, infos, report = sampled(KEY, target.logdensity_fn, starts, 580, 100)
    assert report.num_evaluations == 4 * 581
    assert jnp.mean(infos.acceptance_rate[infos.kind == 0]) > 0.95
