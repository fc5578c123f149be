"""`probbp.surrogate` beside the samplers that people without gradients use today.

    python tests/benchmarks/rivals.py --data DIR [--only NAME] [--rival NAME] [--seeds N]

DIR holds posteriordb's reference moments (see `posteriors.py`). Each sampler runs at its defaults
in an environment of its own under `build/rivals`, made by `venv` and `pip` on first use, on the
same log density of unconstrained coordinates; what has no gradient of it never sees one. Chains and
walkers start uniformly on (-2, 2). Samplers that need a prior get a uniform one on a box around
zero, and the log density for a likelihood; half the box is 10 per coordinate, or where that is too
small, the next of 20, 50, 100 ... that holds the mean and six standard deviations. A fifth of the
box is what PyVBMC is told to be plausible.

What is counted are evaluations of the log density until the smallest bulk ESS of a parameter or its
square is 400, warm-up included. For ensembles of walkers, each walker counts as a chain, and the
burn-in is that of 10, 25 and 50 per cent of the run which serves them best. Of weighted draws the
ESS is Kish's; the count is that of the whole run, scaled up (~) where it gave fewer than 400. NUTS
pays 3 evaluations for a value with its gradient; the few by which it searches for its first step
size are left out. |z| is the largest over means and mean squares of the parameters, against those
of the reference draws, at the stop. "mean" and "sd" are the largest errors of a parameter's mean,
in posterior standard deviations, and of its standard deviation, relative: all there is for PyVBMC,
which approximates.

CPU seconds are those of one thread, without what JAX had compiled for an earlier seed.

Each run leaves a line in `build/rivals/runs.jsonl` and is not repeated; `--fresh` does so. Then all
tables are printed, medians over seeds.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from _rivals import RUNNERS, Target
from posteriordb import Run, dataset, judged
from posteriors import MODELS, Posterior, entry, load

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "rivals"
KEPT = BUILD / "runs.jsonl"

WANTED = 400
"""Effective draws."""

BURN_IN = (0.1, 0.25, 0.5)
"""Shares of an ensemble's run that may be left out."""

TARGETS = (
    "eight_schools-eight_schools_noncentered",
    "kidiq-kidscore_interaction",
    "arK-arK",
    "garch-garch11",
    "sblri-blr",
    "low_dim_gauss_mix-low_dim_gauss_mix",
)

PACKAGES = {
    "emcee": "emcee",
    "zeus": "zeus-mcmc",
    "pocoMC": "pocomc",
    "nautilus": "nautilus-sampler",
    "jaxns": "jaxns",
    "flowMC": "flowMC",
    "PyVBMC": "pyvbmc",
}
"""First word of a rival's name -> what to install; the others run in this environment."""


class Judged(NamedTuple):
    """A run beside the reference draws.

    Attributes:
        evals: evaluations to the wanted ESS; of those that never get there, of the whole run.
        reached: whether it got there.
        ess: at the stop; NaN for approximations.
        z: the largest |z|.
        rhat: the largest R-hat, NaN without chains.
        mean: the largest error of a mean.
        sd: the largest error of a standard deviation.
    """

    evals: float
    reached: bool
    ess: float
    z: float
    rhat: float
    mean: float
    sd: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the reference moments")
    parser.add_argument("--only", default="", help="part of a target's name")
    parser.add_argument("--rival", default="", help="start of a rival's name")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=1200, help="CPU seconds for a run")
    parser.add_argument("--fresh", action="store_true", help="repeat runs that were made before")
    parser.add_argument("--fast", action="store_true", help="one seed of the first target")
    args = parser.parse_args()
    if args.data is None:
        print("Left out: the other samplers. They need data and a package index: --data DIR")
        return
    if args.fast:
        args.only, args.seeds = TARGETS[0], 1
    numpyro.enable_x64()
    args.data = args.data.expanduser().resolve()
    try:
        posteriors = load(args.data)
    except FileNotFoundError as error:
        parser.exit(2, f"{error}\n")
    posteriors = {n: p for n, p in posteriors.items() if n in TARGETS and args.only in n}
    rivals = [name for name in RUNNERS if name.startswith(args.rival)]
    BUILD.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds):
        for name, posterior in posteriors.items():
            for rival in rivals:
                made = {(r["rival"], r["target"], r["seed"]) for r in kept()}
                if args.fresh or (rival, name, seed) not in made:
                    keep(line(rival, posterior, seed, args))
    rows = [r for r in kept() if r["target"] in posteriors and r["rival"] in rivals]
    print(tables(rows))


# ---------------------------------------------------------------------------------------
# Runs.


def kept() -> list[dict]:
    """Return the lines of earlier runs; of the same run, the last."""
    lines = KEPT.read_text().splitlines() if KEPT.exists() else []
    rows = [json.loads(line) for line in lines]
    return list({(r["rival"], r["target"], r["seed"]): r for r in rows}.values())


