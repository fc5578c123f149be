"""What a reproduction leaves behind: a result, as JSON, and a picture.

A script parses its arguments with `parser` and `parsed`, draws on `panels`, and calls `write` once,
at its end. Both files go to `examples/papers/results`, or where `--results` says. With `--fast`
sizes are tiny, and files are written only where `--results` says.
"""

import argparse
import ast
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _evidence import Check, Figure, verdict
from _papers import Paper

BEGIN = time.perf_counter()
FOLDER = Path(__file__).parent
STORED = FOLDER / "results"
# What these say does not change what is computed.
BOOKKEEPING = ("_papers", "_results")


def parser(docstring: str | None) -> argparse.ArgumentParser:
    """Return a parser of `--fast` and `--results`; a script may add its own."""
    parser = argparse.ArgumentParser(description=(docstring or "").splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a smoke test; its figures are rough")
    parser.add_argument("--results", type=Path, help="folder for the result and the picture")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the arguments; a smoke test's programs are compiled in a hurry."""
    arguments = parser.parse_args()
    if arguments.fast:
        jax.config.update("jax_disable_most_optimizations", True)
    return arguments


def write(
    arguments: argparse.Namespace,
    *,
    paper: Paper,
    claim: str,
    setting: str,
    ours: Figure,
    baseline: Figure,
    checks: Sequence[Check],
    figure: Any,
    caption: str,
) -> None:
    """Write the result and the picture of the script that runs.

    Args:
        arguments: of `parser`.
        paper: where the claim is from.
        claim: the paper's headline, in our words.
        setting: data, sizes and seeds here.
        ours: the figure of the method.
        baseline: that of its strongest alternative at equal cost.
        checks: the parts of the claim; they decide on the verdict.
        figure: of `panels`, drawn.
        caption: what the picture shows.
    """
    script = Path(sys.modules["__main__"].__file__ or "")
    folder = arguments.results or (None if arguments.fast else STORED)
    if folder is None:
        return
    if arguments.fast and folder.resolve() == STORED.resolve():
        raise ValueError("Figures of --fast are no results. Give --results another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    number_short_log_axes(figure)
    figure.savefig(folder / f"{script.stem}.png", dpi=110, pil_kwargs={"optimize": True})
    record = {
        "script": script.stem,
        "paper": paper._asdict(),
        "claim": claim,
        "setting": setting,
        "ours": ours._asdict(),
        "baseline": baseline._asdict(),
        "checks": [
            {
                "claim": check.claim,
                **check.figure._asdict(),
                "side": check.side,
                "bound": check.bound,
                "holds": check.holds,
            }
            for check in checks
        ],
        "verdict": verdict([check.holds for check in checks]),
        "caption": caption,
        "command": f"python examples/papers/{script.name}{' --fast' * arguments.fast}",
        "fast": arguments.fast,
        "commit": commit(),
        "seconds": round(time.perf_counter() - BEGIN),
        "cpu_seconds": round(time.process_time()),
        "versions": {
            "python": platform.python_version(),
            "jax": version("jax"),
            "numpyro": version("numpyro"),
        },
        "digest": digest(script),
    }
    path = folder / f"{script.stem}.json"
    part = path.with_suffix(".part")  # so that a result is there whole, or not at all
    part.write_text(json.dumps(finite(record), indent=1, ensure_ascii=False) + "\n")
    os.replace(part, path)
    print(f"\nThe claim: {record['verdict']}. Result and picture are in {folder}", file=sys.stderr)


def panels(num: int):
    """Return a figure and its axes, side by side, all figures alike."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plain = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    plain |= {"grid.alpha": 0.3, "font.size": 9, "legend.fontsize": 8, "legend.frameon": False}
    plt.rcParams.update(plain | {"axes.titlesize": 10})
    figure, axes = plt.subplots(1, num, figsize=(4.8 * num, 3.6), layout="constrained")
    return figure, np.atleast_1d(axes)


def number_short_log_axes(figure: Any) -> None:
    """Number 1, 2, 5 on logarithmic axes of less than two decades, instead of powers of ten."""
    from matplotlib import ticker

    for ax in figure.axes:
        for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            locator = axis.get_major_locator()
            if isinstance(locator, ticker.LogLocator) and max(low, high) < 100 * min(low, high):
                axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
                axis.set_minor_locator(ticker.NullLocator())


def commit() -> str | None:
    """Return the commit, with "-dirty" where files differ beside what runs write themselves."""

    def git(*words):
        done = subprocess.run(["git", *words], cwd=FOLDER, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        head = git("rev-parse", "HEAD")
        if head is None:
            return None
        own = [f":(top,exclude){name}" for name in ("README.md", "examples/papers/results")]
        changed = git("status", "--porcelain", "--", ":(top)", *own)
    except FileNotFoundError:
        return None
    return head[:12] + ("-dirty" if changed else "")


def digest(script: Path) -> str:
    """Return a hash of the code of a script and of what it imports from here.

    Layout, comments and docstrings do not count.
    """
    seen, waiting = {}, [script]
    while waiting:
        path = waiting.pop()
        tree = ast.parse(path.read_text())
        seen[path.name] = _code(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            found = [script.parent / f"{name}.py" for name in names if name not in BOOKKEEPING]
            waiting += [other for other in found if other.name not in seen and other.is_file()]
    both = "".join(f"{name}\n{code}\n" for name, code in sorted(seen.items()))
    return hashlib.sha256(both.encode()).hexdigest()[:16]


def finite(tree: Any) -> Any:
    """Return it with null for numbers that JSON cannot say."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [finite(value) for value in tree]
    is_number = isinstance(tree, float)
    return None if is_number and not abs(tree) < float("inf") else tree


def _code(node: Any) -> str:
    """Write a syntax tree, the same on each Python: `ast.dump` also writes fields new to some."""
    if isinstance(node, list):
        return f"[{', '.join(map(_code, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    with_docstring = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, with_docstring) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = node.body[1:]
    given = [f"{name}={_code(value)}" for name, value in fields.items() if value not in (None, [])]
    return f"{type(node).__name__}({', '.join(given)})"
