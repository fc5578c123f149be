"""BLoB's claims on a CPU: a small transformer, a few labels of a new task, ten seeds.

Wang et al., 2024, arXiv:2406.11675, say that a posterior over the low-rank update, learnt in
fine-tuning, gives better calibrated predictions than maximum likelihood (MLE), MAP, MC dropout and
ensembles, at about their accuracy. The setting here is an analogy: a transformer of images, not of
language, pretrained on 900 of scikit-learn's digits seen one way (transposed, mirrored, in
negative), and adapted to upright ones with few labels. Low-rank updates of rank 8 of queries,
values and the head. Ten seeds draw the split, the pretraining and the fit; differences to MLE are
paired by seed, with a bootstrap interval over seeds.

    python examples/papers/blob.py [--fast]

The methods, all with the same steps, batches and learning rate:

- MLE; MAP: weight decay; MC dropout: 10 masks of the update's input, one for all tokens of an
  image; ensemble: of three MLEs.
- MLE, temperature: one temperature for the logits, fitted on a quarter of the labels that a second
  MLE did not see.
- TFB (arXiv:2412.05723): noise around the MLE, the largest that leaves the loss on its own labels
  within 0.3 %.
- BLoB, N = 0, 5, 10: the published rule, and the number of draws in prediction.
- ELBO: the exact ELBO. Tempered ELBO, the default here: the divergence times the one of 0.03, 0.1
  and 0.3 with which a fit to three quarters of the labels predicts the last quarter best.

OOD is the area under the ROC curve by which the largest probability tells test images from the same
with their pixels shuffled. Expected calibration error with 15 bins: at a few hundred test images a
perfect classifier has 3 to 5 %, so the debiased squared error is printed too.
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI, TraceMeanField_ELBO
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from probbp.diagnostics import (
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
)
from probbp.models import blob, tfb, transformer
from probbp.models.lora import Factors

SHIFTS = {
    "transposed": lambda images: images.transpose(0, 2, 1),
    "mirrored": lambda images: images[:, :, ::-1],
    "negative": lambda images: 1 - images,
}
SIZES = (80, 320)
NUM_SEEDS, NUM_PRETRAINING = 10, 900
BATCH, RATE, DECAY, DROPOUT = 16, 2e-3, 1e-2, 0.1
TEMPERATURES = jnp.array([0.03, 0.1, 0.3])
apply = partial(transformer.apply, num_heads=4)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a smoke test; its figures are rough")
    fast = parser.parse_args().fast
    num_seeds, num_steps = (2, 60) if fast else (NUM_SEEDS, 500)
    start = time.perf_counter()
    cells = [(shift, size) for shift in SHIFTS for size in SIZES]
    with tqdm(total=len(cells)) as bar:
        for shift in SHIFTS:
            bar.set_description(f"{shift}: pretraining")
            data, base, before = pretrained(SHIFTS[shift], num_seeds, 40 if fast else 500)
            for size in SIZES:
                bar.set_description(f"{shift}, {size} labels")
                scores = compare(data, base, size, num_steps)
                bar.clear()
                print_table(shift, size, scores, before)
                bar.update()
    print(f"\n{time.perf_counter() - start:.0f} seconds, JAX {jax.__version__}")


# ---------------------------------------------------------------------------------------
# Data and pretraining, every array with a first axis of seeds.


def pretrained(view, num_seeds, num_steps):
    """Return the target task's data, a network that knows the other view, and its accuracies."""
    digits = load_digits()
    images = digits.images / 16
    rows = np.stack([np.random.default_rng(s).permutation(len(images)) for s in range(num_seeds)])
    source, target = rows[:, :NUM_PRETRAINING], rows[:, NUM_PRETRAINING:]
    seen = jnp.asarray(transformer.patches(jnp.asarray(view(images), jnp.float32)))
    upright = jnp.asarray(transformer.patches(jnp.asarray(images, jnp.float32)))
    labels = jnp.asarray(digits.target)

    @jax.jit
    @jax.vmap
    def pretrain(key, rows):
        key_init, key_steps = jax.random.split(key)
        params = transformer.init(
            key_init, num_classes=10, max_length=16, num_features=4, width=32, hidden_width=64
        )
        optimiser = optax.adamw(optax.cosine_decay_schedule(3e-3, num_steps))

        def loss(params, batch):
            logits = apply(params, seen[batch])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

        def step(carry, key):
            params, state = carry
            grads = jax.grad(loss)(params, jax.random.choice(key, rows, (64,)))
            updates, state = optimiser.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key_steps, num_steps)
        return jax.lax.scan(step, (params, optimiser.init(params)), keys)[0][0]

    base = pretrain(jax.random.split(jax.random.key(0), num_seeds), jnp.asarray(source))
    data = upright[target], labels[target]

    def accuracy(images):
        logits = jax.jit(jax.vmap(apply))(base, images)
        return float((logits.argmax(-1) == data[1]).mean())

    return data, base, (accuracy(seen[target]), accuracy(data[0]))


