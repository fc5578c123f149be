"""Diffusion priors: the mixture's closed forms, exact posteriors, training and tuning."""

from contextlib import contextmanager
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy.special
from cheap import compiled, fitted, key_of, normal
from flax import nnx
from numpyro.handlers import seed, trace
from numpyro.infer import HMC, MCMC, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import log_density
from scipy.stats import norm

import probbp
from probbp.estimators import reverse, through
from probbp.models import diffusion
from probbp.numpyro import Kernel, Optim
from probbp.ops import sdo
from probbp.runs import checkpoints

SCHEDULE = sdo.linear(8)
MATRIX, Y, SCALE = np.array([[1.0, 0.5]]), np.array([0.4]), 0.4
COVARIANCE = np.array([[0.3, 0.1], [0.1, 0.2]]) + 0.24 * np.array([[4.0, -2.0], [-2.0, 1.0]])


# Made once, and not as a part of a program that asks for them.
now = jax.ensure_compile_time_eval


@cache
def data():
    with now():
        return diffusion.mixture([0.4, 0.6], [[-1.0, 0.5], [1.0, -0.5]], [[0.3, 0.1], [0.1, 0.2]])


@cache
def best():
    with now():
        return diffusion.mixture_denoiser(data(), SCHEDULE)


@cache
def path():
    with now():
        return sdo.gaussian_path(COVARIANCE)


@cache
def mixed():
    """Gaussians of their own shapes, for closed forms."""
    covariances = [[[0.3, 0.1], [0.1, 0.2]], [[1.0, -0.5], [-0.5, 0.9]]]
    with now():
        return diffusion.mixture([0.3, 0.7], [[-1.0, 0.5], [1.0, 0.0]], covariances)


@cache
def rows():
    return np.asarray(compiled(lambda: data().sample(key_of(4), (500,)))(), np.float32)


def model(y=Y, **options):
    x = diffusion.prior("x", best(), (2,), SCHEDULE, **options)
    numpyro.sample("y", dist.Normal(MATRIX @ x, SCALE).to_event(1), obs=y)


def sampled(z, **options):
    return sdo.sample(best(), z[None], SCHEDULE, **options)[0]


def logdensity_fn(z, **options):
    residual = MATRIX @ sampled(z, **options) - Y
    return -jnp.sum(z**2) / 2 - jnp.sum(residual**2) / (2 * SCALE**2)


# ---------------------------------------------------------------------------------------
# The mixture.


def test_the_mixture_s_denoiser_is_its_score():
    x, times = 2 * normal(0, 5, 2), (0, 300, 999)

    @compiled
    def both(x):
        denoiser, gaussians = (
            diffusion.mixture_denoiser(mixed(), SCHEDULE),
            mixed().component_distribution,
        )
        found = []
        for t in times:
            signal = SCHEDULE.train_signal[t]
            noised = diffusion.mixture(
                mixed().mixing_distribution.probs,
                signal**0.5 * gaussians.loc,
                signal * gaussians.covariance_matrix + (1 - signal) * jnp.eye(2),
            )
            score = jax.vmap(jax.grad(noised.log_prob))(x)
            found.append((denoiser(x, jnp.full(5, float(t))), -((1 - signal) ** 0.5) * score))
        return found

    for eps, expected in both(x):
        np.testing.assert_allclose(eps, expected, rtol=1e-8)


def test_the_mixture_s_posterior_is_bayes_rule():
    @compiled
    def evidence(x):
        posterior = diffusion.mixture_posterior(mixed(), MATRIX, Y, SCALE)
        likelihood = dist.Normal(x @ MATRIX.T, SCALE).to_event(1).log_prob(Y)
        return mixed().log_prob(x) + likelihood - posterior.log_prob(x), data().variance

    of_each, variance = evidence(normal(0, 8, 2))
    np.testing.assert_allclose(of_each, of_each[0], rtol=1e-9)
    np.testing.assert_allclose(np.diag(COVARIANCE), variance, rtol=1e-9)


