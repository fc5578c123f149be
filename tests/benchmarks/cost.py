"""What a step costs: time, memory and operations of each sampler beside `blackjax.mala`.

    python tests/benchmarks/cost.py [--fast]

All samplers of a table run in turn, in a new order in each round, and a time ratio is the median
over the rounds of the ratio to `blackjax.mala` in the same round; "fastest" compares the fastest
rounds instead, for a machine with other work on it. Memory is XLA's own figure for the temporary
buffers of one compiled step; it counts operations too, a loop's body once. Float32.

Checkpointed reverse mode keeps only some of the activations and computes the others again: it
takes most of the memory argument away, so it's always in the comparison.
"""

import argparse
import contextlib
import io
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import statsmodels.api as sm
from _race import race
from blackjax.util import generate_gaussian_noise
from numpyro.infer.util import initialize_model

import probbp
from probbp.models import hierarchical
from probbp.samplers.curvature import gauss_newton

STEP_SIZE = 1e-7
"""So small that almost every proposal is accepted; a step costs the same either way."""


class Model(NamedTuple):
    """A log density and what the comparison needs beside it.

    Attributes:
        name: as printed.
        logdensity_fn: position to a scalar.
        position: where the chains start.
        checkpointed_fn: the same log density under `jax.checkpoint`; `None` where it has no depth.
        curvature: Gauss-Newton, where the model has it.
        num_steps: steps in a timed call, so that the call itself is not what is measured.
    """

    name: str
    logdensity_fn: Callable
    position: Any
    checkpointed_fn: Callable | None = None
    curvature: Callable | None = None
    num_steps: int = 1


class Cost(NamedTuple):
    """What a step of one sampler takes.

    Attributes:
        time: median [s].
        ratio: median ratio to the first sampler of the table, in the same round.
        fastest: ratio of the fastest rounds, which other work on the machine disturbs least.
        memory: temporary buffers [bytes].
        flops: as XLA counts them.
    """

    time: float
    ratio: float
    fastest: float
    memory: float
    flops: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fast", action="store_true", help="a smoke test; its numbers are rough")
    fast = parser.parse_args().fast
    print_jvps()

    depth, rows = (3, 128) if fast else (21, 512)
    few, many = (5, 3) if fast else (41, 9)
    for model, num_rounds, reason in (
        (
            deep_network(depth, rows),
            few,
            "a JVP along weights multiplies as often as a gradient, three products a layer; it "
            "saves the traffic of kept activations, and costs a second draw of as many normals as "
            "there are parameters: see the parts",
        ),
        (
            deep_network(depth, 16 * rows),
            many,
            "the activations that a gradient keeps still fit the cache",
        ),
    )[: 1 if fast else 2]:
        costs = print_costs(model, num_rounds)
        print_parts(model, num_rounds)
        ratio = costs["fmala"].ratio
        say("carried FMALA, at most 0.75 of blackjax.mala's time", ratio, ratio <= 0.75, reason)

    for width in (4,) if fast else (4, 16):
        costs = print_costs(long_scan(1_000 if fast else 10_000, width), many)
        share = costs["fmala"].memory / costs["blackjax.mala"].memory
        reason = "the smoke test's scan is short" if fast else "see the temporary buffers"
        say("FMALA, at most 2 % of blackjax.mala's memory", share, share <= 0.02, reason)
    print_costs(grunfeld(1 if fast else 200), few)
    print_progress_bar(*((1_000, 1) if fast else (20_000, 7)))


