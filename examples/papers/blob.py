"""BLoB's claim on a CPU: a small transformer, a few labels of a new task, ten seeds.

Wang et al., 2024, arXiv:2406.11675, say that a posterior over the low-rank update, learnt in
fine-tuning, gives better calibrated predictions than maximum likelihood (MLE), MAP, MC dropout and
ensembles, at about their accuracy. The setting here is an analogy: a transformer of images, not of
language, pretrained on 600 of scikit-learn's digits seen one way (transposed, mirrored, in
negative), and adapted to upright ones with few labels. Low-rank updates of rank 8 of queries,
values and the head. Ten seeds draw the split, the pretraining and the fit; differences are paired
by seed, with Student's interval. Other posteriors are in `blob_posteriors.py`.

    python examples/papers/blob.py [--fast]

All methods have the same steps, batches and learning rate: of three the one with which MLE is most
accurate on a quarter of the labels that it has not seen; these accuracies are printed. Temperatures
are chosen by that quarter too, for each seed, and never by test data.

- MLE; MAP: weight decay; MC dropout: 10 masks of the update's input, one for all tokens of an
  image; ensemble: of three MLEs.
- MLE, temperature: one temperature for the logits, fitted on a quarter of the labels that a second
  MLE did not see. MLE, slower: the learning rate of the three with which that quarter is predicted
  best, a kind of early stopping.
- BLoB, N = 0, 10, 32: the published rule, and the number of draws in prediction.

OOD is the area under the ROC curve by which the largest probability tells test images from the same
with their pixels shuffled. Expected calibration error with 15 bins: at a few hundred test images a
perfect classifier has 3 to 5 %, so the debiased squared error is printed too.
"""

import time

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from _adapters import (
    RATE,
    adapter,
    averaged,
    difference,
    draw,
    mean_nll,
    mean_probs,
    over_tasks,
    per_seed,
    point,
    published,
    scaled_probs,
    temperature,
)
from _evidence import above, below, over_seeds
from _papers import BLOB
from _results import panels, parsed, parser, write

from probbp.models.lora import Factors

DECAY, DROPOUT = 1e-2, 0.1
RATES = (0.002, 0.005, 0.01)
OURS = "BLoB, N = 10"
# What to compare with, and its cost.
RIVALS = {
    "MAP": "one fit",
    "MC dropout": "one fit, ten draws",
    "MLE, temperature": "two fits",
    "ensemble of 3": "three fits",
}


def main():
    arguments = parsed(parser(__doc__))
    fast = arguments.fast
    num_seeds, num_steps = (2, 20) if fast else (10, 500)
    start = time.perf_counter(), time.process_time()
    found = over_tasks(comparison(num_steps), num_seeds, fast)
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    print(f"\n{wall:.0f} seconds, {cpu:.0f} of CPUs, JAX {jax.__version__}")

    sizes = sorted({size for _, size in found})
    few = sizes[0]

    def strongest(names, size):
        return min(names, key=lambda name: averaged(found, size, name, "NLL").mean())

    rival = strongest(list(RIVALS)[:3], few)
    figure, axes = panels(3)
    draw(figure, axes, found, [OURS, *RIVALS])
    write(
        arguments,
        paper=BLOB,
        claim="A posterior over the low-rank update, learnt in fine-tuning, gives better "
        "calibrated predictions than maximum likelihood and its usual remedies, at about the same "
        "accuracy, and tells foreign inputs better.",
        setting="A transformer pretrained on 600 digits seen another way, adapted to upright ones, "
        f"rank 8, {num_steps} steps; {num_seeds} seeds, mean over three tasks (one with 640 "
        f"labels). The figure: {few} labels, ten draws.",
        ours=over_seeds("negative log likelihood, BLoB", averaged(found, few, OURS, "NLL")),
        baseline=over_seeds(f"{rival}, {RIVALS[rival]}", averaged(found, few, rival, "NLL")),
        checks=[
            check
            for size in sizes
            for check in (
                above(
                    f"as accurate as maximum likelihood, within a point, {size} labels",
                    difference(found, size, OURS, "MLE", "acc %"),
                    -1.0,
                ),
                below(
                    f"better calibrated than maximum likelihood, {size} labels",
                    difference(found, size, OURS, "MLE", "ECE %"),
                ),
                below(
                    f"a better likelihood than maximum likelihood, {size} labels",
                    difference(found, size, OURS, "MLE", "NLL"),
                ),
                below(
                    f"a better likelihood than the best alternative, {size} labels",
                    difference(found, size, OURS, strongest(RIVALS, size), "NLL"),
                ),
                above(
                    f"foreign images told better than by maximum likelihood, {size} labels",
                    difference(found, size, OURS, "MLE", "OOD %"),
                ),
            )
        ],
        figure=figure,
        caption="Differences to maximum likelihood on test images, paired by seed, by the number "
        "of labels: mean over the tasks, 95 % intervals over seeds. Lower is better, but for "
        "accuracy.",
    )


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


