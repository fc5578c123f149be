"""The samplers on eight posteriors of posteriordb: are they right, and what do they cost?

    python tests/benchmarks/posteriordb.py --data DIR [--only NAME] [--fast] [--markdown FILE]

DIR holds the reference moments (see `posteriors.py`). One row per posterior and sampler:

- `z mean`, `z square`: the largest |z| over all parameters, of the mean and of the mean square. z
  is the estimate less that of the reference draws, in units of their Monte Carlo errors together.
- `R-hat`, `ESS`: the largest rank R-hat and the smallest bulk ESS of the parameters, by ArviZ.
- `evals`: what a draw costs, in evaluations of the log density. Counted, not assumed: the
  operations of XLA's `cost_analysis()` for one whole step, less those of the same step on a density
  that costs nothing, as a multiple of those of one log density. So the sampler's own arithmetic
  (random numbers, the factor of the metric) is left out; it weighs on toys alone. NUTS pays for its
  leapfrog steps, each a value with its gradient. Operations are no seconds.
- `ESS/keval`: effective draws for a thousand evaluations; warm-up is not counted.
- `warm-up`: evaluations of all chains before the first draw, in thousands.
- `to 400`, `to 4000`: evaluations until the ESS is so large, warm-up included, in thousands. From
  warm starts they leave out what NUTS spent on finding these.
- `seconds`: wall time, compilation and warm-up included.

Samplers with one proposal a draw share `probbp.sample` and its warm-up with a dense metric; NUTS is
NumPyro's, dense too, and makes a tenth of the draws (in forward mode a twentieth); the surrogate
transition makes a tenth of them after 2,900 steps of its own warm-up. The others start
from draws of NUTS: what is compared is how a sampler moves in a posterior, not whether it finds it.
With `--cold` those with one proposal start where NUTS did. All of it takes twenty minutes on two
cores.

The exit status is 1 if a sampler that looks converged (R-hat < 1.01, ESS > 400) has some |z| > 5.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import arviz as az
import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import xarray as xr
from blackjax.mcmc.mala import MALAState
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import solve_triangular
from numpyro.infer import MCMC, NUTS, init_to_value
from numpyro.infer.util import initialize_model, unconstrain_fn
from posteriors import MODELS, Posterior, entry, load

import probbp

sys.path.append(str(Path(__file__).parents[1]))

from tables import SAMPLERS

OURS = {name: member.algorithm for name, member in SAMPLERS.items()} | {
    "line_fmala, 4 tangents": partial(probbp.line_fmala, num_tangents=4),
    "pc_line_fmala, 2 tangents": partial(probbp.pc_line_fmala, num_tangents=2),
}

NUTS_TARGET = 0.9
"""At NumPyro's default, 0.8, a chain of gp_pois_regr now and then sticks."""


def whitened_mala(logdensity_fn, step_size, inverse_mass_matrix):
    """Take BlackJAX's MALA, which has no metric, in the coordinates in which the metric is one."""
    factor = jnp.linalg.cholesky(inverse_mass_matrix)
    kernel = blackjax.mala.build_kernel()

    def step(rng_key, state):
        flat, unravel = ravel_pytree(state.position)
        grad, _ = ravel_pytree(state.logdensity_grad)
        white = MALAState(
            solve_triangular(factor, flat, lower=True), state.logdensity, factor.T @ grad
        )
        white, info = kernel(
            rng_key, white, lambda x: logdensity_fn(unravel(factor @ x)), step_size
        )
        grad = solve_triangular(factor.T, white.logdensity_grad)
        return MALAState(unravel(factor @ white.position), white.logdensity, unravel(grad)), info

    def init(position, rng_key=None):
        return blackjax.mala.init(position, logdensity_fn)

    return blackjax.SamplingAlgorithm(init, step)


def random_walk(logdensity_fn, step_size, inverse_mass_matrix):
    """Random-walk Metropolis: MALA without its drift."""
    # BlackJAX calls `sigma` a covariance, and multiplies the noise by it.
    sigma = jnp.linalg.cholesky(2 * step_size * inverse_mass_matrix)
    return blackjax.additive_step_random_walk.normal_random_walk(logdensity_fn, sigma)


# name -> (algorithm, target acceptance rate, where it doesn't know one itself)
METROPOLIS = {
    **{name: (algorithm, None) for name, algorithm in OURS.items()},
    "BlackJAX's mala, whitened": (whitened_mala, 0.574),
    "random walk": (random_walk, 0.234),
}