def deep_network(depth: int, rows: int, width: int = 64) -> Model:
    """A multilayer perceptron with two outputs, Gaussian noise and Gaussian priors.

    Two outputs make the number of parameters even: XLA's CPU backend takes several times longer
    to draw an odd number of normals (`print_parts` shows it). Checkpoints, of layers and groups of
    them, sit in loops, since the same backend undoes them where layers are written out.
    """
    sizes = (8, *[width] * depth, 2)
    keys = jax.random.split(jax.random.key(0), depth + 2)
    position = [
        (jax.random.normal(key, (num_in, num_out)) / num_in**0.5, jnp.zeros(num_out))
        for key, num_in, num_out in zip(keys[1:], sizes[:-1], sizes[1:], strict=True)
    ]
    x = jax.random.normal(keys[0], (rows, sizes[0]))
    y = jnp.sin(x[:, :2])

    def layer(hidden, weight_and_bias):
        weight, bias = weight_and_bias
        return jnp.tanh(hidden @ weight + bias), None

    def predict(layers):
        hidden = x
        for weight_and_bias in layers[:-1]:
            hidden, _ = layer(hidden, weight_and_bias)
        weight, bias = layers[-1]
        return hidden @ weight + bias

    def checkpointed(layers):
        first, *inner, last = layers
        num = _divisor(len(inner))
        inner = jax.tree.map(lambda *ls: jnp.stack(ls).reshape(num, -1, *ls[0].shape), *inner)
        each = partial(jax.lax.scan, jax.checkpoint(layer))
        hidden, _ = jax.lax.scan(jax.checkpoint(each), layer(x, first)[0], inner)
        return hidden @ last[0] + last[1]

    def loglikelihood(mean):
        return -0.5 * jnp.sum((y - mean) ** 2) / 0.1**2

    def logprior(layers):
        return -0.5 * sum(len(w) * jnp.sum(w**2) + jnp.sum(b**2) for w, b in layers)

    return Model(
        f"deep network: {depth} layers of {width}, {rows} rows, {_size(position)} parameters",
        lambda p: loglikelihood(predict(p)) + logprior(p),
        position,
        lambda p: loglikelihood(checkpointed(p)) + logprior(p),
        gauss_newton(predict, loglikelihood, logprior),
    )


def long_scan(length: int, width: int) -> Model:
    """A series read by a recursion, h' = tanh(W h + u y + b), that predicts its next value.

    XLA's CPU backend compiles a loop of about a kilobyte as a whole; a larger one runs operation by
    operation, some ten times slower. Width 4 is below for gradient and JVP (not for the nested
    ones), 16 above for all; at 5, slight differences decide.
    """
    keys = jax.random.split(jax.random.key(1), 3)
    y = jnp.sin(jnp.arange(length) / 7) + 0.3 * jax.random.normal(keys[0], (length,))
    position = {
        "recurrent": 0.3 * jax.random.normal(keys[1], (width, width)),
        "input": jnp.full(width, 0.1),
        "bias": jnp.zeros(width),
        "output": 0.1 * jax.random.normal(keys[2], (width,)),
    }
    chunk = _divisor(length)

    def logdensity_fn(p, is_checkpointed=False):
        def step(carry, y):
            hidden, total = carry
            total = total - 0.5 * (y - p["output"] @ hidden) ** 2 / 0.3**2
            return (jnp.tanh(p["recurrent"] @ hidden + p["input"] * y + p["bias"]), total), None

        def steps(carry, ys):
            return jax.lax.scan(step, carry, ys)

        start = (jnp.zeros(width), jnp.zeros(()))
        if is_checkpointed:
            (_, total), _ = jax.lax.scan(jax.checkpoint(steps), start, y.reshape(-1, chunk))
        else:
            (_, total), _ = steps(start, y)
        return total - 0.5 * optax.tree.norm(p, squared=True)

    return Model(
        f"long scan: {length} steps, {_size(position)} parameters",
        logdensity_fn,
        position,
        partial(logdensity_fn, is_checkpointed=True),
    )


def grunfeld(num_steps: int) -> Model:
    """The investments of eleven firms over twenty years, intercepts partially pooled."""
    data = sm.datasets.grunfeld.load_pandas().data
    firms, group = np.unique(data["firm"], return_inverse=True)
    standard = {
        name: (data[name] - data[name].mean()) / data[name].std() for name in data.columns[:3]
    }
    y, *features = [jnp.asarray(column, jnp.float32) for column in standard.values()]
    info = initialize_model(
        jax.random.key(2),
        hierarchical.model,
        model_args=(jnp.stack(features, -1), group, y),
        model_kwargs={"num_groups": len(firms)},
        validate_grad=False,
    )
    position = info.param_info.z
    return Model(
        f"hierarchical model: Grunfeld data, {_size(position)} parameters",
        lambda p: -info.potential_fn(p),
        position,
        num_steps=num_steps,
    )


