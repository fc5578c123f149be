"""Train a language model on long contexts with a backward pass that skips most of the attention.

A small transformer reads Python's standard library, 512 bytes at a time, and predicts the next
byte; once with the exact gradient, once with attention whose backward pass keeps at most 32 of the
up to 512 weights of a query and head (SUS, Pankov & Harik, 2025, arXiv:2505.15080). The losses
are the same function; only the gradient is an estimate, without bias.
"""

import sys
import sysconfig
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from probbp.models import transformer
from probbp.ops import sus

length, num_layers, num_steps = 512, 2, 110
folder = Path(sysconfig.get_paths()["stdlib"])
text = b"".join(path.read_bytes() for path in sorted(folder.glob("[a-f]*.py")))
text = jnp.asarray(np.frombuffer(text, np.uint8), jnp.int32)

start = transformer.init(
    jax.random.key(0), num_classes=256, max_length=length, vocabulary=256, num_layers=num_layers
)
optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))


def exact(rng_key):
    return jax.nn.dot_product_attention


def sparse(rng_key):
    """Each layer has a key of its own; one for all would make the gradient biased."""
    keys = iter(jax.random.split(rng_key, num_layers))

    def attention(*args, **kwargs):
        return sus.dot_product_attention(*args, **kwargs, keep=32, rng_key=next(keys))

    return attention


def loss(params, tokens, attention):
    """Bits a byte."""
    hidden = transformer.encode(
        params, tokens[None, :-1], num_heads=2, attention=attention, is_causal=True
    )
    logits = hidden[0] @ params["head.kernel"] + params["head.bias"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:])
    return jnp.mean(losses) / jnp.log(2)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def step(make_attention, carry, rng_key):
    """Take a step; both runs see the same texts in the same order."""
    params, state = carry
    key_text, key_attention = jax.random.split(rng_key)
    begin = jax.random.randint(key_text, (), 0, len(text) - length)
    tokens = jax.lax.dynamic_slice(text, (begin,), (length + 1,))
    value, grad = jax.value_and_grad(loss)(params, tokens, make_attention(key_attention))
    updates, state = optimiser.update(grad, state)
    return (optax.apply_updates(params, updates), state), value


keys = jax.random.split(jax.random.key(1), num_steps)
runs = {}
for make_attention in (exact, sparse):
    carry = jax.tree.map(jnp.copy, (start, optimiser.init(start)))
    compiled = step.lower(make_attention, carry, keys[0]).compile()
    losses, seconds = [], []
    for key in keys:
        begin = time.perf_counter()
        carry, value = jax.block_until_ready(compiled(carry, key))
        seconds.append(time.perf_counter() - begin)
        losses.append(value)
    mib = compiled.memory_analysis().temp_size_in_bytes / 2**20
    runs[make_attention.__name__] = np.array(losses), 1e3 * np.median(seconds), mib

print(
    f"bits a byte over the last 50 steps, milliseconds a step, temporary memory\n{'':8s}"
    f"{'mean':>8s}{'sd':>8s}{'ms':>8s}{'MiB':>8s}"
)
for name, (losses, ms, mib) in runs.items():
    print(f"{name:8s}{losses[-50:].mean():8.3f}{losses[-50:].std():8.3f}{ms:8.1f}{mib:8.1f}")

figure, (left, *right) = plt.subplots(
    1, 3, figsize=(10, 4), width_ratios=[3, 1, 1], layout="constrained"
)
for name, style in (("exact", "-"), ("sparse", "--")):
    left.plot(runs[name][0], style, label=name)
left.set(xlabel="step", ylabel="loss [bits a byte]")
left.legend()
for ax, column, unit in zip(right, (1, 2), ("time of a step [ms]", "memory [MiB]"), strict=True):
    ax.bar(list(runs), [run[column] for run in runs.values()], color=["C0", "C1"])
    ax.set_ylabel(unit)
figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "sus.png")