class Run(NamedTuple):
    """What a sampler has to show.

    Attributes:
        draws: NumPyro site -> (chain, draw, ...).
        acceptance: mean acceptance rate.
        evals: log densities a draw.
        seconds: wall time.
        warm_up: log densities of all chains before the first draw.
    """

    draws: dict
    acceptance: float
    evals: float
    seconds: float
    warm_up: float = 0.0


class Row(NamedTuple):
    """One line of the table; the columns are explained above."""

    posterior: str
    sampler: str
    z_mean: float
    z_square: float
    rhat: float
    ess: float
    acceptance: float
    num_draws: int
    evals: float
    seconds: float
    warm_up: float

    def evals_to(self, ess: float) -> float:
        """Say how many evaluations an effective sample size takes, warm-up included."""
        return self.warm_up + self.evals * self.num_draws * ess / self.ess

    @property
    def converged(self):
        return self.rhat < 1.01

    @property
    def right(self):
        return self.converged and max(self.z_mean, self.z_square) < 4

    @property
    def misleading(self):
        return self.converged and self.ess > 400 and max(self.z_mean, self.z_square) > 5

    @property
    def verdict(self):
        if self.misleading:
            return "WRONG"
        if not self.converged:
            return "not converged"
        return "right" if self.right else "off"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="folder of the reference moments")
    parser.add_argument("--only", default="", help="part of a posterior's name")
    parser.add_argument("--samples", type=int, default=20_000, help="draws per chain")
    parser.add_argument("--warmup", type=int, default=10_000, help="steps of warm-up per chain")
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cold", action="store_true", help="don't start from NUTS's draws")
    parser.add_argument("--fast", action="store_true", help="a smoke test: a tenth of the draws")
    parser.add_argument("--markdown", type=Path, help="write the table to this file too")
    args = parser.parse_args()
    if args.fast:
        args.samples, args.warmup = args.samples // 10, args.warmup // 5
    numpyro.enable_x64()
    try:
        posteriors = load(args.data)
    except FileNotFoundError as error:
        parser.exit(2, f"{error}\n")
    posteriors = [p for name, p in posteriors.items() if args.only in name]
    if not posteriors:
        parser.exit(2, f"No posterior has {args.only!r} in its name: {', '.join(MODELS)}.\n")

    print(heading(args))
    rows = []
    for posterior in posteriors:
        print(f"\n{posterior.name}\n\n{header()}", flush=True)
        for name, run in runs(posterior, args):
            rows.append(judged(posterior, name, run))
            print(line(rows[-1]), flush=True)
    print("\n" + verdicts(rows))
    if args.markdown:
        args.markdown.write_text(markdown(rows, args))
    sys.exit(any(row.misleading for row in rows))


def runs(posterior: Posterior, args):
    """Yield the name and the run of every sampler, NUTS first: the others start from its draws."""
    keys = iter(jax.random.split(jax.random.key(args.seed), 4 + len(METROPOLIS)))
    key_init = next(keys)
    # Two of NumPyro's descriptions: the model as it is, and the one whose operations are counted.
    info, counted = (
        initialize_model(
            key_init,
            posterior.model,
            init_strategy=init_to_value(values=posterior.start),
            model_kwargs={**posterior.model_kwargs, **extra},
            validate_grad=False,
        )
        for extra in ({}, posterior.counted)
    )
    position = info.param_info.z
    reverse = nuts(next(keys), posterior, counted, args)
    yield "NUTS", reverse
    at_draw = partial(draw_from, posterior, {site: reverse.draws[site] for site in position})
    yield "NUTS, forward mode", nuts(next(keys), posterior, counted, args, at_draw)
    starts = position if args.cold else at_draw
    for name, (algorithm, target) in METROPOLIS.items():
        yield name, metropolis(next(keys), algorithm, target, info, counted, starts, args)
    yield "surrogate", surrogate(next(keys), info, starts, args)


