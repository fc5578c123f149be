"""What `physics_vae` refuses, with words."""

import jax
import jax.numpy as jnp
import numpy as np

from probbp.checks import check_choice

RESERVED = {
    "x",
    "c",
    "y",
    "z_c",
    "z_y",
    "noise",
    "physics",
    "residual",
    "prediction",
    "sigma_x",
    "c_missing",
    "y_missing",
    "c_mean",
    "y_mean",
    "c_adversary",
    "y_adversary",
    "records",
}


def check_options(priors, x, labels, reference, guide, known):
    """Raise for options that do not fit."""
    if x.ndim != 2 or not np.isfinite(x).all():
        raise ValueError(f"x must be finite and (records, outputs), got shape {x.shape}.")
    check_choice("guide", guide, ("joint", "partitioned"))
    if not labels:
        raise ValueError("Give a domain, classes or both: the residual is a function of them.")
    if taken := sorted(priors.keys() & RESERVED):
        raise ValueError(f"priors has {taken}, which are names of other sites: choose others.")
    for name, prior in priors.items():
        if prior.batch_shape or prior.support.is_discrete:
            raise ValueError(
                f"The prior of {name!r} must be continuous and have no batch shape, got "
                f"{prior.batch_shape}: use to_event(1)."
            )
    if reference is not None and reference.keys() != labels.keys():
        raise ValueError(f"reference must have {sorted(labels)}, got {sorted(reference)}.")
    if known is not None and (known.ndim != 2 or len(known) != len(x)):
        raise ValueError(f"known must be ({len(x)}, n), got {known.shape}.")


def check_physics(physics, priors, known, num_outputs):
    """Raise unless the physics returns one response for one record."""
    dtype = jnp.result_type(float)
    one = {name: jax.ShapeDtypeStruct(p.event_shape, dtype) for name, p in priors.items()}
    inputs = () if known is None else (jax.ShapeDtypeStruct(known.shape[1:], dtype),)
    out = jax.eval_shape(physics, one, *inputs)
    if getattr(out, "shape", None) != (num_outputs,):
        raise ValueError(
            f"physics must return one response ({num_outputs},) for the parameters of one record, "
            f"but returns {jax.tree.map(jnp.shape, out)}. physics_vae maps it over records."
        )
