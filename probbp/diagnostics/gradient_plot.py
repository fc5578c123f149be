"""A picture of what gradient estimators are worth: direction by leaf, or error against cost."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from probbp.diagnostics.quality import GradientQuality


def plot_gradient_quality(quality: GradientQuality | Mapping[str, GradientQuality], ax=None) -> Any:
    """Draw one result leaf by leaf, or several estimators by error and cost.

    For one result: the cosine of each leaf as a bar, with relative variance, signal to noise and
    slope beside it; in red where it is biased. For several: the mean squared error relative to the
    gradient's squared length, which for unbiased estimators is the relative variance, against the
    operations of an estimate. An average over n keys moves along the grey lines, n times the
    operations and an n-th of the variance: of two unbiased estimators, the one on the lower line is
    worth more. Biased ones are hollow. Exact estimators are triangles on the axis.

    Args:
        quality: a result of `gradient_quality`, or results by the name of the estimator.
        ax: Matplotlib axes to draw on; new ones by default.

    Returns:
        The Matplotlib axes.

    Raises:
        ImportError: if Matplotlib is missing.
        ValueError: if there is no result to draw.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from probbp.estimators import forward
        >>> from probbp.diagnostics import gradient_quality, plot_gradient_quality
        >>> quality = {
        ...     f"forward, k={k}": gradient_quality(
        ...         jax.random.key(k), forward(k), lambda x: jnp.sum(x**3), jnp.arange(8.0))
        ...     for k in (1, 4)}
        >>> plot_gradient_quality(quality).get_yscale()
        'log'
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "plot_gradient_quality draws with Matplotlib: pip install 'probbp[examples]'."
        ) from error
    results = {"": quality} if isinstance(quality, GradientQuality) else quality
    if not isinstance(results, Mapping) or not all(
        isinstance(result, GradientQuality) for result in results.values()
    ):
        raise TypeError(
            "quality must be a result of gradient_quality, or results by the name of the "
            f"estimator, got {quality!r}."
        )
    if not results:
        raise ValueError("quality must hold at least one result of gradient_quality.")
    if ax is None:
        height = 1.3 + 0.34 * len(quality.rows()) if isinstance(quality, GradientQuality) else 4.5
        _, ax = plt.subplots(figsize=(6.8, height), layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    if isinstance(quality, GradientQuality):
        _draw_leaves(quality, ax)
    else:
        _draw_estimators(quality, ax)
    return ax


_BLUE, _RED, _INK, _GREY = "#2f6c9e", "#c1443c", "#30343a", "#c9ced4"


def _draw_leaves(quality: GradientQuality, ax: Any) -> None:
    rows = quality.rows()
    names = list(rows)
    colors = [_RED if name in quality.biased else _BLUE for name in names]
    cosines = [rows[name].cosine for name in names]
    bars = ax.barh(names, np.nan_to_num(cosines), color=colors, height=0.62, zorder=2)
    for bar in bars[:-1]:
        bar.set_alpha(0.75)
    ax.axvline(0, color=_INK, lw=0.8)
    for x in (-1.0, -0.5, 0.5, 1.0):
        ax.axvline(x, color=_GREY, lw=0.6, zorder=0)
    columns = [("variance\n/ |g|²", "signal\n/ noise", "slope\non g")]
    columns += [
        (f"{row.relative_variance:.2g}", f"{row.snr:.2g}", f"{row.slope:.2f}")
        for row in rows.values()
    ]
    for y, cells in enumerate(columns, start=-1):
        for cell, shift in zip(cells, (52, 104, 156), strict=True):
            ax.annotate(
                cell,
                (1, max(y, -0.7)),
                xycoords=ax.get_yaxis_transform(),
                xytext=(shift, 0),
                textcoords="offset points",
                ha="right",
                va="center" if y >= 0 else "bottom",
                color=colors[y] if y >= 0 else _INK,
                fontsize=9,
            )
    for label, color in zip(ax.get_yticklabels(), colors, strict=True):
        label.set_color(_INK if color == _BLUE else color)
    ax.set_xlim(min(0, *cosines) - 0.02 if min(cosines) < 0 else 0, 1.0)
    ax.set_ylim(len(names) - 0.5, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("mean cosine with the exact gradient")
    verdict = "red: biased" if quality.biased else "no bias"
    title = f"{verdict} beyond chance, {quality.num_keys} keys"
    ax.set_title(title, loc="left", fontsize=10, color=_INK, pad=10)


def _draw_estimators(quality: Mapping[str, GradientQuality], ax: Any) -> None:
    costs = np.array([result.flops_ratio for result in quality.values()])
    is_known = bool(np.all(np.isfinite(costs)))
    if not is_known:
        costs = np.ones(len(costs))
    errors = np.array([_squared_error(result) for result in quality.values()])
    is_seen = errors > 1e-6
    low = errors[is_seen].min() / 8 if is_seen.any() else 0.1
    high = errors[is_seen].max() * 4 if is_seen.any() else 1.0
    left, right = costs.min() / 1.7, costs.max() * 2.6
    if is_known:
        _draw_averages(ax, (left, right), (low, high))
    ax.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, high))

    labels = [
        name + (" (biased)" if result.biased else "") + ("" if is_seen[i] else " (exact)")
        for i, (name, result) in enumerate(quality.items())
    ]
    heights = np.where(is_seen, errors, low)
    offsets = _label_offsets(ax, costs, heights, labels)
    offsets[:, 1] += np.where(is_seen, 0, 8)
    for i, result in enumerate(quality.values()):
        _draw_mark(ax, result, costs[i], heights[i], is_seen[i])
        _draw_label(ax, labels[i], result, (costs[i], heights[i]), offsets[i])
    modes = " or ".join(sorted({result.reference for result in quality.values()}))
    ax.set_xlabel(f"operations of an estimate, over those of {modes}" if is_known else "")
    if not is_known:
        ax.set_xticks([])
    ax.set_ylabel("mean squared error / |gradient|²")


