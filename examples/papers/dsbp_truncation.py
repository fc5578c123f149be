"""What spectra of activations are worth for smaller networks, beside the plain alternative.

Two extensions of dynamic spectral backpropagation (Muthuraman, 2025, arXiv:2505.23369): inference
with fewer ranks, and architecture. Each is measured against what one would do without it, and none
against the paper's own figures. Transfer is in `dsbp_transfer.py`.

    python examples/papers/dsbp_truncation.py [--fast]

1. Truncation: kernels of low rank in the metric of the data, beside plain singular values.
2. Ranks: a budget shared by spectra, beside the same rank everywhere at the same cost.
3. Units: chosen and refitted, beside magnitude pruning with and without the same refit.

Handwritten digits (scikit-learn's, 1,797 of 8 x 8 pixels) and a table of tumours; mean and standard
deviation over eight seeds, each with its own split and start. What decides on the claim is an
eighth of the ranks, or of the units. Single precision.
"""

import itertools
import time
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from _evidence import above, over_seeds
from _networks import accuracy, curve, data_sets, fit, free, inputs_of, network, shown, split, ticks
from _papers import DSBP
from _parts import run
from _results import panels, parsed, parser, write

from probbp.optim.dsbp import architecture, truncation

EIGHTH = {"digits": (8, 16), "tumours": (4, 8)}  # ranks, units


def main() -> None:
    arguments = parsed(parser(__doc__))
    start, seeds = time.perf_counter(), range(2 if arguments.fast else 8)
    figure, axes = panels(2)
    found = {}
    parts = {
        "low rank": partial(low_rank, axes[0], seeds, found),
        "ranks": partial(ranks, seeds, found),
        "units": partial(units, axes[1], seeds, found),
    }
    run(parts, arguments.fast)
    print(f"\n{time.perf_counter() - start:.0f} seconds, JAX {jax.__version__}")

    def gain(what, part, ours, theirs):
        return [
            above(
                f"{what}, {name}",
                over_seeds(
                    f"{ours} less {theirs}, paired",
                    100 * np.subtract(found[part, name, ours], found[part, name, theirs]),
                    "points",
                ),
            )
            for part_of, name, arm in found
            if (part_of, arm) == (part, ours)
        ]

    rank, number = EIGHTH["digits"]
    write(
        arguments,
        paper=DSBP,
        claim="Spectra say which ranks and which units a network can do without: smaller networks "
        "keep their accuracy.",
        setting=f"Digits, 64-128-128-10, and tumours, 30-64-64-2; {len(seeds)} seeds; an eighth of "
        f"the ranks or of the units, no training after. The figure: digits, rank {rank}.",
        ours=over_seeds(
            "test accuracy, truncated in the metric of the data",
            100 * np.array(found["truncation", "digits", "weighted"]),
            "%",
        ),
        baseline=over_seeds(
            "by plain singular values, as many ranks",
            100 * np.array(found["truncation", "digits", "plain"]),
            "%",
        ),
        checks=[
            *gain(
                "truncation in the data's metric beats plain",
                "truncation",
                "weighted",
                "plain",
            ),
            *gain("ranks shared by spectra beat equal ones", "ranks", "in series", "same rank"),
            *gain(
                "units chosen by spectra beat magnitude with the same refit",
                "units",
                "for the outputs",
                "magnitude, refit",
            ),
        ],
        figure=figure,
        caption="Accuracy on digits by what is kept, mean and standard deviation over seeds; left "
        "ranks of both hidden layers, right units of 128 in each.",
    )


def fast(seeds):
    """Say whether this is the smoke test: digits alone, and fewer arms."""
    return len(seeds) < 5


@cache
def trained(seeds):
    """Return for each set a trained network for each seed, with its data."""
    found = []
    for name, x, y, num_train, sizes in itertools.islice(data_sets(), 1 if fast(seeds) else None):
        runs = []
        for seed in seeds:
            train, test = split(seed, x, y, num_train)
            key_start, key_fit = jax.random.split(jax.random.key(seed))
            params = network(key_start, sizes)
            runs.append((fit(key_fit, params, *train, free(params)), train, test))
        found.append((name, runs))
    return found


def relative_error(params, other, x):
    """Return the root mean squared change of the outputs, as a share of theirs."""
    y, z = (inputs_of(p, x)[-1] for p in (params, other))
    return float(jnp.linalg.norm(z - y) / jnp.linalg.norm(y - y.mean(0)))


# ---------------------------------------------------------------------------------------
# 1 and 2. Ranks.


def weighted(layer, x, rank):
    """Truncate in the metric of the data; the bias takes the mean's error."""
    mean = x.mean(0)
    low = truncation.truncate(layer["kernel"], truncation.second_moment(x - mean), rank=rank)
    kernel = low.left @ low.right
    return {"kernel": kernel, "bias": layer["bias"] + mean @ (layer["kernel"] - kernel)}


