"""Records, their batches, and the labels that some of them lack."""

from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax.core import Tracer


def rows_of(labels, x, c, y, known, has_c, has_y, num_records):
    """Return all that has a first axis of records, what is missing filled up."""
    rows = {"x": x, "known": known, "c": c, "y": y, "has_c": has_c, "has_y": has_y}
    sizes = {name: len(value) for name, value in rows.items() if value is not None}
    if num_records is not None:
        sizes["num_records"] = num_records
    if len(set(sizes.values())) != 1:
        raise ValueError(
            f"All arrays have the records on their first axis, but these have {sizes}. Without x, "
            "c and y, pass num_records."
        )
    num = next(iter(sizes.values()))
    for name in ("c", "y"):
        value = rows[name]
        if name not in labels:
            if value is not None or rows[f"has_{name}"] is not None:
                raise ValueError(f"{name} is given, but physics_vae got no label for it.")
            continue
        marginal = labels[name].marginal
        shape = (num, *marginal.event_shape)
        if value is None:
            dtype = int if marginal.support.is_discrete else float
            rows[name], rows[f"has_{name}"] = jnp.zeros(shape, dtype), jnp.zeros(num, bool)
            continue
        if jnp.shape(value) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {jnp.shape(value)}.")
        _check_values(name, value, rows[f"has_{name}"], marginal.support)
    return num, rows


def _check_values(name, value, has, support):
    """Require values that the label can have, where there are any, unless they are traced."""
    if isinstance(value, Tracer) or isinstance(has, Tracer):
        return
    with jax.ensure_compile_time_eval():  # a constant is one where the rest is traced
        is_wrong = ~np.asarray(support(jnp.asarray(value)))
    if has is not None:
        is_wrong &= np.asarray(has, bool)
    if np.any(is_wrong):
        raise ValueError(
            f"{name} has {np.asarray(value)[is_wrong][0]} in record {int(np.argmax(is_wrong))}, "
            f"which is no value of this label. Where it is missing, pass has_{name}, (records,), "
            f"false there, and any valid value in {name}."
        )


@contextmanager
def records_plate(num_and_rows, subsample_size):
    """Enter the plate of records, with the rows of its batch."""
    num, rows = num_and_rows
    with numpyro.plate("records", num, subsample_size) as index:
        if subsample_size is not None and subsample_size < num:
            rows = {name: None if v is None else jnp.asarray(v)[index] for name, v in rows.items()}
        yield rows


def observe(name, distribution, value, has):
    """Observe a label where it is there."""
    distribution = distribution if has is None else distribution.mask(has)
    numpyro.sample(name, distribution, obs=value)