def _squared_error(quality: GradientQuality) -> float:
    """Return variance and squared bias, less what chance alone adds to the bias."""
    row = quality.overall
    return row.relative_variance + max(row.bias**2 - row.bias_error**2, 0)


def _draw_averages(ax: Any, xlim: tuple[float, float], ylim: tuple[float, float]) -> None:
    """Draw lines along which an average over keys moves: error times cost is constant there."""
    (left, right), (low, high) = xlim, ylim
    for level in 10.0 ** np.arange(np.floor(np.log10(low * left)), np.log10(high * right) + 1):
        ax.plot([left, right], [level / left, level / right], color=_GREY, lw=0.7, zorder=0)


def _draw_mark(ax: Any, quality: GradientQuality, x: float, y: float, is_seen: bool) -> None:
    color = _RED if quality.biased else _BLUE
    if is_seen:
        length = 2 * quality.overall.relative_variance_error
        ax.errorbar(x, y, yerr=length, color=color, lw=1.2, capsize=0, zorder=2)
    ax.plot(
        x,
        y,
        "o" if is_seen else "v",
        color=color,
        mfc="white" if quality.biased else color,
        ms=7,
        mew=1.6,
        clip_on=False,
        zorder=3,
    )


def _draw_label(
    ax: Any, label: str, quality: GradientQuality, at: tuple[float, float], offset: np.ndarray
) -> None:
    ax.annotate(
        label,
        at,
        xytext=tuple(offset),
        textcoords="offset points",
        ha="right" if offset[0] < 0 else "left",
        va="center",
        fontsize=9,
        color=_RED if quality.biased else _INK,
    )


def _label_offsets(ax: Any, x: np.ndarray, y: np.ndarray, labels: list[str]) -> np.ndarray:
    """Place labels beside their marks, (labels, 2) in points: on the left if the right is taken."""
    at = ax.transData.transform(np.column_stack([x, y])) * 72 / ax.figure.dpi
    widths = np.array([5.5 * len(label) + 12 for label in labels])
    right = at[:, 0] - at[:, :1]
    is_level = np.abs(at[:, 1] - at[:, 1:]) < 12
    is_taken = is_level & (right > 3) & (right < widths[:, None])
    has_room = at[:, 0] - widths > ax.transAxes.transform((0, 0))[0] * 72 / ax.figure.dpi
    is_left = is_taken.any(axis=1) & has_room
    offsets = np.column_stack([np.where(is_left, -8, 8), np.zeros(len(at))])
    placed = []  # from top to bottom, each label clear of those before it
    for i in np.argsort(-at[:, 1], kind="stable"):
        start = at[i, 0] - widths[i] * is_left[i]
        height = at[i, 1]
        for other, other_start, other_height in placed:
            is_beside = start > other_start + widths[other] or other_start > start + widths[i]
            if not is_beside and other_height - height < 12:
                height = other_height - 12
        placed.append((i, start, height))
        offsets[i, 1] = height - at[i, 1]
    return offsets
