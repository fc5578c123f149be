"""Names and labels on the way to ArviZ: whatever would be lost is refused before the first step."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probbp
from probbp.diagnostics import from_blackjax, simulation_based_calibration
from probbp.diagnostics.gradients import gradient_quality
from probbp.diagnostics.names import leaf_names
from probbp.estimators import forward
from probbp.inference_data import IS_TREE
from probbp.samplers import sinks

SCHOOLS = list("abcdefgh")
ONE, EIGHT = jnp.zeros(()), jnp.zeros(8)


def logdensity_fn(x):
    return -0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(x))


def draw(position, **options):
    return probbp.sample(
        jax.random.key(0),
        partial(probbp.mala, logdensity_fn),
        position,
        **{"num_warmup": 0, "num_samples": 3, "num_chains": 2, "metric": None} | options,
        progress_bar=False,
    )


TWO = {"a": {"b": ONE}, "a.b": jnp.zeros(2)}
DIMS = {"theta": ["school"]}
# name -> (position, options of labels, words of the error)
REFUSED = {
    "a leaf called chain": ({"chain": ONE}, {}, "'chain' would be lost"),
    "a leaf called draw": ({"draw": EIGHT, "mu": ONE}, {}, "'draw' would be lost"),
    "its own dimension": (
        {"school": EIGHT},
        {"dims": {"school": ["school"]}},
        "'school' would be lost: a dimension has that name",
    ),
    "another's dimension": (
        {"theta": EIGHT, "school": ONE},
        {"dims": DIMS},
        "'school' would be lost: a dimension has that name",
    ),
    "a dimension by default": ({"x": EIGHT, "x_dim_0": ONE}, {}, "'x_dim_0' would be lost"),
    "two of one name": (TWO, {}, r"\['a'\]\['b'\] and \['a.b'\] would both be called 'a.b'"),
    "two of one name from postprocess_fn": (
        {"x": ONE},
        {"postprocess_fn": lambda x: {"a": {"b": x["x"]}, "a.b": x["x"]}},
        "would both be called 'a.b'",
    ),
    "nothing from postprocess_fn": (
        {"x": ONE},
        {"postprocess_fn": lambda x: {}},
        "no variable to name",
    ),
    "seven labels": (
        {"theta": EIGHT},
        {"coords": {"school": SCHOOLS[:7]}, "dims": DIMS},
        r"'theta' has length 8 along its dimension 'school', but coords\['school'\] has 7",
    ),
    "three labels of two chains": (
        {"theta": EIGHT},
        {"coords": {"chain": [0, 1, 2]}},
        r"'theta' has length 2 along its dimension 'chain', but coords\['chain'\] has 3",
    ),
    "labels of draws": ({"theta": EIGHT}, {"coords": {"draw": [1, 2, 3]}}, "'draw' out of coords"),
    "two lengths of one dimension": (
        {"theta": EIGHT, "eta": jnp.zeros(7)},
        {"dims": DIMS | {"eta": ["school"]}},
        "'theta' has length 8 along its dimension 'school', but 'eta' has 7",
    ),
    "two lengths, one by default": (
        {"eta": jnp.zeros(7), "theta": EIGHT},
        {"dims": {"theta": ["eta_dim_0"]}},
        "'eta' has shape .* and ArviZ would make it",
    ),
    "a dimension too many": (
        {"theta": EIGHT},
        {"dims": {"theta": ["school", "year"]}},
        r"gives 'theta' the dimensions \['school', 'year'\], but a draw of it has shape \(8,\)",
    ),
    "a dimension twice": (
        {"theta": jnp.zeros((8, 8))},
        {"dims": {"theta": ["school", "school"]}},
        "gives 'theta' the dimension 'school' twice",
    ),
    "a dimension called chain": (
        {"theta": EIGHT},
        {"dims": {"theta": ["chain"]}},
        "gives 'theta' the dimension 'chain' twice",
    ),
    "a label that is a text": ({"theta": EIGHT}, {"coords": {"school": "abc"}}, "list of labels"),
    "labels of two axes": (
        {"theta": EIGHT},
        {"coords": {"school": np.zeros((2, 4))}},
        "list of labels",
    ),
    "dims that are a list": ({"theta": EIGHT}, {"dims": ["school"]}, "dims must map"),
    "coords that are a list": ({"theta": EIGHT}, {"coords": SCHOOLS}, "coords must map"),
    "dims that are numbers": ({"theta": EIGHT}, {"dims": {"theta": [8]}}, "list of texts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_lost_is_refused_before_the_first_step(name, monkeypatch):
    def begun(*args):
        pytest.fail("the run has begun")

    position, options, words = REFUSED[name]
    monkeypatch.setattr(sinks, "in_memory", begun)
    with pytest.raises((ValueError, TypeError), match=words):
        draw(position, **options)


@pytest.mark.parametrize("labels", ["name", "dimension"])
def test_a_slash_is_refused_where_arviz_does(labels):
    name = "net/kernel" if labels == "name" else "kernel"
    options = {} if labels == "name" else {"dims": {"kernel": ["of/net"]}}
    if IS_TREE:
        with pytest.raises(ValueError, match="takes no name with '/', and the (var|dim).*(net|of)"):
            draw({name: EIGHT}, **options)
    else:
        assert draw({name: EIGHT}, **options).posterior[name].shape == (2, 3, 8)


@pytest.mark.parametrize(
    "options",
    [
        {"coords": {"school": tuple(SCHOOLS)}, "dims": {"theta": ("school",)}},
        {"coords": {"school": np.array(SCHOOLS)}, "dims": {"theta": "school"}},
        {"coords": {"school": SCHOOLS}, "dims": {"theta": ["chain", "draw", "school"]}},
    ],
    ids=["tuples", "a text", "with chain and draw"],
)
def test_labels_as_users_write_them(options):
    data = draw({"theta": EIGHT}, **options)
    assert data.posterior["theta"].dims == ("chain", "draw", "school")
    assert list(data.posterior["school"].values) == SCHOOLS


def test_labels_that_concern_no_variable_do_no_harm():
    options = {"coords": {"year": [1, 2]}, "dims": {"eta": ["year"], "theta": None}}
    data = draw({"theta": EIGHT, "year": ONE}, **options)
    assert {name: v.shape for name, v in data.posterior.data_vars.items()} == {
        "theta": (2, 3, 8),
        "year": (2, 3),
    }


def test_nothing_to_name():
    with pytest.raises(ValueError, match="no variable to name"):
        from_blackjax(None)


def test_statistics_are_not_lost_either():
    stats = {"chain": np.zeros((2, 3))}
    with pytest.raises(ValueError, match="'chain' would be lost"):
        from_blackjax({"x": np.zeros((2, 3))}, sample_stats=stats)


def test_leaves_keep_their_names():
    assert leaf_names({"a": {"b": ONE, "c": [ONE, ONE]}, "a.d": ONE}) == [
        "a.b",
        "a.c.0",
        "a.c.1",
        "a.d",
    ]


@pytest.mark.parametrize("vectorized", [True, False])
def test_calibration_refuses_two_of_one_name_before_it_infers(vectorized):
    def infer(key, data):
        pytest.fail("the inference has begun")

    with pytest.raises(ValueError, match="would both be called 'a.b'"):
        simulation_based_calibration(
            jax.random.key(0),
            lambda key: (TWO, 0.0),
            infer,
            num_simulations=2,
            vectorized=vectorized,
            progress_bar=False,
        )


def test_the_quality_of_gradients_refuses_two_of_one_name():
    with pytest.raises(ValueError, match="would both be called 'a.b'"):
        gradient_quality(jax.random.key(0), forward(), logdensity_fn, TWO)
