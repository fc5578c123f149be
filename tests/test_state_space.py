"""Likelihoods of long series: against other libraries, and the same draws by both kinds of scan."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from cheap import compiled, fitted, key_of
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, init_to_value
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import potential_energy, unconstrain_fn
from scipy.integrate import solve_ivp
from scipy.stats import multivariate_normal, norm
from statsmodels.tsa.statespace.structural import UnobservedComponents

from probbp.models import state_space
from probbp.ops import rtrl

Y = np.cumsum(np.random.default_rng(0).normal(size=60)) / 4

# name -> (model, its options, values of its sites)
MODELS = {
    "garch": (
        state_space.garch,
        {"first_scale": 1.3},
        {"mu": 0.1, "alpha0": 0.3, "alpha1": 0.2, "share": 0.625},
    ),
    "local_linear_trend": (
        state_space.local_linear_trend,
        {},
        {"sigma": 0.5, "sigma_level": 0.2, "sigma_slope": 0.1},
    ),
    "hidden_markov": (
        state_space.hidden_markov,
        {},
        {
            "transition": np.array([[0.8, 0.2], [0.3, 0.7]]),
            "mu": np.array([-0.5, 1.0]),
            "sigma": np.array([0.5, 1.5]),
        },
    ),
    "pendulum": (
        state_space.pendulum,
        {"time_step": 0.2, "num_substeps": 4},
        {"omega": 1.5, "zeta": 0.1, "angle": 1.0, "velocity": 0.5, "sigma": 0.7},
    ),
}

every_model = pytest.mark.parametrize("name", MODELS)


def log_likelihood(name, y, **more):
    model, options, values = MODELS[name]

    @compiled
    def run(y):
        sites = trace(substitute(seed(model, 0), values)).get_trace(y, **options, **more)
        return sites["y"]["fn"].log_factor

    return float(run(y))


def test_garch_is_the_recursion():
    values = MODELS["garch"][2]
    variance, total = 1.3**2, 0.0
    beta1 = values["share"] * (1 - values["alpha1"])
    for y in Y:
        total += norm(values["mu"], variance**0.5).logpdf(y)
        shock = (y - values["mu"]) ** 2
        variance = values["alpha0"] + values["alpha1"] * shock + beta1 * variance
    np.testing.assert_allclose(log_likelihood("garch", Y), total, rtol=1e-10)


@pytest.mark.parametrize("missing", [[], [3, 4, 40]])
def test_the_trend_is_statsmodels(missing):
    values, y = MODELS["local_linear_trend"][2], Y.copy()
    y[missing] = np.nan
    peer = UnobservedComponents(y, "local linear trend", loglikelihood_burn=0)
    peer.initialize_known(np.zeros(2), 100 * np.eye(2))
    variances = [values[k] ** 2 for k in ("sigma", "sigma_level", "sigma_slope")]
    expected = peer.loglike(variances)
    np.testing.assert_allclose(log_likelihood("local_linear_trend", y), expected, rtol=1e-8)


def test_the_trend_is_one_large_gaussian():
    values, y = MODELS["local_linear_trend"][2], Y[:6]
    step, noise = np.array([[1.0, 1.0], [0.0, 1.0]]), np.diag([0.2**2, 0.1**2])
    powers = [np.linalg.matrix_power(step, i) for i in range(6)]
    covariance = np.eye(6) * values["sigma"] ** 2
    for i, j in product(range(6), range(6)):
        joint = powers[i] @ (100 * np.eye(2)) @ powers[j].T
        joint += sum(powers[i - 1 - k] @ noise @ powers[j - 1 - k].T for k in range(min(i, j)))
        covariance[i, j] += joint[0, 0]
    expected = multivariate_normal(np.zeros(6), covariance).logpdf(y)
    np.testing.assert_allclose(log_likelihood("local_linear_trend", y), expected, rtol=1e-8)


def test_regimes_are_summed_over():
    values, y = MODELS["hidden_markov"][2], Y[:7]
    terms = []
    for path in product(range(2), repeat=7):
        log_density = np.log(0.5) + norm(values["mu"][path[0]], values["sigma"][path[0]]).logpdf(
            y[0]
        )
        for now, then, value in zip(path[1:], path, y[1:], strict=False):
            log_density += np.log(values["transition"][then, now])
            log_density += norm(values["mu"][now], values["sigma"][now]).logpdf(value)
        terms.append(log_density)
    expected = np.logaddexp.reduce(terms)
    np.testing.assert_allclose(log_likelihood("hidden_markov", y), expected, rtol=1e-10)


def test_the_pendulum_is_scipy_s():
    values = MODELS["pendulum"][2]

    def slope(_, state):
        omega, zeta = values["omega"], values["zeta"]
        return state[1], -(omega**2) * np.sin(state[0]) - 2 * zeta * omega * state[1]

    times = 0.2 * np.arange(len(Y))
    start = values["angle"], values["velocity"]
    angles = solve_ivp(slope, (0, times[-1]), start, t_eval=times, rtol=1e-10, atol=1e-10).y[0]
    expected = norm(angles, values["sigma"]).logpdf(Y).sum()
    np.testing.assert_allclose(log_likelihood("pendulum", Y), expected, rtol=1e-6)


@every_model
def test_the_gradient_is_that_of_lax_scan(name):
    model, options, values = MODELS[name]

    def value_and_grad(scan):
        @compiled
        def run(y):
            fixed = seed(partial(model, scan=scan, **options), 0)
            start = unconstrain_fn(fixed, (y,), {}, values)
            return jax.value_and_grad(partial(potential_energy, fixed, (y,), {}))(start)

        return run(Y)

    (value, grad), (expected, expected_grad) = map(value_and_grad, (rtrl.scan, jax.lax.scan))
    assert value == expected
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9), grad, expected_grad)


@every_model
def test_single_precision(name):
    """Data of single precision beside NumPyro's doubles."""
    double = log_likelihood(name, Y)
    np.testing.assert_allclose(log_likelihood(name, Y.astype(np.float32)), double, rtol=1e-4)


