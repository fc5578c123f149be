"""Digits, and a network that knows their noise: shared by two scripts."""

import sys

import jax.numpy as jnp
import numpy as np
from flax import nnx
from sklearn.datasets import load_digits

from probbp.models import diffusion
from probbp.ops import sdo

NUM_STEPS = 50
DATA = load_digits()
DIGITS = jnp.asarray(DATA.data / 8 - 1, jnp.float32)
PATH = sdo.gaussian_path(np.cov(np.asarray(DIGITS).T))
FULL, RECOMPUTED = {"keep_step": "all"}, {"keep_step": "all", "checkpoint": True}


def trained(rng_key, fast):
    """Return a residual perceptron that predicts the noise of digits."""
    return diffusion.train(
        rng_key,
        diffusion.Denoiser((64,), width=128, rngs=nnx.Rngs(0)),
        DIGITS,
        sdo.linear(NUM_STEPS),
        num_steps=100 if fast else 3000,
        prediction="eps",
        progress_bar=sys.stderr.isatty(),
    ).network
