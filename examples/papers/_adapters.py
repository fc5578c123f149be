"""A transformer adapted to a new task with few labels: what two scripts share.

Data, pretraining, fits by SVI, predictions and scores. Every array has a first axis of seeds.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from _evidence import over_seeds
from numpyro.infer import SVI, TraceMeanField_ELBO
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from probbp.diagnostics import (
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
)
from probbp.models import blob, transformer

SHIFTS = {
    "transposed": lambda images: images.transpose(0, 2, 1),
    "mirrored": lambda images: images[:, :, ::-1],
    "negative": lambda images: 1 - images,
}
# Numbers of labels; the largest on one task only, to save time.
SIZES = {"transposed": (80, 320, 640), "mirrored": (80, 320), "negative": (80, 320)}
FAST = {"transposed": (80,)}
MOST = max(max(sizes) for sizes in SIZES.values())
NUM_PRETRAINING, NUM_HELD = 600, MOST // 4
BATCH, RATE = 16, 0.01
init_small = partial(
    transformer.init, num_classes=10, max_length=16, num_features=4, width=32, hidden_width=64
)
apply = partial(transformer.apply, num_heads=4)


# ---------------------------------------------------------------------------------------
# Data and pretraining.


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


class Task:
    """A new task with some labels, the last quarter of which can be held out."""

    def __init__(self, data, base, size):
        x, y = data
        self.x, self.y, self.base, self.size, self.num_seeds = x, y, base, size, len(x)
        self.test_x, self.test_y = x[:, MOST:], y[:, MOST:]
        pixels = jax.random.permutation(jax.random.key(9), 64)
        strange = self.test_x[:, :NUM_HELD].reshape(len(x), NUM_HELD, 64)[..., pixels]
        self.strange = strange.reshape(len(x), NUM_HELD, 16, 4)
        self.num_few = size - size // 4
        self.held = self.some(self.num_few + jnp.arange(NUM_HELD), size // 4)

    def some(self, rows, num):
        """Return images and labels of rows, and which of these are there; one size for all."""
        rows = jnp.minimum(rows, self.size - 1)
        is_there = jnp.broadcast_to(jnp.arange(len(rows)) < num, (self.num_seeds, len(rows)))
        return self.x[:, rows], self.y[:, rows], is_there

    def keys(self, number):
        return jax.random.split(jax.random.key(number), self.num_seeds)

    def fitted(self, method, number, num=None, **knobs):
        """Return parameters fitted to the first `num` labels."""
        knobs = {k: jnp.broadcast_to(jnp.float32(v), self.num_seeds) for k, v in knobs.items()}
        rows, num = jnp.arange(MOST), num or self.size
        return method(self.keys(number), self.base, self.x, self.y, rows, num, knobs)


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


def adamw(knobs, num_steps):
    return optax.adamw(schedule(knobs["rate"], num_steps), weight_decay=knobs["decay"])


def fitting(method, num_steps):
    return jax.jit(jax.vmap(fit(method, num_steps), (0, 0, 0, 0, None, None, 0)))


def point(lora, model, num_steps):
    """Return the fit of a model by maximum likelihood."""

    def make_svi(knobs):
        return SVI(model, point_guide(lora), adamw(knobs, num_steps), TraceMeanField_ELBO())

    return fitting(by_svi(make_svi, noise="shared"), num_steps)


def published(lora, num_steps):
    """Return a function of the number of labels, on which its cycle depends: the published rule."""

    @cache
    def of(size):
        def make_svi(knobs):
            cycle = blob.rescaled_cycle(size, BATCH)
            fall = optax.linear_schedule(0.01, 0.0, num_steps)
            optimiser = adamw(knobs | {"decay": 0.0}, num_steps)
            options = {"schedule": "blob", "cycle": cycle, "kl_learning_rate": fall}
            return blob.svi(lora, optimiser, **options)

        return fitting(by_svi(make_svi), num_steps)

    return of


# ---------------------------------------------------------------------------------------
# Predictions of one seed.


def adapter():
    params = init_small(jax.random.key(0))
    example = (jax.ShapeDtypeStruct((BATCH, 16, 4), jnp.float32),)
    target = r"(query|value|head)\.kernel"
    return blob.bayesian_lora(apply, params, target=target, example=example)


def mean_probs(lora, params, base, x, key, *, num):
    logits = blob.predict(lora, key, params, base, x, num_samples=num)
    return jax.nn.softmax(logits).mean(0)


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


def per_seed(fun, lora, **options):
    return jax.jit(jax.vmap(partial(fun, lora, **options)))


# ---------------------------------------------------------------------------------------
# All tasks, their scores, tables and pictures.


def over_tasks(compare, num_seeds, fast, shifts=tuple(SHIFTS)):
    """Return (task, size) to a table of scores; `compare` says how each method predicts."""
    found = {}
    sizes = {k: v for k, v in (FAST if fast else SIZES).items() if k in shifts}
    with tqdm(total=sum(map(len, sizes.values()))) as bar:
        for shift in sizes:
            bar.set_description(f"{shift}: pretraining")
            data, base, before = pretrained(SHIFTS[shift], num_seeds, 40 if fast else 400)
            if fast:  # few images to test
                data = tuple(part[:, : MOST + NUM_HELD] for part in data)
            for size in sizes[shift]:
                bar.set_description(f"{shift}, {size} labels")
                task = Task(data, base, size)
                methods, notes = compare(task)
                found[shift, size] = {
                    name: scores(probs(task.test_x), task.test_y, probs(task.strange))
                    for name, probs in methods.items()
                }
                bar.clear()
                print_table(shift, size, found[shift, size], before, notes)
                bar.update()
    return found


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


def averaged(found, size, name, column):
    """Return a score of each seed, its mean over the tasks with so many labels."""
    return np.mean([rows[name][column] for (_, n), rows in found.items() if n == size], axis=0)


def difference(found, size, name, other, column):
    """Return a figure: a score of one method less that of another, paired by seed."""
    ours, theirs = (averaged(found, size, n, column) for n in (name, other))
    what, unit = column.removesuffix(" %"), "points" if column.endswith("%") else ""
    return over_seeds(f"{what}, {name} less {other}, paired", ours - theirs, unit)


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
            _, mean, low, high, _ = over_seeds("", row[column] - scores["MLE"][column])
            line += f"{f'{mean:+.3f} [{low:+.3f}, {high:+.3f}]':>26s}"
        print(line, flush=True)


def draw(figure, axes, found, names):
    """Draw differences to MLE by the number of labels: accuracy, likelihood, calibration."""
    sizes = sorted({size for _, size in found})
    titles = {"acc %": "accuracy [points]", "NLL": "negative log likelihood"}
    for ax, column in zip(axes, ("acc %", "NLL", "ECE %"), strict=True):
        for i, name in enumerate(names):
            figures = [difference(found, size, name, "MLE", column) for size in sizes]
            means = np.array([figure.mean for figure in figures])
            where = np.arange(len(sizes)) + 0.12 * (i - (len(names) - 1) / 2)
            half = means - [figure.low for figure in figures]
            ax.errorbar(where, means, half, fmt="o", markersize=4, capsize=2, label=name)
        ax.axhline(0.0, color="grey", linestyle=":")
        ax.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        ax.set(xlabel="labels", title=titles.get(column, "calibration error [points]"))
        ax.set(xlim=(-0.5, len(sizes) - 0.5))
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=len(names))