def returns(length, seed=0):
    """Draw a GARCH series."""
    rng, variance, y = np.random.default_rng(seed), 1.0, []
    for noise in rng.normal(size=length):
        y.append(variance**0.5 * noise)
        variance = 0.05 + 0.1 * y[-1] ** 2 + 0.85 * variance
    return np.array(y)


@pytest.mark.slow
@pytest.mark.optimised  # without, the two trajectories round apart
def test_nuts_draws_the_same():
    def draws(scan):
        kernel = NUTS(partial(state_space.garch, scan=scan))
        mcmc = MCMC(kernel, num_warmup=20, num_samples=30, progress_bar=False)
        mcmc.run(key_of(0), returns(5_000))
        return mcmc.get_samples()

    ours, plain = draws(rtrl.scan), draws(jax.lax.scan)
    for name, expected in plain.items():
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=1e-6 * expected.std())


@pytest.mark.slow
def test_svi_draws_the_same_losses():
    def losses(scan):
        model = partial(state_space.garch, scan=scan)
        svi = SVI(model, AutoNormal(model), optax.adam(0.02), Trace_ELBO())
        return compiled(lambda y: fitted(svi, key_of(0), 300, y)[1])(returns(500))

    ours = losses(rtrl.scan)
    np.testing.assert_allclose(ours, losses(jax.lax.scan), rtol=1e-6)
    assert ours[-50:].mean() < ours[:50].mean()


# ---------------------------------------------------------------------------------------
# Streams.


def volatility(params, variance, y):
    density = -0.5 * (y**2 / variance + jnp.log(variance))
    return params["alpha0"] + params["alpha1"] * y**2 + params["beta1"] * variance, density


def streaming(y, num_data):
    params = {
        "alpha0": numpyro.sample("alpha0", dist.HalfNormal(1.0)),
        "alpha1": numpyro.sample("alpha1", dist.Beta(1.0, 2.0)),
    }
    share = numpyro.sample("share", dist.Uniform())
    params["beta1"] = numpyro.deterministic("beta1", share * (1 - params["alpha1"]))
    total = state_space.streamed("filter", volatility, params, jnp.ones(()), y)
    numpyro.factor("y", num_data / len(y) * total)


def test_stretches_add_up_to_the_series():
    """Their log likelihoods, and the gradients, which know how each stretch's start came about."""
    y = returns(100)
    params = {"alpha0": 0.2, "alpha1": 0.1, "beta1": 0.7}

    def stretch(params, kept, y):
        with trace() as sites, substitute(data={"filter": kept} if kept else {}):
            total = state_space.streamed("filter", volatility, params, jnp.ones(()), y)
        return total, sites["filter"]["value"]

    def whole(params):
        def step(carry, y):
            variance, density = volatility(params, carry[0], y)
            return (variance, carry[1] + density), None

        return jax.lax.scan(step, (1.0, 0.0), y)[0][1]

    value, grad, kept = 0.0, jax.tree.map(np.zeros_like, params), None
    for part in np.split(y, [30, 31]):
        (total, kept), here = compiled(jax.value_and_grad(stretch, has_aux=True))(
            params, kept, part
        )
        value, grad = value + total, jax.tree.map(np.add, grad, here)
    expected, expected_grad = compiled(jax.value_and_grad(whole))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10), grad, expected_grad)


@pytest.mark.slow
def test_svi_follows_a_stream():
    """Stretch by stretch the guide comes nearer to what made the series; memory is two numbers."""
    y = returns(100_000)
    start = {"alpha0": 0.4, "alpha1": 0.3, "share": 0.5}
    guide = AutoNormal(streaming, init_loc_fn=init_to_value(values=start))
    svi = SVI(streaming, guide, optax.adam(0.05), Trace_ELBO())
    state = svi.init(key_of(0), y[:100], len(y))

    @jax.jit
    def run(state, stretches):
        return jax.lax.scan(lambda s, part: svi.update(s, part, len(y)), state, stretches)

    state, losses = run(state, y.reshape(-1, 100))
    assert np.isfinite(losses).all()
    for name, truth in (("alpha0", 0.05), ("share", 0.85 / 0.9)):
        median = guide.median(svi.get_params(state))[name]
        assert abs(median - truth) < 0.6 * abs(start[name] - truth)
    kept = state.mutable_state["filter"]
    assert {leaf.shape for leaf in jax.tree.leaves(kept)} == {()}
    assert kept["sensitivity"]["beta1"] > 0