def keep(row: dict) -> None:
    with KEPT.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def line(rival: str, posterior: Posterior, seed: int, args) -> dict:
    """Run a rival, and judge it."""
    row = {"rival": rival, "target": posterior.name, "seed": seed}
    out = BUILD / f"{rival}-{posterior.name}-{seed}.npz"
    try:
        run(rival, posterior.name, seed, out, args)
        with np.load(out) as file:
            left = dict(file)
        result = judge(left, posterior, Target(posterior.name, args.data))
        counts = {name: float(left[name]) for name in ("own", "counted", "seconds")}
        total = float(np.max(left["evals"]))
        version = str(left["version"])
        return row | result._asdict() | counts | {"total": total, "version": version}
    except Failure as failure:
        return row | {"failed": str(failure)}


class Failure(Exception):
    """Why there is no run."""


def run(rival: str, target: str, seed: int, out: Path, args) -> None:
    """Run a rival in its environment, on one thread.

    Raises:
        Failure: where it can't be installed, fails, or takes too long.
    """
    package = PACKAGES.get(rival.split(",")[0])
    python = Path(sys.executable) if package is None else environment(package)
    script = [python, ROOT / "tests" / "benchmarks" / "_rivals.py", rival, target]
    options = ["--data", args.data, "--seed", str(seed), "--out", out]
    options += ["--package", package or "probbp", "--limit", str(args.limit)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    jax_options = {
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
        "JAX_COMPILATION_CACHE_DIR": str(BUILD / "jax_cache"),
    }
    path = {"PYTHONPATH": str(ROOT)} if package is None else {}
    command([*script, *options], os.environ | threads | jax_options | path)


def environment(package: str) -> Path:
    """Make an environment for a package, if there is none, and return its Python.

    Raises:
        Failure: where it can't be installed.
    """
    folder = BUILD / package
    python, done = folder / "bin" / "python", folder / ".installed"
    if not done.exists():
        command([sys.executable, "-m", "venv", "--clear", "--without-pip", folder])
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
        command([*pip, package, "jax", "numpyro"])
        done.touch()
    return python


def command(arguments: list, env=None) -> None:
    """Run a command.

    Raises:
        Failure: with the last error that it wrote, where it fails or takes too long.
    """
    done = subprocess.run(
        [str(a) for a in arguments],
        env=env,
        cwd=BUILD,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode == -signal.SIGXCPU:
        raise Failure("takes too long")
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()
        named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|ERROR):", line)]
        raise Failure((named or lines)[-1][:200])


# ---------------------------------------------------------------------------------------
# Judgement.


def judge(left: dict, posterior: Posterior, target: Target) -> Judged:
    """Compare what a run left with the reference draws."""
    draws = parameters(left["draws"], posterior, target)
    kind = str(left["kind"])
    if kind in ("chains", "ensemble"):
        return judge_chains(
            draws, left["evals"], BURN_IN if kind == "ensemble" else (0,), posterior
        )
    evals = float(left["evals"])
    if kind == "approximate":
        weights = np.full(left["draws"].shape[0], 1.0)
        ess = z = np.nan
    else:
        weights = np.exp(left["log_weights"] - np.max(left["log_weights"]))
        ess = np.sum(weights) ** 2 / np.sum(weights**2)
        z = weighted_z(draws, weights, posterior)
    reached = not ess < WANTED
    evals = evals if reached else evals * WANTED / ess
    return Judged(evals, bool(reached), float(ess), z, np.nan, *errors(draws, weights, posterior))


def parameters(flat, posterior: Posterior, target: Target) -> dict[str, np.ndarray]:
    """Return the parameters of the reference draws, out of unconstrained positions (..., dim)."""
    constrain = jax.jit(
        partial(
            jax.lax.map,
            lambda x: target.info.postprocess_fn(target.unravel(x)),
            batch_size=1000,
        )
    )
    sites = jax.device_get(constrain(jnp.asarray(flat.reshape(-1, flat.shape[-1]))))
    sites = {n: v.reshape(*flat.shape[:-1], *v.shape[1:]) for n, v in sites.items()}
    return {name: entry(sites, where) for name, where in posterior.names.items()}


def judge_chains(draws: dict, evals: np.ndarray, shares: tuple, posterior: Posterior) -> Judged:
    """Find the first stop with the wanted ESS, among some 40, and judge there."""
    lengths = np.unique(np.geomspace(min(50, len(evals)), len(evals), 40).astype(int))
    low, high = 0, len(lengths) - 1
    while low < high:
        middle = (low + high) // 2
        if best(draws, lengths[middle], shares)[0] >= WANTED:
            high = middle
        else:
            low = middle + 1
    length = lengths[high]
    ess, first = best(draws, length, shares)
    cut = {name: x[:, first:length] for name, x in draws.items()}
    # `judged` reads parameters as sites, under the names of the reference.
    sites = posterior._replace(names={name: (name, ()) for name in cut})
    row = judged(sites, "", Run(cut, 0.0, 1.0, 0.0))
    weights = np.ones(cut[next(iter(cut))].shape)
    return Judged(
        float(evals[length - 1]),
        bool(ess >= WANTED),
        float(ess),
        float(max(row.z_mean, row.z_square)),
        float(row.rhat),
        *errors(cut, weights, posterior),
    )


def best(draws: dict, length: int, shares: tuple) -> tuple[float, int]:
    """Return the largest ESS over burn-ins, and the first draw that is kept."""
    firsts = [int(share * length) for share in shares]
    return max((smallest_ess(draws, first, length), first) for first in firsts)


def smallest_ess(draws: dict, first: int, last: int) -> float:
    cut = {name: x[:, first:last] for name, x in draws.items()}
    both = cut | {f"{name} squared": x**2 for name, x in cut.items()}
    values = [float(v) for v in az.ess(dataset(both), method="bulk").values()]
    return min(0.0 if np.isnan(v) else v for v in values)


def weighted_z(draws: dict, weights, posterior: Posterior) -> float:
    """Return the largest |z| of weighted means and mean squares."""
    weights, z = weights / np.sum(weights), []
    for name, x in draws.items():
        reference = posterior.reference[name]
        spread = np.sqrt(reference["mean_square"] - reference["mean"] ** 2)
        square_spread = np.sqrt(weights @ (x**2 - weights @ x**2) ** 2)
        for values, moment, unit in ((x, "mean", spread), (x**2, "mean_square", square_spread)):
            mean = weights @ values
            error = np.sqrt(np.sum((weights * (values - mean)) ** 2))
            z.append((mean - reference[moment]) / np.hypot(error, unit / np.sqrt(reference["n"])))
    return float(np.max(np.abs(z)))


def errors(draws: dict, weights, posterior: Posterior) -> tuple[float, float]:
    """Return the largest errors of a mean, in standard deviations, and of one of these."""
    mean, sd = [], []
    for name, x in draws.items():
        reference = posterior.reference[name]
        spread = np.sqrt(reference["mean_square"] - reference["mean"] ** 2)
        centre = np.average(x, weights=weights)
        mean.append(abs(centre - reference["mean"]) / spread)
        sd.append(abs(np.sqrt(np.average((x - centre) ** 2, weights=weights)) / spread - 1))
    return float(np.max(mean)), float(np.max(sd))


# ---------------------------------------------------------------------------------------
# Tables.


def tables(rows: list[dict]) -> str:
    """Return all there is to say, in Markdown: evaluations, and each target's rows."""
    targets = [name for name in MODELS if any(r["target"] == name for r in rows)]
    short = {name: name.split("-")[0] for name in targets}
    rivals = [name for name in RUNNERS if any(r["rival"] == name for r in rows)]
    cells = [["", *short.values()], ["---", *["---:"] * len(targets)]]
    for rival in rivals:
        of = partial(select, rows, rival)
        cells.append([rival, *(brief(of(target)) for target in targets)])
    parts = ["Thousands of evaluations to ESS 400 (the largest |z|)", table(cells)]
    for target in targets:
        cells = [["", *COLUMNS], ["---", *["---:"] * len(COLUMNS)]]
        for rival in rivals:
            made = select(rows, rival, target)
            if made:
                cells.append([f"{rival} {version(made)}", *(f(made) for f in COLUMNS.values())])
        parts += [target, table(cells)]
    return "\n\n".join(parts)


def select(rows: list[dict], rival: str, target: str) -> list[dict]:
    return [r for r in rows if r["rival"] == rival and r["target"] == target]


def table(cells: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def brief(made: list[dict]) -> str:
    """Return the median of the evaluations, and of |z|."""
    z = median(made, "z")
    return evaluations(made) + ("" if np.isnan(z) else f" ({z:.1f})")


def evaluations(made: list[dict]) -> str:
    """Return thousands; `>` where most chains never got there, `~` where weighted draws didn't."""
    good = [r for r in made if "failed" not in r]
    if not good:
        return "failed" if made else ""
    short = sum(not r["reached"] for r in good) > len(good) / 2
    mark = ("~" if np.isnan(good[0]["rhat"]) else ">") if short else ""
    value = median(good, "evals") / 1000
    return mark + (f"{value:.1f}" if value < 10 else f"{value:.0f}")


def median(made: list[dict], name: str) -> float:
    values = [r[name] for r in made if name in r]
    return float(np.median(values)) if values else np.nan


def number(name: str, form: str) -> Callable[[list[dict]], str]:
    def text(made) -> str:
        value = median(made, name)
        return "" if np.isnan(value) else format(value, form)

    return text


def version(made: list[dict]) -> str:
    return next((r["version"] for r in made if r.get("version")), "")


def notes(made: list[dict]) -> str:
    return "; ".join(sorted({r["failed"] for r in made if "failed" in r}))


COLUMNS = {
    "k evals": evaluations,
    "ESS": number("ess", ".0f"),
    "abs z": number("z", ".1f"),
    "R-hat": number("rhat", ".3f"),
    "mean": number("mean", ".2f"),
    "sd": number("sd", ".2f"),
    "CPU s": number("seconds", ".0f"),
    "runs": lambda made: str(sum("failed" not in r for r in made)),
    "failed": notes,
}
"""Column -> its text, of the runs with all seeds."""


if __name__ == "__main__":
    main()
