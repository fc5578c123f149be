"""`probbp.sample` and `probbp.warmup`: from a log density to moments that are right."""

import re
from functools import partial
from typing import NamedTuple

import arviz as az
import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from blackjax.base import SamplingAlgorithm
from numpyro.infer import MCMC
from tables import PROGRAMS, SAMPLERS, members
from targets import anisotropic

import probbp
from probbp.numpyro import Kernel
from probbp.samplers.adaptation import adaptation

quiet = partial(probbp.sample, progress_bar=False)

# A posterior with three scales, a correlation, and a shape that is not Gaussian.
TARGET = anisotropic(3, condition=25.0)


def logdensity_fn(position):
    x = jnp.append(position["x"], position["y"])
    return TARGET.logdensity_fn(x)


START = {"x": jnp.zeros(2), "y": jnp.zeros(())}

PLANE = "line_fmala, plane"


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        *(
            pytest.param(name, "dense", marks=() if name == "mala" else pytest.mark.slow)
            for name in SAMPLERS
        ),
        ("line_fmala", "low_rank"),
        *(pytest.param("line_fmala", m, marks=pytest.mark.slow) for m in ("diag", None)),
        pytest.param(PLANE, "dense", marks=pytest.mark.slow),
        *(
            pytest.param("fmala", metric, marks=pytest.mark.slow)
            for metric in ("diag", "low_rank", None)
        ),
    ],
)
def test_moments_from_dispersed_starts(name, metric):
    algorithm, num_samples = PROGRAMS[name].algorithm, PROGRAMS[name].num_samples
    if metric is None:
        num_samples *= 2
    data = quiet(
        jax.random.key(0),
        partial(algorithm, logdensity_fn),
        START,
        num_samples=num_samples,
        metric=metric,
        dispersion=5.0,
    )
    # One dataset of x[0], x[1], y.
    draws = np.concatenate([data.posterior["x"].values, data.posterior["y"].values[..., None]], -1)
    for i in range(3):
        for power, truth in ((1, 0.0), (2, TARGET.covariance[i, i])):
            values = draws[..., i] ** power
            assert abs(values.mean() - truth) < 4.5 * float(az.mcse(values)), (i, power)
    rate = float(data.sample_stats["acceptance_rate"].mean())
    target = probbp.samplers.algorithm.target_acceptance_rate(algorithm)
    assert abs(rate - target) < 0.1
    assert not data.sample_stats["diverging"].any()


def test_the_result_is_arviz_s():
    data = quiet(
        jax.random.key(0),
        partial(probbp.line_fmala, logdensity_fn),
        START,
        num_warmup=100,
        num_samples=37,
        num_chains=3,
        thinning=2,
        postprocess_fn=lambda p: {"exp": jnp.exp(p["x"])},
        coords={"which": ["first", "second"]},
        dims={"exp": ["which"]},
    )
    assert data.posterior["exp"].dims == ("chain", "draw", "which")
    assert data.posterior["exp"].shape == (3, 37, 2)
    assert (data.posterior["exp"] > 0).all()
    for name in ("acceptance_rate", "step_size", "lp", "diverging", "accepted"):
        assert data.sample_stats[name].shape == (3, 37)
    # The step size is frozen, and each chain has its own.
    assert len(np.unique(data.sample_stats["step_size"])) == 3
    assert set(az.summary(data).index) == {"exp[first]", "exp[second]"}


def test_the_key_decides_the_draws():
    draws = [
        quiet(
            jax.random.key(seed),
            partial(probbp.fmala, logdensity_fn),
            START,
            num_warmup=50,
            num_samples=20,
        ).posterior["x"]
        for seed in (0, 0, 1)
    ]
    assert (draws[0] == draws[1]).all()
    assert (draws[0] != draws[2]).any()


def test_the_bar_changes_no_draw_and_shows_the_run(capsys):
    draws = [
        probbp.sample(
            jax.random.key(0),
            partial(probbp.mala, logdensity_fn),
            START,
            num_warmup=80,
            num_samples=40,
            progress_bar=bar,
        ).posterior["x"]
        for bar in (True, False)
    ]
    assert (draws[0] == draws[1]).all()
    shown = capsys.readouterr().err
    assert "sampling: 100%" in shown
    assert "acceptance 0." in shown
    assert "step size" in shown