def dropout_probs(lora, params, base, x, key):
    def draw(key):
        each = zip(lora.layouts, jax.random.split(key, len(lora.layouts)), strict=True)
        factors = {
            name: dropped(k, params[f"{name}_loc"], params[f"{name}_B"], len(x)) for name, k in each
        }
        return jax.nn.softmax(masked(lora, base, factors, x))

    return jax.lax.map(draw, jax.random.split(key, 10)).mean(0)


def comparison(num_steps):
    """Return a function of a task: how each method predicts, and notes."""
    lora = adapter()
    rule = published(lora, num_steps)
    mle = point(lora, lora.model, num_steps)
    dropout = point(lora, dropout_model(lora), num_steps)
    predict = {num: per_seed(mean_probs, lora, num=num) for num in (0, 10, 32)}
    predict_dropout, predict_scaled = per_seed(dropout_probs, lora), per_seed(scaled_probs, lora)
    find_temperature = per_seed(temperature, lora)
    nll_of = jax.jit(jax.vmap(mean_nll))

    def compare(task):
        base, (held_x, held_y, is_there) = task.base, task.held
        slower = [task.fitted(mle, 3, task.num_few, rate=rate, decay=0.0) for rate in RATES]
        probs = [predict[0](params, base, held_x, task.keys(5)) for params in slower]
        accuracies = [((p.argmax(-1) == held_y) * is_there).sum() / is_there.sum() for p in probs]
        losses = jnp.stack([nll_of(p, held_y, is_there) for p in probs])
        rate = jnp.array(RATES)[losses.argmin(0)]
        members = [task.fitted(mle, i, rate=RATE, decay=0.0) for i in range(3)]
        scale = find_temperature(slower[RATES.index(RATE)], base, *task.held)
        masks = task.fitted(dropout, 0, rate=RATE, decay=0.0)
        alternating = task.fitted(rule(task.size), 7, rate=RATE)

        def probs_of(params, num):
            return lambda x: predict[num](params, base, x, task.keys(50))

        methods = {
            "MLE": probs_of(members[0], 0),
            "MLE, slower": probs_of(task.fitted(mle, 0, rate=rate, decay=0.0), 0),
            "MAP": probs_of(task.fitted(mle, 0, rate=RATE, decay=DECAY), 0),
            "MC dropout": lambda x: predict_dropout(masks, base, x, task.keys(51)),
            "ensemble of 3": lambda x: sum(probs_of(m, 0)(x) for m in members) / 3,
            "MLE, temperature": lambda x: predict_scaled(members[0], base, x, scale),
            **{f"BLoB, N = {num}": probs_of(alternating, num) for num in predict},
        }
        notes = "held-out accuracy of MLE at the rates " + ", ".join(
            f"{r}: {a:.1%}" for r, a in zip(RATES, accuracies, strict=True)
        )
        return methods, notes

    return compare


if __name__ == "__main__":
    main()
