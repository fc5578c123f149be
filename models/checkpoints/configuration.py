"""A checkpoint's config.json: read, and held against what is to be made of it."""

import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from probbp.checks import check_count, check_number

# What a configuration calls the families.
_FAMILIES = {
    "llama": ("Llama",),
    "qwen2": ("Qwen2",),
    "qwen3": ("Qwen3",),
    "bert": ("Bert",),
    "roberta": ("Roberta", "XLMRoberta"),
    "xlm-roberta": ("Roberta", "XLMRoberta"),
}
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
_POSITIVE = ("rms_norm_eps", "layer_norm_eps", "rope_theta")
_OPTIONAL = ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration in a folder, or say what is wrong with the file."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. Download it again.") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{path} holds a {type(config).__name__}, not an object with the sizes of a network. "
            "Take the config.json that `save_pretrained` writes."
        )
    return config


def check_config(config: dict[str, Any], family: str) -> None:
    """Require a configuration of this family, with sizes that are integers.

    Warns:
        UserWarning: for a `model_type` that is none of ours, whose tensors may fit all the same.
    """
    model_type = config.get("model_type")
    families = _FAMILIES.get(model_type or "", (family,))
    if model_type and model_type not in _FAMILIES:
        warnings.warn(
            f"config.json has model_type={model_type!r}, which is none of {', '.join(_FAMILIES)}: "
            f"it is computed as {family}, whatever else its authors' code does with such tensors. "
            "Compare logits with theirs before you use it, or remove model_type from config.json.",
            stacklevel=3,
        )
    if family not in families:
        raise ValueError(
            f"The checkpoint has model_type={config['model_type']!r}, and {family} computes "
            f"something else from the same tensors. Take an architecture of {families[0]}."
        )
    needed = _SIZES + (("max_position_embeddings",) if "bert" in family.lower() else ())
    if missing := [name for name in (*needed, "num_hidden_layers") if name not in config]:
        raise ValueError(f"config.json lacks {', '.join(missing)}, which {family} needs.")
    for name in needed:
        check_count(f"{name} in config.json", config[name])
    check_count("num_hidden_layers in config.json", config["num_hidden_layers"], 0)
    for name in _OPTIONAL:
        if config.get(name) is not None:
            check_count(f"{name} in config.json", config[name])
    for name in _POSITIVE:
        if config.get(name) is not None:
            check_number(f"{name} in config.json", config[name], "(0, inf)")


def check_num_layers(num_layers: int, names: Iterable[str]) -> None:
    """Require as many layers as the files have, before their shapes are written down."""
    found = {int(n) for name in names for n in re.findall(r"(?:^|\.)layers?\.(\d+)\.", name)}
    if num_layers > len(found):
        raise ValueError(
            f"num_hidden_layers={num_layers} in config.json, and the files have tensors of "
            f"{len(found)} layers. The configuration is another checkpoint's, or a file is missing."
        )
