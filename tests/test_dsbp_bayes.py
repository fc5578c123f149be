"""Tracked spectra in inference: a sampler's scale, learnt and frozen; a guide's first guess."""

from functools import partial

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from cheap import compiled, key_of, normal
from invariance import FAIL, PASS, largest_z_of
from numpyro.infer import MCMC, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoLowRankMultivariateNormal
from optax.contrib import MuonDimensionNumbers
from sklearn.datasets import load_breast_cancer
from targets import anisotropic

import probbp
from probbp.estimators import reverse, through
from probbp.numpyro import Kernel
from probbp.optim import dsbp

SIZE = 6


def spectrum_of(matrix, rank):
    values, vectors = jnp.linalg.eigh(matrix)
    return dsbp.Spectrum(
        vectors[:, ::-1][:, :rank], values[::-1][:rank], jnp.trace(matrix), jnp.array(1)
    )


def spiked(bulk=0.5, seed=0):
    """A covariance of two large directions and a sphere."""
    vectors = jnp.linalg.qr(normal(seed, SIZE, 2))[0]
    return bulk * jnp.eye(SIZE) + (vectors * jnp.array([20.0, 5.0])) @ vectors.T


def dense(metric):
    inner = jnp.eye(len(metric.sigma)) + (metric.U * (metric.lam - 1)) @ metric.U.T
    return metric.sigma[:, None] * inner * metric.sigma


@pytest.mark.parametrize("rank", [2, SIZE])
def test_a_spectrum_is_blackjax_s_low_rank_scale(rank):
    covariance, scale = spiked(), np.arange(1.0, SIZE + 1)
    spectrum = spectrum_of(covariance, rank)
    np.testing.assert_allclose(dense(dsbp.inverse_mass_matrix(spectrum)), covariance, atol=1e-10)
    scaled = dsbp.inverse_mass_matrix(spectrum, scale=scale)
    np.testing.assert_allclose(dense(scaled), covariance * np.outer(scale, scale), atol=1e-9)
    inverse = dsbp.inverse_mass_matrix(spectrum, of="precision")
    np.testing.assert_allclose(dense(inverse), np.linalg.inv(covariance), atol=1e-9)


def test_a_scale_of_some_directions_alone_is_refused():
    projector = spectrum_of(spiked(bulk=0.0), 2)
    for make in (dsbp.inverse_mass_matrix, partial(dsbp.guide_params, np.zeros(SIZE))):
        with pytest.raises(ValueError, match="unexplored"):
            make(projector)
    indefinite = spectrum_of(spiked() - 10 * np.eye(SIZE), 3)
    with pytest.raises(ValueError, match="unexplored"):
        dsbp.inverse_mass_matrix(indefinite, of="precision")
    with pytest.raises(ValueError, match="'covariance' or 'precision'"):
        dsbp.inverse_mass_matrix(projector, of="hessian")
    assert np.all(np.isfinite(compiled(dsbp.inverse_mass_matrix)(spectrum_of(spiked(), 2)).sigma))


# The gradient, and estimates that are none. `through` starts the transform afresh at each call, so
# that its random plane is one and the same.
PLANE = dsbp.scale_by_dynamic_spectral(
    2, "random", weight_dimension_numbers=lambda _: MuonDimensionNumbers((0,), ())
)
ESTIMATORS = {
    "exact": reverse(),
    "projected on a plane": through(PLANE, reverse()),
    "sharpness": dsbp.two_point(0.3),
    "wrong": through(optax.scale(-2.0), reverse()),
}


@pytest.mark.slow
def test_chains_with_any_of_them_are_exact():
    """Scale from the Hessian; forces from the gradient, a projection, a penalty, a wrong sign."""
    target = anisotropic(SIZE)
    at = np.zeros(SIZE)
    product = dsbp.hessian_product(lambda x: -target.logdensity_fn(x), at)
    spectrum = dsbp.leading_eigenpairs(key_of(0), product, at, rank=2, num_probes=200)
    metric = dsbp.inverse_mass_matrix(spectrum, of="precision")
    for name, estimator in ESTIMATORS.items():
        algorithm = probbp.mala(target.logdensity_fn, 0.3, metric, estimator=estimator)
        z = largest_z_of(key_of(1), algorithm, target, 2_000, 10)
        assert z < PASS, (name, z)

    # The test sees what a scale that differs from state to state would do.
    def of_the_position(rng_key, state):
        scale = 0.3 * jnp.exp(-0.2 * jnp.sum(jnp.abs(state.position)))
        return probbp.mala(target.logdensity_fn, scale, inverse_mass_matrix=metric).step(
            rng_key, state
        )

    wrong = blackjax.SamplingAlgorithm(algorithm.init, of_the_position)
    assert largest_z_of(key_of(1), wrong, target, 2_000, 10) > FAIL


# The scale that warm-up learns.


def update_all(core, draws):
    return jax.lax.scan(lambda s, x: (core.update(s, x, None), None), core.init(SIZE), draws)[0]


