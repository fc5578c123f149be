"""The surrogate of many dimensions: ridge functions from values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from invariance import PASS, largest_z_of
from scipy import stats
from targets import TARGETS
from test_surrogate import COARSE, Setting, absurd_transport

import probbp
from probbp.samplers.surrogate import learning, regression, ridges, transport, warmup

KEY = jax.random.key(0)


def some_ridges(dim, num_ridges=8, size=1.0, seed=0):
    rng = np.random.default_rng(seed)
    quadratic = rng.normal(size=(dim, dim)) / dim
    leaves = (
        rng.normal(size=dim),
        (quadratic + quadratic.T) / 2,
        rng.normal(size=(num_ridges, dim)),
        rng.normal(size=num_ridges),
        size * rng.normal(size=num_ridges),
    )
    return ridges.Ridges(*map(jnp.asarray, leaves))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_gradient_is_that_of_the_value(dtype):
    g = jax.tree.map(lambda leaf: leaf.astype(dtype), some_ridges(3))
    z = jax.random.normal(KEY, (5, 3), dtype)
    values, grads = g.value_and_grad(z)
    assert values.dtype == grads.dtype == dtype
    expected = jax.vmap(jax.grad(lambda z: g.value_and_grad(z)[0]))(z)
    np.testing.assert_allclose(grads, expected, rtol=1e-4)
    # One point at a time gives the same.
    np.testing.assert_allclose(jax.vmap(g.value_and_grad)(z)[0], values, rtol=1e-4)


def test_the_surrogate_is_a_proper_density():
    """Far out the Gaussian wins, whatever the parameters are."""
    g = some_ridges(3, size=5.0)
    g = g._replace(quadratic=10 * jnp.eye(3))
    far = 1e4 * jax.random.normal(KEY, (100, 3))
    assert jnp.all(g.value_and_grad(far)[0] < 0.1 * jnp.sum(far**2, axis=1))


def test_no_ridges_are_none():
    value, grad = ridges.no_ridges(3, jnp.float64).value_and_grad(jnp.ones(3))
    assert value == 0
    assert not grad.any()


def test_a_fit_predicts_what_it_has_not_seen():
    g = some_ridges(4)
    z = jax.random.normal(KEY, (600, 4))
    values, grads = g.value_and_grad(z)
    weights = jnp.ones(600).at[:100].set(0)  # not seen, not even where it is not a number
    fitted = ridges.fit(KEY, z, values.at[0].set(jnp.nan), grads, weights, 16, 200)
    error = (fitted.value_and_grad(z)[0] - values)[:100]
    assert jnp.std(error) < 0.1 * jnp.std(values)


@pytest.mark.slow
def test_a_gaussian_needs_no_ridges():
    z = jax.random.normal(KEY, (300, 3))
    fitted = regression.fit_ridges(KEY, z, -jnp.sum(z**2, axis=1) / 2, -z, jnp.array(-5.0))
    assert jnp.abs(fitted.surrogate.value_and_grad(z)[0]).max() < 1e-3
    assert fitted.held_out_std < 1e-3


def test_slopes_are_those_of_the_whitened_density():
    t = absurd_transport(6)
    log_density = lambda x: -jnp.sum(x**4) / 4
    z = jax.random.normal(KEY, (6,))

    def whitened(z):
        x, log_det = transport.forward(t, z)
        return log_density(x) + log_det

    grad = jax.grad(log_density)(transport.forward(t, z)[0])
    found = learning.whitened_grad(t, z, grad)
    np.testing.assert_allclose(found, jax.grad(whitened)(z), rtol=1e-8)


def test_a_covariance_from_draws_that_are_not_of_the_gaussian():
    """Of any draws, their gradients say what the covariance is."""
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(4, 4))
    covariance = factor @ factor.T
    x = rng.normal(size=(50, 4)) * [1, 2, 3, 4] + 5
    grads = -np.linalg.solve(covariance, x.T).T
    found = learning.between(np.cov(x.T), np.cov(grads.T))
    np.testing.assert_allclose(found, covariance, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "setting"),
    [("f2", COARSE), *(pytest.param(n, Setting(), marks=pytest.mark.slow) for n in ("mix", "g2"))],
)
def test_the_target_is_invariant_under_absurd_ridges(name, setting):
    target = TARGETS[name]
    parameters = absurd_transport(target.dim), some_ridges(target.dim, size=setting.size)
    algorithm = probbp.surrogate(
        target.logdensity_fn, setting.step_size, *parameters, setting.weights
    )
    z = largest_z_of(KEY, algorithm, target, 20_000, setting.num_steps, "float64")
    assert z < PASS


# ---------------------------------------------------------------------------------------
# Warm-up with gradients.

DIM = 24
ROTATION = np.linalg.qr(np.random.default_rng(0).normal(size=(DIM, DIM)))[0]
SKEW = stats.genlogistic(0.5)


def skewed(x):
    """Independent skewed coordinates, rotated: no marginal shows them."""
    y = ROTATION @ x
    return jnp.sum(-y - 1.5 * jnp.log1p(jnp.exp(-y)))


@pytest.fixture
def few_ridges(monkeypatch):
    """What is enough here."""
    few = partial(ridges.fit, num_ridges=48, num_iterations=150)
    monkeypatch.setattr(regression.ridges, "fit", few)
    blank = partial(ridges.no_ridges, num_ridges=48)
    monkeypatch.setattr(warmup, "no_ridges", blank)


def run(estimator, num_warmup, num_samples, starts=lambda key: jax.random.normal(key, (DIM,))):
    algorithm = partial(probbp.surrogate, skewed, estimator=estimator)
    return probbp.sample(
        KEY,
        algorithm,
        starts,
        num_warmup=num_warmup,
        num_samples=num_samples,
        progress_bar=False,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The draws may be wrong")  # its tails are exponential
def test_ridges_find_a_posterior_that_values_alone_do_not():
    data = run(probbp.estimators.reverse(), 580, 1000)
    attrs = data["sample_stats"].attrs
    assert attrs["num_warmup_gradients"] == 4 * 580
    assert attrs["num_warmup_evaluations"] == 4 * (1 + 280)  # the rounds' own
    y = data.posterior["x"].values @ ROTATION.T
    for power in (1, 2):
        batches = (y**power).reshape(4 * 20, 50, DIM).mean(axis=1)
        z = (batches.mean(axis=0) - SKEW.moment(power)) / (batches.std(axis=0) / 80**0.5)
        assert np.abs(z).max() < PASS
    assert attrs["held_out_std"] < 0.5
    alone = run(None, 580, 100)["sample_stats"]
    assert alone.attrs["num_warmup_gradients"] == 0
    assert attrs["held_out_std"] < alone.attrs["held_out_std"] / 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The draws may be wrong")
def test_an_estimate_will_do(few_ridges):
    """Along random tangents: its noise is that of the equations, and averages out."""
    data = run(probbp.estimators.forward(num_tangents=8), 870, 500)
    y = data.posterior["x"].values @ ROTATION.T
    batches = y.reshape(4 * 10, 50, DIM).mean(axis=1)
    z = (batches.mean(axis=0) - SKEW.mean()) / (batches.std(axis=0) / 40**0.5)
    assert np.abs(z).max() < PASS
    assert data["sample_stats"].attrs["held_out_std"] < 1


def test_a_guided_walk_starts_without_a_gradient():
    carry = warmup.init(skewed, jnp.zeros((2, DIM)), 10, estimator=probbp.estimators.reverse())
    assert carry.history.point_grads.shape == (10, 2, DIM)
    assert not carry.grads.any()
    assert warmup.init(skewed, jnp.zeros((2, DIM)), 10).history.point_grads is None
