"""A folder of Hugging Face's to a function and its parameters."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from probbp.models.checkpoints import decoder, encoder
from probbp.models.checkpoints.configuration import check_config, check_num_layers, read_config
from probbp.models.checkpoints.files import read_tensors, tensor_files

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
        TypeError: for sizes in config.json that are no integers.
        ValueError: for what is not supported, an `architecture` of another family, and weights
            that do not fit the configuration.

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
    config = read_config(folder)
    family, head = _architecture(config, architecture)
    check_config(config, family)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ValueError(
            f"The weights are quantised ({method}), which is not supported. Take a checkpoint in "
            "float32, float16 or bfloat16."
        )
    files = tensor_files(folder)
    check_num_layers(config["num_hidden_layers"], files)
    body = {"Bert": "bert", "Roberta": "roberta", "XLMRoberta": "roberta"}.get(family, "model")
    # Saved without a head, the body is the whole, and names do not say its name.
    body = f"{body}." if any(name.startswith(f"{body}.") for name in files) else ""
    if family in _DECODERS:
        shapes = decoder.shapes(config, family, head, body)
        apply_fn = decoder.network(config, family, head, body, attention, remat)
    else:
        gamma = any(name.endswith("LayerNorm.gamma") for name in files)  # written before 2019
        shapes = encoder.shapes(config, family, head, body, gamma)
        apply_fn = encoder.network(config, family, head, body, attention, remat)
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
    return Checkpoint(apply_fn, read_tensors(folder, files, shapes, dtype), config)


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
