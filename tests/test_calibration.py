"""Calibration error and proper scores: torchmetrics' and scikit-learn's figures, and statistics."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, log_loss

from probbp.diagnostics.calibration import (
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    reliability_diagram,
)


def several_classes():
    """Four classes, 400 rows, by formula, so that any language can make them again."""
    i = np.arange(400)
    logits = np.stack([2 * np.sin(1.7 * i + 2 * k) + np.cos(0.3 * i * k) for k in range(4)], 1)
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return probs, (probs.argmax(1) + (i % 5 > 2)) % 4


def two_classes():
    i = np.arange(400)
    return (1 + np.sin(2.3 * i + 1)) / 2, (i % 7 < 3).astype(int)


INPUTS = {"several": several_classes, "two": two_classes}

# torchmetrics 1.9.0 on torch 2.13.0 (CPU): `multiclass_calibration_error(probs, labels,
# num_classes=4, n_bins=.., norm="l1")`, which computes in single precision, and
# `binary_calibration_error(probs, labels, n_bins=.., norm="l1")`, on the inputs above in double.
TORCHMETRICS = {
    ("several", 4): 0.10683049261569977,
    ("several", 15): 0.1169540286064148,
    ("several", 30): 0.1292702555656433,
    ("two", 4): 0.3134583101094155,
    ("two", 15): 0.3537708472457753,
    ("two", 30): 0.37047064361121873,
}


@pytest.mark.parametrize(("name", "num_bins"), TORCHMETRICS)
def test_torchmetrics_figures(name, num_bins):
    error = expected_calibration_error(*INPUTS[name](), num_bins=num_bins)
    tolerance = 1e-6 if name == "several" else 1e-12
    assert abs(float(error) - TORCHMETRICS[name, num_bins]) < tolerance


def test_the_edges_are_ours():
    """Closed on the right; torchmetrics 1.9.0 parts 0.97 from 1 and gives 0.303."""
    probs = np.array([0.2, 0.2, 0.4, 0.6, 0.6, 0.8, 1, 1, 1, 0.97])
    labels = np.array([1, 0, 0, 1, 1, 1, 1, 1, 0, 1])
    by_hand = abs(1 - 0.4) + abs(0 - 0.4) + abs(2 - 1.2) + abs(1 - 0.8) + abs(3 - 3.97)
    for dtype in ("float32", "float64"):
        error = expected_calibration_error(probs.astype(dtype), labels, num_bins=5)
        assert abs(float(error) - by_hand / 10) < 1e-6


def plain_error(confidence, hit, bins):
    """The plug-in, bin by bin, in NumPy; `bins` holds the rows of each."""
    return sum(abs(hit[b].sum() - confidence[b].sum()) for b in bins) / len(hit)


@pytest.mark.parametrize("num_bins", [1, 7, 15])
def test_equal_mass(num_bins):
    probs, labels = several_classes()
    confidence, hit = probs.max(1), probs.argmax(1) == labels
    rows = np.array_split(np.argsort(confidence, kind="stable")[::-1], num_bins)
    assert {len(b) for b in rows} <= {400 // num_bins, -(-400 // num_bins)}
    ours = expected_calibration_error(probs, labels, num_bins=num_bins, bins="mass")
    # The longer bins may be the upper or the lower ones; compare where all are alike.
    if 400 % num_bins == 0:
        assert abs(float(ours) - plain_error(confidence, hit, rows)) < 1e-12
    else:
        starts = [k * 400 // num_bins for k in range(1, num_bins)]
        rows = np.split(np.argsort(confidence, kind="stable"), starts)
        assert {len(b) for b in rows} <= {400 // num_bins, -(-400 // num_bins)}
        assert abs(float(ours) - plain_error(confidence, hit, rows)) < 1e-12


def test_scores_against_sklearn():
    for name, make in INPUTS.items():
        probs, labels = make()
        assert np.isclose(negative_log_likelihood(probs, labels), log_loss(labels, probs), 1e-12)
        assert np.isclose(brier_score(probs, labels), brier_score_loss(labels, probs), 1e-12), name
    probs, labels = two_classes()
    columns = np.stack([1 - probs, probs], axis=1)
    full = brier_score_loss(labels, columns, scale_by_half=False)
    assert np.isclose(brier_score(columns, labels), full, 1e-12)
    assert np.isclose(brier_score(columns, labels), 2 * brier_score(probs, labels), 1e-12)
    likelihood = negative_log_likelihood(columns, labels)
    assert np.isclose(likelihood, negative_log_likelihood(probs, labels), 1e-12)


def test_an_impossible_label_costs_infinitely_much():
    assert negative_log_likelihood(np.array([1.0, 0.5]), np.array([0, 1])) == np.inf
    assert negative_log_likelihood(np.array([1.0, 0.0]), np.array([1, 0])) == 0


def estimates(rng_key, levels, truth, num, **options):
    """Errors of `num` data sets of 300 rows: confidence levels[k], frequency truth[k]."""

    def one(key):
        key_level, key_label = jax.random.split(key)
        index = jax.random.randint(key_level, (300,), 0, len(levels))
        labels = jax.random.bernoulli(key_label, truth[index]).astype(int)
        # The labels are traced, so only shapes are checked.
        return expected_calibration_error(levels[index], labels, **options)

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(rng_key, num)))


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_debiased_is_unbiased(seed):
    """One confidence per bin: its mean is the squared error; the plug-in's is far above."""
    levels = (jnp.arange(15) + 0.5) / 15
    for truth in (levels, levels**1.2):
        exact = float(jnp.mean((levels - truth) ** 2))
        debiased = estimates(jax.random.key(seed), levels, truth, 2000, debiased=True)
        stderr = debiased.std() / 2000**0.5
        assert abs(debiased.mean() - exact) < 4 * stderr
        # What the plug-in adds: 15 bins of variance p (1 - p) / 300, six times 4 stderr and more.
        added = float(jnp.sum(truth * (1 - truth))) / 300
        assert added > 24 * stderr
    plain = estimates(jax.random.key(seed), levels, levels, 2000)
    assert plain.mean() > 20 * plain.std() / 2000**0.5
    # By Jensen the square of the plain error is below the squared l2 plug-in.
    assert plain.mean() ** 2 > 20 * stderr


