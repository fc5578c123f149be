"""An adapter on disk: a file of safetensors, or a checkpoint of Orbax."""

import os
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from probbp.checks import check_choice
from probbp.models.blob.model import BayesianLora
from probbp.runs.checkpoints import check_inside, orbax


def save(
    lora: BayesianLora,
    params: Mapping[str, jax.Array],
    path: str | os.PathLike[str],
    *,
    format: Literal["safetensors", "orbax"] = "safetensors",
) -> None:
    """Write the adapter: M, G and B of each weight, without the network.

    Args:
        lora: from `bayesian_lora`.
        params: of SVI, or a posterior of both factors.
        path: where to: a file for "safetensors", a directory that is not there yet for "orbax".
        format: "safetensors", which PyTorch reads as well, or "orbax", JAX's own checkpoints.

    Raises:
        ImportError: without the package of that format.
        ValueError: where `params` are not those of `lora`, or for another format.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from probbp.models.blob import bayesian_lora
        >>> network, base = lambda params, x: x @ params["w"], {"w": jnp.zeros((4, 2))}
        >>> lora = bayesian_lora(network, base, target="w", example=(jnp.eye(4),), rank=2)
        >>> params = {"w_loc": jnp.zeros((2, 4)), "w_g": jnp.ones((2, 4)), "w_B": jnp.ones((2, 2))}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(lora, params, f"{folder}/adapter.safetensors")
        ...     sorted(load(lora, f"{folder}/adapter.safetensors"))
        ['w_B', 'w_g', 'w_loc']
    """
    check_choice("format", format, ("safetensors", "orbax"))
    _check_params(lora, {name: leaf.shape for name, leaf in params.items()}, "params")
    if format == "orbax":
        with _orbax() as (ocp, checkpointer):
            items = ocp.args.Composite(
                params=ocp.args.StandardSave({name: jnp.asarray(v) for name, v in params.items()}),
                options=ocp.args.JsonSave(_metadata(lora)),
            )
            checkpointer.save(os.path.abspath(path), items)
    else:
        arrays = {name: np.asarray(leaf) for name, leaf in params.items()}
        _safetensors().numpy.save_file(arrays, path, metadata=_metadata(lora))


def load(lora: BayesianLora, path: str | os.PathLike[str]) -> dict[str, jax.Array]:
    """Read an adapter that `save` wrote, as parameters of SVI (`init_params`) and `predict`.

    Args:
        lora: from `bayesian_lora`, for the same network and with the same options.
        path: where from. A directory is a checkpoint of Orbax, a file one of safetensors.

    Returns:
        Names to arrays, in the dtypes that `lora` gives its factors.

    Raises:
        ImportError: without the package of that format.
        ValueError: where the adapter is that of another network, rank, alpha or prior, and where
            the directory holds a link out of itself.
    """
    read = _load_orbax if os.path.isdir(path) else _load_safetensors
    arrays, metadata = read(lora, path)
    for name, value in _metadata(lora).items():
        if name in metadata and metadata[name] != value:
            raise ValueError(
                f"{path} was saved with {name} {metadata[name]}, and lora has {value}."
            )
    return {
        f"{name}_{part}": jnp.asarray(arrays[f"{name}_{part}"], dtype)
        for name, dtype in lora.dtypes.items()
        for part in ("loc", "g", "B", "B_g")
        if f"{name}_{part}" in arrays
    }


def _load_safetensors(lora, path):
    with _safetensors().safe_open(path, framework="numpy") as tensors:
        arrays = {name: tensors.get_tensor(name) for name in list(tensors.keys())}
        metadata = tensors.metadata() or {}
    _check_params(lora, {name: leaf.shape for name, leaf in arrays.items()}, str(path))
    return arrays, metadata


def _load_orbax(lora, path):
    path = os.path.abspath(path)
    if not os.path.isdir(os.path.join(path, "params")):
        raise ValueError(f"The directory {path} is not an adapter that save wrote.")
    check_inside(path)
    with _orbax() as (ocp, checkpointer):
        # Shapes first: Orbax would cut or pad arrays of another shape.
        stored = checkpointer.metadata(path).item_metadata["params"]
        _check_params(lora, {name: leaf.shape for name, leaf in stored.items()}, path)
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for name, leaf in stored.items()
        }
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(target), options=ocp.args.JsonRestore()
        )
        restored = checkpointer.restore(path, items)
    return restored["params"], restored["options"]


def _check_params(lora, shapes, where):
    expected = {}
    for name, layout in lora.layouts.items():
        expected[f"{name}_loc"] = expected[f"{name}_g"] = layout.shape_of_a(lora.rank)
        expected[f"{name}_B"] = layout.shape_of_b(lora.rank)
        if f"{name}_B_g" in shapes:
            expected[f"{name}_B_g"] = layout.shape_of_b(lora.rank)
    wrong = sorted(
        name for name in expected | shapes if tuple(shapes.get(name, ())) != expected.get(name)
    )
    if wrong:
        raise ValueError(
            f"{where} does not hold the factors of this network and rank. Missing, unknown or of "
            f"another shape: {wrong[:6]}."
        )


def _metadata(lora):
    return {
        "format": "probbp.models.blob",
        "scale": repr(float(lora.scale)),
        "prior_scale": repr(float(lora.prior_scale)),
    }


def _safetensors():
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "save and load need the package safetensors: pip install 'probbp[models]'."
        ) from error
    return safetensors


@contextmanager
def _orbax():
    ocp = orbax()
    handler = ocp.CompositeCheckpointHandler(
        params=ocp.StandardCheckpointHandler(), options=ocp.JsonCheckpointHandler()
    )
    with ocp.Checkpointer(handler) as checkpointer:
        yield ocp, checkpointer
