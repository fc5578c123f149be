"""What a gradient carried forward costs, beside backpropagation through time.

    python tests/benchmarks/rtrl.py [--fast]

Value and gradient of the likelihoods of `probbp.models.state_space`, of a layer of diagonal
recurrent units, and of dense recurrent networks of growing width: by `jax.lax.scan` in reverse
mode, by Equinox's scan with about sqrt(T) checkpoints, by `jax.jacfwd` of `lax.scan`, and by
`probbp.ops.rtrl`. n is the size of the carry, P the number of parameters, T the length. Memory is
that of temporary buffers, as XLA reports it of the compiled call. Time is the median over rounds of
the ratio to reverse mode in the same round, calls in a new order each round; milliseconds are those
of reverse mode. "recommended" is what `rtrl.recommended` says. Double precision; about three
minutes on two cores.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
from _race import race
from jax.flatten_util import ravel_pytree
from numpyro.infer.util import initialize_model

from probbp.models import state_space
from probbp.ops import rtrl


class Problem(NamedTuple):
    """A loss of a scan and of parameters, and the sizes that decide its cost."""

    name: str
    loss: Callable[[Callable, Any], jax.Array]
    params: Any
    num_states: int
    length: int


checkpointed = partial(eqxi.scan, kind="checkpointed")
COLUMNS = ("lax.scan", "checkpoint", "jacfwd", "rtrl.scan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fast", action="store_true", help="a smoke test; its numbers are rough")
    fast = parser.parse_args().fast
    jax.config.update("jax_enable_x64", True)
    lengths = (1_000, 10_000) if fast else (1_000, 10_000, 100_000)
    rounds = 3 if fast else 11
    print_header("few parameters, long series")
    for make in (garch, kalman, hidden_markov, pendulum):
        for length in lengths:
            print_row(make(length), rounds)
    print_header("a layer of diagonal units, and its readout (rtrl.diagonal_scan)")
    for length in lengths:
        print_row(diagonal(length), rounds)
    print_header("dense recurrent networks: where it loses")
    for width in (2, 4, 8) if fast else (2, 4, 8, 16):
        print_row(dense(width, 10_000), rounds)


def print_header(title: str) -> None:
    print(f"\n{title}")
    print(f"{'':34s} |{'memory [kB]':^44s} |{'':9s}time, x reverse mode")
    names = "".join(f"{name:>11s}" for name in COLUMNS)
    print(
        f"{'':16s}{'n':>4s}{'P':>6s}{'T':>8s} |{names} |{'[ms]':>9s}{names[11:]}  recommended",
        flush=True,
    )


def print_row(problem: Problem, num_rounds: int) -> None:
    num_params = ravel_pytree(problem.params)[0].size
    plain = partial(problem.loss, jax.lax.scan)

    def with_value(grad):
        return lambda params: (plain(params), grad(params))

    gradients = {
        "lax.scan": jax.value_and_grad(plain),
        "checkpoint": jax.value_and_grad(partial(problem.loss, checkpointed)),
        "jacfwd": with_value(jax.jacfwd(plain)),
        "rtrl.scan": jax.value_and_grad(partial(problem.loss, rtrl.scan)),
    }
    if problem.num_states * num_params > 20_000:
        del gradients["jacfwd"]  # a column for every parameter takes minutes
    calls = {name: jax.jit(fun).lower(problem.params).compile() for name, fun in gradients.items()}
    results = [ravel_pytree(call(problem.params))[0] for call in calls.values()]
    for result in results:
        np.testing.assert_allclose(result, results[0], rtol=1e-7, atol=1e-7 * abs(results[0]).max())
    memory = {n: c.memory_analysis().temp_size_in_bytes / 1e3 for n, c in calls.items()}
    times = race({name: partial(call, problem.params) for name, call in calls.items()}, num_rounds)
    ratios = dict(zip(calls, np.median(times / times[:, :1], axis=0), strict=True))
    cell = "{:11.1f}".format
    line = f"{problem.name:16s}{problem.num_states:4d}{num_params:6d}{problem.length:8d} |"
    line += "".join(cell(memory[n]) if n in memory else f"{'-':>11s}" for n in COLUMNS)
    line += f" |{1e3 * np.median(times[:, 0]):9.2f}"
    line += "".join(f"{ratios[n]:11.2f}" if n in ratios else f"{'-':>11s}" for n in COLUMNS[1:])
    print(line, "", rtrl.recommended(problem.num_states, num_params, problem.length), flush=True)


# ---------------------------------------------------------------------------------------
# Problems.


def potential(name: str, model: Callable, num_states: int, y: jax.Array, **options) -> Problem:
    """A NumPyro model's potential energy at its prior's medians, as NUTS differentiates it."""

    def loss(scan, params):
        info = initialize_model(
            jax.random.key(0),
            partial(model, scan=scan, **options),
            model_args=(y,),
            validate_grad=False,
        )
        return info.potential_fn(params)

    start = initialize_model(
        jax.random.key(0), partial(model, **options), model_args=(y,), validate_grad=False
    ).param_info.z
    return Problem(name, loss, jax.tree.map(lambda leaf: 0.1 * leaf, start), num_states, len(y))


def garch(length: int) -> Problem:
    y = jax.random.normal(jax.random.key(0), (length,))
    return potential("GARCH(1, 1)", state_space.garch, 2, y)


def hidden_markov(length: int) -> Problem:
    y = jax.random.normal(jax.random.key(0), (length,))
    return potential("hidden Markov", state_space.hidden_markov, 3, y)


def pendulum(length: int) -> Problem:
    y = jnp.sin(0.01 * jnp.arange(float(length)))
    return potential("pendulum", state_space.pendulum, 3, y, time_step=0.01)


def kalman(length: int) -> Problem:
    """A second-order autoregression seen through noise."""
    y = jax.random.normal(jax.random.key(0), (length,))

    def loss(scan, params):
        def system():
            return state_space.LinearGaussian(
                transition=jnp.stack([params[:2], jnp.array([1.0, 0.0])]),
                loading=jnp.array([1.0, 0.0]),
                state_noise=jnp.exp(params[2]) * jnp.diag(jnp.array([1.0, 0.0])),
                observation_noise=jnp.exp(params[3]),
            )

        return -state_space.kalman(y, system, jnp.zeros(2), jnp.eye(2), scan=scan)

    return Problem("Kalman, AR(2)", loss, jnp.array([0.5, 0.2, -0.5, -0.5]), 7, length)


def diagonal(length: int, width: int = 64, num_inputs: int = 16) -> Problem:
    """Leaky units on one series, with a nonlinear readout."""
    keys = jax.random.split(jax.random.key(0), 3)
    xs = jax.random.normal(keys[0], (length, num_inputs))
    units = {
        "leak": jnp.linspace(0.0, 3.0, width),
        "gain": jax.random.normal(keys[1], (width, num_inputs)),
    }
    params = units, jax.random.normal(keys[2], (width,)) / width

    def cell(unit, h, x):
        return jax.nn.sigmoid(unit["leak"]) * h + unit["gain"] @ x

    def loss(scan, params):
        units, readout = params

        def cost(h, x):
            return (jnp.tanh(readout @ h) - x[0]) ** 2

        if scan is rtrl.scan:
            return rtrl.diagonal_scan(cell, units, jnp.zeros(width), xs, cost)[0]

        def step(carry, x):
            h, total = carry
            h = jax.vmap(cell, (0, 0, None))(units, h, x)
            return (h, total + cost(h, x)), None

        return scan(step, (jnp.zeros(width), jnp.zeros(())), xs)[0][1]

    return Problem("diagonal units", loss, params, width, length)


def dense(width: int, length: int) -> Problem:
    keys = jax.random.split(jax.random.key(0), 3)
    xs = jax.random.normal(keys[0], (length, width))
    params = jax.random.normal(keys[1], (2, width, width)) / width**0.5

    def loss(scan, params):
        def step(carry, x):
            h, total = carry
            h = jnp.tanh(params[0] @ h + params[1] @ x)
            return (h, total + jnp.sum(h**2)), None

        return scan(step, (jnp.zeros(width), jnp.zeros(())), xs)[0][1]

    return Problem("dense network", loss, params, width + 1, length)


if __name__ == "__main__":
    main()
