"""Gradients carried forward, in NumPyro's hands: the same draws, a stream, a reference posterior.

    python examples/papers/rtrl.py [--data DIR] [--fast]

1. NUTS on a GARCH(1, 1) series of 5000 values, by `jax.lax.scan` and by `rtrl.scan`, same key: the
   first draws, the posterior, the memory of a gradient, which is compared with that of a scan with
   checkpoints too, and at ten times the length.
2. SVI on a GARCH series that streams, a million values: parameters are updated while the data go
   by, and the process's peak memory is read on the way. In stretches of a hundred, and of ten, with
   the sensitivity kept between stretches and dropped, as truncated backpropagation has it. The
   last two again on six shorter series.
3. With `--data`, a folder of posteriordb's data and reference draws, NUTS on its garch-garch11.

Bird & Polivoda, 2021, arXiv:2103.15589.
"""

import json
import resource
import time
from functools import partial
from pathlib import Path

import arviz as az
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from _evidence import below, exact, over_seeds
from _papers import RTRL
from _results import panels, parsed, parser, write
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, init_to_value
from numpyro.infer.autoguide import AutoNormal

from probbp.models import state_space
from probbp.ops import rtrl

TRUTH = {"alpha0": 0.05, "alpha1": 0.1, "beta1": 0.85}
SCANS = {"lax.scan": jax.lax.scan, "rtrl.scan": rtrl.scan}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, help="folder with garch-garch11.json")
    arguments = parsed(options)
    fast = arguments.fast
    jax.config.update("jax_enable_x64", True)
    # The stream first: the peak of the process is its own, and nobody else's.
    num_stream, num = (20_000, 500) if fast else (1_000_000, 5_000)
    ways = ((100, True), (10, True), (10, False))
    peaks = print_stream(num_stream, num_stream // 10, ways[:1] if fast else ways)
    series = returns(num)
    worst = print_nuts(series, *((20, 20) if fast else (300, 500)))
    if arguments.data is None:
        print("\nLeft out: the reference posterior. It needs data: --data DIR")
    else:
        print_reference(arguments.data / "garch-garch11.json")

    lengths = (50, num) if fast else (500, num, 50_000)
    memory = {
        name: [gradient_memory(partial(state_space.garch, scan=scan), returns(n)) for n in lengths]
        for name, scan in (SCANS | {"checkpoints": partial(eqxi.scan, kind="checkpointed")}).items()
    }
    num_short = 5_000 if fast else 100_000
    errors = {remember: distances(num_short, remember) for remember in (True, False)}
    figure, axes = panels(2)
    draw_memory(axes[0], lengths, memory)
    draw_errors(axes[1], errors)
    write(
        arguments,
        paper=RTRL,
        claim="Derivatives of the state that are carried forward give the gradient of "
        "backpropagation through time exactly, in a memory that does not grow with the length, and "
        "while parameters change.",
        setting=f"GARCH(1, 1) in NumPyro, four parameters: NUTS on {num} values, SVI on a stream "
        f"of {num_stream}, and on six streams of {num_short} in stretches of ten.",
        ours=exact(f"memory of a gradient, {num} values", memory["rtrl.scan"][1], "kB"),
        baseline=exact("a scan with checkpoints", memory["checkpoints"][1], "kB"),
        checks=[
            below(
                "draws are those of backpropagation, to a thousandth of their standard deviation",
                exact("largest difference over it, 50 iterations of NUTS", worst),
                1e-3,
            ),
            below(
                "memory does not grow with the length",
                exact(
                    f"memory of a gradient, {lengths[-1]} values over {lengths[0]}",
                    memory["rtrl.scan"][-1] / memory["rtrl.scan"][0],
                ),
                1.01,
            ),
            below(
                "it is less than with checkpoints",
                exact(
                    "memory of a gradient, over that of a scan with checkpoints",
                    memory["rtrl.scan"][1] / memory["checkpoints"][1],
                ),
                1.0,
            ),
            below(
                "a stream of any length runs in one memory",
                exact("peak of the process, the whole stream over its first tenth", peaks),
                1.05,
            ),
            below(
                "carried on while parameters change, it comes nearer to them than truncation",
                over_seeds(
                    "distance of medians from the truth, kept less dropped, paired",
                    errors[True] - errors[False],
                ),
            ),
        ],
        figure=figure,
        caption="Left: memory of a gradient by the length of the series. Right: distance of the "
        "guide's medians from the parameters that made the stream, a line for each of six streams, "
        "with the sensitivity kept between stretches and dropped.",
    )


def draw_memory(ax, lengths, memory):
    for name, values in memory.items():
        ax.loglog(lengths, values, "o-", label=name)
    ax.set(xlabel="values", ylabel="memory of a gradient [kB]", title="GARCH(1, 1)")
    ax.legend()


def draw_errors(ax, errors):
    for pair in zip(errors[True], errors[False], strict=True):
        ax.plot(["kept", "dropped"], pair, "o-", color="C0", alpha=0.6)
    ax.set(
        xlabel="sensitivity between stretches", ylabel="distance from the truth", xlim=(-0.4, 1.4)
    )
    ax.set(ylim=(0, None), title="Streams in stretches of ten values")


def returns(length: int, seed: int = 0) -> jax.Array:
    """Draw a GARCH(1, 1) series."""

    def step(variance, noise):
        y = jnp.sqrt(variance) * noise
        return TRUTH["alpha0"] + TRUTH["alpha1"] * y**2 + TRUTH["beta1"] * variance, y

    noise = jax.random.normal(jax.random.key(seed), (length,))
    return jax.jit(lambda noise: jax.lax.scan(step, jnp.ones(()), noise)[1])(noise)


# ---------------------------------------------------------------------------------------
# NUTS.


def run(model, y, num_warmup, num_samples, num_chains, **options):
    mcmc = MCMC(
        NUTS(model),
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        # XLA compiles the loop of one chain to one piece of code, that of several to many.
        chain_method="sequential",
        progress_bar=False,
    )
    start = time.perf_counter()
    mcmc.run(jax.random.key(0), y, **options)
    jax.block_until_ready(mcmc.get_samples())
    return mcmc, time.perf_counter() - start


def print_nuts(y: jax.Array, num_warmup: int, num_samples: int) -> float:
    """Print both posteriors, and return by how much the first draws differ."""
    print(f"\nNUTS, GARCH(1, 1), {len(y)} values")
    draws = [
        run(partial(state_space.garch, scan=scan), y, 20, 30, 1)[0].get_samples()
        for scan in SCANS.values()
    ]
    worst = max(
        float(jnp.max(jnp.abs(a - b)) / jnp.std(b))
        for a, b in zip(*map(jax.tree.leaves, draws), strict=True)
    )
    print(f"50 iterations, 20 of warm-up: draws differ by {worst:.1e} standard deviations at most")
    print(f"{'':12s}{'seconds':>9s}{'gradient [kB]':>15s}   posterior mean (mcse)")
    for name, scan in SCANS.items():
        model = partial(state_space.garch, scan=scan)
        mcmc, seconds = run(model, y, num_warmup, num_samples, 2)
        summary = az.summary(az.from_numpyro(mcmc), round_to="none")
        values = "  ".join(
            f"{site} {row['mean']:.4f} ({row['mcse_mean']:.4f})" for site, row in summary.iterrows()
        )
        print(f"{name:12s}{seconds:9.1f}{gradient_memory(model, y):15.1f}   {values}")
    return worst


def gradient_memory(model, y: jax.Array) -> float:
    info = numpyro.infer.util.initialize_model(jax.random.key(0), model, model_args=(y,))
    compiled = jax.jit(jax.grad(info.potential_fn)).lower(info.param_info.z).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e3


def print_reference(path: Path) -> None:
    """Means of parameters and of their squares, in Monte Carlo standard errors of both sides."""
    content = json.loads(path.read_text())
    data, reference = content["data"], content["reference"]
    y = jnp.asarray(data["y"], float)
    mcmc, _ = run(state_space.garch, y, 1_000, 2_500, 4, first_scale=data["sigma1"])
    posterior = az.from_numpyro(mcmc).posterior
    print("\ngarch-garch11 of posteriordb: z is the difference in standard errors of both sides")
    for site, theirs in reference.items():
        ours = posterior[site].values
        error = np.hypot(float(az.mcse(ours)), theirs["mcse"])
        print(
            f"{site:8s} mean {ours.mean():.4f}, reference {theirs['mean']:.4f}, "
            f"z {(ours.mean() - theirs['mean']) / error:+.2f}; "
            f"ratio of standard deviations {ours.std() / theirs['sd']:.3f}"
        )


# ---------------------------------------------------------------------------------------
# A stream.


def volatility(params, variance, y):
    density = -0.5 * (y**2 / variance + jnp.log(2 * jnp.pi * variance))
    return params["alpha0"] + params["alpha1"] * y**2 + params["beta1"] * variance, density


def streaming(y, num_data, remember=True):
    params = {
        "alpha0": numpyro.sample("alpha0", dist.HalfNormal(1.0)),
        "alpha1": numpyro.sample("alpha1", dist.Beta(1.0, 2.0)),
    }
    share = numpyro.sample("share", dist.Uniform())
    params["beta1"] = numpyro.deterministic("beta1", share * (1 - params["alpha1"]))
    if remember:
        total = state_space.streamed("filter", volatility, params, jnp.ones(()), y)
    else:
        kept = numpyro.primitives.mutable("filter", {"state": jnp.ones(())})
        total = jnp.zeros(())

        def step(carry, y):
            variance, density = volatility(params, carry[0], y)
            return (variance, carry[1] + density), None

        (variance, total), _ = jax.lax.scan(step, (kept["state"], total), y)
        kept["state"] = jax.lax.stop_gradient(variance)
    numpyro.factor("y", num_data / len(y) * total)


def fitted(num_data: int, stretch: int, remember: bool):
    """Return the state to start from, a function `(state, values) -> state`, and medians."""
    start = init_to_value(values={"alpha0": 0.4, "alpha1": 0.3, "share": 0.5})
    model = partial(streaming, num_data=num_data, remember=remember)
    guide = AutoNormal(model, init_loc_fn=start)
    optimiser = optax.adam(optax.cosine_decay_schedule(0.05, num_data // stretch))
    svi = SVI(model, guide, optimiser, Trace_ELBO())

    @jax.jit
    def run_block(state, y):
        stretches = y.reshape(-1, stretch)
        return jax.lax.scan(lambda s, part: svi.update(s, part), state, stretches)[0]

    def medians(state):
        values = guide.median(svi.get_params(state))
        return {name: float(values[name]) for name in TRUTH}

    return svi.init(jax.random.key(0), returns(stretch)), run_block, medians


def print_stream(num_data: int, block: int, ways) -> float:
    """Print medians and memory on the way; return how much the memory grew, as a ratio."""
    print(f"SVI on a stream of {num_data} values, {ways[0][0]} a step; what made them: {TRUTH}")
    print(f"{'values':>10s}{'peak memory [MB]':>18s}   medians of the guide")
    peaks = []
    for length, remember in ways:
        title = "sensitivity kept" if remember else "sensitivity dropped"
        print(f"stretches of {length}, {title}")
        state, run_block, medians = fitted(num_data, length, remember)
        for i in range(num_data // block):
            state = run_block(state, returns(block, seed=i))
            if i in (0, num_data // block - 1):
                jax.block_until_ready(state)
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
                values = "  ".join(f"{name} {x:.3f}" for name, x in medians(state).items())
                print(f"{(i + 1) * block:10d}{peaks[-1]:18.1f}   {values}", flush=True)
    return peaks[1] / peaks[0]


def distances(num_data: int, remember: bool) -> np.ndarray:
    """Return how far the medians of six streams end from the truth."""
    state, run_block, medians = fitted(num_data, 10, remember)
    ends = [medians(run_block(state, returns(num_data, seed=100 * i))) for i in range(1, 7)]
    return np.array([np.linalg.norm([end[n] - TRUTH[n] for n in TRUTH]) for end in ends])


if __name__ == "__main__":
    main()
