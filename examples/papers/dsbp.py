"""What dynamic spectral backpropagation's claims come to: accuracy, flatness, time, memory.

Muthuraman, 2025, arXiv:2505.23369: projecting gradients on the leading eigenvectors of each layer's
activation covariance is said to be cheaper, to find flatter minima, and to beat SAM, LoRA and MAML.
Here networks d-64-64-c (tanh) learn three real sets under one budget for all: 600 steps of 64
examples, five learning rates, the best chosen by mean accuracy on validation data, eight seeds (of
the split, the start and the batches). The loss is the squared error of one-hot targets, whose
Hessian does not vanish where the net fits:

- digits: scikit-learn's, with a fifth of the training labels drawn anew; 600 to train on.
- cancer: scikit-learn's breast cancer, 300 to train on.
- affairs: statsmodels' survey of 6,366 women (Fair, 1978), 2,000 to train on.

Columns: test accuracy [%]; its difference to SGD, paired over seeds, with the standard error; the
loss of the training set; the Hessian's largest eigenvalue at the end (24 Lanczos products); time
of the training over SGD's, by turns, the median of five; numbers of the optimiser's state over
those of the parameters. `tests/benchmarks/dsbp.py` times a larger network.

A second table fine-tunes a net of upright digits to 150 digits turned by a quarter: there LoRA and
the projections of the same rank stand side by side. MAML is in `examples/papers/dsbp_theory.py`.

    python examples/papers/dsbp.py [--fast]

About a quarter of an hour on two cores.
"""

import argparse
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
import statsmodels.api as sm
from optax import contrib
from sklearn.datasets import load_breast_cancer, load_digits
from tqdm import tqdm

from probbp.optim import dsbp

WIDTH, BATCH = 64, 64
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
        "SAM, rho 0.05": Arm("momentum", sgd, "sam"),
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a smoke test; its figures are rough")
    fast = parser.parse_args().fast
    num_seeds, num_steps, num_rates = (2, 60, 2) if fast else (8, 600, 5)
    sets = SETS if not fast else {"cancer": SETS["cancer"]}
    begin = time.perf_counter()
    chosen = arms()
    progress = tqdm(total=len(sets) * len(chosen) + 4)
    for name, load in sets.items():
        progress.write(f"\n{name}\n{'':32s}{HEADER}")
        splits = stack([load(seed) for seed in range(num_seeds)])
        reference = None
        for title, arm in chosen.items():
            row = train(arm, splits, num_steps, num_rates, reference)
            reference = reference or row
            progress.write(f"{title:32s}{row.against(reference)}")
            progress.update()
    progress.write(f"\ndigits turned by a quarter\n{'':32s}{'acc':>6s}{'sd':>6s}{'to SGD':>14s}")
    fine_tune(num_seeds, num_steps, num_rates, progress)
    progress.close()
    print(f"\n{time.perf_counter() - begin:.0f} seconds, JAX {jax.__version__}")


# Data: (inputs, one-hot targets) to train on, to choose by, and to test on.


def digits(seed):
    x, y = load_digits(return_X_y=True)
    train, valid, test = split(seed, x, y, (600, 300))
    rng = np.random.default_rng(1_000 + seed)
    drawn = rng.random(600) < 0.2
    labels = np.where(drawn, rng.integers(10, size=600), train[1].argmax(1))
    return (train[0], np.eye(10, dtype="float32")[labels]), valid, test


def cancer(seed):
    return split(seed, *load_breast_cancer(return_X_y=True), (300, 100))


def affairs(seed):
    frame = sm.datasets.fair.load_pandas().data
    x, y = frame.drop(columns="affairs").to_numpy(), (frame["affairs"] > 0).to_numpy(int)
    return split(seed, x, y, (2_000, 1_000))


SETS = {"digits": digits, "cancer": cancer, "affairs": affairs}


