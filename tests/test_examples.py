"""Every example, every docstring's example, and the README's code run."""

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
README = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
SOURCES = sorted({*(ROOT / "probbp").rglob("*.py"), *(ROOT / "probbp" / "models").rglob("*.py")})
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in SOURCES
    if path.name != "__init__.py"
]


def run(arguments, folder):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs_and_leaves_a_picture(path, tmp_path):
    output = run([str(path), "picture.png"], tmp_path)
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    # Each ends in a summary; where it compares chains, they agree.
    lines = [line.split() for line in output.splitlines()]
    header = next(line for line in lines if line[:2] == ["mean", "sd"])
    # A name may hold blanks ("x[0, 1]"): columns are counted from the right.
    rows = [line[-len(header) :] for line in lines[lines.index(header) + 1 :]]
    rows = [row for row in rows if len(row) == len(header)]
    assert rows
    if "r_hat" in header:
        for row in rows:
            if re.fullmatch(r"[\d.]+", row[header.index("r_hat")]):
                assert float(row[header.index("r_hat")]) < 1.02


@pytest.mark.parametrize("code", README, ids=range(len(README)))
def test_the_readme_runs(code, tmp_path):
    script = tmp_path / "readme.py"
    script.write_text(code)
    run([str(script)], tmp_path)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_run(name):
    module = importlib.import_module(name)
    results = doctest.testmod(module)
    assert results.failed == 0
