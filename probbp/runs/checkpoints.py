"""A run's state on disk: Orbax checkpoints that are whole or not there, told from damaged ones.

No code is stored and none is executed: arrays go through TensorStore, the rest through JSON.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probbp.runs.devices import Devices
from probbp.runs.fingerprints import ORDER, hash_array, same_run
from probbp.types import Tree

if sys.platform != "win32":
    import fcntl

LOCK = ".lock"
"""What the name of a lock ends with."""

STATES = "states"
"""The folder of the states, in the folder of a run."""

PARTS = ("arrays", "rest", "commit_success.txt")
"""What the folder of a state holds, but for Orbax's own files, whose names begin with _."""


class Found(NamedTuple):
    """A state that was on disk.

    Attributes:
        done: how many steps the run had made.
        state: the state, NumPy arrays and keys.
        note: what was saved with it beside the arrays.
    """

    done: int
    state: Tree
    note: Any


def newest(
    folder: str | os.PathLike[str],
    prints: dict[str, str],
    like: Callable[[int, Any], Tree],
    others: tuple[str, ...] = (),
) -> Found | None:
    """Return the newest state that is intact, or `None` where the run has not begun.

    Args:
        folder: of the run.
        prints: of the run, by `fingerprint`.
        like: steps that were made, and the note, to the shapes of the state.
        others: how the names of what else may lie in the folder begin.

    Raises:
        ImportError: without Orbax.
        ValueError: where the folder is not a run's, is another run's, holds a link out of itself,
            or no state in it is intact.

    Warns:
        UserWarning: where a newer state was damaged, and where the program adds in another order.
    """
    folder = Path(folder)
    if not folder.exists():
        return None
    check_inside(folder)
    strangers = _strangers(folder, others)
    if strangers:
        raise ValueError(
            f"{folder} is no checkpoint of this function: it holds {min(strangers)!r}. Name a "
            "folder that is not there yet."
        )
    damage = {}
    with _manager(folder) as manager:
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                rest = _read_rest(manager, step)
            except Exception as error:  # whatever Orbax and TensorStore say of damaged files
                damage[step] = error
                continue
            if not same_run(rest["prints"], prints):
                raise ValueError(_words_of_difference(folder, rest["prints"], prints))
            try:
                state = _read_arrays(manager, step, rest, like(rest["done"], rest["note"]))
            except Exception as error:
                damage[step] = error
                continue
            if damage:
                warnings.warn(
                    f"The newest checkpoint in {folder}, after {max(damage)} steps, is damaged. "
                    f"The run goes on from step {step}, and gives what it would have given.",
                    stacklevel=3,
                )
            if rest["prints"] != prints:
                warnings.warn(
                    f"The program that goes on from {folder} adds in another order than the one "
                    "that wrote it: the results will be the same to rounding, not bit for bit. "
                    "NumPyro's ELBO adds in the order of a Python set: set the environment "
                    "variable PYTHONHASHSEED.",
                    stacklevel=3,
                )
            return Found(rest["done"], state, rest["note"])
    if damage:
        step, error = max(damage.items())
        raise ValueError(
            f"No checkpoint in {folder} is intact. The newest, after {step} steps, says: "
            f"{type(error).__name__}: {str(error)[:200]}. Remove the folder to start from scratch."
        ) from error
    return None


