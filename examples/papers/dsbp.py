"""What dynamic spectral backpropagation's claims come to: accuracy, flatness, time, memory.

Muthuraman, 2025, arXiv:2505.23369: projecting gradients on the leading eigenvectors of each layer's
activation covariance is said to be cheaper, to find flatter minima, and to beat SAM, LoRA and MAML.
Here networks d-64-64-c (tanh) learn three real sets under one budget for all: 600 steps of 64
examples, five learning rates, the best chosen by mean accuracy on validation data over three seeds,
and with it eight seeds (of the split, the start and the batches). The loss is the squared error of
one-hot targets, whose Hessian does not vanish where the net fits:

- digits: scikit-learn's, with a fifth of the training labels drawn anew; 600 to train on.
- cancer: scikit-learn's breast cancer, 300 to train on.
- affairs: statsmodels' survey of 6,366 women (Fair, 1978), 2,000 to train on.

Columns: test accuracy [%]; its difference to SGD, paired over seeds, with the standard error; the
loss of the training set; the Hessian's largest eigenvalue at the end (24 Lanczos products); time
of the training over SGD's, by turns, the median of three; numbers of the optimiser's state over
those of the parameters. `tests/benchmarks/dsbp.py` times a larger network.

A second table fine-tunes a net of upright digits to 150 digits turned by a quarter: there LoRA and
the projections of the same rank stand side by side. MAML is in `examples/papers/dsbp_meta.py`.

    python examples/papers/dsbp.py [--fast]
"""

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _evidence import above, below, median_of, over_seeds
from _papers import DSBP
from _perceptrons import SETS, accuracy, at, digits, init, loss, stack
from _results import panels, parsed, parser, write
from optax import contrib
from tqdm import tqdm

from probbp.optim import dsbp

BATCH, NUM_CHOOSING = 64, 3
PUBLISHED = "published: outputs, rank 8"
SAM = "SAM, rho 0.05"
GRIDS = {
    "momentum": (0.003, 0.01, 0.03, 0.1, 0.3),
    "adam": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}


class Arm(NamedTuple):
    """A way to train: a grid of learning rates, an optimiser for each, how it differentiates.

    Attributes:
        grid: a key of `GRIDS`.
        make: a learning rate to an optimiser.
        gradient: "plain", "sam" or "two points".
        side: of the activations that the optimiser is given.
    """

    grid: str
    make: Callable[[Any], optax.GradientTransformation]
    gradient: str = "plain"
    side: str = "out"


def arms() -> dict[str, Arm]:
    def heavy_ball(transform):
        return lambda rate: optax.chain(
            transform, optax.trace(0.9), optax.scale_by_learning_rate(rate)
        )

    def direct(transform):
        return lambda rate: optax.chain(transform, optax.scale_by_learning_rate(rate))

    spectral = dsbp.scale_by_dynamic_spectral
    sgd = heavy_ball(optax.identity())
    acts = partial(spectral, mode="project", source="activations")
    table = {
        "SGD": Arm("momentum", sgd),
        "Adam": Arm("adam", optax.adam),
        SAM: Arm("momentum", sgd, "sam"),
        "Muon": Arm("adam", contrib.muon),
        "GaLore, rank 8": Arm("adam", lambda r: contrib.galore(r, rank=8, update_proj_gap=50)),
        "two points, rho 0.1": Arm("momentum", sgd, "two points"),
        "residual, rank 8 (default)": Arm("adam", direct(spectral(8))),
        "whiten, rank 8": Arm("adam", heavy_ball(spectral(8, "whiten"))),
        "damp, rank 8": Arm("momentum", heavy_ball(spectral(8, "damp"))),
        "bulk, rank 8": Arm("momentum", heavy_ball(spectral(8, "bulk"))),
        "random, rank 8": Arm("momentum", heavy_ball(spectral(8, "random"))),
        "project, rank 8": Arm("momentum", heavy_ball(spectral(8, "project"))),
        "project, inputs, rank 8": Arm("momentum", heavy_ball(acts(8, side="in")), side="in"),
    }
    for rank in (2, 8, 32):
        chain = heavy_ball(acts(rank, side="out"))
        table[f"published: outputs, rank {rank}"] = Arm("momentum", chain)
    return table


