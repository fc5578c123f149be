"""Small networks of digits and tumours, and the marks of a curve: shared by two scripts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer, load_digits

from probbp.optim.dsbp import transfer

DIGITS = load_digits()
IMAGES, LABELS = DIGITS.images.astype("float32") / 16, DIGITS.target


def network(rng_key, sizes):
    keys = jax.random.split(rng_key, len(sizes) - 1)
    scale = [(2 / m) ** 0.5 for m in sizes]
    shapes = zip(keys, scale[:-1], sizes[:-1], sizes[1:], strict=True)
    return [
        {"kernel": s * jax.random.normal(k, (m, n)), "bias": jnp.zeros(n)} for k, s, m, n in shapes
    ]


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


def shown(values, digits=1, percent=True):
    values = np.asarray(values, float) * (100 if percent else 1)
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


def curve(ax, x, values, label, color):
    values = np.asarray(values)
    ax.errorbar(x, values.mean(1), values.std(1, ddof=1), fmt="o-", label=label, color=color)


def ticks(ax, values):
    ax.set_xticks(values, [f"{value:.0f}" for value in values])
    ax.minorticks_off()
