"""Double precision everywhere; tests of single precision pass float32 positions."""

import os

# Matplotlib needs no screen, and NumPyro's bar stays out of the log.
os.environ.setdefault("MPLBACKEND", "Agg")

import jax

jax.config.update("jax_enable_x64", True)

# The suite compiles thousands of programs and runs most of them for an instant. This leaves out
# what LLVM does beyond correct code. XLA's own passes, and with them memory and operations, stay.
jax.config.update("jax_disable_most_optimizations", True)
