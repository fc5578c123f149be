"""What a gradient of a spiking network costs: by rates, and through time.

    python tests/benchmarks/rate.py [--fast]

A network of 64-256-256-10 leaky integrate-and-fire neurons, 128 constant inputs, float32. "bptt"
is backpropagation through time by `jax.lax.scan`, "checkpoint" the same with sqrt(T) states stored;
"rate, time" carries all layers step by step, "rate, layer" each layer through all steps. The value
is the same in all. "forward" is the simulation alone.

Time is that of value and gradient, the median over rounds, the calls in turn; its ratios are
medians of ratios within a round. Memory is the temporary buffers that XLA reports. About four
minutes on two cores.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from _race import race

from probbp.ops import rate

SIZES, BATCH = (64, 256, 256, 10), 128
METHODS = {
    "bptt": {"gradient": "bptt"},
    "checkpoint": {"gradient": "bptt", "checkpoint": True},
    "rate, time": {},
    "rate, layer": {"order": "layer"},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a smoke test; its numbers are rough")
    fast = parser.parse_args().fast
    weights, x, y = problem()
    print(f"{'T':>5s}  {'':12s}{'MB':>10s}{'/ bptt':>9s}{'ms':>9s}{'/ bptt':>9s}")
    for num_steps in (8, 32) if fast else (8, 32, 128, 512, 2048):
        grads = {
            name: jax.jit(jax.value_and_grad(partial(loss, num_steps=num_steps, options=options)))
            for name, options in METHODS.items()
        }
        grads["forward"] = jax.jit(partial(loss, num_steps=num_steps, options={}))
        compiled = {name: grad.lower(weights, x, y).compile() for name, grad in grads.items()}
        calls = {name: partial(call, weights, x, y) for name, call in compiled.items()}
        times = race(calls, num_rounds=3 if num_steps > 512 or fast else 7)
        memory = [c.memory_analysis().temp_size_in_bytes / 1e6 for c in compiled.values()]
        ratios = np.median(times / times[:, :1], axis=0)
        for i, name in enumerate(calls):
            print(
                f"{num_steps:5d}  {name:12s}{memory[i]:10.2f}{memory[i] / memory[0]:9.4f}"
                f"{1e3 * np.median(times[:, i]):9.1f}{ratios[i]:9.3f}"
            )
        print()


def problem():
    """Return weights, inputs and labels."""
    keys = jax.random.split(jax.random.key(0), 5)
    weights = [
        jax.random.normal(key, (n, m), jnp.float32) / n**0.5
        for key, n, m in zip(keys[:3], SIZES[:-1], SIZES[1:], strict=True)
    ]
    x = jax.random.uniform(keys[3], (BATCH, SIZES[0]), jnp.float32, 0.0, 2.0)
    return weights, x, jax.random.randint(keys[4], (BATCH,), 0, SIZES[-1])


def loss(weights, x, y, *, num_steps, options):
    """Return the cross-entropy of the mean output."""

    def network(spike, x):
        *hidden, readout = weights
        for weight in hidden:
            x = spike(x @ weight)
        return x @ readout

    logits = jax.nn.log_softmax(rate.simulate(network, rate.constant(x), num_steps, **options))
    return -jnp.mean(jnp.take_along_axis(logits, y[:, None], axis=1))


if __name__ == "__main__":
    main()