def test_a_mixture_of_data_has_the_classes_moments():
    x = normal(0, 60, 3)
    labels = np.arange(60) % 7 % 3

    @compiled
    def made():
        data = diffusion.mixture_of(jnp.asarray(x), labels, 3, ridge=0.1)
        gaussians = data.component_distribution
        return gaussians.loc, gaussians.covariance_matrix, data.mixing_distribution.probs

    loc, covariance, probs = made()
    for k in range(3):
        rows = np.asarray(x[labels == k])
        np.testing.assert_allclose(loc[k], rows.mean(0))
        np.testing.assert_allclose(
            covariance[k],
            np.cov(rows.T, bias=True) + 0.1 * np.eye(3),
            atol=1e-9,
        )
    np.testing.assert_allclose(probs, np.bincount(labels) / 60)


def test_the_sampler_comes_to_the_mixture_as_its_steps_grow():
    """In one dimension the sampler is monotone: quantiles go to quantiles."""
    data = diffusion.mixture([0.3, 0.7], [[-1.5], [1.0]], [[0.2]])
    levels = np.linspace(0.01, 0.99, 99)
    z = np.asarray(scipy.special.ndtri(levels))[:, None]

    def distance(num_steps):
        schedule = sdo.linear(num_steps)
        x = compiled(
            lambda z: sdo.sample(diffusion.mixture_denoiser(data, schedule), z, schedule)[:, 0]
        )(z)
        share = 0.3 * norm(-1.5, 0.2**0.5).cdf(x) + 0.7 * norm(1.0, 0.2**0.5).cdf(x)
        return np.max(np.abs(share - levels))

    few, many = distance(100), distance(1000)
    # Of first order in the steps: ten times as many leave about a tenth.
    assert many < few / 5
    assert many < 0.01


# ---------------------------------------------------------------------------------------
# The model.


def test_sites_shapes_and_plates():
    def several(eta):
        with numpyro.plate("outer", 4, dim=-2), numpyro.plate("inner", 3, dim=-1):
            diffusion.prior("x", best(), (2,), SCHEDULE, eta=eta)

    for eta in (0.0, 1.0):
        latent = {}

        @compiled
        def run(eta=eta, latent=latent):
            sites = trace(seed(several, 0)).get_trace(eta)
            latent |= {name: site["value"].shape for name, site in sites.items()}
            noise, x = sites["x_noise"]["value"], sites["x"]["value"]
            step_noise = None
            if eta:
                step_noise = sites["x_step_noise"]["value"]
                step_noise = jnp.moveaxis(step_noise.reshape(12, 8, 2), 1, 0)
            options = {"eta": eta, "step_noise": step_noise}
            plain = sdo.sample(best(), noise.reshape(12, 2), SCHEDULE, **options)
            return x, plain

        x, plain = run()
        shapes = {"x_noise": (4, 3, 2), "x": (4, 3, 2)}
        assert latent | shapes | ({"x_step_noise": (4, 3, 8, 2)} if eta else {}) == latent
        assert ("x_step_noise" in latent) == bool(eta)
        np.testing.assert_allclose(x.reshape(12, 2), plain, rtol=1e-10)


def test_the_log_density_is_the_sampler_s_and_its_gradient_the_kept_steps():
    z = np.array([0.5, -1.0])

    @compiled
    def evaluate(z):
        def ours(z, keep, rng_key):
            keyed = seed(partial(model, keep_step=keep, surrogate=path()), rng_key)
            return log_density(keyed, (), {}, {"x_noise": z})[0]

        def theirs(z, keep):
            return logdensity_fn(z, keep_step=keep, surrogate=path())

        keys = jax.random.split(key_of(0), 20)
        drawn = jax.vmap(partial(jax.value_and_grad(ours), z, sdo.Subset(0.5)))(keys)
        pairs = {
            keep: (jax.value_and_grad(ours)(z, keep, keys[0]), jax.value_and_grad(theirs)(z, keep))
            for keep in ("first", "all")
        }
        return pairs, drawn

    constant = -jnp.log(2 * jnp.pi) * 1.5 - jnp.log(SCALE)
    pairs, (values, grads) = evaluate(z)
    for (value, grad), (expected, expected_grad) in pairs.values():
        np.testing.assert_allclose(value, expected + constant, rtol=1e-10)
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-8)
        np.testing.assert_allclose(values, value, rtol=1e-10)
    # Each key draws a subset of its own.
    assert len(np.unique(np.round(grads[:, 0], 9))) > 5


