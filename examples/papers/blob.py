"""BLoB's claims on a CPU: a small transformer, a few labels of a new task, ten seeds.

Wang et al., 2024, arXiv:2406.11675, say that a posterior over the low-rank update, learnt in
fine-tuning, gives better calibrated predictions than maximum likelihood (MLE), MAP, MC dropout and
ensembles, at about their accuracy. The setting here is an analogy: a transformer of images, not of
language, pretrained on 600 of scikit-learn's digits seen one way (transposed, mirrored, in
negative), and adapted to upright ones with few labels. Low-rank updates of rank 8 of queries,
values and the head. Ten seeds draw the split, the pretraining and the fit; differences to MLE are
paired by seed, with a bootstrap interval over seeds.

    python examples/papers/blob.py [--fast]

The methods, all with the same steps and batches, and but for IVON with the same learning rate: of
three the one with which MLE is most accurate on a quarter of the labels that it has not seen; these
accuracies are printed. Weights and temperatures are chosen by that quarter too, for each seed, and
never by test data. IVON's own learning rate and its first second derivative are those of a few
that did well in a trial on two of the tasks: there its figures are a little flattered.

- MLE; MAP: weight decay; MC dropout: 10 masks of the update's input, one for all tokens of an
  image; ensemble: of three MLEs.
- MLE, temperature: one temperature for the logits, fitted on a quarter of the labels that a second
  MLE did not see. MLE, slower: the learning rate of the three with which that quarter is predicted
  best, a kind of early stopping.
- TFB (arXiv:2412.05723): noise around the MLE, the largest that leaves the loss on its own labels,
  the first 160 of them, within 0.3 %.
- BLoB, N = 0, 5, 10, 32: the published rule, and the number of draws in prediction.
- ELBO: the exact ELBO, 10 draws. Tempered ELBO, the default here: the divergence times the one of
  four weights with which a fit to three quarters of the labels predicts the last quarter best, a
  second fit to all of them, and 32 draws.
- IVON (arXiv:2402.17641): a posterior of both factors, its weight chosen likewise; 32 draws.

OOD is the area under the ROC curve by which the largest probability tells test images from the same
with their pixels shuffled. Expected calibration error with 15 bins: at a few hundred test images a
perfect classifier has 3 to 5 %, so the debiased squared error is printed too.
"""

import argparse
import time
from functools import cache, partial

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
from probbp.models import blob, ivon, tfb, transformer
from probbp.models.lora import Factors

SHIFTS = {
    "transposed": lambda images: images.transpose(0, 2, 1),
    "mirrored": lambda images: images[:, :, ::-1],
    "negative": lambda images: 1 - images,
}
# Numbers of labels; the largest on one task only, to save time.
SIZES = {"transposed": (80, 320, 640), "mirrored": (80, 320), "negative": (80, 320)}
MOST = max(max(sizes) for sizes in SIZES.values())
NUM_SEEDS, NUM_PRETRAINING, NUM_HELD = 10, 600, MOST // 4
BATCH, DECAY, DROPOUT = 16, 1e-2, 0.1
RATES, RATE, RATE_OF_IVON = (0.002, 0.005, 0.01), 0.01, 0.1
WEIGHTS = (0.003, 0.03, 0.1, 0.3)
init_small = partial(
    transformer.init, num_classes=10, max_length=16, num_features=4, width=32, hidden_width=64
)
apply = partial(transformer.apply, num_heads=4)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a smoke test; its figures are rough")
    fast = parser.parse_args().fast
    num_seeds, num_steps = (2, 60) if fast else (NUM_SEEDS, 500)
    start = time.perf_counter(), time.process_time()
    compare = comparison(num_seeds, num_steps)
    with tqdm(total=sum(map(len, SIZES.values()))) as bar:
        for shift, view in SHIFTS.items():
            bar.set_description(f"{shift}: pretraining")
            data, base, before = pretrained(view, num_seeds, 40 if fast else 400)
            for size in SIZES[shift]:
                bar.set_description(f"{shift}, {size} labels")
                scores, notes = compare(data, base, size)
                bar.clear()
                print_table(shift, size, scores, before, notes)
                bar.update()
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    print(f"\n{wall:.0f} seconds, {cpu:.0f} of CPUs, JAX {jax.__version__}")


# ---------------------------------------------------------------------------------------
# Data and pretraining, every array with a first axis of seeds.


