"""Posteriors under a diffusion prior by gradients of one step: exact with any force, and how fast.

Dou et al., 2025, arXiv:2505.07477, differentiate one step of a sampler in the place of all
(`sdo.py`). Here such a gradient is the force of MALA on the noise; whatever the force, the accept
step makes it exact. In two dimensions the posterior is known (a Gaussian mixture's denoiser,
quadrature over the noise): `z` is the largest error of four moments in standard errors. In 64 it is
that of a digit whose upper half is seen, with a network for a prior. ESS is the median over a
sample's dimensions, per second that of the forces alone; R-hat is the largest. None of this is
tuned.

    python examples/papers/sdo_posteriors.py [--fast]

Eight chains; intervals are over chains.
"""

import sys
import time
from functools import partial

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _denoiser import DIGITS, FULL, NUM_STEPS, PATH, RECOMPUTED, trained
from _evidence import above, below, exact, over_seeds
from _papers import SDO
from _results import panels, parsed, parser, write

import probbp
from probbp.estimators import reverse, through
from probbp.models import diffusion
from probbp.ops import sdo


def main():
    arguments = parsed(parser(__doc__))
    fast = arguments.fast
    begin = time.perf_counter()
    key_train, *_, key_mcmc = jax.random.split(jax.random.key(0), 4)
    network = trained(key_train, fast)
    few = ("full", "first, raw", "first, unit length", "first, Gaussian path") if fast else None
    found = {
        "2 dimensions": two_dimensions(key_mcmc, 100 if fast else 4000, few),
        "64 dimensions": many_dimensions(key_mcmc, network, 20 if fast else 2000, few),
    }
    print(f"\n{time.perf_counter() - begin:.0f} seconds, JAX {jax.__version__}")

    figure, axes = panels(2)
    for ax, (name, forces) in zip(axes, found.items(), strict=True):
        figures = [over_seeds("", force["speed"]) for force in forces.values()]
        means = np.array([f.mean for f in figures])
        ax.errorbar(means, range(len(means)), xerr=means - [f.low for f in figures], fmt="o")
        ax.set_yticks(range(len(means)), list(forces), fontsize=7)
        ax.set(xlabel="effective draws a second of forces", title=f"Posterior in {name}")
        ax.invert_yaxis()
    small, large = found.values()
    paper, ours = "first, unit length", "first, Gaussian path"
    write(
        arguments,
        paper=SDO,
        claim="The gradient of one step of a diffusion sampler does for a posterior what that of "
        "all steps does, at less cost.",
        setting="MALA, eight chains: a Gaussian mixture's denoiser in 2 dimensions, the posterior "
        "known; digits, 32 of 64 pixels seen. The figure: 64 dimensions, the first step's gradient "
        "at unit length.",
        ours=over_seeds("effective draws a second of forces, one step", large[paper]["speed"]),
        baseline=over_seeds("all steps", large["full"]["speed"]),
        checks=[
            *(
                below(
                    f"draws are right, 2 dimensions, {words}",
                    exact("largest error of a moment, in standard errors", small[force]["z"]),
                    4.0,
                )
                for force, words in (
                    ("first, raw", "one step"),
                    (paper, "one step at unit length"),
                    (ours, "one step, Gaussian path"),
                )
            ),
            *(
                above(
                    f"more effective draws a second than with all steps, {name}, {words}",
                    over_seeds(
                        "log of effective draws a second over those of all steps, chains",
                        np.log(forces[force]["speed"]) - np.log(forces["full"]["speed"]),
                    ),
                )
                for name, forces in found.items()
                for force, words in ((paper, "unit length"), (ours, "Gaussian path"))
            ),
            below(
                "chains agree in 64 dimensions, one step at unit length",
                exact("largest R-hat", large[paper]["r_hat"]),
                1.1,
            ),
        ],
        figure=figure,
        caption="Effective draws a second of forces, by what of the sampler is differentiated: "
        "mean over eight chains, 95 % intervals.",
    )


UNIT = optax.normalize_by_update_norm


def two_dimensions(rng_key, num_samples, few):
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
    return posterior(rng_key, forces, few, logdensity_fn, sampled, 2, num_samples, known)


def many_dimensions(rng_key, network, num_samples, few):
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
    return posterior(rng_key, forces, few, logdensity_fn, sampled, 64, num_samples, None)


def posterior(rng_key, forces, few, logdensity_fn, sampled, dim, num_samples, known):
    """Print a row for each force; return the speed of each chain, the largest R-hat and z."""
    found = {}
    print(
        f"{'force':26s}{'accepted':>9s}{'step':>9s}{'ESS':>8s}{'/1000 grads':>12s}{'ms':>8s}"
        f"{'ESS / s':>9s}{'R-hat':>8s}{'z':>6s}",
        flush=True,
    )
    for name in [name for name in forces if few is None or name in few]:
        options, transformation = forces[name]
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
        chains = [az.convert_to_dataset({"x": draws[None]}) for draws in x]
        speed = np.array([np.median(az.ess(chain)["x"]) for chain in chains]) * 8
        found[name] = {"speed": speed / num_samples / seconds, "r_hat": r_hat.max()}
        z = ""
        if known is not None:
            draws = np.concatenate([x, x**2], axis=-1)
            sizes = np.asarray(az.ess(az.convert_to_dataset({"d": draws}), method="mean")["d"])
            z = np.abs(draws.mean((0, 1)) - known) / (draws.std((0, 1)) / sizes**0.5)
            found[name]["z"] = z.max()
            z = f"{z.max():6.1f}"
        stats = data.sample_stats
        print(
            f"{name:26s}{float(stats['acceptance_rate'].mean()):9.2f}"
            f"{float(stats['step_size'].mean()):9.2g}{np.median(ess):8.0f}"
            f"{np.median(ess) / (8 * num_samples) * 1000:12.1f}{1e3 * seconds:8.2f}"
            f"{np.median(ess) / num_samples / seconds:9.1f}{r_hat.max():8.3f}{z}",
            flush=True,
        )
    return found


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
