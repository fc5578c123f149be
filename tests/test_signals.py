"""Runs that real signals stop at random moments, and two runs at one folder at the same time."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import signalled_run

PROCESSES = multiprocessing.get_context("forkserver")
NUM_SAMPLES = 400


def start(folder, result, num_samples=NUM_SAMPLES):
    PROCESSES.set_forkserver_preload(signalled_run.PRELOADED)
    process = PROCESSES.Process(target=signalled_run.run, args=(folder, result, num_samples))
    process.start()
    return process


def finished(folder, result, num_samples=NUM_SAMPLES):
    """Run to the end, and return what was drawn and how long it took."""
    begun = time.perf_counter()
    process = start(folder, result, num_samples)
    process.join()
    assert process.exitcode == 0, told(result)
    return drawn(result), time.perf_counter() - begun


def drawn(result):
    with np.load(result) as arrays:
        return dict(arrays)


def told(result):
    path = Path(f"{result}.told")
    return path.read_text() if path.exists() else ""


def same(arrays, wanted):
    assert arrays.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(arrays[name], values, err_msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What is drawn when nothing happens, and in what time once all is compiled."""
    folder = tmp_path_factory.mktemp("whole")
    wanted, _ = finished(folder / "first", folder / "1")
    again, seconds = finished(folder / "second", folder / "2")
    same(again, wanted)
    return wanted, seconds


@pytest.mark.slow
def test_thirty_signals_at_random_moments_change_no_bit(whole, tmp_path):
    wanted, seconds = whole
    random_ = random.Random(0)
    num_runs, ends, signals = 0, [], [signal.SIGINT, signal.SIGTERM, signal.SIGKILL] * 10
    while signals:
        folder, result = tmp_path / f"run {num_runs}", tmp_path / f"result {num_runs}"
        process = start(folder, result)
        process.join(random_.uniform(0.0, seconds))
        if process.exitcode is None:
            number = signals.pop()
            os.kill(process.pid, number)
            process.join()
            ends.append((number, process.exitcode))
        if process.exitcode == 0:
            same(drawn(result), wanted)
            num_runs += 1
    same(finished(folder, result)[0], wanted)
    # Zero where the run was over before the signal came through.
    allowed = {
        signal.SIGINT: {0, signalled_run.INTERRUPTED, 1},  # 1 before the run, at the imports
        signal.SIGTERM: {0, -signal.SIGTERM},
        signal.SIGKILL: {0, -signal.SIGKILL},
    }
    assert all(code in allowed[number] for number, code in ends), ends
    assert sum(code != 0 for _, code in ends) >= 20


@pytest.mark.slow
def test_ctrl_c_without_a_folder_returns_the_draws_so_far(tmp_path):
    wanted, seconds = finished(None, tmp_path / "whole", 200_000)
    for i, share in enumerate(np.linspace(0.5, 0.9, 4)):
        result = tmp_path / str(i)
        process = start(None, result, 200_000)
        process.join(share * seconds)
        os.kill(process.pid, signal.SIGINT)
        process.join()
        if process.exitcode == 0 and "Interrupted after" in told(result):
            break
    else:
        pytest.fail("no signal came while draws were made")
    arrays = drawn(result)
    num = arrays["posterior.x"].shape[1]
    assert 0 < num < 200_000
    assert f"Interrupted after {num} of 200000 draws" in told(result)
    same(arrays, {name: values[:, :num] for name, values in wanted.items()})


@pytest.mark.slow
def test_of_two_runs_that_begin_together_at_one_folder_one_is_told(whole, tmp_path):
    wanted, _ = whole
    results = [tmp_path / "first", tmp_path / "second"]
    processes = [start(tmp_path / "run", result) for result in results]
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    assert 0 in codes
    assert set(codes) <= {0, signalled_run.TAKEN}
    for code, result in zip(codes, results, strict=True):
        if code == 0:
            same(drawn(result), wanted)
        else:
            assert "Another run writes to" in told(result)
    same(finished(tmp_path / "run", tmp_path / "again")[0], wanted)
