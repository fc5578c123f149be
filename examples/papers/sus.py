"""SUS backprop's claim on transformers trained here: how much noise for how few interactions.

Pankov & Harik, 2025, arXiv:2505.15080: keeping c = 25 to 30 interactions a token at about 2,000
tokens cuts about 99 % of the gradient's flow through attention, for about 1 % more variance of the
gradient, less as the length grows. The models here are byte-level language models of Python's
standard library with a causal mask, of 1 to 4 layers of two heads of width 32, trained on 2,048
bytes a step with the sparse gradient itself (c = 30). Measured on texts that they did not see:

- sampling: E |estimate - g|^2 / |g|^2 over draws, g the exact gradient of one text with respect to
  all parameters; the ratio of the means over texts. In brackets, the queries' and keys' kernels.
- added: E |estimate - g|^2 / E |g - mean g|^2, sampling over the variance between texts: by how
  much sampling raises the variance of a step, whatever the number of texts in its batch.
- cut: the share of the weights of all queries that a backward pass leaves out.

    python examples/papers/sus.py [--fast]

Eight texts, three draws each; intervals are a jackknife's over texts.
"""

import sysconfig
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _evidence import above, below, exact, jackknifed
from _papers import SUS
from _results import panels, parsed, parser, write
from tqdm import tqdm

from probbp.models import transformer
from probbp.ops import sus

HEADS, WIDTH, KEEP = 2, 64, 30


