"""Dynamic spectral backpropagation, Muthuraman, 2025, arXiv:2505.23369, in parts that hold.

The tracked basis and what is made of it: an Optax transform, a sharpness penalty, the scale of a
sampler. The paper's five extensions are modules: `truncation` and `drift` (inference),
`architecture`, `meta`, `transfer`, `rotations` and `geodesics` (Lie algebra); its theory is
`modified_equation` and `pac_bayes`.
"""

from probbp.optim.dsbp.gaussian import guide_params, inverse_mass_matrix
from probbp.optim.dsbp.sharpness import (
    gauss_newton_product,
    hessian_product,
    leading_eigenpairs,
    two_point,
)
from probbp.optim.dsbp.tracker import Spectrum, captured, rotation, start, track
from probbp.optim.dsbp.transform import DynamicSpectralState, scale_by_dynamic_spectral
from probbp.optim.dsbp.warmup import tracked_metric

__all__ = [
    "DynamicSpectralState",
    "Spectrum",
    "captured",
    "gauss_newton_product",
    "guide_params",
    "hessian_product",
    "inverse_mass_matrix",
    "leading_eigenpairs",
    "rotation",
    "scale_by_dynamic_spectral",
    "start",
    "track",
    "tracked_metric",
    "two_point",
]