def split(seed, x, y, sizes):
    order = np.random.default_rng(seed).permutation(len(x))
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    targets = np.eye(y.max() + 1, dtype="float32")[y]
    parts = np.split(order, np.cumsum(sizes))
    return tuple((x[part].astype("float32"), targets[part]) for part in parts)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


# The network.


def init(rng_key, num_inputs, num_outputs):
    sizes = (num_inputs, WIDTH, WIDTH, num_outputs)
    return [
        {"kernel": jax.random.normal(key, (a, b)) / a**0.5, "bias": jnp.zeros(b)}
        for key, a, b in zip(jax.random.split(rng_key, 3), sizes, sizes[1:], strict=False)
    ]


def outputs(params, x):
    """Return the inputs and each layer's activations."""
    hidden = [x]
    for layer in params[:-1]:
        hidden.append(jnp.tanh(hidden[-1] @ layer["kernel"] + layer["bias"]))
    return [*hidden, hidden[-1] @ params[-1]["kernel"] + params[-1]["bias"]]


def loss(params, batch, side="out"):
    hidden = outputs(params, batch[0])
    value = 0.5 * jnp.mean(jnp.sum((hidden[-1] - batch[1]) ** 2, axis=1))
    acts = hidden[1:] if side == "out" else hidden[:-1]
    return value, [{"kernel": act, "bias": None} for act in acts]


def accuracy(params, data):
    return 100 * jnp.mean(outputs(params, data[0])[-1].argmax(1) == data[1].argmax(1))


# Training.


class Row(NamedTuple):
    """One arm's results over the seeds."""

    accuracy: np.ndarray
    train_loss: np.ndarray
    sharpness: np.ndarray
    time: float
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
            f"{self.time:7.2f}{self.state:7.2f}"
        )


HEADER = (
    f"{'rate':>8s}{'acc':>7s}{'sd':>6s}{'to SGD':>16s}{'train':>8s}{'eig':>8s}{'sd':>6s}"
    f"{'time':>7s}{'state':>7s}"
)


def train(arm, splits, num_steps, num_rates, sgd):
    """Train with each rate and seed; report the rate that is best on validation data."""
    rates = GRIDS[arm.grid][-num_rates:]
    num_seeds = len(splits[0][0])
    fit = jax.jit(partial(run, arm, num_steps=num_steps)).lower(0.1, 0, at(splits, 0)).compile()
    params = {
        rate: stack([fit(rate, seed, at(splits, seed)) for seed in range(num_seeds)])
        for rate in rates
    }
    valid = [float(jnp.mean(jax.vmap(accuracy)(params[rate], splits[1]))) for rate in rates]
    best = rates[int(np.nanargmax(valid))]
    chosen = params[best]
    start = init(jax.random.key(0), splits[0][0].shape[-1], splits[0][1].shape[-1])
    return Row(
        np.asarray(jax.vmap(accuracy)(chosen, splits[2])),
        np.asarray(jax.vmap(lambda p, d: loss(p, d)[0])(chosen, splits[0])),
        np.array([top_eigenvalue(at(chosen, i), at(splits[0], i)) for i in range(num_seeds)]),
        1.0 if sgd is None else ratio(fit, sgd.fit, best, at(splits, 0)),
        state_size(arm, start) / optax.tree.size(start),
        best,
        fit,
    )


def ratio(fit, reference, rate, split):
    """Return the median of the ratio of two trainings' times, one after the other."""

    def seconds(call):
        begin = time.perf_counter()
        jax.block_until_ready(call(rate, 0, split))
        return time.perf_counter() - begin

    return float(np.median([seconds(fit) / seconds(reference) for _ in range(5)]))


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


def at(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


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
    reference = None
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
        difference = test - reference
        error = difference.std(ddof=1) / num_seeds**0.5
        progress.write(
            f"{title:32s}{test.mean():6.2f}{test.std(ddof=1):6.2f}"
            f"{difference.mean():7.2f} +-{error:5.2f}"
        )
        progress.update()


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