def main() -> None:
    arguments = parsed(parser(__doc__))
    fast = arguments.fast
    num_seeds, num_steps, num_rates = (2, 60, 2) if fast else (8, 600, 5)
    sets = SETS if not fast else {"cancer": SETS["cancer"]}
    begin = time.perf_counter()
    chosen = arms()
    if fast:
        chosen = {title: chosen[title] for title in ("SGD", SAM, PUBLISHED)}
    progress = tqdm(total=len(sets) * len(chosen) + 4)
    rows = {}
    for name, load in sets.items():
        progress.write(f"\n{name}\n{'':32s}{HEADER}")
        splits = stack([load(seed) for seed in range(num_seeds)])
        trained = train_all(chosen, splits, num_steps, num_rates, progress)
        rows |= {(name, title): row for title, row in trained.items()}
    progress.write(f"\ndigits turned by a quarter\n{'':32s}{'acc':>6s}{'sd':>6s}{'to SGD':>14s}")
    tuned = fine_tune(num_seeds, num_steps, num_rates, progress)
    progress.close()
    print(f"\n{time.perf_counter() - begin:.0f} seconds, JAX {jax.__version__}")

    shown = next(iter(sets))
    figure, axes = panels(2)
    of_shown = {title: row for (name, title), row in rows.items() if name == shown}
    draw(axes[0], {title: row.accuracy for title, row in of_shown.items()})
    axes[0].set(xlabel="test accuracy [%]", title=shown)
    draw(axes[1], {title: row.sharpness for title, row in of_shown.items()})
    axes[1].set(xlabel="largest eigenvalue of the Hessian", title=shown, xscale="log")
    axes[1].set_yticklabels([])
    write(
        arguments,
        paper=DSBP,
        claim="Gradients projected on the leading eigenvectors of each layer's activations train "
        "more cheaply, find flatter minima, and beat SAM and LoRA.",
        setting=f"Perceptrons d-64-64-c on {', '.join(sets)}, {num_steps} steps, the best of "
        f"{num_rates} rates each, {num_seeds} seeds; outputs' covariance, rank 8; digits turned by "
        f"a quarter for LoRA. The figure: {shown}.",
        ours=over_seeds("test accuracy, as published", rows[shown, PUBLISHED].accuracy, "%"),
        baseline=over_seeds("SAM, as many steps", rows[shown, SAM].accuracy, "%"),
        checks=checks(sets, rows, tuned),
        figure=figure,
        caption=f"All ways to train on {shown}, each with its best learning rate: test accuracy, "
        "and how sharp the minimum is, with 95 % intervals.",
    )


def checks(sets, rows, tuned):
    def paired(what, unit, values, other):
        return over_seeds(f"{what}, as published less {other}, paired", values, unit)

    return [
        *(
            above(
                f"more accurate than SAM, {name}",
                paired(
                    "accuracy",
                    "points",
                    rows[name, PUBLISHED].accuracy - rows[name, SAM].accuracy,
                    "SAM",
                ),
            )
            for name in sets
        ),
        *(
            below(
                f"flatter than SGD, {name}",
                paired(
                    "log of the Hessian's largest eigenvalue",
                    "",
                    np.log(rows[name, PUBLISHED].sharpness) - np.log(rows[name, "SGD"].sharpness),
                    "SGD",
                ),
            )
            for name in sets
        ),
        *(
            below(
                f"a training takes less time than SGD's, {name}",
                median_of("time over SGD's", rows[name, PUBLISHED].times),
                1.0,
            )
            for name in sets
        ),
        above(
            "more accurate than LoRA of the same rank",
            paired(
                "accuracy after fine-tuning",
                "points",
                tuned[PUBLISHED] - tuned["LoRA, rank 8 (Adam)"],
                "LoRA",
            ),
        ),
    ]


def draw(ax, values):
    figures = [over_seeds("", each) for each in values.values()]
    means = np.array([figure.mean for figure in figures])
    ax.errorbar(means, range(len(means)), xerr=means - [f.low for f in figures], fmt="o")
    ax.set_yticks(range(len(means)), list(values), fontsize=7)
    ax.invert_yaxis()


# Training.


