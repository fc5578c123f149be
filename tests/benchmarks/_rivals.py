"""One sampler on one target: what `rivals.py` starts in each sampler's own environment.

    python tests/benchmarks/_rivals.py RIVAL TARGET --data DIR --seed N --out FILE

Every sampler gets the same log density of the same unconstrained coordinates, and a seed. It leaves
its draws, the evaluations of the log density that it took, and its CPU seconds in FILE. Each
sampler's package is imported by its own function, so that an environment needs JAX, NumPyro and
that package alone.
"""

import argparse
import importlib.metadata
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax.flatten_util import ravel_pytree
from numpyro.infer import init_to_uniform
from numpyro.infer.util import initialize_model
from posteriors import load

ENOUGH = 700
"""Effective draws, roughly counted, at which a sampler that can go on is stopped."""

MOST = 3_000_000
"""Evaluations after which it is stopped all the same."""

KEPT = 1_200
"""Draws per walker that are kept at most; the others are thinned out."""

BOXES = {
    "eight_schools-eight_schools_noncentered": [50.0, *[10.0] * 9],
    "kidiq-kidscore_interaction": [100.0, 200.0, 10.0, 10.0, 10.0],
}
"""Target -> half-widths of the box around zero of samplers that need a prior; 10 where not here.

They are the first of 10, 20, 50, 100 ... that hold a coordinate's mean and six standard deviations.
"""


class Target:
    """The log density of a posterior, of flat unconstrained coordinates.

    Called with points (n, dim) it gives their n log densities, and counts them.

    Attributes:
        single: the same for one point, to be traced by JAX; it counts only with `callback`.
        model: the NumPyro model, for NUTS; `model_kwargs` its data.
        info: NumPyro's description of it.
        unravel: flat position -> NumPyro's.
        box: half-widths of a box around zero that holds the posterior.
    """

    def __init__(self, name: str, folder: Path, callback: bool = False):
        posterior = load(folder)[name]
        self.model, self.model_kwargs = posterior.model, posterior.model_kwargs
        self.info = initialize_model(
            jax.random.key(0),
            self.model,
            init_strategy=init_to_uniform,
            model_kwargs=self.model_kwargs,
            validate_grad=False,
        )
        flat, self.unravel = ravel_pytree(self.info.param_info.z)
        self.dim, self.count = flat.size, 0
        self.box = np.asarray(BOXES.get(name, np.full(self.dim, 10.0)))
        self.batch = jax.jit(jax.vmap(self.density))
        self.single = self.counted if callback else self.density

    def density(self, x):
        value = -self.info.potential_fn(self.unravel(x))
        return jnp.where(jnp.isnan(value), -jnp.inf, value)

    def counted(self, x):
        jax.debug.callback(self.add, x)
        return self.density(x)

    def add(self, x) -> None:
        self.count += np.size(x) // self.dim

    def __call__(self, x) -> np.ndarray:
        x = np.asarray(x, float).reshape(-1, self.dim)
        self.count += len(x)
        # Sizes are rounded up, so that few programs are compiled.
        size = 1 << max(len(x) - 1, 7).bit_length() if len(x) > 1 else 1
        padded = np.concatenate([x, np.broadcast_to(x[-1], (size - len(x), self.dim))])
        return np.asarray(self.batch(padded))[: len(x)]

    def starts(self, seed: int, num: int) -> np.ndarray:
        return np.random.default_rng(seed).uniform(-2, 2, (num, self.dim))


class Run(NamedTuple):
    """What a sampler leaves.

    Attributes:
        kind: "chains", "ensemble" (chains without a warm-up of their own), "weighted", or
            "approximate".
        draws: (chain, draw, dim); (draw, dim) if weighted or approximate.
        evals: evaluations up to each draw, warm-up included; one number if not of chains.
        own: the sampler's own count of its evaluations, or nan.
        log_weights: of weighted draws.
    """

    kind: str
    draws: np.ndarray
    evals: np.ndarray
    own: float = np.nan
    log_weights: np.ndarray = np.zeros(0)


