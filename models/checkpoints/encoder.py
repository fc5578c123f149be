"""BERT and RoBERTa: the shapes of their tensors, and what they compute."""

import jax
import jax.numpy as jnp

from probbp.models.checkpoints import layers


def shapes(config, family, head, body, gamma):
    """Return the shape of each tensor, by name; None where any size will do."""
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


def network(config, family, head, body, attention, remat):
    """Return the apply function, as `load` describes it."""
    _check(config)
    num_heads = config["num_attention_heads"]
    eps = config.get("layer_norm_eps", 1e-12)
    activation = layers.activation(config, "gelu")
    max_length = config["max_position_embeddings"]
    # RoBERTa counts from the token of padding, which itself has that position.
    pad = None if family == "Bert" else config.get("pad_token_id", 1)
    if pad is not None:
        max_length -= pad + 1

    def layer(params, hidden, mask):
        def heads(name):
            x = layers.linear(params, f"attention.self.{name}", hidden)
            return x.reshape(*x.shape[:-1], num_heads, -1)

        mixed = attention(heads("query"), heads("key"), heads("value"), mask=mask, is_causal=False)
        mixed = layers.linear(params, "attention.output.dense", mixed.reshape(hidden.shape))
        hidden = layers.layer_norm(params, "attention.output.LayerNorm", hidden + mixed, eps)
        inner = activation(layers.linear(params, "intermediate.dense", hidden))
        inner = layers.linear(params, "output.dense", inner)
        return layers.layer_norm(params, "output.LayerNorm", hidden + inner, eps)

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
        input_ids, attention_mask, position_ids = layers.inputs(
            input_ids, attention_mask, position_ids
        )
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
        hidden = _embedded(
            layers.scope(params, f"{body}embeddings."),
            {"word": input_ids, "token_type": token_type_ids, "position": position_ids},
            eps,
        )
        states = [hidden]
        mask = layers.mask(attention_mask, input_ids.shape[1], None)
        for index in range(config["num_hidden_layers"]):
            hidden = layer(layers.scope(params, f"{body}encoder.layer.{index}."), hidden, mask)
            states.append(hidden)
        logits = hidden if head == "Model" else _classified(params, family, body, hidden[:, 0])
        return layers.outputs(logits, states, output_hidden_states)

    return apply_fn


def _check(config):
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


def _embedded(params, ids, eps):
    """Return the normalised sum of the embeddings of words, token types and positions."""
    hidden = sum(
        jnp.take(params[f"{name}_embeddings.weight"], each, axis=0) for name, each in ids.items()
    )
    return layers.layer_norm(params, "LayerNorm", hidden, eps)


def _classified(params, family, body, first):
    """Return the logits of classes from the first token's state."""
    dense, out = "classifier.dense", "classifier.out_proj"
    if family == "Bert":
        dense, out = f"{body}pooler.dense", "classifier"
    return layers.linear(params, out, jnp.tanh(layers.linear(params, dense, first)))