class Row(NamedTuple):
    """One arm's results over the seeds."""

    accuracy: np.ndarray
    train_loss: np.ndarray
    sharpness: np.ndarray
    times: np.ndarray
    state: float
    rate: float
    fit: Callable

    def against(self, sgd: "Row") -> str:
        difference = self.accuracy - sgd.accuracy
        error = difference.std(ddof=1) / len(difference) ** 0.5
        return (
            f"{self.rate:8.0e}{self.accuracy.mean():7.2f}{self.accuracy.std(ddof=1):6.2f}"
            f"{difference.mean():8.2f} +-{error:5.2f}{self.train_loss.mean():8.3f}"
            f"{self.sharpness.mean():8.1f}{self.sharpness.std(ddof=1):6.1f}"
            f"{np.median(self.times):7.2f}{self.state:7.2f}"
        )


HEADER = (
    f"{'rate':>8s}{'acc':>7s}{'sd':>6s}{'to SGD':>16s}{'train':>8s}{'eig':>8s}{'sd':>6s}"
    f"{'time':>7s}{'state':>7s}"
)


def train_all(arms, splits, num_steps, num_rates, progress):
    """Train a set's arms, each beside the first."""
    rows, reference = {}, None
    for title, arm in arms.items():
        rows[title] = train(arm, splits, num_steps, num_rates, reference)
        reference = reference or rows[title]
        progress.write(f"{title:32s}{rows[title].against(reference)}")
        progress.update()
    return rows


def train(arm, splits, num_steps, num_rates, sgd):
    """Train with each rate, and with all seeds at that which is best on validation data."""
    rates = GRIDS[arm.grid][-num_rates:]
    num_seeds = len(splits[0][0])
    fit = jax.jit(partial(run, arm, num_steps=num_steps)).lower(0.1, 0, at(splits, 0)).compile()
    few = min(NUM_CHOOSING, num_seeds)
    params = {rate: [fit(rate, seed, at(splits, seed)) for seed in range(few)] for rate in rates}
    seen = jax.tree.map(lambda leaf: leaf[:few], splits[1])
    valid = [float(jnp.mean(jax.vmap(accuracy)(stack(params[rate]), seen))) for rate in rates]
    best = rates[int(np.nanargmax(valid))]
    others = [fit(best, seed, at(splits, seed)) for seed in range(few, num_seeds)]
    chosen = stack(params[best] + others)
    start = init(jax.random.key(0), splits[0][0].shape[-1], splits[0][1].shape[-1])
    return Row(
        np.asarray(jax.vmap(accuracy)(chosen, splits[2])),
        np.asarray(jax.vmap(lambda p, d: loss(p, d)[0])(chosen, splits[0])),
        np.array([top_eigenvalue(at(chosen, i), at(splits[0], i)) for i in range(num_seeds)]),
        np.ones(3) if sgd is None else ratios(fit, sgd.fit, best, at(splits, 0)),
        state_size(arm, start) / optax.tree.size(start),
        best,
        fit,
    )


def ratios(fit, reference, rate, split):
    """Return ratios of two trainings' times, one after the other."""

    def seconds(call):
        begin = time.perf_counter()
        jax.block_until_ready(call(rate, 0, split))
        return time.perf_counter() - begin

    return np.array([seconds(fit) / seconds(reference) for _ in range(3)])


def run(arm, rate, seed, split, *, num_steps, start=None):
    """Return the parameters after training on a split's first part."""
    x, y = split[0]
    key_init, key_batches = jax.random.split(jax.random.key(seed))
    params = init(key_init, x.shape[1], y.shape[1]) if start is None else start
    optimiser = optax.with_extra_args_support(arm.make(rate))
    direction = dsbp.start(jax.random.key(0), optax.tree.size(params), 1)

    def step(carry, key):
        params, state, direction = carry
        rows = jax.random.choice(key, len(x), (min(BATCH, len(x)),), replace=False)
        batch = x[rows], y[rows]
        (_, acts), grad = jax.value_and_grad(loss, has_aux=True)(params, batch, arm.side)
        if arm.gradient == "sam":
            uphill = optax.tree.add_scale(params, 0.05 / optax.tree.norm(grad), grad)
            grad = jax.grad(loss, has_aux=True)(uphill, batch)[0]
        if arm.gradient == "two points":
            product = dsbp.hessian_product(lambda p: loss(p, batch)[0], params)
            direction = dsbp.track(direction, product, 0.0, decay=0.5)
            estimator = dsbp.two_point(0.1, direction.vectors[:, 0])
            _, grad = estimator(lambda p: loss(p, batch)[0])(key, params)
        updates, state = optimiser.update(grad, state, params, acts=acts)
        return (optax.apply_updates(params, updates), state, direction), None

    carry = params, optimiser.init(params), direction
    return jax.lax.scan(step, carry, jax.random.split(key_batches, num_steps))[0][0]


