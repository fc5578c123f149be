"""Simulation-based calibration: right inferences pass, planted wrong ones are found."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.scipy.stats import norm
from scipy import stats
from tables import members

import probbp
from probbp.diagnostics import (
    RankStatistics,
    numpyro_simulator,
    plot_ranks,
    simulation_based_calibration,
    uniformity,
)

# ---------------------------------------------------------------------------------------
# The test of uniformity by itself.


@pytest.mark.parametrize(("num_simulations", "num_draws"), [(5, 3), (4, 6)])
def test_p_value_by_enumeration(num_simulations, num_draws):
    """All outcomes of a small experiment, each as likely: the p-value is their share."""

    def statistic(ranks):
        tails = []
        for threshold in range(1, num_draws + 1):
            below = sum(rank < threshold for rank in ranks)
            law = stats.binom(num_simulations, threshold / (num_draws + 1))
            tails.append(2 * min(law.cdf(below), law.sf(below - 1)))
        return min(tails)

    # The order of the simulations says nothing, so that each outcome once is enough.
    outcomes = list(itertools.combinations_with_replacement(range(num_draws + 1), num_simulations))
    counts = [np.bincount(o, minlength=num_draws + 1) for o in outcomes]
    uniform = np.full(num_draws + 1, 1 / (num_draws + 1))
    ways = np.array([stats.multinomial.pmf(count, num_simulations, uniform) for count in counts])
    statistics = np.array([statistic(o) for o in outcomes])
    exact = [ways[statistics <= s * (1 + 1e-9)].sum() for s in statistics]
    p_values, overall = uniformity(RankStatistics({"x": np.array(outcomes).T}, num_draws))
    assert np.allclose(p_values["x"], exact, rtol=1e-9)
    assert overall == min(1.0, len(outcomes) * p_values["x"].min())


def test_thinned_thresholds_and_rounding():
    """More draws than thresholds; and p-values far below what 1 - P can hold."""
    rng = np.random.default_rng(0)
    right = rng.integers(0, 5001, (300, 200))
    p_values = uniformity(RankStatistics({"x": right}, 5000))[0]["x"]
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3
    for ranks in (np.full(400, 50), right[:, 0] // 2, np.zeros(100, int)):
        _, overall = uniformity(RankStatistics({"x": ranks}, 5000))
        assert 0 <= overall < 1e-15


# ---------------------------------------------------------------------------------------
# A conjugate model, with exact and independent posterior draws.


def simulate_normal(rng_key):
    key_mu, key_y = jax.random.split(rng_key)
    mu = jax.random.normal(key_mu, (2,))
    return {"mu": mu}, mu + jax.random.normal(key_y, (2,))


def infer_normal(rng_key, y, *, weight=0.5, shift=0.0, scale=1.0, num_draws=99):
    """The posterior is N(y / 2, 1 / 2); a weight of 1 on y ignores the prior, 0 the data."""
    sd = scale * max(weight, 1.0 - weight) ** 0.5
    noise = jax.random.normal(rng_key, (num_draws, *y.shape))
    return {"mu": weight * y + sd * (shift + noise)}


def log_densities(params, y):
    prior = jnp.sum(norm.logpdf(params["mu"]))
    likelihood = jnp.sum(norm.logpdf(y, params["mu"]))
    return {"log likelihood": likelihood, "log prior": prior}


at_three_keys = pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
)

calibrate_normal = partial(
    simulation_based_calibration,
    simulate=simulate_normal,
    quantities=log_densities,
    num_simulations=400,
    progress_bar=False,
)


@at_three_keys
def test_exact_draws_pass(seed):
    result = calibrate_normal(jax.random.key(seed), infer=infer_normal)
    p_values, overall = uniformity(result)
    assert result.num_draws == 99
    assert {name: r.shape for name, r in result.ranks.items()} == {
        "mu": (400, 2),
        "log likelihood": (400,),
        "log prior": (400,),
    }
    assert overall > 1e-3
    assert max(p.max() for p in p_values.values()) > 0.05


# Name to the error, and the quantity that shows it.
WRONG_NORMAL = {
    "shifted": ({"shift": 0.5}, "mu"),
    "too narrow": ({"scale": 0.7}, "mu"),
    "too wide": ({"scale": 1.4}, "mu"),
    "without the prior": ({"weight": 1.0}, "log prior"),
    "without the data": ({"weight": 0.0}, "log likelihood"),
}


@members(WRONG_NORMAL, quick=["too narrow", "without the prior", "without the data"])
def test_wrong_draws_are_found(name):
    error, quantity = WRONG_NORMAL[name]
    result = calibrate_normal(
        jax.random.key(0),
        infer=partial(infer_normal, **error),
        quantities=None if quantity == "mu" else log_densities,
    )
    p_values, overall = uniformity(result)
    assert overall < 1e-4
    assert p_values[quantity].min() < 1e-4
    if quantity != "mu":  # what the ranks of a parameter can't tell
        assert p_values["mu"].min() > 1e-3


def test_autocorrelated_draws_are_rejected():
    """Exact, but with an autocorrelation time of about 40 draws: thin before ranking."""

    def step(x, z):
        x = 0.95 * x + z
        return x, x

    def infer(rng_key, y):
        noise = jax.random.normal(rng_key, (99, *y.shape))
        noise = noise.at[1:].multiply((1 - 0.95**2) ** 0.5)
        _, chain = jax.lax.scan(step, jnp.zeros(y.shape), noise)
        return {"mu": y / 2 + 0.5**0.5 * chain}

    result = calibrate_normal(jax.random.key(0), infer=infer, quantities=None)
    assert uniformity(result)[0]["mu"].max() < 1e-4
    assert result.ranks["mu"].std() > 99 / 12**0.5  # both ends


@pytest.mark.slow
def test_the_way_of_running_changes_nothing():
    run = partial(
        calibrate_normal,
        jax.random.key(0),
        infer=infer_normal,
        quantities=lambda params, y: {"sum": jnp.sum(params["mu"] + y)},
        num_simulations=7,
    )
    reference = run()
    jax.tree.map(np.testing.assert_array_equal, reference, run(batch_size=3))

    def infer_outside_jax(rng_key, y):
        return {"mu": np.array(infer_normal(rng_key, jnp.asarray(np.array(y)))["mu"])}

    one_by_one = run(infer=infer_outside_jax, vectorized=False)
    jax.tree.map(np.testing.assert_array_equal, reference, one_by_one)


def test_ties_are_broken_at_random():
    """A coin's posterior given nothing is the coin, and its ranks are uniform nonetheless."""

    def flip(rng_key, shape=()):
        return [jax.random.bernoulli(rng_key, 0.5, shape).astype(int)]

    result = simulation_based_calibration(
        jax.random.key(0),
        lambda key: (flip(key), None),
        lambda key, _: flip(key, (9,)),
        num_simulations=1000,
        progress_bar=False,
    )
    counts = np.bincount(result.ranks["0"], minlength=10)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_single_precision_and_a_lone_array():
    result = simulation_based_calibration(
        jax.random.key(0),
        lambda key: (jax.random.normal(key, (2,), jnp.float32), None),
        lambda key, _: jax.random.normal(key, (19, 2), jnp.float32),
        num_simulations=10,
        progress_bar=False,
    )
    assert result.ranks["x"].shape == (10, 2)
    assert np.issubdtype(result.ranks["x"].dtype, np.integer)


