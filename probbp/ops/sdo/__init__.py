r"""Samplers of diffusion models whose derivative goes through one of their steps.

Dou et al., 2025, arXiv:2505.07477 (Shortcut Diffusion Optimization). Backpropagation through a
sampler of N steps takes N networks' worth of memory and twice the sampler's time. A sample is
linear in the outputs of all steps' networks,

.. math:: x_0 = A z + \sum_n b_n \tau_n \epsilon_\theta(x_n, t_n),

and the shortcut differentiates one of them and keeps the others fixed. The value is the sampler's.
`examples/papers/sdo.py` prints what the derivative is worth.
"""

from probbp.ops.sdo.keep import Last, Subset
from probbp.ops.sdo.path import GaussianPath, gaussian_path
from probbp.ops.sdo.sample import sample
from probbp.ops.sdo.schedule import Prediction, Schedule, cosine, linear

__all__ = [
    "GaussianPath",
    "Last",
    "Prediction",
    "Schedule",
    "Subset",
    "cosine",
    "gaussian_path",
    "linear",
    "sample",
]