def samplers(model: Model) -> dict[str, Any]:
    """Return the samplers of a table; the first is what the others are compared with."""
    logdensity_fn = model.logdensity_fn
    table = {
        "blackjax.mala": blackjax.mala(logdensity_fn, STEP_SIZE),
        "mala": probbp.mala(logdensity_fn, STEP_SIZE),
        "fmala": probbp.fmala(logdensity_fn, STEP_SIZE),
        "fmala, refreshed": probbp.fmala(logdensity_fn, STEP_SIZE, key_policy="refreshed"),
        "line_fmala": probbp.line_fmala(logdensity_fn, STEP_SIZE),
        "line_fmala, k=8": probbp.line_fmala(logdensity_fn, STEP_SIZE, num_tangents=8),
        "pc_fmala": probbp.pc_fmala(logdensity_fn, STEP_SIZE),
        "pc_line_fmala": probbp.pc_line_fmala(logdensity_fn, STEP_SIZE),
    }
    if model.curvature is not None:
        table["pc_line_fmala, G.-N."] = probbp.pc_line_fmala(
            logdensity_fn, STEP_SIZE, curvature=model.curvature
        )
    if model.checkpointed_fn is not None:
        table["blackjax.mala, ckpt."] = blackjax.mala(model.checkpointed_fn, STEP_SIZE)
    return table


def print_costs(model: Model, num_rounds: int) -> dict[str, Cost]:
    """Measure and print all samplers on one model."""
    calls, memory, flops = {}, {}, {}
    state = _state(model)
    for name, sampler in samplers(model).items():
        compiled = jax.jit(sampler.step).lower(jax.random.key(0), state).compile()
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
        flops[name] = compiled.cost_analysis()["flops"]
        call = compiled if model.num_steps == 1 else _steps(sampler, model.num_steps)
        calls[name] = partial(call, jax.random.key(0), state)
    times = race(calls, num_rounds) / model.num_steps
    ratios = np.median(times / times[:, :1], axis=0)
    fastest = times.min(axis=0) / times[:, 0].min()
    costs = {
        name: Cost(np.median(times[:, i]), ratios[i], fastest[i], memory[name], flops[name])
        for i, name in enumerate(calls)
    }

    print(f"\n{model.name}")
    print(
        f"{'':22s}{'ms a step':>11s}{'ratio':>8s}{'fastest':>9s}{'temp KiB':>12s}{'ratio':>8s}",
        end="",
    )
    print(f"{'Mflop':>10s}{'ratio':>8s}")
    base = costs["blackjax.mala"]
    for name, cost in costs.items():
        print(
            f"{name:22s}{1e3 * cost.time:11.3f}{cost.ratio:8.2f}{cost.fastest:9.2f}"
            f"{cost.memory / 1024:12.1f}{cost.memory / base.memory:8.3f}"
            f"{cost.flops / 1e6:10.3f}{cost.flops / base.flops:8.2f}"
        )
    return costs


def print_parts(model: Model, num_rounds: int) -> None:
    """Print what a gradient, a JVP and the normals of a step take by themselves."""
    position, fun = model.position, model.logdensity_fn
    tangent = optax.tree.scale(0.01, position)
    num_params = _size(position)
    normals = jax.jit(jax.random.normal, static_argnums=1)
    calls = {
        "gradient": partial(jax.jit(jax.value_and_grad(fun)), position),
        "JVP": partial(jax.jit(lambda p, v: jax.jvp(fun, (p,), (v,))), position, tangent),
        "log density": partial(jax.jit(fun), position),
        "noise": partial(
            jax.jit(lambda key: generate_gaussian_noise(key, position)), jax.random.key(0)
        ),
        f"{num_params} normals": partial(normals, jax.random.key(0), (num_params,)),
        f"{num_params + 1} normals": partial(normals, jax.random.key(0), (num_params + 1,)),
    }
    times = 1e3 * np.median(race(calls, num_rounds), axis=0)
    parts = [f"{name} {value:.2f}" for name, value in zip(calls, times, strict=True)]
    print("parts [ms]: " + ", ".join(parts))


