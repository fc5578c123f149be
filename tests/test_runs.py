"""Checkpoints and streams: what was interrupted goes on, what is not this run is refused."""

import gc
import json
import os
import pickle
import re
import shutil
import tracemalloc
from functools import cache, partial
from pathlib import Path

import arviz as az
import jax
import jax.numpy as jnp
import long_run
import numpy as np
import pandas as pd
import pytest
import xarray as xr

import probbp
from probbp.runs import checkpoints
from probbp.runs.fingerprints import fingerprint
from probbp.samplers import progress, sinks, streams
from probbp.samplers.adaptation import adaptation
from probbp.samplers.programs import programs
from probbp.samplers.scan import checkpointed_scan

OPTIONS = {"num_warmup": 3, "num_samples": 22, "every": 6, "num_chains": 3, "metric": None}
CENTRE = jnp.arange(2.0)


def draw(key=0, centre=CENTRE, algorithm=probbp.mala, **options):
    """Draws of a Gaussian, with what is derived of them."""
    return probbp.sample(
        jax.random.key(key),
        partial(algorithm, lambda x: -0.5 * jnp.sum((x["a"] - centre) ** 2) - x["b"] ** 2),
        {"a": jnp.zeros(2), "b": jnp.zeros(())},
        postprocess_fn=lambda x: x | {"is_high": x["b"] > 0, "exp": jnp.exp(x["a"])},
        coords={"which": ["first", "second"]},
        dims={"a": ["which"]},
        **OPTIONS | {"progress_bar": False} | options,
    )


def arrays(data):
    return {
        f"{group}.{name}": array.values
        for group in ("posterior", "sample_stats")
        for name, array in data[group].data_vars.items()
    }


def same(theirs, ours):
    assert theirs.keys() == ours.keys()
    for name in ours:
        assert theirs[name].dtype == ours[name].dtype, name
        np.testing.assert_array_equal(theirs[name], ours[name], err_msg=name)


# What follows is asked for within a test, where `conftest.py` has set how programs are compiled.
_plain = cache(lambda: arrays(draw()))


@cache
def _finished(folder):
    draw(checkpoint=folder)
    return folder


@pytest.fixture
def plain():
    return _plain()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def finished(place):
    """A checkpoint of a run that is done."""
    return _finished(place)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def states(run):
    return sorted((run / checkpoints.STATES).iterdir(), key=lambda path: int(path.name))


# ---------------------------------------------------------------------------------------
# What is written


def test_a_stream_has_the_draws_and_their_moments(plain, tmp_path):
    data = draw(stream=tmp_path / "draws", every=7)
    assert isinstance(data, type(draw(num_samples=4, num_warmup=1)))
    assert not data["posterior"]["a"].variable._in_memory
    same(arrays(data), plain)
    assert list(data["posterior"]["a"]["which"].values) == ["first", "second"]
    for name in ("a", "b", "exp", "is_high"):
        draws = plain[f"posterior.{name}"].astype(float)
        moments = data["moments"][name]
        np.testing.assert_allclose(moments.sel(moment="mean"), draws.mean(axis=1), rtol=1e-12)
        np.testing.assert_allclose(
            moments.sel(moment="sd"), draws.std(axis=1, ddof=1), rtol=1e-12, atol=1e-12
        )
    # Others read it as well.
    tree = xr.open_datatree(tmp_path / "draws", engine="zarr", chunks=None, consolidated=False)
    summary = az.summary(tree["posterior"].to_dataset(), var_names=["a"])
    assert set(summary.index) == {"a[first]", "a[second]"}


