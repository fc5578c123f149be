"""The doors to NumPyro: any algorithm in its `MCMC`, any gradient in its `SVI`, mini-batches."""

import numpyro.infer
from numpyro.infer import initialization

from probbp.numpyro.kernel import Kernel
from probbp.numpyro.minibatch import Minibatch, Subsampled, subsampled
from probbp.numpyro.optim import Optim, OptimState
from probbp.numpyro.pooled import surrogate_report
from probbp.numpyro.state import KernelState

__all__ = [
    "Kernel",
    "KernelState",
    "Minibatch",
    "Optim",
    "OptimState",
    "Subsampled",
    "subsampled",
    "surrogate_report",
]

# ArviZ 1 loads NumPyro lazily. If it is imported before NumPyro, `numpyro.infer` is executed twice
# and loses its submodules, among them the one that `arviz.from_numpyro` looks up.
numpyro.infer.initialization = initialization
