"""JAX functions with another backward pass."""

from probbp.ops.reversal import gradient_reversal
from probbp.ops.substitute import substitute

__all__ = ["gradient_reversal", "substitute"]