@pytest.mark.slow
def test_memory_does_not_grow_with_the_run(tmp_path, monkeypatch):
    """Of a stream the host holds one piece at a time, of twenty."""
    sizes, add = [], progress.add

    def weighed(*args):
        if not tracemalloc.is_tracing():
            tracemalloc.start()
        gc.collect()  # the suite lets it wait
        sizes.append(tracemalloc.get_traced_memory()[0])
        return add(*args)

    monkeypatch.setattr(progress, "add", weighed)
    algorithm = partial(probbp.mala, lambda x: -0.5 * jnp.sum(x**2))
    options = {
        "num_warmup": 0,
        "num_samples": 400,
        "every": 20,
        "metric": None,
        "initial_step_size": 0.01,
        "num_chains": 2,
    }
    probbp.sample(
        jax.random.key(0),
        algorithm,
        jnp.zeros(1000),
        stream=tmp_path / "draws",
        progress_bar=False,
        **options,
    )
    tracemalloc.stop()
    piece = 20 * 2 * 1000 * 8
    assert len(sizes) == 20
    assert max(sizes[2:]) - sizes[2] < piece


def test_a_checkpoint_gives_the_draws_of_memory(plain, tmp_path):
    data = draw(checkpoint=tmp_path / "run")
    same(arrays(data), plain)
    assert data["posterior"]["a"].variable._in_memory
    # Once more: nothing is computed but what the fingerprint takes.
    same(arrays(draw(checkpoint=tmp_path / "run")), plain)
    assert [path.name for path in states(tmp_path / "run")] == ["21", "25"]


def test_the_step_size_of_the_draws_is_the_averaged_one():
    adapt = adaptation(1, 10, 0.5, metric=None)
    state = adapt.initial
    for rate in np.linspace(0.0, 1.0, 7):
        state = adapt.update(state, jnp.zeros(2, bool), jnp.zeros(1), rate)
    learn = programs(probbp.mala, adapt, None, 1.0, 1, None).learn
    learnt = learn(jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], state))
    wanted = np.exp(state.dual_averaging.log_step_size_avg)
    np.testing.assert_allclose(learnt["step_size"], wanted, rtol=1e-12)
    assert abs(state.step_size / wanted - 1) > 0.01


# ---------------------------------------------------------------------------------------
# Interrupted


class Stop(Exception):
    pass


def stop(monkeypatch, where, times):
    """Stop the run at the `times`-th call of a function, `where`, counted from now."""
    module, name = where
    calls, function = [], getattr(module, name)

    def stopping(*args, **kwargs):
        calls.append(name)
        if len(calls) == times:
            raise Stop
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, stopping)


@pytest.mark.parametrize(
    ("where", "times"),
    [
        ((checkpoints, "_digest"), 2),  # in warm-up
        ((sinks, "variables"), 2),  # neither draws nor state are written
        ((progress, "add"), 2),  # the draws are written, the state is not
    ],
    ids=["warm-up", "before draws", "between draws and state"],
)
def test_an_interrupted_run_goes_on(where, times, plain, tmp_path, monkeypatch):
    options = {"checkpoint": tmp_path / "run"}
    with monkeypatch.context() as patch:
        stop(patch, where, times)
        with pytest.raises(Stop):
            draw(**options)
    same(arrays(draw(**options)), plain)


def test_a_run_may_have_its_state_here_and_its_draws_there(plain, tmp_path, monkeypatch):
    options = {"checkpoint": tmp_path / "run", "stream": tmp_path / "draws"}
    with monkeypatch.context() as patch:
        stop(patch, (progress, "add"), 3)
        with pytest.raises(Stop):
            draw(**options)
    data = draw(**options)
    same(arrays(data), plain)
    mean = data["moments"]["a"].sel(moment="mean")
    np.testing.assert_allclose(mean, plain["posterior.a"].mean(axis=1), rtol=1e-12)
    shutil.rmtree(tmp_path / "draws")
    with pytest.raises(ValueError, match="knows of 22 draws"):
        draw(**options)


