"""Diffusion models as priors: a NumPyro model, a small network and its training, a mixture's own.

Gradients of what is sampled go through the steps that `probbp.ops.sdo` keeps.
"""

from probbp.models.diffusion.mixture import (
    mixture,
    mixture_denoiser,
    mixture_of,
    mixture_posterior,
)
from probbp.models.diffusion.model import prior
from probbp.models.diffusion.network import Denoiser
from probbp.models.diffusion.training import Trained, train, tune

__all__ = [
    "Denoiser",
    "Trained",
    "mixture",
    "mixture_denoiser",
    "mixture_of",
    "mixture_posterior",
    "prior",
    "train",
    "tune",
]
