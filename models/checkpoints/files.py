"""Tensors in safetensors files, one or several with an index, by their names."""

import json
from pathlib import Path

import jax.numpy as jnp


def tensor_files(folder):
    """Return the file of each tensor, by name."""
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


def read_tensors(folder, files, shapes, dtype):
    """Return the tensors as JAX arrays, by name; their shapes are checked."""
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


def _safe_open(path):
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(
            "load reads weights by the package safetensors: pip install 'probbp[models]'."
        ) from error
    return safe_open(path, framework="flax")