@cache
def pretraining(num_steps):
    """Return a compiled function of keys, images, labels and the rows to learn from."""

    def pretrain(key, seen, labels, rows):
        key_init, key_steps = jax.random.split(key)
        params = init_small(key_init)
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

    return jax.jit(jax.vmap(pretrain, (0, None, None, 0)))


def pretrained(view, num_seeds, num_steps):
    """Return the target task's data, a network that knows the other view, and its accuracies."""
    digits = load_digits()
    images = digits.images / 16
    rows = np.stack([np.random.default_rng(s).permutation(len(images)) for s in range(num_seeds)])
    source, target = rows[:, :NUM_PRETRAINING], rows[:, NUM_PRETRAINING:]
    seen = transformer.patches(jnp.asarray(view(images), jnp.float32))
    upright = transformer.patches(jnp.asarray(images, jnp.float32))
    labels = jnp.asarray(digits.target)
    keys = jax.random.split(jax.random.key(0), num_seeds)
    base = pretraining(num_steps)(keys, seen, labels, jnp.asarray(source))
    data = upright[target], labels[target]

    def accuracy(images):
        logits = jax.jit(jax.vmap(apply))(base, images)
        return float((logits.argmax(-1) == data[1]).mean())

    return data, base, (accuracy(seen[target]), accuracy(data[0]))


# ---------------------------------------------------------------------------------------
# Fits: `(key, base, x, y, rows, num, knobs) -> parameters`, for one seed, of the labels in the
# first `num` of `rows`. The sizes of data are arguments, and so a fit is compiled once for all.


def fit(method, num_steps):
    def run(key, base, x, y, rows, num, knobs):
        key_init, key_steps = jax.random.split(key)
        state, update, result = method(key_init, base, x[:BATCH], y[:BATCH], num, knobs)

        def step(state, key):
            key_rows, key_update = jax.random.split(key)
            batch = rows[jax.random.randint(key_rows, (BATCH,), 0, num)]
            return update(state, key_update, x[batch], y[batch]), None

        return result(jax.lax.scan(step, state, jax.random.split(key_steps, num_steps))[0])

    return run


def schedule(rate, num_steps):
    """Return a learning rate that rises linearly, and falls as a cosine."""
    rise = num_steps // 16

    def at(step):
        fall = jnp.clip((step - rise) / (num_steps - rise), 0, 1)
        return rate * jnp.minimum(step / rise, 1) * (1 + jnp.cos(jnp.pi * fall)) / 2

    return at


def by_svi(make_svi, **fixed):
    """Return a method of SVI; what is in the knobs beside the optimiser's goes to the model."""

    def method(key, base, x, y, num, knobs):
        svi = make_svi(knobs)
        options = {"num_data": num, "kl_weight": knobs.get("weight", 1.0)} | fixed
        state = svi.init(key, base, x, y=y, **options)

        def update(state, _, x, y):
            return svi.update(state, base, x, y=y, **options)[0]

        return state, update, svi.get_params

    return method


def by_ivon(lora, num_steps):
    """Return IVON as a method. Its memory of the second derivative is 200 steps."""
    loss = ivon.mean_loss(lora)

    def method(key, base, x, y, num, knobs):
        optimiser = ivon.ivon(
            schedule(RATE_OF_IVON, num_steps),
            num_data=num,
            kl_weight=knobs["weight"],
            hessian_init=1.0,
            decay=(0.9, 0.995),
        )
        factors = ivon.init(lora, key)

        def update(carry, key, x, y):
            factors, state = carry
            draw = optimiser.sample(key, factors, state)
            grads = jax.grad(loss)(draw, base, x, y=y)
            updates, state = optimiser.update(grads, state, factors, draw=draw)
            return optax.apply_updates(factors, updates), state

        def result(carry):
            factors, state = carry
            return ivon.posterior(lora, factors, optimiser.std(state))

        return (factors, optimiser.init(factors)), update, result

    return method


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


# ---------------------------------------------------------------------------------------
# Predictions of one seed, and the comparison of all methods.


def adapter():
    params = init_small(jax.random.key(0))
    example = (jax.ShapeDtypeStruct((BATCH, 16, 4), jnp.float32),)
    target = r"(query|value|head)\.kernel"
    return blob.bayesian_lora(apply, params, target=target, example=example)


def mean_probs(lora, params, base, x, key, *, num):
    logits = blob.predict(lora, key, params, base, x, num_samples=num)
    return jax.nn.softmax(logits).mean(0)