# ---------------------------------------------------------------------------------------
# Refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": 1}, "differs: key and start"),
        ({"centre": CENTRE.at[1].add(1e-15 + 1e-15)}, "the program of the draws"),
        ({"algorithm": partial(probbp.mala, key_policy="shared")}, "program of the draws"),
        ({"dispersion": 1.5}, "differs: the program of the start"),
        ({"target_acceptance_rate": 0.5}, "differs: the program of the warm-up"),
        ({"num_samples": 23}, r"num_samples \(22 there, 23 here\)"),
        ({"every": 5}, r"every \(6 there, 5 here\)"),
        ({"num_warmup": 2}, "num_warmup"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_run_is_refused(change, words, finished):
    with pytest.raises(ValueError, match=words):
        draw(checkpoint=finished, **change)


def test_another_version_of_jax_is_refused(finished, monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.1.2")
    with pytest.raises(ValueError, match=r"version of JAX \(.* there, 0.1.2 here\)"):
        draw(checkpoint=finished)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def damage_of(name):
    def arrays(state):
        flip(largest(state / "arrays"))

    def text(state):
        (file,) = (p for p in (state / "rest").iterdir() if p.name == "metadata")
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | {"done": 24}))

    def cut(state):
        file = largest(state)
        file.write_bytes(file.read_bytes()[:-20])

    def missing(state):
        shutil.rmtree(state / "arrays")

    def exchanged(state):
        (other,) = (path for path in state.parent.iterdir() if path != state)
        shutil.rmtree(state / "arrays")
        shutil.copytree(other / "arrays", state / "arrays")

    return locals()[name]


@pytest.mark.parametrize("damage", ["arrays", "text", "cut", "missing", "exchanged"])
def test_the_newest_intact_state_wins(damage, run, plain):
    older, newer = states(run)
    damage_of(damage)(newer)
    with pytest.warns(UserWarning, match="is damaged. The run goes on from step 21"):
        same(arrays(draw(checkpoint=run)), plain)
    if damage == "exchanged":
        return
    damage_of(damage)(states(run)[0])
    damage_of(damage)(states(run)[1])
    with pytest.raises(ValueError, match="No checkpoint in .* is intact"):
        draw(checkpoint=run)


def test_damaged_draws(run):
    pieces = run / "draws.zarr" / "posterior" / "a" / "c" / "0"
    piece = pieces / "1" / "0"
    flip(piece)
    with pytest.raises(ValueError, match="posterior/a/c/0/1/0 is not what this run wrote there"):
        draw(checkpoint=run)
    piece.unlink()
    with pytest.raises(ValueError, match="lacks 1 of the 4 pieces of posterior/a"):
        draw(checkpoint=run)


@pytest.mark.parametrize("taken", ["piece", "piece and seal"])
@pytest.mark.parametrize("origin", ["another run", "another place", "another variable"])
def test_draws_of_another_run_or_place_are_not_taken_for_this_run_s(run, tmp_path, taken, origin):
    """Their checksums are right, and their shapes."""
    draws = run / "draws.zarr" / "posterior"
    ours = draws / "a" / "c" / "0" / "1" / "0", draws / "a" / "seals" / "1"
    theirs = {
        "another place": (draws / "a" / "c" / "0" / "2" / "0", draws / "a" / "seals" / "2"),
        "another variable": (draws / "exp" / "c" / "0" / "1" / "0", draws / "exp" / "seals" / "1"),
    }
    if origin == "another run":
        draw(checkpoint=tmp_path / "other", key=1)
        other = tmp_path / "other" / "draws.zarr" / "posterior" / "a"
        theirs[origin] = other / "c" / "0" / "1" / "0", other / "seals" / "1"
    for source, target in zip(theirs[origin], ours, strict=True):
        shutil.copy(source, target)
        if taken == "piece":
            break
    with pytest.raises(ValueError, match="a/c/0/1/0 is not what this run wrote there: .* seal"):
        draw(checkpoint=run)


def test_a_seal_that_is_lost_is_missed(run):
    (run / "draws.zarr" / "sample_stats" / "lp" / "seals" / "0").unlink()
    with pytest.raises(ValueError, match="lp/c/0/0 is not what this run wrote there"):
        draw(checkpoint=run)


def test_moments_that_are_lost_are_written_again(run, plain):
    shutil.rmtree(run / "draws.zarr" / "moments" / "a" / "c")
    mean = draw(checkpoint=run)["moments"]["a"].sel(moment="mean")
    np.testing.assert_allclose(mean, plain["posterior.a"].mean(axis=1), rtol=1e-12)


