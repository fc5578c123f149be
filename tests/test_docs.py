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
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
}
LINKS = [
    pytest.param(page, link, id=f"{page.relative_to(ROOT)}-{link}")
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


@pytest.mark.parametrize("code", CODE, ids=CODE.values())
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


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_a_link_leads_somewhere(page, link):
    name, _, anchor = link.partition("#")
    target = page.parent / name if name else page
    assert target.is_file()
    if anchor:
        headings = re.findall(r"(?m)^#+ (.*)$", target.read_text())
        slugs = {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}
        assert anchor in slugs


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_that_is_named_is_there(path):
    named = re.findall(r"(?:examples|tests|docs)/[\w/]+\.(?:py|md)", path.read_text())
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("name", sorted(MODULES - {"probbp.samplers.curvature"}))
def test_what_is_public_is_documented(name):
    """It is in the reference, an example has it, and its docstring speaks of each parameter."""
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