def dropout_probs(lora, params, base, x, key):
    def draw(key):
        each = zip(lora.layouts, jax.random.split(key, len(lora.layouts)), strict=True)
        factors = {
            name: dropped(k, params[f"{name}_loc"], params[f"{name}_B"], len(x)) for name, k in each
        }
        return jax.nn.softmax(masked(lora, base, factors, x))

    return jax.lax.map(draw, jax.random.split(key, 10)).mean(0)


def scaled_probs(lora, params, base, x, scale):
    logits = blob.predict(lora, jax.random.key(0), params, base, x, num_samples=0)[0]
    return jax.nn.softmax(scale * logits)


def mean_nll(probs, y, is_there):
    picked = jnp.take_along_axis(probs, y[:, None], 1)[:, 0]
    return -jnp.sum(is_there * jnp.log(picked)) / is_there.sum()


def temperature(lora, params, base, x, y, is_there):
    """Return the best factor of the logits among 200."""

    def loss(scale):
        return mean_nll(scaled_probs(lora, params, base, x, scale), y, is_there)

    scales = jnp.exp(jnp.linspace(-3, 1, 200))
    return scales[jax.lax.map(loss, scales).argmin()]


def noise_scale(lora, params, base, x, y, is_there):
    """Return the scale of TFB's noise, on labels of the fit."""

    def loss(sigma):
        posterior = tfb.training_free(lora, params, sigma)
        probs = mean_probs(lora, posterior, base, x, jax.random.key(1), num=10)
        return mean_nll(probs, y, is_there)

    return tfb.search(loss)


