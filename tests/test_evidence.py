"""The log evidence by bridge sampling, where it is known."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import probbp
from probbp.samplers.surrogate import learning
from probbp.samplers.surrogate.evidence import bridge
from probbp.samplers.surrogate.transport import inflate


@pytest.fixture
def unrefined(monkeypatch):
    """Where the map is not what is tested: its refinement is long, and magnifies rounding."""
    monkeypatch.setattr(learning, "refine", lambda first, *values: inflate(first, 1.1))


class Target(NamedTuple):
    """A density whose integral is known, with exact draws.

    logdensity_fn: of a position, (d,).
    truth: log of its integral.
    draw: `(rng, n) -> (n, d)`.
    num_draws: of each of four chains.
    """

    logdensity_fn: Callable
    truth: float
    draw: Callable
    num_draws: int = 1000


def gaussian():
    """Ten dimensions, scales from 1 to 100, correlated."""
    factor = np.tril(np.random.default_rng(0).normal(size=(10, 10)) / 4) + np.diag(
        np.geomspace(1, 100, 10)
    )
    precision = jnp.asarray(np.linalg.inv(factor @ factor.T))
    truth = 5 * np.log(2 * np.pi) + np.log(np.diag(factor)).sum()
    draw = lambda rng, n: rng.normal(size=(n, 10)) @ factor.T
    # Of these the surrogate has degree three; of more it has four, at ten times the cost.
    return Target(lambda x: -x @ precision @ x / 2, truth, draw, num_draws=500)


def funnel():
    def logdensity_fn(x):
        return -(x[0] ** 2) / 2 - jnp.sum(x[1:] ** 2) * jnp.exp(-x[0]) / 2 - 2 * x[0]

    def draw(rng, n):
        v = rng.normal(size=(n, 1))
        return np.hstack([v, np.exp(v / 2) * rng.normal(size=(n, 4))])

    return Target(logdensity_fn, 2.5 * np.log(2 * np.pi), draw)


def banana():
    def logdensity_fn(x):
        return -(x[0] ** 2) / 2 - 2 * (x[1] - x[0] ** 2) ** 2

    def draw(rng, n):
        a = rng.normal(size=n)
        return np.stack([a, a**2 + rng.normal(size=n) / 2], axis=1)

    return Target(logdensity_fn, np.log(2 * np.pi / 2), draw)


def skewed():
    """The logs of three Gamma variables."""

    def logdensity_fn(x):
        return jnp.sum(3 * x - jnp.exp(x))

    return Target(logdensity_fn, 3 * np.log(2), lambda rng, n: np.log(rng.gamma(3, size=(n, 3))))


def two_modes():
    def logdensity_fn(x):
        ends = jnp.array([[-2.0, 0.0], [2.0, 0.0]])
        near = -jnp.sum((x - ends) ** 2, axis=1) / 2
        return jax.nn.logsumexp(near + jnp.log(jnp.array([0.3, 0.7])))

    def draw(rng, n):
        x = rng.normal(size=(n, 2))
        x[:, 0] += np.where(rng.random(n) < 0.3, -2, 2)
        return x

    return Target(logdensity_fn, np.log(2 * np.pi), draw)


def regression():
    """A linear regression with a Gaussian prior: the evidence is that of y."""
    rng = np.random.default_rng(1)
    design = rng.normal(size=(20, 3))
    y = design @ [1.0, -0.5, 2.0] + rng.normal(size=20)
    truth = stats.multivariate_normal(cov=4 * design @ design.T + np.eye(20)).logpdf(y)
    covariance = np.linalg.inv(design.T @ design + np.eye(3) / 4)

    def logdensity_fn(beta):
        prior = jax.scipy.stats.norm.logpdf(beta, 0, 2)
        return prior.sum() + jax.scipy.stats.norm.logpdf(y, design @ beta).sum()

    def draw(rng, n):
        return rng.multivariate_normal(covariance @ design.T @ y, covariance, size=n)

    return Target(logdensity_fn, truth, draw)


TARGETS = {f.__name__: f for f in (gaussian, funnel, banana, skewed, two_modes, regression)}


def z_scores(target, num_keys, num_evaluations=2000):
    zs = []
    for seed in range(num_keys):
        draws = target.draw(np.random.default_rng(seed), 4 * target.num_draws)
        draws = jnp.asarray(draws.reshape(4, target.num_draws, -1))
        found = probbp.log_evidence(
            jax.random.key(seed), target.logdensity_fn, draws, num_evaluations=num_evaluations
        )
        assert 0 < found.error < 0.1
        zs.append((found.log_evidence - target.truth) / found.error)
    return np.array(zs)


@pytest.mark.parametrize(
    "name", ["banana", *(pytest.param(n, marks=pytest.mark.slow) for n in TARGETS if n != "banana")]
)
def test_the_evidence_is_right_within_its_error(name):
    z = z_scores(TARGETS[name](), num_keys=3)
    assert np.all(np.abs(z) < 4), z
    assert np.mean(z**2) < 5, z


@pytest.mark.slow
def test_the_error_is_that_of_repetitions(unrefined):
    z = z_scores(TARGETS["two_modes"](), num_keys=16)
    assert 0.4 < np.mean(z**2) < 2.2, z


def test_a_bridge_of_gaussians():
    """The log ratio of exp(-x^2 / 2) to exp(-(x / 2)^2 / 2) is -log 2; z-scores have variance 1."""
    rng = np.random.default_rng(2)
    log_ratio = lambda x: -(x**2) / 2 + x**2 / 8
    z = []
    for _ in range(30):
        first, second = rng.normal(size=(2, 1000)), 2 * rng.normal(size=(1, 1000))
        found, error = bridge(jnp.asarray(log_ratio(first)), jnp.asarray(log_ratio(second)))
        z.append(float((found + np.log(2)) / error))
    assert abs(np.mean(z)) < 3.5 / 30**0.5
    assert 0.4 < np.var(z) < 2.0


def test_correlated_draws_count_as_few():
    """Draws that each come ten times have the error of a tenth of them."""
    rng = np.random.default_rng(3)
    few = jnp.asarray(0.5 * rng.normal(size=(4, 200)))
    other = jnp.asarray(0.5 * rng.normal(size=(1, 100_000)) - 0.25)
    (_, once), (_, often) = bridge(few, other), bridge(jnp.repeat(few, 10, axis=1), other)
    assert 0.8 < often / once < 1.25


@pytest.mark.slow
def test_a_large_constant_takes_no_digits_in_single_precision(unrefined):
    """Where the log density itself is known to 1/16 only: its rounding averages out."""
    draws = jnp.asarray(np.random.default_rng(5).normal(size=(4, 500, 2)), "float32")
    logdensity_fn = lambda x: 1e6 - jnp.sum(x**2) / 2
    found = probbp.log_evidence(jax.random.key(0), logdensity_fn, draws)
    assert abs(found.log_evidence - 1e6 - np.log(2 * np.pi)) < 4 * found.error < 0.02


@pytest.mark.slow
def test_a_pytree_and_batches_are_the_same(unrefined):
    target = regression()
    rng = np.random.default_rng(4)
    draws = jnp.asarray(target.draw(rng, 2000).reshape(4, 500, 3))
    tree = {"a": draws[..., 0], "b": draws[..., 1:]}

    def logdensity_fn(p):
        return target.logdensity_fn(jnp.concatenate([p["a"][None], p["b"]]))

    key = jax.random.key(0)
    whole = probbp.log_evidence(key, target.logdensity_fn, draws, num_evaluations=200)
    parts = probbp.log_evidence(key, logdensity_fn, tree, num_evaluations=200, batch_size=50)
    np.testing.assert_allclose(whole, parts, rtol=1e-9)


@pytest.mark.slow
def test_draws_of_a_run():
    target = regression()
    data = probbp.sample(
        jax.random.key(0),
        partial(probbp.surrogate, target.logdensity_fn),
        jnp.zeros(3),
        num_warmup=580,
        num_samples=500,
        progress_bar=False,
    )
    draws = data.posterior["x"].values
    found = probbp.log_evidence(
        jax.random.key(1), target.logdensity_fn, draws, num_evaluations=2000
    )
    assert abs(found.log_evidence - target.truth) < 4 * found.error


def test_what_the_surrogate_does_not_fit_is_refused():
    draws = jnp.asarray(np.random.default_rng(5).normal(size=(4, 500, 2)))
    with pytest.raises(ValueError, match="does not fit these draws"):
        probbp.log_evidence(
            jax.random.key(0), lambda x: -jnp.sum(x**2) / 2 + 3 * jnp.sin(20 * x[0]), draws
        )


@pytest.mark.parametrize(
    ("draws", "words"),
    [
        (jnp.zeros(5), r"leading axes \(chain, draw\)"),
        ({"a": jnp.zeros((2, 5)), "b": jnp.zeros((2, 6))}, "the same for all"),
        (jnp.zeros((2, 5)), "draws must hold at least 200, got 10"),
        (jnp.zeros((2, 500), int), "floating-point positions"),
    ],
)
def test_bad_input(draws, words):
    with pytest.raises((ValueError, TypeError), match=words):
        probbp.log_evidence(jax.random.key(0), jnp.sum, draws)
