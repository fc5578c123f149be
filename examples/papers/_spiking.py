"""Spiking networks on handwritten digits: the data, and training by any gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

BATCH = 128


def digits(seed):
    """Return half of the images, their labels, and the other half; pixels between 0 and 2."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    images, labels = jnp.asarray(images[order] / 8, jnp.float32), jnp.asarray(labels[order])
    half = len(labels) // 2
    return images[:half], labels[:half], images[half:], labels[half:]


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def fit_with(run, is_trained=lambda path: True, learning_rate=1e-3, weight_decay=0.0):
    """Return a compiled function that trains a network."""

    @partial(jax.jit, static_argnums=0)
    def fit(graph, params, rest, x, y, batches):
        optimiser = optax.adamw(
            optax.cosine_decay_schedule(learning_rate, len(batches)), weight_decay=weight_decay
        )

        def loss(params, rest, x, y):
            network = nnx.merge(graph, params, rest, copy=True)
            logits = run(network, x)
            *_, rest = nnx.split(network, nnx.Param, ...)
            return cross_entropy(logits, y).mean(), rest

        def step(carry, batch):
            params, state, rest = carry
            grad, rest = jax.grad(loss, has_aux=True)(params, rest, x[batch], y[batch])
            grad = jax.tree_util.tree_map_with_path(lambda path, g: g * is_trained(path), grad)
            updates, state = optimiser.update(grad, state, params)
            return (optax.apply_updates(params, updates), state, rest), None

        (params, _, rest), _ = jax.lax.scan(step, (params, optimiser.init(params), rest), batches)
        return params, rest

    return fit


def train(arm, seed, x, y, epochs):
    """Return the trained network."""
    make, _, fit = arm
    graph, params, rest = nnx.split(make(seed), nnx.Param, ...)
    rng = np.random.default_rng(seed)
    size = min(BATCH, len(x) // 2)
    order = np.concatenate(
        [rng.permutation(len(x))[: len(x) // size * size] for _ in range(epochs)]
    )
    params, rest = fit(graph, params, rest, x, y, jnp.asarray(order.reshape(-1, size)))
    return nnx.merge(graph, params, rest, copy=True)


def mean_and_error(values, digits=2):
    values = np.asarray(values)
    error = values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():.{digits}f} ± {error:.{digits}f}"
