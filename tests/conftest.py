"""Double precision everywhere; tests of single precision pass float32 positions."""

import os

# Matplotlib needs no screen, and NumPyro's bar stays out of the log.
os.environ.setdefault("MPLBACKEND", "Agg")

import jax

jax.config.update("jax_enable_x64", True)