@pytest.mark.slow
def test_svi_over_noise_and_a_condition():
    """A condition that the denoiser closes over is found along with the noise."""

    def shifted(y, keep_step="first"):
        shift = numpyro.sample("shift", dist.Normal(0.0, 2.0))

        def denoiser(x, t):  # the mixture's, moved by `shift`
            level = jnp.asarray(SCHEDULE.train_signal)[t.astype(int)][:, None]
            return best()(x - jnp.sqrt(level) * shift, t)

        with numpyro.plate("rows", len(y)):
            x = diffusion.prior(
                "x", denoiser, (2,), SCHEDULE, keep_step=keep_step, surrogate=path()
            )
            numpyro.sample("y", dist.Normal(x, 0.2).to_event(1), obs=y)

    y = rows()[:10].astype(float) + 3.0
    found = {}
    for keep in (sdo.Subset(0.5), "all"):
        fixed = partial(shifted, keep_step=keep)
        optim = Optim(optax.adam(0.1), reverse())
        svi = SVI(fixed, AutoNormal(fixed), optim, Trace_ELBO())
        params, losses = compiled(partial(fitted, svi, key_of(0), 120, y))()
        assert losses[-20:].mean() < losses[:20].mean() / 2
        found[keep] = params["shift_auto_loc"], params["shift_auto_scale"]
    (ours, _), (exact, scale) = found.values()
    # Both wander about one optimum by less than the posterior is wide.
    assert abs(ours - exact) < 2 * scale
    assert abs(exact - 3.0) < 1.0


# ---------------------------------------------------------------------------------------
# Exact posteriors.


@pytest.fixture(scope="module")
def moments():
    """Mean of x and of its square given y, by quadrature over the noise."""
    grid = np.linspace(-7, 7, 281)
    z = np.stack(np.meshgrid(grid, grid, indexing="ij"), axis=-1).reshape(-1, 2)
    x = compiled(lambda z: sdo.sample(best(), z, SCHEDULE))(z)
    log_weights = -np.sum(z**2, 1) / 2 - np.sum((x @ MATRIX.T - Y) ** 2, 1) / (2 * SCALE**2)
    return scipy.special.softmax(log_weights) @ np.concatenate([x, x**2], axis=1)


def assert_moments(x, moments):
    """Compare draws (chains, draws, 2) with the moments, by the means of batches."""
    draws = np.concatenate([x, x**2], axis=-1)
    chains, num, dim = draws.shape
    means = draws.reshape(chains * 10, num // 10, dim).mean(1)
    mcse = means.std(0, ddof=1) / len(means) ** 0.5
    assert np.all(np.abs(draws.mean((0, 1)) - moments) < 4 * mcse)
    # And that says something.
    assert np.all(mcse < 0.1 * draws.std((0, 1)))


UNIT = through(optax.normalize_by_update_norm(scale_factor=2.0), reverse())


def force(name):
    if name == "hybrid":
        return {"surrogate": path(), "keep_step": sdo.Last(3)}, None
    return {}, UNIT


@pytest.mark.parametrize(
    "name", ["hybrid", pytest.param("the paper's, of one length", marks=pytest.mark.slow)]
)
def test_mala_with_a_shortcut_for_a_force_is_exact(name, moments):
    options, estimator = force(name)
    data = probbp.sample(
        key_of(1),
        partial(probbp.mala, partial(logdensity_fn, **options), estimator=estimator),
        np.zeros(2),
        num_warmup=200,
        num_samples=500,
        num_chains=10,
        postprocess_fn=lambda z: {"x": sampled(z)},
        progress_bar=False,
    )
    assert_moments(np.asarray(data.posterior["x"]), moments)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["NumPyro's HMC", "our door"])
