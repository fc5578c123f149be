"""Log densities and gradients that fail, and targets that no chain can love.

A proposal whose log density is no number is rejected, so that what is sampled is the density cut to
where there is one: exactly that. An estimate of the gradient that is no number counts as zero.
"""

from functools import partial

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from invariance import FAIL, PASS, largest_z, largest_z_of
from tables import ALGORITHMS, LEARNING, PROGRAMS, SAMPLERS, build, members
from targets import TARGETS, gaussian

import probbp
from probbp.ops import substitute

NUM_CHAINS, NUM_STEPS = 20_000, 8
PLAIN = gaussian(2)


def with_derivative(x, factor):
    """Return x, whose derivative is multiplied by `factor`."""
    return substitute(x, factor * x)


def broken_in_four_places(x):
    """A Gaussian, NaN or infinite beyond three lines and without a gradient beyond a fourth."""
    value = PLAIN.logdensity_fn(with_derivative(x, jnp.where(x[1] > 1.5, jnp.nan, 1.0)))
    value = jnp.where(x[0] > 1, jnp.nan, value)
    value = jnp.where(x[0] < -1.5, jnp.inf, value)
    return jnp.where(x[1] < -1.5, -jnp.inf, value)


def is_whole(x):
    return (x[..., 0] <= 1) & (x[..., 0] >= -1.5) & (x[..., 1] >= -1.5)


def draw_whole(rng_key, num):
    draws = PLAIN.draw(rng_key, 4 * num)
    return draws[is_whole(draws)][:num]


WHOLE = PLAIN._replace(logdensity_fn=broken_in_four_places, draw=draw_whole)


@members([*PROGRAMS, *LEARNING], quick=["mala", "pc_line_fmala", *LEARNING])
def test_what_is_no_number_is_never_entered_and_the_rest_is_exact(name):
    key = jax.random.key(list(ALGORITHMS).index(name))
    algorithm = build(name, broken_in_four_places)
    assert largest_z_of(key, algorithm, WHOLE, NUM_CHAINS, NUM_STEPS) < PASS


def test_a_chain_that_takes_what_is_no_number_is_seen():
    """The same test of a random walk that takes infinity, and of one that leaves the square."""

    def walk(is_taken):
        def step(rng_key, x):
            key_move, key_accept = jax.random.split(rng_key)
            y = x + jax.random.normal(key_move, x.shape)
            log_ratio = broken_in_four_places(y) - broken_in_four_places(x)
            is_accepted = jnp.log(jax.random.uniform(key_accept)) < log_ratio
            return jnp.where(is_accepted & is_taken(y), y, x)

        return step

    args = WHOLE, NUM_CHAINS, NUM_STEPS
    assert largest_z(jax.random.key(0), walk(is_whole), *args) < PASS
    assert largest_z(jax.random.key(0), walk(lambda y: True), *args) > FAIL


@members(
    ["mala, forward", "mala, shared", "fmala", "line_fmala", "pc_fmala"],
    quick=["mala, shared"],
)
def test_estimates_that_fail_at_random_leave_the_target_alone(name):
    """One estimate in five is NaN or infinite; no chain stands still at one."""

    def logdensity_fn(x, rng_key=None):
        rng_key = jax.random.key(0) if rng_key is None else rng_key
        fault = jnp.array([jnp.nan, jnp.inf, -jnp.inf, *[1.0] * 12])
        return target.logdensity_fn(with_derivative(x, jax.random.choice(rng_key, fault)))

    target = TARGETS["mix"]
    key = jax.random.key(list(ALGORITHMS).index(name))
    algorithm = build(name, logdensity_fn)
    assert largest_z_of(key, algorithm, target, NUM_CHAINS, NUM_STEPS) < PASS
    state = algorithm.init(jnp.ones(2), jax.random.key(1))
    _, infos = jax.lax.scan(
        lambda state, key: algorithm.step(key, state), state, jax.random.split(key, 200)
    )
    assert 10 < np.sum(infos.is_divergent) < 190
    assert np.any(infos.is_accepted[100:])


