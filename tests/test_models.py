"""One table of models: prior draws are finite, and so is the posterior's log density."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap import compiled, key_of, normal
from numpyro.handlers import seed
from numpyro.infer import MCMC, Predictive
from numpyro.infer.util import log_density, potential_energy, unconstrain_fn

import probbp
from probbp.models import bnn, hierarchical
from probbp.numpyro import Kernel

X = normal(0, 30, 2)
GROUP = np.arange(30) % 3

# name -> (model of data, its inputs)
MODELS = {
    "hierarchical": (partial(hierarchical.model, num_groups=3), (X, GROUP)),
    "hierarchical, non-centred": (
        partial(hierarchical.model, num_groups=3, is_centered=False),
        (X, GROUP),
    ),
    "bnn": (bnn.model, (X,)),
    "bnn, deep, known noise": (partial(bnn.model, widths=(8, 8), noise_scale=0.1), (X,)),
    "bnn, classifier": (
        partial(bnn.model, widths=(), num_outputs=3, is_classifier=True),
        (X,),
    ),
}

every_model = pytest.mark.parametrize("name", MODELS)


@cache
def run(name):
    """Return prior draws, and the log density's slope and gradient at one of them."""
    model, inputs = MODELS[name]

    @compiled
    def everything():
        draws = Predictive(model, num_samples=20)(key_of(1), *inputs)
        draw = {site: values[0] for site, values in draws.items()}
        args = (*inputs, draw.pop("y"))
        z = unconstrain_fn(seed(model, 0), args, {}, draw)
        potential = partial(potential_energy, seed(model, 0), args, {})
        _, slope = jax.jvp(potential, (z,), (jax.tree.map(jnp.ones_like, z),))
        return draws, slope, jax.grad(potential)(z)

    return everything()


@every_model
def test_prior_draws_are_finite(name):
    draws, _, _ = run(name)
    assert draws["y"].shape == (20, 30)
    assert all(np.isfinite(draw).all() for draw in draws.values())


@every_model
def test_forward_and_reverse_mode_agree_on_the_log_density(name):
    _, slope, grad = run(name)
    assert all(np.any(leaf != 0) for leaf in grad.values())
    np.testing.assert_allclose(slope, sum(np.sum(leaf) for leaf in grad.values()), rtol=1e-8)


def test_the_two_parametrisations_are_one_density():
    """With alpha = mu + tau z, the density of z is that of alpha times tau for each group."""
    tau, y = 0.7, normal(3, 30)
    shared = {"mu": 0.4, "tau": tau, "sigma": 0.9, "beta": normal(4, 2)}
    z = normal(5, 3)

    @compiled
    def densities():
        return [
            log_density(MODELS[name][0], (X, GROUP, y), {}, shared | site)[0]
            for name, site in (
                ("hierarchical", {"alpha": shared["mu"] + tau * z}),
                ("hierarchical, non-centred", {"z": z}),
            )
        ]

    centred, other = densities()
    np.testing.assert_allclose(other, centred + 3 * np.log(tau), rtol=1e-12)


@pytest.mark.slow
def test_the_two_parametrisations_are_one_posterior():
    _, inputs = MODELS["hierarchical"]
    y = Predictive(MODELS["hierarchical"][0], num_samples=1)(key_of(3), *inputs)["y"][0]
    means, errors = [], []
    for name in ("hierarchical", "hierarchical, non-centred"):
        mcmc = MCMC(
            Kernel(MODELS[name][0], probbp.mala, metric="dense"),
            num_warmup=2_000,
            num_samples=8_000,
            num_chains=4,
            chain_method="vectorized",
            progress_bar=False,
        )
        mcmc.run(key_of(0), *inputs, y)
        draws = mcmc.get_samples(group_by_chain=True)["alpha"]
        means.append(draws.mean((0, 1)))
        errors.append(draws.mean(1).std(0) / np.sqrt(4))
    # Four chains give the error; Student's t with three degrees of freedom has heavy tails.
    assert np.all(abs(means[0] - means[1]) < 10 * np.hypot(*errors))


def test_the_network_s_products_can_be_replaced():
    calls = []

    def dense(x, w):
        calls.append(w.shape)
        return x @ w

    predictive = Predictive(partial(bnn.model, widths=(4,), dense=dense), num_samples=1)
    jax.eval_shape(predictive, key_of(0), X)
    assert (2, 4) in calls
    assert (4, 1) in calls
