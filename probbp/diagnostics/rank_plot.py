"""A picture of ranks: histograms that a right inference keeps flat."""

from typing import Any

import numpy as np
from scipy import stats

from probbp.checks import check_count
from probbp.diagnostics.sbc import RankStatistics, check_result, scalars, uniformity


def plot_ranks(result: RankStatistics, *, num_bins: int | None = None) -> Any:
    """Draw a histogram of the ranks of each scalar quantity.

    Heights are relative to uniform ranks. The band is binomial: a right inference keeps all bars of
    a panel inside with probability 95% at least. A valley in the middle means draws too narrow (or
    autocorrelated), a hill too wide, a slope down draws too high, a slope up too low. Panels whose
    p-value by `uniformity` is below 0.01 are red.

    Args:
        result: of `simulation_based_calibration`.
        num_bins: bars per panel, at most num_draws + 1; by default one for ten simulations, between
            5 and 20, or a few less if that makes all equally wide.

    Returns:
        The Matplotlib figure.

    Raises:
        ImportError: if Matplotlib is missing.
        ValueError: if there are more bars than ranks.

    Example:
        >>> import numpy as np
        >>> from probbp.diagnostics import RankStatistics
        >>> ranks = np.random.default_rng(0).integers(0, 100, (200, 3))
        >>> figure = plot_ranks(RankStatistics({"theta": ranks}, 99))
    """
    # ArviZ 0.23 and 1 have no plot of ranks of one truth each in common (`plot_ecdf(pit=True)`
    # became `plot_ecdf_pit`, with other arguments and another result), hence plain Matplotlib.
    check_result(result)
    num_simulations = len(next(iter(result.ranks.values())))
    num_ranks = result.num_draws + 1
    if num_bins is None:
        most = min(num_ranks, max(5, min(20, num_simulations // 10)))
        even = [n for n in range(-(-most // 2), most + 1) if num_ranks % n == 0]
        num_bins = max(even, default=most)
    num_bins = check_count("num_bins", num_bins, 1, num_ranks, "The most is num_draws + 1.")
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError(
            "plot_ranks draws with Matplotlib: pip install 'probbp[examples]'."
        ) from error

    # Bins hold whole ranks, and not all equally many where num_bins does not divide num_ranks.
    edges = np.linspace(0, num_ranks, num_bins + 1).round().astype(int)
    share = np.diff(edges) / num_ranks
    expected = num_simulations * share
    tail = 0.05 / num_bins / 2
    lower, upper = (stats.binom.ppf(q, num_simulations, share) / expected for q in (tail, 1 - tail))
    p_values, _ = uniformity(result)
    flat = np.concatenate([np.ravel(p) for p in p_values.values()])
    panels = list(scalars(result.ranks))
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(1.2 + 2.2 * columns, 0.8 + 1.8 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (name, ranks), p_value in zip(axes.flat, panels, flat, strict=False):
        heights = np.histogram(ranks, edges)[0] / expected
        color = "C3" if p_value < 0.01 else "C0"
        ax.stairs(heights, edges, fill=True, color=color, alpha=0.4)
        ax.stairs(heights, edges, color=color, linewidth=0.8)
        ax.stairs(lower, edges, baseline=upper, fill=True, color="0.4", alpha=0.18)
        ax.axhline(1, color="0.4", linewidth=0.8, linestyle="--")
        ax.set_title(f"{name}   p = {p_value:.2g}", fontsize="medium")
        ax.set_xlim(0, num_ranks)
        ax.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("rank of the truth among the draws", fontsize="medium")
    figure.supylabel("frequency over uniform", fontsize="medium")
    return figure
