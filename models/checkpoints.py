"""Hugging Face checkpoints as plain JAX functions of their own parameters, without PyTorch.

Llama, Qwen2 and Qwen3 (causal language models, sequence classifiers), BERT and RoBERTa (sequence
classifiers). A parameter keeps its name and its layout in the file, (out, in) for a matrix, so that
a regular expression selects it and what is trained can be written back under the same name.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probbp.models.rotary import rotary, rotate


class Checkpoint(NamedTuple):
    """A network and its parameters.

    apply_fn: `(params, input_ids, attention_mask=None, ...) -> logits`, as `load` describes it.
    params: names to arrays.
    config: config.json as it stands.
    """

    apply_fn: Callable[..., Any]
    params: dict[str, jax.Array]
    config: dict[str, Any]


def load(
    folder: str | os.PathLike[str],
    *,
    architecture: str | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    attention: Callable[..., jax.Array] = jax.nn.dot_product_attention,
    remat: bool = False,
) -> Checkpoint:
    """Read a folder with config.json and model.safetensors, in one file or in shards.

    What is not supported is refused by name, and weights that do not fit the configuration are an
    error, not a silent difference. Supported are the architectures <family>ForCausalLM,
    <family>ForSequenceClassification and <family>Model of Llama, Qwen2 and Qwen3, and the latter
    two of Bert, Roberta and XLMRoberta; grouped queries, biases, norms of queries and keys, tied
    embeddings, sliding windows; rotary positions of the types default, linear, dynamic, llama3 and
    yarn.

    The function that it returns is

    `apply_fn(params, input_ids, attention_mask=None, *, position_ids=None,
    output_hidden_states=False)`, and `token_type_ids=None` for BERT and RoBERTa, where

    - `input_ids` are (batch, time) integers. One that is not in the vocabulary makes the output not
      a number.
    - `attention_mask` is (batch, time), true or 1 at tokens, false or 0 at padding, on either side.
    - `position_ids` are (batch, time) or (1, time) integers; 0, 1, 2, ... by default whatever the
      mask, and for RoBERTa the count of tokens that are not padding, as PyTorch's models have it.
    - With `output_hidden_states` it returns `(logits, hidden_states)`: the embedding and the output
      of each layer, (batch, time, width), the last one of a decoder after its norm.

    Logits, at least in single precision, are (batch, time, vocabulary) for language models and
    (batch, labels) for classifiers: there a decoder takes the last token that is not
    `pad_token_id` or, where the configuration has none, the last that is attended to. Of
    <family>Model the output is the last hidden state. At padding nothing has a meaning. There is no
    dropout and no cache: this is for training and scoring, not for generation. `jit`, `vmap` and
    both AD modes.

    Args:
        folder: a directory. Nothing is downloaded.
        architecture: read the checkpoint as this one instead of what config.json says: "BertModel"
            leaves the head of a masked language model out.
        dtype: of the parameters, and so of the activations; as stored by default. Norms, rotary
            angles and the softmax are computed in single precision in any case.
        attention: what stands in for `jax.nn.dot_product_attention`; called with query (batch,
            time, heads, head width), key and value (batch, time, groups, head width) and the
            keywords `mask` (batch or 1, 1, time or 1, time), or `None`, and `is_causal`.
        remat: whether reverse mode recomputes each layer instead of storing what is inside it.

    Returns:
        A `Checkpoint`, to be unpacked as `(apply_fn, params, config)`. Parameters that the
        architecture does not use are left out.

    Raises:
        ImportError: without the package safetensors.
        FileNotFoundError: where config.json or the weights are not in the folder.
        ValueError: for what is not supported, and for weights that do not fit the configuration.

    Example:
        >>> import json, pathlib, tempfile
        >>> import jax, jax.numpy as jnp
        >>> from safetensors.flax import save_file
        >>> config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 7, "hidden_size": 4,
        ...           "intermediate_size": 8, "num_hidden_layers": 0, "num_attention_heads": 2,
        ...           "tie_word_embeddings": True}
        >>> weights = {"model.embed_tokens.weight": jnp.ones((7, 4)),
        ...            "model.norm.weight": jnp.ones(4)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "config.json").write_text(json.dumps(config))
        ...     save_file(weights, f"{folder}/model.safetensors")
        ...     apply_fn, params, config = load(folder)
        >>> apply_fn(params, jnp.array([[1, 2, 3]])).shape
        (1, 3, 7)
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json. load takes a folder as `save_pretrained` or a download "
            "leaves it, not the name of a model on the hub."
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family, head = _architecture(config, architecture)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ValueError(
            f"The weights are quantised ({method}), which is not supported. Take a checkpoint in "
            "float32, float16 or bfloat16."
        )
    files = _files(folder)
    body = {"Bert": "bert", "Roberta": "roberta", "XLMRoberta": "roberta"}.get(family, "model")
    # Saved without a head, the body is the whole, and names do not say its name.
    body = f"{body}." if any(name.startswith(f"{body}.") for name in files) else ""
    if family in _DECODERS:
        shapes = _decoder_shapes(config, family, head, body)
        apply_fn = _decoder(config, family, head, body, attention, remat)
    else:
        gamma = any(name.endswith("LayerNorm.gamma") for name in files)  # written before 2019
        shapes = _encoder_shapes(config, family, head, body, gamma)
        apply_fn = _encoder(config, family, head, body, attention, remat)
    missing = sorted(set(shapes) - set(files))
    unknown = sorted(
        name
        for name in set(files) - set(shapes)
        if name.startswith(body) and not re.search(_UNUSED, name)
    )
    if missing or unknown:
        raise ValueError(
            f"The weights in {folder} are not those of {family}{head} with this configuration: "
            f"missing are {missing[:5]} ({len(missing)}), unknown are {unknown[:5]} "
            f"({len(unknown)}). `architecture` reads a checkpoint as another one."
        )
    return Checkpoint(apply_fn, _read(folder, files, shapes, dtype), config)


