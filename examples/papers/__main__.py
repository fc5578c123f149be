"""Run the reproductions that have no result yet, and make one table and one page of them.

    python examples/papers [names...] [--jobs N] [--fresh] [--results DIR]

A script runs where its result is missing, or where its code or that of a file which it imports from
here has changed since (layout, comments and docstrings aside); with `--fresh` always. An
interrupted run goes on where it stopped. Scripts that run side by side share the cores evenly;
those that report ratios of times run alone, at the end. One that fails stops no other, and the exit
status is 1. What scripts print is in `logs`, beside the results. The table goes to `table.md`, to
README between its markers, and a page of all pictures to `pictures.md`.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from _results import STORED, digest
from _table import load, pictures, put, table
from tqdm import tqdm

FOLDER = Path(__file__).parent
TIMED = ("dsbp", "dsbp_rotations", "fmala_posteriors", "rtrl", "sdo", "sdo_posteriors")


class Job(NamedTuple):
    """A script that runs."""

    name: str
    process: subprocess.Popen
    begin: float
    cores: list[int]


def main(words: list[str] | None = None) -> int:
    scripts = {path.stem: path for path in sorted(FOLDER.glob("[!_]*.py"))}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(scripts)}")
    parser.add_argument("--jobs", type=int, default=2, help="scripts at a time")
    parser.add_argument("--fresh", action="store_true", help="run what has a result, too")
    parser.add_argument("--results", type=Path, default=STORED, help="folder of the results")
    arguments = parser.parse_args(words)
    unknown = sorted(set(arguments.names) - set(scripts))
    if unknown:
        parser.error(f"no script is called {', '.join(unknown)}; there are {', '.join(scripts)}")
    if arguments.jobs < 1:
        parser.error("--jobs is at least 1")
    results = arguments.results.resolve()
    (results / "logs").mkdir(parents=True, exist_ok=True)

    chosen = [scripts[name] for name in arguments.names or scripts]
    waiting = [path for path in chosen if arguments.fresh or is_due(path, results)]
    for path in waiting:  # so that nobody takes an old result for a new one
        (results / f"{path.stem}.json").unlink(missing_ok=True)
    failed = run(waiting, results, arguments.jobs)
    report(results, list(scripts))
    for name in failed:
        print(f"{name} failed: see {results / 'logs' / name}.txt", file=sys.stderr)
    return 1 if failed else 0


def is_due(path: Path, results: Path) -> bool:
    result = load(results, [path.stem])[path.stem]
    return result is None or result["digest"] != digest(path)


def run(scripts: list[Path], results: Path, jobs: int) -> list[str]:
    """Run scripts, several at a time, and return the names of those that failed."""
    waiting = sorted(scripts, key=lambda path: path.stem in TIMED)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    share = max(len(cores) // jobs, 1)
    free = [cores[i * share : (i + 1) * share] or cores for i in range(jobs)]
    running: list[Job] = []
    failed = []
    with tqdm(total=len(waiting), disable=None) as bar:
        try:
            while waiting or running:
                is_alone = any(job.name in TIMED for job in running)
                while waiting and free and not is_alone:
                    is_alone = waiting[0].stem in TIMED
                    if is_alone and running:
                        break
                    mine = free.pop(0)
                    running.append(started(waiting.pop(0), results, mine, cores, is_alone))
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    free.append(job.cores)
                    result = load(results, [job.name])[job.name]
                    if job.process.returncode != 0 or result is None:
                        failed.append(job.name)
                        result = None
                    word = "failed" if result is None else result["verdict"]
                    bar.write(f"{job.name}: {word}, {time.perf_counter() - job.begin:.0f} s")
                    bar.update()
                now = time.perf_counter()
                times = ", ".join(f"{job.name} {now - job.begin:.0f} s" for job in running)
                bar.set_description(f"{times}; {len(waiting)} wait", refresh=True)
                time.sleep(0.2)
        finally:  # nothing is left running
            for job in running:
                job.process.terminate()
                job.process.wait()
    return failed


def started(path: Path, results: Path, mine: list[int], cores: list[int], is_alone: bool) -> Job:
    """Start a script on its share of the cores, or on all."""
    given = cores if is_alone else mine
    environment: dict[str, Any] = {"PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "10"}
    if given:
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(len(given)))
    command = [sys.executable, str(path), "--results", str(results)]
    with open(results / "logs" / f"{path.stem}.txt", "w") as log:
        if given:
            os.sched_setaffinity(0, given)  # a process inherits it
        try:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment
            )
        finally:
            if given:
                os.sched_setaffinity(0, cores)
    return Job(path.stem, process, time.perf_counter(), mine)


def report(results: Path, names: list[str]) -> None:
    """Write the table and the page of pictures, and put the table into README."""
    stored = load(results, names)
    (results / "table.md").write_text(table(stored))
    (results / "pictures.md").write_text(pictures(stored))
    readme = FOLDER.parent.parent / "README.md"
    if results == STORED.resolve() and readme.is_file():
        old = readme.read_text()
        new = put(old, table(stored))
        if new != old:
            readme.write_text(new)


if __name__ == "__main__":
    sys.exit(main())