def test_what_is_no_checkpoint_is_refused_and_left_alone(tmp_path, run):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no checkpoint of this function: it holds 'm"):
        draw(checkpoint=tmp_path)
    with pytest.raises(ValueError, match="is no Zarr store"):
        draw(stream=tmp_path)
    with pytest.raises(ValueError, match="is not the store of this run"):
        draw(key=1, stream=run / "draws.zarr")
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("number", ["7", "2024"])
def test_what_lies_among_the_states_is_left_alone(run, number):
    """A run keeps its two newest states: older and damaged ones are removed, no others."""
    photos = run / checkpoints.STATES / number
    photos.mkdir()
    (photos / "beach.jpg").write_text("sand")
    with pytest.raises(ValueError, match=f"it holds 'states/{number}/beach.jpg'. Name a folder"):
        draw(checkpoint=run)
    assert (photos / "beach.jpg").read_text() == "sand"


def test_links_out_of_the_folder_are_refused(run, tmp_path):
    outside = tmp_path / "outside"
    state = states(run)[-1]
    shutil.move(state / "arrays", outside)
    os.symlink(outside, state / "arrays")
    with pytest.raises(ValueError, match="is a link to .*outside.* Such a checkpoint is not read"):
        draw(checkpoint=run)
    os.unlink(state / "arrays")
    os.symlink(Path("..", "..", "..", "outside"), state / "arrays")
    with pytest.raises(ValueError, match="is a link to"):
        draw(checkpoint=run)


@pytest.mark.parametrize("name", ["draws", "[d]raws*"])
def test_what_is_not_the_run_s_own_is_not_removed(name, tmp_path, monkeypatch):
    """Folders beside a store whose names begin as that of an unfinished one would."""
    others = [tmp_path / f"{name}.partial-{end}" for end in ("1", str(os.getpid()), "thesis")]
    others += [tmp_path / "draws.partial-1", tmp_path / "d.partial-2"]
    for folder in others:
        folder.mkdir(exist_ok=True)
        (folder / "mine.txt").write_text("mine")
    # A marker that is none, another run's, and none of this folder's own.
    (others[0] / "zarr.json").write_text('{"attributes": []}')
    (tmp_path / "away").mkdir()
    for key, folder in ((1, tmp_path / name), (0, tmp_path / "away" / name)):
        with monkeypatch.context() as patch:
            stop(patch, (streams, "_digest"), 1)
            with pytest.raises(Stop):
                draw(key=key, stream=folder)
    (theirs,) = {*tmp_path.glob("*.partial-*")} - {*others}
    (ours,) = (tmp_path / "away").iterdir()
    (tmp_path / f"{name}.partial-link").symlink_to(ours)
    (others[2] / "zarr.json").symlink_to(ours / "zarr.json")
    own = shutil.copytree(ours, tmp_path / f"{name}.partial-own")
    draw(stream=tmp_path / name)
    assert not own.exists()
    assert theirs.exists()
    assert (ours / "zarr.json").exists()
    assert all((folder / "mine.txt").read_text() == "mine" for folder in others)


@pytest.mark.parametrize("name", ["../../escape", "..", "a/b"])
def test_names_that_are_no_names_of_files_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="can't name an array on disk|takes no name with '/'"):
        probbp.sample(
            jax.random.key(0),
            partial(probbp.mala, lambda x: -0.5 * x[name] ** 2),
            {name: jnp.zeros(())},
            stream=tmp_path / "a" / "b" / "draws",
            **OPTIONS,
        )
    assert list(tmp_path.iterdir()) == []


def test_no_code_is_run(run, monkeypatch):
    """Neither by what we read, nor where another store names a codec that would."""

    def refuse(*args, **kwargs):
        raise AssertionError("pickle was called")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    draw(checkpoint=run)
    metadata = run / "draws.zarr" / "posterior" / "a" / "zarr.json"
    content = json.loads(metadata.read_text())
    content["codecs"].append({"name": "gzip", "configuration": {"level": 1}})
    metadata.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="The layout of .* is not what was written"):
        draw(checkpoint=run)
    monkeypatch.setattr(
        streams, "_digest", lambda *args: json.loads(root.read_text())["attributes"]["digest"]
    )
    root = run / "draws.zarr" / "zarr.json"
    with pytest.raises(ValueError, match="has codecs that are not ours"):
        draw(checkpoint=run)