def test_debiased_against_a_plain_loop():
    probs, labels = several_classes()
    confidence, hit = probs.max(1), probs.argmax(1) == labels
    expected = 0.0
    for b in range(15):
        rows = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        n = rows.sum()
        if n >= 2:
            y = hit[rows].mean()
            gap = y - confidence[rows].mean()
            expected += n / 400 * (gap**2 - y * (1 - y) / (n - 1))
    assert np.isclose(expected_calibration_error(probs, labels, debiased=True), expected, 1e-12)
    # A lone row says nothing.
    assert expected_calibration_error(np.array([0.3]), np.array([1]), debiased=True) == 0


@pytest.mark.parametrize(
    "score",
    [
        expected_calibration_error,
        partial(expected_calibration_error, bins="mass"),
        partial(expected_calibration_error, debiased=True),
        brier_score,
        negative_log_likelihood,
    ],
)
@pytest.mark.parametrize("name", INPUTS)
def test_jit_vmap_and_single_precision(score, name):
    probs, labels = map(jnp.asarray, INPUTS[name]())
    value = score(probs, labels)
    assert value.shape == ()
    assert np.isclose(jax.jit(score)(probs, labels), value, 1e-12)
    stacked = jax.vmap(score, in_axes=(0, None))(jnp.stack([probs, probs[::-1]]), labels)
    assert np.allclose(stacked, [value, score(probs[::-1], labels)], 1e-12)
    single = score(probs.astype(jnp.float32), labels)
    assert single.dtype == jnp.float32
    # Sums of 400 rows: a hundred roundings at most.
    assert np.isclose(single, value, atol=100 * np.finfo(np.float32).eps)


def test_labels_of_other_kinds():
    probs, labels = two_classes()
    assert brier_score(probs, labels == 1) == brier_score(probs, labels)
    assert brier_score(labels, labels) == 0


GOOD = np.array([[0.5, 0.5], [0.1, 0.9]])
BAD = {
    "logits": ((GOOD * 4, [0, 1]), "softmax"),
    "not normalised": ((GOOD * 0.9, [0, 1]), "normalise"),
    "draws": ((np.stack([GOOD] * 3), [0, 1]), "average the draws"),
    "one column": ((GOOD[:, :1], [0, 1]), "one column"),
    "scalar": ((0.5, 1), "no row"),
    "empty": ((GOOD[:0], np.zeros(0, int)), "no row"),
    "lengths": ((GOOD, [0, 1, 1]), "class index per row"),
    "one-hot": ((GOOD, np.eye(2, dtype=int)), "argmax"),
    "float labels": ((GOOD, [0.0, 1.0]), "cast"),
    "class too high": ((GOOD, [1, 2]), "between 0 and 1"),
    "nan": (([[0.5, np.nan], [0.5, 0.5]], [0, 1]), "probs has NaN, first in row 0"),
    "nan, binary": (([0.5, np.nan], [0, 1]), "probs has NaN, first in row 1"),
    "a column of labels": ((GOOD, [[0], [1]]), r"labels\[:, 0\]"),
    "missing label": ((GOOD[:, 1], [-1, 1]), "between 0 and 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    (probs, labels), words = BAD[name]
    for score in (
        expected_calibration_error,
        brier_score,
        negative_log_likelihood,
        reliability_diagram,
    ):
        with pytest.raises(ValueError, match=words):
            score(probs, np.asarray(labels))


def test_bad_options():
    with pytest.raises(ValueError, match="width"):
        expected_calibration_error(GOOD, np.array([0, 1]), bins="wide")  # pyright: ignore (what is wrong is tested)
    with pytest.raises(ValueError, match="positive"):
        expected_calibration_error(GOOD, np.array([0, 1]), num_bins=0)


def test_reliability_diagram():
    from matplotlib import pyplot as plt

    probs, labels = two_classes()
    ax = reliability_diagram(probs, labels, num_bins=10)
    _, (points, *_) = ax.lines[0], ax.containers[0]
    confidence, frequency = points.get_data()
    for b in range(10):
        rows = (probs > b / 10) & (probs <= (b + 1) / 10)
        assert np.isclose(confidence[b], probs[rows].mean())
        assert np.isclose(frequency[b], labels[rows].mean())
    histogram = ax.child_axes[0].patches
    assert sum(bar.get_height() for bar in histogram) == 400
    plt.close(ax.figure)

    figure, given = plt.subplots()
    assert reliability_diagram(*several_classes(), bins="mass", ax=given) is given
    figure.canvas.draw()
    plt.close(figure)


def test_intervals_are_clopper_and_pearsons():
    from matplotlib import pyplot as plt
    from scipy.stats import binomtest

    probs = np.repeat([0.1, 0.5, 0.9], 20)
    labels = np.repeat([0, 1, 0, 1, 1], [20, 8, 12, 12, 8])
    ax = reliability_diagram(probs, labels)
    segments = ax.containers[0][2][0].get_segments()
    for hits, segment in zip((0, 8, 20), segments, strict=True):
        interval = binomtest(hits, 20).proportion_ci(0.95, method="exact")
        assert np.allclose(segment[:, 1], interval)
    plt.close(ax.figure)


def test_matplotlib_is_asked_for(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"probbp\[examples\]"):
        reliability_diagram(*two_classes())