# ---------------------------------------------------------------------------------------
# Methods. A fit is `(key, base, x, y, kl_weight) -> parameters`, for one seed.


def adapter(noise="flipout"):
    params = transformer.init(
        jax.random.key(0), num_classes=10, max_length=16, num_features=4, width=32, hidden_width=64
    )
    example = (jax.ShapeDtypeStruct((BATCH, 16, 4), jnp.float32),)
    target = r"(query|value|head)\.kernel"
    return blob.bayesian_lora(apply, params, target=target, example=example, noise=noise)


def point_guide(lora):
    """Return a guide with all mass on M: with no divergence its fit is maximum likelihood."""

    def guide(base, *inputs, **options):
        for name, layout in lora.layouts.items():
            shape = layout.shape_of_a(lora.rank)
            bound = layout.num_in**-0.5
            loc = numpyro.param(
                f"{name}_loc",
                lambda k, s=shape, b=bound: jax.random.uniform(k, s, minval=-b, maxval=b),
            )
            with numpyro.handlers.scale(scale=jnp.finfo(jnp.float32).tiny):
                numpyro.sample(f"{name}_A", dist.Delta(loc, event_dim=loc.ndim))

    return guide


def dropout_model(lora):
    """Return the model with a mask on what enters each update, one for all tokens of an example."""

    def model(base, x, y=None, **options):
        factors = {}
        for name, layout in lora.layouts.items():
            shape = layout.shape_of_a(lora.rank)
            a = numpyro.sample(f"{name}_A", dist.Normal(jnp.zeros(shape), 1.0).to_event(2))
            b = numpyro.param(f"{name}_B", jnp.zeros(layout.shape_of_b(lora.rank)))
            factors[name] = dropped(numpyro.prng_key(), a, b, len(x))
        logits = numpyro.deterministic("logits", masked(lora, base, factors, x))
        with numpyro.plate("examples", len(x)):
            numpyro.sample("y", dist.Categorical(logits=logits), obs=y)

    return model


def dropped(key, a, b, num):
    """Return factors with the whole of A under signs, and masks in their place."""
    mask = jax.random.bernoulli(key, 1 - DROPOUT, (num, a.shape[-1])) / (1 - DROPOUT)
    return Factors(jnp.zeros_like(a), b, a, mask, jnp.ones((num, a.shape[-2])))


def masked(lora, base, factors, x):
    def one(factors, x):
        return lora.apply(base, factors, x[None])[0]

    axes = dict.fromkeys(factors, Factors(None, None, None, 0, 0))
    return jax.vmap(one, (axes, 0))(factors, x)


def fit(svi, num_steps):
    def run(key, base, x, y, kl_weight=1.0):
        key_init, key_steps = jax.random.split(key)
        options = {"num_data": len(x), "kl_weight": kl_weight}
        state = svi.init(key_init, base, x[:BATCH], y=y[:BATCH], **options)

        def step(state, key):
            rows = jax.random.choice(key, len(x), (BATCH,), replace=False)
            return svi.update(state, base, x[rows], y=y[rows], **options)[0], None

        state, _ = jax.lax.scan(step, state, jax.random.split(key_steps, num_steps))
        return svi.get_params(state)

    return run


