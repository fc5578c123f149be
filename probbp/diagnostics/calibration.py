"""Are predicted probabilities to be believed? Calibration error, proper scores, and a picture.

All take `probs`, (rows, classes) or, for two classes, (rows,) with the probability of class 1, and
integer `labels`, (rows,). It is the mean predictive that is judged: average a posterior's draws
first, `probs.mean(axis=0)`. Everything but the picture works under `jit` and `vmap`, where values
go unchecked.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from scipy import stats

from probbp.checks import check_choice, check_count

Bins = Literal["width", "mass"]


def expected_calibration_error(
    probs: ArrayLike,
    labels: ArrayLike,
    *,
    num_bins: int = 15,
    bins: Bins = "width",
    debiased: bool = False,
) -> jax.Array:
    r"""Measure how far confidence is from accuracy, on average over bins of like confidence.

    .. math::
        \mathrm{ECE} = \sum_b \frac{n_b}{n} |y_b - c_b|

    with n_b rows in bin b, their mean confidence c_b, and how often they came true, y_b. For
    (rows, classes) the confidence is the largest probability and "true" means that its class was
    the label; for (rows,) it is the probability of class 1, and "true" means label 1.

    This plug-in is biased upwards, most where bins hold few rows: it is above zero even for perfect
    probabilities. With `debiased` the result is another quantity, the *squared l2* calibration
    error, less what chance alone adds to it:

    .. math::
        \sum_b \frac{n_b}{n} \left[(y_b - c_b)^2 - \frac{y_b (1 - y_b)}{n_b - 1}\right]

    It is unbiased where all confidences in a bin are equal (else it is too low by the variance of
    the confidences within a bin over n, summed over bins), and may be negative. A bin with a single
    row tells nothing and adds zero. Either way binning hides errors that cancel within a bin.

    Args:
        probs: (rows, classes), each row a distribution; or (rows,), the probability of class 1.
        labels: (rows,), integers from 0 to classes - 1.
        num_bins: number of bins.
        bins: "width" cuts (0, 1] into equal intervals closed on the right, with 0 in the first;
            "mass" gives each bin the same number of rows, up to one (equal confidences may then be
            parted, in the order of the rows).
        debiased: return the debiased squared l2 error.

    Returns:
        A scalar. The plain form lies in [0, 1].

    Raises:
        ValueError: for shapes, probabilities or labels that don't fit, and an unknown option.

    Note:
        With "width" this is torchmetrics' `MulticlassCalibrationError` and `BinaryCalibrationError`
        (norm "l1"), save for a confidence right on an edge, which torchmetrics moves to the bin
        above, with a bin of its own for exactly 1. Probabilities that round to 1 are therefore
        counted apart from those just below, and there the two differ.

    Example:
        >>> import jax.numpy as jnp
        >>> probs = jnp.array([0.9, 0.9, 0.9, 0.9, 0.1])  # of class 1
        >>> labels = jnp.array([1, 1, 1, 0, 0])
        >>> round(float(expected_calibration_error(probs, labels)), 3)
        0.14

    Reference:
        Guo et al., 2017, arXiv:1706.04599 (equal width); Kumar, Liang & Ma, 2019,
        arXiv:1909.10155 (the debiased form, Definition 5.2 there).
    """
    probs, labels = _checked(probs, labels)
    count, hits, confidence = _binned(*_top(probs, labels), num_bins, bins)
    if not debiased:
        return jnp.sum(jnp.abs(hits - confidence)) / labels.size
    rows = jnp.maximum(count, 2)  # keeps bins that are left out free of 0 / 0
    frequency = hits / rows
    square = ((hits - confidence) / rows) ** 2 - frequency * (1 - frequency) / (rows - 1)
    return jnp.sum(jnp.where(count >= 2, count * square, 0)) / labels.size


def brier_score(probs: ArrayLike, labels: ArrayLike) -> jax.Array:
    r"""Score probabilities by their squared distance to what happened.

    For (rows, classes) the mean over rows of :math:`\sum_k (p_k - 1[y = k])^2`, between 0 and 2;
    for (rows,) that of :math:`(p - y)^2`, between 0 and 1, which is half the former. The first is
    scikit-learn's `brier_score_loss` with `scale_by_half=False` (its default for three classes and
    more), the second the one with `scale_by_half=True` (its default for two).

    Args:
        probs: (rows, classes), each row a distribution; or (rows,), the probability of class 1.
        labels: (rows,), integers from 0 to classes - 1.

    Returns:
        A scalar, the lower the better; its mean is least at the true probabilities.

    Raises:
        ValueError: for shapes, probabilities or labels that don't fit.

    Example:
        >>> import jax.numpy as jnp
        >>> float(brier_score(jnp.array([0.5, 1.0]), jnp.array([1, 1])))
        0.125
        >>> float(brier_score(jnp.array([[0.5, 0.5], [0.0, 1.0]]), jnp.array([1, 1])))
        0.25

    Reference:
        Brier, 1950, Monthly Weather Review 78(1).
    """
    probs, labels = _checked(probs, labels)
    if probs.ndim == 1:
        return jnp.mean((probs - labels) ** 2)
    truth = jax.nn.one_hot(labels, probs.shape[1], dtype=probs.dtype)
    return jnp.mean(jnp.sum((probs - truth) ** 2, axis=1))


def negative_log_likelihood(probs: ArrayLike, labels: ArrayLike) -> jax.Array:
    r"""Score probabilities by the surprise at what happened: the mean of :math:`-\log p_y`.

    Nothing is clipped: a label that was called impossible costs infinitely much. (scikit-learn's
    `log_loss` clips, and agrees elsewhere.)

    Args:
        probs: (rows, classes), each row a distribution; or (rows,), the probability of class 1.
        labels: (rows,), integers from 0 to classes - 1.

    Returns:
        A scalar [nats], the lower the better; its mean is least at the true probabilities.

    Raises:
        ValueError: for shapes, probabilities or labels that don't fit.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> draws = jax.random.dirichlet(jax.random.key(0), jnp.ones(3), (100, 8))
        >>> labels = jnp.arange(8) % 3
        >>> score = negative_log_likelihood(draws.mean(axis=0), labels)  # of the mean predictive
    """
    probs, labels = _checked(probs, labels)
    if probs.ndim == 1:
        chosen = jnp.where(labels == 1, probs, 1 - probs)
    else:
        chosen = jnp.take_along_axis(probs, labels[:, None], axis=1)
    return -jnp.mean(jnp.log(jnp.clip(chosen, 0, 1)))


def reliability_diagram(
    probs: ArrayLike,
    labels: ArrayLike,
    *,
    num_bins: int = 15,
    bins: Bins = "width",
    ax: Any = None,
) -> Any:
    """Draw how often predictions came true against how sure they were.

    A point is a bin: its mean confidence, how often it came true, and the exact (Clopper-Pearson)
    95% interval of that frequency. Points below the diagonal are overconfident. The bars on top
    count the rows by confidence.

    Args:
        probs: (rows, classes), each row a distribution; or (rows,), the probability of class 1.
        labels: (rows,), integers from 0 to classes - 1.
        num_bins: number of bins.
        bins: "width" or "mass", as in `expected_calibration_error`.
        ax: the Matplotlib axes to draw into, by default those of a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: if Matplotlib is missing.
        ValueError: for shapes, probabilities or labels that don't fit, and an unknown option.

    Example:
        >>> import jax
        >>> probs = jax.random.uniform(jax.random.key(0), (500,))
        >>> labels = jax.random.bernoulli(jax.random.key(1), probs).astype(int)
        >>> axes = reliability_diagram(probs, labels)

    Reference:
        Murphy & Winkler, 1977, Applied Statistics 26(1).
    """
    probs, labels = _checked(probs, labels)
    confidence, hit = _top(probs, labels)
    binned = [np.asarray(total, float) for total in _binned(confidence, hit, num_bins, bins)]
    count, hits, total = (leaf[binned[0] > 0] for leaf in binned)
    if ax is None:
        try:
            from matplotlib import pyplot as plt
        except ImportError as error:
            raise ImportError(
                "reliability_diagram draws with Matplotlib: pip install 'probbp[examples]'."
            ) from error
        ax = plt.figure(figsize=(4.8, 5.4), layout="constrained").subplots()

    # Beta quantiles; those of Beta(0, .) and Beta(., 0) are the ends of the interval.
    lower = np.where(hits > 0, stats.beta.ppf(0.025, np.maximum(hits, 1), count - hits + 1), 0)
    upper = np.where(hits < count, stats.beta.ppf(0.975, hits + 1, np.maximum(count - hits, 1)), 1)
    frequency = hits / count
    ax.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="calibrated")
    ax.errorbar(
        total / count,
        frequency,
        np.stack([frequency - lower, upper - frequency]),
        fmt="o-",
        color="C0",
        ecolor=("C0", 0.45),
        markersize=4.5,
        linewidth=1.3,
        elinewidth=1.3,
        label="observed, 95% interval",
    )
    error = float(expected_calibration_error(probs, labels, num_bins=num_bins, bins=bins))
    ax.text(0.97, 0.04, f"ECE {error:.3f}", transform=ax.transAxes, ha="right")
    is_binary = probs.ndim == 1
    ax.set(
        xlim=(-0.015, 1.015),
        ylim=(-0.015, 1.015),
        xlabel="predicted probability of class 1" if is_binary else "confidence",
        ylabel="frequency of class 1" if is_binary else "accuracy",
    )
    ax.legend(loc="upper left", framealpha=0.9, edgecolor="none")

    top = ax.inset_axes((0, 1.03, 1, 0.2), sharex=ax)
    top.hist(np.asarray(confidence), bins=30, range=(0, 1), color="C0", alpha=0.5)
    top.set_ylabel("rows")
    top.tick_params(labelbottom=False)
    for axes in (ax, top):
        axes.spines[["top", "right"]].set_visible(False)
    return ax


def _top(probs: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return each row's confidence, and whether it came true."""
    if probs.ndim == 1:
        return probs, labels == 1
    return jnp.max(probs, axis=1), jnp.argmax(probs, axis=1) == labels


