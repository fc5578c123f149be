"""Three real data sets, and a network of two tanh layers: what optimisers are compared on."""

import jax
import jax.numpy as jnp
import numpy as np
import statsmodels.api as sm
from sklearn.datasets import load_breast_cancer, load_digits

WIDTH = 64

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


def at(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)
