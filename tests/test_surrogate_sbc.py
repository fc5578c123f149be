"""Simulation-based calibration of the surrogate transition, its warm-up included, on two models."""

from functools import partial

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC
from numpyro.infer.util import log_density

import probbp
from probbp.diagnostics import numpyro_simulator, simulation_based_calibration, uniformity
from probbp.numpyro import Kernel
from probbp.samplers.surrogate import kernel, learning, polynomial, transport, warmup
from probbp.samplers.surrogate.transport import inflate

NUM_SIMULATIONS, NUM_CHAINS, NUM_DRAWS = 40, 4, 25
X = jnp.linspace(-1.5, 1.5, 8)


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """The chain is exact whatever was learned: let it learn less, as it does so many times."""
    monkeypatch.setattr(learning, "refine", lambda first, *values: inflate(first, 1.1))
    monkeypatch.setattr(
        transport, "fit_marginals", partial(transport.fit_marginals, num_iterations=4)
    )
    monkeypatch.setattr(polynomial, "MAX_DEGREE", 3)


def bent_regression(y=None):
    """A line whose slope is the exponential of a parameter: a posterior that bends."""
    intercept = numpyro.sample("intercept", dist.Normal(0, 1))
    slope = numpyro.sample("slope", dist.LogNormal(0, 0.7))
    noise = numpyro.sample("noise", dist.HalfNormal(1))
    with numpyro.plate("rows", len(X)):
        numpyro.sample("y", dist.Normal(intercept + slope * X, 0.2 + noise), obs=y)


def counts(y=None):
    """A rate per group around a common one, seen through Poisson counts."""
    center = numpyro.sample("center", dist.Normal(1, 0.5))
    with numpyro.plate("groups", 3):
        rate = numpyro.sample("rate", dist.Normal(center, 0.4))
        numpyro.sample("y", dist.Poisson(jnp.exp(rate)), obs=y)


def calibrated(model):
    """Return the p-value over all parameters and the log likelihood."""
    mcmc = MCMC(
        Kernel(model, probbp.surrogate),
        num_warmup=203,
        num_samples=8 * NUM_DRAWS,
        thinning=8,
        num_chains=NUM_CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )

    @jax.jit
    def infer(rng_key, data):
        mcmc.run(rng_key, **data)
        draws = mcmc.get_samples()
        return {name: draws[name] for name in names}

    @jax.jit
    def quantities(params, data):
        return {"log density": log_density(model, (), data, params)[0]}

    simulate = numpyro_simulator(model, data="y")
    names = simulate(jax.random.key(0))[0].keys()
    return simulation_based_calibration(
        jax.random.key(1),
        simulate,
        infer,
        num_simulations=NUM_SIMULATIONS,
        vectorized=False,
        progress_bar=False,
        quantities=quantities,
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", [bent_regression, counts])
def test_ranks_are_uniform(model):
    result = calibrated(model)
    _, overall = uniformity(result)
    assert overall > 1e-3, result


@pytest.mark.slow
def test_a_ratio_of_the_wrong_sign_is_seen(monkeypatch):
    """The draws are too narrow, which the log density tells first."""

    def log_ratio(kind, state, proposal, here, there):
        change = kernel.surrogate_logdensity(there) - kernel.surrogate_logdensity(here)
        return kernel.log_density(proposal) - kernel.log_density(state) + change

    monkeypatch.setattr(kernel, "log_ratio", log_ratio)
    for module in (learning, warmup):  # an affine map is fitted in no time
        monkeypatch.setattr(module, "MAX_MAP_DIM", 0)
    _, overall = uniformity(calibrated(bent_regression))
    assert overall < 1e-5
