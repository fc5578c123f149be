"""The learned surrogate transition: one log density per draw, and no gradient."""

from probbp.samplers.algorithm import Algorithm
from probbp.samplers.surrogate import kernel, pooled

surrogate = Algorithm(
    kernel.as_top_level_api, kernel.init, kernel.build_kernel, lambda **options: 0.9, pooled.warmup
)
