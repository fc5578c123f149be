"""What is built and installed: sources alone, in nobody's way, with or without links."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow

FILES = (".gitignore", "LICENSE", "README.md", "pyproject.toml")
FOLDERS = (".ci", "models", "probbp")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """One in which the link is a file, with what a build leaves among the sources."""
    folder = tmp_path_factory.mktemp("checkout") / "probbp"
    folder.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    for name in FOLDERS:
        leave = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=leave)
    link = folder / "probbp" / "models"
    link.unlink()
    link.write_text("../models")  # as Git writes it where links are not made
    for name in ("dist/w.bin", "blob/__pycache__/model.cpython-311.pyc", "notes.txt"):
        path = folder / "models" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"nothing")
    return folder


def sources(checkout):
    """Return the names of all modules, as a wheel has them."""
    names = {path.relative_to(checkout) for path in (checkout / "probbp").rglob("*.py")}
    names |= {Path("probbp", p.relative_to(checkout)) for p in (checkout / "models").rglob("*.py")}
    return {str(name) for name in names}


def pip(*args):
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *map(str, args)], check=True)


def test_a_wheel_has_the_sources_and_nothing_else(checkout, tmp_path):
    pip("wheel", "--no-deps", "--wheel-dir", tmp_path, checkout)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == sources(checkout) | {"probbp/py.typed"}


def test_an_editable_install_names_the_package_alone(checkout, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip("--python", python, "install", "--no-deps", "--editable", checkout)
    (packages,) = (tmp_path / "venv" / "lib").glob("*/site-packages")
    # No copy, which would grow old, but the way to what is edited.
    (file,) = (packages / "probbp").rglob("*.py")
    assert str(checkout / "probbp" / "__init__.py") in file.read_text()
    found = "import importlib.util as i; print(*map(i.find_spec, ('models', 'tests')))"
    command = [python, "-I", "-c", found]
    assert subprocess.check_output(command, text=True).split() == ["None", "None"]
    # Also beside the clone, whose folder has the package's name.
    found = "import importlib.util as i; print(i.find_spec('probbp').origin)"
    command = [python, "-c", found]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    origin = subprocess.check_output(command, text=True, cwd=checkout.parent, env=alone).strip()
    assert Path(origin) == file


def test_models_are_found_without_the_link(checkout):
    command = [sys.executable, "-c", "import probbp.models.bnn; print(probbp.models.bnn.__file__)"]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    found = subprocess.check_output(command, text=True, env=environment, cwd=checkout.parent)
    assert Path(found.strip()) == checkout / "models" / "bnn.py"
