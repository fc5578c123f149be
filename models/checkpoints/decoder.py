"""Llama, Qwen2 and Qwen3: the shapes of their tensors, and what they compute."""

import jax
import jax.numpy as jnp

from probbp.models.checkpoints import layers
from probbp.models.rotary import rotary, rotate


def shapes(config, family, head, body):
    """Return the shape of each tensor, by name; None where any size will do."""
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


def network(config, family, head, body, attention, remat):
    """Return the apply function, as `load` describes it."""
    num_heads, num_groups, head_dim = _sizes(config, family)
    eps = config.get("rms_norm_eps", 1e-6)
    activation = layers.activation(config, "silu")
    rotary_tables = rotary(config, head_dim, longest=2048 if family == "Llama" else 32_768)
    windows = _windows(config, family)
    pad = config.get("pad_token_id")

    def layer(params, hidden, cos, sin, mask):
        def heads(name, num):
            x = layers.linear(params, f"self_attn.{name}_proj", normed)
            x = x.reshape(*x.shape[:-1], num, head_dim)
            scale = params.get(f"self_attn.{name}_norm.weight")
            return x if scale is None else layers.rms_norm(x, scale, eps)

        normed = layers.rms_norm(hidden, params["input_layernorm.weight"], eps)
        mixed = attention(
            rotate(heads("q", num_heads), cos, sin),
            rotate(heads("k", num_groups), cos, sin),
            heads("v", num_groups),
            mask=mask,
            is_causal=True,
        )
        mixed = mixed.reshape(*mixed.shape[:-2], num_heads * head_dim)
        hidden = hidden + layers.linear(params, "self_attn.o_proj", mixed)
        normed = layers.rms_norm(hidden, params["post_attention_layernorm.weight"], eps)
        gate = activation(layers.linear(params, "mlp.gate_proj", normed))
        return hidden + layers.linear(
            params, "mlp.down_proj", gate * layers.linear(params, "mlp.up_proj", normed)
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
        input_ids, attention_mask, position_ids = layers.inputs(
            input_ids, attention_mask, position_ids
        )
        hidden = jnp.take(params[f"{body}embed_tokens.weight"], input_ids, axis=0)
        cos, sin = (table.astype(hidden.dtype) for table in rotary_tables(position_ids))
        states = [hidden]
        for index, window in enumerate(windows):
            mask = layers.mask(attention_mask, input_ids.shape[1], window)
            hidden = layer(layers.scope(params, f"{body}layers.{index}."), hidden, cos, sin, mask)
            states.append(hidden)
        hidden = layers.rms_norm(hidden, params[f"{body}norm.weight"], eps)
        states[-1] = hidden  # as transformers has it: after the norm
        if head == "ForSequenceClassification":
            last = _last(input_ids, attention_mask, pad)
            hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
            logits = layers.linear(params, "score", hidden)
        elif head == "ForCausalLM":
            name = f"{body}embed_tokens" if _is_tied(config) else "lm_head"
            logits = layers.linear(params, name, hidden)
        else:
            logits = hidden
        return layers.outputs(logits, states, output_hidden_states)

    return apply_fn


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
