"""Seals of pieces of draws: a hash of the run, the piece's place and its bytes, in a file beside.

A checksum within a piece tells that it is whole; its seal tells that this run wrote it there, and
not another run, or the same run elsewhere.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = "seals"
"""The folder of an array's seals, within the array, where readers of Zarr do not look."""


class Piece(NamedTuple):
    """A file of draws of one variable.

    Attributes:
        place: the variable, and where its draws are.
        file: with the draws.
        seal: the file with its seal.
    """

    place: str
    file: Path
    seal: Path


def piece(store: Path, array: Any, index: int) -> Piece:
    """Return a piece of an array of Zarr.

    Args:
        store: the folder of the store.
        array: (chain, draw, ...), in pieces along its draws.
        index: of the piece.
    """
    key = array.metadata.encode_chunk_key((0, index, *(0,) * (array.ndim - 2)))
    folder = store / array.path
    return Piece(f"{array.path}/{key}", folder / key, folder / FOLDER / str(index))


def put(piece: Piece, run: str) -> None:
    """Seal a piece that was written, for a run by its hash."""
    piece.seal.parent.mkdir(exist_ok=True)
    new = piece.seal.with_suffix(".new")
    new.write_text(_seal(piece, run))
    os.replace(new, piece.seal)


def check(store: Path, name: str, pieces: list[Piece], run: str) -> None:
    """Require that all pieces of a variable are there, as the run wrote them.

    Raises:
        ValueError: naming the pieces that are lost, or the first that is another.
    """
    lost = [piece for piece in pieces if not piece.file.is_file()]
    if lost:
        raise ValueError(
            f"{store} lacks {len(lost)} of the {len(pieces)} pieces of {name} that the checkpoint "
            "knows of. Bring them back, or remove both to start from scratch."
        )
    for piece in pieces:
        if not piece.seal.is_file() or piece.seal.read_text() != _seal(piece, run):
            raise ValueError(
                f"{piece.file} is not what this run wrote there: it is damaged, or of another run "
                "or another place. Bring back the file and its seal, or remove the store and its "
                "checkpoint to start from scratch."
            )


def _seal(piece, run):
    sha = hashlib.sha256(f"{run}\0{piece.place}\0".encode())
    with piece.file.open("rb") as file:
        while block := file.read(2**20):
            sha.update(block)
    return sha.hexdigest()
