"""README says what the stored results say, and the runner runs what is due and tells what fails."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAPERS = ROOT / "examples" / "papers"
SCRIPTS = sorted(PAPERS.glob("[!_]*.py"))
RESULTS = sorted((PAPERS / "results").glob("*.json"))
OWN = ("__main__", "_evidence", "_papers", "_results", "_table")

FAKE = """
import json, os, pathlib, sys
import _shared
name, results = pathlib.Path(__file__).stem, pathlib.Path(sys.argv[2])
record = json.loads((pathlib.Path(__file__).parent / "record.json").read_text())
record["digest"] = os.environ["DIGEST_OF_" + name]
(results / f"{name}.json").write_text(json.dumps(record))
(results / "runs.txt").open("a").write(name + " ")
"""
FIGURE = {"what": "error", "mean": 1.0, "low": 0.5, "high": 1.5, "unit": ""}
RECORD = {
    "paper": {"title": "A title", "authors": "Authors", "arxiv": "0000.00000"},
    "claim": "A claim.",
    "setting": "A setting.",
    "caption": "A caption.",
    "ours": FIGURE,
    "baseline": FIGURE,
    "checks": [FIGURE | {"claim": "small", "side": "below", "bound": 2.0, "holds": True}],
    "verdict": "holds",
    "command": "a command",
    "commit": "abc",
    "cpu_seconds": 1,
    "versions": {},
}


def load(folder, name, monkeypatch):
    """Return a module of a folder of reproductions; those that it imports are from there too."""
    for own in OWN[1:]:
        monkeypatch.delitem(sys.modules, own, raising=False)
    monkeypatch.syspath_prepend(folder)
    spec = importlib.util.spec_from_file_location(f"of_papers{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------


def test_a_result_is_of_its_script_and_has_a_picture():
    for path in RESULTS:
        result = json.loads(path.read_text())
        assert result["script"] == path.stem
        assert result["command"] == f"python examples/papers/{path.stem}.py"
        assert not result["fast"]
        picture = path.with_suffix(".png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 5_000


def test_there_are_results_and_each_is_of_a_script():
    assert RESULTS
    assert {path.stem for path in RESULTS} <= {path.stem for path in SCRIPTS}


def test_a_verdict_follows_from_the_checks():
    for path in RESULTS:
        result = json.loads(path.read_text())
        held = []
        for check in result["checks"]:
            is_below = check["side"] == "below"
            end = check["high" if is_below else "low"]
            sign = 1 if is_below else -1
            held.append(end is not None and sign * end < sign * check["bound"])
            assert check["holds"] == held[-1], (path.stem, check["claim"])
        assert held
        verdict = "holds" if all(held) else "partly" if any(held) else "doesn't"
        assert result["verdict"] == verdict, path.stem


def test_the_table_in_readme_is_that_of_the_stored_results(monkeypatch):
    table = load(PAPERS, "_table", monkeypatch)
    inside = table.between((ROOT / "README.md").read_text())
    assert inside is not None, "README has no markers"
    stored = table.load(PAPERS / "results", [path.stem for path in SCRIPTS])
    assert inside == table.table(stored)


@pytest.mark.parametrize(("high", "labels"), [(30.0, ["5", "10", "20"]), (3000.0, None)])
def test_short_logarithmic_axes_have_plain_numbers(high, labels, monkeypatch):
    results = load(PAPERS, "_results", monkeypatch)
    figure, (ax,) = results.panels(1)
    ax.set(xscale="log", xlim=(3.0, high))
    results.number_short_log_axes(figure)
    seen = [
        label.get_text() for label in ax.get_xticklabels() if 3 <= label.get_position()[0] <= high
    ]
    assert seen == labels if labels else all("10^" in label for label in seen)


# ---------------------------------------------------------------------------------------
# The runner, on a copy with two scripts that do nothing but leave a result.


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs the runner, and returns its status and which scripts ran."""
    folder = tmp_path / "examples" / "papers"
    folder.mkdir(parents=True)
    for name in OWN:
        shutil.copy(PAPERS / f"{name}.py", folder)
    for name in ("first", "second"):
        (folder / f"{name}.py").write_text(FAKE)
    (folder / "_shared.py").write_text("")
    (folder / "record.json").write_text(json.dumps(RECORD))
    (tmp_path / "README.md").write_text("Before.\n<!-- results -->\n<!-- /results -->\nAfter.\n")
    runner = load(folder, "__main__", monkeypatch)

    def run(*words):
        for path in folder.glob("[!_]*.py"):
            monkeypatch.setenv(f"DIGEST_OF_{path.stem}", runner.digest(path))
        runs = folder / "results" / "runs.txt"
        runs.unlink(missing_ok=True)
        status = runner.main(list(words))
        return status, sorted(runs.read_text().split()) if runs.exists() else []

    run.folder, run.readme = folder, tmp_path / "README.md"
    return run


def test_the_runner_runs_what_is_due(run):
    assert run() == (0, ["first", "second"])
    begin, *rows, end = run.readme.read_text().splitlines()
    assert (begin, end) == ("Before.", "After.")
    assert sum("| holds, 1 of 1 checks |" in row for row in rows) == 2
    assert run() == (0, [])
    (run.folder / "results" / "first.json").unlink()  # as if interrupted
    assert run() == (0, ["first"])
    (run.folder / "second.py").write_text(FAKE + "another = True\n")
    assert run() == (0, ["second"])
    (run.folder / "_shared.py").write_text("what_both_import = True\n")
    assert run("first") == (0, ["first"])
    assert run() == (0, ["second"])
    assert run("first", "--fresh") == (0, ["first"])


def test_layout_comments_and_docstrings_make_nothing_due(run):
    run()
    other = FAKE.replace("os.environ[", "os.environ[\n    ").replace("import json", "import  json")
    (run.folder / "first.py").write_text(f'"""What it is."""\n# a comment\n{other}')
    (run.folder / "_shared.py").write_text('"""What both import."""\n')
    assert run() == (0, [])


@pytest.mark.parametrize("program", ["raise SystemExit(3)", "pass"], ids=["dies", "leaves nothing"])
def test_a_script_that_fails_stops_no_other_and_is_told(run, program, capsys):
    run()
    (run.folder / "first.py").write_text(program)
    (run.folder / "second.py").write_text(FAKE + "another = True\n")
    assert run() == (1, ["second"])
    assert "first failed" in capsys.readouterr().err
    assert not (run.folder / "results" / "first.json").exists()
    assert run.readme.read_text().count("| not run |") == 1


def test_the_runner_rejects_names_that_are_no_scripts(run, capsys):
    with pytest.raises(SystemExit) as stop:
        run("first", "frist")
    assert (stop.value.code, "frist" in capsys.readouterr().err) == (2, True)
    assert not (run.folder / "results").exists()
