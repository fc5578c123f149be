"""README and pages: their code runs, their links lead somewhere, and nothing is left out."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = {  # what stands on two pages runs once
    code: f"{page.relative_to(ROOT)}-{number}"
    for page in reversed(PAGES)  # under the name of the first
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
}
LINKS = [
    (page, link)
    for page in PAGES
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text())
]
SOURCES = sorted(
    path for room in ("probbp", "models", "examples") for path in (ROOT / room).rglob("*.py")
)
# What stands in code that runs: of docstrings, pages and examples.
SHOWN = {
    word
    for text in (
        *CODE,
        *(line for path in SOURCES for line in re.findall(r"(?:>>>|\.{3}) (.*)", path.read_text())),
        *(path.read_text() for path in (ROOT / "examples").glob("*.py")),
    )
    for word in re.findall(r"\w+", text)
}
REFERENCE = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
FOLDERS = {path.parent for path in (ROOT / "probbp").glob("[!m]*/**/__init__.py")}
FOLDERS |= {path.parent for path in (ROOT / "probbp" / "models").glob("*/__init__.py")}
MODULES = {".".join(path.relative_to(ROOT).parts) for path in FOLDERS}
MODULES |= {"probbp", *re.findall(r"automodule:: (\S+)", REFERENCE)}

WITHOUT_SIGNATURE = {"Acceptance", "Prediction"}  # type aliases


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(code, id=name, marks=() if name.startswith("README") else pytest.mark.slow)
        for code, name in CODE.items()
    ],
)
def test_the_code_runs(code, tmp_path, monkeypatch):
    if "jax.config" in code:  # what is set before JAX starts
        script = tmp_path / "block.py"
        script.write_text(code)
        done = subprocess.run(
            [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return
    monkeypatch.chdir(tmp_path)
    with jax.enable_x64(False):
        exec(compile(code, "block", "exec"), {"__name__": "__main__"})


def leads_somewhere(page, link):
    name, _, anchor = link.partition("#")
    target = page.parent / name if name else page
    if not (target.is_file() and anchor):
        return target.is_file()
    headings = re.findall(r"(?m)^#+ (.*)$", target.read_text())
    slugs = {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}
    return anchor in slugs


def test_links_lead_somewhere():
    assert LINKS
    assert [pair for pair in LINKS if not leads_somewhere(*pair)] == []


def test_files_that_are_named_are_there():
    named = {
        (str(path.relative_to(ROOT)), name)
        for path in (*PAGES, *SOURCES)
        for name in re.findall(r"(?:examples|tests|docs)/[\w/]+\.(?:py|md)", path.read_text())
    }
    assert named
    assert [pair for pair in sorted(named) if not (ROOT / pair[1]).is_file()] == []


def test_what_is_public_is_documented():
    """It is in the reference, an example has it, and its docstring speaks of each parameter."""
    for name in sorted(MODULES - {"probbp.samplers.curvature"}):
        check_module(name)


def check_module(name):
    module = importlib.import_module(name)
    own = [n for n, x in vars(module).items() if getattr(x, "__module__", None) == name]
    for public in getattr(module, "__all__", [n for n in own if not n.startswith("_")]):
        thing = getattr(module, public)
        if inspect.ismodule(thing):
            assert thing.__name__ in MODULES
            continue
        listed = {f"automodule:: {name}\n", f"autofunction:: {public}\n"}
        assert any(line in REFERENCE for line in listed), (
            f"{name}.{public} is not in docs/reference"
        )
        if not callable(thing) or public in WITHOUT_SIGNATURE:
            continue
        assert inspect.isclass(thing) or public in SHOWN, f"no example has {name}.{public}"
        words = re.findall(r"\w+", inspect.getdoc(thing) or "")
        assert words, f"{name}.{public} has no docstring"
        unsaid = set(inspect.signature(thing).parameters) - set(words) - {"args", "kwargs"}
        assert not unsaid, f"the docstring of {name}.{public} is silent on {unsaid}"
