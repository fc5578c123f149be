"""A table: each chain method of NumPyro's MCMC, and each way to run, resume and transform it."""

import subprocess
import sys
from pathlib import Path

import pytest
from chain_methods import WAYS, check

QUICK = {("vectorized", "resume")}


@pytest.mark.parametrize(
    ("method", "way"),
    [
        pytest.param(method, way, marks=() if (method, way) in QUICK else pytest.mark.slow)
        for method in ("sequential", "vectorized")
        for way in WAYS
    ],
)
@pytest.mark.filterwarnings("ignore:Some donated buffers:UserWarning")  # NumPyro's, for jax.vmap
def test_every_way_gives_the_draws_of_one_run(method, way):
    check(method, way)


@pytest.mark.slow
def test_parallel_chains_give_the_draws_of_one_run_in_every_way():
    script = Path(__file__).with_name("chain_methods.py")
    command = [sys.executable, str(script), "parallel", *WAYS]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-len(WAYS) :] == list(WAYS)
