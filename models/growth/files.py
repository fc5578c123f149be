"""The state machine on disk: Orbax checkpoints, one a phase, of which the last is kept."""

import os

import jax
import jax.numpy as jnp
import numpy as np

from probbp.models.growth.machine import Event, Fit, Host, State
from probbp.models.saving import orbax

FITS = ("current", "best", "kept")


def is_there(folder: str | os.PathLike[str]) -> bool:
    """Return whether the folder holds a checkpoint."""
    with _manager(folder) as manager:
        return manager.latest_step() is not None


def save(folder: str | os.PathLike[str], state: State) -> None:
    """Write the state, and drop the one before."""
    ocp = orbax()
    fits = {name: getattr(state, name) for name in FITS}
    # Orbax stores no array without entries: those are told by their shapes.
    arrays = {
        f"{name}_{i}": leaf
        for name, fit in fits.items()
        for i, leaf in enumerate(jax.tree.leaves(fit))
        if np.size(leaf)
    }
    rest = {name: value for name, value in state._asdict().items() if name not in FITS}
    rest["history"] = [list(event) for event in state.history]
    rest["masks"] = {
        name: {layer: np.asarray(d.mask).tolist() for layer, d in fit.dendrites.items()}
        for name, fit in fits.items()
    }
    with _manager(folder) as manager:
        manager.save(
            state.step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(arrays), rest=ocp.args.JsonSave(rest)
            ),
        )


def restore(folder: str | os.PathLike[str], host: Host) -> State:
    """Read the last state that was written.

    Raises:
        ValueError: where it is that of another network.
    """
    ocp = orbax()
    with _manager(folder) as manager:
        step = manager.latest_step()
        args = ocp.args.Composite(rest=ocp.args.JsonRestore())
        rest = manager.restore(step, args=args)["rest"]
        templates = {name: host.like(masks) for name, masks in rest.pop("masks").items()}
        targets = {
            f"{name}_{i}": jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf))
            for name, fit in templates.items()
            for i, leaf in enumerate(jax.tree.leaves(fit))
            if np.size(leaf)
        }
        # Shapes first: Orbax would cut or pad arrays of another shape.
        stored = manager.item_metadata(step)["arrays"]
        if {k: tuple(v.shape) for k, v in stored.items()} != {
            k: v.shape for k, v in targets.items()
        }:
            raise ValueError(
                f"The checkpoint in {folder} is of another network or optimiser. Take another "
                "folder."
            )
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        targets = {
            name: jax.ShapeDtypeStruct(t.shape, t.dtype, sharding=sharding)
            for name, t in targets.items()
        }
        args = ocp.args.Composite(arrays=ocp.args.StandardRestore(targets))
        arrays = manager.restore(step, args=args)["arrays"]

    def filled(name, fit: Fit):
        leaves, tree = jax.tree.flatten(fit)
        return jax.tree.unflatten(
            tree, [arrays.get(f"{name}_{i}", leaf) for i, leaf in enumerate(leaves)]
        )

    fits = {name: filled(name, fit) for name, fit in templates.items()}
    history = tuple(Event(*event) for event in rest.pop("history"))
    return State(**fits, history=history, **rest)


def _manager(folder):
    ocp = orbax()
    handlers = {"arrays": ocp.StandardCheckpointHandler(), "rest": ocp.JsonCheckpointHandler()}
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager(os.path.abspath(folder), options=options, item_handlers=handlers)