# The families, the heads of each, and the rotary positions with what each must be told.
_DECODERS = ("Llama", "Qwen2", "Qwen3")
_ENCODERS = ("Bert", "Roberta", "XLMRoberta")
_SUPPORTED = {
    **{f"{f}{h}": (f, h) for f in _DECODERS for h in ("ForCausalLM",)},
    **{
        f"{f}{h}": (f, h)
        for f in _DECODERS + _ENCODERS
        for h in ("ForSequenceClassification", "Model")
    },
}
# Tensors in the body of some checkpoints that are no parameters, or that another head uses.
_UNUSED = r"rotary_emb\.inv_freq$|position_ids$|pooler\.dense\.(weight|bias)$|^(cls|lm_head)\."
_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
}


# --- files


def _architecture(config, name):
    if name is None:
        names = config.get("architectures") or []
        if len(names) != 1:
            raise ValueError(
                f"config.json names the architectures {names}: say which by `architecture`, one of "
                f"{', '.join(_SUPPORTED)}."
            )
        name = names[0]
    if name not in _SUPPORTED:
        raise ValueError(
            f"The architecture {name!r} is not supported. Supported are {', '.join(_SUPPORTED)}; "
            "`architecture` reads a checkpoint as one of them."
        )
    return _SUPPORTED[name]


def _safe_open(path):
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(
            "load reads weights by the package safetensors: pip install 'probbp[models]'."
        ) from error
    return safe_open(path, framework="flax")


def _files(folder):
    # The file of each tensor.
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        # Links are let be: Hugging Face's cache has its weights elsewhere. Names are the index's.
        strangers = sorted({file for file in files.values() if Path(file).name != file})
        if strangers:
            raise ValueError(
                f"The index in {folder} names {strangers[0]!r}, which is no file's name within it. "
                "Such a checkpoint is not read."
            )
        return files
    if single.is_file():
        with _safe_open(single) as tensors:
            return dict.fromkeys(tensors.keys(), single.name)
    raise FileNotFoundError(
        f"{folder} has neither model.safetensors nor model.safetensors.index.json. Weights in "
        "PyTorch's own format are not read: write them anew with `save_pretrained`."
    )


def _read(folder, files, shapes, dtype):
    params = {}
    for file in sorted({files[name] for name in shapes}):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} lacks {file}, which its index names.")
        with _safe_open(folder / file) as tensors:
            for name in shapes:
                if files[name] == file:
                    params[name] = tensors.get_tensor(name)
    for name, shape in shapes.items():
        array = params[name]
        if len(array.shape) != len(shape) or any(
            wanted not in (None, size) for wanted, size in zip(shape, array.shape, strict=True)
        ):
            raise ValueError(
                f"{name} has shape {array.shape}, where the configuration wants {shape}."
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} is {array.dtype}: quantised weights are not supported.")
        params[name] = array if dtype is None else array.astype(dtype)
    return {name: params[name] for name in shapes}


