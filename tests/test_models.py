"""One table of models: prior draws are finite, and so is the posterior's log density."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap import compiled, key_of, normal
from numpyro.infer import MCMC, Predictive
from numpyro.infer.util import initialize_model, log_density

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


@every_model
def test_prior_draws_are_finite(name):
    model, inputs = MODELS[name]
    draws = compiled(Predictive(model, num_samples=20))(key_of(1), *inputs)
    assert draws["y"].shape == (20, 30)
    assert all(np.all(np.isfinite(draw)) for draw in draws.values())


@every_model
def test_forward_and_reverse_mode_agree_on_the_log_density(name):
    model, inputs = MODELS[name]

    @compiled
    def derivatives():
        y = Predictive(model, num_samples=1)(key_of(1), *inputs)["y"][0]
        info = initialize_model(key_of(2), model, model_args=(*inputs, y))
        z = info.param_info.z
        _, slope = jax.jvp(info.potential_fn, (z,), (jax.tree.map(jnp.ones_like, z),))
        return slope, jax.grad(info.potential_fn)(z)

    slope, grad = derivatives()
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
