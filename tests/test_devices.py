"""The same draws on one device, on several, and from two and four processes."""

import os
import shutil
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from threading import Barrier, Thread

import jax
import jax.numpy as jnp
import many_devices
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import probbp
from probbp.runs import checkpoints
from probbp.runs.devices import devices
from probbp.samplers.programs import step_keys

SCRIPT = Path(many_devices.__file__)


@cache
def draw(num_warmup):
    return many_devices.draw(num_warmup=num_warmup)


def close(theirs, ours):
    for one, other in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-8)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """What the processes share: the programs, and how they are compiled."""
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONWARNINGS": "error",
    }


def run(file, environment, num_processes, *options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, SCRIPT, file, *options, "--of", num_processes, "--port", port]
    processes = [
        subprocess.Popen(
            [*map(str, command), "--process", str(i)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(num_processes)
    ]
    try:
        for process in processes:
            said, _ = process.communicate(timeout=300)
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    with np.load(file) as result:
        return result["beta"], result["lp"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_processes", "options"),
    [
        (2, ["--devices", 2, "--mesh", 4]),
        (4, ["--devices", 1, "--mesh", 2, 2]),
    ],
    ids=["two, with two devices each", "four, chains and rows split"],
)
def test_processes(num_processes, options, environment, tmp_path):
    """Equal to rounding: XLA adds in another order, which 24 steps don't let grow far."""
    folder = tmp_path / "run"
    options = [*options, "--num_warmup", 0]
    if num_processes == 2:
        options += ["--checkpoint", folder]
    close(run(tmp_path / "draws.npz", environment, num_processes, *options), draw(0))
    if num_processes == 2:
        # From what two processes have written, one goes on without a mesh.
        states = folder / checkpoints.STATES
        shutil.rmtree(max(states.iterdir(), key=lambda path: int(path.name)))
        close(many_devices.draw(checkpoint=folder, num_warmup=0), draw(0))


def test_who_does_not_write_waits_for_the_writer(tmp_path):
    """Else one process finds no folder, and the other one finds it."""
    together, found = Barrier(2), []
    on = devices(None, 1)._replace(wait=lambda _: together.wait(30))

    def other():
        with checkpoints.only_writer(tmp_path / "run", on._replace(writes=False)):
            found.append((tmp_path / "run").exists())

    thread = Thread(target=other)
    thread.start()
    time.sleep(0.2)
    assert not found
    with checkpoints.only_writer(tmp_path / "run", on):
        thread.join(30)
    assert found == [True]


def test_the_draws_on_a_mesh():
    """Also where its axes are explicit, as those of `jax.make_mesh` are."""
    kind = (AxisType.Explicit,)
    mesh = jax.make_mesh((1,), ("chains",), axis_types=kind, devices=jax.devices()[:1])
    close(many_devices.draw(mesh), draw(20))


def test_chains_that_can_not_be_split_evenly():
    mesh = Mesh(np.array(3 * jax.devices()[:1]), ("chains",))
    with pytest.raises(ValueError, match="Take a multiple of 3"):
        devices(mesh, 4)


def test_keys_of_a_part_are_those_of_the_whole():
    key = jax.random.key(3)
    whole = jax.random.split(key, (3, 50))
    part = step_keys(key, np.uint32(20), num_chains=3, num_steps=50, num=7)
    np.testing.assert_array_equal(*map(jax.random.key_data, (part, whole[:, 20:27])))


def test_more_steps_than_keys_are_refused():
    algorithm = probbp.mala
    with pytest.raises(ValueError, match="2\\*\\*32 keys"):
        probbp.sample(
            jax.random.key(0),
            lambda **options: algorithm(lambda x: -jnp.sum(x**2), **options),
            jnp.zeros(1),
            target_acceptance_rate=0.5,
            num_samples=2**26,
            num_chains=64,
        )
