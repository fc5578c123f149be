"""Dendrites against their alternatives: five data sets, ten seeds, one budget.

Brenner & Itti, 2025, arXiv:2501.18018, and Brenner et al., 2025, arXiv:2506.00356, grow a dendrite
for every neuron of a trained network and report up to 16 % more accuracy and up to 90 % fewer
parameters. Their comparisons have no arm that spends the same parameters on width, none with random
dendrites, and longer training for the network that grows. Here all arms see the same rows the same
number of times. The authors' code is proprietary; this is our reading of the method.

    python examples/papers/dendrites.py [--fast]

A network with one hidden layer of few tanh units, 50 % of the rows to train, 20 % to validate, 30 %
to test, Adam at 0.01 with a cosine, batches of 32. Growth has three phases of 60 epochs, each back
to its best validation, with a set of dendrites on both layers before the second and the third; what
does not grow has 180 epochs in one. Ten seeds draw split, start and batches, and are shared by the
arms; intervals are 95 % of Student's t over seeds, and differences are paired.

- base: the small network. wide: as many units as the parameters of a full growth pay for.
- gradient: dendrites start at random, small, and are trained with all else.
- perforated: as in the papers: dendrites climb the correlation with their neuron's error, one for
  each neuron, stay as they are, and no error passes through them. perforated, evidence: the same,
  for those neurons that the joint evidence asks for.
- unfrozen: sought in the same way, and then trained with all else.
- partial: dendrites climb the partial correlation, of what their neuron's own weights cannot say;
  frozen and perforated, or unfrozen, for all or for whom the evidence asks. The last of the four is
  the default of `probbp.models.growth`.
- random: frozen dendrites that nobody sought.

Growth inside SVI is in `dendrites_svi.py`.
"""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _evidence import above, below, jackknifed, over_seeds
from _grown import compare
from _papers import DENDRITES
from _results import panels, parsed, parser, write
from sklearn import datasets
from tqdm import tqdm

NUM_SEEDS, EPOCHS = 10, 60
WIDTHS = {"digits": 4, "breast cancer": 2, "wine": 2, "diabetes": 2, "Friedman 1": 3}


class Data(NamedTuple):
    """One data set, with a first axis of seeds; y are classes, or standardised numbers."""

    train: tuple[jax.Array, jax.Array]
    validation: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


def main():
    arguments = parsed(parser(__doc__))
    fast = arguments.fast
    num_seeds, epochs, num_steps = (3, 2, 5) if fast else (NUM_SEEDS, EPOCHS, 150)
    names = ("wine",) if fast else tuple(WIDTHS)
    start = time.perf_counter(), time.process_time()
    verdicts = []
    with tqdm(names) as bar:
        for name in bar:
            bar.set_description(name)
            data, num_outputs = load(name, num_seeds)
            scores, sizes, curve = compare(data, num_outputs, WIDTHS[name], epochs, num_steps)
            bar.clear()
            print_table(name, num_outputs > 1, scores, sizes)
            verdicts.append((name, num_outputs > 1, scores, sizes, curve))
    print_verdicts(verdicts)
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    print(f"\n{wall:.0f} seconds, {cpu:.0f} of CPUs, JAX {jax.__version__}")

    name, _, scores, _, _ = verdicts[0]
    figure, axes = panels(2)
    draw_errors(axes[0], verdicts)
    draw_sizes(axes[1], *verdicts[0])
    write(
        arguments,
        paper=DENDRITES,
        claim="Dendrites grown on a trained network make it up to 16 % more accurate, or as "
        "accurate with up to 90 % fewer parameters.",
        setting=f"One hidden layer of few units on {', '.join(names)}; two sets of dendrites, "
        f"{num_seeds} seeds, equal training for all. The figure: {name}.",
        ours=over_seeds("test error, perforated", 100 * scores["perforated"], "%"),
        baseline=over_seeds("a wider network with as many parameters", 100 * scores["wide"], "%"),
        checks=[check for each in verdicts for check in checks_of(*each)],
        figure=figure,
        caption="Left: error of the perforated network over that of the small one and of the wider "
        f"one, 95 % intervals, 1 is no gain. Right: {name}, error by the number of parameters.",
    )


def checks_of(name, is_classes, scores, sizes, curve):
    """Return checks: better than the small network, than a wide one, and smaller than its equal."""
    factor, unit = (100, "points") if is_classes else (1, "of the variance")
    kind = "perforated"
    checks = [
        below(
            f"{name}: less error than {words}",
            over_seeds(
                f"error, perforated less {other}, paired",
                factor * (scores[kind] - scores[other]),
                unit,
            ),
        )
        for other, words in (
            ("base", "the network that it grew from"),
            ("wide", "a wide one with as many parameters"),
        )
    ]

    def saved(rows):
        """Parameters saved against the smallest plain network with as little error."""
        error = scores[kind][rows].mean()
        good = [size for size, plain in curve.items() if plain[rows].mean() <= error]
        return 100 * (1 - sizes[kind].mean() / min(good, default=max(curve)))

    everyone = np.arange(len(scores[kind]))
    left_out = [saved(everyone[everyone != i]) for i in everyone]
    what = "parameters saved against the smallest plain network as good, at most the largest"
    return [
        *checks,
        above(
            f"{name}: fewer parameters at the same error",
            jackknifed(what, saved(everyone), left_out, "%"),
        ),
    ]


def draw_errors(ax, verdicts):
    for shift, other in ((-0.1, "base"), (0.1, "wide")):
        figures = [
            over_seeds("", scores["perforated"] / scores[other].mean())
            for _, _, scores, _, _ in verdicts
        ]
        means = np.array([figure.mean for figure in figures])
        places = np.arange(len(means)) + shift
        ax.errorbar(means, places, xerr=means - [f.low for f in figures], fmt="o", label=other)
    ax.axvline(1.0, color="grey", linestyle=":")
    ax.set_yticks(range(len(verdicts)), [name for name, *_ in verdicts])
    ax.set(xscale="log", xlabel="error of the perforated network over its", title="Test error")
    ax.legend()


