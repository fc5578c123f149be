"""Every example and every docstring's example run."""

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tables import members

ROOT = Path(__file__).parent.parent
# Those that run longer than they compile, or compare times, are compiled with all optimisations.
OPTIMISED = {"fmala.py", "sus.py"}
EXAMPLES = [
    pytest.param(path, id=path.name, marks=pytest.mark.optimised if path.name in OPTIMISED else ())
    for path in sorted((ROOT / "examples").glob("*.py"))
]
SOURCES = sorted({*(ROOT / "probbp").rglob("*.py"), *(ROOT / "probbp" / "models").rglob("*.py")})
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in SOURCES
    if path.name != "__init__.py"
]


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES)
def test_an_example_runs_and_leaves_a_picture(path, tmp_path):
    command = [sys.executable, str(path), "picture.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    # Each ends in a summary; where it compares chains, they agree.
    lines = [line.split() for line in done.stdout.splitlines()]
    header = next(line for line in lines if line[:2] == ["mean", "sd"])
    # A name may hold blanks ("x[0, 1]"): columns are counted from the right.
    rows = [line[-len(header) :] for line in lines[lines.index(header) + 1 :]]
    rows = [row for row in rows if len(row) == len(header)]
    assert rows
    if "r_hat" in header:
        for row in rows:
            if re.fullmatch(r"[\d.]+", row[header.index("r_hat")]):
                assert float(row[header.index("r_hat")]) < 1.02


@members(
    MODULES,
    quick=[
        name
        for name in MODULES
        if name.startswith(("probbp.samplers.", "probbp.estimators")) and "surrogate" not in name
    ],
)
def test_docstrings_run(name):
    module = importlib.import_module(name)
    results = doctest.testmod(module)
    assert results.failed == 0