def test_numpyro_s_samplers_are_exact(name, moments):
    if name == "our door":  # with a step drawn afresh for each move
        kernel = Kernel(partial(model, surrogate=path(), keep_step="random"), probbp.mala)
    else:
        kernel = HMC(partial(model, surrogate=path()), num_steps=3, trajectory_length=None)
    mcmc = MCMC(
        kernel,
        num_warmup=100,
        num_samples=400,
        num_chains=10,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(key_of(2))
    assert_moments(np.asarray(mcmc.get_samples(group_by_chain=True)["x"]), moments)


# ---------------------------------------------------------------------------------------
# Networks.


def small(num_conditions=0):
    return diffusion.Denoiser(
        (2,), width=32, num_blocks=1, num_conditions=num_conditions, rngs=nnx.Rngs(0)
    )


def flat(network):
    leaves = jax.tree.leaves(nnx.state(network, nnx.Param))
    return np.concatenate([np.ravel(leaf) for leaf in leaves])


@pytest.mark.parametrize("prediction", ["v", pytest.param("eps", marks=pytest.mark.slow)])
def test_training_comes_near_the_best_denoiser(prediction):
    network = small()
    before = flat(network)
    trained = diffusion.train(
        key_of(0),
        network,
        rows(),
        SCHEDULE,
        num_steps=300,
        prediction=prediction,
        optimiser=optax.adam(5e-3),
        decay=0.99,
        progress_bar=False,
    )
    assert np.array_equal(before, flat(network))
    assert np.isfinite(trained.losses).all()
    times = np.random.default_rng(5).integers(0, 1000, 500)
    signal = np.asarray(SCHEDULE.train_signal, np.float32)[times][:, None]
    noise = normal(6, *rows().shape).astype(np.float32)
    noisy = np.sqrt(signal) * rows() + np.sqrt(1 - signal) * noise

    def error(network, prediction):
        output = network(noisy, jnp.asarray(times, jnp.float32))
        if prediction == "v":
            output = jnp.sqrt(signal) * output + jnp.sqrt(1 - signal) * noisy
        return jnp.mean((output - noise) ** 2)

    cases = (best(), "eps"), (trained.network, prediction), (network, prediction)
    least, after, before = compiled(lambda: [error(*case) for case in cases])()
    assert least < after < least + (before - least) / 5


def train(folder, key=0, x=None, condition=None, network=None, num_steps=20, **options):
    """A few steps of training."""
    return diffusion.train(
        key_of(key),
        small(2) if network is None else network,
        rows() if x is None else x,
        SCHEDULE,
        condition=np.eye(2)[np.arange(500) % 2] if condition is None else condition,
        num_steps=num_steps,
        batch_size=16,
        checkpoint=folder,
        progress_bar=False,
        **{"optimiser": optax.adam(1e-3), "every": 10} | options,
    )


def saver_that(monkeypatch, then):
    """Have `then(done)` called after each checkpoint is written."""
    saver = checkpoints.saver

    @contextmanager
    def noting(*args):
        with saver(*args) as save:

            def save_and_note(done, state, note):
                save(done, state, note)
                then(done)

            yield save_and_note

    monkeypatch.setattr(checkpoints, "saver", noting)


def stop(done):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    whole = train(None)
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        saver_that(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            train(folder)
    written = []
    with monkeypatch.context() as patch:
        saver_that(patch, written.append)
        resumed = train(folder)
        # What is done is read, however often it was to be written.
        again = train(folder, every=5)
    assert written == [20]
    for other in (resumed, again):
        np.testing.assert_array_equal(other.losses, whole.losses)
        np.testing.assert_array_equal(flat(other.network), flat(whole.network))
    data = "the training step or its data"
    others = [
        ("num_steps", {"num_steps": 30}),
        ("key and start", {"key": 1}),
        (data, {"x": 5 + rows()}),
        (data, {"condition": np.eye(2)[np.zeros(500, int)]}),
        (data, {"drop": 0.2}),
        (data, {"optimiser": optax.adam(2e-3)}),
    ]
    for differs, change in others:
        with pytest.raises(ValueError, match=f"of another run. What differs: .*{differs}"):
            train(folder, **change)
    np.testing.assert_array_equal(train(folder).losses, whole.losses)


def test_another_tuning_s_checkpoint_is_refused(tmp_path):
    def tune(key=0, aim=1.0, **options):
        return diffusion.tune(
            key_of(key),
            small(),
            lambda x: jnp.mean((x - aim) ** 2),
            (2,),
            sdo.linear(4),
            num_steps=2,
            batch_size=2,
            every=2,
            checkpoint=tmp_path / "run",
            progress_bar=False,
            **options,
        )

    first = tune()
    np.testing.assert_array_equal(tune().losses, first.losses)
    for change in ({"key": 1}, {"aim": 2.0}, {"keep_step": 1}, {"prediction": "eps"}):
        with pytest.raises(ValueError, match="of another run"):
            tune(**change)


def test_a_condition_tells_and_can_be_left_out():
    network = small(2)
    t = np.full(3, 10.0)
    x = np.ones((3, 2))
    conditions = [np.tile(row, (3, 1)) for row in (*np.eye(2), np.zeros(2))]
    run = compiled(lambda: (network(x, t), *(network(x, t, c) for c in conditions)))
    without, first, second, zero = run()
    assert not np.allclose(first, second)
    np.testing.assert_allclose(without, zero, rtol=1e-6)
    with pytest.raises(ValueError, match="num_conditions"):
        small()(x, t, np.zeros((3, 2)))


@pytest.mark.slow
def test_a_condition_that_is_always_dropped_is_not_learnt():
    labels = np.eye(2)[np.arange(500) % 2]
    for drop in (0.0, 1.0):
        network = small(2)
        trained = diffusion.train(
            key_of(0),
            network,
            rows(),
            SCHEDULE,
            condition=labels,
            drop=drop,
            num_steps=2,
            optimiser=optax.adam(1e-3),
            progress_bar=False,
        ).network
        before, after = (n.of_condition.kernel.get_value() for n in (network, trained))
        assert np.array_equal(before, after) == (drop == 1.0)


def test_what_diverges_says_so():
    with pytest.raises(FloatingPointError, match="learning rate"):
        diffusion.train(
            key_of(0),
            small(),
            rows(),
            SCHEDULE,
            num_steps=20,
            optimiser=optax.sgd(1e30),
            progress_bar=False,
        )
    with pytest.raises(ValueError, match="positive"):
        diffusion.train(key_of(0), small(), rows(), SCHEDULE, num_steps=0)


@pytest.mark.slow
def test_tuning_moves_the_samples():
    target = np.array([1.0, -0.5])
    network = small()
    before = flat(network)
    tuned = diffusion.tune(
        key_of(1),
        network,
        lambda x: jnp.mean(jnp.sum((x - target) ** 2, axis=-1)),
        (2,),
        SCHEDULE,
        num_steps=60,
        optimiser=optax.adam(3e-3),
        progress_bar=False,
    )
    assert np.array_equal(before, flat(network))
    assert tuned.losses[-10:].mean() < tuned.losses[:10].mean() / 2

    # The metric before each step is that of the samples of a sampler run by hand.
    @compiled
    def by_hand(rng_key):
        key_noise, _ = jax.random.split(jax.random.fold_in(rng_key, 0))
        noise = jax.random.normal(key_noise, (32, 2), jnp.float32)
        x = sdo.sample(network, noise, SCHEDULE, prediction="v")
        return jnp.mean(jnp.sum((x - target) ** 2, axis=-1))

    np.testing.assert_allclose(tuned.losses[0], by_hand(key_of(1)), rtol=1e-4)
