"""`probbp.surrogate` from cold starts: reference posteriors, and whether it knows when it fails.

    python tests/benchmarks/surrogate.py [--data DIR] [--further] [--detector] [--cost]
                                         [--only NAME] [--seeds N] [--fast]

With a folder of posteriordb's reference moments, each posterior is sampled from starts uniform on
(-2, 2) (the predator-prey model: around its own start), by four chains of 2,900 steps of warm-up
and 1,500 draws. ESS is the smallest bulk ESS over the parameters, for 1,000 evaluations of the log
density after warm-up; "with it" counts the warm-up too. |z| is the largest over means and mean
squares, against the reference draws.

With `--further`, the posteriors of `further.py`: the surrogate beside a random walk with a dense
metric (10,000 steps of warm-up, 20,000 draws), and NUTS at its defaults (1,000 and 2,500), four
chains each, all from uniform starts. Above 20 dimensions the surrogate runs a second time with
gradients in its warm-up. "to 400" is how many evaluations a run takes until its
smallest bulk ESS is 400, warm-up included; a gradient in reverse mode counts as two evaluations
beside the value, in forward mode as one for each parameter. |z| is against NUTS's draws.

With `--cost`, what a step costs beside the log density: microseconds of a chain, of four side by
side, with the surrogate's largest degree, on a density that is nearly free.

With `--detector`, targets on which it may fail: how often the draws are wrong (|z| > 5 for some
mean or probability), how often R-hat < 1.01 hides it, and how often the run warns.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from further import REFUSED, TARGETS
from numpyro.infer import MCMC, NUTS, init_to_uniform, init_to_value
from numpyro.infer.util import initialize_model
from posteriordb import Run, dataset, judged, logdensity, random_walk
from posteriors import entry, load
from scipy import stats

import probbp
from probbp.samplers.surrogate.kernel import whiten
from probbp.samplers.surrogate.learning import MAX_MAP_DIM
from probbp.samplers.surrogate.polynomial import (
    from_coefficients,
    largest_degree,
    num_monomials,
)
from probbp.samplers.surrogate.transport import affine


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the reference moments")
    parser.add_argument("--only", default="", help="part of a target's name")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--further", action="store_true")
    parser.add_argument("--detector", action="store_true")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--fast", action="store_true", help="one seed, a fifth of the draws")
    args = parser.parse_args()
    if args.fast:
        args.seeds = 1
    args.num_samples = 300 if args.fast else 1500
    numpyro.enable_x64()
    if args.data is None:
        print("Left out: the reference posteriors. They need data: --data DIR")
    else:
        reference_posteriors(args)
    if args.further:
        further_posteriors(args)
    if args.detector:
        detector(args)
    if args.cost:
        cost_of_a_step()


# ---------------------------------------------------------------------------------------
# The reference posteriors.


def reference_posteriors(args) -> None:
    try:
        posteriors = load(args.data)
    except FileNotFoundError as error:
        sys.exit(str(error))
    print(f"{'posterior':44}{'seed':>5}{'ESS':>7}{'with it':>8}{'|z|':>6}{'R-hat':>8}", end="")
    print(f"{'accept':>8}{'k':>7}{'std':>7}{'warm-up':>9}{'CPU s':>7}  warned")
    for name, posterior in posteriors.items():
        if args.only in name:
            for seed in range(args.seeds):
                print_posterior(posterior, seed, args.num_samples)


def print_posterior(posterior, seed: int, num_samples: int) -> None:
    info = initialize_model(
        jax.random.key(seed),
        posterior.model,
        init_strategy=init_to_value(values=posterior.start) if posterior.start else init_to_uniform,
        model_kwargs=posterior.model_kwargs,
        validate_grad=False,
    )
    begin = time.process_time()
    data, warned = sampled(
        seed,
        partial(probbp.surrogate, logdensity(info)),
        partial(start, info.param_info.z, 0.1 if posterior.start else None),
        num_samples,
        postprocess_fn=info.postprocess_fn,
    )
    seconds = time.process_time() - begin
    draws = {name: values.values for name, values in data.posterior.items()}
    stats = data["sample_stats"]
    row = judged(posterior, "surrogate", Run(draws, 0.0, 1.0, seconds))
    squares = {n: entry(draws, where) ** 2 for n, where in posterior.names.items()}
    ess = min(row.ess, *(float(v) for v in az.ess(dataset(squares), method="bulk").values()))
    warm_up = stats.attrs["num_warmup_evaluations"]
    print(
        f"{posterior.name:44}{seed:5}{1000 * ess / row.num_draws:7.0f}"
        f"{1000 * ess / (row.num_draws + warm_up):8.0f}"
        f"{max(row.z_mean, row.z_square):6.1f}{row.rhat:8.4f}"
        f"{stats['acceptance_rate'].values.mean():8.2f}{stats.attrs['pareto_k']:7.2f}"
        f"{stats.attrs['held_out_std']:7.2f}{warm_up:9}{seconds:7.0f}  {'yes' if warned else 'no'}",
        flush=True,
    )


def start(like, spread, rng_key):
    """Draw a start: uniform on (-2, 2), or around a position."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(rng_key, len(leaves))
    drawn = [
        jax.random.uniform(key, leaf.shape, leaf.dtype, -2, 2)
        if spread is None
        else leaf + spread * jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)


