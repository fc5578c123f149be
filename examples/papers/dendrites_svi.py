"""Dendrites grown inside SVI, beside a wider network that is fitted for as many steps.

Brenner & Itti, 2025, arXiv:2501.18018, grow dendrites on trained networks. Here they grow in a
mean-field posterior over all weights of a network of three units, on Friedman's function with 1,000
rows: no validation rows, dendrites on the hidden layer where the evidence asks for them, up to
three sets; and plain networks for as many steps as three sets would take. Growth stops where
nothing asks: the steps it took are printed.

    python examples/papers/dendrites_svi.py [--fast]

Five seeds.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from _evidence import above, below, over_seeds
from _papers import DENDRITES
from _results import panels, parsed, parser, write
from numpyro.infer import Predictive, Trace_ELBO, log_likelihood
from numpyro.infer.autoguide import AutoNormal
from sklearn import datasets
from tqdm import tqdm

from probbp.models.growth import from_svi, grow, with_dendrites


def main():
    arguments = parsed(parser(__doc__))
    start = time.perf_counter()
    num_seeds = 2 if arguments.fast else 5
    rows = print_svi(num_seeds, arguments.fast)
    print(f"\n{time.perf_counter() - start:.0f} seconds, JAX {jax.__version__}")

    elbo, mse, nll = ({arm: np.array(r)[:, i] for arm, r in rows.items()} for i in range(3))
    figure, axes = panels(2)
    for ax, values, label in zip(axes, (elbo, mse), ("ELBO", "test MSE"), strict=True):
        figures = [over_seeds("", each) for each in values.values()]
        means = np.array([f.mean for f in figures])
        ax.errorbar(means, range(len(means)), xerr=means - [f.low for f in figures], fmt="o")
        ax.set_yticks(range(len(means)), list(values))
        ax.set(xlabel=label, title="Friedman 1, SVI")
    write(
        arguments,
        paper=DENDRITES,
        claim="Dendrites grown on a network that has been fitted make it better, in a posterior "
        "too.",
        setting="Friedman's function, 1,000 rows, a mean-field posterior over a network of three "
        f"units, up to three sets of dendrites, {num_seeds} seeds.",
        ours=over_seeds("test negative log likelihood, grown", nll["grown"], "nats"),
        baseline=over_seeds("a network four times as wide", nll["wide"], "nats"),
        checks=[
            check
            for other, words in (("base", "the small one"), ("wide", "the wide one"))
            for check in (
                above(
                    f"a larger ELBO than {words}",
                    over_seeds(
                        f"ELBO, grown less {other}, paired", elbo["grown"] - elbo[other], "nats"
                    ),
                ),
                below(
                    f"better predictions than {words}",
                    over_seeds(
                        f"test negative log likelihood, grown less {other}, paired",
                        nll["grown"] - nll[other],
                        "nats",
                    ),
                ),
            )
        ],
        figure=figure,
        caption="ELBO and test error of the small network, of that which grew, and of one four "
        "times as wide, with 95 % intervals over seeds.",
    )


def bayesian(x, y=None, *, layer, width):
    shapes = {"w0": (x.shape[1], width), "b0": (width,), "w1": (width, 1), "b1": (1,)}
    values = {}
    for name, shape in shapes.items():
        prior = dist.Normal(0, 1 if name == "w0" else 2).expand(shape).to_event(len(shape))
        values[name] = numpyro.sample(name, prior)
    sigma = numpyro.sample("sigma", dist.HalfNormal(1))
    hidden = jnp.tanh(layer("hidden", x, values["w0"], values["b0"]))
    mean = layer("out", hidden, values["w1"], values["b1"])[:, 0]
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(mean, sigma), obs=y)


def svi_growth(seed, width, num_sets, num_epochs, epoch_steps, data):
    """Return ELBO, test error, test negative log likelihood, dendrites and epochs."""
    (x, y), (x_test, y_test) = data
    model = partial(bayesian, width=width)
    host = from_svi(
        jax.random.key(seed),
        model,
        optax.adam(0.01),
        x,
        y,
        layers=("hidden",),
        prior_scale=1.0,
        epoch_steps=epoch_steps,
    )
    result = grow(
        jax.random.key(seed),
        host,
        max_sets=num_sets,
        patience=num_epochs,
        max_epochs=num_epochs,
        progress_bar=False,
    )
    grown = with_dendrites(model, result.dendrites)
    guide = AutoNormal(grown)
    key_draws, key_mean, key_score = jax.random.split(jax.random.key(seed), 3)
    latents = Predictive(guide, params=result.params, num_samples=500)(key_draws, x, y)
    draws = Predictive(grown, posterior_samples=latents)(key_mean, x_test)
    each = log_likelihood(grown, latents, x_test, y_test)["y"]
    nll = -(jax.scipy.special.logsumexp(each, 0) - jnp.log(len(each))).mean()
    error = jnp.mean((draws["y"].mean(0) - y_test) ** 2)
    elbo = -Trace_ELBO(num_particles=1000).loss(key_score, result.params, grown, guide, x, y)
    last = result.history[-1]
    return float(elbo), float(error), float(nll), last.num_dendrites, last.epoch


def print_svi(num_seeds, fast):
    width, num_sets, num_epochs, epoch_steps = 3, 3, *((1, 20) if fast else (5, 400))
    x, y = datasets.make_friedman1(2000, n_features=5, noise=1.0, random_state=0)
    x, y = jnp.asarray((x - 0.5) * 12**0.5, jnp.float32), jnp.asarray((y - 14.4) / 4.9, jnp.float32)
    rows = {}
    for seed in tqdm(range(num_seeds), desc="SVI"):
        order = np.random.default_rng(seed).permutation(len(x))
        data = [(x[part], y[part]) for part in np.split(order, 2)]
        arms = {"base": (width, 0), "grown": (width, num_sets), "wide": (4 * width, 0)}
        for arm, (units, sets) in arms.items():
            epochs = num_epochs * (1 if sets else num_sets + 1)
            result = svi_growth(seed, units, sets, epochs, epoch_steps, data)
            rows.setdefault(arm, []).append(result)
    print(f"\nSVI, Friedman 1, {num_seeds} seeds, mean ± standard deviation")
    print(f"{'':8s}{'ELBO':>16s}{'test MSE':>18s}{'test NLL':>18s}{'dendrites':>11s}{'steps':>8s}")
    for arm, results in rows.items():
        results = np.array(results)
        mean, sd = results.mean(0), results.std(0, ddof=1)
        texts = [f"{mean[0]:.0f} ± {sd[0]:.0f}", *(f"{mean[i]:.3f} ± {sd[i]:.3f}" for i in (1, 2))]
        steps = mean[4] * epoch_steps
        print(f"{arm:8s}{texts[0]:>16s}{texts[1]:>18s}{texts[2]:>18s}{mean[3]:11.1f}{steps:8.0f}")
    return rows


if __name__ == "__main__":
    main()
