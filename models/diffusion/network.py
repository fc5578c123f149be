"""A small network that predicts noise: a residual perceptron that hears of time and condition."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from probbp.checks import check_count


class Denoiser(nnx.Module):
    """A residual multilayer perceptron, for signals and images of up to a few hundred numbers.

    Each block's units are shifted and scaled by what is known of time and condition (Perez et al.,
    2018, arXiv:1709.07871). It changes no state, so that `probbp.ops.sdo.sample` takes it as it is.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> denoiser = Denoiser((8, 8), num_conditions=10, rngs=nnx.Rngs(0))
        >>> denoiser(jnp.ones((5, 8, 8)), jnp.full(5, 999.0), jnp.eye(10)[:5]).shape
        (5, 8, 8)
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        width: int = 256,
        num_blocks: int = 3,
        num_conditions: int = 0,
        num_frequencies: int = 32,
        rngs: nnx.Rngs,
    ):
        """Draw the weights.

        Args:
            shape: of a sample.
            width: units of each layer.
            num_blocks: of two layers each.
            num_conditions: numbers that describe a condition, such as classes; 0 for none.
            num_frequencies: of the sines and cosines that time enters by.
            rngs: keys of the weights.
        """
        size = int(np.prod([check_count("shape", n) for n in shape]))
        width, num_blocks = check_count("width", width), check_count("num_blocks", num_blocks, 0)
        num_conditions = check_count("num_conditions", num_conditions, 0)
        num_frequencies = check_count("num_frequencies", num_frequencies)
        self.num_frequencies, self.num_conditions = num_frequencies, num_conditions
        self.of_time = nnx.Linear(2 * num_frequencies, width, rngs=rngs)
        self.of_condition = (
            nnx.Linear(num_conditions, width, use_bias=False, rngs=rngs) if num_conditions else None
        )
        self.first = nnx.Linear(size, width, rngs=rngs)
        blocks = []
        for _ in range(num_blocks):
            blocks.append(
                nnx.Dict(
                    norm=nnx.LayerNorm(width, rngs=rngs),
                    film=nnx.Linear(width, 2 * width, rngs=rngs),
                    into=nnx.Linear(width, width, rngs=rngs),
                    out=nnx.Linear(width, width, rngs=rngs),
                )
            )
        self.blocks = nnx.List(blocks)
        self.last = nnx.Linear(width, size, rngs=rngs)

    def __call__(self, x: jax.Array, t: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        """Map noisy samples `(batch, *shape)` at times (batch,) to the same shape.

        Args:
            x: the samples.
            t: steps of training, from 0.
            condition: (batch, num_conditions), such as one-hot classes. Zeros, and `None`, are no
                condition at all.

        Raises:
            ValueError: for a condition of a network that was made without.
        """
        frequencies = jnp.asarray(np.geomspace(1.0, 1e-3, self.num_frequencies), t.dtype)
        angles = t[:, None] * frequencies
        features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1).astype(x.dtype)
        known = self.of_time(features)
        if condition is not None:
            if self.of_condition is None:
                raise ValueError("This Denoiser has no condition: make it with num_conditions.")
            known = known + self.of_condition(condition.astype(x.dtype))
        known = nnx.silu(known)
        hidden = self.first(x.reshape(x.shape[0], -1))
        for block in self.blocks:
            scale, shift = jnp.split(block.film(known), 2, axis=-1)
            inner = block.norm(hidden) * (1 + scale) + shift
            hidden = hidden + block.out(nnx.silu(block.into(nnx.silu(inner))))
        return self.last(hidden).reshape(x.shape).astype(x.dtype)
