"""What a long run says at a bad end: interrupted, or on a full disk."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def resumable(
    checkpoint: str | os.PathLike[str] | None, stream: str | os.PathLike[str] | None = None
) -> Iterator[None]:
    """Tell an interrupt, and a disk that is full, in one sentence that says how to go on.

    Args:
        checkpoint: the folder of the run's state, if any.
        stream: the folder of the draws alone, if any.

    Raises:
        KeyboardInterrupt: for an interrupt, where there is a folder.
        OSError: where the disk is full.
    """
    folder = stream if checkpoint is None else checkpoint
    again = f"the same call goes on from the last state that was saved in {checkpoint}."
    if checkpoint is None:
        again = f"the same call starts {stream} from scratch; with checkpoint= it would go on."
    try:
        yield
    except KeyboardInterrupt:
        if folder is None:
            raise
        raise KeyboardInterrupt(f"Interrupted: {again}") from None
    except Exception as error:
        if folder is None or not _is_full(error):
            raise
        words = f"No space is left on the device of {folder}: make room, and {again}"
        raise OSError(errno.ENOSPC, words) from None


def _is_full(error: BaseException) -> bool:
    """Whether the operating system, or a storage library in its own words, says so."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    words = tuple(os.strerror(code) for code in codes)
    return getattr(error, "errno", None) in codes or any(word in str(error) for word in words)