def test_the_log_density_is_compiled_once_a_phase():
    """However long the phases are, and however often they come back to the host."""

    def count_traces(num):
        traces = []

        def counted(position):
            traces.append(1)
            return logdensity_fn(position)

        algorithm = partial(probbp.mala, counted)
        quiet(jax.random.key(0), algorithm, START, num_warmup=num, num_samples=num)
        return len(traces)

    assert count_traces(4) == count_traces(400) < 10


@members(["mala", "pc_line_fmala", "surrogate"], quick=["mala"])
def test_each_program_of_a_run_is_compiled_once(name, caplog):
    """The start, the warm-up, what it learned, the draws: each for stretches of one length."""
    algorithm = partial(getattr(probbp, name), lambda x: logdensity_fn(x) / 3)
    with jax.log_compiles():
        quiet(jax.random.key(0), algorithm, START, num_warmup=120, num_samples=120)
    programs = r"Finished XLA compilation of jit\((all_chains|init|warm_up|learn|draw)\)"
    assert len(re.findall(programs, caplog.text)) == 4


def test_starts_are_dispersed_and_finite():
    """The support is a disk: starts outside are drawn in until they lie within."""

    def disk(x):
        return jnp.where(jnp.sum(x**2) < 1, 0.0, -jnp.inf)

    data = quiet(
        jax.random.key(0),
        partial(probbp.line_fmala, disk),
        jnp.zeros(2),
        num_warmup=0,
        num_samples=50,
        num_chains=50,
        dispersion=10.0,
        initial_step_size=1e-12,
    )
    starts = data.posterior["x"].values[:, 0]
    assert (np.sum(starts**2, axis=1) < 1).all()
    assert len(np.unique(starts[:, 0])) == 50


def test_a_callable_position_gives_the_starts():
    data = quiet(
        jax.random.key(0),
        partial(probbp.line_fmala, lambda x: -0.5 * jnp.sum(x**2)),
        lambda key: jax.random.uniform(key, (2,), minval=5.0, maxval=6.0),
        num_warmup=0,
        num_samples=4,
        initial_step_size=1e-12,
    )
    assert ((data.posterior["x"] > 4.99) & (data.posterior["x"] < 6.01)).all()


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        (lambda step_size: blackjax.mala(logdensity_fn, step_size), {"metric": None}),
        pytest.param(
            partial(blackjax.nuts, logdensity_fn), {"metric": "dense"}, marks=pytest.mark.slow
        ),
    ],
)
def test_blackjax_s_own_algorithms(algorithm, options):
    with pytest.raises(ValueError, match="as target_acceptance_rate to probbp.sample"):
        quiet(jax.random.key(0), algorithm, START, **options)
    data = quiet(
        jax.random.key(0),
        algorithm,
        START,
        num_warmup=300,
        num_samples=200,
        target_acceptance_rate=0.7,
        **options,
    )
    assert float(data.sample_stats["acceptance_rate"].mean()) > 0.5


def test_the_scale_is_learnt_from_the_windows_alone():
    """Where a chain comes from, and what it does while the step size settles, say nothing of it."""
    adapt = adaptation(2, 500, 0.5, metric="diag")
    serves_scale = np.asarray(adapt.schedule)[:, :1]
    draws = np.random.default_rng(0).normal(size=(500, 2)) * [1.0, 3.0]
    positions = np.where(serves_scale, draws, 1e4 * draws)

    @jax.jit
    def learn(positions):
        def body(state, inputs):
            state = adapt.update(state, *inputs, 0.5)
            return state, state.inverse_mass_matrix

        return jax.lax.scan(body, adapt.initial, (adapt.schedule, positions))[1]

    assert 0 < serves_scale.sum() < 500
    learnt = np.asarray(learn(positions))
    np.testing.assert_allclose(learnt[-1], [1.0, 9.0], rtol=0.5)
    assert np.all(learnt < [4.0, 36.0])  # after the first window, too


