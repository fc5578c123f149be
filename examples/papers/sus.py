"""SUS backprop's claim on transformers trained here: how much noise for how few interactions.

Pankov & Harik, 2025, arXiv:2505.15080: keeping c = 25 to 30 interactions a token at about 2,000
tokens cuts about 99 % of the gradient's flow through attention, for about 1 % more variance of the
gradient, less as the length grows. The models here are byte-level language models of Python's
standard library with a causal mask, of 1 to 6 layers of two heads of width 32, trained on 2,048
bytes a step with the sparse gradient itself (c = 30). Measured on texts that they did not see:

- sampling: E |estimate - g|^2 / |g|^2 over draws, g the exact gradient of one text with respect to
  all parameters; the ratio of the means over texts. In brackets, the queries' and keys' kernels.
- added: E |estimate - g|^2 / E |g - mean g|^2, sampling over the variance between texts: by how
  much sampling raises the variance of a step, whatever the number of texts in its batch.
- cut: the share of the weights of all queries that a backward pass leaves out.

    python examples/papers/sus.py [--fast]

Eight texts, three draws each. About fifteen minutes on two cores.
"""

import argparse
import sysconfig
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from probbp.models import transformer
from probbp.ops import sus

LENGTH, HEADS, WIDTH, KEEP = 2048, 2, 64, 30
DEPTHS = (1, 2, 4, 6)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a smoke test; its figures are rough")
    fast = parser.parse_args().fast
    num_steps, num_texts, num_draws = (5, 2, 2) if fast else (800, 8, 3)
    depths = (1, 2) if fast else DEPTHS
    start = time.perf_counter()
    train_text, test_text = texts()
    models = {}
    for depth in depths:
        models[depth], losses = train(train_text, depth, num_steps)
        last = np.mean(losses[-num_steps // 8 :])
        tqdm.write(f"{depth} layers: {losses[0]:.2f} bits a byte before training, {last:.2f} after")

    measured = partial(measure, test_text, num_texts=num_texts, num_draws=num_draws)
    header()
    for depth in depths:
        for name, params in models[depth].items():
            row(f"{depth} layers, {name}", LENGTH, KEEP, measured(params, depth, LENGTH, KEEP))
    middle = depths[-2]  # and its lengths and rules
    params = models[middle]["trained"]
    header()
    for length in (256, 512, 1024, 2048):
        row(f"{middle} layers", length, KEEP, measured(params, middle, length, KEEP))
    header()
    for keep in (10, 30, 60):
        for sampling in ("independent", "systematic", "filled"):
            result = measured(params, middle, LENGTH, keep, sampling=sampling)
            row(f"{middle} layers, {sampling}", LENGTH, keep, result)
    print(f"\n{time.perf_counter() - start:.0f} seconds, JAX {jax.__version__}")


def texts():
    """Return bytes to train on, and others."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts = (b"".join(p.read_bytes() for p in paths if (p.name < "t") == first) for first in (1, 0))
    return [jnp.asarray(np.frombuffer(part, np.uint8), jnp.int32) for part in parts]


def attention(rng_key, depth, keep, sampling="systematic"):
    """Return attention with a key of its own for each call of a forward pass."""
    keys = iter(jax.random.split(rng_key, depth))

    def attend(*args, **kwargs):
        return sus.dot_product_attention(
            *args, **kwargs, keep=keep, sampling=sampling, rng_key=next(keys)
        )

    return attend


def loss(params, tokens, attend):
    """Bits a byte."""
    hidden = transformer.encode(
        params, tokens[None, :-1], num_heads=HEADS, attention=attend, is_causal=True
    )
    logits = hidden[0] @ params["head.kernel"] + params["head.bias"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:])
    return jnp.mean(losses) / jnp.log(2)


def train(text, depth, num_steps):
    params = transformer.init(
        jax.random.key(depth),
        num_classes=256,
        max_length=LENGTH,
        vocabulary=256,
        width=WIDTH,
        num_layers=depth,
    )
    # A head of zeros would send nothing back.
    untrained = params | {
        "head.kernel": jax.random.normal(jax.random.key(0), (WIDTH, 256)) * WIDTH**-0.5
    }
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, num_steps // 10 + 1, num_steps)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    @jax.jit
    def step(carry, rng_key):
        params, state = carry
        key_text, key_attention = jax.random.split(rng_key)
        tokens = crop(text, key_text, LENGTH)
        value, grad = jax.value_and_grad(loss)(
            params, tokens, attention(key_attention, depth, KEEP)
        )
        updates, state = optimiser.update(grad, state)
        return (optax.apply_updates(params, updates), state), value

    carry, losses = (params, optimiser.init(params)), []
    for key in tqdm(jax.random.split(jax.random.key(1), num_steps), f"{depth} layers"):
        carry, value = step(carry, key)
        losses.append(float(value))
    return {"untrained": untrained, "trained": carry[0]}, losses


def crop(text, rng_key, length):
    begin = jax.random.randint(rng_key, (), 0, len(text) - length)
    return jax.lax.dynamic_slice(text, (begin,), (length + 1,))


def measure(text, params, depth, length, keep, *, num_texts, num_draws, sampling="systematic"):
    """Return relative variances: of sampling, over the gradient and over texts; the cut."""

    def flat(grad):
        is_logit = [".query." in name or ".key." in name for name in grad]
        parts = [jnp.ravel(leaf) for leaf in grad.values()]
        logit = jnp.concatenate([jnp.full(p.size, b) for p, b in zip(parts, is_logit, strict=True)])
        return jnp.concatenate(parts), logit

    @jax.jit
    def exact(params, tokens):
        attend = partial(sus.dot_product_attention, keep=None)
        return flat(jax.grad(loss)(params, tokens, attend))

    @jax.jit
    def error(params, tokens, rng_key, grad, is_logit):
        attend = attention(rng_key, depth, keep, sampling)
        squares = (flat(jax.grad(loss)(params, tokens, attend))[0] - grad) ** 2
        return jnp.sum(squares), jnp.sum(squares * is_logit)

    grads, errors, lengths = [], [], []
    for key in jax.random.split(jax.random.key(2), num_texts):
        key_text, *key_draws = jax.random.split(key, 1 + num_draws)
        tokens = crop(text, key_text, length)
        grad, is_logit = exact(params, tokens)
        grads.append(np.asarray(grad))
        lengths.append([jnp.sum(grad**2), jnp.sum(grad**2 * is_logit)])
        errors.append([error(params, tokens, k, grad, is_logit) for k in key_draws])
    noise, noise_of_logits = np.mean(errors, axis=(0, 1))
    norm, norm_of_logits = np.mean(lengths, axis=0)
    grads = np.array(grads, np.float64)
    between = np.sum(np.var(grads, axis=0, ddof=1))
    candidates = np.arange(1, length + 1)
    return {
        "sampling": noise / norm,
        "logits": noise_of_logits / norm_of_logits,
        "added": noise / between,
        "cut": 1 - np.minimum(candidates, keep).sum() / candidates.sum(),
    }


def header():
    print(f"\n{'':26s}{'length':>8s}{'c':>5s}{'cut':>8s}{'sampling':>18s}{'added':>9s}", flush=True)


def row(title, length, keep, result):
    sampling = f"{100 * result['sampling']:.2f} ({100 * result['logits']:.2f}) %"
    tqdm.write(
        f"{title:26s}{length:8d}{keep:5d}{100 * result['cut']:7.1f}%{sampling:>18s}"
        f"{100 * result['added']:8.2f}%"
    )


if __name__ == "__main__":
    main()
