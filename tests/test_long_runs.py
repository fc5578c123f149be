"""One set of laws for all that runs long: `sample`, `checkpointed_scan`, `train`, `tune`, `grow`.

What the state of each is, and what else it refuses, is in the tests of its own room.
"""

import errno
import re
import shutil
from contextlib import contextmanager
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cheap import key_of
from flax import nnx
from test_growth import scripted

import probbp
from probbp.models import diffusion, growth
from probbp.ops import sdo
from probbp.runs import checkpoints

ROWS = np.random.default_rng(0).normal(size=(64, 2))
STATES = "states"


def sample(key, folder):
    data = probbp.sample(
        key_of(key),
        partial(probbp.mala, lambda x: -0.5 * jnp.sum(x**2)),
        jnp.zeros(2),
        num_warmup=3,
        num_samples=12,
        every=4,
        num_chains=2,
        metric=None,
        checkpoint=folder,
        progress_bar=False,
    )
    return data.posterior["x"].values, data.sample_stats["lp"].values


def scan(key, folder):
    def step(carry, _):
        carry, now = jax.random.split(carry)
        return carry, jax.random.normal(now)

    options = {"every": 2, "checkpoint": folder, "progress_bar": False}
    return probbp.checkpointed_scan(step, key_of(key), 6, **options)[1]


def network():
    return diffusion.Denoiser((2,), width=8, num_blocks=1, rngs=nnx.Rngs(0))


def train(key, folder):
    options = {"num_steps": 6, "every": 2, "batch_size": 8, "checkpoint": folder}
    options |= {"optimiser": optax.adam(1e-3), "progress_bar": False}
    return diffusion.train(key_of(key), network(), ROWS, sdo.linear(8), **options).losses


def tune(key, folder):
    reward = lambda x: jnp.mean((x - 1.0) ** 2)
    options = {"num_steps": 3, "every": 1, "checkpoint": folder, "progress_bar": False}
    return diffusion.tune(key_of(key), network(), reward, (2,), sdo.linear(4), **options).losses


def grow(key, folder):
    host = scripted([[1, 2, 3], [2, 4, 5], [3, 6, 7]])
    options = {"patience": 2, "max_sets": 2, "checkpoint": folder, "progress_bar": False}
    result = growth.grow(key_of(key), host, **options)
    return result.params, result.dendrites


USERS = {run.__name__: run for run in (sample, scan, train, tune, grow)}


def users(quick):
    """Return a mark that runs a test over all users, in `make test` over `quick` alone."""
    marks = lambda name: () if name in quick else pytest.mark.slow
    return pytest.mark.parametrize(
        "run", [pytest.param(run, id=name, marks=marks(name)) for name, run in USERS.items()]
    )


@cache
def whole(run):
    """What nothing interrupts, and no folder has seen."""
    return run(0, None)


def same(one, other):
    for left, right in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_array_equal(left, right)


@contextmanager
def at_save(monkeypatch, act):
    """Have `act(number)` called after each state that is saved."""
    saver = checkpoints.saver
    number = iter(range(1, 1000))

    @contextmanager
    def noting(*args):
        with saver(*args) as save:

            def save_and_act(*state):
                save(*state)
                act(next(number))

            yield save_and_act

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "saver", noting)
        yield


def after(num, error):
    def act(number):
        if number == num:
            raise error

    return act


@users(quick=["sample", "train", "grow"])
def test_what_was_interrupted_goes_on_to_the_bit(run, tmp_path, monkeypatch):
    words = re.escape(f"Interrupted: the same call goes on from the last state in {tmp_path}")
    words = words.replace("state\\ in", "state\\ that\\ was\\ saved\\ in")
    for num in (2, 1):
        with at_save(monkeypatch, after(num, KeyboardInterrupt())):
            with pytest.raises(KeyboardInterrupt, match=words):
                run(0, tmp_path / "run")
    same(run(0, tmp_path / "run"), whole(run))
    saved = []
    with at_save(monkeypatch, saved.append):
        same(run(0, tmp_path / "run"), whole(run))
    assert not saved  # what is done is read


@users(quick=["scan", "grow"])
def test_a_full_disk_is_one_sentence_and_room_makes_it_go_on(run, tmp_path, monkeypatch):
    with at_save(monkeypatch, after(2, OSError(errno.ENOSPC, "No space left on device"))):
        with pytest.raises(OSError, match="No space is left .* make room, and the same call"):
            run(0, tmp_path / "run")
    same(run(0, tmp_path / "run"), whole(run))


@users(quick=["scan", "tune", "grow"])
def test_another_key_is_another_run(run, tmp_path):
    run(0, tmp_path / "run")
    with pytest.raises(ValueError, match="of another run. What differs: .*key and start"):
        run(1, tmp_path / "run")


# Of several arrays that can't be read TensorStore tells the others after Orbax has gone on.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@users(quick=["scan", "grow"])
def test_a_state_that_is_cut_or_flipped_is_told_from_the_one_before(run, tmp_path, monkeypatch):
    with at_save(monkeypatch, after(2, KeyboardInterrupt())), pytest.raises(KeyboardInterrupt):
        run(0, tmp_path / "run")
    for damage in (cut, flip):
        folder = tmp_path / damage.__name__
        shutil.copytree(tmp_path / "run", folder)
        newest = max((folder / STATES).iterdir(), key=lambda path: int(path.name))
        damage(newest)
        with pytest.warns(UserWarning, match="is damaged. The run goes on from step"):
            same(run(0, folder), whole(run))


def files_of(state):
    """Return the files that hold numbers, of which some are no longer read."""
    return [path for path in (state / "arrays").rglob("d/*") if path.is_file()]


def cut(state):
    for path in files_of(state):
        path.write_bytes(path.read_bytes()[:-20])


def flip(state):
    for path in files_of(state):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@users(quick=list(USERS))
def test_a_folder_of_something_else_is_left_alone(run, tmp_path):
    note = tmp_path / "run" / "notes.txt"
    note.parent.mkdir()
    note.write_text("mine")
    with pytest.raises(ValueError, match="it holds 'notes.txt'"):
        run(0, tmp_path / "run")
    assert note.read_text() == "mine"


@users(quick=["scan", "grow"])
def test_a_second_writer_is_told(run, tmp_path, monkeypatch):
    told = []

    def run_again(number):
        if number == 1:
            with pytest.raises(BlockingIOError, match="Another run writes to") as caught:
                run(0, tmp_path / "run")
            told.append(caught)

    with at_save(monkeypatch, run_again):
        same(run(0, tmp_path / "run"), whole(run))
    assert told