@pytest.mark.parametrize("option", ["checkpoint", "stream"])
def test_missing_packages_are_named(option, tmp_path, monkeypatch):
    for name in ("orbax", "orbax.checkpoint", "zarr"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ImportError, match=re.escape("pip install 'probbp[runs]'")):
        draw(**{option: tmp_path / "run"})


# ---------------------------------------------------------------------------------------
# The fingerprint


def test_a_fingerprint_sees_data_wherever_they_are():
    def of(data):
        inner = jax.jit(lambda x: jnp.sum(data * x))

        def program(x):
            return jax.lax.scan(lambda c, _: (c + jax.grad(inner)(c), None), x, None, length=2)

        return fingerprint({"program": (program, (1.0,))}, (), {})["program"]

    data = np.arange(5.0)
    changed = np.nextafter(data, 9.0)
    assert of(jnp.asarray(data)) == of(jnp.asarray(data)) == of(data)
    assert of(jnp.asarray(changed)) != of(jnp.asarray(data))
    assert of(changed) != of(data)


def test_a_fingerprint_sees_what_is_computed_and_not_in_which_order():
    def of(f):
        def program(x, y):
            return jax.lax.scan(lambda c, _: (f(c, y), None), x, None, length=2)

        prints = fingerprint({"program": (program, (1.0, 2.0))}, (), {})
        return prints["program"], prints["the order of sums in program"]

    def one(x, y):
        return jnp.sin(x) + jnp.cos(y) + x * y

    def other(x, y):
        product, cosine = x * y, jnp.cos(y)
        return product + jnp.sin(x) + cosine

    assert of(one)[0] == of(other)[0]
    assert of(one)[1] != of(other)[1]
    assert of(lambda x, y: x - y)[0] != of(lambda x, y: y - x)[0]
    assert of(lambda x, y: x + x + y)[0] != of(lambda x, y: x + y + y)[0]
    assert of(lambda x, y: x * 2)[0] != of(lambda x, y: x * 3)[0]
    inner = jax.jit(lambda x, y: x - y)
    assert of(inner)[0] != of(lambda x, y: inner(y, x))[0]
    branches = [lambda x: x, lambda x: -x]
    choices = [of(lambda x, y, b=b: jax.lax.cond(y > 0, *b, x)) for b in (branches, branches[::-1])]
    assert choices[0][0] != choices[1][0]
    loops = [
        of(lambda x, y, n=n: jax.lax.while_loop(lambda c: c < n, lambda c: c + y, x))
        for n in (3, 4)
    ]
    assert loops[0][0] != loops[1][0]


@pytest.mark.parametrize(
    "labels",
    [
        np.arange,
        jnp.arange,
        lambda num: [f"row {i}" for i in range(num)],
        lambda num: np.array([f"row {i}" for i in range(num)], dtype=object),
        lambda num: pd.Index(range(num)).astype(str),
        lambda num: pd.date_range("2020-01-01", periods=num),
        lambda num: xr.DataArray(np.arange(num) / 7),
    ],
)
def test_a_fingerprint_reads_all_of_a_setting(labels):
    """Also what a `repr` leaves out: with 1,200 labels, those in the middle."""

    def of(labels, **others):
        settings = {"coords": {"row": labels, **others}}
        return fingerprint({}, (), settings)["coords"]

    num, order = 1200, np.arange(1200)
    order[[600, 601]] = order[[601, 600]]
    swapped = labels(num)
    swapped = [swapped[i] for i in order] if isinstance(swapped, list) else swapped[order]
    assert of(labels(num)) == of(labels(num))
    assert of(swapped) != of(labels(num))
    assert of(labels(num), one=[1]) != of(labels(num), two=[1])
    assert of(labels(3)) != of(labels(4))


