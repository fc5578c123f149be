"""Guiding a diffusion model through one step: the paper's claim, and exact posteriors, on digits.

Dou et al., 2025, arXiv:2505.07477, say that differentiating one step of a sampler is about 90 %
cheaper than backpropagation through all, at as good a metric or a better one. The models here are
small: scikit-learn's digits, a residual perceptron trained to predict their noise, 50 steps of DDIM
on the linear schedule, and as metrics the distance of the upper half to a given digit's
(in-painting) and the negative log probability of a given class under a logistic regression
(guidance). Ten seeds.

- latents: Adam on the noise of 16 samples a seed, one learning rate for all, from pure noise (the
  first step of training is 999) or from data noised halfway (499). `time` is that of a step over
  full backpropagation's, and `extra` that of what the gradient adds to the sampler. The metric is
  given after as many steps for all, and after as many as fit into full's time, with the difference
  to full and its standard error over seeds, paired. |z| / sqrt(d) says how far the noise has gone
  from where it was drawn: a prior would hold it at 1.
- with a prior: the log density of noise and observation is climbed instead.
- alignment: Adam on the network's parameters, so that samples are of one class. `denoising` is the
  loss that the network was trained for, afterwards: what alignment cost. "one for all" keeps one
  step for the whole batch.
- posteriors: MALA on the noise; whatever the force, the accept step makes it exact. In two
  dimensions the posterior is known (a Gaussian mixture's denoiser, quadrature over the noise): `z`
  is the largest error of four moments in standard errors. In 64 it is that of a digit whose upper
  half is seen, with the network for a prior. ESS is the median over a sample's dimensions, per
  second that of the forces alone; R-hat is the largest. None of this is tuned.

"gradient-free" moves along one random direction a step, by two more runs of the sampler.

    python examples/papers/sdo.py [--fast]

About a quarter of an hour on two cores.
"""

import argparse
import sys
import time
from functools import partial

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

import probbp
from probbp.estimators import reverse, through
from probbp.models import diffusion
from probbp.ops import sdo

