"""What a run, an estimate, a prediction or an inference was worth."""

from probbp.diagnostics.arviz import from_blackjax
from probbp.diagnostics.calibration import (
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    reliability_diagram,
)
from probbp.diagnostics.gradient_plot import plot_gradient_quality
from probbp.diagnostics.gradients import gradient_quality
from probbp.diagnostics.quality import GradientQuality
from probbp.diagnostics.rank_plot import plot_ranks
from probbp.diagnostics.sbc import (
    RankStatistics,
    numpyro_simulator,
    simulation_based_calibration,
    uniformity,
)

__all__ = [
    "GradientQuality",
    "RankStatistics",
    "brier_score",
    "expected_calibration_error",
    "from_blackjax",
    "gradient_quality",
    "negative_log_likelihood",
    "numpyro_simulator",
    "plot_gradient_quality",
    "plot_ranks",
    "reliability_diagram",
    "simulation_based_calibration",
    "uniformity",
]
