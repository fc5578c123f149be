"""A small transformer to pretrain and adapt on a CPU: a classifier of token or patch sequences.

Plain functions on one flat dictionary of arrays, rather than modules: its keys are names such as
`layers.0.attention.query.kernel`, which a regular expression selects, and each kernel is a matrix
(in, out) that enters one product, so that a low-rank update replaces a leaf and nothing else.
Vaswani et al., 2017, arXiv:1706.03762; for patches of images, Dosovitskiy et al., 2021,
arXiv:2010.11929.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from probbp.checks import check_count, check_rng_key


def init(
    rng_key: jax.Array,
    *,
    num_classes: int,
    max_length: int,
    vocabulary: int | None = None,
    num_features: int | None = None,
    width: int = 64,
    num_layers: int = 2,
    hidden_width: int = 128,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> dict[str, jax.Array]:
    """Draw the parameters of a transformer.

    Kernels with n inputs are N(0, 1 / n), embeddings and positions N(0, 0.02^2), scales one, biases
    and the head zero: an untrained network calls all classes equally likely.

    Args:
        rng_key: a key.
        num_classes: number of logits.
        max_length: the longest sequence.
        vocabulary: number of tokens, where the inputs are integers below it.
        num_features: features of a patch, where the inputs are real. One of the two is given.
        width: of the residual stream, a multiple of the number of heads.
        num_layers: number of blocks.
        hidden_width: units of a block's perceptron.
        dtype: of the parameters, and so of the activations.

    Returns:
        Names to arrays: `embedding.kernel` (and `embedding.bias` for patches),
        `embedding.position`, and for each block `layers.0.attention.query.kernel` and `.bias` (so
        `key`, `value`, `output`), `layers.0.attention.norm.scale`, `layers.0.mlp.norm.scale`,
        `layers.0.mlp.up.kernel` and `.bias` (so `down`); at last `norm.scale`, `head.kernel` and
        `head.bias`. Kernels are (in, out).

    Raises:
        ValueError: unless one of `vocabulary` and `num_features` is given.

    Example:
        >>> import jax
        >>> params = init(jax.random.key(0), num_classes=10, max_length=16, num_features=4)
        >>> params["layers.0.attention.query.kernel"].shape
        (64, 64)
    """
    check_rng_key("rng_key", rng_key)
    if (vocabulary is None) == (num_features is None):
        raise ValueError(
            "Give one of vocabulary (the inputs are integers) and num_features (the inputs are "
            f"patches), got vocabulary={vocabulary} and num_features={num_features}."
        )
    counts = {"num_classes": num_classes, "max_length": max_length, "vocabulary": vocabulary}
    counts |= {"num_features": num_features, "width": width, "hidden_width": hidden_width}
    for name, count in counts.items():
        if count is not None:
            check_count(name, count)
    num_layers = check_count("num_layers", num_layers, 0)
    key_embedding, key_position, *keys = jax.random.split(rng_key, 2 + 6 * num_layers)
    params = {}

    def normal(key, shape, scale):
        return (scale * jax.random.normal(key, shape)).astype(dtype)

    def dense(name, key, num_in, num_out):
        params[f"{name}.kernel"] = normal(key, (num_in, num_out), num_in**-0.5)
        params[f"{name}.bias"] = jnp.zeros(num_out, dtype)

    if num_features is None:
        params["embedding.kernel"] = normal(key_embedding, (vocabulary, width), 0.02)
    else:
        dense("embedding", key_embedding, num_features, width)
    params["embedding.position"] = normal(key_position, (max_length, width), 0.02)
    for layer in range(num_layers):
        name, layer_keys = f"layers.{layer}", keys[6 * layer : 6 * layer + 6]
        params[f"{name}.attention.norm.scale"] = jnp.ones(width, dtype)
        for part, key in zip(("query", "key", "value", "output"), layer_keys[:4], strict=True):
            dense(f"{name}.attention.{part}", key, width, width)
        params[f"{name}.mlp.norm.scale"] = jnp.ones(width, dtype)
        dense(f"{name}.mlp.up", layer_keys[4], width, hidden_width)
        dense(f"{name}.mlp.down", layer_keys[5], hidden_width, width)
    params["norm.scale"] = jnp.ones(width, dtype)
    params["head.kernel"] = jnp.zeros((width, num_classes), dtype)
    params["head.bias"] = jnp.zeros(num_classes, dtype)
    return params


def apply(
    params: dict[str, jax.Array],
    inputs: jax.Array,
    mask: jax.Array | None = None,
    *,
    num_heads: int = 4,
    attention: Callable[..., jax.Array] = jax.nn.dot_product_attention,
    is_causal: bool = False,
    remat: bool = False,
) -> jax.Array:
    """Classify sequences: logits of the mean over tokens.

    Under a causal mask they are those of the last token, which alone has seen them all.

    Args:
        params: from `init`.
        inputs: (batch, time) integers, or (batch, time, features) patches.
        mask: (batch, time), true at tokens, false at the padding after them.
        num_heads: attention heads; it divides the width.
        attention: what stands in for `jax.nn.dot_product_attention`; called with query, key and
            value (batch, time, heads, head width) and the keywords `mask` (batch, 1, 1, time), or
            `None`, and `is_causal`.
        is_causal: whether a token sees only itself and those before it.
        remat: whether reverse mode recomputes each block instead of storing what is inside it.

    Returns:
        (batch, classes), at least in single precision. `jit`, `vmap` and both AD modes.

    Raises:
        ValueError: for inputs or a mask of another shape, a sequence longer than `max_length`, or a
            width that is not a multiple of `num_heads`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = init(jax.random.key(0), num_classes=3, max_length=5, vocabulary=7)
        >>> tokens = jnp.array([[1, 2, 3, 0, 0]])
        >>> apply(params, tokens, mask=tokens > 0).shape
        (1, 3)
    """
    hidden = encode(
        params,
        inputs,
        mask,
        num_heads=num_heads,
        attention=attention,
        is_causal=is_causal,
        remat=remat,
    )
    if mask is None:
        mask = jnp.ones(hidden.shape[:2], bool)
    mask = mask.astype(bool)
    if is_causal:
        last = jnp.argmax(jnp.arange(mask.shape[1]) * mask, axis=1)
        pooled = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    else:
        weights = mask / jnp.maximum(mask.sum(1, keepdims=True), 1)
        pooled = jnp.einsum("btw,bt->bw", hidden, weights.astype(hidden.dtype))
    logits = _dense(params, "head", pooled)
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def encode(
    params: dict[str, jax.Array],
    inputs: jax.Array,
    mask: jax.Array | None = None,
    *,
    num_heads: int = 4,
    attention: Callable[..., jax.Array] = jax.nn.dot_product_attention,
    is_causal: bool = False,
    remat: bool = False,
) -> jax.Array:
    """Return the tokens' representations under the head, as `apply` computes them.

    Blocks are pre-normalised by root mean squares (Zhang & Sennrich, 2019, arXiv:1910.07467).

    Args:
        params: from `init`.
        inputs: (batch, time) integers, or (batch, time, features) patches.
        mask: (batch, time), true at tokens, false at padding.
        num_heads: as in `apply`, like all that follows.
        attention: as in `apply`.
        is_causal: as in `apply`.
        remat: as in `apply`.

    Returns:
        (batch, time, width), in the dtype of the parameters; at padding without meaning.

    Raises:
        ValueError: as `apply`.
    """
    hidden = _embed(params, inputs)
    batch, time, width = hidden.shape
    num_heads = check_count("num_heads", num_heads)
    if width % num_heads:
        raise ValueError(f"The width, {width}, is not a multiple of num_heads={num_heads}.")
    if mask is not None:
        if mask.shape != (batch, time):
            raise ValueError(f"mask must have shape {(batch, time)}, got {mask.shape}.")
        mask = mask.astype(bool)[:, None, None, :]

    def heads(x):
        return x.reshape(batch, time, num_heads, width // num_heads)

    def block(params, hidden):
        normed = _rms_norm(hidden, params["attention.norm.scale"])
        query, key, value = (
            heads(_dense(params, f"attention.{part}", normed)) for part in ("query", "key", "value")
        )
        mixed = attention(query, key, value, mask=mask, is_causal=is_causal)
        hidden = hidden + _dense(params, "attention.output", mixed.reshape(hidden.shape))
        normed = _rms_norm(hidden, params["mlp.norm.scale"])
        up = jax.nn.gelu(_dense(params, "mlp.up", normed))
        return hidden + _dense(params, "mlp.down", up)

    if remat:
        block = jax.checkpoint(block)
    num_layers = sum(name.endswith(".attention.norm.scale") for name in params)
    for layer in range(num_layers):
        prefix = f"layers.{layer}."
        # A block is handed its own parameters only, so that recomputing it holds no others.
        names = [name for name in params if name.startswith(prefix)]
        hidden = block({name.removeprefix(prefix): params[name] for name in names}, hidden)
    return _rms_norm(hidden, params["norm.scale"])


def patches(images: jax.Array, size: int = 2) -> jax.Array:
    """Cut images into square patches, row by row: a sequence of them is what `apply` takes.

    Args:
        images: (batch, height, width) or (batch, height, width, channels); `size` divides height
            and width.
        size: pixels along a side of a patch.

    Returns:
        (batch, height / size * width / size, size * size * channels).

    Raises:
        ValueError: where `size` does not divide height and width.

    Example:
        >>> import jax.numpy as jnp
        >>> patches(jnp.zeros((3, 8, 8)), 2).shape
        (3, 16, 4)
    """
    size = check_count("size", size)
    batch, height, width, *channels = images.shape
    if height % size or width % size:
        raise ValueError(f"Patches of {size} do not tile images of {height} x {width} pixels.")
    tiles = images.reshape(batch, height // size, size, width // size, size, *channels)
    return jnp.swapaxes(tiles, 2, 3).reshape(batch, (height // size) * (width // size), -1)


def _embed(params, inputs):
    kernel, position = params["embedding.kernel"], params["embedding.position"]
    if "embedding.bias" in params:
        if inputs.ndim != 3 or inputs.shape[-1] != kernel.shape[0]:
            raise ValueError(
                f"The inputs are patches (batch, time, {kernel.shape[0]}), got {inputs.shape}."
            )
        embedded = _dense(params, "embedding", inputs.astype(kernel.dtype))
    else:
        if inputs.ndim != 2 or not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError(
                f"The inputs are integers (batch, time), got {inputs.dtype} {inputs.shape}."
            )
        embedded = jnp.take(kernel, inputs, axis=0)  # not a number for a token that is none
    time, max_length = inputs.shape[1], position.shape[0]
    if time > max_length:
        raise ValueError(f"A sequence of {time} is longer than max_length={max_length}.")
    return embedded + position[:time]


def _dense(params, name, x):
    return x @ params[f"{name}.kernel"] + params[f"{name}.bias"]


def _rms_norm(x, scale):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6)
    return scale * wide.astype(x.dtype)