def test_the_table():
    rng = np.random.default_rng(0)
    ranks = {"mu": rng.integers(0, 100, (200, 2)), "tau": rng.integers(40, 60, 200)}
    lines = repr(RankStatistics(ranks, 99)).splitlines()
    assert lines[0] == "200 simulations, 99 draws each"
    assert [line.split()[0] for line in lines[2:5]] == ["mu[0]", "mu[1]", "tau"]
    assert float(lines[4].split()[1]) < 1e-10
    mean, spread = map(float, lines[2].split()[2:])
    assert abs(mean - 0.5) < 4 * (1 / 12 / 200) ** 0.5
    assert abs(spread - 1) < 0.2
    assert "Bonferroni over 3" in lines[5]


# ---------------------------------------------------------------------------------------
# Eight schools, and a chain for each data set.

SIGMA = np.array([15.0, 10, 16, 11, 9, 11, 10, 18])


def schools(y=None):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfNormal(5))
    with numpyro.plate("school", 8):
        theta_raw = numpyro.sample("theta_raw", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(mu + tau * theta_raw, SIGMA), obs=y)


def schools_log_likelihood(params, data):
    effect = params["mu"] + params["tau"] * params["theta_raw"]
    return {"log likelihood": jnp.sum(norm.logpdf(data["y"], effect, SIGMA))}


