"""Gradient estimators for Bayesian inference on JAX: samplers, estimators, and where they plug in.

A gradient is an estimate, and inference should be free to choose it.
"""

from importlib.metadata import version
from pathlib import Path

from probbp import estimators
from probbp.samplers.adaptation import warmup
from probbp.samplers.chains import sample
from probbp.samplers.fmala import fmala, pc_fmala
from probbp.samplers.line_fmala import line_fmala, pc_line_fmala
from probbp.samplers.mala import mala
from probbp.samplers.scan import checkpointed_scan
from probbp.samplers.surrogate import surrogate
from probbp.samplers.surrogate.evidence import log_evidence

__version__ = version("probbp")

# In a checkout without links, where `probbp/models` is a file, models are found where it leads.
if not Path(__file__).with_name("models").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

__all__ = [
    "checkpointed_scan",
    "estimators",
    "fmala",
    "line_fmala",
    "log_evidence",
    "mala",
    "pc_fmala",
    "pc_line_fmala",
    "sample",
    "surrogate",
    "warmup",
]
