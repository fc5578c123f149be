"""Work that may be killed at any moment: draws, SVI, a network that grows. A script.

    python tests/long_run.py FOLDER [--length 1] [--parts draws svi growth]

It goes on from what FOLDER holds, says "begun" when it starts to compute, and in the end writes all
that it found to FOLDER/result.npz. `tests/test_kill.py` and `tests/benchmarks/faults.py` kill it.
"""

import argparse
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

import probbp
from probbp.estimators import forward
from probbp.models import growth
from probbp.models.growth.acceptance import Proposal
from probbp.models.growth.machine import Fit
from probbp.numpyro import Optim
from probbp.ops import dendrites as ops
from probbp.ops.dendrites import Candidate
from probbp.samplers.scan import checkpointed_scan

DATA = np.linspace(-1.0, 2.0, 12)


def logdensity_fn(position):
    scaled = (DATA - position["mean"]) * jnp.exp(-position["log_scale"])
    prior = -0.5 * (position["mean"] ** 2 + position["log_scale"] ** 2)
    return prior - 0.5 * jnp.sum(scaled**2) - DATA.size * position["log_scale"]


def draw(folder, length, **options):
    """Draws of four chains; what there is of them in NumPy."""
    data = probbp.sample(
        jax.random.key(0),
        partial(probbp.line_fmala, logdensity_fn),
        {"mean": jnp.zeros(()), "log_scale": jnp.zeros(())},
        **{"num_warmup": 12, "num_samples": 40 * length, "every": 8} | options,
        checkpoint=folder,
        progress_bar=False,
    )
    return {
        f"{group}.{name}": array.values
        for group in ("posterior", "sample_stats")
        for name, array in data[group].data_vars.items()
    }


def model(y):
    mean = numpyro.sample("mean", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(mean, 1), obs=y)


def svi():
    return SVI(model, AutoNormal(model), Optim(optax.adam(0.05), forward()), Trace_ELBO())


def optimise(folder, length):
    """Losses and parameters of SVI."""
    fit = svi()
    state, losses = checkpointed_scan(
        lambda state, _: fit.update(state, DATA),
        fit.init(jax.random.key(1), DATA),
        50 * length,
        every=10,
        checkpoint=folder,
        progress_bar=False,
    )
    return {"losses": losses, **fit.get_params(state)}


def host():
    """A host whose scores are written down, and whose state is a random walk."""

    def like(masks):
        there = ops.empty(jnp.zeros((1, 1)), len(masks["layer"]))
        return Fit((jnp.zeros(()), jnp.zeros((), int)), {"layer": there})

    def epoch(rng_key, fit):
        walk, count = fit.state
        num_sets = len(fit.dendrites["layer"].mask)
        walk = walk + jax.random.normal(rng_key)
        return Fit((walk, count + 1), fit.dendrites), num_sets + min(int(count), 2) / 4

    def propose(rng_key, fit):
        num_sets = len(fit.dendrites["layer"].mask)
        kernel = jax.random.normal(rng_key, (1, 1))
        candidate = Candidate(kernel, jnp.zeros(1), jnp.zeros((num_sets, 1)))
        zeros = {"layer": jnp.zeros(1)}
        return Proposal({"layer": candidate}, {"layer": jnp.ones(1)}, *4 * (zeros,))

    def grow(fit, proposal, slot):
        there = ops.grow(fit.dendrites["layer"], proposal.candidates["layer"])
        return Fit((fit.state[0], jnp.zeros((), int)), {"layer": there})

    first = partial(like, {"layer": []})
    return SimpleNamespace(
        init=first,
        like=like,
        epoch=epoch,
        propose=propose,
        grow=grow,
        params=lambda fit: fit.state,
        layer=None,
        max_sets=None,
        programs=lambda fit: {},
    )


def grown(folder, length):
    """A grown network, and its history."""
    options = {"max_sets": 2 * length, "patience": 2, "progress_bar": False}
    result = growth.grow(jax.random.key(2), host(), **options, checkpoint=folder)
    leaves = jax.tree.leaves((result.params, result.dendrites))
    return {
        "history": np.array([str(event) for event in result.history]),
        **{f"leaf {i}": np.asarray(leaf) for i, leaf in enumerate(leaves)},
    }


PARTS = {"draws": draw, "svi": optimise, "growth": grown}


def killed_after(seconds, folder, length, parts, environment):
    """Run this script and kill it `seconds` after it began; return whether it was still running."""
    command = [sys.executable, __file__, str(folder), "--length", str(length), "--parts", *parts]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "begun":
                break
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return True
    assert process.returncode == 0, f"{' '.join(command)} failed by itself"
    return False


def result_of(folder):
    with np.load(Path(folder, "result.npz"), allow_pickle=False) as result:
        return dict(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--length", type=int, default=1)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    args.folder.mkdir(parents=True, exist_ok=True)
    print("begun", flush=True)
    begun = time.perf_counter()
    result = {
        f"{part}.{name}": value
        for part in args.parts
        for name, value in PARTS[part](args.folder / part, args.length).items()
    }
    partial_path = args.folder / "partial.npz"
    np.savez(partial_path, seconds=time.perf_counter() - begun, **result)
    os.replace(partial_path, args.folder / "result.npz")


if __name__ == "__main__":
    main()
