"""What a source task's spectra are worth for the next, beside the plain alternative.

Two extensions of dynamic spectral backpropagation (Muthuraman, 2025, arXiv:2505.23369): inference
while data drift, and transfer. Each is measured against what one would do without it, and none
against the paper's own figures. Smaller networks are in `dsbp_truncation.py`.

    python examples/papers/dsbp_transfer.py [--fast]

1. Drift: scores of the reference, beside the length of activations and the largest softmax; the
   level of p-values; and accuracy regained without labels.
2. Transfer: a prior from the source's curvature, beside distance to its weights, and none.
3. Protection: old tasks' inputs protected, beside plain fine-tuning.

Handwritten digits (scikit-learn's, 1,797 of 8 x 8 pixels). Mean and standard deviation over eight
seeds, each with its own split and start; what has a strength is tuned on validation data, for each
arm from as many values. Single precision.
"""

import itertools
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _evidence import above, over_seeds
from _networks import (
    IMAGES,
    LABELS,
    accuracy,
    curve,
    data_sets,
    fit,
    free,
    inputs_of,
    network,
    shown,
    split,
    ticks,
)
from _papers import DSBP
from _parts import run
from _results import panels, parsed, parser, write
from scipy import ndimage
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from probbp.optim.dsbp import drift, transfer


def main() -> None:
    arguments = parsed(parser(__doc__))
    start, seeds = time.perf_counter(), range(2 if arguments.fast else 8)
    figure, axes = panels(2)
    areas, turned, kept = {}, {}, {}
    parts = {
        "drift": partial(drifting, seeds, areas),
        "transfer": partial(transferred, axes[0], seeds, turned),
        "protection": partial(protected, axes[1], seeds, kept),
    }
    run(parts, arguments.fast)
    print(f"\n{time.perf_counter() - start:.0f} seconds, JAX {jax.__version__}")

    def gain(claim, what, ours, theirs):
        values = 100 * np.subtract(ours, theirs)
        return above(claim, over_seeds(f"{what}, paired", values, "points"))

    labels = max(turned[15]["curvature"])
    ours, distance = (100 * np.array(turned[15][a][labels]).T for a in ("curvature", "distance"))
    share = list(kept)[min(2, len(kept) - 1)]
    write(
        arguments,
        paper=DSBP,
        claim="Spectra carry over: they tell when data drift, and what a network must keep of a "
        "task that it leaves for another.",
        setting=f"Digits, {len(seeds)} seeds: five changes, 600 upright digits to {labels} a class "
        "turned by 15 degrees, five tasks of two digits. The figure: upright digits, after turned "
        "ones have been learnt.",
        ours=over_seeds("accuracy on the source, the prior its curvature", ours[1], "%"),
        baseline=over_seeds("the prior the distance to its weights (L2-SP)", distance[1], "%"),
        checks=[
            *(
                gain(
                    f"drift is seen better than by the softmax: {change}",
                    "area under the ROC, Mahalanobis less largest softmax",
                    by["Mahalanobis"],
                    by["max softmax"],
                )
                for change, by in areas.items()
            ),
            gain(
                "the target is learnt better than with L2-SP",
                "accuracy, curvature less distance",
                ours[0] / 100,
                distance[0] / 100,
            ),
            gain(
                "the source is less forgotten than with L2-SP",
                "accuracy, curvature less distance",
                ours[1] / 100,
                distance[1] / 100,
            ),
            gain(
                f"old tasks are less forgotten than by fine-tuning, {share}",
                "accuracy on all five, protected less plain",
                kept[share],
                kept["plain"],
            ),
        ],
        figure=figure,
        caption="Left: digits turned by 15 degrees, learnt from a few labels; dotted, upright "
        "ones after that. Right: the first of five tasks, while four more are learnt. Mean and "
        "standard deviation over seeds.",
    )


def fast(seeds):
    """Say whether this is the smoke test: fewer labels, and fewer arms."""
    return len(seeds) < 5


# ---------------------------------------------------------------------------------------
# 1. Drift.


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


