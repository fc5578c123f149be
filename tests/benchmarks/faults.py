"""What becomes of a run when something goes wrong: fault, tries, outcome.

    python tests/benchmarks/faults.py [--fast]

First 50 SIGKILLs, at random moments, to processes that draw, optimise by SVI and grow a network
(`tests/long_run.py`), each resumed by the next; what they leave must be, bit for bit, what a run
gives that nobody killed. Then every fault to a checkpoint of draws on disk, at random places. A
cell counts outcomes: "same", the draws, their coordinates and moments bit for bit, with or without
a warning that an older state was taken; "refused", by an error that says why; "WRONG", anything
else, of which there must be none. Ten minutes on two cores, a minute with `--fast`.
"""

import argparse
import os
import random
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import long_run

import probbp

PROGRAMS = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a smoke test: 3 kills, 2 tries")
    fast = parser.parse_args().fast
    print(f"{'fault':46s}{'tries':>6s}  outcome", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        kills(Path(folder), num_kills=3 if fast else 50, length=1 if fast else 4)
    with tempfile.TemporaryDirectory() as folder:
        damages(Path(folder), num_tries=2 if fast else 20)


def report(fault: str, outcomes: Counter) -> None:
    told = ", ".join(f"{outcome} {count}" for outcome, count in sorted(outcomes.items()))
    print(f"{fault:46s}{sum(outcomes.values()):6d}  {told}", flush=True)


def kills(folder: Path, num_kills: int, length: int) -> None:
    """Kill runs until there were so many kills, and compare what each run left in the end."""
    environment = os.environ | PROGRAMS | {"JAX_COMPILATION_CACHE_DIR": str(folder / "programs")}
    # NumPyro's ELBO adds in the order of a Python set.
    environment |= {"PYTHONWARNINGS": "ignore", "PYTHONHASHSEED": "0"}
    parts = list(long_run.PARTS)
    begun = time.perf_counter()
    long_run.killed_after(3600.0, folder / "whole", length, parts, environment)
    whole = long_run.result_of(folder / "whole")
    longest = 0.25 * (time.perf_counter() - begun)
    rng = random.Random(0)
    runs, done = 0, 0
    outcomes = Counter()
    with tqdm(total=num_kills, desc="SIGKILL", leave=False) as bar:
        while done < num_kills:
            run = folder / f"run {runs}"
            runs += 1
            while done < num_kills:
                wait = rng.uniform(0.2, longest)
                if not long_run.killed_after(wait, run, length, parts, environment):
                    break
                done += 1
                bar.update()
            long_run.killed_after(3600.0, run, length, parts, environment)
            result = long_run.result_of(run)
            is_same = result.keys() == whole.keys() and all(
                np.array_equal(result[name], whole[name]) for name in whole if name != "seconds"
            )
            outcomes["runs that ended the same" if is_same else "WRONG"] += 1
            shutil.rmtree(run)
    told = ", ".join(f"{outcome} {count}" for outcome, count in sorted(outcomes.items()))
    print(f"{'SIGKILL at a random moment':46s}{done:6d}  {told}", flush=True)


CENTRE = np.arange(3.0)


def draw(folder: Path, centre: np.ndarray = CENTRE, key: int = 0, **options):
    """Draws on disk, and all that lies beside them."""
    centre = jnp.asarray(centre)
    data = probbp.sample(
        jax.random.key(key),
        partial(probbp.mala, lambda x: -0.5 * jnp.sum((x - centre) ** 2)),
        jnp.zeros(3),
        **{"num_warmup": 3, "num_samples": 60, "every": 10, "metric": None} | options,
        checkpoint=folder,
        stream=folder.with_suffix(".draws"),
        progress_bar=False,
    )
    return {
        f"{group}.{name}": (tuple(array.dims), array.values)
        for group in ("posterior", "sample_stats", "moments")
        for name, array in data[group].variables.items()
    }


def damages(folder: Path, num_tries: int) -> None:
    """Damage checkpoints, each a fresh copy of one of a run that is done."""
    jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    whole = folder / "whole"
    wanted = draw(whole)
    rng = random.Random(1)

    def outcome(damage, **options):
        run = folder / "run"
        for suffix in ("", ".draws"):
            path = run.with_suffix(suffix)
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(whole.with_suffix(suffix), path)
        damage(run)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                result = draw(run, **options)
            except (ValueError, ImportError) as error:
                return f"refused ({kind(error)})"
        if not are_equal(result, wanted):
            return "WRONG"
        is_told = any("is damaged" in str(warning.message) for warning in warned)
        return "same, from an older state" if is_told else "same"

    def flip(path):
        content = bytearray(path.read_bytes())
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(content))

    def cut(path):
        content = path.read_bytes()
        path.write_bytes(content[: rng.randrange(len(content))] if content else b"")

    def anywhere(change, places):
        return lambda run: change(rng.choice(files(*places(run))))

    def all_states(run):
        for state in (run / "states").iterdir():
            for file in files(state):
                flip(file)

    def link(run):
        state = newest(run)
        outside = shutil.move(state / "arrays", run.parent / f"outside {rng.random()}")
        (state / "arrays").symlink_to(outside)

    nothing = lambda run: None
    of_state = lambda run: [newest(run)]
    of_draws = lambda run: [run.with_suffix(".draws")]
    faults = {
        "no fault": (nothing, {}),
        "a bit of the newest state flipped": (anywhere(flip, of_state), {}),
        "a file of the newest state cut short": (anywhere(cut, of_state), {}),
        "a file of the newest state missing": (anywhere(os.unlink, of_state), {}),
        "the newest state missing": (lambda run: shutil.rmtree(newest(run)), {}),
        "every file of every state damaged": (all_states, {}),
        "a bit of the draws flipped": (anywhere(flip, of_draws), {}),
        "a file of the draws cut short": (anywhere(cut, of_draws), {}),
        "a file of the draws missing": (anywhere(os.unlink, of_draws), {}),
        "a link out of the folder": (link, {}),
        "a file of somebody else's": (stranger, {}),
        "another key": (nothing, {"key": 1}),
        "one number of the data, by one bit": (nothing, {"centre": np.nextafter(CENTRE, 9)}),
        "another number of draws": (nothing, {"num_samples": 61}),
        "another step size to start from": (nothing, {"initial_step_size": 0.9}),
        "other chains": (nothing, {"num_chains": 5}),
    }
    for name, (damage, options) in faults.items():
        tries = num_tries if damage is not nothing else 1
        report(name, Counter(outcome(damage, **options) for _ in range(tries)))


def are_equal(result, wanted) -> bool:
    return result.keys() == wanted.keys() and all(
        result[name][0] == dims and np.array_equal(result[name][1], values)
        for name, (dims, values) in wanted.items()
    )


def files(*folders):
    return [f for folder in folders for f in sorted(folder.rglob("*")) if f.is_file()]


def newest(run):
    return max((run / "states").iterdir(), key=lambda path: int(path.name))


def stranger(run):
    (run / "notes.txt").write_text("mine")


def kind(error: Exception) -> str:
    """Which of the errors it is."""
    kinds = {
        "of another run": "another run's",
        "not the store of this run": "another run's",
        "is intact": "no state is intact",
        "is no Zarr store": "no store",
        "layout": "layout of the draws",
        "pieces of": "draws are missing",
        "(?i)checksum": "checksum of the draws",
        "is a link": "link",
        "no checkpoint of this": "stranger",
        "not there": "draws are missing",
    }
    for words, told in kinds.items():
        if re.search(words, str(error)):
            return told
    return f"{type(error).__name__}: {str(error)[:60]}"


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main()