def compare(data, base, size, num_steps):
    """Return method -> scores, each (seeds,)."""
    x, y = data
    first, rest = slice(0, size - size // 4), slice(size - size // 4, size)
    test_x, test_y = x[:, max(SIZES) :], y[:, max(SIZES) :]
    pixels = jax.random.permutation(jax.random.key(9), 64)
    strange_x = test_x.reshape(*test_x.shape[:2], 64)[..., pixels].reshape(test_x.shape)
    num_seeds = len(x)
    schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, num_steps // 16, num_steps)
    lora, adamw = adapter(), partial(optax.adamw, schedule)

    def seeds(fun):
        return jax.jit(jax.vmap(fun))

    def keys(number):
        return jax.random.split(jax.random.key(number), num_seeds)

    point = partial(SVI, guide=point_guide(lora), loss=TraceMeanField_ELBO())
    mle = fit(point(partial(lora.model, noise="shared"), optim=adamw(weight_decay=0.0)), num_steps)
    decayed = fit(
        point(partial(lora.model, noise="shared"), optim=adamw(weight_decay=DECAY)), num_steps
    )
    dropout = fit(point(dropout_model(lora), optim=adamw(weight_decay=0.0)), num_steps)
    published = blob.svi(
        lora,
        adamw(weight_decay=0.0),
        schedule="blob",
        cycle=blob.rescaled_cycle(size, BATCH),
        kl_learning_rate=optax.linear_schedule(0.01, 0.0, num_steps),
    )
    bound = blob.svi(lora, optax.adam(schedule))

    few, few_y, held, held_y = x[:, first], y[:, first], x[:, rest], y[:, rest]
    all_x, all_y = x[:, :size], y[:, :size]
    members = [seeds(mle)(keys(i), base, all_x, all_y) for i in range(3)]
    quarter = seeds(mle)(keys(3), base, few, few_y)

    def predict(params, base, x, key, num=10):
        return blob.predict(lora, key, params, base, x, num_samples=num)

    def mean_probs(params, base, x, key, num=10):
        return jax.nn.softmax(predict(params, base, x, key, num)).mean(0)

    def probs_of(params, num, images, number=50):
        return seeds(partial(mean_probs, num=num))(params, base, images, keys(number))

    # A temperature by bisection of the derivative, in which the likelihood has one maximum.
    def temperature(params, base, x, y):
        logits = predict(params, base, x, jax.random.key(0), 0)[0]
        scales = jnp.exp(jnp.linspace(-3, 1, 200))
        losses = jax.vmap(
            lambda s: optax.softmax_cross_entropy_with_integer_labels(s * logits, y).mean()
        )(scales)
        return scales[losses.argmin()]

    scale = seeds(temperature)(quarter, base, held, held_y)

    def noise_scale(params, base, x, y):
        def loss(sigma):
            posterior = tfb.training_free(lora, params, sigma)
            return negative_log_likelihood(mean_probs(posterior, base, x, jax.random.key(1)), y)

        return tfb.search(loss)

    sigma = seeds(noise_scale)(members[0], base, all_x, all_y)
    noisy = seeds(partial(tfb.training_free, lora))(members[0], sigma)

    def held_out_loss(kl_weight):
        tempered = partial(fit(bound, num_steps), kl_weight=kl_weight)
        params = jax.vmap(tempered)(keys(4), base, few, few_y)
        probs = jax.vmap(mean_probs)(params, base, held, keys(5))
        return jax.vmap(negative_log_likelihood)(probs, held_y)

    losses = jax.jit(lambda: jax.lax.map(held_out_loss, TEMPERATURES))()
    weights = TEMPERATURES[losses.argmin(0)]
    tempered = seeds(fit(bound, num_steps))(keys(6), base, all_x, all_y, weights)
    exact = seeds(fit(bound, num_steps))(keys(6), base, all_x, all_y, jnp.ones(num_seeds))
    alternating = seeds(fit(published, num_steps))(keys(7), base, all_x, all_y)
    with_decay = seeds(decayed)(keys(0), base, all_x, all_y)
    with_dropout = seeds(dropout)(keys(0), base, all_x, all_y)

    def dropout_probs(params, base, x, key):
        def draw(key):
            each = zip(lora.layouts, jax.random.split(key, len(lora.layouts)), strict=True)
            factors = {
                name: dropped(k, params[f"{name}_loc"], params[f"{name}_B"], len(x))
                for name, k in each
            }
            return jax.nn.softmax(masked(lora, base, factors, x))

        return jax.lax.map(draw, jax.random.split(key, 10)).mean(0)

    def scaled_probs(params, base, x, scale):
        return jax.nn.softmax(scale * predict(params, base, x, jax.random.key(0), 0)[0])

    methods = {
        "MLE": lambda z: probs_of(members[0], 0, z),
        "MAP": lambda z: probs_of(with_decay, 0, z),
        "MC dropout": lambda z: seeds(dropout_probs)(with_dropout, base, z, keys(51)),
        "ensemble of 3": lambda z: sum(probs_of(m, 0, z) for m in members) / 3,
        "MLE, temperature": lambda z: seeds(scaled_probs)(members[0], base, z, scale),
        "TFB": lambda z: probs_of(noisy, 10, z),
        "BLoB, N = 0": lambda z: probs_of(alternating, 0, z),
        "BLoB, N = 5": lambda z: probs_of(alternating, 5, z),
        "BLoB, N = 10": lambda z: probs_of(alternating, 10, z),
        "ELBO": lambda z: probs_of(exact, 10, z),
        "tempered ELBO": lambda z: probs_of(tempered, 10, z),
    }
    return {
        name: scores(probs(test_x), test_y, probs(strange_x)) for name, probs in methods.items()
    }


# ---------------------------------------------------------------------------------------
# Scores and the table.


def scores(probs, labels, strange):
    confidence = [np.asarray(p.max(-1)) for p in (probs, strange)]
    is_known = np.repeat([1, 0], probs.shape[1])
    return {
        "acc %": 100 * np.asarray((probs.argmax(-1) == labels).mean(-1)),
        "NLL": np.asarray(jax.vmap(negative_log_likelihood)(probs, labels)),
        "ECE %": 100 * np.asarray(jax.vmap(expected_calibration_error)(probs, labels)),
        "debiased": 1e4
        * np.asarray(jax.vmap(partial(expected_calibration_error, debiased=True))(probs, labels)),
        "Brier": np.asarray(jax.vmap(brier_score)(probs, labels)),
        "OOD %": 100
        * np.array(
            [
                roc_auc_score(is_known, np.concatenate([known, other]))
                for known, other in zip(*confidence, strict=True)
            ]
        ),
    }


def interval(differences, num=10_000):
    """Return the mean and the central 95 % of its bootstrap distribution over seeds."""
    rows = np.random.default_rng(0).integers(0, len(differences), (num, len(differences)))
    low, high = np.quantile(differences[rows].mean(1), [0.025, 0.975])
    return f"{differences.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def print_table(shift, size, scores, before):
    columns = list(next(iter(scores.values())))
    print(
        f"\n{shift} -> upright, {size} labels, {len(scores['MLE']['NLL'])} seeds; the pretrained "
        f"network has {before[0]:.1%} of its own task right, {before[1]:.1%} of the new one"
    )
    print(f"{'':18s}" + "".join(f"{c:>10s}" for c in columns) + f"{'NLL - MLE':>26s}"
          + f"{'ECE - MLE':>26s}")  # fmt: skip
    for name, row in scores.items():
        line = f"{name:18s}" + "".join(f"{row[c].mean():10.3f}" for c in columns)
        for column in ("NLL", "ECE %") if name != "MLE" else ():
            line += f"{interval(row[column] - scores['MLE'][column]):>26s}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