def plain(layer, x, rank):
    """Truncate the kernel's own singular values; the bias takes the mean's error here too."""
    u, s, vt = jnp.linalg.svd(layer["kernel"], full_matrices=False)
    kernel = u[:, :rank] * s[:rank] @ vt[:rank]
    return {"kernel": kernel, "bias": layer["bias"] + x.mean(0) @ (layer["kernel"] - kernel)}


def truncated(how, params, x, ranks):
    seen = inputs_of(params, x)
    return [
        layer if rank >= min(layer["kernel"].shape) else how(layer, inputs, rank)
        for layer, inputs, rank in zip(params, seen, ranks, strict=False)
    ]


def low_rank(ax, seeds, results, _):
    lines = [
        "1. Truncation of the hidden layers: accuracy and error of outputs, test data [%]",
        f"{'':22s}{'accuracy':>26s}{'':14s}{'error':>19s}",
        f"{'':14s}{'rank':>8s}{'weighted':>14s}{'plain':>14s}{'lost':>14s}"
        f"{'weighted':>16s}{'plain':>14s}",
    ]
    for name, runs in trained(seeds):
        full = [accuracy(params, *test) for params, _, test in runs]
        lines.append(f"{name:14s}{'all':>8s}{shown(full):>14s}{shown(full):>14s}")
        curves = {"weighted": [], "plain": []}
        chosen = (1, 2, 4, 8, 16, 32)
        for rank in chosen:
            found = {}
            for title, how in (("weighted", weighted), ("plain", plain)):
                small = [
                    truncated(how, params, train[0], [rank, rank, 10]) for params, train, _ in runs
                ]
                found[title] = (
                    [accuracy(s, *test) for s, (*_, test) in zip(small, runs, strict=True)],
                    [
                        relative_error(p, s, test[0])
                        for s, (p, _, test) in zip(small, runs, strict=True)
                    ],
                )
                curves[title].append(found[title][0])
                if rank == EIGHTH[name][0]:
                    results["truncation", name, title] = found[title][0]
            gain = np.subtract(found["weighted"][0], found["plain"][0])
            lines.append(
                f"{name:14s}{rank:8d}{shown(found['weighted'][0]):>14s}"
                f"{shown(found['plain'][0]):>14s}{shown(gain):>14s}"
                f"{shown(found['weighted'][1]):>16s}{shown(found['plain'][1]):>14s}"
            )
        if name == "digits":
            for color, (title, values) in zip(("C0", "C1"), curves.items(), strict=True):
                curve(ax, chosen, values, title, color)
            ax.axhline(np.mean(full), color="grey", linestyle=":")
    lines[2] = lines[2].replace("lost", "gain")
    # The certificate is a theorem for the inputs it is from; the bound passes through layers.
    for name, runs in trained(seeds):
        for rank in (4, 16):
            ratios, certificates = [], []
            for params, train, test in runs:
                seen = inputs_of(params, train[0])
                lows = [
                    truncation.truncate(layer["kernel"], truncation.second_moment(x), rank=rank)
                    for layer, x in zip(params[:2], seen, strict=False)
                ]
                small = [
                    {**layer, "kernel": low.left @ low.right}
                    for layer, low in zip(params, lows, strict=False)
                ]
                moved = inputs_of(params[:2], train[0])[-1] - inputs_of(small, train[0])[-1]
                error = jnp.sqrt(jnp.mean(jnp.sum(moved**2, -1)))
                ratios.append(truncation.end_to_end_bound(lows) / error)
                held_out = truncation.error_on(
                    params[0]["kernel"], small[0]["kernel"], truncation.second_moment(test[0])
                )
                certificates.append(held_out / lows[0].error)
            lines.append(
                f"{name}, rank {rank}: bound of two layers / error measured "
                f"{np.mean(ratios):.1f}; first layer's error, test / certificate of training "
                f"{np.mean(certificates):.2f}"
            )
    ax.set(title="Hidden layers of low rank", xlabel="rank", xscale="log")
    ax.set(ylabel="test accuracy")
    ticks(ax, chosen)
    ax.legend()
    return lines