@contextmanager
def only_writer(
    folder: str | os.PathLike[str], on: Devices, is_beside: bool = False
) -> Iterator[None]:
    """Hold a folder for this run alone, as long as the process lives and the context lasts.

    By a lock on a file, which the system takes back from a process that is killed. The file is
    removed at the end; one that a killed process left behind holds nothing. Windows has no such
    locks, and nothing is held there. Processes that don't write wait for the one that does: what it
    makes or finds in the folder, they all find.

    Args:
        folder: of the run.
        on: the devices; one process writes.
        is_beside: whether the file lies beside the folder, which may not be there yet, or in it.

    Raises:
        BlockingIOError: where another run has it.
    """
    if sys.platform == "win32" or not on.writes:
        on.wait("probbp writer")
        yield
        return
    path = Path(f"{os.path.realpath(folder)}{LOCK}" if is_beside else Path(folder, STATES + LOCK))
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _locked(path)
    if file is None:
        raise BlockingIOError(
            errno.EWOULDBLOCK,
            f"Another run writes to {folder} at this moment. Wait until it ends and make the same "
            "call again, or name a folder of its own",
        )
    try:
        on.wait("probbp writer")
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _locked(path):
    """Return the open file, locked, or `None` where another holds it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        # Whoever held it may have removed it since: then another file has its name.
        if os.fstat(file).st_nlink:
            return file
        os.close(file)


@contextmanager
def saver(folder: str | os.PathLike[str], prints: dict[str, str], found: Found | None, on: Devices):
    """Yield `save(done, state, note=None)`, which keeps the two newest states.

    A note is anything that JSON has. The state's leaves must be whole on each process. States on
    disk that are newer than `found` are damaged, and removed.
    """
    ocp = orbax()
    start = -1 if found is None else found.done
    if on.writes:
        for path in Path(folder, STATES).glob("*"):
            if path.name.isdigit() and int(path.name) > start:
                shutil.rmtree(path)
    on.wait("probbp checkpoints")
    with _manager(folder) as manager:

        def save(done, state, note=None):
            leaves = jax.tree.leaves(state)
            keys = {
                str(i): str(jax.random.key_impl(leaf))
                for i, leaf in enumerate(leaves)
                if _is_key(leaf)
            }
            arrays = {str(i): _as_numpy(leaf) for i, leaf in enumerate(leaves)}
            rest = {"done": done, "note": note, "keys": keys, "prints": prints}
            rest["arrays"] = _digest(arrays)
            rest["text"] = _digest_of_text(rest)
            # Orbax stores no array without entries: those are told by their shapes.
            arrays = {name: array for name, array in arrays.items() if array.size}
            manager.save(
                done,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(arrays), rest=ocp.args.JsonSave(rest)
                ),
                force=True,
            )

        yield save


def check_inside(folder: str | os.PathLike[str]) -> None:
    """Require that nothing in a folder is a link to what lies outside of it.

    Raises:
        ValueError: naming the first that is.
    """
    root = os.path.realpath(folder)
    for parent, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            if os.path.islink(path):
                target = os.path.realpath(path)
                if os.path.commonpath([root, target]) != root:
                    raise ValueError(
                        f"{path} is a link to {target}, outside of {folder}. Such a checkpoint is "
                        "not read: replace the link by what it stands for, if you trust it."
                    )


def orbax() -> Any:
    """Return the module `orbax.checkpoint`.

    Raises:
        ImportError: without the package, naming the extra that has it.
    """
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(
            "Checkpoints need the package orbax-checkpoint: pip install 'probbp[runs]'."
        ) from error
    return ocp


def _strangers(folder, others):
    """Return what no run of this room wrote: whoever goes on removes old states."""
    names = [entry.name for entry in folder.iterdir()]
    found = [name for name in names if not name.startswith((STATES, *others))]
    for state in sorted(path for path in (folder / STATES).glob("*") if path.name.isdigit()):
        within = [entry.name for entry in state.iterdir()] if state.is_dir() else [""]
        found += [
            f"{STATES}/{state.name}/{name}".removesuffix("/")
            for name in within
            if name not in PARTS and not name.startswith("_")
        ]
    return found


def _read_rest(manager, step):
    ocp = orbax()
    rest = manager.restore(step, args=ocp.args.Composite(rest=ocp.args.JsonRestore()))["rest"]
    if not isinstance(rest, dict) or rest.pop("text", None) != _digest_of_text(rest):
        raise ValueError("its text is not what was written")
    return rest


def _read_arrays(manager, step, rest, like):
    ocp = orbax()
    leaves, structure = jax.tree.flatten(like)
    plain = {
        str(i): jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        for i, leaf in enumerate(leaves)
    }
    arrays = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in plain.items()}
    targets = {name: array for name, array in arrays.items() if array.size}
    # Shapes first: Orbax would cut or pad arrays of another shape.
    stored = {k: tuple(v.shape) for k, v in manager.item_metadata(step)["arrays"].items()}
    if stored != {name: array.shape for name, array in targets.items()}:
        raise ValueError("its arrays have other shapes")
    args = ocp.args.Composite(arrays=ocp.args.StandardRestore(targets))
    arrays |= manager.restore(step, args=args)["arrays"]
    if _digest(arrays) != rest["arrays"]:
        raise ValueError("its bits are not those that were written")
    keys = rest["keys"]
    return jax.tree.unflatten(
        structure,
        [
            jax.random.wrap_key_data(array, impl=keys[name]) if name in keys else array
            for name, array in arrays.items()
        ],
    )


def _digest_of_text(rest):
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _digest(arrays):
    sha = hashlib.sha256()
    for name in sorted(arrays):
        hash_array(sha, arrays[name])
    return sha.hexdigest()


def _words_of_difference(folder, theirs, ours):
    names = sorted(
        name
        for name in theirs | ours
        if theirs.get(name) != ours.get(name) and not name.startswith(ORDER)
    )
    told = [
        f"{name} ({theirs[name]} there, {ours[name]} here)"
        if name in theirs and name in ours and len(theirs[name] + ours[name]) < 64
        else name
        for name in names
    ]
    return (
        f"The checkpoint in {folder} is of another run. What differs: {', '.join(told)}. Go on "
        "with what it was begun with, or name another folder."
    )


def _is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _as_numpy(leaf):
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


@contextmanager
def _manager(folder):
    ocp = orbax()
    handlers = {"arrays": ocp.StandardCheckpointHandler(), "rest": ocp.JsonCheckpointHandler()}
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    path = os.path.join(os.path.abspath(folder), STATES)
    with ocp.CheckpointManager(path, options=options, item_handlers=handlers) as manager:
        yield manager