def test_another_order_of_sums_is_told(tmp_path):
    terms = {"x": jnp.sin, "y": jnp.cos, "z": jnp.tan}

    def loop(order):
        def f(x, _):
            values = {name: term(x) for name, term in terms.items()}
            return sum(values[name] for name in order), None

        options = {"every": 3, "progress_bar": False}
        return checkpointed_scan(f, jnp.array(0.5), 10, checkpoint=tmp_path / "loop", **options)

    loop("xyz")
    with pytest.warns(UserWarning, match="adds in another order .* PYTHONHASHSEED"):
        loop("zxy")


# ---------------------------------------------------------------------------------------
# Progress


def test_rhat_so_far_is_gelman_and_rubin_s():
    draws = np.random.default_rng(0).normal(size=(4, 90, 3)) + np.arange(4)[:, None, None] / 3
    moments = progress.no_draws({"x": jax.ShapeDtypeStruct((4, 3), float)})
    for i in range(0, 90, 20):
        moments = progress.add(moments, {"x": draws[:, i : i + 20]})
    wanted = az.rhat(az.convert_to_dataset({"x": draws}), method="identity")["x"].max()
    np.testing.assert_allclose(progress.worst_rhat(moments), float(wanted), rtol=1e-12)
    one = progress.add(progress.no_draws(np.zeros(1)), np.ones((1, 5)))
    assert np.isnan(progress.worst_rhat(one))


@pytest.mark.filterwarnings("ignore:This run saw")
def test_trouble_is_seen_while_it_runs(capsys):
    """One chain can't move, and the others fall off an edge now and then."""

    def logdensity_fn(x):
        frozen = jnp.where(x[1] > 5, -1e12 * x[0] ** 2, -0.5 * x[0] ** 2)
        return jnp.where(jnp.abs(x[0]) < 1.5, frozen - 1e-6 * (x[1] - 6) ** 2, jnp.nan)

    probbp.sample(
        jax.random.key(0),
        partial(probbp.mala, logdensity_fn),
        lambda key: jnp.array([0.1, jnp.where(key_is_third(key), 9.0, 0.0)]),
        num_warmup=0,
        num_samples=40,
        num_chains=4,
        initial_step_size=0.5,
        metric=None,
    )
    shown = capsys.readouterr().err
    assert "STUCK: chain" in shown
    assert "DIVERGENT" in shown
    assert "R-hat" in shown


def key_is_third(key):
    return jax.random.uniform(key) < 0.5


# ---------------------------------------------------------------------------------------
# Any loop


@pytest.mark.slow
def test_svi_that_was_interrupted(tmp_path, monkeypatch):
    whole = long_run.optimise(None, 1)
    fit = long_run.svi()
    result = fit.run(jax.random.key(1), 50, long_run.DATA, progress_bar=False)
    np.testing.assert_allclose(whole["losses"], result.losses, rtol=1e-10)
    with monkeypatch.context() as patch:
        stop(patch, (checkpoints, "_digest"), 3)
        with pytest.raises(Stop):
            long_run.optimise(tmp_path / "svi", 1)
    same(long_run.optimise(tmp_path / "svi", 1), whole)


def test_a_loop_keeps_keys_and_refuses_another_start(tmp_path):
    def f(carry, _):
        key, x = carry
        key, key_noise = jax.random.split(key)
        return (key, x + jax.random.normal(key_noise)), None

    init = (jax.random.key(0), 0.0)
    options = {"every": 3, "progress_bar": False}
    (_, whole), nothing = checkpointed_scan(f, init, 10, **options)
    assert nothing is None
    for _ in range(2):
        (_, x), _ = checkpointed_scan(f, init, 10, checkpoint=tmp_path / "loop", **options)
        assert x == whole
    init = (jax.random.key(1), 0.0)
    with pytest.raises(ValueError, match="key and start"):
        checkpointed_scan(f, init, 10, checkpoint=tmp_path / "loop", **options)