def test_the_tracked_scale_is_the_covariance_of_the_draws():
    """Two windows: the first finds the standard deviations, the second the correlations."""
    scale = np.array([1.0, 10.0, 0.1, 1.0, 5.0, 1.0])
    covariance = spiked() * jnp.outer(scale, scale)
    draws = jax.random.multivariate_normal(key_of(0), scale, covariance, (8_000,))
    core = dsbp.tracked_metric(2).build_core(buffer_size=10)
    state = core.final(update_all(core, draws[:4_000]))
    variances = (4_000 * draws[:4_000].var(0) + 5) / 4_005  # five draws of variance 1 beside them
    np.testing.assert_allclose(state.scale**2, variances, rtol=1e-9)
    assert int(state.count) == 0
    again = jax.lax.scan(lambda s, x: (core.update(s, x, None), None), state, draws[4_000:])[0]
    learnt = dense(core.final(again).inverse_mass_matrix) / jnp.outer(scale, scale)
    # The best of its kind: rank two and a sphere, of the exact correlations.
    standard = state.scale / scale
    best = spectrum_of(spiked() / jnp.outer(standard, standard), 2)
    best = dense(dsbp.inverse_mass_matrix(best)) * jnp.outer(standard, standard)
    error, least = (jnp.linalg.norm(x - spiked()) for x in (learnt, best))
    assert error < least + 0.1 * np.linalg.norm(spiked())
    left, least, before = (
        jnp.linalg.cond(jnp.linalg.solve(x, spiked()))
        for x in (learnt, best, jnp.diag(standard**2))
    )
    assert left < 1.2 * least < before / 3


def test_no_draw_leaves_the_scale_as_it_was():
    core = dsbp.tracked_metric(2).build_core()
    state = core.final(core.init(SIZE))
    np.testing.assert_allclose(dense(state.inverse_mass_matrix), np.eye(SIZE), atol=1e-12)
    with pytest.raises(ValueError, match="metric='diag'"):
        dsbp.tracked_metric(0)


HOSTS = {
    "probbp.warmup": lambda target: probbp.warmup(
        key_of(0),
        partial(probbp.mala, target.logdensity_fn),
        np.zeros(target.dim),
        3_000,
        metric=dsbp.tracked_metric(3),
    )[1]["inverse_mass_matrix"],
    "blackjax.staged_adaptation": lambda target: (
        blackjax.staged_adaptation(
            blackjax.nuts, target.logdensity_fn, metric=dsbp.tracked_metric(3)
        )
        .run(key_of(0), np.zeros(target.dim), num_steps=600)[0]
        .parameters["inverse_mass_matrix"]
    ),
}


@pytest.mark.parametrize("host", HOSTS)
def test_warm_up_learns_it(host):
    """What is left to the sampler is much rounder than the target."""
    target = anisotropic(SIZE, condition=1_000.0)
    learnt = dense(HOSTS[host](target))
    left = jnp.linalg.cond(jnp.linalg.solve(learnt, target.covariance))
    assert left < np.linalg.cond(target.covariance) / 10


def cancer():
    x, y = load_breast_cancer(return_X_y=True)
    return jnp.asarray((x - x.mean(0)) / x.std(0)), jnp.asarray(y)


def logistic(x, y=None):
    weights = numpyro.sample("weights", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
    numpyro.sample("y", dist.Bernoulli(logits=x @ weights).to_event(1), obs=y)


def test_a_guide_starts_with_the_covariance_of_a_spectrum():
    x, loc = normal(1, 12, SIZE), normal(2, SIZE)
    y = (x.sum(1) > 0).astype(int)
    guide = AutoLowRankMultivariateNormal(logistic, rank=2)
    svi = SVI(logistic, guide, optax.sgd(0.1), Trace_ELBO())

    @compiled
    def start():
        spectrum = spectrum_of(spiked(), 2)
        params = dsbp.guide_params(loc, spectrum)
        state = svi.init(key_of(2), x, y, init_params=params)
        posterior = guide.get_posterior(svi.get_params(state))
        return posterior.loc, posterior.covariance_matrix, spiked()

    found, covariance, expected = start()
    np.testing.assert_allclose(found, loc, rtol=1e-12)
    np.testing.assert_allclose(covariance, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.slow
def test_a_guide_starts_at_what_the_chain_s_warm_up_has_tracked():
    """On real data: its bound is better from the start than where the plain guide begins."""
    x, y = cancer()
    mcmc = MCMC(
        Kernel(logistic, probbp.mala, metric=dsbp.tracked_metric(6)),
        num_warmup=500,
        num_samples=500,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(key_of(0), x, y)
    draws = mcmc.get_samples()["weights"]
    assert all(np.all(np.isfinite(draws)) for draws in mcmc.get_samples().values())
    loc = draws.mean(0)
    product = (draws - loc).T @ (draws - loc) / len(draws)
    spectrum = dsbp.start(key_of(1), x.shape[1], 6)
    for _ in range(30):
        spectrum = dsbp.track(spectrum, lambda v: product @ v, jnp.trace(product), decay=0.0)
    guide = AutoLowRankMultivariateNormal(logistic, rank=6)
    svi = SVI(logistic, guide, optax.adam(1e-2), Trace_ELBO(num_particles=20))
    start = dsbp.guide_params(loc, spectrum)
    state = svi.init(key_of(2), x, y, init_params=start)
    posterior = guide.get_posterior(svi.get_params(state))
    np.testing.assert_allclose(
        posterior.covariance_matrix,
        dense(dsbp.inverse_mass_matrix(spectrum)),
        rtol=1e-6,
        atol=1e-8,
    )
    plain = svi.init(key_of(2), x, y)
    evaluate = compiled(svi.evaluate)
    assert evaluate(state, x, y) < evaluate(plain, x, y) - 10
