"""Rotary positions of language models: queries and keys turn with their place in the sequence.

Su et al., 2021, arXiv:2104.09864, and what lengthens the sequences of a trained model: linear and
dynamic scaling, Llama 3's, and YaRN (Peng et al., 2023, arXiv:2309.00071).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
}


def rotary(
    config: dict[str, Any], head_dim: int, *, longest: int
) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """Return the tables of cosines and sines that a configuration asks for.

    Args:
        config: config.json of a Hugging Face checkpoint.
        head_dim: features of a head, an even number.
        longest: longest sequence of the training, where the configuration does not say.

    Returns:
        `position_ids (batch or 1, time) -> (cos, sin)`, each (batch or 1, time, 1, head_dim).

    Raises:
        ValueError: for what is not supported, by name.

    Example:
        >>> import jax.numpy as jnp
        >>> tables = rotary({"rope_theta": 10_000.0}, 8, longest=128)
        >>> cos, sin = tables(jnp.arange(5)[None])
        >>> cos.shape
        (1, 5, 1, 8)
    """
    # transformers 5 writes rope_parameters; before it was rope_theta and rope_scaling.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    _check(config, rope, kind, head_dim)
    base = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
    trained = config.get("max_position_embeddings", longest)
    original = _original_length(config, rope) or trained
    factor = rope.get("factor") or trained / original
    frequencies = {
        "default": lambda length: _frequencies(base, head_dim),
        "linear": lambda length: _frequencies(base, head_dim) / factor,
        "dynamic": lambda length: _dynamic(base, head_dim, factor, trained, length),
        "llama3": lambda length: _llama3(base, head_dim, factor, rope, original),
        "yarn": lambda length: _yarn(base, head_dim, factor, rope, original),
    }[kind]
    amplitude = _yarn_amplitude(factor, rope) if kind == "yarn" else 1.0

    def tables(position_ids):
        # cos and sin, (batch or 1, time, 1, head_dim); the two halves of a head turn together.
        omega = frequencies(jnp.max(position_ids) + 1)
        angles = position_ids[:, :, None].astype(jnp.float32) * omega
        angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
        return amplitude * jnp.cos(angles), amplitude * jnp.sin(angles)

    return tables


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the two halves of each head by their angles.

    Args:
        x: queries or keys, (batch, time, heads, head_dim).
        cos: of the angles, broadcastable to `x`.
        sin: likewise.

    Returns:
        As `x`.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[[[1.0, 0.0]]]])
        >>> rotate(x, jnp.zeros((1, 1, 1, 2)), jnp.ones((1, 1, 1, 2))).ravel().tolist()
        [0.0, 1.0]
    """
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


def _check(config, rope, kind, head_dim):
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"Rotary positions that differ by layer are not supported: {rope}.")
    if kind not in _ROPE_TYPES:
        raise ValueError(
            f"Rotary positions of type {kind!r} are not supported. Supported are "
            f"{', '.join(_ROPE_TYPES)}."
        )
    missing = [name for name in _ROPE_TYPES[kind] if rope.get(name) is None]
    if missing:
        raise ValueError(f"Rotary positions of type {kind!r} lack {', '.join(missing)}: {rope}.")
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ValueError(f"partial_rotary_factor={partial} is not supported, only 1.")
    if head_dim % 2:
        raise ValueError(f"Rotary positions turn pairs, but a head has {head_dim} features.")


def _original_length(config, rope):
    """Return how long sequences were before scaling; what is written outside takes precedence."""
    name = "original_max_position_embeddings"
    return config.get(name) or rope.get(name)


def _frequencies(base, head_dim):
    return 1.0 / base ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)


def _dynamic(base, head_dim, factor, trained, longest):
    # The base grows with a sequence longer than those of the training ("NTK-aware").
    stretch = jnp.maximum(longest, trained).astype(jnp.float32) / trained
    stretch = factor * stretch - (factor - 1)
    return _frequencies(base * stretch ** (head_dim / (head_dim - 2)), head_dim)


def _llama3(base, head_dim, factor, rope, original):
    # Long waves are stretched by the factor, short ones are not, those between by interpolation.
    omega = _frequencies(base, head_dim)
    turns = original * omega / (2 * math.pi)  # of a wave over the training's sequences
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return kept * omega + (1 - kept) * omega / factor


def _yarn(base, head_dim, factor, rope, original):
    # Peng et al., 2023, arXiv:2309.00071: the same with a ramp over the index of the wave.
    def index(turns):
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = index(rope.get("beta_fast") or 32), index(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    ramp = (jnp.arange(head_dim // 2, dtype=jnp.float32) - first) / (last - first or 0.001)
    kept = 1 - jnp.clip(ramp, 0, 1)
    omega = _frequencies(base, head_dim)
    return kept * omega + (1 - kept) * omega / factor


def _yarn_amplitude(factor, rope):
    # Attention is sharpened, by longer queries and keys, as sequences grow.
    def amplitude(weight):
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return amplitude(rope["mscale"]) / amplitude(rope["mscale_all_dim"])
    return amplitude(1.0)