def comparison(num_seeds, num_steps):
    """Return `(data, base, size) -> method -> scores`, each program compiled once for all calls."""
    lora = adapter()

    def adamw(knobs):
        return optax.adamw(schedule(knobs["rate"], num_steps), weight_decay=knobs["decay"])

    def point(model):
        def make_svi(knobs):
            return SVI(model, point_guide(lora), adamw(knobs), TraceMeanField_ELBO())

        return by_svi(make_svi, noise="shared")

    def bound(knobs):
        return blob.svi(lora, optax.adam(schedule(knobs["rate"], num_steps)))

    @cache
    def published(size):
        def make_svi(knobs):
            cycle = blob.rescaled_cycle(size, BATCH)
            fall = optax.linear_schedule(0.01, 0.0, num_steps)
            optimiser = adamw(knobs | {"decay": 0.0})
            options = {"schedule": "blob", "cycle": cycle, "kl_learning_rate": fall}
            return blob.svi(lora, optimiser, **options)

        return fitting(by_svi(make_svi))

    def fitting(method):
        axes = (0, 0, 0, 0, None, None, 0)
        return jax.jit(jax.vmap(fit(method, num_steps), axes))

    def per_seed(fun, **options):
        return jax.jit(jax.vmap(partial(fun, lora, **options)))

    mle, dropout = fitting(point(lora.model)), fitting(point(dropout_model(lora)))
    elbo, newton = fitting(by_svi(bound)), fitting(by_ivon(lora, num_steps))
    predict = {num: per_seed(mean_probs, num=num) for num in (0, 10, 32)}
    predict_dropout, predict_scaled = per_seed(dropout_probs), per_seed(scaled_probs)
    find_temperature, find_noise = per_seed(temperature), per_seed(noise_scale)
    nll_of = jax.jit(jax.vmap(mean_nll))
    quiet = jax.jit(jax.vmap(partial(tfb.training_free, lora)))

    def keys(number):
        return jax.random.split(jax.random.key(number), num_seeds)

    def knobs(**values):
        return {k: jnp.broadcast_to(jnp.float32(v), (num_seeds,)) for k, v in values.items()}

    def compare(data, base, size):
        x, y = data
        test_x, test_y = x[:, MOST:], y[:, MOST:]
        pixels = jax.random.permutation(jax.random.key(9), 64)
        strange = test_x[:, :NUM_HELD].reshape(num_seeds, NUM_HELD, 64)[..., pixels]
        strange = strange.reshape(num_seeds, NUM_HELD, 16, 4)
        rows, num_few = jnp.arange(MOST), size - size // 4
        # The last quarter, and labels of the fit, filled up to one size for all.
        last = jnp.minimum(num_few + jnp.arange(NUM_HELD), size - 1)
        first = jnp.minimum(jnp.arange(NUM_HELD), size - 1)
        is_there = jnp.broadcast_to(jnp.arange(NUM_HELD) < size // 4, (num_seeds, NUM_HELD))
        held = x[:, last], y[:, last], is_there
        anchors = (
            x[:, first],
            y[:, first],
            jnp.broadcast_to(jnp.arange(NUM_HELD) < size, is_there.shape),
        )

        def fitted(method, number, num=size, **values):
            return method(keys(number), base, x, y, rows, num, knobs(**values))

        def held_nll(params, num):
            return nll_of(predict[num](params, base, held[0], keys(5)), *held[1:])

        def tuned(method, number, **values):
            """Fit with the weight that predicts the last quarter best."""
            losses = jnp.stack(
                [held_nll(fitted(method, number, num_few, weight=w, **values), 10) for w in WEIGHTS]
            )
            chosen = jnp.array(WEIGHTS)[losses.argmin(0)]
            return fitted(method, number, weight=chosen, **values), chosen

        slower = [fitted(mle, 3, num_few, rate=rate, decay=0.0) for rate in RATES]
        accuracies = [
            (held[2] * (predict[0](p, base, held[0], keys(5)).argmax(-1) == held[1])).sum()
            / held[2].sum()
            for p in slower
        ]
        losses = jnp.stack([held_nll(p, 0) for p in slower])
        rate = jnp.array(RATES)[losses.argmin(0)]
        members = [fitted(mle, i, rate=RATE, decay=0.0) for i in range(3)]
        scale = find_temperature(slower[RATES.index(RATE)], base, *held)
        noisy = quiet(members[0], find_noise(members[0], base, *anchors))
        alternating = fitted(published(size), 7, rate=RATE)
        exact = fitted(elbo, 6, rate=RATE)
        tempered, weight = tuned(elbo, 6, rate=RATE)
        both, weight_of_ivon = tuned(newton, 8)

        def probs_of(params, num):
            return lambda x: predict[num](params, base, x, keys(50))

        methods = {
            "MLE": probs_of(members[0], 0),
            "MLE, slower": probs_of(fitted(mle, 0, rate=rate, decay=0.0), 0),
            "MAP": probs_of(fitted(mle, 0, rate=RATE, decay=DECAY), 0),
            "MC dropout": partial(
                lambda params, x: predict_dropout(params, base, x, keys(51)),
                fitted(dropout, 0, rate=RATE, decay=0.0),
            ),
            "ensemble of 3": lambda x: sum(probs_of(m, 0)(x) for m in members) / 3,
            "MLE, temperature": lambda x: predict_scaled(members[0], base, x, scale),
            "TFB": probs_of(noisy, 10),
            "BLoB, N = 0": probs_of(alternating, 0),
            "BLoB, N = 5": probs_of(alternating, 5),
            "BLoB, N = 10": probs_of(alternating, 10),
            "BLoB, N = 32": probs_of(alternating, 32),
            "ELBO": probs_of(exact, 10),
            "tempered ELBO": probs_of(tempered, 32),
            "IVON": probs_of(both, 32),
        }
        notes = (
            "held-out accuracy of MLE at the rates "
            + ", ".join(f"{r}: {a:.1%}" for r, a in zip(RATES, accuracies, strict=True))
            + f"; geometric mean of the weights: ELBO {jnp.exp(jnp.log(weight).mean()):.3f}, "
            f"IVON {jnp.exp(jnp.log(weight_of_ivon).mean()):.3f}"
        )
        return {
            name: scores(probs(test_x), test_y, probs(strange)) for name, probs in methods.items()
        }, notes

    return compare


# ---------------------------------------------------------------------------------------
# Scores and the table.


def scores(probs, labels, strange):
    confidence = [np.asarray(p.max(-1)) for p in (probs[:, :NUM_HELD], strange)]
    is_known = np.repeat([1, 0], NUM_HELD)
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


def print_table(shift, size, scores, before, notes):
    columns = list(next(iter(scores.values())))
    compared = ("acc %", "NLL", "ECE %")
    print(
        f"\n{shift} -> upright, {size} labels, {len(scores['MLE']['NLL'])} seeds; the pretrained "
        f"network has {before[0]:.1%} of its own task right, {before[1]:.1%} of the new one\n"
        f"{notes}"
    )
    header = "".join(f"{c:>10s}" for c in columns)
    print(f"{'':18s}" + header + "".join(f"{c + ' - MLE':>26s}" for c in compared))
    for name, row in scores.items():
        line = f"{name:18s}" + "".join(f"{row[c].mean():10.3f}" for c in columns)
        for column in compared if name != "MLE" else ():
            line += f"{interval(row[column] - scores['MLE'][column]):>26s}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
