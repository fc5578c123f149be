"""Posteriors over the weights of a spiking network, by gradients of rates.

Yu et al., 2024, arXiv:2410.11488, train spiking networks by rates (`rate.py`). Such a gradient
serves variational inference as well. Here it fits a mean-field posterior over the weights of a
dense network of 64-128-10 by NumPyro's SVI: to 200 of scikit-learn's digits, so that there is
something to be uncertain about, at temperature 1 and at the one of four with which a fit to three
quarters of the labels predicts the last quarter best. Predictions average 32 draws.

Beside it, by the same gradients: the point estimate with weight decay, that with its logits divided
by a number found on the same quarter, and an ensemble of three. NLL and expected calibration error
(ECE, 15 bins) on test images; mean and standard error over seeds, and differences paired by seed.

    python examples/papers/rate_posteriors.py [--fast]
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _evidence import above, below, over_seeds
from _papers import RATE
from _results import panels, parsed, parser, write
from _spiking import cross_entropy, digits, fit_with, mean_and_error, train
from flax import nnx
from numpyro.infer import SVI, Predictive, TraceMeanField_ELBO
from tqdm import tqdm

from probbp.diagnostics import expected_calibration_error, negative_log_likelihood
from probbp.models import snn
from probbp.ops import rate

SIZES = (64, 128, 10)
COLUMNS = ("accuracy", "NLL", "ECE %")
POINT, SCALED, ENSEMBLE = "point", "point, temperature", "ensemble of 3"
RIVALS = {SCALED: "two fits", ENSEMBLE: "three fits"}


def main():
    arguments = parsed(parser(__doc__))
    fast = arguments.fast
    start = time.perf_counter()
    seeds = range(2 if fast else 5)
    epochs = 10 if fast else 150
    temperatures = (0.1,) if fast else (0.3, 0.1, 0.03, 0.01)

    print(f"{'200 labels':32s}{'accuracy':>16s}{'NLL':>18s}{'ECE %':>16s}")
    by_seed = [bayes(seed, epochs, temperatures) for seed in tqdm(seeds, leave=False)]
    found = {arm: np.array([results[arm] for results in by_seed]) for arm in by_seed[0]}
    for arm, rows in found.items():
        report(arm, rows)
        if arm != "posterior":
            report("  posterior - this", found["posterior"] - rows)
    print(f"\n{time.perf_counter() - start:.0f} s")

    def less(arm, column, unit=""):
        i = COLUMNS.index(column)
        difference = found["posterior"][:, i] - found[arm][:, i]
        return over_seeds(f"{column}, posterior less {arm}, paired", difference, unit)

    def nll(arm):
        return found[arm][:, COLUMNS.index("NLL")]

    rival = min(RIVALS, key=lambda arm: nll(arm).mean())
    figure, axes = panels(2)
    draw(axes, found)
    write(
        arguments,
        paper=RATE,
        claim="Gradients by rates serve variational inference, too: a posterior over a spiking "
        "network's weights predicts better than its point estimate.",
        setting=f"200 digits, a network 64-128-10, 8 steps, {len(seeds)} seeds; a mean-field "
        "posterior at a temperature chosen on a quarter of the labels, 32 draws.",
        ours=over_seeds("negative log likelihood, posterior", nll("posterior")),
        baseline=over_seeds(f"{rival}, {RIVALS[rival]}", nll(rival)),
        checks=[
            above("as accurate as the point estimate, within a point", less(POINT, "accuracy"), -1),
            *(
                below(f"a better likelihood than {arm}", less(arm, "NLL"))
                for arm in (POINT, SCALED, ENSEMBLE, "posterior, T = 1")
            ),
            below("better calibrated than the point estimate", less(POINT, "ECE %", "points")),
            below("and than with a temperature", less(SCALED, "ECE %", "points")),
        ],
        figure=figure,
        caption="Test images, means and 95 % intervals over seeds. Lower is better.",
    )


def draw(axes, found):
    for ax, column in zip(axes, COLUMNS[1:], strict=True):
        values = [rows[:, COLUMNS.index(column)] for rows in found.values()]
        figures = [over_seeds("", value) for value in values]
        means = np.array([figure.mean for figure in figures])
        ends = means - [figure.low for figure in figures]
        ax.errorbar(means, range(len(means)), xerr=ends, fmt="o", capsize=3)
        ax.set_yticks(range(len(means)), list(found), fontsize=8)
        ax.set(xlabel="calibration error [%]" if "ECE" in column else "negative log likelihood")
        ax.invert_yaxis()


# ---------------------------------------------------------------------------------------
# Fits and predictions.


def run(network, x):
    return rate.simulate(network, rate.constant(x), 8)


POINT_ARM = (
    lambda seed: snn.MLP(SIZES, rngs=nnx.Rngs(seed)),
    run,
    fit_with(run, weight_decay=1e-2),
)


def bayes(seed, epochs, temperatures):
    """Return (accuracy, NLL, ECE) on test images for each way to predict."""
    x, y, x_test, y_test = digits(seed)
    x, y = x[:200], y[:200]
    members = [train(POINT_ARM, 100 * seed + member, x, y, epochs) for member in range(3)]
    log_probs = [jax.nn.log_softmax(run(member, x_test)) for member in members]
    held_out = train(POINT_ARM, 100 * seed, x[:150], y[:150], epochs)
    held_out_logits = run(held_out, x[150:])
    divisors = jnp.geomspace(0.2, 5, 60)
    losses = jax.vmap(lambda t: cross_entropy(held_out_logits / t, y[150:]).mean())(divisors)
    best = divisors[jnp.argmin(losses)]

    rng_key = jax.random.key(seed)
    quarter = {}
    for temperature in temperatures:
        held_out = posterior(rng_key, x[:150], y[:150], x[150:], temperature, 10 * epochs)
        quarter[temperature] = negative_log_likelihood(jnp.exp(held_out), y[150:])
    coldest = min(quarter, key=quarter.__getitem__)
    predicted = {
        name: posterior(rng_key, x, y, x_test, temperature, 10 * epochs)
        for name, temperature in {"posterior": coldest, "posterior, T = 1": 1.0}.items()
    }
    return {
        **{name: scores(log_probs, y_test) for name, log_probs in predicted.items()},
        POINT: scores(log_probs[0], y_test),
        SCALED: scores(jax.nn.log_softmax(log_probs[0] / best), y_test),
        ENSEMBLE: scores(jax.nn.logsumexp(jnp.stack(log_probs), axis=0) - jnp.log(3), y_test),
    }


def posterior(rng_key, x, y, x_new, temperature, num_steps):
    """Return the log probabilities of new images, by 32 draws of the weights."""
    network = snn.MLP(SIZES, rngs=nnx.Rngs(0))
    model = partial(snn.model, network=network, temperature=temperature)
    guide = snn.guide(model, network)
    optimiser = optax.adam(optax.cosine_decay_schedule(1e-2, num_steps))
    svi = SVI(model, guide, optimiser, TraceMeanField_ELBO())
    result = svi.run(rng_key, num_steps, x, y, progress_bar=False)
    predict = Predictive(model, guide=guide, params=result.params, num_samples=32)
    log_probs = jax.nn.log_softmax(predict(rng_key, x_new)["logits"])
    return jax.nn.logsumexp(log_probs, axis=0) - jnp.log(32)


def scores(log_probs, y):
    accuracy = 100 * jnp.mean(jnp.argmax(log_probs, -1) == y)
    probs = jnp.exp(log_probs)
    return (
        float(accuracy),
        float(negative_log_likelihood(probs, y)),
        100 * float(expected_calibration_error(probs, y)),
    )


def report(title, rows):
    cells = [mean_and_error(rows[:, i], digits) for i, digits in enumerate((2, 3, 2))]
    print(f"{title:32s}{cells[0]:>16s}{cells[1]:>18s}{cells[2]:>16s}", flush=True)


if __name__ == "__main__":
    main()