def test_warmup_returns_what_the_algorithm_takes():
    algorithm = partial(probbp.pc_line_fmala, TARGET.logdensity_fn)
    state, parameters = jax.jit(partial(probbp.warmup, algorithm=algorithm, num_steps=2_000))(
        jax.random.key(0), position=jnp.ones(3)
    )
    variances = np.diag(TARGET.covariance)
    np.testing.assert_allclose(parameters["inverse_mass_matrix"], variances, rtol=1.0)
    sampler = algorithm(**parameters)
    sampler.step(jax.random.key(1), state)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"metric": "fisher"}, ValueError, "'diag', 'dense' or 'low_rank'"),
        ({"target_acceptance_rate": 1.5}, ValueError, r"in \(0, 1\)"),
        ({"initial_step_size": 0.0}, ValueError, "step_size must be positive"),
        ({"num_chains": 0}, ValueError, "num_chains must be a positive integer"),
        ({"num_samples": 0}, ValueError, "num_samples must be a positive integer"),
        ({"position": jnp.full(3, jnp.nan)}, ValueError, "log density at the start"),
        ({"position": jnp.arange(3)}, TypeError, "floating-point positions"),
        ({"position": lambda key: jnp.full(3, jnp.inf)}, ValueError, "log density at the start"),
    ],
)
def test_bad_input(options, error, words):
    arguments = {"position": jnp.zeros(3)} | options
    with pytest.raises(error, match=words):
        quiet(jax.random.key(0), partial(probbp.mala, TARGET.logdensity_fn), **arguments)


def test_metrics_that_need_gradients_are_refused():
    from blackjax.adaptation.metric_recipes import lookup_recipe

    with pytest.raises(ValueError, match="takes gradients at their word"):
        quiet(
            jax.random.key(0),
            partial(probbp.mala, TARGET.logdensity_fn),
            jnp.zeros(3),
            metric=lookup_recipe("fisher_diag"),
        )


def test_fresh_tangents_of_pc_fmala_have_no_rate_to_tune_for():
    algorithm = partial(probbp.pc_fmala, TARGET.logdensity_fn, key_policy="refreshed")
    with pytest.raises(ValueError, match="key_policy='shared'"):
        quiet(jax.random.key(0), algorithm, jnp.zeros(3))


class Walk(NamedTuple):
    position: jax.Array
    logdensity: jax.Array


class Accepted(NamedTuple):
    acceptance_rate: jax.Array
    is_divergent: jax.Array


def free_walk(step_size=1.0, inverse_mass_matrix=None):
    """A sampler that adds a standard normal number each step, whatever it has learned."""
    del step_size, inverse_mass_matrix

    def init(position, rng_key=None):
        del rng_key
        return Walk(position, jnp.zeros(()))

    def step(rng_key, state):
        moved = state.position + jax.random.normal(rng_key)
        return Walk(moved, state.logdensity), Accepted(jnp.asarray(0.5), jnp.asarray(False))

    return SamplingAlgorithm(init, step)


def test_every_step_of_warm_up_has_a_key_of_its_own():
    """Else the walk would be longer: its steps would repeat with each part of warm-up."""
    data = probbp.sample(
        jax.random.key(0),
        free_walk,
        jnp.zeros(()),
        num_warmup=80,
        num_samples=1,
        num_chains=500,
        target_acceptance_rate=0.5,
        progress_bar=False,
    )
    # 81 steps; a variance of 500 draws has a relative error of 0.063.
    np.testing.assert_allclose(data.posterior["x"].values.var(), 82, rtol=0.3)


@members(SAMPLERS, quick=["pc_line_fmala"])
@pytest.mark.parametrize(
    "counts",
    [
        {"num_warmup": 0, "num_samples": 1, "thinning": 1},
        pytest.param({"num_warmup": 1, "num_samples": 3, "thinning": 3}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_smallest_counts(name, counts):
    """In `probbp.sample` and in NumPyro's `MCMC`, whose thinning leaves a draw of as many."""
    data = probbp.sample(
        jax.random.key(0),
        partial(SAMPLERS[name].algorithm, lambda x: -0.5 * jnp.sum(x**2)),
        jnp.zeros(2),
        num_chains=1,
        progress_bar=False,
        **counts,
    )
    mcmc = MCMC(Kernel(normal, SAMPLERS[name].algorithm), progress_bar=False, **counts)
    mcmc.run(jax.random.key(0))
    hosted = az.from_numpyro(mcmc)
    shapes = [data.posterior["x"].shape, hosted.posterior["x"].shape]
    assert shapes == [(1, counts["num_samples"], 2), (1, 1, 2)]
    for found in (data, hosted):
        assert np.all(np.isfinite(found.posterior["x"].values))


def normal():
    numpyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1))