def constrained(x):
    return {"mu": 5 * x[0], "tau": jnp.exp(x[1]), "theta_raw": x[2:]}


def schools_log_density(data, x, *, prior=1.0, jacobian=1.0):
    """Of (mu / 5, log tau, theta_raw): the prior of mu and tau, and d tau / d log tau = tau."""
    params = constrained(x)
    log_prior = norm.logpdf(params["mu"], 0, 5) + norm.logpdf(params["tau"], 0, 5)
    log_prior = prior * log_prior + jnp.sum(norm.logpdf(x[2:]))
    return schools_log_likelihood(params, data)["log likelihood"] + log_prior + jacobian * x[1]


def langevin(logdensity_fn, step_size, *, metropolis):
    """MALA without its test, or without the proposal's density in it."""

    def step(rng_key, x):
        key_noise, key_accept = jax.random.split(rng_key)
        noise = jnp.sqrt(2 * step_size) * jax.random.normal(key_noise, x.shape)
        proposal = x + step_size * jax.grad(logdensity_fn)(x) + noise
        if not metropolis:
            return proposal
        log_ratio = logdensity_fn(proposal) - logdensity_fn(x)
        return jnp.where(jnp.log(jax.random.uniform(key_accept)) < log_ratio, proposal, x)

    return lambda x, rng_key: x, step, lambda x: x


def mala(logdensity_fn, step_size):
    algorithm = probbp.mala(logdensity_fn, step_size)
    return algorithm.init, lambda k, s: algorithm.step(k, s)[0], lambda state: state.position


def infer_schools(rng_key, data, *, sampler=mala, step_size=0.25, **error):
    """A chain from the prior's middle: 49 draws, 30 steps apart, after 390 steps of warm-up.

    The step size is that of a pilot run: acceptance 0.7 on average, and an autocorrelation time of
    up to 25 steps (log tau).
    """
    logdensity_fn = partial(schools_log_density, data, **error)
    init, step, position = sampler(logdensity_fn, step_size=step_size)
    key_init, key_draws = jax.random.split(rng_key)

    def draw(state, rng_key):
        keys = jax.random.split(rng_key, 30)
        state, _ = jax.lax.scan(lambda s, k: (step(k, s), None), state, keys)
        return state, constrained(position(state))

    start = init(jnp.zeros(10), key_init)
    _, draws = jax.lax.scan(draw, start, jax.random.split(key_draws, 13 + 49))
    return jax.tree.map(lambda leaf: leaf[13:], draws)


calibrate_schools = partial(
    simulation_based_calibration,
    simulate=numpyro_simulator(schools, data="y"),
    quantities=schools_log_likelihood,
    num_simulations=200,
    batch_size=200,
    progress_bar=False,
)


@at_three_keys
def test_mala_at_eight_schools(seed):
    result = calibrate_schools(jax.random.key(seed), infer=infer_schools)
    assert result.ranks["theta_raw"].shape == (200, 8)
    assert uniformity(result)[1] > 1e-3