# --- Llama, Qwen2, Qwen3


def _sizes(config, family):
    width, num_heads = config["hidden_size"], config["num_attention_heads"]
    num_groups = config.get("num_key_value_heads") or num_heads
    if num_heads % num_groups:
        raise ValueError(
            f"num_attention_heads={num_heads} is not a multiple of "
            f"num_key_value_heads={num_groups}."
        )
    default = 128 if family == "Qwen3" else width // num_heads
    return num_heads, num_groups, config.get("head_dim") or default


def _is_tied(config):
    return config.get("tie_word_embeddings", False)


def _decoder_shapes(config, family, head, body):
    width, hidden = config["hidden_size"], config["intermediate_size"]
    num_heads, num_groups, head_dim = _sizes(config, family)
    shapes: dict[str, tuple[int | None, ...]] = {}
    shapes[f"{body}embed_tokens.weight"] = (config["vocab_size"], width)
    attention = {
        "q_proj": (num_heads * head_dim, width),
        "k_proj": (num_groups * head_dim, width),
        "v_proj": (num_groups * head_dim, width),
        "o_proj": (width, num_heads * head_dim),
    }
    mlp = {"gate_proj": (hidden, width), "up_proj": (hidden, width), "down_proj": (width, hidden)}
    # Qwen2 has biases by definition, though not of the output; elsewhere the configuration says so.
    if family == "Qwen2":
        biased = ("q_proj", "k_proj", "v_proj")
    else:
        biased = tuple(attention) if config.get("attention_bias") else ()
    if family == "Llama" and config.get("mlp_bias"):
        biased += tuple(mlp)
    for layer in range(config["num_hidden_layers"]):
        name = f"{body}layers.{layer}"
        for room, parts in (("self_attn", attention), ("mlp", mlp)):
            for part, shape in parts.items():
                shapes[f"{name}.{room}.{part}.weight"] = shape
                if part in biased:
                    shapes[f"{name}.{room}.{part}.bias"] = shape[:1]
        if family == "Qwen3":
            shapes[f"{name}.self_attn.q_norm.weight"] = (head_dim,)
            shapes[f"{name}.self_attn.k_norm.weight"] = (head_dim,)
        shapes[f"{name}.input_layernorm.weight"] = (width,)
        shapes[f"{name}.post_attention_layernorm.weight"] = (width,)
    shapes[f"{body}norm.weight"] = (width,)
    if head == "ForCausalLM" and not _is_tied(config):
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    if head == "ForSequenceClassification":
        shapes["score.weight"] = (None, width)
    return shapes


def _decoder(config, family, head, body, attention, remat):
    num_heads, num_groups, head_dim = _sizes(config, family)
    eps = config.get("rms_norm_eps", 1e-6)
    activation = _activation(config, "silu")
    rotary_tables = rotary(config, head_dim, longest=2048 if family == "Llama" else 32_768)
    windows = _windows(config, family)
    pad = config.get("pad_token_id")

    def layer(params, hidden, cos, sin, mask):
        def heads(name, num):
            x = _linear(params, f"self_attn.{name}_proj", normed)
            x = x.reshape(*x.shape[:-1], num, head_dim)
            scale = params.get(f"self_attn.{name}_norm.weight")
            return x if scale is None else _rms_norm(x, scale, eps)

        normed = _rms_norm(hidden, params["input_layernorm.weight"], eps)
        mixed = attention(
            rotate(heads("q", num_heads), cos, sin),
            rotate(heads("k", num_groups), cos, sin),
            heads("v", num_groups),
            mask=mask,
            is_causal=True,
        )
        mixed = mixed.reshape(*mixed.shape[:-2], num_heads * head_dim)
        hidden = hidden + _linear(params, "self_attn.o_proj", mixed)
        normed = _rms_norm(hidden, params["post_attention_layernorm.weight"], eps)
        gate = activation(_linear(params, "mlp.gate_proj", normed))
        return hidden + _linear(
            params, "mlp.down_proj", gate * _linear(params, "mlp.up_proj", normed)
        )

    layer = jax.checkpoint(layer) if remat else layer

    def apply_fn(
        params,
        input_ids,
        attention_mask=None,
        *,
        position_ids=None,
        output_hidden_states=False,
    ):
        input_ids, attention_mask, position_ids = _inputs(input_ids, attention_mask, position_ids)
        hidden = jnp.take(params[f"{body}embed_tokens.weight"], input_ids, axis=0)
        cos, sin = (table.astype(hidden.dtype) for table in rotary_tables(position_ids))
        states = [hidden]
        for index, window in enumerate(windows):
            mask = _mask(attention_mask, input_ids.shape[1], window)
            hidden = layer(_scope(params, f"{body}layers.{index}."), hidden, cos, sin, mask)
            states.append(hidden)
        hidden = _rms_norm(hidden, params[f"{body}norm.weight"], eps)
        states[-1] = hidden  # as transformers has it: after the norm
        if head == "ForSequenceClassification":
            last = _last(input_ids, attention_mask, pad)
            hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
            logits = _linear(params, "score", hidden)
        elif head == "ForCausalLM":
            name = f"{body}embed_tokens" if _is_tied(config) else "lm_head"
            logits = _linear(params, name, hidden)
        else:
            logits = hidden
        return _outputs(logits, states, output_hidden_states)

    return apply_fn