def sampled(seed: int, algorithm: Callable, starts: Callable, num_samples: int, **options):
    """Return a run, and whether it warned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = probbp.sample(
            jax.random.key(seed),
            algorithm,
            starts,
            num_samples=num_samples,
            progress_bar=False,
            **options,
        )
    return data, any("may be wrong" in str(warning.message) for warning in caught)


# ---------------------------------------------------------------------------------------
# Further posteriors, beside their rivals.


class Result(NamedTuple):
    """A run, by site, and what it cost.

    Attributes:
        draws: (chain, draw, ...) of each site.
        warm_up: evaluations of the log density before the first draw.
        evaluations: of all draws.
    """

    draws: dict
    warm_up: float
    evaluations: float


def further_posteriors(args) -> None:
    print(f"\n{'posterior':14}{'d':>4}  {'sampler':14}{'ESS':>7}{'to 400':>10}", end="")
    print(f"{'|z|':>6}{'R-hat':>8}{'warm-up':>10}  warned   (ESS for 1,000 evaluations)")
    for name, make in TARGETS.items():
        if args.only not in name:
            continue
        model = make()
        info = initialize_model(jax.random.key(0), model, validate_grad=False)
        dim = sum(leaf.size for leaf in jax.tree.leaves(info.param_info.z))
        truth = with_nuts(model, dim, name in REFUSED, args)
        print_result(name, dim, "NUTS", truth)
        print_result(name, dim, "random walk", with_random_walk(info, args), truth)
        for seed in range(args.seeds):
            result, warned = with_surrogate(info, seed, args)
            print_result(name, dim, f"surrogate, {seed}", result, truth, warned)
        for seed in range(args.seeds if dim > MAX_MAP_DIM else 0):
            estimator = probbp.estimators.reverse()
            result, warned = with_surrogate(info, seed, args, estimator=estimator)
            print_result(name, dim, f"gradients, {seed}", result, truth, warned)


def with_nuts(model, dim: int, is_forward: bool, args) -> Result:
    mcmc = MCMC(
        NUTS(model, forward_mode_differentiation=is_forward),
        num_warmup=1000,
        num_samples=args.num_samples * 5 // 3,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.warmup(jax.random.key(0), collect_warmup=True, extra_fields=("num_steps",))
    warm_up = float(mcmc.get_extra_fields()["num_steps"].sum())
    mcmc.run(jax.random.key(1), extra_fields=("num_steps",))
    steps = float(mcmc.get_extra_fields()["num_steps"].sum())
    cost = 1 + dim if is_forward else 3
    draws = jax.device_get(mcmc.get_samples(group_by_chain=True))
    return Result(draws, cost * warm_up, cost * steps)


def with_random_walk(info, args) -> Result:
    num_warmup, num_samples = 20 * args.num_samples // 3, 40 * args.num_samples // 3
    data = probbp.sample(
        jax.random.key(0),
        partial(random_walk, logdensity(info)),
        partial(start, info.param_info.z, None),
        num_warmup=num_warmup,
        num_samples=num_samples,
        metric="dense",
        target_acceptance_rate=0.234,
        postprocess_fn=info.postprocess_fn,
        progress_bar=False,
    )
    draws = {name: values.values for name, values in data.posterior.items()}
    return Result(draws, 4 * num_warmup, 4 * num_samples)


def with_surrogate(info, seed: int, args, **options) -> tuple[Result, bool]:
    data, warned = sampled(
        seed,
        partial(probbp.surrogate, logdensity(info), **options),
        partial(start, info.param_info.z, None),
        args.num_samples,
        postprocess_fn=info.postprocess_fn,
    )
    draws = {name: values.values for name, values in data.posterior.items()}
    attrs = data["sample_stats"].attrs
    warm_up = attrs["num_warmup_evaluations"] + 3 * attrs["num_warmup_gradients"]
    return Result(draws, warm_up, 4 * args.num_samples), warned


def print_result(name, dim, sampler, result, truth=None, warned=False) -> None:
    draws = dataset(columns(result.draws))
    ess = min(float(value) for value in az.ess(draws, method="bulk").values())
    rhat = max(float(value) for value in az.rhat(draws).values())
    each = ess / result.evaluations
    print(
        f"{name:14}{dim:4}  {sampler:14}{1000 * each:7.1f}{result.warm_up + 400 / each:10.0f}"
        f"{np.nan if truth is None else largest_z(result.draws, truth.draws):6.1f}{rhat:8.4f}"
        f"{result.warm_up:10.0f}  {'yes' if warned else ''}",
        flush=True,
    )


def largest_z(draws, others) -> float:
    """Compare means and mean squares of two runs, in units of their errors together."""
    worst = 0.0
    for power in (1, 2):
        ours, theirs = (
            dataset({name: x**power for name, x in columns({n: run[n] for n in others}).items()})
            for run in (draws, others)
        )
        errors = [az.mcse(values, method="mean") for values in (ours, theirs)]
        for name in ours:
            difference = float(ours[name].mean() - theirs[name].mean())
            worst = max(worst, abs(difference) / np.hypot(*(float(e[name]) for e in errors)))
    return worst


def columns(draws) -> dict:
    """Name each number of each site."""
    return {
        f"{name}[{i}]": x.reshape(*x.shape[:2], -1)[..., i]
        for name, x in ((n, np.asarray(values, float)) for n, values in draws.items())
        for i in range(np.prod(x.shape[2:], dtype=int))
    }


# ---------------------------------------------------------------------------------------
# The detector.


class Target(NamedTuple):
    """A density on R^d, with statistics `(..., d) -> (...)` and their means."""

    logdensity_fn: Callable
    dim: int
    statistics: dict[str, tuple[Callable, float]]


def neal_s_funnel() -> Target:
    def logdensity_fn(x):
        return -(x[0] ** 2) / 18 - jnp.sum(x[1:] ** 2) * jnp.exp(-x[0]) / 2 - 9 * x[0] / 2

    return Target(logdensity_fn, 10, of_normal(lambda x: x[..., 0] / 3))


def banana(num_pairs: int) -> Target:
    """B given a is N(a^2, 0.3^2), for each pair."""

    def logdensity_fn(x):
        a, b = x[:num_pairs], x[num_pairs:]
        return -jnp.sum(a**2) / 2 - jnp.sum((b - a**2) ** 2) / 0.18

    def residual(x):
        return (x[..., num_pairs] - x[..., 0] ** 2) / 0.3

    second = {f"second {k}": v for k, v in of_normal(residual).items()}
    return Target(logdensity_fn, 2 * num_pairs, of_normal(lambda x: x[..., 0]) | second)


def student(degrees: int) -> Target:
    law = stats.t(degrees)
    ends = (-4.0, -1.0, 1.0, 4.0)
    statistics = {f"P(x < {q})": (lambda x, q=q: x[..., 0] < q, law.cdf(q)) for q in ends}

    def logdensity_fn(x):
        return -(degrees + 1) / 2 * jnp.sum(jnp.log1p(x**2 / degrees))

    return Target(logdensity_fn, 8, statistics)


def modes(distance: float) -> Target:
    """Three tenths of the mass lie `distance` standard deviations away along the first axis."""

    def logdensity_fn(x):
        ends = jnp.array([0.0, distance])
        first = jax.nn.logsumexp(jnp.log(jnp.array([0.3, 0.7])) - (x[0] - ends) ** 2 / 2)
        return first - jnp.sum(x[1:] ** 2) / 2

    return Target(logdensity_fn, 5, {"far": (lambda x: x[..., 0] > distance / 2, 0.7)})


def truncated() -> Target:
    """A Gaussian cut to the positive orthant."""

    def logdensity_fn(x):
        return jnp.where(jnp.all(x > 0), -jnp.sum(x**2) / 2, -jnp.inf)

    half = stats.halfnorm()
    statistics = {
        "mean": (lambda x: x[..., 0], half.mean()),
        **{f"P(x < {q})": (lambda x, q=q: x[..., 0] < q, half.cdf(q)) for q in (0.1, 2.0)},
    }
    return Target(logdensity_fn, 4, statistics)


def spike_and_slab() -> Target:
    """Half of each coordinate's mass is a hundred times narrower than the other."""

    def logdensity_fn(x):
        scale = jnp.array([[0.01], [1.0]])
        return jnp.sum(jax.nn.logsumexp(-((x / scale) ** 2) / 2 - jnp.log(scale), axis=0))

    slab = 0.5 * (2 * stats.norm.sf(0.1)) + 0.5 * (2 * stats.norm.sf(10))
    return Target(logdensity_fn, 4, {"slab": (lambda x: abs(x[..., 0]) > 0.1, slab)})