NUM_STEPS, BATCH, RATE = 50, 16, 0.05
DATA = load_digits()
DIGITS = jnp.asarray(DATA.data / 8 - 1, jnp.float32)
PATH = sdo.gaussian_path(np.cov(np.asarray(DIGITS).T))
FULL, RECOMPUTED = {"keep_step": "all"}, {"keep_step": "all", "checkpoint": True}
LATENTS = {
    "full": FULL,
    "full, checkpointed": RECOMPUTED,
    "first (the paper)": {},
    "first, Gaussian path": {"surrogate": PATH},
    "random": {"keep_step": "random"},
    "last 12, Gaussian path": {"keep_step": sdo.Last(12), "surrogate": PATH},
    "gradient-free": None,
}
PARAMETERS = {
    "full": FULL,
    "full, checkpointed": RECOMPUTED,
    "random, one for all": {"keep_step": "random"},
    "random": {"keep_step": "random"},
    "random, Gaussian path": {"keep_step": "random", "surrogate": PATH},
    "subset 0.1, Gaussian path": {"keep_step": sdo.Subset(0.1), "surrogate": PATH},
    "first": {},
    "gradient-free": None,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a smoke test; its figures are rough")
    fast = parser.parse_args().fast
    begin = time.perf_counter()
    key_train, key_latents, key_align, key_mcmc = jax.random.split(jax.random.key(0), 4)
    network = diffusion.train(
        key_train,
        diffusion.Denoiser((64,), width=128, rngs=nnx.Rngs(0)),
        DIGITS,
        sdo.linear(NUM_STEPS),
        num_steps=100 if fast else 3000,
        prediction="eps",
        progress_bar=sys.stderr.isatty(),
    ).network
    seeds = jax.random.split(key_latents, 2 if fast else 10)
    num_moves = 2 if fast else 40
    for title, metric, start, has_prior in (
        ("in-painting from pure noise", inpainting, 999, False),
        ("guidance from pure noise", guidance, 999, False),
        ("guidance from halfway", guidance, 499, False),
        ("in-painting from pure noise, with the prior", inpainting, 999, True),
    )[: 1 if fast else 4]:
        latents(title, network, metric, start, has_prior, seeds, num_moves)
    alignment(network, jax.random.split(key_align, 2 if fast else 10), num_moves)
    two_dimensions(key_mcmc, 200 if fast else 4000, 2 if fast else 6)
    many_dimensions(key_mcmc, network, 20 if fast else 2000, 2 if fast else 7)
    print(f"\n{time.perf_counter() - begin:.0f} seconds, JAX {jax.__version__}")


def classifier():
    """Return log probabilities of classes as a function of digits."""
    fitted = LogisticRegression(C=0.1, max_iter=2000).fit(np.asarray(DIGITS), DATA.target)
    weights, bias = (jnp.asarray(a, jnp.float32) for a in (fitted.coef_.T, fitted.intercept_))
    return lambda x: jax.nn.log_softmax(x @ weights + bias)


LOG_PROBABILITIES = classifier()


def inpainting(x, target):
    return jnp.mean((x - target["digit"])[:, :32] ** 2, axis=1)


def guidance(x, target):
    return -jnp.sum(LOG_PROBABILITIES(x) * target["class"], axis=1)


def one_direction(fun, z, rng_key, *, size=1e-2):
    """Estimate the gradient of each sample's own loss from two values along a random direction."""
    direction = jax.random.normal(rng_key, z.shape)
    rise = fun(z + size * direction) - fun(z - size * direction)
    return (rise / (2 * size)).reshape(-1, *[1] * (z.ndim - 1)) * direction


# ---------------------------------------------------------------------------------------
# Noise and parameters, optimised.


def latents(title, network, metric, start, has_prior, seeds, num_moves):
    schedule = sdo.linear(NUM_STEPS, start=start)
    graph, params = nnx.split(network)

    def setting(rng_key):
        """Return the noise to start from, and targets."""
        key_rows, key_noise, key_class = jax.random.split(rng_key, 3)
        rows = jax.random.randint(key_rows, (2, BATCH), 0, len(DIGITS))
        signal = schedule.signal[0] if start < 999 else 0.0
        noise = jax.random.normal(key_noise, (BATCH, 64))
        classes = jax.nn.one_hot(jax.random.randint(key_class, (BATCH,), 0, 10), 10)
        target = {"digit": DIGITS[rows[1]], "class": classes}
        return signal**0.5 * DIGITS[rows[0]] + (1 - signal) ** 0.5 * noise, target

    def objective(z, target, params, rng_key, options):
        x = sdo.sample(nnx.merge(graph, params), z, schedule, rng_key=rng_key, **options)
        value = metric(x, target)
        if has_prior:  # minus the log density, for observations with noise of scale 0.2
            return 32 * value / (2 * 0.2**2) + jnp.sum(z**2, axis=1) / 2
        return value

    def moves(arm):
        options = LATENTS[arm]

        @jax.jit
        def run(rng_key, num, params):
            key_setting, key_moves = jax.random.split(rng_key)
            z, target = setting(key_setting)
            optimiser = optax.adam(RATE)

            def move(i, carry):
                z, state, _ = carry
                key = jax.random.fold_in(key_moves, i)
                fun = partial(objective, target=target, params=params, rng_key=key)
                if options is None:
                    fun = partial(fun, options=FULL)
                    value, grad = fun(z), one_direction(fun, z, key)
                else:
                    value, pull = jax.vjp(partial(fun, options=options), z)
                    (grad,) = pull(jnp.ones(BATCH))
                updates, state = optimiser.update(grad, state)
                return optax.apply_updates(z, updates), state, value

            carry = z, optimiser.init(z), jnp.zeros(BATCH)
            z, _, _ = jax.lax.fori_loop(0, num, move, carry)
            value = objective(z, target, params, rng_key, FULL).mean()
            return value, jnp.mean(jnp.linalg.norm(z, axis=1)) / 8

        return run

    @jax.jit
    def sampler(rng_key, num, params):
        z, target = setting(rng_key)
        move = lambda i, z: z + 1e-9 * objective(z, target, params, rng_key, FULL)[:, None]  # noqa: E731
        return jax.lax.fori_loop(0, num, move, z)

    compare(title, LATENTS, moves, sampler, params, seeds, num_moves, "|z|/sqrt d")


def alignment(network, seeds, num_moves):
    schedule = sdo.linear(NUM_STEPS)
    graph, start = nnx.split(network)
    target = {"class": jax.nn.one_hot(jnp.full(BATCH, 3), 10)}

    def objective(params, rng_key, options, is_shared=False):
        key_noise, key_keep = jax.random.split(rng_key)
        noise = jax.random.normal(key_noise, (BATCH, 64))
        sample = partial(
            sdo.sample, nnx.merge(graph, params), schedule=schedule, rng_key=key_keep, **options
        )
        if is_shared:  # samples that are batches of their own draw the same step from one key
            x = jax.vmap(lambda z: sample(z[None])[0])(noise)
        else:
            x = sample(noise)
        return guidance(x, target).mean()

    def denoising(params):
        key_time, key_noise = jax.random.split(jax.random.key(5))
        t = jax.random.randint(key_time, (len(DIGITS),), 0, 1000)
        noise = jax.random.normal(key_noise, DIGITS.shape)
        signal = jnp.asarray(schedule.train_signal, jnp.float32)[t][:, None]
        noisy = jnp.sqrt(signal) * DIGITS + jnp.sqrt(1 - signal) * noise
        return jnp.mean((nnx.merge(graph, params)(noisy, t.astype(jnp.float32)) - noise) ** 2)

    def moves(arm):
        options = PARAMETERS[arm]
        loss = partial(
            objective, options=FULL if options is None else options, is_shared="for all" in arm
        )

        @jax.jit
        def run(rng_key, num, params):
            optimiser = optax.adam(3e-5)

            def move(i, carry):
                params, state, _ = carry
                key = jax.random.fold_in(rng_key, i)
                if options is None:
                    flat, unravel = jax.flatten_util.ravel_pytree(params)
                    fun = lambda p: loss(unravel(p[0]), key)[None]  # noqa: E731
                    value = loss(params, key)
                    grad = unravel(one_direction(fun, flat[None], key)[0])
                else:
                    value, grad = jax.value_and_grad(loss)(params, key)
                updates, state = optimiser.update(grad, state)
                return optax.apply_updates(params, updates), state, value

            carry = params, optimiser.init(params), jnp.zeros(())
            params, _, _ = jax.lax.fori_loop(0, num, move, carry)
            # Of fresh samples, the same for all arms.
            value = objective(params, jax.random.fold_in(rng_key, 2**31), FULL)
            return value, denoising(params)

        return run

    @jax.jit
    def sampler(rng_key, num, params):
        def move(i, total):
            return total + objective(params, jax.random.fold_in(rng_key, i), FULL)

        return jax.lax.fori_loop(0, num, move, jnp.zeros(()))

    print(f"\ndenoising loss before alignment {denoising(start):.3f}")
    title = "alignment to one class"
    compare(title, PARAMETERS, moves, sampler, start, seeds, num_moves, "denoising")


def compare(title, arms, moves, sampler, params, seeds, num_moves, last_column):
    """Run all arms over the seeds, at equal steps and at equal time, and print a table."""
    bar = partial(tqdm, leave=False, disable=not sys.stderr.isatty())
    num = jnp.int32(num_moves)
    runs = {arm: moves(arm) for arm in ("full", *arms)}
    jax.block_until_ready([run(seeds[0], jnp.int32(1), params) for run in runs.values()])
    sampler(seeds[0], jnp.int32(1), params)
    results = {arm: [] for arm in arms}
    seconds = np.zeros((len(seeds), 1 + len(arms)))
    for s, seed in enumerate(bar(seeds, title)):
        calls = {"sampler": sampler} | runs
        for a, (arm, call) in enumerate(calls.items()):  # in turn: ratios of times mean something
            begin = time.perf_counter()
            result = jax.block_until_ready(call(seed, num, params))
            seconds[s, a] = time.perf_counter() - begin
            if arm in results:
                results[arm].append(result)
    full_time = seconds[:, 1:2]
    ratios = np.median(seconds / full_time, axis=0)
    extra = np.median((seconds - seconds[:, :1]) / (full_time - seconds[:, :1]), axis=0)
    print(
        f"\n{title}; a step of full {1e3 * np.median(full_time) / num_moves:.1f} ms\n{'':26s}"
        f"{'time':>7s}{'extra':>7s}{'equal steps':>13s}{'- full':>20s}{'equal time':>13s}"
        f"{'- full':>20s}{last_column:>12s}",
        flush=True,
    )
    full = np.array([value for value, _ in results["full"]])
    for a, (arm, run) in enumerate(bar(runs.items(), "equal time"), start=1):
        final = np.array([value for value, _ in results[arm]])
        last = np.mean([last for _, last in results[arm]])
        timed = final
        if a > 1:
            in_time = jnp.int32(max(num_moves / ratios[a], 1))
            timed = np.array([run(seed, in_time, params)[0] for seed in seeds])
        cells = "".join(
            f"{x.mean():13.4g}{f'{(x - full).mean():.2g} +- {error(x - full):.1g}':>20s}"
            for x in (final, timed)
        )
        tqdm.write(f"{arm:26s}{ratios[a]:7.2f}{extra[a]:7.2f}{cells}{last:12.3g}")


def error(x):
    return x.std(ddof=1) / len(x) ** 0.5


# ---------------------------------------------------------------------------------------
# Posteriors.

UNIT = optax.normalize_by_update_norm


def two_dimensions(rng_key, num_samples, num_forces):
    schedule = sdo.linear(20)
    data = diffusion.mixture([0.4, 0.6], [[-1.0, 0.5], [1.0, -0.5]], [[0.3, 0.1], [0.1, 0.2]])
    denoiser = diffusion.mixture_denoiser(data, schedule)
    matrix, y, scale = jnp.array([[1.0, 0.5]]), jnp.array([0.4]), 0.4
    covariance = np.cov(np.asarray(data.sample(rng_key, (100_000,))).T)
    path = sdo.gaussian_path(covariance)

    def sampled(z):
        return sdo.sample(denoiser, z, schedule)

    grid = jnp.linspace(-7, 7, 281)
    z = jnp.stack(jnp.meshgrid(grid, grid, indexing="ij"), axis=-1).reshape(-1, 2)
    x = sampled(z)
    misfit = jnp.sum((x @ matrix.T - y) ** 2, axis=1) / (2 * scale**2)
    known = jax.nn.softmax(-misfit - jnp.sum(z**2, axis=1) / 2) @ jnp.concatenate([x, x**2], axis=1)

    def logdensity_fn(z, **options):
        x = sdo.sample(denoiser, z[None], schedule, **options)[0]
        return -jnp.sum((matrix @ x - y) ** 2) / (2 * scale**2) - jnp.sum(z**2) / 2

    forces = {
        "full": (FULL, None),
        "first, raw": ({}, None),
        "first, unit length": ({}, UNIT(scale_factor=2.0)),
        "first, Gaussian path": ({"surrogate": path}, None),
        "last 5, Gaussian path": ({"surrogate": path, "keep_step": sdo.Last(5)}, None),
        "none": (FULL, optax.scale(0.0)),
    }
    print("\nposterior in 2 dimensions, 8 chains")
    posterior(rng_key, forces, num_forces, logdensity_fn, sampled, 2, num_samples, known)


def many_dimensions(rng_key, network, num_samples, num_forces):
    schedule = sdo.linear(NUM_STEPS)
    y = DIGITS[0, :32]

    def sampled(z):
        return sdo.sample(network, z, schedule)

    def logdensity_fn(z, **options):
        x = sdo.sample(network, z[None], schedule, **options)[0]
        return -jnp.sum((x[:32] - y) ** 2) / (2 * 0.3**2) - jnp.sum(z**2) / 2

    forces = {
        "full": (FULL, None),
        "full, checkpointed": (RECOMPUTED, None),
        "last 25, Gaussian path": ({"surrogate": PATH, "keep_step": sdo.Last(25)}, None),
        "last 12, Gaussian path": ({"surrogate": PATH, "keep_step": sdo.Last(12)}, None),
        "first, Gaussian path": ({"surrogate": PATH}, None),
        "first, unit length": ({}, UNIT(scale_factor=8.0)),
        "none": (FULL, optax.scale(0.0)),
    }
    print("\nposterior in 64 dimensions, 32 observed, 8 chains")
    posterior(rng_key, forces, num_forces, logdensity_fn, sampled, 64, num_samples, None)


def posterior(rng_key, forces, num_forces, logdensity_fn, sampled, dim, num_samples, known):
    print(
        f"{'force':26s}{'accepted':>9s}{'step':>9s}{'ESS':>8s}{'/1000 grads':>12s}{'ms':>8s}"
        f"{'ESS / s':>9s}{'R-hat':>8s}{'z':>6s}",
        flush=True,
    )
    for name, (options, transformation) in list(forces.items())[:num_forces]:
        estimator = None if transformation is None else through(transformation, reverse())
        density = partial(logdensity_fn, **options)
        data = probbp.sample(
            rng_key,
            partial(probbp.mala, density, estimator=estimator),
            jnp.zeros(dim),
            num_warmup=max(num_samples // 3, 40),
            num_samples=num_samples,
            num_chains=8,
            postprocess_fn=lambda z: {"x": sampled(z[None])[0]},
            progress_bar=sys.stderr.isatty(),
        )
        # Milliseconds of eight chains' forces; no force takes the density alone.
        force = jax.vmap(density if name == "none" else jax.value_and_grad(density))
        seconds = duration(jax.jit(force), jax.random.normal(rng_key, (8, dim)))
        x = np.asarray(data.posterior["x"])
        ess, r_hat = (np.asarray(f(data)["x"]) for f in (az.ess, az.rhat))
        z = ""
        if known is not None:
            draws = np.concatenate([x, x**2], axis=-1)
            sizes = np.asarray(az.ess(az.convert_to_dataset({"d": draws}), method="mean")["d"])
            z = np.abs(draws.mean((0, 1)) - known) / (draws.std((0, 1)) / sizes**0.5)
            z = f"{z.max():6.1f}"
        stats = data.sample_stats
        print(
            f"{name:26s}{float(stats['acceptance_rate'].mean()):9.2f}"
            f"{float(stats['step_size'].mean()):9.2g}{np.median(ess):8.0f}"
            f"{np.median(ess) / (8 * num_samples) * 1000:12.1f}{1e3 * seconds:8.2f}"
            f"{np.median(ess) / num_samples / seconds:9.1f}{r_hat.max():8.3f}{z}",
            flush=True,
        )


def duration(call, *args, num=25):
    """Return the median seconds of a call."""
    jax.block_until_ready(call(*args))
    seconds = []
    for _ in range(num):
        begin = time.perf_counter()
        jax.block_until_ready(call(*args))
        seconds.append(time.perf_counter() - begin)
    return np.median(seconds)


if __name__ == "__main__":
    main()
