"""Draws that go to disk as they come: a Zarr store in the layout that xarray and ArviZ read.

The arrays are there in full from the start, and each flush fills one piece of them, so that a piece
may be written twice: a run that was killed between a flush and its checkpoint does just that. Each
piece bears a checksum (CRC-32C), which is verified whenever it is read, and has a seal, which is
verified where a run goes on.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from probbp.runs.checkpoints import check_inside
from probbp.runs.devices import Devices
from probbp.runs.fingerprints import hash_run, same_run
from probbp.samplers import seals
from probbp.samplers.progress import Moments, standard_deviation

GROUPS = ("posterior", "sample_stats")
UNFINISHED = ".partial-"
"""What the name of a store goes on with while it is made."""


class Stream(NamedTuple):
    """A store that is open.

    Attributes:
        write: `(start, variables) -> None`, with names to (chain, draw, ...) by group.
        note: `Moments -> None`, of the posterior's variables.
        read: `() -> ` the object of ArviZ, whose arrays are read from disk where they are used.
    """

    write: Callable[[int, dict[str, dict[str, np.ndarray]]], None]
    note: Callable[[Moments], None]
    read: Callable[[], Any]


def variables(data: Any) -> dict[str, dict[str, np.ndarray]]:
    """Return the arrays of an object of ArviZ, by group and name."""
    return {
        group: {str(name): array.values for name, array in data[group].data_vars.items()}
        for group in GROUPS
    }


def check_names(template: Any) -> None:
    """Require of variables names that a file may have.

    Args:
        template: an object of ArviZ with one draw of each chain.
    """
    for group in GROUPS:
        for name in template[group].data_vars:
            if not name or name in (".", "..", "zarr.json") or {"/", "\\", "\0"} & set(name):
                raise ValueError(
                    f"The variable {name!r} can't name an array on disk. Rename it: by "
                    "postprocess_fn, or in the position."
                )


def stream(
    path: str | os.PathLike[str],
    template: Any,
    num_draws: int,
    every: int,
    prints: dict[str, str],
    num_written: int,
    on: Devices,
) -> Stream:
    """Open the store of a run, and make it where it isn't there.

    Args:
        path: of the store, a folder.
        template: an object of ArviZ with one draw of each chain.
        num_draws: of each chain, in the end.
        every: draws of each chain in a piece.
        prints: of the run, by `fingerprint`.
        num_written: draws that the checkpoint, if any, has seen written.
        on: the devices; one process writes.

    Raises:
        ImportError: without Zarr.
        ValueError: where another run's store, or no store, is at the path, and where a piece is
            missing.
    """
    zarr, path = _zarr(), Path(path)
    run = hash_run(prints)
    if on.writes:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(path, prints)
        if not path.exists():
            _require_fresh(path, num_written)
            # Under a name that nobody has: it is there as a whole or not at all.
            new = path.with_name(f"{path.name}{UNFINISHED}{uuid.uuid4().hex}")
            _create(new, template, num_draws, every, prints)
            os.rename(new, path)
        _check(zarr, path, template, every, prints, num_written)
        root = zarr.open_group(path, mode="r+")
    on.wait("probbp stream")

    def write(start, data):
        if not on.writes:
            return
        # Zarr would leave out a piece that equals the fill value: no divergence, for instance.
        with zarr.config.set({"array.write_empty_chunks": True}):
            for group, arrays in data.items():
                for name, array in arrays.items():
                    root[group][name][:, start : start + array.shape[1]] = array
                    if array.size:
                        seals.put(seals.piece(path, root[group][name], start // every), run)

    def note(moments):
        if on.writes:
            for i, tree in enumerate((moments.mean, standard_deviation(moments))):
                for name, array in tree.items():
                    root["moments"][name][i] = array

    def read():
        on.wait("probbp draws")
        return _open(path, type(template))

    return Stream(write, note, read)


def _create(path, template, num_draws, every, prints):
    zarr = _zarr()
    zarr.create_group(path, attributes={"probbp": prints})
    for group in GROUPS:
        dataset = template[group]
        coords = {**dataset.coords, "draw": np.arange(num_draws)}
        _write_coords(path, group, coords, dataset.attrs)
        arrays = zarr.open_group(path, mode="r+")[group]
        for name, array in dataset.data_vars.items():
            num_chains, _, *rest = array.shape
            shape = (num_chains, num_draws, *rest)
            chunks = (num_chains, min(every, num_draws), *rest)
            _array(arrays, name, shape, chunks, array.dtype, array.dims)
    posterior = template["posterior"]
    coords = {name: value for name, value in posterior.coords.items() if name != "draw"}
    _write_coords(path, "moments", {"moment": ["mean", "sd"], **coords}, {})
    arrays = zarr.open_group(path, mode="r+")["moments"]
    for name, array in posterior.data_vars.items():
        num_chains, _, *rest = array.shape
        dims = ("moment", array.dims[0], *array.dims[2:])
        _array(arrays, name, (2, num_chains, *rest), (1, num_chains, *rest), np.float64, dims)
    zarr.open_group(path, mode="r+").attrs["digest"] = _digest(path, template)


def _digest(path, template):
    """Hash all that is written once: the layout and the coordinates, not the draws."""
    names = {str(name) for group in GROUPS for name in template[group].data_vars}
    sha = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        parts = file.relative_to(path).parts
        if (
            len(parts) > 1
            and file.is_file()
            and not (parts[1] in names and parts[2] in ("c", seals.FOLDER))
        ):
            sha.update("/".join(parts).encode() + b"\0" + file.read_bytes())
    return sha.hexdigest()


def _write_coords(path, group, coords, attrs):
    import xarray
    from zarr.codecs import Crc32cCodec

    dataset = xarray.Dataset(coords=coords, attrs=json.loads(json.dumps(dict(attrs), default=str)))
    for name, value in dataset.coords.items():
        if value.dtype.kind == "U":  # texts of one length have no place in Zarr's specification
            dataset = dataset.assign_coords({name: value.astype(object)})
    encoding = {name: {"compressors": [Crc32cCodec()]} for name in dataset.coords}
    dataset.to_zarr(
        path, group=group, mode="w", zarr_format=3, consolidated=False, encoding=encoding
    )


def _array(group, name, shape, chunks, dtype, dims):
    from zarr.codecs import Crc32cCodec

    group.create_array(
        name,
        shape=shape,
        # Zarr has no chunk of no entries.
        chunks=tuple(max(size, 1) for size in chunks),
        dtype=dtype,
        compressors=[Crc32cCodec()],
        # What isn't drawn yet is no number, where the type has one that is none.
        fill_value=np.nan if np.issubdtype(dtype, np.inexact) else np.zeros((), dtype)[()],
        dimension_names=dims,
    )


def _require_fresh(path, num_written):
    if num_written:
        raise ValueError(
            f"The checkpoint knows of {num_written} draws, and {path} is not there. Bring "
            "it back, or remove the checkpoint to start from scratch."
        )


def _check(zarr, path, template, every, prints, num_written):
    """Require the store that `_create` makes, and the pieces that the checkpoint has seen."""
    check_inside(path)
    try:
        root = zarr.open_group(path, mode="r")
        theirs, digest = (root.attrs.get(name) for name in ("probbp", "digest"))
    except Exception as error:
        raise ValueError(f"{path} is no Zarr store ({error}). Name another path.") from error
    if not isinstance(theirs, dict) or not same_run(theirs, prints):
        raise ValueError(
            f"{path} is not the store of this run. Name a path that is not there yet, or remove it."
        )
    if digest != _digest(path, template):
        raise ValueError(
            f"The layout of {path} is not what was written. Remove it, and its checkpoint if there "
            "is one, to start from scratch."
        )
    run, num_pieces = hash_run(prints), -(-num_written // every)
    for group in GROUPS:
        for name, array in template[group].data_vars.items():
            metadata = root[group][name].metadata
            # Whoever made it: a codec of others might run code (pickle does).
            if [codec["name"] for codec in metadata.to_dict()["codecs"]] != ["bytes", "crc32c"]:
                raise ValueError(f"{group}/{name} in {path} has codecs that are not ours.")
            if array.size:
                of_array = (seals.piece(path, root[group][name], i) for i in range(num_pieces))
                seals.check(path, f"{group}/{name}", list(of_array), run)


def _remove_unfinished(path, prints):
    """Remove what an earlier process of this run began to make: what says itself that it is that.

    Whatever else lies there, by whatever name, is left alone, and no link is followed.
    """
    for entry in os.scandir(path.parent):
        begins = entry.name.startswith(f"{path.name}{UNFINISHED}")
        if begins and entry.is_dir(follow_symlinks=False) and _is_of(Path(entry.path), prints):
            shutil.rmtree(entry.path)


def _is_of(folder, prints):
    marker = folder / "zarr.json"
    if marker.is_symlink() or not marker.is_file():
        return False
    try:
        theirs = json.loads(marker.read_text())["attributes"]["probbp"]
        return same_run(theirs, prints)
    except (ValueError, LookupError, TypeError):
        return False


def _open(path, container):
    import xarray

    groups = {
        group: xarray.open_zarr(path, group=group, chunks=None, consolidated=False)
        for group in (*GROUPS, "moments")
    }
    if issubclass(container, xarray.DataTree):
        return xarray.DataTree.from_dict(groups)
    return container(**groups)


def _zarr():
    try:
        import zarr
    except ImportError as error:
        raise ImportError(
            "Draws on disk need the package zarr: pip install 'probbp[runs]'."
        ) from error
    return zarr


def moments_like(template: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes (chain, ...) of the posterior's variables."""
    return {
        str(name): jax.ShapeDtypeStruct((array.shape[0], *array.shape[2:]), np.float64)
        for name, array in template["posterior"].data_vars.items()
    }
