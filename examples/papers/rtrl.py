"""Gradients carried forward, in NumPyro's hands: the same draws, a stream, a reference posterior.

    python examples/papers/rtrl.py [--data DIR]

1. NUTS on a GARCH(1, 1) series of 5000 values, by `jax.lax.scan` and by `rtrl.scan`, same key: the
   first draws, the posterior, the memory of a gradient.
2. SVI on a GARCH series that streams, a million values: parameters are updated while the data go
   by, and the process's peak memory is read on the way. In stretches of a hundred, and of ten, with
   the sensitivity kept between stretches and dropped, as truncated backpropagation has it.
3. With `--data`, a folder of posteriordb's data and reference draws, NUTS on its garch-garch11.

Bird & Polivoda, 2021, arXiv:2103.15589. About three minutes on two cores.
"""

import argparse
import json
import resource
import time
from functools import partial
from pathlib import Path

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, init_to_value
from numpyro.infer.autoguide import AutoNormal

from probbp.models import state_space
from probbp.ops import rtrl

TRUTH = {"alpha0": 0.05, "alpha1": 0.1, "beta1": 0.85}
SCANS = {"lax.scan": jax.lax.scan, "rtrl.scan": rtrl.scan}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with garch-garch11.json")
    folder = parser.parse_args().data
    jax.config.update("jax_enable_x64", True)
    # The stream first: the peak of the process is its own, and nobody else's.
    print_stream()
    print_nuts(returns(5_000))
    if folder is None:
        print("\nLeft out: the reference posterior. It needs data: --data DIR")
    else:
        print_reference(folder / "garch-garch11.json")


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


def print_nuts(y: jax.Array) -> None:
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
        mcmc, seconds = run(model, y, 300, 500, 2)
        summary = az.summary(az.from_numpyro(mcmc), round_to="none")
        values = "  ".join(
            f"{site} {row['mean']:.4f} ({row['mcse_mean']:.4f})" for site, row in summary.iterrows()
        )
        print(f"{name:12s}{seconds:9.1f}{gradient_memory(model, y):15.1f}   {values}")


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


def print_stream(num_data: int = 1_000_000, stretch: int = 100, block: int = 100_000) -> None:
    print(f"SVI on a stream of {num_data} values, {stretch} a step; what made them: {TRUTH}")
    print(f"{'values':>10s}{'peak memory [MB]':>18s}   medians of the guide")
    start = init_to_value(values={"alpha0": 0.4, "alpha1": 0.3, "share": 0.5})
    for length, remember in ((stretch, True), (10, True), (10, False)):
        model = partial(streaming, num_data=num_data, remember=remember)
        guide = AutoNormal(model, init_loc_fn=start)
        optimiser = optax.adam(optax.cosine_decay_schedule(0.05, num_data // length))
        svi = SVI(model, guide, optimiser, Trace_ELBO())
        title = "sensitivity kept" if remember else "sensitivity dropped"
        print(f"stretches of {length}, {title}")

        @jax.jit
        def run_block(state, y, svi=svi, length=length):
            stretches = y.reshape(-1, length)
            return jax.lax.scan(lambda s, part: svi.update(s, part), state, stretches)[0]

        state = svi.init(jax.random.key(0), returns(length))
        for i in range(num_data // block):
            state = run_block(state, returns(block, seed=i))
            if i in (0, num_data // block - 1):
                jax.block_until_ready(state)
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
                medians = guide.median(svi.get_params(state))
                values = "  ".join(f"{name} {float(medians[name]):.3f}" for name in TRUTH)
                print(f"{(i + 1) * block:10d}{peak:18.1f}   {values}", flush=True)


if __name__ == "__main__":
    main()
