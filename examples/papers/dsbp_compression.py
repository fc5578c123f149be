"""What spectra of activations and of curvature are worth, beside the plain alternative.

The three extensions of dynamic spectral backpropagation (Muthuraman, 2025, arXiv:2505.23369) that
are not about training: inference, architecture and transfer. Each is measured against what one
would do without it, and none against the paper's own figures.

    python examples/papers/dsbp_compression.py [--fast] [--picture FILE]

1. Truncation: kernels of low rank in the metric of the data, beside plain singular values.
2. Ranks: a budget shared by spectra, beside the same rank everywhere at the same cost.
3. Units: chosen and refitted, beside magnitude pruning with and without the same refit.
4. Drift: scores of the reference, beside the length of activations and the largest softmax; the
   level of p-values; and accuracy regained without labels.
5. Transfer: a prior from the source's curvature, beside distance to its weights, and none.
6. Protection: old tasks' inputs protected, beside plain fine-tuning.

Handwritten digits (scikit-learn's, 1,797 of 8 x 8 pixels) throughout, and a table of tumours for
the first three. Mean and standard deviation over seeds, each with its own split and start; what has
a strength is tuned on validation data, for each arm from as many values. Single precision, some
twelve minutes on two cores.
"""

import argparse
import itertools
import time
from functools import cache, partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from scipy import ndimage
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from probbp.optim.dsbp import architecture, drift, transfer, truncation

DIGITS = load_digits()
IMAGES, LABELS = DIGITS.images.astype("float32") / 16, DIGITS.target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a smoke test; its figures are rough")
    parser.add_argument("--picture", default="dsbp_compression.png", help="where the curves go")
    arguments = parser.parse_args()
    start, seeds = time.perf_counter(), range(2 if arguments.fast else 8)
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    parts = (low_rank, ranks, units, drifting, transferred, protected)
    with tqdm(total=len(parts)) as bar:
        for part, ax in zip(parts, axes.flat, strict=True):
            bar.set_description(part.__name__)
            lines = part(ax, seeds)
            bar.clear()
            print("\n" + "\n".join(lines), flush=True)
            bar.update()
    figure.savefig(arguments.picture)
    print(f"\n{time.perf_counter() - start:.0f} seconds, JAX {jax.__version__}")


def fast(seeds):
    """Say whether this is the smoke test: digits alone, and fewer arms."""
    return len(seeds) < 5


def shown(values, digits=1, percent=True):
    values = np.asarray(values, float) * (100 if percent else 1)
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


def curve(ax, x, values, label, color):
    values = np.asarray(values)
    ax.errorbar(x, values.mean(1), values.std(1, ddof=1), fmt="o-", label=label, color=color)


def ticks(ax, values):
    ax.set_xticks(values, [f"{value:.0f}" for value in values])
    ax.minorticks_off()


# ---------------------------------------------------------------------------------------
# Networks.


def network(rng_key, sizes):
    keys = jax.random.split(rng_key, len(sizes) - 1)
    scale = [(2 / m) ** 0.5 for m in sizes]
    shapes = zip(keys, scale[:-1], sizes[:-1], sizes[1:], strict=True)
    return [{"kernel": s * jax.random.normal(k, (m, n)), "bias": jnp.zeros(n)}
            for k, s, m, n in shapes]  # fmt: skip


def inputs_of(params, x):
    """Return the inputs of each layer, and the outputs."""
    seen = [x]
    for i, layer in enumerate(params):
        y = seen[-1] @ layer["kernel"] + layer["bias"]
        seen.append(jax.nn.relu(y) if i < len(params) - 1 else y)
    return seen