def _binned(
    confidence: jax.Array, hit: jax.Array, num_bins: int, bins: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return each bin's number of rows, of hits, and sum of confidences."""
    num_bins = check_count("num_bins", num_bins)
    check_choice("bins", bins, get_args(Bins))
    if bins == "width":
        edges = jnp.arange(1, num_bins, dtype=confidence.dtype) / num_bins
        index = jnp.searchsorted(edges, confidence, side="left")
    else:
        order = jnp.argsort(confidence, stable=True)
        confidence, hit = confidence[order], hit[order]
        starts = np.array([k * confidence.size // num_bins for k in range(1, num_bins)], int)
        index = jnp.searchsorted(starts, jnp.arange(confidence.size), side="right")
    rows = jnp.stack([jnp.ones_like(confidence), hit.astype(confidence.dtype), confidence])
    count, hits, total = jax.vmap(lambda x: jax.ops.segment_sum(x, index, num_bins))(rows)
    return count, hits, total


def _checked(probs: ArrayLike, labels: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Return arrays of at least single precision, or say what is wrong with them."""
    probs, labels = jnp.asarray(probs), jnp.asarray(labels)
    _check_shapes(probs.shape, labels.shape)
    if labels.dtype == bool:
        labels = labels.astype(int)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels has dtype {labels.dtype}: cast class indices to int.")
    if not jnp.issubdtype(probs.dtype, jnp.floating):
        probs = probs.astype(float)
    # Room for probabilities that were rounded, or averaged, in their own precision.
    tolerance = max(1e-4, 4 * float(jnp.finfo(probs.dtype).eps))
    probs = probs.astype(jnp.promote_types(probs.dtype, jnp.float32))
    if not isinstance(probs, Tracer):
        _check_probs(np.asarray(probs), tolerance)
    if not isinstance(labels, Tracer):
        _check_labels(labels, 2 if probs.ndim == 1 else probs.shape[1])
    return probs, labels


def _check_shapes(probs: tuple[int, ...], labels: tuple[int, ...]) -> None:
    if len(probs) > 2:
        raise ValueError(
            f"probs has shape {probs}, but is (rows, classes) or (rows,): average the draws "
            "of a posterior first (`probs.mean(axis=0)`), or use jax.vmap."
        )
    if 0 in probs or not probs:
        raise ValueError(f"probs has shape {probs}: there is no row to judge.")
    if len(probs) == 2 and probs[1] == 1:
        raise ValueError(
            "probs has one column: pass the probability of class 1 as a vector (`probs[:, 0]`)."
        )
    if labels == (*probs[:1], 1):
        raise ValueError(
            f"labels has shape {labels}, but needs one class index per row, {probs[:1]}: take the "
            "column (`labels[:, 0]`)."
        )
    if labels != probs[:1]:
        raise ValueError(
            f"labels has shape {labels}, but needs one class index per row, "
            f"{probs[:1]}: for one-hot labels take `labels.argmax(axis=-1)`."
        )


def _check_probs(probs: np.ndarray, tolerance: float) -> None:
    if np.any(np.isnan(probs)):
        row = int(np.argmax(np.isnan(probs).reshape(len(probs), -1).any(axis=1)))
        raise ValueError(
            f"probs has NaN, first in row {row}: look for an overflow where they are computed, "
            "such as exp(logits) without jax.nn.softmax, or leave such rows out."
        )
    if not np.all((probs >= -tolerance) & (probs <= 1 + tolerance)):
        raise ValueError(
            f"probs lies between {probs.min():.4g} and {probs.max():.4g}, outside [0, 1]: "
            "turn logits into probabilities first (`jax.nn.softmax`, `jax.nn.sigmoid`)."
        )
    if probs.ndim == 1:
        return
    sums = probs.sum(axis=1)
    worst = sums[np.argmax(np.abs(sums - 1))]
    if abs(worst - 1) > tolerance:
        raise ValueError(
            f"A row of probs sums to {worst:.6g}, not to one: normalise it (`probs / "
            "probs.sum(axis=1, keepdims=True)`), and check that the classes are the last axis."
        )


def _check_labels(labels: jax.Array, num_classes: int) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels runs from {low} to {high}, but must lie between 0 and {num_classes - 1}: "
            "number the classes from 0, and leave out rows without a label."
        )