def _windows(config, family):
    # For each layer the width of the window that its tokens see, or None.
    num_layers = config["num_hidden_layers"]
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    if family == "Llama":
        return [None] * num_layers
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", 28)
        return [window if layer >= first else None for layer in range(num_layers)]
    windows = {"full_attention": None, "sliding_attention": window}
    unknown = set(kinds) - set(windows)
    if unknown or len(kinds) != num_layers or ("sliding_attention" in kinds and window is None):
        raise ValueError(
            f"layer_types={kinds} with use_sliding_window={config.get('use_sliding_window')} and "
            f"sliding_window={config.get('sliding_window')} for {num_layers} layers is not "
            f"supported: the types are {', '.join(windows)}, and the latter wants a window."
        )
    return [windows[kind] for kind in kinds]


def _last(input_ids, attention_mask, pad):
    # The last token of each sequence, padded on either side. PyTorch's models go by pad_token_id.
    if pad is not None:
        is_token = input_ids != pad
    elif attention_mask is not None:
        is_token = attention_mask
    else:
        is_token = jnp.ones(input_ids.shape, bool)
    return jnp.argmax(jnp.arange(input_ids.shape[1]) * is_token, axis=1)


# --- BERT, RoBERTa


def _encoder_shapes(config, family, head, body, gamma):
    width, hidden = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int | None, ...]] = {}

    def linear(name, num_out, num_in):
        shapes.update({f"{name}.weight": (num_out, num_in), f"{name}.bias": (num_out,)})

    def layer_norm(name):
        scale, shift = ("gamma", "beta") if gamma else ("weight", "bias")
        shapes.update({f"{name}.{scale}": (width,), f"{name}.{shift}": (width,)})

    name = f"{body}embeddings"
    shapes[f"{name}.word_embeddings.weight"] = (config["vocab_size"], width)
    shapes[f"{name}.position_embeddings.weight"] = (config["max_position_embeddings"], width)
    shapes[f"{name}.token_type_embeddings.weight"] = (config.get("type_vocab_size", 2), width)
    layer_norm(f"{name}.LayerNorm")
    for layer in range(config["num_hidden_layers"]):
        name = f"{body}encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            linear(f"{name}.attention.self.{part}", width, width)
        linear(f"{name}.attention.output.dense", width, width)
        layer_norm(f"{name}.attention.output.LayerNorm")
        linear(f"{name}.intermediate.dense", hidden, width)
        linear(f"{name}.output.dense", width, hidden)
        layer_norm(f"{name}.output.LayerNorm")
    if head == "ForSequenceClassification":
        if family == "Bert":
            linear(f"{body}pooler.dense", width, width)
            shapes.update({"classifier.weight": (None, width), "classifier.bias": (None,)})
        else:
            linear("classifier.dense", width, width)
            linear("classifier.out_proj", None, width)
    return shapes