def draw_sizes(ax, name, is_classes, scores, sizes, curve):
    factor = 100 if is_classes else 1
    plain = sorted(curve)
    ax.plot(plain, [factor * curve[size].mean() for size in plain], "o-", label="plain")
    for arm, style in (("perforated", "s"), ("partial, unfrozen, evidence", "^")):
        mean, half = interval(factor * scores[arm])
        ax.errorbar(sizes[arm].mean(), mean, half, fmt=style, label=arm)
    ax.set(xscale="log", xlabel="parameters", ylabel="test error", title=name)
    ax.legend()


# ---------------------------------------------------------------------------------------
# Data.


def load(name, num_seeds):
    """Return splits of a data set for each seed, standardised by their training rows."""
    if name == "Friedman 1":
        x, y = datasets.make_friedman1(2000, n_features=5, noise=1.0, random_state=0)
    else:
        loader = {"digits": datasets.load_digits, "breast cancer": datasets.load_breast_cancer}
        loader |= {"wine": datasets.load_wine, "diabetes": datasets.load_diabetes}
        x, y = loader[name](return_X_y=True)
    is_classes = np.issubdtype(y.dtype, np.integer)
    num = len(x)
    splits = []
    for seed in range(num_seeds):
        order = np.random.default_rng(seed).permutation(num)
        train, validation, test = np.split(order, [num // 2, num // 2 + num // 5])
        scale = np.maximum(x[train].std(0), 1e-3 * x.std())
        inputs = (x - x[train].mean(0)) / scale
        targets = y if is_classes else (y - y[train].mean()) / y[train].std()
        splits.append([(inputs[rows], targets[rows]) for rows in (train, validation, test)])
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *splits)
    dtype = jnp.int32 if is_classes else jnp.float32
    stacked = [(x.astype(jnp.float32), y.astype(dtype)) for x, y in stacked]
    return Data(*stacked), int(y.max()) + 1 if is_classes else 1


# ---------------------------------------------------------------------------------------
# Tables.


def interval(x):
    """Return mean and half width of a 95 % interval over seeds."""
    figure = over_seeds("", x)
    return figure.mean, figure.high - figure.mean


def print_table(name, is_classes, scores, sizes):
    unit, factor = ("test error, %", 100) if is_classes else ("test MSE / variance", 1)
    digits = 2 if is_classes else 3
    print(f"\n{name}, {unit}; differences paired by seed")
    print(f"{'':28s}{'parameters':>12s}{'error':>18s}{'minus base':>20s}{'minus wide':>20s}")
    for arm, score in scores.items():
        cells = [interval(factor * score)]
        cells += [interval(factor * (score - scores[other])) for other in ("base", "wide")]
        texts = [f"{mean:.{digits}f} ± {half:.{digits}f}" for mean, half in cells]
        print(f"{arm:28s}{sizes[arm].mean():12.0f}{texts[0]:>18s}{texts[1]:>20s}{texts[2]:>20s}")


def print_verdicts(verdicts):
    print(
        "\nEvidence masks against a dendrite for every neuron: added parameters, error difference"
    )
    for name, is_classes, scores, sizes, _ in verdicts:
        factor, digits = (100, 2) if is_classes else (1, 3)
        for kind in ("perforated", "partial", "partial, unfrozen"):
            masked = f"{kind}, evidence"
            added = [(sizes[arm] - sizes["base"]).mean() for arm in (masked, kind)]
            mean, half = interval(factor * (scores[masked] - scores[kind]))
            noise = "within noise" if abs(mean) <= half else "better" if mean < 0 else "worse"
            print(
                f"{name:16s}{kind:18s}{added[0]:6.0f} of {added[1]:5.0f}"
                f" ({added[0] / added[1]:4.0%})"
                f"   {mean:+.{digits}f} ± {half:.{digits}f}  {noise}"
            )

    print("\nCompression: what grew, and the smallest plain network that is as good")
    print(f"{'':16s}{'grown by':28s}{'parameters':>11s}{'error':>9s}   plain")
    for name, is_classes, scores, sizes, curve in verdicts:
        factor, digits = (100, 2) if is_classes else (1, 3)
        for arm in ("perforated", "partial, unfrozen, evidence"):
            error = scores[arm].mean()
            as_good = [size for size, plain in sorted(curve.items()) if plain.mean() <= error]
            text = f"{as_good[0]} parameters" if as_good else f"none up to {max(curve)}"
            print(
                f"{name:16s}{arm:28s}{sizes[arm].mean():11.0f}{factor * error:9.{digits}f}   {text}"
            )

    print("\nThe papers' claims: accuracy gained over the base, in % of the base's accuracy")
    print("('up to 16 %'), and parameters saved against a plain network of the same error")
    for name, is_classes, scores, sizes, curve in verdicts:
        arm = "perforated"
        gain = ""
        if is_classes:
            accuracy = 1 - scores["base"].mean(), 1 - scores[arm].mean()
            gain = f"accuracy {100 * (accuracy[1] / accuracy[0] - 1):+.1f} %, "
        as_good = [s for s, plain in sorted(curve.items()) if plain.mean() <= scores[arm].mean()]
        size = sizes[arm].mean()
        saved = f"{1 - size / as_good[0]:+.0%}" if as_good else "all plain ones are worse"
        print(f"{name:16s}{gain}parameters saved {saved}")


if __name__ == "__main__":
    main()
