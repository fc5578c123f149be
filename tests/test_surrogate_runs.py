"""The surrogate transition through `probbp.sample`: its own warm-up, resumed, and distrusted."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import probbp
from probbp.samplers.surrogate import pooled
from probbp.samplers.surrogate.pooled import schedule_of
from probbp.samplers.surrogate.trust import (
    Weights,
    distrust_of_draws,
    distrust_of_fit,
    distrust_of_weights,
    warn_of_distrust,
    weights_of,
)

KEY = jax.random.key(0)
START = {"a": jnp.zeros(2), "b": jnp.zeros(())}


def banana(position):
    """A and b: b given a is N(a0^2, 0.5^2)."""
    bend = (position["b"] - position["a"][0] ** 2) / 0.5
    return -0.5 * jnp.sum(position["a"] ** 2) - 0.5 * bend**2


def run(logdensity_fn=banana, position=START, **options):
    options = {"num_warmup": 580, "num_samples": 500, "progress_bar": False} | options
    return probbp.sample(KEY, partial(probbp.surrogate, logdensity_fn), position, **options)


@pytest.fixture(scope="module")
def whole():
    """A run that nothing interrupts."""
    return run(num_chains=8, num_samples=1000)


@pytest.mark.slow
def test_a_run_has_the_right_moments_and_says_what_it_cost(whole):
    a, b = whole.posterior["a"].values, whole.posterior["b"].values
    statistics = {
        "a": (a[..., 0], 0.0),
        "a^2": (a[..., 0] ** 2, 1.0),
        "a1": (a[..., 1], 0.0),
        "b": (b, 1.0),
        "b^2": (b**2, 3.25),
    }
    for name, (values, truth) in statistics.items():
        batches = values.reshape(8 * 20, 50).mean(axis=1)
        error = batches.std(ddof=1) / len(batches) ** 0.5
        assert abs(batches.mean() - truth) < 4.5 * error, name
    report = whole["sample_stats"].attrs
    assert report["num_warmup_evaluations"] == 8 * (580 + 1)
    assert report["num_relocated"] == 0
    assert report["held_out_std"] < 0.3
    assert report["pareto_k"] < 1
    # The step size is frozen, and one for all.
    assert len(np.unique(whole["sample_stats"]["step_size"])) == 1
    assert whole["sample_stats"]["log_weight"].shape == (8, 1000)
    assert whole["sample_stats"]["acceptance_rate"].values.mean() > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("done", [100, 700])
def test_an_interrupted_run_goes_on(done, whole, tmp_path, monkeypatch):
    """In warm-up and among the draws; the same to the bit."""
    from probbp.samplers import progress

    again = partial(run, num_chains=8, num_samples=1000, checkpoint=tmp_path / "run")
    shown, show = [], progress.show

    def stop(bar, num_steps, *args, **kwargs):
        shown.append(num_steps)
        if sum(shown) >= done:
            raise KeyboardInterrupt
        show(bar, num_steps, *args, **kwargs)

    monkeypatch.setattr(progress, "show", stop)
    with pytest.raises(KeyboardInterrupt):
        again(progress_bar=True)
    monkeypatch.undo()
    resumed = again()
    np.testing.assert_array_equal(whole.posterior["a"], resumed.posterior["a"])
    np.testing.assert_array_equal(
        whole["sample_stats"]["log_weight"], resumed["sample_stats"]["log_weight"]
    )


def test_a_schedule_learns_where_its_stretches_end():
    schedule = np.asarray(schedule_of(29 * 3))
    assert schedule.shape == (29 * 3, 2)
    assert schedule[:, 0].sum() == 14 * 3
    ends = np.flatnonzero(schedule[:, 1])
    np.testing.assert_array_equal(ends + 1, 3 * np.cumsum([1, 2, 4, 8, 2, 4, 8]))
    np.testing.assert_array_equal(schedule[ends, 1], [1, 1, 1, 2, 2, 2, 3])
    for num_steps in (1, 5, 30, 100):  # what is learned last is what is frozen
        schedule = np.asarray(schedule_of(num_steps))
        assert len(schedule) == num_steps
        assert schedule[-1, 1] == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_warmup": 0}, "num_warmup must be positive, got 0"),
        ({"metric": "dense"}, "leave out metric"),
        ({"target_acceptance_rate": 0.8}, "leave out target_acceptance_rate"),
        ({"initial_step_size": 0.3}, "leave out initial_step_size"),
    ],
)
def test_what_does_not_concern_it_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        run(**options)


def test_the_log_density_must_be_bound():
    with pytest.raises(ValueError, match="learns from values of the log density"):
        probbp.sample(KEY, probbp.surrogate, jnp.zeros(2), progress_bar=False)


@pytest.mark.parametrize(
    ("weights", "std", "words"),
    [
        (Weights(0.4, 5.0, 299.0, 6000), 0.1, "effective sample size of 299 .from 300 on"),
        (Weights(0.4, 5.0, 399.0, 60_000), 0.1, "effective sample size of 399 .from 400 on"),
        (Weights(0.3, 2.0, 900.0, 6000), 0.9, "misses the log density by 0.90"),
        (Weights(np.nan, np.nan, np.nan, 6000), 0.1, "may be wrong"),
        (Weights(0.3, 2.0, 900.0, 6000), np.nan, "may be wrong"),
    ],
)
def test_distrust_is_a_warning(weights, std, words):
    with pytest.warns(UserWarning, match=words):
        warn_of_distrust(distrust_of_fit(std) + distrust_of_draws(weights))


def test_trust_is_silent():
    assert not distrust_of_fit(0.2)
    assert not distrust_of_draws(Weights(0.5, 20.0, 301.0, 6000))
    assert not distrust_of_draws(Weights(1.5, 20.0, 26.0, 500))
    assert not distrust_of_draws(Weights(0.1, 1.01, 8.0, 6000))  # rounding
    assert not distrust_of_weights(Weights(0.9, 20.0, 11.0, 500))
    assert not distrust_of_weights(Weights(1.5, 2.0, 11.0, 500))  # they are all alike
    assert distrust_of_weights(Weights(1.5, 20.0, 11.0, 500))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_distrust([])


@pytest.mark.slow
def test_a_bad_fit_is_told_before_the_draws(monkeypatch):
    """So that a long run can be stopped there."""
    monkeypatch.setattr(pooled, "held_out_std_of", lambda rest: 0.9)
    calls = []

    def counted(position):
        jax.debug.callback(lambda: calls.append(1))
        return banana(position)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"misses the log density by 0\.90"):
            run(counted, num_warmup=29, num_samples=10, num_chains=2)
    jax.effects_barrier()
    assert len(calls) <= 2 * (29 + 1) + 2  # the start is checked, too


def test_a_heavy_tail_is_seen():
    """Weights of Gaussian logarithm, and of exponential logarithm with mean two: Pareto, k = 2."""
    rng = np.random.default_rng(0)
    light = weights_of(0.3 * rng.normal(size=(4, 1000)))
    assert light.pareto_k < 0.7
    assert 2 < light.largest < 6
    heavy = weights_of(2 * rng.exponential(size=(4, 1000)))
    assert heavy.pareto_k > 1.5
    assert heavy.largest > 100
    assert min(light.ess, heavy.ess) > 2000
    assert weights_of(np.zeros((4, 1000))).ess == 4000
    assert np.isnan(weights_of(np.full((4, 1000), np.nan)).ess)
    with jax.enable_x64(False):
        np.testing.assert_allclose(
            weights_of(np.arange(4000.0).reshape(4, 1000)).largest, 4000 * (1 - np.exp(-1))
        )


def test_a_stay_where_the_surrogate_is_wrong_is_seen():
    """One chain of four enters a region once and stays for a tenth of the run."""
    log_weight = 0.3 * np.random.default_rng(0).normal(size=(4, 1000))
    assert weights_of(log_weight).ess > 2000
    log_weight[0, 700:1000] += 4
    weights = weights_of(log_weight)
    assert weights.ess < 40
    assert distrust_of_draws(weights)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The draws may be wrong")
def test_neal_s_funnel_is_right():
    """Its neck is narrower than any chain sees in warm-up; values elsewhere say where it leads."""

    def funnel(x):
        return -(x[0] ** 2) / 18 - jnp.sum(x[1:] ** 2) * jnp.exp(-x[0]) / 2 - 9 * x[0] / 2

    data = run(funnel, jnp.zeros(10), num_warmup=2900, num_samples=1000)
    v = data.posterior["x"].values[..., 0] / 3
    for values, truth in ((v, 0.0), (v**2, 1.0), (v < -1.5, stats.norm.cdf(-1.5))):
        batches = values.reshape(4 * 20, 50).mean(axis=1)
        assert abs(batches.mean() - truth) < 4.5 * batches.std(ddof=1) / 80**0.5


def centered_hierarchy(x):
    """y_i ~ N(theta_i, 1), theta_i ~ N(mu, tau), mu ~ N(0, 2), log tau ~ N(0, 1)."""
    mu, log_tau, theta = x[0], x[1], x[2:]
    y = jnp.array([2.0, -1.0, 0.5, 1.5])
    prior = -(mu**2) / 8 - log_tau**2 / 2 - len(y) * log_tau
    return (
        prior
        - jnp.sum((theta - mu) ** 2) * jnp.exp(-2 * log_tau) / 2
        - jnp.sum((y - theta) ** 2) / 2
    )


def hierarchy_moments():
    """Return the means of mu, log tau and their squares, by quadrature: theta is integrated out."""
    y = np.array([2.0, -1.0, 0.5, 1.5])
    mu, log_tau = np.meshgrid(np.linspace(-12, 12, 801), np.linspace(-7, 6, 801), indexing="ij")
    variance = 1 + np.exp(2 * log_tau)
    log_p = -(mu**2) / 8 - log_tau**2 / 2
    for value in y:
        log_p += -((value - mu) ** 2) / variance / 2 - np.log(variance) / 2
    p = np.exp(log_p - log_p.max())
    return [(p * v).sum() / p.sum() for v in (mu, log_tau, mu**2, log_tau**2)]


@pytest.mark.slow
@pytest.mark.parametrize("num_warmup", [580, 2900])
def test_a_centered_hierarchy_is_right_or_distrusted(num_warmup):
    """Its neck takes a long warm-up to be found."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = run(
            centered_hierarchy, jnp.zeros(6), num_chains=8, num_warmup=num_warmup, num_samples=2000
        )
    x = data.posterior["x"].values
    statistics = x[..., 0], x[..., 1], x[..., 0] ** 2, x[..., 1] ** 2
    for values, truth in zip(statistics, hierarchy_moments(), strict=True):
        batches = values.reshape(8 * 10, 200).mean(axis=1)
        error = batches.std(ddof=1) / len(batches) ** 0.5
        is_right = abs(batches.mean() - truth) < 4.5 * error
        assert is_right or any("may be wrong" in str(warning.message) for warning in caught)


