"""What the reversal costs in a step of the physics-informed autoencoder, and what a fit does.

    python tests/benchmarks/physics_vae.py [--fast]

A step of SVI on a batch of 64 records with four particles, over that of the same model without the
operation in it. Time is the median over rounds of the ratio in the same round, the calls in turn;
memory the temporary buffers that XLA reports for the compiled step. Then how often the physics is
traced over batches and strengths, and how long it takes to fit the oscillator, compilation
included. Float32, about three minutes on two cores.
"""

import argparse
import time
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _race import race

from probbp.models import physics, physics_vae
from probbp.models.physics_vae import model

CASES = {"beam": physics.beam(), "oscillator": physics.oscillator(), "bridges": physics.bridges()}
BATCH = 64


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a smoke test; its numbers are rough")
    fast = parser.parse_args().fast
    for title, case in CASES.items():
        records = physics.simulate(jax.random.key(0), case, BATCH)
        print(f"\n{title}\n{'':26s}{'ms':>9s}{'time':>8s}{'MiB':>9s}{'memory':>8s}")
        compare(steps(case, records), 5 if fast else 51)
    case = CASES["oscillator"]
    print(f"\ntraces of the physics in 20 steps, batches and strengths: {count_traces(case)}")
    num_steps = 300 if fast else 8000
    start = time.perf_counter()
    loss = fit(case, num_steps)
    print(f"oscillator, {num_steps} steps: {time.perf_counter() - start:.0f} s, loss {loss:.1f}")


def build(case, records, physics_fn=None):
    return physics_vae.physics_vae(
        physics_fn or case.physics,
        case.priors,
        records.x,
        domain=physics_vae.continuous(records.c),
        classes=physics_vae.continuous(records.y),
        known=records.known,
        domain_dim=4,
        class_dim=4,
    )


def steps(case, records):
    """Return name -> compiled step, without arguments."""
    vae = build(case, records)
    data, options = (records.x, records.c, records.y), {"known": records.known}

    def compiled(strength, **more):
        svi = physics_vae.svi(vae, optax.adam(1e-3), strength=strength, **more)
        state = svi.init(jax.random.key(1), *data, **options)
        step = jax.jit(lambda state, data, options: svi.update(state, *data, **options))
        return step.lower(state, data, options).compile(), (state, data, options)

    with mock.patch.object(model, "gradient_reversal", lambda x, strength: x):
        plain = compiled(0.0)
    schedule = physics_vae.dann_schedule(1 / 256, 1000)
    return {
        "without the operation": plain,
        "strength -1": compiled(-1.0),
        "cut, 0": compiled(0.0),
        "reversed, 1/256": compiled(1 / 256),
        "reversed, schedule": compiled(schedule),
        "and adversary": compiled(schedule, invariance=10.0),
    }


def compare(programs, num_rounds):
    memory = {
        name: program.memory_analysis().temp_size_in_bytes / 2**20
        for name, (program, _) in programs.items()
    }
    calls = {name: partial(program, *inputs) for name, (program, inputs) in programs.items()}
    seconds = dict(zip(calls, race(calls, num_rounds).T, strict=True))
    first = next(iter(calls))
    for name in calls:
        ratio = np.median(np.divide(seconds[name], seconds[first]))
        print(
            f"{name:26s}{1e3 * np.median(seconds[name]):9.2f}{ratio:8.2f}"
            f"{memory[name]:9.2f}{memory[name] / memory[first]:8.2f}"
        )


def count_traces(case):
    traces = []

    def physics_fn(parameters):
        traces.append(None)
        return case.physics(parameters)

    records = physics.simulate(jax.random.key(0), case, 20 * BATCH)
    vae = build(case, records, physics_fn)
    svi = physics_vae.svi(vae, optax.adam(1e-3), strength=physics_vae.dann_schedule(1 / 128, 20))
    batches = [jax.tree.map(lambda a, i=i: a[i::20], records[:3]) for i in range(20)]
    state = svi.init(jax.random.key(1), *batches[0])
    update = jax.jit(svi.update)
    before = len(traces)
    state, _ = update(state, *batches[0])
    once = len(traces) - before
    for batch in batches[1:]:
        state, _ = update(state, *batch)
    return f"{(len(traces) - before) / once:.0f}"


def fit(case, num_steps):
    records = physics.simulate(jax.random.key(0), case, 1024)
    vae = build(case, records)
    svi = physics_vae.svi(vae, optax.adam(2e-3), strength=1 / 128)
    data = records.x, records.c, records.y
    options = {"subsample_size": BATCH, "progress_bar": False}
    result = svi.run(jax.random.key(1), num_steps, *data, **options)
    return float(jnp.mean(result.losses[-100:]) / len(records.x))


if __name__ == "__main__":
    main()
