"""What is observed of a domain or a class: numbers or categories, of which some may be missing."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from probbp.checks import check_count, check_numbers


class Label(NamedTuple):
    """What is observed of the domain or the class, from `continuous`, `categorical` or your own.

    Attributes:
        num_features: numbers that stand for a value in the network of the conditional prior.
        features: `(values (..., *event)) -> (..., num_features)`.
        num_outputs: outputs of the network that predicts the label.
        likelihood: `(outputs (..., num_outputs)) -> distribution` of the label.
        mean: `(outputs) -> mean`, or the classes' probabilities.
        marginal: prior of values that are missing. Where it has a finite support, they are summed
            over, and otherwise sampled.
    """

    num_features: int
    features: Callable[[jax.Array], jax.Array]
    num_outputs: int
    likelihood: Callable[[jax.Array], dist.Distribution]
    mean: Callable[[jax.Array], jax.Array]
    marginal: dist.Distribution


def continuous(values: jax.typing.ArrayLike) -> Label:
    """Return a label of real numbers, with a heteroscedastic normal likelihood.

    Args:
        values: those of the training records (records, n), for mean and standard deviation.

    Raises:
        ValueError: for values that are not finite or of another shape.
    """
    check_numbers("values", values, "(-inf, inf)", "Leave out the records without a value.")
    values = np.asarray(values)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError(
            f"values must be finite and (records, n), got shape {values.shape}. Leave out the "
            "records without a value."
        )
    loc, scale = (jnp.asarray(a) for a in standardisation(values))
    n = values.shape[-1]

    def likelihood(outputs):
        # The scale is bounded: one record that is predicted by luck would else dwarf the others.
        mean, log_scale = outputs[..., :n], jnp.clip(outputs[..., n:], -7.0, 3.0)
        return dist.Normal(loc + scale * mean, scale * jnp.exp(log_scale)).to_event(1)

    return Label(
        num_features=n,
        features=lambda values: (values - loc) / scale,
        num_outputs=2 * n,
        likelihood=likelihood,
        mean=lambda outputs: loc + scale * outputs[..., :n],
        marginal=dist.Normal(loc, scale).to_event(1),
    )


def categorical(num_classes: int, probs: jax.typing.ArrayLike | None = None) -> Label:
    """Return a label of classes 0, ..., num_classes - 1.

    Args:
        num_classes: how many.
        probs: their prior probabilities; uniform by default.
    """
    num_classes = check_count("num_classes", num_classes, 2)
    if probs is not None:
        check_numbers("probs", probs, "[0, 1]")
        if np.shape(probs) != (num_classes,):
            raise ValueError(f"probs must be ({num_classes},), got {np.shape(probs)}.")
    probs = jnp.full(num_classes, 1 / num_classes) if probs is None else jnp.asarray(probs)
    return Label(
        num_features=num_classes,
        features=lambda values: jax.nn.one_hot(values, num_classes, dtype=probs.dtype),
        num_outputs=num_classes,
        likelihood=lambda outputs: dist.Categorical(logits=outputs),
        mean=lambda outputs: jax.nn.softmax(outputs),
        marginal=dist.Categorical(probs=probs),
    )


def standardisation(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return location and scale of each column, the scale 1 where a column does not vary."""
    scale = values.std(0)
    return values.mean(0), np.where(scale > 0, scale, 1.0).astype(scale.dtype)