def main():
    arguments = parsed(parser(__doc__))
    fast = arguments.fast
    num_steps, num_texts, num_draws = (5, 3, 2) if fast else (600, 8, 3)
    depths, lengths = ((1, 2), (64, 128)) if fast else ((1, 2, 4), (256, 512, 1024, 2048))
    length = lengths[-1]
    start = time.perf_counter()
    train_text, test_text = texts()
    models = {}
    for depth in depths:
        models[depth], losses = train(train_text, depth, length, num_steps)
        last = np.mean(losses[-num_steps // 8 :])
        tqdm.write(f"{depth} layers: {losses[0]:.2f} bits a byte before training, {last:.2f} after")

    measured = partial(measure, test_text, num_texts=num_texts, num_draws=num_draws)
    middle = depths[-2]  # and its lengths and rules
    trained = models[middle]["trained"]
    by_depth = of_depths(measured, models, length)
    by_length = of_lengths(measured, trained, middle, lengths)
    by_rule = of_rules(measured, trained, middle, length, fast)
    print(f"\n{time.perf_counter() - start:.0f} seconds, JAX {jax.__version__}")

    def added(what, result):
        return jackknifed(what, 100 * result["added"], 100 * result["left_out"], "%")

    what = "variance that sampling adds to a step's gradient"
    few, shortest = by_rule["systematic", 10], by_length[lengths[0]]
    growth = [result["left_out"] for result in (by_length[length], shortest)]
    figure, axes = panels(2)
    draw_lengths(axes[0], by_length)
    axes[0].set_title(f"c = {KEEP}")
    draw_rules(axes[1], by_rule)
    axes[1].set_title(f"{length} tokens")
    write(
        arguments,
        paper=SUS,
        claim="Keeping some 30 interactions a token of 2,000 cuts about 99 % of the gradient's "
        "flow through attention, for about 1 % more variance, and less as the length grows.",
        setting=f"Causal byte models of Python's standard library, {depths[0]} to {depths[-1]} "
        f"layers, {length} tokens; {num_texts} texts, {num_draws} draws each; c = {KEEP}, "
        f"{middle} layers, trained {num_steps} steps.",
        ours=added(f"{what}, systematic draws", by_rule["systematic", KEEP]),
        baseline=added("coin flips, as many interactions", by_rule["independent", KEEP]),
        checks=[
            above(
                f"c = {KEEP} cuts about 99 %, 98.5 % or more",
                exact("share of weights cut", 100 * by_length[length]["cut"], "%"),
                98.5,
            ),
            *(
                below(
                    f"for about 1 % more variance, under 1.5 %, {depth} layers",
                    added(what, by_depth[depth, "trained"]),
                    1.5,
                )
                for depth in depths
            ),
            below(
                f"so where {100 * few['cut']:.1f} % are cut, c = 10",
                added(f"{what}, c = 10", few),
                1.5,
            ),
            below(
                "less as the length grows",
                jackknifed(
                    f"{what}, {length} tokens less {lengths[0]}",
                    100 * (by_length[length]["added"] - shortest["added"]),
                    100 * (growth[0] - growth[1]),
                    "points",
                ),
            ),
        ],
        figure=figure,
        caption="Variance that sampling adds to the gradient of one text, over the variance "
        f"between texts, all parameters, {middle} layers: by the length, and by how much is kept.",
    )


def of_depths(measured, models, length):
    header()
    results = {}
    for depth, fits in models.items():
        for name, params in fits.items():
            results[depth, name] = measured(params, depth, length, KEEP)
            row(f"{depth} layers, {name}", length, KEEP, results[depth, name])
    return results


def of_lengths(measured, params, depth, lengths):
    header()
    results = {}
    for length in lengths:
        results[length] = measured(params, depth, length, KEEP)
        row(f"{depth} layers", length, KEEP, results[length])
    return results


def of_rules(measured, params, depth, length, fast):
    header()
    results = {}
    for keep in (10, KEEP, 60)[: 2 if fast else 3]:
        for sampling in ("independent", "systematic", "filled")[: 2 if fast else 3]:
            result = measured(params, depth, length, keep, sampling=sampling)
            results[sampling, keep] = result
            row(f"{depth} layers, {sampling}", length, keep, result)
    return results


def draw_lengths(ax, results):
    figures = [jackknifed("", 100 * r["added"], 100 * r["left_out"]) for r in results.values()]
    means = np.array([figure.mean for figure in figures])
    ends = [means - [f.low for f in figures], [f.high for f in figures] - means]
    ax.errorbar(list(results), means, ends, fmt="o-", capsize=3)
    ax.set(xscale="log", xlabel="tokens", ylabel="variance added [%]", ylim=(0, None))
    ax.set_xticks(list(results), [str(length) for length in results])
    ax.minorticks_off()


def draw_rules(ax, results):
    keeps = sorted({keep for _, keep in results})
    for sampling in dict.fromkeys(sampling for sampling, _ in results):
        values = [100 * results[sampling, keep]["added"] for keep in keeps]
        ax.loglog(keeps, values, "o-", label=sampling)
    ax.set(xlabel="interactions kept a token", ylabel="variance added [%]")
    ax.set_xticks(keeps, [str(keep) for keep in keeps])
    ax.minorticks_off()
    ax.legend()


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


def train(text, depth, length, num_steps):
    params = transformer.init(
        jax.random.key(depth),
        num_classes=256,
        max_length=length,
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
        tokens = crop(text, key_text, length)
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


def flat(grad):
    """Return a gradient as a vector, and which entries are the queries' and keys'."""
    is_logit = [".query." in name or ".key." in name for name in grad]
    parts = [jnp.ravel(leaf) for leaf in grad.values()]
    logit = jnp.concatenate([jnp.full(p.size, b) for p, b in zip(parts, is_logit, strict=True)])
    return jnp.concatenate(parts), logit


@jax.jit
def true_gradient(params, tokens):
    attend = partial(sus.dot_product_attention, keep=None)
    return flat(jax.grad(loss)(params, tokens, attend))


@partial(jax.jit, static_argnames=("depth", "keep", "sampling"))
def error(params, tokens, rng_key, grad, is_logit, *, depth, keep, sampling):
    attend = attention(rng_key, depth, keep, sampling)
    squares = (flat(jax.grad(loss)(params, tokens, attend))[0] - grad) ** 2
    return jnp.sum(squares), jnp.sum(squares * is_logit)


def measure(text, params, depth, length, keep, *, num_texts, num_draws, sampling="systematic"):
    """Return relative variances: of sampling, over the gradient and over texts; the cut."""
    of = partial(error, depth=depth, keep=keep, sampling=sampling)
    grads, errors, lengths = [], [], []
    for key in jax.random.split(jax.random.key(2), num_texts):
        key_text, *key_draws = jax.random.split(key, 1 + num_draws)
        tokens = crop(text, key_text, length)
        grad, is_logit = true_gradient(params, tokens)
        grads.append(np.asarray(grad))
        lengths.append([jnp.sum(grad**2), jnp.sum(grad**2 * is_logit)])
        errors.append([of(params, tokens, k, grad, is_logit) for k in key_draws])
    noise, noise_of_logits = np.mean(errors, axis=(0, 1))
    norm, norm_of_logits = np.mean(lengths, axis=0)
    grads = np.array(grads, np.float64)

    def added(rows):
        """Sampling's variance over that between the texts in these rows."""
        return np.mean(np.array(errors)[rows, :, 0]) / np.sum(np.var(grads[rows], axis=0, ddof=1))

    everyone = np.arange(num_texts)
    candidates = np.arange(1, length + 1)
    return {
        "sampling": noise / norm,
        "logits": noise_of_logits / norm_of_logits,
        "added": added(everyone),
        "left_out": np.array([added(everyone[everyone != i]) for i in everyone]),
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
