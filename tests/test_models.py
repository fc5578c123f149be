"""One table of models: prior draws are finite, and so is the posterior's log density."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer import MCMC, Predictive
from numpyro.infer.util import initialize_model

import probbp
from probbp.models import bnn, hierarchical
from probbp.numpyro import Kernel

X = jax.random.normal(jax.random.key(0), (30, 2))
GROUP = jnp.arange(30) % 3

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
    draws = Predictive(model, num_samples=20)(jax.random.key(1), *inputs)
    assert draws["y"].shape == (20, 30)
    assert all(jnp.all(jnp.isfinite(draw)) for draw in draws.values())


@every_model
def test_forward_and_reverse_mode_agree_on_the_log_density(name):
    model, inputs = MODELS[name]
    y = Predictive(model, num_samples=1)(jax.random.key(1), *inputs)["y"][0]
    info = initialize_model(jax.random.key(2), model, model_args=(*inputs, y))
    z = info.param_info.z
    tangent = jax.tree.map(jnp.ones_like, z)
    _, slope = jax.jvp(info.potential_fn, (z,), (tangent,))
    grad = jax.grad(info.potential_fn)(z)
    np.testing.assert_allclose(slope, sum(jnp.sum(leaf) for leaf in grad.values()), rtol=1e-8)


def test_the_two_parametrisations_are_one_posterior():
    _, inputs = MODELS["hierarchical"]
    y = Predictive(MODELS["hierarchical"][0], num_samples=1)(jax.random.key(3), *inputs)["y"][0]
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
        mcmc.run(jax.random.key(0), *inputs, y)
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

    Predictive(partial(bnn.model, widths=(4,), dense=dense), num_samples=1)(jax.random.key(0), X)
    assert (2, 4) in calls
    assert (4, 1) in calls
