"""IVON: the fixed point, its estimate of curvature, and a posterior of both low-rank factors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from probbp.models import blob, ivon

NUM_DATA, PRIOR_SCALE = 50, 0.5
# A quadratic loss whose parameters are a tree; their ravelled order is that of the keys.
ROOT = jax.random.normal(jax.random.key(0), (4, 4))
HESSIAN = ROOT @ ROOT.T / 4 + jnp.eye(4)
MINIMUM = jnp.array([1.0, -2.0, 0.5, 3.0])
PARAMS = {"a": jnp.zeros(3), "b": jnp.zeros(())}


def ravel(tree):
    return jnp.append(tree["a"], tree["b"])


def loss(params):
    residual = ravel(params) - MINIMUM
    return 0.5 * residual @ HESSIAN @ residual


def exact(kl_weight):
    """Return mean and precision of the mean-field posterior, which has the mean of the full one."""
    weight = NUM_DATA / kl_weight
    precision = weight * HESSIAN + jnp.eye(4) / PRIOR_SCALE**2
    return jnp.linalg.solve(precision, weight * HESSIAN @ MINIMUM), jnp.diag(precision)


def run(optimiser, params, num_steps, key=0):
    """Return the means and second derivatives at all steps, and the last state."""

    def step(carry, key):
        mean, state = carry
        draw = optimiser.sample(key, mean, state)
        updates, state = optimiser.update(jax.grad(loss)(draw), state, mean, draw=draw)
        mean = optax.apply_updates(mean, updates)
        return (mean, state), (ravel(mean), ravel(state.hessian))

    keys = jax.random.split(jax.random.key(key), num_steps)
    carry = params, optimiser.init(params)
    (mean, state), (means, hessians) = jax.jit(lambda keys: jax.lax.scan(step, carry, keys))(keys)
    return means, hessians, mean, state


def standard_error(chain, num_batches=20):
    """Of the mean of a correlated chain, from the means of batches."""
    batches = chain.reshape(num_batches, -1, chain.shape[-1]).mean(1)
    return batches.std(0, ddof=1) / num_batches**0.5


@pytest.mark.parametrize("kl_weight", [1.0, 0.1])
def test_a_quadratic_s_fixed_point_is_the_mean_field_posterior(kl_weight):
    options = {"num_data": NUM_DATA, "prior_scale": PRIOR_SCALE, "kl_weight": kl_weight}
    optimiser = ivon.ivon(0.05, decay=(0.9, 0.99), **options)
    means, hessians, _, _ = run(optimiser, PARAMS, 42_000)
    means, hessians = means[2_000:], hessians[2_000:]
    mean, precision = exact(kl_weight)
    assert jnp.all(abs(means.mean(0) - mean) < 4.5 * standard_error(means))
    # The square in the rule adds (1 - beta2) Var(h_hat) / 2 (h + delta). The estimate's variance
    # is that of sum_j H_ij s_j e_j e_i / s_i, and that of the mean which moves about.
    weight = NUM_DATA / kl_weight
    delta = 1 / (weight * PRIOR_SCALE**2)
    diagonal = jnp.diag(HESSIAN)
    variance = 1 / precision
    others = (HESSIAN**2 * variance).sum(1) / variance - diagonal**2
    moving = jnp.diag(HESSIAN @ jnp.cov(means.T) @ HESSIAN) * precision
    bias = 0.01 * (2 * diagonal**2 + others + moving) / (2 * (diagonal + delta))
    difference = hessians.mean(0) - diagonal
    assert jnp.all(abs(difference - bias) < 4.5 * standard_error(hessians))
    assert jnp.all(abs(weight * (hessians.mean(0) + delta) / precision - 1) < 0.05)


def test_the_estimate_of_curvature_is_unbiased():
    """With no memory and a step of size zero the state holds the estimate, but for its square."""

    def quartic(x):
        return jnp.sum(x**4) + jnp.prod(x)

    mean, beta2 = jnp.array([0.5, -1.0, 2.0]), 1 - 1e-6
    optimiser = ivon.ivon(0.0, num_data=5, hessian_init=0.7, decay=(0.0, beta2))
    state = optimiser.init(mean)

    @jax.jit
    @jax.vmap
    def estimate(key):
        draw = optimiser.sample(key, mean, state)
        _, after = optimiser.update(jax.grad(quartic)(draw), state, mean, draw=draw)
        return state.hessian + (after.hessian - state.hessian) / (1 - beta2)

    draws = estimate(jax.random.split(jax.random.key(1), 200_000))
    # E[12 x^2] under the posterior.
    want = 12 * (mean**2 + optimiser.std(state) ** 2)
    error = draws.std(0) / len(draws) ** 0.5
    assert jnp.all(abs(draws.mean(0) - want) < 4.5 * error)
    assert jnp.all(error < 0.02 * want)  # it could have failed


def test_the_variance_stays_positive():
    """A curvature of the wrong sign and of any size: at worst half of what was there remains."""
    optimiser = ivon.ivon(0.0, num_data=10, decay=(0.9, 0.5))
    mean = jnp.zeros(3)
    state = optimiser.init(mean)
    draw = mean + 1.0
    _, after = optimiser.update(jnp.array([-1e6, -0.2, 0.0]), state, mean, draw=draw)
    delta = 0.1
    assert jnp.all(after.hessian + delta >= 0.5 * (state.hessian + delta) * (1 - 1e-12))
    assert jnp.all(jnp.isfinite(optimiser.std(after)))


def test_a_step_without_noise_is_newton_s():
    """To the mode in one step, but for the scale that the learning rate has at the start."""
    hessian, mean = jnp.array([2.0, 7.0]), jnp.array([5.0, -4.0])
    optimiser = ivon.ivon(1.0, num_data=1e12, hessian_init=3.0, decay=(0.0, 1 - 1e-12))
    state = optimiser.init(mean)._replace(hessian=hessian)
    updates, _ = optimiser.update(hessian * (mean - 1), state, mean, draw=mean)
    np.testing.assert_allclose(mean + updates / 3.0, jnp.ones(2), rtol=1e-9)


def test_precision_and_structure_stay():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), PARAMS)
    schedule = optax.cosine_decay_schedule(0.1, 100)
    optimiser = ivon.ivon(schedule, num_data=jnp.float32(50), kl_weight=jnp.float32(0.1))
    state = optimiser.init(params)
    draw = optimiser.sample(jax.random.key(0), params, state)
    updates, after = jax.jit(optimiser.update)(draw, state, params, draw=draw)
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
        optimiser.update(PARAMS, optimiser.init(PARAMS), draw=PARAMS)


# --- the posterior of an adapter

X = jax.random.normal(jax.random.key(2), (60, 4))
Y = (X @ jnp.array([1.0, -2.0, 0.5, 0.0]) > 0).astype(int)
BASE = {"w": jnp.zeros((4, 2))}


@pytest.fixture(scope="module")
def fitted():
    lora = blob.bayesian_lora(
        lambda params, x: x @ params["w"], BASE, target="w", example=(X,), rank=2, alpha=2.0
    )
    optimiser = ivon.ivon(0.1, num_data=len(Y), hessian_init=0.5, decay=(0.9, 0.99))
    loss = ivon.mean_loss(lora)

    @jax.jit
    def fit(factors):
        def step(carry, key):
            factors, state = carry
            draw = optimiser.sample(key, factors, state)
            grads = jax.grad(loss)(draw, BASE, X, y=Y)
            updates, state = optimiser.update(grads, state, factors, draw=draw)
            return (optax.apply_updates(factors, updates), state), None

        keys = jax.random.split(jax.random.key(3), 1_000)
        return jax.lax.scan(step, (factors, optimiser.init(factors)), keys)[0]

    factors, state = fit(ivon.init(lora, jax.random.key(4)))
    return lora, factors, optimiser.std(state)


def test_an_adapter_is_fitted_and_predicts(fitted):
    lora, factors, std = fitted
    start = ivon.init(lora, jax.random.key(4))
    assert {name: leaf.shape for name, leaf in start.items()} == {"w_A": (2, 4), "w_B": (2, 2)}
    losses = [ivon.mean_loss(lora)(f, BASE, X, y=Y) for f in (start, factors)]
    np.testing.assert_allclose(losses[0], jnp.log(2.0))
    assert losses[1] < 0.5 * losses[0]
    params = ivon.posterior(lora, factors, std)
    mean = blob.predict(lora, jax.random.key(5), params, BASE, X, num_samples=0)[0]
    np.testing.assert_allclose(mean, X @ blob.merge(lora, params, BASE)["w"], rtol=1e-9)
    assert jnp.mean(mean.argmax(-1) == Y) > 0.9


def test_predictions_draw_both_factors(fitted):
    """Mean and variance of the logits are those of the product of two Gaussian factors."""
    lora, factors, std = fitted
    params = ivon.posterior(lora, factors, std)
    logits = blob.predict(lora, jax.random.key(6), params, BASE, X[:5], num_samples=20_000)
    a, b, var_a, var_b = (
        leaf[f"w_{part}"] for leaf in (factors, jax.tree.map(jnp.square, std)) for part in "AB"
    )
    inner, var_inner = X[:5] @ a.T, X[:5] ** 2 @ var_a.T
    mean = lora.scale * inner @ b.T
    variance = lora.scale**2 * ((inner**2 + var_inner) @ (b**2 + var_b).T - inner**2 @ (b**2).T)
    error = jnp.sqrt(variance / len(logits))
    assert jnp.all(abs(logits.mean(0) - mean) < 4.5 * error)
    squares = (logits - mean) ** 2
    error = squares.std(0) / len(logits) ** 0.5
    assert jnp.all(abs(squares.mean(0) - variance) < 4.5 * error)
    # Noise on A alone is less.
    fixed = {name: leaf for name, leaf in params.items() if name != "w_B_g"}
    narrow = blob.predict(lora, jax.random.key(6), fixed, BASE, X[:5], num_samples=2_000)
    assert jnp.all(narrow.std(0) < logits.std(0))


def test_a_posterior_of_both_factors_is_saved_and_loaded(fitted, tmp_path):
    lora, factors, std = fitted
    params = ivon.posterior(lora, factors, std)
    for name in ("w_A", "w_B"):
        root = params["w_g" if name == "w_A" else "w_B_g"]
        np.testing.assert_allclose(blob.std(root), std[name], rtol=1e-12)
    blob.save(lora, params, tmp_path / "adapter.safetensors")
    loaded = blob.load(lora, tmp_path / "adapter.safetensors")
    assert set(loaded) == set(params)
    for name in params:
        np.testing.assert_array_equal(loaded[name], params[name])