def nuts(rng_key, posterior, counted, args, forward_from=None):
    """Run NumPyro's NUTS, in forward mode (and half as long) if given `rng_key -> start`."""
    start = time.perf_counter()
    forward = forward_from is not None
    key_starts, key_warmup, key_run = jax.random.split(rng_key, 3)
    starts = forward and jax.vmap(forward_from)(jax.random.split(key_starts, args.chains))
    kernel = NUTS(
        posterior.model,
        dense_mass=True,
        target_accept_prob=NUTS_TARGET,
        init_strategy=init_to_value(values=posterior.start),
        forward_mode_differentiation=forward,
    )
    mcmc = MCMC(
        kernel,
        num_warmup=500 if forward else 1_000,
        num_samples=args.samples // (20 if forward else 10),
        num_chains=args.chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    fields = ("accept_prob", "num_steps")
    mcmc.warmup(
        key_warmup,
        init_params=starts or None,
        extra_fields=fields,
        collect_warmup=True,
        **posterior.model_kwargs,
    )
    warm_up = float(mcmc.get_extra_fields()["num_steps"].sum())
    mcmc.run(key_run, extra_fields=fields, **posterior.model_kwargs)
    draws = jax.device_get(mcmc.get_samples(group_by_chain=True))
    extra = jax.device_get(mcmc.get_extra_fields(group_by_chain=True))
    seconds = time.perf_counter() - start
    each = leapfrog_cost(counted, forward)
    evals = each * extra["num_steps"].mean()
    return Run(draws, extra["accept_prob"].mean(), evals, seconds, each * warm_up)


def metropolis(rng_key, algorithm, target, info, counted, starts, args):
    """Run a sampler with one proposal a draw."""
    start = time.perf_counter()
    data = probbp.sample(
        rng_key,
        partial(algorithm, logdensity(info)),
        starts,
        num_warmup=args.warmup,
        num_samples=args.samples,
        num_chains=args.chains,
        metric="dense",
        target_acceptance_rate=target,
        dispersion=0.3,
        postprocess_fn=info.postprocess_fn,
        progress_bar=False,
    )
    seconds = time.perf_counter() - start
    draws = {name: values.values for name, values in data.posterior.items()}
    acceptance = data.sample_stats["acceptance_rate"].values.mean()
    evals = step_cost(algorithm, counted)
    return Run(draws, acceptance, evals, seconds, evals * args.warmup * args.chains)


def surrogate(rng_key, info, starts, args):
    """Run the surrogate transition, after a warm-up of its own; a draw costs one evaluation."""
    start = time.perf_counter()
    data = probbp.sample(
        rng_key,
        partial(probbp.surrogate, logdensity(info)),
        starts,
        num_warmup=args.warmup * 29 // 100,
        num_samples=args.samples // 10,
        num_chains=args.chains,
        dispersion=0.3,
        postprocess_fn=info.postprocess_fn,
        progress_bar=False,
    )
    seconds = time.perf_counter() - start
    draws = {name: values.values for name, values in data.posterior.items()}
    stats = data.sample_stats
    warm_up = float(stats.attrs["num_warmup_evaluations"])
    return Run(draws, stats["acceptance_rate"].values.mean(), 1.0, seconds, warm_up)


def draw_from(posterior, draws, rng_key):
    """Pick one of the draws of all chains, and give it unconstrained."""
    index = jax.random.randint(rng_key, (), 0, np.prod(jax.tree.leaves(draws)[0].shape[:2]))
    draw = {
        site: jnp.asarray(values.reshape(-1, *values.shape[2:]))[index]
        for site, values in draws.items()
    }
    return unconstrain_fn(posterior.model, (), posterior.model_kwargs, draw)


def logdensity(info):
    return lambda position: -info.potential_fn(position)


def step_cost(algorithm, info):
    """Count what a step asks of the log density, in evaluations of it."""
    position = info.param_info.z
    scale = jnp.eye(optax.tree.size(position))

    def step(logdensity_fn) -> float:
        def init(key, step_size):
            return algorithm(logdensity_fn, step_size, scale).init(position, key)

        def step(key, state, step_size, scale):
            return algorithm(logdensity_fn, step_size, scale).step(key, state)

        key = jax.random.key(0)
        return operations(step, key, jax.eval_shape(init, key, 1.0), 1.0, scale)

    free = optax.tree.sum
    return (step(logdensity(info)) - step(free)) / operations(logdensity(info), position)


def leapfrog_cost(info, forward):
    """Count a value with its gradient, in evaluations of the log density."""
    fun, position = logdensity(info), info.param_info.z
    both = (lambda x: (fun(x), jax.jacfwd(fun)(x))) if forward else jax.value_and_grad(fun)
    return operations(both, position) / operations(fun, position)


def operations(fun: Callable, *args) -> float:
    """Count operations as XLA does, a transcendental function as one."""
    # Fused, the same operation may be counted once for every reader of its result.
    options = {"xla_disable_hlo_passes": "fusion", "xla_backend_optimization_level": 0}
    cost = jax.jit(fun).lower(*args).compile(compiler_options=options).cost_analysis()
    return cost["flops"] + cost.get("transcendentals", 0.0)


def judged(posterior, sampler, run) -> Row:
    """Compare a run with the reference draws."""
    parameters = {name: entry(run.draws, where) for name, where in posterior.names.items()}
    draws = dataset(parameters)
    squares = dataset({name: x**2 for name, x in parameters.items()})
    error, error_square = az.mcse(draws, method="mean"), az.mcse(squares, method="mean")
    z_mean, z_square = [], []
    for name, x in parameters.items():
        reference = posterior.reference[name]
        z_mean.append(
            (x.mean() - reference["mean"]) / np.hypot(float(error[name]), reference["mcse"])
        )
        # The reference draws are nearly independent; the spread of their squares is that of ours.
        reference_error = np.std(x**2) / np.sqrt(reference["n"])
        z_square.append(
            (np.mean(x**2) - reference["mean_square"])
            / np.hypot(float(error_square[name]), reference_error)
        )
    return Row(
        posterior.name,
        sampler,
        np.max(np.abs(z_mean)),
        np.max(np.abs(z_square)),
        np.max([float(value) for value in az.rhat(draws).values()]),
        np.min([float(value) for value in az.ess(draws, method="bulk").values()]),
        run.acceptance,
        x.size,
        run.evals,
        run.seconds,
        run.warm_up,
    )


def dataset(parameters):
    return xr.Dataset({name: (("chain", "draw"), x) for name, x in parameters.items()})


COLUMNS = {
    "sampler": lambda r: f"{r.sampler:25}",
    "z mean": lambda r: f"{r.z_mean:.1f}",
    "z square": lambda r: f"{r.z_square:.1f}",
    "R-hat": lambda r: f"{r.rhat:.4f}",
    "ESS": lambda r: f"{r.ess:.0f}",
    "accept": lambda r: f"{r.acceptance:.2f}",
    "draws": lambda r: f"{r.num_draws}",
    "evals": lambda r: f"{r.evals:.1f}",
    "ESS/keval": lambda r: f"{1000 * r.ess / (r.evals * r.num_draws):.2f}",
    "warm-up": lambda r: f"{r.warm_up / 1000:.0f}",
    "to 400": lambda r: f"{r.evals_to(400) / 1000:.0f}",
    "to 4000": lambda r: f"{r.evals_to(4000) / 1000:.0f}",
    "seconds": lambda r: f"{r.seconds:.0f}",
    "verdict": lambda r: f"{r.verdict:13}",
}
"""Column -> its text in a row."""


def heading(args):
    return (
        f"{args.chains} chains of {args.samples} draws after {args.warmup} steps of warm-up, NUTS "
        f"{args.samples // 10}; {'cold' if args.cold else 'warm'} starts, seed {args.seed}; "
        f"JAX {jax.__version__} on {jax.default_backend()}"
    )


def header():
    names = [f"{'sampler':25}", *(f"{name:>9}" for name in list(COLUMNS)[1:])]
    rules = [":" + "-" * 24, *("-" * 8 + ":" for _ in names[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (names, rules))


def line(row):
    return "| " + " | ".join(f"{text(row):>9}" for text in COLUMNS.values()) + " |"


def verdicts(rows):
    """Say which of ours were right on each posterior, and whether anything misleads."""
    lines = ["Right (every |z| < 4, R-hat < 1.01), of ours:", ""]
    for posterior in dict.fromkeys(row.posterior for row in rows):
        ours = [row for row in rows if row.posterior == posterior and row.sampler in OURS]
        others = ", ".join(f"{r.sampler}: {r.verdict}" for r in ours if not r.right)
        lines.append(
            f"- {posterior}: {sum(r.right for r in ours)} of {len(ours)}"
            + (f" ({others})" if others else "")
        )
    wrong = [f"{row.sampler} on {row.posterior}" for row in rows if row.misleading]
    lines += ["", "Looks converged (R-hat < 1.01, ESS > 400), yet some |z| > 5: "]
    lines[-1] += "; ".join(wrong) or "none."
    return "\n".join(lines)


def markdown(rows, args):
    """Return the whole report as Markdown."""
    parts = ["# The samplers on posteriordb", heading(args) + "."]
    for posterior in dict.fromkeys(row.posterior for row in rows):
        table = [line(row) for row in rows if row.posterior == posterior]
        parts += [f"## {posterior}", "\n".join([header(), *table])]
    parts += ["## Verdict", verdicts(rows)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
