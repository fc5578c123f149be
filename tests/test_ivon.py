"""IVON: the fixed point, its estimate of curvature, and a posterior of both low-rank factors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cheap import compiled, key_of, normal

from probbp.models import blob, ivon

NUM_DATA, PRIOR_SCALE = 50, 0.5
# A quadratic loss whose parameters are a tree; their ravelled order is that of the keys.
ROOT = normal(0, 4, 4)
HESSIAN = ROOT @ ROOT.T / 4 + np.eye(4)
MINIMUM = np.array([1.0, -2.0, 0.5, 3.0])
PARAMS = {"a": np.zeros(3), "b": np.zeros(())}


def ravel(tree):
    return jnp.append(tree["a"], tree["b"])


def loss(params):
    residual = ravel(params) - MINIMUM
    return 0.5 * residual @ HESSIAN @ residual


def exact(kl_weight):
    """Return mean and precision of the mean-field posterior, which has the mean of the full one."""
    weight = NUM_DATA / kl_weight
    precision = weight * HESSIAN + np.eye(4) / PRIOR_SCALE**2
    return np.linalg.solve(precision, weight * HESSIAN @ MINIMUM), np.diag(precision)


def run(optimiser, params, num_steps):
    """Return the means and second derivatives at all steps, and the last state."""

    def step(carry, key):
        mean, state = carry
        draw = optimiser.sample(key, mean, state)
        updates, state = optimiser.update(jax.grad(loss)(draw), state, mean, draw=draw)
        mean = optax.apply_updates(mean, updates)
        return (mean, state), (ravel(mean), ravel(state.hessian))

    @compiled
    def steps(rng_key):
        carry = params, optimiser.init(params)
        return jax.lax.scan(step, carry, jax.random.split(rng_key, num_steps))[1]

    return steps(key_of(0))


def standard_error(chain, num_batches=20):
    """Of the mean of a correlated chain, from the means of batches."""
    batches = chain.reshape(num_batches, -1, chain.shape[-1]).mean(1)
    return batches.std(0, ddof=1) / num_batches**0.5


@pytest.mark.parametrize("kl_weight", [1.0, 0.1])
def test_a_quadratic_s_fixed_point_is_the_mean_field_posterior(kl_weight):
    options = {"num_data": NUM_DATA, "prior_scale": PRIOR_SCALE, "kl_weight": kl_weight}
    optimiser = ivon.ivon(0.05, decay=(0.9, 0.99), **options)
    means, hessians = run(optimiser, PARAMS, 42_000)
    means, hessians = means[2_000:], hessians[2_000:]
    mean, precision = exact(kl_weight)
    assert np.all(abs(means.mean(0) - mean) < 4.5 * standard_error(means))
    # The square in the rule adds (1 - beta2) Var(h_hat) / 2 (h + delta). The estimate's variance
    # is that of sum_j H_ij s_j e_j e_i / s_i, and that of the mean which moves about.
    weight = NUM_DATA / kl_weight
    delta = 1 / (weight * PRIOR_SCALE**2)
    diagonal = np.diag(HESSIAN)
    variance = 1 / precision
    others = (HESSIAN**2 * variance).sum(1) / variance - diagonal**2
    moving = np.diag(HESSIAN @ np.cov(means.T) @ HESSIAN) * precision
    bias = 0.01 * (2 * diagonal**2 + others + moving) / (2 * (diagonal + delta))
    difference = hessians.mean(0) - diagonal
    assert np.all(abs(difference - bias) < 4.5 * standard_error(hessians))
    assert np.all(abs(weight * (hessians.mean(0) + delta) / precision - 1) < 0.05)


def test_the_estimate_of_curvature_is_unbiased():
    """With no memory and a step of size zero the state holds the estimate, but for its square."""

    def quartic(x):
        return jnp.sum(x**4) + jnp.prod(x)

    mean, beta2 = np.array([0.5, -1.0, 2.0]), 1 - 1e-6
    optimiser = ivon.ivon(0.0, num_data=5, hessian_init=0.7, decay=(0.0, beta2))

    @compiled
    def estimates(rng_key):
        state = optimiser.init(mean)

        def estimate(rng_key):
            draw = optimiser.sample(rng_key, mean, state)
            _, after = optimiser.update(jax.grad(quartic)(draw), state, mean, draw=draw)
            return state.hessian + (after.hessian - state.hessian) / (1 - beta2)

        return optimiser.std(state), jax.vmap(estimate)(jax.random.split(rng_key, 200_000))

    std, draws = estimates(key_of(1))
    # E[12 x^2] under the posterior.
    want = 12 * (mean**2 + std**2)
    error = draws.std(0) / len(draws) ** 0.5
    assert np.all(abs(draws.mean(0) - want) < 4.5 * error)
    assert np.all(error < 0.02 * want)  # it could have failed


def test_the_variance_stays_positive():
    """A curvature of the wrong sign and of any size: at worst half of what was there remains."""
    optimiser = ivon.ivon(0.0, num_data=10, decay=(0.9, 0.5))
    mean = np.zeros(3)

    @compiled
    def step():
        state = optimiser.init(mean)
        grad = np.array([-1e6, -0.2, 0.0])
        _, after = optimiser.update(grad, state, mean, draw=mean + 1.0)
        return state.hessian, after.hessian, optimiser.std(after)

    before, after, std = step()
    delta = 0.1
    assert np.all(after + delta >= 0.5 * (before + delta) * (1 - 1e-12))
    assert np.all(np.isfinite(std))


def published(g, theta, m, h, g_bar, step, *, rate, num_data, tau, prior_scale, h_0, betas):
    """Algorithm 1 of Shen et al., 2024, line by line, for parameters of one array.

    Their ess is lambda = N / tau and their weight decay delta = 1 / (lambda s^2).
    """
    ess = num_data / tau
    decay = 1 / (ess * prior_scale**2)
    sigma = 1 / np.sqrt(ess * (h + decay))
    h_hat = g * (theta - m) / sigma**2  # of the draw theta = m + sigma eps
    g_bar = betas[0] * g_bar + (1 - betas[0]) * g
    squares = (1 - betas[1]) ** 2 * (h - h_hat) ** 2 / (h + decay) / 2
    h = betas[1] * h + (1 - betas[1]) * h_hat + squares
    debiased = g_bar / (1 - betas[0] ** step)
    # The rate is in units of the first step's: alpha (h_0 + delta).
    m = m - rate * (h_0 + decay) * (debiased + decay * m) / (h + decay)
    return m, h, g_bar


def test_steps_are_those_of_the_published_algorithm():
    settings = {"num_data": 5, "prior_scale": 0.8}
    optimiser = ivon.ivon(0.3, kl_weight=0.5, hessian_init=0.7, decay=(0.6, 0.5), **settings)
    mean, grads, moves = normal(0, 3), normal(1, 4, 3), normal(2, 4, 3)

    @compiled
    def run():
        state, m, seen = optimiser.init(mean), mean, []
        for grad, move in zip(grads, moves, strict=True):
            updates, state = optimiser.update(grad, state, m, draw=m + move)
            m = m + updates
            seen.append((m, state.hessian, state.momentum))
        return seen

    options = settings | {"rate": 0.3, "tau": 0.5, "h_0": 0.7, "betas": (0.6, 0.5)}
    state = mean, np.full(3, 0.7), np.zeros(3)
    for i, ours in enumerate(run()):
        state = published(grads[i], state[0] + moves[i], *state, i + 1, **options)
        for a, b in zip(ours, state, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)


def test_a_step_without_noise_is_newton_s():
    """To the mode in one step, but for the scale that the learning rate has at the start."""
    hessian, mean = np.array([2.0, 7.0]), np.array([5.0, -4.0])
    optimiser = ivon.ivon(1.0, num_data=1e12, hessian_init=3.0, decay=(0.0, 1 - 1e-12))

    @compiled
    def step():
        state = optimiser.init(mean)._replace(hessian=hessian)
        return optimiser.update(hessian * (mean - 1), state, mean, draw=mean)[0]

    np.testing.assert_allclose(mean + step() / 3.0, np.ones(2), rtol=1e-9)


def test_precision_and_structure_stay():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), PARAMS)
    schedule = optax.cosine_decay_schedule(0.1, 100)
    optimiser = ivon.ivon(schedule, num_data=jnp.float32(50), kl_weight=jnp.float32(0.1))

    def step(params):
        state = optimiser.init(params)
        draw = optimiser.sample(key_of(0), params, state)
        return state, draw, *optimiser.update(draw, state, params, draw=draw)

    state, draw, updates, after = jax.eval_shape(step, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for leaf in jax.tree.leaves((draw, updates, after.momentum, after.hessian)):
        assert leaf.dtype == jnp.float32


def test_bad_input():
    for options, words in (
        ({"num_data": 0}, "num_data must be positive"),
        ({"prior_scale": -1.0}, "prior_scale must be positive"),
        ({"kl_weight": 0.0}, "kl_weight must be positive"),
        ({"hessian_init": 0.0}, "hessian_init must be positive"),
        ({"decay": (0.9, 1.0)}, "decay must be"),
    ):
        with pytest.raises(ValueError, match=words):
            ivon.ivon(0.1, **({"num_data": 5} | options))
    optimiser = ivon.ivon(0.1, num_data=5)
    with pytest.raises(ValueError, match="needs the mean"):
        optimiser.update(PARAMS, None, draw=PARAMS)


# --- the posterior of an adapter

X = normal(2, 60, 4)
Y = (X @ np.array([1.0, -2.0, 0.5, 0.0]) > 0).astype(int)
BASE = {"w": np.zeros((4, 2))}


@pytest.fixture(scope="module")
def fitted():
    lora = blob.bayesian_lora(
        lambda params, x: x @ params["w"], BASE, target="w", example=(X,), rank=2, alpha=2.0
    )
    optimiser = ivon.ivon(0.1, num_data=len(Y), hessian_init=0.5, decay=(0.9, 0.99))
    loss = ivon.mean_loss(lora)

    @compiled
    def fit(factors):
        def step(carry, key):
            factors, state = carry
            draw = optimiser.sample(key, factors, state)
            grads = jax.grad(loss)(draw, BASE, X, y=Y)
            updates, state = optimiser.update(grads, state, factors, draw=draw)
            return (optax.apply_updates(factors, updates), state), None

        keys = jax.random.split(key_of(3), 1_000)
        factors, state = jax.lax.scan(step, (factors, optimiser.init(factors)), keys)[0]
        return factors, optimiser.std(state)

    start = compiled(partial(ivon.init, lora))(key_of(4))
    factors, std = fit(start)
    return lora, start, factors, std


def test_an_adapter_is_fitted_and_predicts(fitted):
    lora, start, factors, std = fitted
    assert {name: leaf.shape for name, leaf in start.items()} == {"w_A": (2, 4), "w_B": (2, 2)}
    loss = compiled(ivon.mean_loss(lora))
    losses = [loss(f, BASE, X, y=Y) for f in (start, factors)]
    np.testing.assert_allclose(losses[0], np.log(2.0))
    assert losses[1] < 0.5 * losses[0]
    params = ivon.posterior(lora, factors, std)

    @compiled
    def both(params):
        mean = blob.predict(lora, key_of(5), params, BASE, X, num_samples=0)[0]
        return mean, X @ blob.merge(lora, params, BASE)["w"]

    mean, merged = both(params)
    np.testing.assert_allclose(mean, merged, rtol=1e-9)
    assert np.mean(mean.argmax(-1) == Y) > 0.9


def test_predictions_draw_both_factors(fitted):
    """Mean and variance of the logits are those of the product of two Gaussian factors."""
    lora, _, factors, std = fitted
    params = ivon.posterior(lora, factors, std)
    predict = compiled(partial(blob.predict, lora), static_argnames="num_samples")
    logits = predict(key_of(6), params, BASE, X[:5], num_samples=20_000)
    a, b, var_a, var_b = (
        leaf[f"w_{part}"] for leaf in (factors, jax.tree.map(np.square, std)) for part in "AB"
    )
    inner, var_inner = X[:5] @ a.T, X[:5] ** 2 @ var_a.T
    mean = lora.scale * inner @ b.T
    variance = lora.scale**2 * ((inner**2 + var_inner) @ (b**2 + var_b).T - inner**2 @ (b**2).T)
    error = np.sqrt(variance / len(logits))
    assert np.all(abs(logits.mean(0) - mean) < 4.5 * error)
    squares = (logits - mean) ** 2
    error = squares.std(0) / len(logits) ** 0.5
    assert np.all(abs(squares.mean(0) - variance) < 4.5 * error)
    # Noise on A alone is less.
    fixed = {name: leaf for name, leaf in params.items() if name != "w_B_g"}
    narrow = predict(key_of(6), fixed, BASE, X[:5], num_samples=2_000)
    assert np.all(narrow.std(0) < logits.std(0))


def test_a_posterior_of_both_factors_is_saved_and_loaded(fitted, tmp_path):
    lora, _, factors, std = fitted
    params = ivon.posterior(lora, factors, std)
    for name in ("w_A", "w_B"):
        root = params["w_g" if name == "w_A" else "w_B_g"]
        np.testing.assert_allclose(blob.std(root), std[name], rtol=1e-12)
    blob.save(lora, params, tmp_path / "adapter.safetensors")
    loaded = blob.load(lora, tmp_path / "adapter.safetensors")
    assert set(loaded) == set(params)
    for name in params:
        np.testing.assert_array_equal(loaded[name], params[name])