WRONG_SCHOOLS = {
    "no metropolis test": ({"sampler": partial(langevin, metropolis=False)}, 100),
    "no hastings correction": ({"sampler": partial(langevin, metropolis=True)}, 200),
    "no prior": ({"prior": 0.0}, 100),
    "no jacobian": ({"jacobian": 0.0}, 100),
}


@members(WRONG_SCHOOLS, quick=["no metropolis test"])
def test_wrong_samplers_at_eight_schools(name):
    error, num_simulations = WRONG_SCHOOLS[name]
    infer = partial(infer_schools, **error)
    result = calibrate_schools(jax.random.key(0), infer=infer, num_simulations=num_simulations)
    assert uniformity(result)[1] < 1e-4


# ---------------------------------------------------------------------------------------
# At the door.


def test_numpyro_simulator():
    params, data = jax.jit(numpyro_simulator(schools, data=["y"]))(jax.random.key(0))
    assert {name: value.shape for name, value in params.items()} == {
        "mu": (),
        "tau": (),
        "theta_raw": (8,),
    }
    assert data["y"].shape == (8,)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"\['z'\]"):
        numpyro_simulator(schools, data=["y", "z"])(key)
    with pytest.raises(ValueError, match=r"observes \['y'\]"):
        numpyro_simulator(schools, SIGMA, data="y")(key)
    with pytest.raises(ValueError, match="at least one"):
        numpyro_simulator(schools, data=["y", "mu", "tau", "theta_raw"])(key)


BAD = {
    "another tree": ({"infer": lambda k, y: {"nu": y[None]}}, "the tree"),
    "no draws": ({"infer": lambda k, y: {"mu": y}}, "num_draws"),
    "chains": ({"infer": lambda k, y: {"mu": jnp.zeros((4, 9, 2))}}, "reshape"),
    "nan": ({"infer": lambda k, y: {"mu": jnp.full((9, 2), jnp.nan)}}, "NaN in 5 of 5"),
    "name taken": ({"quantities": lambda p, y: {"mu": p["mu"]}}, "other names"),
    "no simulation": ({"num_simulations": 0}, "num_simulations"),
    "no batch": ({"batch_size": -1}, "batch_size"),
    "no parameter": ({"simulate": lambda k: ({}, 0), "infer": lambda k, y: {}}, "empty"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("vectorized", [True, False])
def test_bad_input(name, vectorized):
    options, words = BAD[name]
    options = {"infer": infer_normal, "num_simulations": 5, "quantities": None} | options
    with pytest.raises(ValueError, match=words):
        calibrate_normal(jax.random.key(0), vectorized=vectorized, **options)


def test_plot_ranks(monkeypatch):
    from matplotlib import pyplot as plt

    rng = np.random.default_rng(0)
    result = RankStatistics({"a": rng.integers(0, 64, (100, 5)), "b": np.full(100, 9)}, 63)
    figure = plot_ranks(result)
    panels = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title().split()[0] for ax in panels] == [*(f"a[{i}]" for i in range(5)), "b"]
    # The band: a right inference leaves a panel's band at some bar in one of twenty cases at most.
    band, heights = (panels[0].patches[i].get_data() for i in (2, 0))
    expected = 100 * np.diff(heights.edges) / 64
    for low, high, share in zip(band.values, band.baseline, expected / 100, strict=True):
        law = stats.binom(100, share)
        inside = law.cdf(round(high * 100 * share)) - law.cdf(round(low * 100 * share) - 1)
        assert inside >= 1 - 0.05 / len(expected)
    assert np.isclose((heights.values * expected).sum(), 100)
    figure.canvas.draw()
    plt.close(figure)

    with pytest.raises(ValueError, match="num_bins"):
        plot_ranks(result, num_bins=65)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"probbp\[examples\]"):
        plot_ranks(result)