def print_jvps() -> None:
    """Print how many Jacobian-vector products each sampler makes in a step.

    The network is wrapped in a `jax.custom_jvp` whose rule calls back to the host, so that what
    is counted is what runs, once a tangent. A nested pair counts as one, of second order.
    """
    seen = Counter()
    x = jnp.linspace(-1, 1, 12).reshape(4, 3)

    @jax.custom_jvp
    def predict(p):
        return jnp.tanh(x @ p)

    @predict.defjvp
    def predict_jvp(primals, tangents):
        jax.debug.callback(lambda _: seen.update(["jvp"]), optax.tree.sum(tangents))
        return jax.jvp(lambda p: jnp.tanh(x @ p), primals, tangents)

    def loglikelihood(mean):
        return -0.5 * jnp.sum(mean**2)

    def logprior(p):
        return -0.5 * jnp.sum(p**2)

    num_steps = 50
    model = Model(
        "",
        lambda p: loglikelihood(predict(p)) + logprior(p),
        jnp.ones((3, 5)),
        curvature=gauss_newton(predict, loglikelihood, logprior),
    )
    print("Jacobian-vector products a step, counted on the host as they run")
    state = _state(model)
    jax.effects_barrier()
    for name, sampler in samplers(model).items():
        if name not in ("blackjax.mala", "mala"):
            seen.clear()
            jax.block_until_ready(_steps(sampler, num_steps)(jax.random.key(1), state))
            jax.effects_barrier()
            print(f"{name:22s}{seen['jvp'] / num_steps:6.2f}")
            if name == "fmala":
                carried = seen["jvp"] / num_steps
    say("carried FMALA, one Jacobian-vector product a step", carried, carried == 1, "")


def print_progress_bar(num_samples: int, num_rounds: int) -> None:
    """Print what the progress bar of `probbp.sample` adds to a run, compilation included.

    In CPU time: the bar is work of the host, and other work on the machine does not count.
    """
    position = jnp.zeros(10)
    algorithm = partial(probbp.fmala, lambda x: -0.5 * jnp.sum(x**2))

    def run(progress_bar):
        with contextlib.redirect_stderr(io.StringIO()):
            return probbp.sample(
                jax.random.key(0),
                algorithm,
                position,
                num_warmup=num_samples,
                num_samples=num_samples,
                thinning=10,
                progress_bar=progress_bar,
            )

    calls = {"without": partial(run, False), "with": partial(run, True)}
    times = race(calls, num_rounds, time.process_time)
    added = 100 * (times[:, 1] / times[:, 0] - 1)
    print(
        f"\nprogress bar: {np.median(times[:, 0]):.2f} s of CPU time without it; it adds [%] ",
        end="",
    )
    print(" ".join(f"{value:+.1f}" for value in np.sort(added)))
    median = float(np.median(added))
    say("progress bar, adds less than 2 % (median)", median, median < 2, "see the spread")


def say(target: str, value: float, is_met: bool, reason: str) -> None:
    """Print whether a target is met, and why not."""
    verdict = "met" if is_met else f"not met ({reason})"
    print(f"target: {target}: {value:.3g}, {verdict}", flush=True)


def _state(model: Model) -> Any:
    """Return a state for all samplers of a table; they share BlackJAX's, and it costs the same."""
    return jax.jit(blackjax.mala(model.logdensity_fn, STEP_SIZE).init)(model.position)


def _steps(sampler: Any, num_steps: int) -> Callable:
    """Compile `num_steps` steps as one call."""

    @jax.jit
    def steps(rng_key, state):
        keys = jax.random.split(rng_key, num_steps)
        return jax.lax.scan(lambda s, key: (sampler.step(key, s)[0], None), state, keys)[0]

    return steps


def _divisor(number: int) -> int:
    """Return the largest divisor up to the square root."""
    return max(n for n in range(1, int(number**0.5) + 1) if number % n == 0)


def _size(position: Any) -> int:
    return optax.tree.size(position)


if __name__ == "__main__":
    main()
