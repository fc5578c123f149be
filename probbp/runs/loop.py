"""The loop of a long run on the host: where it stands, what it shows, and what it saves.

Between two returns to the host a stretch of steps runs compiled. What the steps are is the
caller's.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from probbp.runs import checkpoints
from probbp.runs.devices import Devices, devices
from probbp.runs.endings import resumable
from probbp.types import Tree

NUM_UPDATES = 40
"""How often a run comes back to the host: for the progress bar, and to free the device."""


class Loop(NamedTuple):
    """A run that is open.

    Attributes:
        done: how many steps it had made when it was opened.
        state: as it was saved then, on the host; `None` where the run begins.
        note: what was saved beside the state.
        bar: of tqdm.
        save: `(done, state, note) -> None`; `None` where nothing is saved.
    """

    done: int
    state: Tree | None
    note: Any
    bar: Any
    save: Callable[[int, Tree, Any], None] | None

    def stretches(self, every: int, end: int, begin: int = 0) -> Iterator[tuple[int, int]]:
        """Yield where each stretch begins, and its length, from where the run stands to `end`."""
        for start in range(max(self.done, begin), end, max(every, 1)):
            yield start, min(every, end - start)

    def show(self, num_steps: int, words: str) -> None:
        """Move the bar on, with words beside it."""
        self.bar.set_postfix_str(words, False)
        self.bar.update(num_steps)

    def keep(self, done: int, state: Callable[[], Tree], note: Any = None) -> None:
        """Save a state, which is asked for only where it is saved."""
        if self.save is not None:
            self.save(done, state(), note)


@contextmanager
def opened(
    total: int | None,
    *,
    checkpoint: str | os.PathLike[str] | None,
    prints: Callable[[], dict[str, str]],
    like: Callable[[int, Any], Tree],
    stream: str | os.PathLike[str] | None = None,
    others: tuple[str, ...] = (),
    on: Devices | None = None,
    title: str | None = None,
    unit: str = "it",
    progress_bar: bool = True,
) -> Iterator[Loop]:
    """Open a run: where its checkpoint has a state, it goes on from there.

    An interrupt and a full disk are told in one sentence, which says how to go on.

    Args:
        total: number of steps, `None` where nobody knows.
        checkpoint: the folder of the run, made where it is not there; `None` to save nothing.
        prints: the run's fingerprint, asked for only with a checkpoint.
        like: steps that were made, and the note, to the shapes of the state.
        stream: a folder that the run writes besides, if any.
        others: how the names of what else may lie in the checkpoint's folder begin.
        on: the devices; one process writes, and shows the bar.
        title: of the bar.
        unit: of the bar's count.
        progress_bar: whether to show one.

    Raises:
        ImportError: for a checkpoint without Orbax.
        OSError: for a folder to which another run writes at this moment, and for a full disk.
        ValueError: for a checkpoint that is damaged or another run's.
    """
    on = devices(None, 1) if on is None else on
    with ExitStack() as stack:
        stack.enter_context(resumable(checkpoint, stream))
        found = save = None
        if stream is not None:
            stack.enter_context(checkpoints.only_writer(stream, on, is_beside=True))
        if checkpoint is not None:
            stack.enter_context(checkpoints.only_writer(checkpoint, on))
            ours = prints()
            found = checkpoints.newest(checkpoint, ours, like, others)
            save = stack.enter_context(checkpoints.saver(checkpoint, ours, found, on))
        done, state, note = (0, None, None) if found is None else found
        bar = tqdm(
            total=total,
            initial=0 if total is None else done,
            disable=not (progress_bar and on.writes),
            desc=title,
            unit=unit,
        )
        yield Loop(done, state, note, stack.enter_context(bar), save)
