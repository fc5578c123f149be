"""Runs that end badly: interrupted, on a full disk, under what is no density."""

import errno
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import members

import probbp
from probbp.samplers import progress, scan, sinks

OPTIONS = {"num_warmup": 3, "num_samples": 22, "every": 6, "num_chains": 3, "metric": None}


def draw(**options):
    return probbp.sample(
        jax.random.key(0),
        partial(probbp.mala, lambda x: -0.5 * jnp.sum(x**2)),
        jnp.zeros(2),
        **OPTIONS | {"progress_bar": False} | options,
    )


def at_call(monkeypatch, module, name, times, act):
    """Call `act` after the `times`-th call of a function."""
    function, calls = getattr(module, name), []

    def acting(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append(name)
        if len(calls) == times:
            act()
        return result

    monkeypatch.setattr(module, name, acting)


def interrupt():
    raise KeyboardInterrupt


def raising(error):
    def act():
        raise error

    return act


# ---------------------------------------------------------------------------------------
# Ctrl-C


@pytest.mark.parametrize("stretches", [1, 2])
def test_draws_that_are_there_are_returned(stretches, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_call(patch, progress, "show", 3 + stretches, interrupt)
        with pytest.warns(UserWarning, match=f"after {6 * stretches} of 22 draws of each chain"):
            data = draw(progress_bar=True)
    whole = draw()
    assert data.posterior["x"].shape == (3, 6 * stretches, 2)
    for group in ("posterior", "sample_stats"):
        for name, values in data[group].data_vars.items():
            kept = whole[group][name].values[:, : 6 * stretches]
            np.testing.assert_array_equal(values.values, kept)
    assert "sampling" in capsys.readouterr().err


def test_in_warm_up_there_is_nothing_to_return(monkeypatch, capsys):
    at_call(monkeypatch, progress, "show", 2, interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw(progress_bar=True)
    assert "warm-up" in capsys.readouterr().err


def test_with_a_checkpoint_one_sentence_says_how_to_go_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, progress, "add", 2, interrupt)
        with pytest.raises(KeyboardInterrupt) as caught:
            draw(checkpoint=tmp_path / "run")
    assert str(caught.value) == (
        "Interrupted: the same call goes on from the last state that was saved in "
        f"{tmp_path / 'run'}."
    )
    assert caught.value.__suppress_context__
    # Three steps of warm-up and one stretch of draws.
    assert (tmp_path / "run" / "states" / "9").is_dir()
    data = draw(checkpoint=tmp_path / "run")
    np.testing.assert_array_equal(data.posterior["x"].values, draw().posterior["x"].values)


def test_with_a_stream_alone_the_call_starts_from_scratch(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, progress, "add", 2, interrupt)
        with pytest.raises(KeyboardInterrupt, match="starts .*draws from scratch; with checkpoint"):
            draw(stream=tmp_path / "draws")
    data = draw(stream=tmp_path / "draws")
    np.testing.assert_array_equal(data.posterior["x"].values, draw().posterior["x"].values)


def loop(**options):
    return probbp.checkpointed_scan(
        lambda carry, _: (carry + 1, carry),
        jnp.zeros(()),
        6,
        every=2,
        progress_bar=False,
        **options,
    )


def test_a_loop_says_it_too(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, scan, "_words", 2, interrupt)
        with pytest.raises(KeyboardInterrupt, match="Interrupted: the same call goes on"):
            loop(checkpoint=tmp_path / "run")
    assert (tmp_path / "run" / "states" / "2").is_dir()
    np.testing.assert_array_equal(loop(checkpoint=tmp_path / "run")[1], np.arange(6))


# ---------------------------------------------------------------------------------------
# Two runs at one folder


@pytest.mark.parametrize("option", ["checkpoint", "stream"])
def test_the_second_of_two_runs_at_one_folder_is_told(option, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    second = []

    def run_again():
        with pytest.raises(BlockingIOError) as caught:
            draw(**{option: folder})
        second.append(caught.value.strerror)

    with monkeypatch.context() as patch:
        at_call(patch, progress, "add", 2, run_again)
        data = draw(**{option: folder})
    assert len(second) == 1
    assert second[0].startswith(f"Another run writes to {folder} at this moment")
    np.testing.assert_array_equal(data.posterior["x"].values, draw().posterior["x"].values)
    assert not list(tmp_path.rglob("*.lock"))


@pytest.mark.parametrize("option", ["checkpoint", "stream"])
def test_what_a_killed_run_left_of_its_lock_holds_nothing(option, tmp_path):
    folder = tmp_path / "run"
    lock = folder / "states.lock" if option == "checkpoint" else tmp_path / "run.lock"
    lock.parent.mkdir(exist_ok=True)
    lock.touch()
    draw(**{option: folder})
    assert not lock.exists()


# ---------------------------------------------------------------------------------------
# A full disk, in the words of Python, of TensorStore and of a quota.

FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError(
        'RESOURCE_EXHAUSTED: Error writing "0/0.0" in OCDBT database: Failed to write 50044 bytes '
        "to file 17: No space left on device [os_error_code='28']"
    ),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("option", [pytest.param("checkpoint", marks=pytest.mark.slow), "stream"])
def test_a_full_disk_is_one_sentence(error, option, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    words = {
        "checkpoint": f"the same call goes on from the last state that was saved in {folder}.",
        "stream": f"the same call starts {folder} from scratch; with checkpoint= it would go on.",
    }
    with monkeypatch.context() as patch:
        at_call(patch, sinks, "variables", 2, raising(error))
        with pytest.raises(OSError, match="No space") as caught:
            draw(**{option: folder})
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.strerror == (
        f"No space is left on the device of {folder}: make room, and {words[option]}"
    )
    assert caught.value.__suppress_context__
    data = draw(**{option: folder})
    np.testing.assert_array_equal(data.posterior["x"].values, draw().posterior["x"].values)


def test_other_errors_are_left_alone(tmp_path, monkeypatch):
    error = OSError(errno.EACCES, "Permission denied")
    at_call(monkeypatch, sinks, "variables", 2, raising(error))
    with pytest.raises(OSError, match="Permission denied") as caught:
        draw(checkpoint=tmp_path / "run")
    assert caught.value is error


# ---------------------------------------------------------------------------------------
# What is no density

ALL = "all proposals of 4 of 4 chains diverged"
CONSTANT = lambda x: 0.0 * jnp.sum(x)  # noqa: E731
# A log density, the length of warm-up, the dtype, and what is seen.
IMPROPER = {
    "constant": (CONSTANT, 300, "float64", "4 chains grew to .*e.93 times and that the chains"),
    "constant, until it overflows": (CONSTANT, 1000, "float64", ALL),
    "constant, in single precision": (CONSTANT, 300, "float32", "are 3e.38 times as far out"),
    "it grows": (lambda x: jnp.exp(jnp.sum(x)), 300, "float64", "as far out as they started"),
    "finite at the start alone": (
        lambda x: jnp.where(jnp.all(x == 1), 0.0, jnp.nan),
        20,
        "float64",
        ALL,
    ),
    "the same, after a longer warm-up": (
        lambda x: jnp.where(jnp.all(x == 1), 0.0, jnp.nan),
        100,
        "float64",
        "step size of 4 chains shrank to 2e-29 times",
    ),
}


def under(logdensity_fn, num_warmup, position):
    return probbp.sample(
        jax.random.key(0),
        partial(probbp.mala, logdensity_fn),
        position,
        num_warmup=num_warmup,
        num_samples=20,
        progress_bar=False,
    )


@pytest.mark.filterwarnings("ignore:overflow encountered")
@members(IMPROPER, quick=list(IMPROPER)[:2])
def test_an_improper_density_is_told(name):
    logdensity_fn, num_warmup, dtype, words = IMPROPER[name]
    with pytest.warns(UserWarning, match=f"This run saw .*{words}.* Is the density improper"):
        under(logdensity_fn, num_warmup, jnp.ones(2, dtype))


def test_chains_that_stand_still_are_told():
    gaussian = lambda x: -0.5 * jnp.sum(x**2)
    with pytest.warns(
        UserWarning, match=r"3 of 3 chains stood still .* give more num_warmup"
    ) as told:
        probbp.sample(
            jax.random.key(0),
            partial(probbp.mala, gaussian),
            jnp.zeros(2),
            **OPTIONS | {"num_warmup": 0, "num_samples": 100, "progress_bar": False},
            initial_step_size=1e6,
        )
    assert told[0].filename == __file__


@pytest.mark.parametrize(
    "scale",
    [pytest.param(1e-8, marks=pytest.mark.slow), 1.0, pytest.param(1e8, marks=pytest.mark.slow)],
)
def test_a_proper_density_of_any_scale_is_not(scale):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        under(lambda x: -0.5 * jnp.sum((x / scale) ** 2), 300, scale * jnp.ones(2))


@pytest.mark.parametrize(
    ("offset", "is_told"), [pytest.param(1e6, False, marks=pytest.mark.slow), (-1e8, True)]
)
def test_a_log_density_that_is_too_large_for_single_precision_is_told(offset, is_told):
    def run():
        probbp.sample(
            jax.random.key(0),
            partial(probbp.mala, lambda x: offset - 0.5 * jnp.sum(x**2)),
            jnp.zeros(2, "float32"),
            **OPTIONS | {"progress_bar": False},
        )

    if is_told:
        with pytest.warns(UserWarning, match="about 1.0e.08, and in float32 known to 1e.01 only"):
            run()
    else:  # warnings are errors
        run()