@members([*PROGRAMS, *LEARNING], quick=["mala", "line_fmala"])
def test_a_step_in_the_density_is_kept(name):
    """Three quarters of the mass lie beyond a jump that no gradient sees."""

    def logdensity_fn(x):
        return PLAIN.logdensity_fn(x) + jnp.where(x[0] > 0, jnp.log(3.0), 0.0)

    def draw(rng_key, num):
        key_draw, key_side = jax.random.split(rng_key)
        side = jnp.where(jax.random.bernoulli(key_side, 0.75, (num,)), 1, -1)
        draws = PLAIN.draw(key_draw, num)
        return draws.at[:, 0].set(side * jnp.abs(draws[:, 0]))

    target = PLAIN._replace(logdensity_fn=logdensity_fn, draw=draw)
    key = jax.random.key(list(ALGORITHMS).index(name))
    assert largest_z_of(key, build(name, logdensity_fn), target, NUM_CHAINS, NUM_STEPS) < PASS


# ---------------------------------------------------------------------------------------
# Whole runs: what happens to the warm-up, and who tells.


def run(name, logdensity_fn, position=None):
    data = probbp.sample(
        jax.random.key(0),
        partial(SAMPLERS[name].algorithm, logdensity_fn),
        {"x": jnp.zeros(2)} if position is None else position,
        num_warmup=1000,
        num_samples=1000,
        progress_bar=False,
    )
    for group in ("posterior", "sample_stats"):
        for variable in data[group].data_vars.values():
            assert np.all(np.isfinite(variable.values)), variable.name
    x = data.posterior["x"].values
    # How far the chains lie apart, over the spread of one; infinite where they stand still.
    with np.errstate(all="ignore"):
        apart = x.mean(axis=1).std(axis=0) / x.std(axis=1).mean(axis=0)
    return data, np.max(np.nan_to_num(apart, nan=np.inf))


@members(["mala", "fmala", "pc_line_fmala"], quick=["mala"])
def test_the_warm_up_survives_a_broken_density(name):
    data, distance = run(name, lambda x: broken_in_four_places(x["x"]))
    assert np.all(np.asarray(is_whole(data.posterior["x"].values)))
    assert 0 < data.sample_stats["diverging"].values.mean() < 0.9
    assert distance < 0.5
    # The step has found its rate in spite of them.
    assert 0.1 < data.sample_stats["acceptance_rate"].values.mean() < 0.9


def test_no_number_outside_the_support_is_as_good_as_minus_infinity():
    """A Gamma law, whose logarithm is NaN for negative values, with and without a guard."""

    def guarded(x):
        inside = x["x"] > 0
        safe = jnp.where(inside, x["x"], 1.0)
        return jnp.where(inside, jnp.log(safe) - safe, -jnp.inf)

    def draw(logdensity_fn):
        return probbp.sample(
            jax.random.key(0),
            partial(probbp.mala, logdensity_fn),
            {"x": jnp.array(2.0)},
            num_warmup=100,
            num_samples=50,
            progress_bar=False,
        )

    bare = draw(lambda x: jnp.log(x["x"]) - x["x"])
    assert bare.sample_stats["diverging"].values.any()
    np.testing.assert_array_equal(bare.posterior["x"].values, draw(guarded).posterior["x"].values)


IMPROPER = {
    "flat": lambda x: 0.0 * jnp.sum(x["x"]),
    "growing": lambda x: jnp.sum(x["x"] ** 2) / 2,
    "flat in one direction": lambda x: -(x["x"][0] ** 2) / 2,
    "a pole": lambda x: -jnp.log(jnp.sum(x["x"] ** 2)),
}


@pytest.mark.filterwarnings("ignore:This run saw")  # test_endings.py
@members(["mala", "pc_line_fmala"], quick=["mala"])
@pytest.mark.parametrize(
    "target",
    [
        "flat",
        *(
            pytest.param(target, marks=pytest.mark.slow)
            for target in ("a pole", "growing", "flat in one direction")
        ),
    ],
)
def test_what_is_no_density_ends_in_finite_draws_and_is_told(target, name):
    data, _ = run(name, IMPROPER[target], {"x": jnp.ones(2)})
    diverging = data.sample_stats["diverging"].values.mean()
    assert diverging > 0.1 or az.rhat(data)["x"].values.max() > 1.1


@pytest.mark.slow
def test_a_parameter_that_is_all_but_constant_is_learnt():
    """Beside one that is not, and from starts a hundred deviations away."""
    scale = jnp.array([1e-2, 1.0])
    data, distance = run("mala", lambda x: -jnp.sum((x["x"] / scale) ** 2) / 2)
    assert distance < 0.3
    spread = data.posterior["x"].values.std(axis=(0, 1)) / scale
    np.testing.assert_allclose(spread, 1, atol=0.2)