# ---------------------------------------------------------------------------------------
# Ensembles of walkers.


def run_emcee(target: Target, seed: int) -> Run:
    """Stretch moves of 32 walkers, half of them at once."""
    import emcee

    walkers = max(32, 2 * target.dim)
    sampler = emcee.EnsembleSampler(walkers, target.dim, target, vectorize=True)
    state = emcee.State(
        target.starts(seed, walkers), random_state=np.random.RandomState(seed).get_state()
    )

    def more(state, num_steps):
        state = sampler.run_mcmc(state, num_steps)
        return state, sampler.get_chain()

    return ensemble(target, more, state)


def run_zeus(target: Target, seed: int) -> Run:
    """Slices along differences of walkers, as many as emcee's."""
    import random

    import zeus

    np.random.seed(seed)
    random.seed(seed)
    walkers = max(32, 2 * target.dim)
    sampler = zeus.EnsembleSampler(walkers, target.dim, target, vectorize=True, verbose=False)

    own = walkers

    def more(start, num_steps):
        nonlocal own
        sampler.run_mcmc(start, num_steps, progress=False)
        own += sampler.ncall
        return None, sampler.get_chain()  # None: go on from there

    return ensemble(target, more, target.starts(seed, walkers))._replace(own=float(own))


def ensemble(target: Target, more: Callable, state) -> Run:
    """Run longer and longer until there is enough, and thin.

    Args:
        target: the target.
        more: `(state, num_steps) -> (state, draws (step, walker, dim) so far)`.
        state: where it starts.
    """
    evals, length = [np.zeros(0)], 500
    while True:
        before = target.count
        state, draws = more(state, length)
        evals.append(np.linspace(before, target.count, length + 1)[1:])
        draws = np.swapaxes(draws, 0, 1)
        length = draws.shape[1] // 2
        if rough_ess(draws[:, length:]) > ENOUGH or target.count > MOST:
            break
    thinning = -(-draws.shape[1] // KEPT)
    return Run(
        "ensemble",
        draws[:, thinning - 1 :: thinning],
        np.concatenate(evals)[thinning - 1 :: thinning],
    )


def rough_ess(draws: np.ndarray) -> float:
    """Effective draws of (chain, draw, dim): the least over coordinates and their squares."""
    draws = draws[:, :: -(-draws.shape[1] // 2000)]
    num = draws.shape[1]
    both = np.concatenate([draws, draws**2], axis=-1)
    means = both.mean((0, 1))
    spectrum = np.abs(np.fft.rfft(both - means, 2 * num, axis=1)) ** 2
    correlation = np.fft.irfft(spectrum.mean(0), axis=0)[:num]
    correlation = correlation / np.arange(num, 0, -1)[:, None]
    correlation /= correlation[0]
    pairs = correlation[: num // 2 * 2].reshape(num // 2, 2, -1).sum(1)
    positive = np.cumprod(pairs > 0, axis=0)
    return float(np.min(draws.shape[0] * num / (2 * (pairs * positive).sum(0) - 1)))


# ---------------------------------------------------------------------------------------
# Weighted draws: a prior, uniform on a box, and a likelihood.


def run_pocomc(target: Target, seed: int) -> Run:
    """Asked for 400 effective draws; without the extra evaluations for the evidence."""
    import pocomc
    from scipy import stats

    prior = pocomc.Prior([stats.uniform(-half, 2 * half) for half in target.box])
    sampler = pocomc.Sampler(prior, target, vectorize=True, random_state=seed)
    sampler.run(n_total=400, n_evidence=0, progress=False)
    samples, weights, *_ = sampler.posterior()
    with np.errstate(divide="ignore"):
        log_weights = np.log(weights)
    own = float(sampler.results["calls"][-1])
    return Run("weighted", samples, np.asarray(target.count), own, log_weights)


def run_nautilus(target: Target, seed: int) -> Run:
    """Asked for 400 effective draws; all else default, 2,000 live points."""
    import nautilus

    sampler = nautilus.Sampler(
        lambda u: target.box * (2 * u - 1),
        target,
        n_dim=target.dim,
        pass_dict=False,
        vectorized=True,
        seed=seed,
    )
    sampler.run(n_eff=400, verbose=False)
    points, log_weights, _ = sampler.posterior()
    return Run("weighted", points, np.asarray(target.count), float(sampler.n_like), log_weights)


def run_jaxns(target: Target, seed: int) -> Run:
    """Runs of nested sampling are added to until there are 400 effective draws."""
    from jaxns.core import NestedSampler
    from jaxns.model import Model
    from jaxns.priors import Prior
    from tensorflow_probability.substrates import jax as tfp

    box = jnp.asarray(target.box)

    def prior_model():
        return target.single(Prior(tfp.distributions.Uniform(-box, box), name="x").realise())

    sampler = NestedSampler(model=Model(prior_model=prior_model))
    state = sampler.run_until_goal(
        lambda state: int(state.goal_loop_iter) > 0 and float(state.to_result().ess) >= 400,
        key=jax.random.key(seed),
    )
    results = state.to_result().trim()
    own = float(results.total_num_likelihood_evaluations)
    draws, log_weights = np.asarray(results.X_samples["x"]), np.asarray(results.log_dp)
    return Run("weighted", draws, np.asarray(own), own, log_weights)


# ---------------------------------------------------------------------------------------
# Flows, and variational inference.


def run_flowmc(target: Target, seed: int) -> Run:
    """Its bundle without gradients: random walks, and proposals from a flow that learns from them.

    It has no default for the numbers of chains, steps and loops.
    """
    from flowMC.resource_strategy_bundle.RQSpline_GRW import RQSpline_GRW_Bundle
    from flowMC.Sampler import Sampler

    chains, steps, training, production = 50, 50, 20, 20
    key_bundle, key_run = jax.random.split(jax.random.key(seed))
    bundle = RQSpline_GRW_Bundle(
        key_bundle,
        chains,
        target.dim,
        lambda x, data: target.single(x),
        n_local_steps=steps,
        n_global_steps=steps,
        n_training_loops=training,
        n_production_loops=production,
        n_epochs=20,
    )
    sampler = Sampler(
        n_dim=target.dim,
        n_chains=chains,
        rng_key=key_run,
        resource_strategy_bundles=bundle,
        checkpoint_interval=0.0,  # else it goes on with an earlier run's
    )
    sampler.sample(jnp.asarray(target.starts(seed, chains)), {})
    draws = np.asarray(sampler.resources["positions_production"].data)
    # A loop's local and global steps each evaluate the log density where they start, too.
    per_draw = chains * (steps + 1) / steps
    evals = per_draw * (training * 2 * steps + np.arange(1, draws.shape[1] + 1))
    return Run("chains", draws, evals)


def run_pyvbmc(target: Target, seed: int) -> Run:
    """Its own budget of evaluations, 50 (2 + dim) at most.

    The plausible bounds, between which most of the posterior should be, are a fifth of the box.
    """
    from pyvbmc import VBMC

    np.random.seed(seed)
    plausible = target.box[None] / 5

    def logdensity_fn(x) -> float:
        return max(float(target(x)[0]), -1e10)  # it refuses infinities

    start = target.starts(seed, 1)
    infinite = np.full((1, target.dim), np.inf)
    vbmc = VBMC(
        logdensity_fn, start, -infinite, infinite, -plausible, plausible, options={"display": "off"}
    )
    vp, results = vbmc.optimize()
    draws, _ = vp.sample(20_000)
    return Run("approximate", draws, np.asarray(target.count), float(results["func_count"]))


# ---------------------------------------------------------------------------------------
# Ours, and what they are measured by.


def run_surrogate(target: Target, seed: int, num_warmup: int | None = None) -> Run:
    import probbp

    num_samples, num_chains = 1500, 4
    data = probbp.sample(
        jax.random.key(seed),
        partial(probbp.surrogate, target.single),
        start_fn(target),
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        progress_bar=False,
    )
    warm_up = data["sample_stats"].attrs["num_warmup_evaluations"]
    evals = warm_up + num_chains * np.arange(1, num_samples + 1)
    return Run("chains", data.posterior["x"].values, evals)


def run_random_walk(target: Target, seed: int) -> Run:
    """Four chains, each of which learns a covariance in 10,000 steps of warm-up."""
    from posteriordb import random_walk

    import probbp

    num_warmup, num_samples, num_chains = 10_000, 20_000, 4
    data = probbp.sample(
        jax.random.key(seed),
        partial(random_walk, target.single),
        start_fn(target),
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        metric="dense",
        target_acceptance_rate=0.234,
        progress_bar=False,
    )
    evals = num_chains * (1 + num_warmup + np.arange(1, num_samples + 1))
    return Run("chains", data.posterior["x"].values, evals)


def start_fn(target: Target) -> Callable:
    return lambda key: jax.random.uniform(key, (target.dim,), minval=-2, maxval=2)


def run_nuts(target: Target, seed: int, dense_mass: bool = False) -> Run:
    """NumPyro's, 1,000 steps of warm-up; a value with its gradient counts as 3 evaluations."""
    from numpyro.infer import MCMC, NUTS

    num_chains = 4
    mcmc = MCMC(
        NUTS(potential_fn=lambda x: -target.single(x), dense_mass=dense_mass),
        num_warmup=1000,
        num_samples=1000,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    key_warmup, key_run = jax.random.split(jax.random.key(seed))
    starts = jnp.asarray(target.starts(seed, num_chains))
    mcmc.warmup(key_warmup, init_params=starts, extra_fields=("num_steps",), collect_warmup=True)
    warm_up = np.sum(mcmc.get_extra_fields()["num_steps"])
    mcmc.run(key_run, extra_fields=("num_steps",))
    draws = np.asarray(mcmc.get_samples(group_by_chain=True))
    steps = np.asarray(mcmc.get_extra_fields(group_by_chain=True)["num_steps"])
    evals = 3 * (num_chains + warm_up + np.cumsum(steps.sum(0)))
    return Run("chains", draws, evals)


RUNNERS: dict[str, Callable[[Target, int], Run]] = {
    "surrogate": run_surrogate,
    "surrogate, 1450 steps": partial(run_surrogate, num_warmup=1450),
    "random walk": run_random_walk,
    "NUTS": run_nuts,
    "NUTS, dense": partial(run_nuts, dense_mass=True),
    "emcee": run_emcee,
    "zeus": run_zeus,
    "flowMC": run_flowmc,
    "pocoMC": run_pocomc,
    "nautilus": run_nautilus,
    "jaxns": run_jaxns,
    "PyVBMC": run_pyvbmc,
}
"""Name -> what runs it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rival", choices=RUNNERS)
    parser.add_argument("target")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--package", default="probbp", help="whose version to report")
    parser.add_argument("--limit", type=int, default=3600, help="CPU seconds, then it is stopped")
    parser.add_argument("--callback", action="store_true", help="count inside JAX's programs too")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CPU, (args.limit, args.limit + 10))
    numpyro.enable_x64()
    target = Target(args.target, args.data, args.callback)
    begin = time.process_time()
    run = RUNNERS[args.rival](target, args.seed)
    seconds = time.process_time() - begin
    np.savez_compressed(
        args.out,
        **run._asdict(),
        counted=target.count,
        seconds=seconds,
        version=importlib.metadata.version(args.package),
    )


if __name__ == "__main__":
    sys.exit(main())