def gaussian(dim: int) -> Target:
    return Target(lambda x: -jnp.sum(x**2) / 2, dim, of_normal(lambda x: x[..., 0]))


def mild_funnel() -> Target:
    def logdensity_fn(x):
        return -(x[0] ** 2) / 2 - jnp.sum(x[1:] ** 2) * jnp.exp(-x[0]) / 2 - 9 * x[0] / 2

    return Target(logdensity_fn, 10, of_normal(lambda x: x[..., 0]))


def of_normal(coordinate: Callable) -> dict[str, tuple[Callable, float]]:
    """Return what is known of a standard normal coordinate."""
    return {
        "mean": (coordinate, 0.0),
        "square": (lambda x: coordinate(x) ** 2, 1.0),
        "P(x < -1.5)": (lambda x: coordinate(x) < -1.5, stats.norm.cdf(-1.5)),
        "P(x > 1.5)": (lambda x: coordinate(x) > 1.5, stats.norm.sf(1.5)),
    }


HARD = {
    "Gaussian, 5": gaussian(5),
    "mild funnel, 10": mild_funnel(),
    "Neal's funnel, 10": neal_s_funnel(),
    "banana, 4": banana(2),
    "banana, 10": banana(5),
    "Student, 2 degrees, 8": student(2),
    "Student, 4 degrees, 8": student(4),
    "modes 6 apart, 5": modes(6.0),
    "modes 12 apart, 5": modes(12.0),
    "truncated, 4": truncated(),
    "spike and slab, 4": spike_and_slab(),
}