def _encoder(config, family, head, body, attention, remat):
    num_heads = config["num_attention_heads"]
    if config["hidden_size"] % num_heads:
        raise ValueError(
            f"hidden_size={config['hidden_size']} is not a multiple of "
            f"num_attention_heads={num_heads}."
        )
    kind = config.get("position_embedding_type") or "absolute"
    if kind != "absolute" or config.get("is_decoder"):
        raise ValueError(
            f"position_embedding_type={kind!r} with is_decoder={config.get('is_decoder', False)} "
            "is not supported, only absolute positions in an encoder."
        )
    eps = config.get("layer_norm_eps", 1e-12)
    activation = _activation(config, "gelu")
    max_length = config["max_position_embeddings"]
    # RoBERTa counts from the token of padding, which itself has that position.
    pad = None if family == "Bert" else config.get("pad_token_id", 1)
    if pad is not None:
        max_length -= pad + 1

    def layer(params, hidden, mask):
        def heads(name):
            x = _linear(params, f"attention.self.{name}", hidden)
            return x.reshape(*x.shape[:-1], num_heads, -1)

        mixed = attention(heads("query"), heads("key"), heads("value"), mask=mask, is_causal=False)
        mixed = _linear(params, "attention.output.dense", mixed.reshape(hidden.shape))
        hidden = _layer_norm(params, "attention.output.LayerNorm", hidden + mixed, eps)
        inner = activation(_linear(params, "intermediate.dense", hidden))
        inner = _linear(params, "output.dense", inner)
        return _layer_norm(params, "output.LayerNorm", hidden + inner, eps)

    layer = jax.checkpoint(layer) if remat else layer

    def apply_fn(
        params,
        input_ids,
        attention_mask=None,
        *,
        token_type_ids=None,
        position_ids=None,
        output_hidden_states=False,
    ):
        given = position_ids
        input_ids, attention_mask, position_ids = _inputs(input_ids, attention_mask, position_ids)
        if given is None and input_ids.shape[1] > max_length:
            raise ValueError(
                f"A sequence of {input_ids.shape[1]} is longer than the {max_length} positions "
                "that the network has."
            )
        if given is None and pad is not None:
            is_token = (input_ids != pad).astype(jnp.int32)
            position_ids = jnp.cumsum(is_token, axis=1) * is_token + pad
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        embeddings = _scope(params, f"{body}embeddings.")
        hidden = sum(
            jnp.take(embeddings[f"{name}_embeddings.weight"], ids, axis=0)
            for name, ids in (
                ("word", input_ids),
                ("token_type", token_type_ids),
                ("position", position_ids),
            )
        )
        hidden = _layer_norm(embeddings, "LayerNorm", hidden, eps)
        states = [hidden]
        mask = _mask(attention_mask, input_ids.shape[1], None)
        for index in range(config["num_hidden_layers"]):
            hidden = layer(_scope(params, f"{body}encoder.layer.{index}."), hidden, mask)
            states.append(hidden)
        if head == "Model":
            logits = hidden
        else:
            dense, out = (f"{body}pooler.dense", "classifier")
            if family != "Bert":
                dense, out = "classifier.dense", "classifier.out_proj"
            logits = _linear(params, out, jnp.tanh(_linear(params, dense, hidden[:, 0])))
        return _outputs(logits, states, output_hidden_states)

    return apply_fn


# --- what both are made of


def _activation(config, default):
    name = config.get("hidden_act", default)
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"hidden_act={name!r} is not supported. Supported are {', '.join(_ACTIVATIONS)}."
        )
    return _ACTIVATIONS[name]


def _inputs(input_ids, attention_mask, position_ids):
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


def _mask(attention_mask, time, window):
    mask = None if attention_mask is None else attention_mask[:, None, None, :]
    if window is not None and window < time:
        distance = jnp.arange(time)[:, None] - jnp.arange(time)
        near = (distance < window)[None, None]
        mask = near if mask is None else mask & near
    return mask


def _outputs(logits, states, output_hidden_states):
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return (logits, tuple(states)) if output_hidden_states else logits


def _scope(params, prefix):
    # A layer is handed its own parameters only, so that recomputing it holds no others.
    return {
        name.removeprefix(prefix): value
        for name, value in params.items()
        if name.startswith(prefix)
    }


def _linear(params, name, x):
    # One product that contracts the second axis of (out, in), without a transpose: a low-rank or
    # quantised array in place of the weight needs a rule for this alone.
    weight = params[f"{name}.weight"].astype(x.dtype)
    x = jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))
    bias = params.get(f"{name}.bias")
    return x if bias is None else x + bias.astype(x.dtype)


def _rms_norm(x, scale, eps):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    return scale.astype(x.dtype) * wide.astype(x.dtype)


def _layer_norm(params, name, x, eps):
    scale, shift = (
        params[f"{name}.{new}"] if f"{name}.{new}" in params else params[f"{name}.{old}"]
        for new, old in (("weight", "gamma"), ("bias", "beta"))
    )
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * scale.astype(x.dtype) + shift.astype(x.dtype)
