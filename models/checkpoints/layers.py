"""What decoders and encoders are made of."""

import jax
import jax.numpy as jnp

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
}


def activation(config, default):
    """Return the activation that a configuration names."""
    name = config.get("hidden_act", default)
    if name not in ACTIVATIONS:
        raise ValueError(
            f"hidden_act={name!r} is not supported. Supported are {', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name]


def inputs(input_ids, attention_mask, position_ids):
    """Return tokens, mask and positions, checked."""
    input_ids = jnp.asarray(input_ids)
    if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise ValueError(
            f"input_ids are (batch, time) integers, got {input_ids.dtype} {input_ids.shape}."
        )
    if attention_mask is not None:
        attention_mask = jnp.asarray(attention_mask)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids, {input_ids.shape}, got "
                f"{attention_mask.shape}."
            )
        attention_mask = attention_mask.astype(bool)
    if position_ids is None:
        position_ids = jnp.arange(input_ids.shape[1])[None]
    else:
        position_ids = jnp.asarray(position_ids)
        if position_ids.shape not in (input_ids.shape, (1, input_ids.shape[1])):
            raise ValueError(
                f"position_ids must have the shape of input_ids, {input_ids.shape}, or one row, "
                f"got {position_ids.shape}."
            )
    return input_ids, attention_mask, position_ids


def mask(attention_mask, time, window):
    """Return what a token may attend to, (batch, 1, 1 or time, time), or None for all."""
    mask = None if attention_mask is None else attention_mask[:, None, None, :]
    if window is not None and window < time:
        distance = jnp.arange(time)[:, None] - jnp.arange(time)
        near = (distance < window)[None, None]
        mask = near if mask is None else mask & near
    return mask


def outputs(logits, states, output_hidden_states):
    """Return logits in single precision at least, and the states if asked for."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return (logits, tuple(states)) if output_hidden_states else logits


def scope(params, prefix):
    """Return the parameters below a prefix: recomputing a layer then holds no others."""
    return {
        name.removeprefix(prefix): value
        for name, value in params.items()
        if name.startswith(prefix)
    }


def linear(params, name, x):
    """Multiply by a weight (out, in), and add a bias if there is one."""
    # One product that contracts the second axis of (out, in), without a transpose: a low-rank or
    # quantised array in place of the weight needs a rule for this alone.
    weight = params[f"{name}.weight"].astype(x.dtype)
    x = jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))
    bias = params.get(f"{name}.bias")
    return x if bias is None else x + bias.astype(x.dtype)


def rms_norm(x, scale, eps):
    """Divide by the root mean square, in single precision at least."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    return scale.astype(x.dtype) * wide.astype(x.dtype)


def layer_norm(params, name, x, eps):
    """Centre and divide by the standard deviation, in single precision at least."""
    scale, shift = (
        params[f"{name}.{new}"] if f"{name}.{new}" in params else params[f"{name}.{old}"]
        for new, old in (("weight", "gamma"), ("bias", "beta"))
    )
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * scale.astype(x.dtype) + shift.astype(x.dtype)