def detector(args) -> None:
    print(f"\n{'target':24}{'wrong':>8}{'hidden':>8}{'unseen':>8}{'warned':>8}{'ESS':>7}", end="")
    print(f"{'|z|':>7}{'R-hat':>8}{'k':>7}{'std':>7}   (medians; of {args.seeds} seeds)")
    for name, target in HARD.items():
        if args.only in name:
            print_target(name, target, args)


def print_target(name: str, target: Target, args) -> None:
    rows = np.array([measured(target, seed, args.num_samples) for seed in range(args.seeds)])
    z, rhat, ess, warned, k, std = rows.T
    wrong = z > 5
    print(
        f"{name:24}{wrong.sum():8}{(wrong & (rhat < 1.01)).sum():8}"
        f"{(wrong & (warned == 0)).sum():8}{int(warned.sum()):8}"
        + "".join(
            f"{np.median(values):{width}}"
            for values, width in ((ess, "7.0f"), (z, "7.1f"), (rhat, "8.3f"))
        )
        + f"{np.median(k):7.2f}{np.median(std):7.2f}",
        flush=True,
    )


def measured(target: Target, seed: int, num_samples: int) -> tuple[float, ...]:
    """Return the largest |z|, R-hat, ESS for 1,000 draws, whether it warned, k and the error."""
    starts = partial(start, jnp.zeros(target.dim), None)
    if not jnp.isfinite(target.logdensity_fn(-jnp.ones(target.dim))):
        starts = lambda key: jnp.abs(start(jnp.zeros(target.dim), None, key))
    algorithm = partial(probbp.surrogate, target.logdensity_fn)
    data, warned = sampled(seed, algorithm, starts, num_samples)
    x = data.posterior["x"].values
    values = {name: np.asarray(f(x), float) for name, (f, _) in target.statistics.items()}
    values = {name: v for name, v in values.items() if v.std() > 0}
    z, ess = [np.inf] * (len(target.statistics) - len(values)), 0.0  # a set never entered, or left
    if values:
        draws = dataset(values)
        error = az.mcse(draws, method="mean")
        z += [abs(v.mean() - target.statistics[n][1]) / float(error[n]) for n, v in values.items()]
        ess = min(float(value) for value in az.ess(draws, method="bulk").values())
    rhat = max(float(value) for value in az.rhat(dataset({"x": x[..., 0]})).values())
    attrs = data["sample_stats"].attrs
    per_draw = 1000 * ess / x[..., 0].size
    return max(z), rhat, per_draw, float(warned), attrs["pareto_k"], attrs["held_out_std"]


