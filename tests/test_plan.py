"""Who may import whom, and how long functions are, read from the sources."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import probbp

ROOT = Path(__file__).parent.parent

# room -> the rooms of ours that it may import; its own files always.
ALLOWED = {
    "types": set(),
    "checks": set(),
    "inference_data": set(),
    "estimators": {"types", "checks"},
    "ops": {"types", "checks"},
    "runs": {"types", "checks"},
    "samplers": {"types", "checks", "runs"},
    "optim": {"types", "checks"},
    "diagnostics": {"types", "checks", "inference_data"},
    "numpyro": {"types", "checks", "samplers"},
    "models": {"checks", "inference_data", "ops", "runs"},
}
# What a room gets from its hosts.
HOSTS = {
    "runs": {"jax", "numpy", "orbax", "tqdm"},
    "samplers": {"jax", "numpy", "blackjax", "optax", "tqdm", "zarr", "xarray"},
    "estimators": {"jax", "optax"},
    "ops": {"jax"},
    "optim": {"jax", "optax", "blackjax", "matfree"},
    "diagnostics": {
        "jax",
        "numpy",
        "scipy",
        "optax",
        "tqdm",
        "xarray",
        "matplotlib",
        "numpyro",
    },
    "numpyro": {"jax", "numpyro", "blackjax", "optax"},
    "types": {"jax"},
    "checks": {"jax", "numpy"},
    "inference_data": {"arviz", "arviz_stats", "numpy"},
    "models": {
        "jax",
        "numpy",
        "numpyro",
        "optax",
        "tqdm",
        "flax",
        "equinox",
        "quax",
        "safetensors",
        "orbax",
    },
}
# The one exception: `sample` hands its chains to ArviZ, at the end and not at import.
EXCEPTIONS = {("samplers/results.py", "diagnostics")}

FILES = sorted((ROOT / "probbp").rglob("*.py")) + sorted((ROOT / "models").rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(path):
    if ROOT / "models" in path.parents:
        return "models"
    relative = path.relative_to(ROOT / "probbp")
    return relative.parts[0].removesuffix(".py")


def is_allowed(path, name):
    """Whether a file may import what is called `name`."""
    room = room_of(path)
    top, *rest = name.split(".")
    if room == "__init__" or top in sys.stdlib_module_names:
        return True
    if top != "probbp":
        return top in HOSTS[room]
    other = rest[0]
    exception = "/".join(path.parts[-2:]), other
    return other == room or other in ALLOWED[room] or exception in EXCEPTIONS


def test_imports():
    refused = [(path, name) for path in FILES for name in imports(path)]
    assert [pair for pair in refused if not is_allowed(*pair)] == []


def test_every_room_is_in_the_table():
    assert {room_of(path) for path in FILES} - {"__init__"} <= set(ALLOWED)


def body_length(function):
    body = function.body if ast.get_docstring(function) is None else function.body[1:]
    return function.end_lineno - body[0].lineno + 1 if body else 0


def test_no_function_is_long():
    """A body, its docstring aside, has at most 80 lines."""
    long = set()
    for path in (*FILES, *(ROOT / "examples").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and body_length(node) > 80:
                long.add((str(path.relative_to(ROOT)), node.name))
    assert long == set()


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert probbp.__version__ == project["version"]
    mentions = re.compile(rf"(?<![\d.]){re.escape(project['version'])}(?![\d.])")
    others = [path for path in (*FILES, ROOT / "CITATION.cff") if mentions.search(path.read_text())]
    assert not others


def test_the_shop_window_is_light():
    """`import probbp` imports neither NumPyro nor ArviZ."""
    code = "import probbp, sys; print({'numpyro', 'arviz'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