def ranks(seeds, results, _):
    arms = ("in series", "sum of errors", "same rank")
    lines = [
        "2. Ranks under a budget, weighted truncation: accuracy, and error of the outputs [%]",
        f"{'':10s}{'rank':>5s}{'cost':>6s}"
        + "".join(f"{arm:>15s}" for arm in arms)
        + f"{'gain':>14s}"
        + "".join(f"{arm:>15s}" for arm in arms),
    ]
    for name, runs in trained(seeds):
        for rank in (1, 2, 4, 8, 16):
            found = {title: ([], []) for title in arms}
            for params, train, test in runs:
                seen = inputs_of(params, train[0])
                shapes = [layer["kernel"].shape for layer in params]
                spectra = []
                for layer, x in zip(params, seen, strict=False):
                    moment = truncation.second_moment(x - x.mean(0))
                    spectrum = truncation.truncate(layer["kernel"], moment, rank=0).spectrum
                    spectra.append(spectrum / jnp.sum(spectrum))
                # The same rank in each layer, its kernel as it is where that is cheaper.
                same = [rank if rank * (m + n) < m * n else min(m, n) for m, n in shapes]
                cost = sum(min(r * (m + n), m * n) for r, (m, n) in zip(same, shapes, strict=True))
                logs = [architecture.in_series(spectrum) for spectrum in spectra]
                series, total = (architecture.allocate(s, shapes, cost) for s in (logs, spectra))
                for title, chosen in zip(arms, (series.ranks, total.ranks, same), strict=True):
                    small = truncated(weighted, params, train[0], chosen)
                    found[title][0].append(accuracy(small, *test))
                    found[title][1].append(relative_error(params, small, test[0]))
            share = cost / sum(m * n for m, n in shapes)
            gain = np.subtract(found["in series"][0], found["same rank"][0])
            if rank == EIGHTH[name][0]:
                results |= {("ranks", name, title): found[title][0] for title in arms}
            lines.append(
                f"{name:10s}{rank:5d}{100 * share:5.0f}%"
                + "".join(f"{shown(found[arm][0]):>15s}" for arm in arms)
                + f"{shown(gain):>14s}"
                + "".join(f"{shown(found[arm][1]):>15s}" for arm in arms)
            )
    return lines


# ---------------------------------------------------------------------------------------
# 3. Units.


def refitted(before, after, x, indices):
    """Keep units, and fit the layer after to what it gave."""
    units = jnp.c_[x[:, indices], jnp.ones(len(x))]
    weights = jnp.linalg.lstsq(units, x @ after["kernel"])[0]
    return (
        {"kernel": before["kernel"][:, indices], "bias": before["bias"][indices]},
        {"kernel": weights[:-1], "bias": after["bias"] + weights[-1]},
    )


select_units = jax.jit(architecture.select_units, static_argnums=1)


def by_spectrum(x, before, after, number, with_kernel=True):
    kernel = after["kernel"] if with_kernel else None
    units = select_units(x, number, kernel=kernel)
    return (
        {"kernel": before["kernel"][:, units.indices], "bias": before["bias"][units.indices]},
        {
            "kernel": units.weights @ after["kernel"],
            "bias": after["bias"] + units.offset @ after["kernel"],
        },
    )


def by_magnitude(x, before, after, number, refit=True):
    size = jnp.linalg.norm(before["kernel"], axis=0) * jnp.linalg.norm(after["kernel"], axis=1)
    indices = jnp.argsort(-size)[:number]
    if refit:
        return refitted(before, after, x, indices)
    return (
        {"kernel": before["kernel"][:, indices], "bias": before["bias"][indices]},
        {**after, "kernel": after["kernel"][indices]},
    )


WAYS = {
    "for the outputs": by_spectrum,
    "for the units": partial(by_spectrum, with_kernel=False),
    "magnitude, refit": by_magnitude,
    "magnitude": partial(by_magnitude, refit=False),
}


def pruned(way, params, x, number):
    """Prune both hidden layers, the second on what the pruned first gives."""
    first, second, last = params
    first, second = way(inputs_of(params, x)[1], first, second, number)
    hidden = inputs_of([first, second, last], x)[2]
    second, last = way(hidden, second, last, number)
    return [first, second, last]


def units(ax, seeds, results, _):
    lines = [
        "3. Units kept in both hidden layers: accuracy on test data, no training after [%]",
        f"{'':10s}{'units':>8s}" + "".join(f"{way:>18s}" for way in WAYS),
    ]
    for name, runs in trained(seeds):
        numbers = (4, 8, 16, 32) if name == "tumours" else (8, 16, 32, 64)
        curves = {way: [] for way in WAYS}
        for number in numbers:
            for way, function in WAYS.items():
                curves[way].append(
                    [
                        accuracy(pruned(function, params, train[0], number), *test)
                        for params, train, test in runs
                    ]
                )
            if number == EIGHTH[name][1]:
                results |= {("units", name, way): values[-1] for way, values in curves.items()}
            found = "".join(f"{shown(values[-1]):>18s}" for values in curves.values())
            lines.append(f"{name:10s}{number:8d}{found}")
        if name == "digits":
            for i, (way, values) in enumerate(curves.items()):
                curve(ax, numbers, values, way, f"C{i}")
    ax.set(title="Units kept", xlabel="units", ylabel="test accuracy")
    ax.legend()
    return lines


if __name__ == "__main__":
    main()
