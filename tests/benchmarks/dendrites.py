"""What dendrites cost: against a plain layer of as many parameters, and probes against a gradient.

    python tests/benchmarks/dendrites.py

Ratios of medians, all calls of a table in alternation; memory is XLA's own figure.
"""

import jax
import jax.numpy as jnp
import numpy as np
from _race import race

from probbp.ops import dendrites as ops

ROWS, WIDTH, ROUNDS = 512, 256, 15


def branches(kernel, num):
    there = ops.empty(kernel)
    for k in range(num):
        keys = jax.random.split(jax.random.key(k), 4)
        candidate = ops.Candidate(
            jax.random.normal(keys[0], kernel.shape) / WIDTH**0.5,
            jax.random.normal(keys[1], kernel.shape[1:]),
            jax.random.normal(keys[2], (k, kernel.shape[1])),
        )
        there = ops.grow(there, candidate, weight=jax.random.normal(keys[3], kernel.shape[1:]))
    return there


def report(title, programs, reference):
    times = np.median(race(programs, ROUNDS), axis=0)
    base = times[list(programs).index(reference)]
    print(f"\n{title}\n{'':40s}{'time':>8s}{'memory':>10s}")
    memory = {
        name: compiled.memory_analysis().temp_size_in_bytes / 2**20
        for name, (compiled, _) in COMPILED.items()
        if name in programs
    }
    for name, seconds in zip(programs, times, strict=True):
        print(f"{name:40s}{seconds / base:8.2f}{memory[name]:7.1f} MB")


COMPILED = {}


def compiled(name, fun, *args):
    program = jax.jit(fun).lower(*args).compile()
    COMPILED[name] = program, args
    return lambda: program(*args)


def main():
    x = jax.random.normal(jax.random.key(0), (ROWS, WIDTH))
    kernel = jax.random.normal(jax.random.key(1), (WIDTH, WIDTH)) / WIDTH**0.5

    def loss(there, x, kernel, **switches):
        return jnp.mean(jnp.tanh(ops.dense(x, kernel, None, there, **switches)) ** 2)

    programs = {}
    for num in (0, 1, 2, 4):
        # As many parameters in one product: a plain layer of the same inputs, wider.
        wide = jnp.tile(kernel, (1, 1 + num))
        name = f"plain, as large as with {num}"
        slope = jax.grad(loss, (1, 2))
        programs[name] = compiled(name, lambda x, w, slope=slope: slope(None, x, w), x, wide)
        there = branches(kernel, num)
        for kind, switches in {
            "": {},
            ", frozen and perforated": {"freeze": True, "perforate": True},
        }.items():
            name = f"{num} dendrites a neuron{kind}"
            fun = jax.grad(lambda t, x, w, s=switches: loss(t, x, w, **s), (0, 1, 2))
            programs[name] = compiled(name, fun, there, x, kernel)
    report(f"gradient of a layer, {WIDTH} to {WIDTH}, {ROWS} rows", programs, list(programs)[0])

    kernels = [jax.random.normal(jax.random.key(i), kernel.shape) / WIDTH**0.5 for i in range(4)]

    def network(kernels, layer, x):
        for i, kernel in enumerate(kernels):
            x = jnp.tanh(layer(f"layer {i}", x, kernel))
        return jnp.sum(x**2)

    plain = ops.grown({})
    calls = {
        "gradient of all weights": jax.grad(lambda kernels, x: network(kernels, plain, x)),
        "observe: inputs and errors of all layers": lambda kernels, x: ops.observe(
            lambda layer: network(kernels, layer, x), plain
        ),
    }
    programs = {name: compiled(name, fun, kernels, x) for name, fun in calls.items()}
    report(f"four layers of {WIDTH}, {ROWS} rows", programs, "gradient of all weights")


if __name__ == "__main__":
    main()
