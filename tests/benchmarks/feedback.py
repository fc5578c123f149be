"""What a step through feedback weights costs, beside backpropagation.

    python tests/benchmarks/feedback.py [--fast]

Value and gradient of dense and convolutional networks, compiled: with JAX's products, and with
those of `probbp.ops.feedback` under each rule. Time is the median over rounds of the ratio to
backpropagation in the same round; milliseconds are those of backpropagation. Memory is that of
temporary buffers and outputs, as XLA reports it, as a ratio too; `kolen_pollack` has gradients of
the feedback weights among its outputs. Float32, half a minute on two cores.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _race import race

from probbp.ops import feedback


class Network(NamedTuple):
    """Layers `(product, kernel, x) -> h`, a product `(x, kernel, feedback)`, kernels, a batch."""

    title: str
    layers: list[Callable]
    ours: Callable
    exact: Callable
    kernels: list[jax.Array]
    x: jax.Array


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a smoke test; its numbers are rough")
    fast = parser.parse_args().fast
    for network in (
        dense(width=256, depth=4, batch=256),
        dense(width=1024, depth=4, batch=64 if fast else 512),
        dense(width=256, depth=32, batch=128),
        conv(channels=16, depth=4, batch=32),
        conv(channels=32, depth=6, batch=8 if fast else 64),
    ):
        compare(network, num_rounds=5 if fast else 21)


def compare(network: Network, num_rounds: int) -> None:
    random = feedback.normal(jax.random.key(1), network.kernels)

    def through(rule):
        def loss(kernels, random):
            h = network.x
            for layer, kernel, b in zip(network.layers, kernels, random, strict=True):
                kernel, b = rule(kernel, b)
                h = layer(partial(network.ours, feedback=b), kernel, h)
            return jnp.mean(h**2)

        return loss

    def plain(kernels, random):
        h = network.x
        for layer, kernel in zip(network.layers, kernels, strict=True):
            h = layer(network.exact, kernel, h)
        return jnp.mean(h**2)

    def layers(kernels):
        pairs = zip(network.layers, kernels, strict=True)
        return [partial(layer, network.exact, kernel) for layer, kernel in pairs]

    sent = feedback.direct_weights(jax.random.key(2), layers(network.kernels), network.x)

    def direct(kernels, sent):
        return feedback.direct(lambda h: jnp.mean(h**2), layers(kernels), network.x, sent)

    losses: dict[str, Any] = {
        "backpropagation": (plain, random, 0),
        "random": (through(lambda kernel, b: (kernel, b)), random, 0),
        "uniform_sign": (through(lambda k, b: (k, feedback.uniform_sign(k))), random, 0),
        "fixed_magnitude": (through(lambda k, b: (k, feedback.fixed_magnitude(k, b))), random, 0),
        "kolen_pollack": (through(lambda k, b: (feedback.kolen_pollack(k, b), b)), random, (0, 1)),
        "direct": (direct, sent, 0),
    }
    calls = {}
    for name, (loss, weights, argnums) in losses.items():
        fun = jax.value_and_grad(loss, argnums)
        calls[name] = jax.jit(fun).lower(network.kernels, weights).compile()
    runs = {n: partial(call, network.kernels, losses[n][1]) for n, call in calls.items()}
    seconds = race(runs, num_rounds)
    ratios = np.median(seconds / seconds[:, :1], axis=0)
    reports = [call.memory_analysis() for call in calls.values()]
    memory = [report.temp_size_in_bytes + report.output_size_in_bytes for report in reports]
    print(
        f"\n{network.title}: {1e3 * np.median(seconds[:, 0]):.2f} ms, {memory[0] / 2**20:.2f} MiB"
    )
    print(f"{'':18s}{'time':>8s}{'memory':>8s}")
    for name, ratio, size in zip(calls, ratios, memory, strict=True):
        print(f"{name:18s}{ratio:8.2f}{size / memory[0]:8.2f}", flush=True)


def dense(width: int, depth: int, batch: int) -> Network:
    def layer(product, kernel, h):
        return jnp.tanh(product(h, kernel))

    keys = jax.random.split(jax.random.key(0), depth + 1)
    kernels = [jax.random.normal(key, (width, width)) / width**0.5 for key in keys[1:]]
    x = jax.random.normal(keys[0], (batch, width))
    title = f"{depth} dense layers of {width}, {batch} rows"
    return Network(title, [layer] * depth, feedback.dense, jnp.matmul, kernels, x)


def conv(channels: int, depth: int, batch: int) -> Network:
    options = {
        "window_strides": (1, 1),
        "padding": "SAME",
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    }

    def layer(product, kernel, h):
        return jax.nn.relu(product(h, kernel))

    # The last layer takes the mean over space, so that its outputs are (batch, channels).
    def last(product, kernel, h):
        return product(h, kernel).mean((1, 2))

    keys = jax.random.split(jax.random.key(0), depth + 1)
    shape = (3, 3, channels, channels)
    kernels = [jax.random.normal(key, shape) / (9 * channels) ** 0.5 for key in keys[1:]]
    x = jax.random.normal(keys[0], (batch, 16, 16, channels))
    title = f"{depth} convolutions of {channels} channels, {batch} images of 16 x 16"
    return Network(
        title,
        [*[layer] * (depth - 1), last],
        partial(feedback.conv_general_dilated, **options),
        partial(jax.lax.conv_general_dilated, **options),
        kernels,
        x,
    )


if __name__ == "__main__":
    main()