def drifting(seeds, areas, _):
    names = ("Mahalanobis", "energy outside", "length", "max softmax")
    areas |= {change: {name: [] for name in names} for change in CHANGES}
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
            right = [
                accuracy(params, z, test_labels[half:])
                for z in (
                    stream,
                    changed,
                    changed - moved.mean + pixels.mean,
                    drift.recolour(changed, pixels, moved),
                )
            ]
            repaired[change].append(right)
    lines = [
        "1. Changed digits told from held-out ones by the first layer: area under the ROC [%]",
        f"{'':14s}" + "".join(f"{name:>16s}" for name in names),
    ]
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
    return lines


# ---------------------------------------------------------------------------------------
# 2. Transfer.


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


def transferred(ax, seeds, found, _):
    numbers, strengths = (1, 2, 5, 10), (0.01, 0.1, 1.0, 10.0, 100.0)
    numbers = numbers[:1] if fast(seeds) else numbers
    arms = ("curvature", "distance", "fine-tuned", "from scratch")
    angles = (15, 40)
    found |= {angle: {arm: {k: [] for k in numbers} for arm in arms} for angle in angles}
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
            "from scratch": (
                network(key_other, sizes),
                [transfer.tempered(flat._replace(rest=jnp.array(1.0)), s) for s in strengths],
            ),
        }
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
    lines = ["2. From 600 upright digits to a few that are turned: accuracy [%]"]
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
    ax.set(title="Digits turned by 15 degrees (dotted: upright)")
    ax.set(xlabel="labels a class", xscale="log", ylabel="test accuracy")
    ticks(ax, numbers)
    ax.legend()
    return lines


# ---------------------------------------------------------------------------------------
# 3. Protection: five tasks of two classes, a trunk for all and a head for each.


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


def protected(ax, seeds, kept, _):
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
                padded = [
                    jnp.zeros((n, n)) if q is None else q @ jnp.eye(q.shape[1], n)
                    for q, n in zip(bases, (64, 100), strict=True)
                ]
                bias = jnp.full((1, 1), float(share is not None and task > 0))
                directions = {"trunk": [{"kernel": q, "bias": bias} for q in padded]}
                params = learn(keys[task], params, *map(jnp.array, train), task, directions)
                if share is not None:
                    seen = inputs_of(params["trunk"], jnp.array(train[0]))
                    bases = [
                        transfer.used_directions(a, share=share, so_far=q)
                        for a, q in zip(seen, bases, strict=False)
                    ]
                for other, (_, (test, labels)) in enumerate(tasks):
                    hidden = jax.nn.relu(inputs_of(params["trunk"], test)[-1])
                    right = jnp.argmax(hidden @ params["heads"][other], -1) == labels
                    table[task, other] = jnp.mean(right)
            tables[arm].append(table)
            used[arm].append([0 if q is None else q.shape[1] for q in bases])
    lines = [
        "3. Five tasks of two digits each, one after the other: accuracy on test data [%]",
        f"{'':14s}{'all, at the end':>18s}{'as learnt':>16s}{'forgotten':>16s}"
        f"{'first, at the end':>20s}{'directions used':>20s}",
    ]
    for i, (arm, found) in enumerate(tables.items()):
        found = np.array(found)
        kept[arm] = found[:, -1].mean(1)
        fresh = np.diagonal(found, axis1=1, axis2=2)
        lost = (fresh - found[:, -1])[:, :-1].mean(1)
        share = " and ".join(f"{n:.0f}" for n in np.mean(used[arm], 0))
        lines.append(
            f"{arm:14s}{shown(found[:, -1].mean(1)):>18s}{shown(fresh.mean(1)):>16s}"
            f"{shown(lost):>16s}{shown(found[:, -1, 0]):>20s}{share:>20s}"
        )
        curve(ax, np.arange(1, 6), found[:, :, 0].T, arm, f"C{i}")
    ax.set(title="The first of five tasks", xlabel="tasks learnt")
    ax.set(ylabel="test accuracy of the first")
    ticks(ax, range(1, 6))
    ax.legend()
    return lines


if __name__ == "__main__":
    main()