@jax.jit
def top_eigenvalue(params, data):
    product = dsbp.hessian_product(lambda p: loss(p, data)[0], params)
    return dsbp.leading_eigenpairs(
        jax.random.key(0), product, params, rank=1, num_products=24, num_probes=1
    ).values[0]


def state_size(arm, params):
    return sum(np.size(leaf) for leaf in jax.tree.leaves(arm.make(0.1).init(params)))


# Fine-tuning: LoRA beside projections of the same rank.


def fine_tune(num_seeds, num_steps, num_rates, progress):
    """A net of upright digits learns turned ones from 150 of them."""
    chosen = arms()
    table = {
        "SGD, all weights": chosen["SGD"],
        "LoRA, rank 8 (Adam)": Arm("adam", optax.adam),
        "published: outputs, rank 8": chosen["published: outputs, rank 8"],
        "residual, rank 8 (default)": chosen["residual, rank 8 (default)"],
    }
    upright = stack([digits(seed) for seed in range(num_seeds)])
    base = jax.jit(partial(run, chosen["SGD"], num_steps=num_steps))
    starts = stack([base(0.1, seed, at(upright, seed)) for seed in range(num_seeds)])
    turned = [turn(digits(seed)) for seed in range(num_seeds)]
    turned = stack([((x[:150], y[:150]), valid, test) for (x, y), valid, test in turned])
    reference, found = None, {}
    for title, arm in table.items():
        tune = lora if title.startswith("LoRA") else run
        fit = jax.jit(
            lambda rate, seed, split, start, arm=arm, tune=tune: tune(
                arm, rate, seed, split, num_steps=num_steps // 3, start=start
            )
        )
        rates = GRIDS[arm.grid][-num_rates:]
        fitted = [
            stack([fit(rate, i, at(turned, i), at(starts, i)) for i in range(num_seeds)])
            for rate in rates
        ]
        valid = [float(jnp.mean(jax.vmap(accuracy)(p, turned[1]))) for p in fitted]
        test = np.asarray(jax.vmap(accuracy)(fitted[int(np.nanargmax(valid))], turned[2]))
        reference = test if reference is None else reference
        found[title] = test
        difference = test - reference
        error = difference.std(ddof=1) / num_seeds**0.5
        progress.write(
            f"{title:32s}{test.mean():6.2f}{test.std(ddof=1):6.2f}"
            f"{difference.mean():7.2f} +-{error:5.2f}"
        )
        progress.update()
    return found


def turn(parts):
    return [(np.rot90(x.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64), y) for x, y in parts]


def lora(arm, rate, seed, split, *, num_steps, start, rank=8):
    """Learn kernel + a @ b with a and b of rank 8, biases as they are."""
    x, y = split[0]
    key_a, key_batches = jax.random.split(jax.random.key(seed))
    factors = [
        {
            "a": jax.random.normal(key_a, (layer["kernel"].shape[0], rank)) / rank**0.5,
            "b": jnp.zeros((rank, layer["kernel"].shape[1])),
        }
        for layer in start
    ]

    def merged(factors):
        return [
            {"kernel": layer["kernel"] + low["a"] @ low["b"], "bias": layer["bias"]}
            for layer, low in zip(start, factors, strict=True)
        ]

    optimiser = arm.make(rate)

    def step(carry, key):
        factors, state = carry
        rows = jax.random.choice(key, len(x), (BATCH,), replace=False)
        grad = jax.grad(lambda f: loss(merged(f), (x[rows], y[rows]))[0])(factors)
        updates, state = optimiser.update(grad, state, factors)
        return (optax.apply_updates(factors, updates), state), None

    carry = factors, optimiser.init(factors)
    keys = jax.random.split(key_batches, num_steps)
    return merged(jax.lax.scan(step, carry, keys)[0][0])


if __name__ == "__main__":
    main()
