"""The learned surrogate transition: one log density per draw, and no gradient."""

from probbp.samplers.algorithm import Algorithm
from probbp.samplers.surrogate import kernel, pooled
from probbp.samplers.surrogate.learning import Parameters


def target_acceptance_rate(**options) -> float:
    """Return what a good surrogate reaches; its own warm-up does not steer to it."""
    del options
    return 0.9


surrogate = Algorithm(
    kernel.as_top_level_api,
    kernel.init,
    kernel.build_kernel,
    target_acceptance_rate,
    pooled.warmup,
    Parameters._fields,
)

__all__ = ["surrogate"]
