"""Spiking networks of Flax modules, and the Bayesian model on them."""

from functools import partial
from typing import Any

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cheap import compiled, fitted, key_of, like, normal
from flax import nnx
from numpyro import handlers
from numpyro.infer import SVI, Predictive, TraceMeanField_ELBO

import probbp
from probbp.estimators import reverse
from probbp.models import snn
from probbp.numpyro import Optim
from probbp.ops import rate

KEY = key_of(0)
IMAGES = np.random.default_rng(0).uniform(0.0, 2.0, (6, 4, 4, 2)).astype(np.float32)
Y = np.arange(6) % 3
NORMS = {
    "batch": None,
    "group": partial(nnx.GroupNorm, num_groups=2),
    "layer": nnx.LayerNorm,
}


def drawn(make, scale=0.4):
    """Return a module with parameters that NumPy drew."""
    graph, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), rest)
    return nnx.merge(graph, jax.tree.map(lambda leaf: scale * leaf, like(params)), zeros)


def conv_net(norm=None):
    return snn.ConvNet(2, 3, widths=(4, 6), norm=norm, rngs=nnx.Rngs(0))


def gradients(network, num_steps, **options):
    graph, params, rest = nnx.split(network, nnx.Param, ...)

    def loss(params):
        net = nnx.merge(graph, params, rest, copy=True)
        logits = rate.simulate(net, rate.constant(IMAGES), num_steps, **options)
        return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()

    return compiled(jax.value_and_grad(loss))(params)


def cosine(a, b):
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (a, b))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize(
    "norm",
    [
        pytest.param(norm, id=name, marks=() if name == "layer" else pytest.mark.slow)
        for name, norm in NORMS.items()
    ],
)
def test_convolution_pooling_residuals_and_norms(norm):
    """One step is exact in every module; more steps have the value, and about the gradient."""
    network = conv_net(norm)
    one = [gradients(network, 1, gradient=gradient) for gradient in ("rate", "bptt")]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *one)
    more = [
        gradients(network, 6, gradient=gradient, order="layer") for gradient in ("rate", "bptt")
    ]
    assert np.isclose(more[0][0], more[1][0], rtol=1e-5)
    assert cosine(more[0][1], more[1][1]) > 0.5


def test_batch_norm_over_time_keeps_the_running_averages():
    train = normal(0, 7, 20, 3) * np.array([1.0, 2.0, 3.0]) + 1
    for order, gradient in (("layer", "rate"), ("layer", "bptt"), ("time", "rate")):
        norm = snn.BatchNorm(3, momentum=0.0)
        options: Any = {"order": order, "gradient": gradient}
        run = partial(rate.simulate, lambda spike, x, norm=norm: norm(spike, x), **options)
        out = run(rate.events(train), 7)
        axes = (0, 1) if order == "layer" else 1
        mean, var = train.mean(axes, keepdims=True), train.var(axes, keepdims=True)
        np.testing.assert_allclose(norm.mean[...], mean.mean((0, 1)), rtol=1e-5)
        np.testing.assert_allclose(norm.var[...], var.mean((0, 1)), rtol=1e-5)
        expected = ((train - mean) / np.sqrt(var + 1e-5)).mean(0)
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    norm.eval()
    before = norm.mean[...]
    out = rate.simulate(lambda spike, x: norm(spike, x), rate.constant(10 + train[0]), 2)
    assert np.all(norm.mean[...] == before)
    np.testing.assert_allclose(out, (10 + train[0] - before) / np.sqrt(norm.var[...]), rtol=1e-4)


NETWORK = drawn(lambda: snn.MLP((5, 16, 3), rngs=nnx.Rngs(1)))
X = normal(0, 40, 5) + 1
LABELS = (X[:, 0] > 1).astype(int) + (X[:, 1] > 1.5)


@pytest.mark.slow
def test_the_model_is_fitted_by_svi_and_predicts():
    model = partial(snn.model, network=NETWORK, num_steps=6, temperature=0.2)
    simulated = partial(model, simulate=partial(rate.simulate, gradient="bptt"))
    guide = snn.guide(model, NETWORK)
    optim = Optim(optax.adam(2e-2), reverse())
    svi, through_time = (SVI(m, guide, optim, TraceMeanField_ELBO()) for m in (model, simulated))

    @compiled
    def everything():
        params, losses = fitted(svi, KEY, 300, X, LABELS)
        _, (first,) = fitted(through_time, KEY, 1, X, LABELS)
        start = handlers.seed(guide, 0)(X, LABELS)
        prior = Predictive(model, num_samples=3)(KEY, X)
        draws = Predictive(model, guide=guide, params=params, num_samples=20)(KEY, X)
        return prior, losses, first, start, jax.nn.softmax(draws["logits"]).mean(0)

    prior, losses, first, start, probs = everything()
    assert prior["network/hidden.0.kernel"].shape == (3, 5, 16)
    assert np.isfinite(prior["logits"]).all()
    assert losses[-50:].mean() < losses[:10].mean() - 100
    assert np.isclose(losses[0], first, rtol=1e-6)  # the value is exact
    kernel = NETWORK.hidden[0].kernel[...]
    assert np.max(np.abs(start["network/hidden.0.kernel"] - kernel)) < 0.02 * 6
    assert np.mean(probs.argmax(-1) == LABELS) > 0.8


def test_batches_of_the_data_count_as_all_of_it():
    model = partial(snn.model, network=NETWORK, num_steps=2)
    guide = snn.guide(model, NETWORK)

    def loss(x, y, **options):
        return TraceMeanField_ELBO().loss(KEY, {}, partial(model, **options), guide, x, y)

    @compiled
    def everything():
        handlers.seed(guide, 0)(X, LABELS)
        parts = slice(20), slice(20, 40)
        half = [loss(X[part], LABELS[part], num_rows=40) for part in parts]
        return half, [loss(X, LABELS, temperature=t) for t in (1.0, 2.0, 1e9)]

    half, (whole, warm, prior) = everything()
    assert np.isclose(np.mean(half), whole, rtol=1e-5)
    assert np.isclose(warm - prior, (whole - prior) / 2, rtol=1e-3)


def test_a_network_with_a_state_is_refused():
    with pytest.raises(ValueError, match="num_groups"):
        snn.model(IMAGES, Y, network=conv_net())


@pytest.mark.slow
def test_the_force_of_rates_leaves_mcmc_exact():
    """The log density is a step function of the weight; the reference is a sum over a grid."""
    x, y = np.array([0.6, 1.1, 1.7]), np.array([0.1, 0.5, 0.8])

    def logdensity_fn(w):
        firing = rate.simulate(lambda spike, x: spike(w * x), rate.constant(x), 5)
        return -0.5 * w**2 - 0.5 * jnp.sum((y - firing) ** 2) / 0.3**2

    grid = np.linspace(-6, 6, 40_001)
    log_weights = compiled(jax.vmap(logdensity_fn))(grid)
    weights = jax.nn.softmax(log_weights)
    mean = jnp.sum(weights * grid)
    second = jnp.sum(weights * grid**2)
    assert np.any(compiled(jax.vmap(jax.grad(logdensity_fn)))(grid) != -grid)  # it does push

    algorithm = partial(probbp.mala, logdensity_fn, estimator=reverse())
    data = probbp.sample(
        KEY, algorithm, np.array(0.5), num_warmup=500, num_samples=5000, num_chains=4
    )
    (draws,) = data.posterior.values()
    for values, expected in ((draws, mean), (draws**2, second)):
        values = np.asarray(values)
        assert abs(values.mean() - expected) < 4.5 * float(az.mcse(values))