# ---------------------------------------------------------------------------------------
# The cost of a step.


def cost_of_a_step() -> None:
    print(f"\n{'d':>4}{'degree':>8}{'coefficients':>14}{'microseconds':>14}")
    for dim in (2, 5, 10, 20, 50):
        degree = largest_degree(dim)
        size = num_monomials(dim, degree)
        each = 1e6 * seconds_of_a_step(dim, degree, size)
        print(f"{dim:4}{degree:8}{size:14}{each:14.1f}", flush=True)


def seconds_of_a_step(dim, degree, size, num_chains=4, num_steps=2000) -> float:
    """Return the median over five runs, for each chain."""
    kernel = probbp.surrogate.build_kernel()
    parameters = 0.45, affine(jnp.zeros(dim), jnp.eye(dim))
    surrogate = from_coefficients(1e-3 * jnp.ones(size), dim, degree)

    def logdensity_fn(x):
        return -jnp.sum(x**2) / 2

    @jax.jit
    def run(key, states, surrogate):
        def step(states, key):
            keys = jax.random.split(key, num_chains)
            one = lambda k, s: kernel(k, s, logdensity_fn, *parameters, surrogate)
            return jax.vmap(one)(keys, states)[0], None

        return jax.lax.scan(step, states, jax.random.split(key, num_steps))[0]

    starts = jax.random.normal(jax.random.key(0), (num_chains, dim))
    states = jax.vmap(lambda x: whiten(parameters[1], x, logdensity_fn(x)))(starts)
    times = []
    for seed in range(6):
        begin = time.perf_counter()
        jax.block_until_ready(run(jax.random.key(seed), states, surrogate))
        times.append(time.perf_counter() - begin)
    return float(np.median(times[1:])) / num_steps / num_chains


if __name__ == "__main__":
    main()
