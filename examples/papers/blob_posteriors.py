"""BLoB beside other ways to a posterior of a low-rank update: after the fit, and by other rules.

Wang et al., 2024, arXiv:2406.11675, learn mean and spread together while they fine-tune, where
others make a posterior of a network that is trained already, and by a rule of their own, where
plain variational inference climbs the ELBO. The setting is the first of `blob.py`; all predict with
32 draws.

    python examples/papers/blob_posteriors.py [--fast]

The methods, all with the same steps and batches, and but for IVON with the same learning rate.
Weights and temperatures are chosen by a quarter of the labels, for each seed, and never by test
data. IVON's own learning rate and its first second derivative are those of a few that did well in a
trial on two tasks: there its figures are a little flattered.

- MLE; MLE, temperature: one temperature for the logits, fitted on a quarter of the labels that a
  second MLE did not see.
- TFB (arXiv:2412.05723): noise around the MLE, the largest that leaves the loss on its own labels,
  the first 160 of them, within 0.3 %.
- BLoB: the published rule.
- ELBO: the exact ELBO. Tempered ELBO, the default here: the divergence times the one of four
  weights with which a fit to three quarters of the labels predicts the last quarter best, and a
  second fit to all of them.
- IVON (arXiv:2402.17641): a posterior of both factors, its weight chosen likewise.
"""

import time

import jax
import jax.numpy as jnp
import optax
from _adapters import (
    NUM_HELD,
    RATE,
    adapter,
    averaged,
    by_svi,
    difference,
    draw,
    fitting,
    mean_nll,
    mean_probs,
    over_tasks,
    per_seed,
    point,
    published,
    scaled_probs,
    schedule,
    temperature,
)
from _evidence import below, over_seeds
from _papers import BLOB
from _results import panels, parsed, parser, write

from probbp.models import blob, ivon, tfb

SHIFT = "transposed"
RATE_OF_IVON = 0.1
WEIGHTS = (0.003, 0.03, 0.1, 0.3)
AFTERWARDS = ("TFB", "MLE, temperature")
ALONG = ("ELBO", "tempered ELBO", "IVON")
# Those of about equal cost; a weight takes five fits.
CHEAP = {"TFB": "one fit", "MLE, temperature": "two fits", "ELBO": "one fit"}


def main():
    arguments = parsed(parser(__doc__))
    fast = arguments.fast
    num_seeds, num_steps, num_draws = (2, 20, 4) if fast else (10, 500, 32)
    weights = WEIGHTS[:2] if fast else WEIGHTS
    start = time.perf_counter(), time.process_time()
    found = over_tasks(comparison(num_steps, num_draws, weights), num_seeds, fast, [SHIFT])
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    print(f"\n{wall:.0f} seconds, {cpu:.0f} of CPUs, JAX {jax.__version__}")

    sizes = sorted({size for _, size in found})
    few = sizes[0]
    rival = min(CHEAP, key=lambda name: averaged(found, few, name, "NLL").mean())
    figure, axes = panels(3)
    draw(figure, axes, found, ["BLoB", *AFTERWARDS, *ALONG])
    write(
        arguments,
        paper=BLOB,
        claim="Mean and spread learnt together in fine-tuning make a better posterior than one "
        "made afterwards, and the published rule a better one than plain variational inference.",
        setting=f"A transformer pretrained on 600 digits {SHIFT}, adapted to upright ones, "
        f"rank 8, {num_steps} steps, {num_draws} draws; {num_seeds} seeds. "
        f"The figure: {few} labels.",
        ours=over_seeds("negative log likelihood, BLoB", averaged(found, few, "BLoB", "NLL")),
        baseline=over_seeds(f"{rival}, {CHEAP[rival]}", averaged(found, few, rival, "NLL")),
        checks=[
            below(
                f"a better likelihood than {name}, {words}, {size} labels",
                difference(found, size, "BLoB", name, "NLL"),
            )
            for names, words in ((AFTERWARDS, "made afterwards"), (ALONG, "another rule"))
            for name in names
            for size in sizes
        ],
        figure=figure,
        caption="Differences to maximum likelihood on test images, paired by seed, by the number "
        "of labels, 95 % intervals over seeds. Lower is better, but for accuracy.",
    )


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


def noise_scale(lora, params, base, x, y, is_there):
    """Return the scale of TFB's noise, on labels of the fit."""

    def loss(sigma):
        posterior = tfb.training_free(lora, params, sigma)
        probs = mean_probs(lora, posterior, base, x, jax.random.key(1), num=10)
        return mean_nll(probs, y, is_there)

    return tfb.search(loss)


def comparison(num_steps, num_draws, weights):
    """Return a function of a task: how each method predicts, and notes."""
    lora = adapter()
    rule = published(lora, num_steps)

    def bound(knobs):
        return blob.svi(lora, optax.adam(schedule(knobs["rate"], num_steps)))

    mle = point(lora, lora.model, num_steps)
    elbo = fitting(by_svi(bound), num_steps)
    newton = fitting(by_ivon(lora, num_steps), num_steps)
    predict = {num: per_seed(mean_probs, lora, num=num) for num in (0, num_draws)}
    predict_scaled = per_seed(scaled_probs, lora)
    find_temperature, find_noise = per_seed(temperature, lora), per_seed(noise_scale, lora)
    nll_of = jax.jit(jax.vmap(mean_nll))
    noisy = per_seed(tfb.training_free, lora)

    def compare(task):
        base, (held_x, held_y, is_there) = task.base, task.held

        def held_nll(params):
            return nll_of(predict[num_draws](params, base, held_x, task.keys(5)), held_y, is_there)

        def tuned(method, number, **knobs):
            """Fit with the weight that predicts the last quarter best."""
            fits = [task.fitted(method, number, task.num_few, weight=w, **knobs) for w in weights]
            losses = jnp.stack([held_nll(params) for params in fits])
            chosen = jnp.array(weights)[losses.argmin(0)]
            return task.fitted(method, number, weight=chosen, **knobs), chosen

        fitted = task.fitted(mle, 0, rate=RATE, decay=0.0)
        second = task.fitted(mle, 3, task.num_few, rate=RATE, decay=0.0)
        scale = find_temperature(second, base, *task.held)
        own = task.some(jnp.arange(NUM_HELD), task.size)
        tempered, weight = tuned(elbo, 6, rate=RATE)
        both, weight_of_ivon = tuned(newton, 8)

        def probs_of(params, num=num_draws):
            return lambda x: predict[num](params, base, x, task.keys(50))

        methods = {
            "MLE": probs_of(fitted, 0),
            "MLE, temperature": lambda x: predict_scaled(fitted, base, x, scale),
            "TFB": probs_of(noisy(fitted, find_noise(fitted, base, *own))),
            "BLoB": probs_of(task.fitted(rule(task.size), 7, rate=RATE)),
            "ELBO": probs_of(task.fitted(elbo, 6, rate=RATE)),
            "tempered ELBO": probs_of(tempered),
            "IVON": probs_of(both),
        }
        means = [jnp.exp(jnp.log(w).mean()) for w in (weight, weight_of_ivon)]
        return methods, f"geometric mean of the weights: ELBO {means[0]:.3f}, IVON {means[1]:.3f}"

    return compare


if __name__ == "__main__":
    main()
