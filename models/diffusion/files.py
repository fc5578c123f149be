"""An optimisation on disk: Orbax checkpoints, of which the last is kept."""

import os
from typing import Any

import jax
import jax.numpy as jnp

from probbp.models.saving import orbax


def save(folder: str | os.PathLike[str], step: int, tree: Any) -> None:
    """Write a pytree of arrays, and drop the one before."""
    ocp = orbax()
    arrays = {f"{i}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}
    with _manager(folder) as manager:
        manager.save(step, args=ocp.args.StandardSave(arrays))


def restore(folder: str | os.PathLike[str], like: Any) -> tuple[int, Any]:
    """Return the last step that was written and its tree; 0 and `like` where there is none.

    Raises:
        ValueError: where it is that of another network, optimiser or number of steps.
    """
    ocp = orbax()
    leaves, structure = jax.tree.flatten(like)
    with _manager(folder) as manager:
        step = manager.latest_step()
        if step is None:
            return 0, like
        # Shapes first: Orbax would cut or pad arrays of another shape.
        stored = manager.item_metadata(step)
        there = {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in stored.items()}
        asked = {f"{i}": (jnp.shape(a), jnp.result_type(a)) for i, a in enumerate(leaves)}
        if there != asked:
            raise ValueError(
                f"The checkpoint in {folder} is of another network, optimiser or number of steps. "
                "Take another folder."
            )
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        targets = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            for name, (shape, dtype) in asked.items()
        }
        arrays = manager.restore(step, args=ocp.args.StandardRestore(targets))
    return step, jax.tree.unflatten(structure, [arrays[f"{i}"] for i in range(len(leaves))])


def _manager(folder):
    ocp = orbax()
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager(
        os.path.abspath(folder), options=options, item_handlers=ocp.StandardCheckpointHandler()
    )