def free(params, rank=1):
    """Return a prior that says nothing."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    basis = jax.tree.map(lambda leaf: jnp.zeros((rank, *leaf.shape)), params)
    return transfer.Prior(zeros, basis, jnp.zeros(rank), jnp.zeros(()))


@partial(jax.jit, static_argnames=("num_steps", "batch"))
def fit(rng_key, params, x, y, prior, num_steps=600, batch=100):
    optimiser = optax.adam(optax.cosine_decay_schedule(3e-3, num_steps))

    def loss(params, rows):
        logits = inputs_of(params, x[rows])[-1]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()
        return nll + transfer.penalty(prior, params) / len(x)

    def step(carry, rng_key):
        params, state = carry
        rows = jax.random.choice(rng_key, len(x), (min(batch, len(x)),))
        updates, state = optimiser.update(jax.grad(loss)(params, rows), state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(rng_key, num_steps)
    return jax.lax.scan(step, (params, optimiser.init(params)), keys)[0][0]


def accuracy(params, x, y):
    return float(jnp.mean(jnp.argmax(inputs_of(params, x)[-1], -1) == y))


def split(seed, x, y, num_train):
    order = np.random.default_rng(seed).permutation(len(x))
    train, test = order[:num_train], order[num_train:]
    return (jnp.array(x[train]), jnp.array(y[train])), (jnp.array(x[test]), jnp.array(y[test]))


def data_sets():
    tumours = load_breast_cancer()
    x = (tumours.data - tumours.data.mean(0)) / tumours.data.std(0)
    yield "digits", IMAGES.reshape(-1, 64), LABELS, 1_000, [64, 128, 128, 10]
    yield "tumours", x.astype("float32"), tumours.target, 350, [30, 64, 64, 2]


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
    return [layer if rank >= min(layer["kernel"].shape) else how(layer, inputs, rank)
            for layer, inputs, rank in zip(params, seen, ranks, strict=False)]  # fmt: skip


def low_rank(ax, seeds):
    lines = ["1. Truncation of the hidden layers: accuracy and error of outputs, test data [%]",
             f"{'':22s}{'accuracy':>26s}{'':14s}{'error':>19s}",
             f"{'':14s}{'rank':>8s}{'weighted':>14s}{'plain':>14s}{'lost':>14s}"
             f"{'weighted':>16s}{'plain':>14s}"]  # fmt: skip
    for name, runs in trained(seeds):
        full = [accuracy(params, *test) for params, _, test in runs]
        lines.append(f"{name:14s}{'all':>8s}{shown(full):>14s}{shown(full):>14s}")
        curves = {"weighted": [], "plain": []}
        chosen = (1, 2, 4, 8, 16, 32)
        for rank in chosen:
            found = {}
            for title, how in (("weighted", weighted), ("plain", plain)):
                small = [truncated(how, params, train[0], [rank, rank, 10])
                         for params, train, _ in runs]  # fmt: skip
                found[title] = (
                    [accuracy(s, *test) for s, (*_, test) in zip(small, runs, strict=True)],
                    [relative_error(p, s, test[0])
                     for s, (p, _, test) in zip(small, runs, strict=True)],
                )  # fmt: skip
                curves[title].append(found[title][0])
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
                lows = [truncation.truncate(layer["kernel"], truncation.second_moment(x), rank=rank)
                        for layer, x in zip(params[:2], seen, strict=False)]  # fmt: skip
                small = [{**layer, "kernel": low.left @ low.right}
                         for layer, low in zip(params, lows, strict=False)]  # fmt: skip
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
    ax.set(title="1. Hidden layers of low rank, digits", xlabel="rank", xscale="log")
    ax.set(ylabel="test accuracy")
    ticks(ax, chosen)
    ax.legend()
    return lines


def ranks(ax, seeds):
    arms = ("in series", "sum of errors", "same rank")
    lines = ["2. Ranks under a budget, weighted truncation: accuracy, and error of the outputs [%]",
             f"{'':10s}{'rank':>5s}{'cost':>6s}" + "".join(f"{arm:>15s}" for arm in arms)
             + f"{'gain':>14s}" + "".join(f"{arm:>15s}" for arm in arms)]  # fmt: skip
    for name, runs in trained(seeds):
        curves, costs = {arm: [] for arm in arms}, []
        for rank in (1, 2, 4, 8, 16):
            found = {title: ([], []) for title in curves}
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
            costs.append(100 * share)
            gain = np.subtract(found["in series"][0], found["same rank"][0])
            for title, values in curves.items():
                values.append(found[title][0])
            lines.append(
                f"{name:10s}{rank:5d}{100 * share:5.0f}%"
                + "".join(f"{shown(found[arm][0]):>15s}" for arm in arms)
                + f"{shown(gain):>14s}"
                + "".join(f"{shown(found[arm][1]):>15s}" for arm in arms)
            )
        if name == "digits":
            for i, (title, values) in enumerate(curves.items()):
                curve(ax, costs, values, title, f"C{i}")
            places = costs
    ax.set(title="2. One budget for all layers, digits", xlabel="multiplications, % of the whole")
    ax.set(ylabel="test accuracy", xscale="log")
    ticks(ax, places)
    ax.legend()
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


def units(ax, seeds):
    lines = ["3. Units kept in both hidden layers: accuracy on test data, no training after [%]",
             f"{'':10s}{'units':>8s}" + "".join(f"{way:>18s}" for way in WAYS)]  # fmt: skip
    for name, runs in trained(seeds):
        numbers = (4, 8, 16, 32) if name == "tumours" else (8, 16, 32, 64)
        curves = {way: [] for way in WAYS}
        for number in numbers:
            for way, function in WAYS.items():
                curves[way].append([accuracy(pruned(function, params, train[0], number), *test)
                                    for params, train, test in runs])  # fmt: skip
            found = "".join(f"{shown(values[-1]):>18s}" for values in curves.values())
            lines.append(f"{name:10s}{number:8d}{found}")
        if name == "digits":
            for i, (way, values) in enumerate(curves.items()):
                curve(ax, numbers, values, way, f"C{i}")
    ax.set(title="3. Units kept of 128 and 128, digits", xlabel="units", ylabel="test accuracy")
    ax.legend()
    return lines


# ---------------------------------------------------------------------------------------
# 4. Drift.


def noisy(images, rng):
    return images + 0.25 * rng.normal(size=images.shape)


def turned(images, rng):
    return ndimage.rotate(images, 45, axes=(1, 2), reshape=False, order=1)


def mirrored(images, rng):
    return images[:, :, ::-1]


def lit(images, rng):
    gain, light = rng.uniform(0.4, 1.6, (8, 8)), 0.2 * rng.normal(size=(8, 8))
    return images * gain + light


def dark(images, rng):
    return 0.5 * images


CHANGES = {"noise": noisy, "45 degrees": turned, "mirror": mirrored, "light": lit, "dark": dark}


def drifting(ax, seeds):
    names = ("Mahalanobis", "energy outside", "length", "max softmax")
    areas = {change: {name: [] for name in names} for change in CHANGES}
    repaired = {change: [] for change in CHANGES}
    angles = {change: [] for change in ("none", *CHANGES)}
    levels, ranked = [], []
    _, x, y, num_train, sizes = next(data_sets())
    for seed in seeds:
        rng = np.random.default_rng(seed)
        (train, labels), (test, test_labels) = split(seed, x, y, num_train)
        key_start, key_fit = jax.random.split(jax.random.key(seed))
        params = network(key_start, sizes)
        params = fit(key_fit, params, train, labels, free(params))
        inside = inputs_of(params, train)[1]
        seen = drift.reference(inside, rank=40)
        pixels = drift.reference(train, rank=30)
        # The first half of the test data is for levels, the other is the stream.
        half = len(test) // 2

        def scores(x, params=params, seen=seen, inside=inside):
            hidden, *_, logits = inputs_of(params, x)[1:]
            # Longer and shorter than usual both count, or that score would be blind to the dark.
            length = jnp.linalg.norm(hidden, axis=1)
            unusual = jnp.abs(length - jnp.median(jnp.linalg.norm(inside, axis=1)))
            sure = jnp.max(jax.nn.softmax(logits), 1)
            values = drift.mahalanobis(seen, hidden), drift.energy_outside(seen, hidden)
            return dict(zip(names, map(np.asarray, (*values, unusual, -sure)), strict=True))

        clean, stream = scores(test[:half]), test[half:]
        hidden = inputs_of(params, test)[1]
        levels.append(np.mean(drift.p_value(seen, hidden) < 0.05))
        limit = np.quantile(clean["Mahalanobis"], 0.95)
        ranked.append(np.mean(scores(stream)["Mahalanobis"] > limit))
        for change in angles:
            changed = stream
            if change != "none":
                images = CHANGES[change](np.asarray(stream).reshape(-1, 8, 8), rng)
                changed = jnp.array(images.reshape(-1, 64), "float32")
            now = seen
            for batch in jnp.split(changed[:380], 19):
                now = drift.follow(now, inputs_of(params, batch)[1], decay=0.9)
            angle = drift.principal_angles(now.basis[:, :5], seen.basis[:, :5])[-1]
            angles[change].append(float(jnp.rad2deg(angle)))
            if change == "none":
                continue
            for name, values in scores(changed).items():
                truth = np.r_[np.zeros(half), np.ones(len(values))]
                areas[change][name].append(roc_auc_score(truth, np.r_[clean[name], values]))
            moved = drift.reference(changed, rank=30)
            right = [accuracy(params, z, test_labels[half:]) for z in (
                stream, changed, changed - moved.mean + pixels.mean,
                drift.recolour(changed, pixels, moved))]  # fmt: skip
            repaired[change].append(right)
    lines = ["4. Changed digits told from held-out ones by the first layer: area under the ROC [%]",
             f"{'':14s}" + "".join(f"{name:>16s}" for name in names)]  # fmt: skip
    for change, found in areas.items():
        lines.append(f"{change:14s}" + "".join(f"{shown(v):>16s}" for v in found.values()))
    lines += [
        f"of held-out digits, p-value < 5 %: {shown(levels)} by the chi-squared law, "
        f"{shown(ranked)} by ranks among held-out data",
        "largest of 5 principal angles from the reference after 19 batches of 20 [degrees]: "
        + ", ".join(f"{change} {shown(v, 0, False)}" for change, v in angles.items()),
        "accuracy, inputs as they come and mapped back without labels [%]",
        f"{'':14s}{'unchanged':>16s}{'changed':>16s}{'centred':>16s}{'recoloured':>16s}",
    ]
    for change, right in repaired.items():
        lines.append(f"{change:14s}" + "".join(f"{shown(v):>16s}" for v in np.transpose(right)))
    places = np.arange(len(CHANGES))
    for i, name in enumerate(names):
        values = np.array([areas[change][name] for change in CHANGES])
        ax.bar(places + 0.2 * i, values.mean(1), 0.2, yerr=values.std(1, ddof=1), label=name)
    ax.set(title="4. Changed digits told apart", ylabel="area under the ROC", ylim=(0, 1.45))
    ax.set_xticks(places + 0.3, list(CHANGES))
    ax.legend(ncols=2)
    return lines


# ---------------------------------------------------------------------------------------
# 5. Transfer.


@partial(jax.jit, static_argnames="rank")
def source_prior(rng_key, params, x, y, rank=60):
    return transfer.laplace(
        rng_key,
        lambda logits: optax.softmax_cross_entropy_with_integer_labels(logits, y).sum(),
        params,
        rank=rank,
        rest=1.0,
        outputs_fn=lambda params: inputs_of(params, x)[-1],
        num_products=rank + 40,
    )


def transferred(ax, seeds):
    numbers, strengths = (1, 2, 5, 10), (0.01, 0.1, 1.0, 10.0, 100.0)
    numbers = numbers[:1] if fast(seeds) else numbers
    arms = ("curvature", "distance", "fine-tuned", "from scratch")
    angles = (15, 40)
    found = {angle: {arm: {k: [] for k in numbers} for arm in arms} for angle in angles}
    rotated = {
        angle: ndimage.rotate(IMAGES, angle, axes=(1, 2), reshape=False, order=1).reshape(-1, 64)
        for angle in angles
    }
    sizes = [64, 64, 64, 10]
    for seed in tqdm(seeds, "seeds", leave=False):
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(LABELS))
        old, old_test, rest = order[:600], order[600:900], order[900:]
        valid, test = rest[200:400], rest[400:]
        key_start, key_other, key_fit, key_lanczos = jax.random.split(jax.random.key(seed), 4)
        params = network(key_start, sizes)
        x_old, y_old = jnp.array(IMAGES.reshape(-1, 64)[old]), jnp.array(LABELS[old])
        decay = free(params)._replace(rest=jnp.array(1.0))
        params = fit(key_fit, params, x_old, y_old, decay)
        prior = source_prior(key_lanczos, params, x_old, y_old)
        flat = free(params, 60)
        spherical = flat._replace(mean=params, rest=jnp.array(1.0))
        # Weight decay to where it starts, or to zero; as many strengths for each arm but one.
        choices = {
            "curvature": (params, [transfer.tempered(prior, s) for s in strengths]),
            "distance": (params, [transfer.tempered(spherical, s) for s in strengths]),
            "fine-tuned": (params, [flat]),
            "from scratch": (network(key_other, sizes), [
                transfer.tempered(flat._replace(rest=jnp.array(1.0)), s) for s in strengths]),
        }  # fmt: skip
        old_images = IMAGES.reshape(-1, 64)
        for angle, number in itertools.product(angles, numbers):
            few = np.concatenate([rest[:200][LABELS[rest[:200]] == c][:number] for c in range(10)])
            images = rotated[angle]
            x, y = jnp.array(images[few]), jnp.array(LABELS[few])
            for arm, (start, priors) in choices.items():
                fits = [fit(key_fit, start, x, y, prior, num_steps=300) for prior in priors]
                right = [accuracy(p, images[valid], LABELS[valid]) for p in fits]
                best = fits[int(np.argmax(right))]
                after = accuracy(best, images[test], LABELS[test])
                before = accuracy(best, old_images[old_test], LABELS[old_test])
                found[angle][arm][number].append((after, before))
    lines = ["5. From 600 upright digits to a few that are turned: accuracy [%]"]
    for angle, (place, title) in itertools.product(angles, enumerate(("target", "source, after"))):
        heading = f"{angle} degrees, {title}"
        lines.append(f"{heading:24s}" + "".join(f"{f'{k} a class':>16s}" for k in numbers))
        values = {arm: [np.array(v)[:, place] for v in found[angle][arm].values()] for arm in arms}
        values["curvature - distance"] = np.subtract(values["curvature"], values["distance"])
        for arm, each in values.items():
            lines.append(f"{arm:24s}" + "".join(f"{shown(v):>16s}" for v in each))
    for i, arm in enumerate(arms):
        after, before = np.moveaxis(np.array(list(found[15][arm].values())), 2, 0)
        curve(ax, numbers, after, arm, f"C{i}")
        ax.plot(numbers, before.mean(1), f"C{i}:")
    ax.set(title="5. Digits turned by 15 degrees (dotted: upright)")
    ax.set(xlabel="labels a class", xscale="log", ylabel="test accuracy")
    ticks(ax, numbers)
    ax.legend()
    return lines


# ---------------------------------------------------------------------------------------
# 6. Protection: five tasks of two classes, a trunk for all and a head for each.


@partial(jax.jit, static_argnames="num_steps")
def learn(rng_key, params, x, y, task, directions, num_steps=300):
    optimiser = optax.chain(optax.adam(3e-3), transfer.protect({**directions, "heads": None}))

    def loss(params, rows):
        logits = inputs_of(params["trunk"], x[rows])[-1]
        logits = jax.nn.relu(logits) @ params["heads"][task]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

    def step(carry, rng_key):
        params, state = carry
        rows = jax.random.choice(rng_key, len(x), (64,))
        updates, state = optimiser.update(jax.grad(loss)(params, rows), state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(rng_key, num_steps)
    return jax.lax.scan(step, (params, optimiser.init(params)), keys)[0][0]


def protected(ax, seeds):
    arms = {"plain": None, "share 0.9": 0.9, "share 0.99": 0.99, "share 0.999": 0.999}
    arms = {"plain": None, "share 0.9": 0.9} if fast(seeds) else arms
    tables = {arm: [] for arm in arms}
    used = {arm: [] for arm in arms}
    x = IMAGES.reshape(-1, 64)
    for seed in tqdm(seeds, "seeds", leave=False):
        rng = np.random.default_rng(seed)
        classes = rng.permutation(10).reshape(5, 2)
        tasks = []
        for pair in classes:
            rows = rng.permutation(np.flatnonzero(np.isin(LABELS, pair)))
            labels = (LABELS[rows] == pair[1]).astype(int)
            tasks.append(((x[rows[:200]], labels[:200]), (x[rows[200:]], labels[200:])))
        key_start, *keys = jax.random.split(jax.random.key(seed), 6)
        for arm, share in arms.items():
            trunk = network(key_start, [64, 100, 100])
            params = {"trunk": trunk, "heads": jnp.zeros((5, 100, 2))}
            bases, table = [None, None], np.zeros((5, 5))
            for task, (train, _) in enumerate(tasks):
                # Padded to one shape, so that one program serves all; biases move with the first.
                padded = [jnp.zeros((n, n)) if q is None else q @ jnp.eye(q.shape[1], n)
                          for q, n in zip(bases, (64, 100), strict=True)]  # fmt: skip
                bias = jnp.full((1, 1), float(share is not None and task > 0))
                directions = {"trunk": [{"kernel": q, "bias": bias} for q in padded]}
                params = learn(keys[task], params, *map(jnp.array, train), task, directions)
                if share is not None:
                    seen = inputs_of(params["trunk"], jnp.array(train[0]))
                    bases = [transfer.used_directions(a, share=share, so_far=q)
                             for a, q in zip(seen, bases, strict=False)]  # fmt: skip
                for other, (_, (test, labels)) in enumerate(tasks):
                    hidden = jax.nn.relu(inputs_of(params["trunk"], test)[-1])
                    right = jnp.argmax(hidden @ params["heads"][other], -1) == labels
                    table[task, other] = jnp.mean(right)
            tables[arm].append(table)
            used[arm].append([0 if q is None else q.shape[1] for q in bases])
    lines = ["6. Five tasks of two digits each, one after the other: accuracy on test data [%]",
             f"{'':14s}{'all, at the end':>18s}{'as learnt':>16s}{'forgotten':>16s}"
             f"{'first, at the end':>20s}{'directions used':>20s}"]  # fmt: skip
    for i, (arm, found) in enumerate(tables.items()):
        found = np.array(found)
        fresh = np.diagonal(found, axis1=1, axis2=2)
        lost = (fresh - found[:, -1])[:, :-1].mean(1)
        share = " and ".join(f"{n:.0f}" for n in np.mean(used[arm], 0))
        lines.append(
            f"{arm:14s}{shown(found[:, -1].mean(1)):>18s}{shown(fresh.mean(1)):>16s}"
            f"{shown(lost):>16s}{shown(found[:, -1, 0]):>20s}{share:>20s}"
        )
        curve(ax, np.arange(1, 6), found[:, :, 0].T, arm, f"C{i}")
    ax.set(title="6. The first task, while four more are learnt", xlabel="tasks learnt")
    ax.set(ylabel="test accuracy of the first")
    ticks(ax, range(1, 6))
    ax.legend()
    return lines


if __name__ == "__main__":
    main()