class OnHost:
    """A log density that JAX can't see into, and how many positions it is handed at a time."""

    def __init__(self):
        self.sizes = []

    def __call__(self, x):
        out = jax.ShapeDtypeStruct((), x.dtype)
        return jax.pure_callback(self.evaluate, out, x, vmap_method="expand_dims")

    def evaluate(self, x):
        x = np.asarray(x)
        self.sizes.append(x.size // x.shape[-1])
        return np.asarray(-0.5 * np.sum(x**2, axis=-1), x.dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "at_once"), [(None, 6), (2, 2)])
def test_a_simulator_is_called_once_a_step_for_all_chains(batch_size, at_once):
    """Every evaluation is counted: a start, and each step."""
    simulator = OnHost()
    data = run(
        simulator,
        lambda key: jax.random.normal(key, (2,)),
        num_warmup=58,
        num_samples=40,
        num_chains=6,
        batch_size=batch_size,
    )
    warm_up = data["sample_stats"].attrs["num_warmup_evaluations"]
    assert warm_up == 6 * 59
    calls = np.array(simulator.sizes)
    assert np.all(calls[-40 * 6 // at_once :] == at_once)
    # Beside them: the search for a finite start, and one look at it.
    assert warm_up + 40 * 6 <= calls.sum() <= warm_up + 40 * 6 + 3 * 6 + 2
