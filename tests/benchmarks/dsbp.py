"""What a step of dynamic spectral backpropagation costs, beside other optimisers.

    python tests/benchmarks/dsbp.py [--fast]

A tanh network and a batch of random images; a step is loss, gradient, update, compiled as one.
Each round makes twenty steps of every optimiser in a new order, so that bases are refreshed twice
(GaLore's once); time is the median over rounds of the ratio to SGD's in the same round. `state` is
the optimiser's state in numbers, over the number of parameters, `temp` the step's temporary memory
over SGD's. Float32, about three minutes on two cores.
"""

import argparse
import os
from functools import partial

# LAPACK's threads, called from within XLA's, wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _race import race
from optax import contrib

from probbp.optim import dsbp

STEPS, REFRESH = 20, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a smoke test; its numbers are rough")
    fast = parser.parse_args().fast
    compare((64, 64, 64, 10), 64, num_rounds=5 if fast else 21)
    compare((256, 512, 512, 10), 64 if fast else 256, num_rounds=3 if fast else 11)


def compare(widths: tuple[int, ...], batch: int, num_rounds: int) -> None:
    keys = jax.random.split(jax.random.key(0), len(widths) + 1)
    params = [
        {"kernel": jax.random.normal(key, (a, b)) / a**0.5, "bias": jnp.zeros(b)}
        for key, a, b in zip(keys, widths, widths[1:], strict=False)
    ]
    data = jax.random.normal(keys[-2], (batch, widths[0])), jnp.arange(batch) % widths[-1]
    compiled, states = {}, {}
    for name, (step, optimiser) in arms().items():
        states[name] = optimiser.init(params)
        compiled[name] = jax.jit(step).lower(params, states[name], data).compile()

    def run(name):
        carry = params, states[name]
        for _ in range(STEPS):
            carry = compiled[name](*carry, data)
        return carry

    seconds = race({name: partial(run, name) for name in compiled}, num_rounds)
    ratios = np.median(seconds / seconds[:, :1], axis=0)
    memory = [step.memory_analysis().temp_size_in_bytes for step in compiled.values()]
    size = optax.tree.size(params)
    title = "-".join(map(str, widths))
    print(f"\n{title}, batch {batch}: SGD's step {1e3 * np.median(seconds[:, 0]) / STEPS:.2f} ms")
    print(f"{'':30s}{'time':>7s}{'state':>7s}{'temp':>7s}")
    for name, ratio, temp in zip(compiled, ratios, memory, strict=True):
        held = sum(np.size(leaf) for leaf in jax.tree.leaves(states[name]))
        print(f"{name:30s}{ratio:7.2f}{held / size:7.2f}{temp / memory[0]:7.2f}", flush=True)


def activations(params, x):
    """Return each layer's output."""
    outputs = []
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
        outputs.append(x)
    return [*outputs, x @ params[-1]["kernel"] + params[-1]["bias"]]


def loss(params, data):
    outputs = activations(params, data[0])
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs[-1], data[1])
    return jnp.mean(losses), [{"kernel": output, "bias": None} for output in outputs]


def arms():
    """Return name -> (step, optimiser)."""
    rate = optax.scale_by_learning_rate(1e-3)
    spectral = partial(dsbp.scale_by_dynamic_spectral, refresh=REFRESH)
    chains = {
        "SGD": optax.sgd(1e-3),
        "Adam": optax.adam(1e-3),
        "Muon": contrib.muon(1e-3),
        "GaLore, rank 8": contrib.galore(1e-3, rank=8, update_proj_gap=STEPS),
    }
    for mode in ("residual", "whiten", "damp", "project", "random", "bulk"):
        chains[f"{mode}, rank 8"] = optax.chain(spectral(8, mode), rate)
    chains["residual, rank 32"] = optax.chain(spectral(32), rate)
    chains["residual, refreshed each step"] = optax.chain(spectral(8, refresh=1), rate)
    chains["project, activations (paper)"] = optax.chain(
        spectral(8, "project", source="activations", side="out"), rate
    )
    steps = {name: (partial(plain, chain), chain) for name, chain in chains.items()}
    sgd = optax.sgd(1e-3)
    steps["SAM"] = partial(sharpness_aware, sgd), sgd
    tracked = optax.GradientTransformation(start_tracking, sgd.update)
    steps[f"two points, tracked every {REFRESH}"] = partial(two_points, sgd), tracked
    return steps


def plain(optimiser, params, state, data):
    (_, acts), grad = jax.value_and_grad(loss, has_aux=True)(params, data)
    updates, state = optax.with_extra_args_support(optimiser).update(grad, state, params, acts=acts)
    return optax.apply_updates(params, updates), state


def sharpness_aware(optimiser, params, state, data):
    """SAM: the gradient at the end of a normalised step uphill."""
    grad = jax.grad(loss, has_aux=True)(params, data)[0]
    uphill = optax.tree.add_scale(params, 0.05 / optax.tree.norm(grad), grad)
    updates, state = optimiser.update(jax.grad(loss, has_aux=True)(uphill, data)[0], state)
    return optax.apply_updates(params, updates), state


def start_tracking(params):
    spectrum = dsbp.start(jax.random.key(0), optax.tree.size(params), 1)
    return optax.sgd(1e-3).init(params), spectrum, jnp.zeros((), jnp.int32)


def two_points(optimiser, params, state, data):
    """The penalised gradient, its direction followed by one Hessian product every ten steps."""
    state, spectrum, count = state

    def scalar(params):
        return loss(params, data)[0]

    spectrum = jax.lax.cond(
        count % REFRESH == 0,
        lambda s: dsbp.track(s, dsbp.hessian_product(scalar, params), 0.0, decay=0.0),
        lambda s: s,
        spectrum,
    )
    estimator = dsbp.two_point(0.1, spectrum.vectors[:, 0])
    _, grad = estimator(scalar)(jax.random.key(0), params)
    updates, state = optimiser.update(grad, state)
    return optax.apply_updates(params, updates), (state, spectrum, count + 1)


if __name__ == "__main__":
    main()
