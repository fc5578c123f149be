"""What a step of Bayesian low-rank adaptation costs, over a step of plain low-rank adaptation.

    python tests/benchmarks/blob.py [--fast]

The same transformer, batch and optimiser; queries, values and the head adapted with rank 8. "plain"
is maximum likelihood with the factors alone. Time is the median over rounds of the ratio to it in
the same round, the calls in turn; memory the temporary buffers that XLA reports for the compiled
step. Float32, about two minutes on two cores.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _race import race

from probbp.models import blob, transformer
from probbp.models.lora import Factors

CASES = {
    "16 images of 16 tokens, width 64": dict(batch=16, length=16, width=64, layers=2),
    "8 texts of 128 tokens, width 256": dict(batch=8, length=128, width=256, layers=4),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a smoke test; its numbers are rough")
    num_rounds = 5 if parser.parse_args().fast else 41
    for title, sizes in CASES.items():
        print(f"\n{title}\n{'':22s}{'ms':>9s}{'time':>8s}{'MiB':>9s}{'memory':>8s}")
        calls, memory = {}, {}
        for name, (step, state, base, x, y) in steps(**sizes).items():
            compiled = jax.jit(step).lower(state, base, x, y).compile()
            memory[name] = compiled.memory_analysis().temp_size_in_bytes / 2**20
            calls[name] = partial(compiled, state, base, x, y)
        seconds = dict(zip(calls, race(calls, num_rounds).T, strict=True))
        for name in calls:
            ratio = np.median(np.divide(seconds[name], seconds["plain"]))
            print(
                f"{name:22s}{1e3 * np.median(seconds[name]):9.2f}{ratio:8.2f}"
                f"{memory[name]:9.2f}{memory[name] / memory['plain']:8.2f}"
            )


def steps(batch, length, width, layers):
    """Return name -> (step, state, base, x, y)."""
    base = transformer.init(
        jax.random.key(0),
        num_classes=4,
        max_length=length,
        vocabulary=100,
        width=width,
        num_layers=layers,
        hidden_width=4 * width,
    )
    x = jax.random.randint(jax.random.key(1), (batch, length), 0, 100)
    y = jnp.arange(batch) % 4
    optimiser = optax.adam(1e-3)
    lora = blob.bayesian_lora(
        transformer.apply, base, target=r"(query|value|head)\.kernel", example=(x,)
    )
    svi = blob.svi(lora, optimiser)
    state = svi.init(jax.random.key(2), base, x, y=y)
    factors = {
        name: Factors(svi.get_params(state)[f"{name}_loc"], svi.get_params(state)[f"{name}_B"])
        for name in lora.layouts
    }

    def plain(state, base, x, y):
        factors, optax_state = state

        def loss(factors):
            logits = lora.apply(base, factors, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        value, grads = jax.value_and_grad(loss)(factors)
        updates, optax_state = optimiser.update(grads, optax_state, factors)
        return (optax.apply_updates(factors, updates), optax_state), value

    def bayesian(noise):
        return lambda state, base, x, y: svi.update(
            state, base, x, y=y, num_data=1000, kl_weight=0.1, noise=noise
        )

    first = factors, optimiser.init(factors)
    return {"plain": (plain, first, base, x, y)} | {
        f"BLoB, {noise}": (bayesian(noise), state, base, x, y)
        for noise in ("flipout", "independent", "shared")
    }


if __name__ == "__main__":
    main()
