"""The networks of the encoder, the residual and the heads."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class MLP(nnx.Module):
    """A multilayer perceptron with the last layer linear."""

    def __init__(
        self,
        sizes: tuple[int, ...],
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
    ):
        """Draw the weights.

        Args:
            sizes: of input, hidden layers and output.
            rngs: keys of the weights.
            dtype: of the weights.
            activation: after each layer but the last.
        """
        self.activation = activation
        self.layers = nnx.List(
            nnx.Linear(num_in, num_out, rngs=rngs, param_dtype=dtype)
            for num_in, num_out in zip(sizes[:-1], sizes[1:], strict=True)
        )

    def __call__(self, x):
        """Map (..., sizes[0]) to (..., sizes[-1])."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


def all_networks(sizes, networks, rngs, dtype):
    """Return a network for each name: the one given, or an `MLP`."""
    networks = dict(networks or {})
    if unknown := sorted(networks.keys() - sizes.keys()):
        raise ValueError(f"networks has {unknown}, but the names are {sorted(sizes)}.")
    for name, module in networks.items():
        num_in, num_out = sizes[name][0], sizes[name][-1]
        graph, state = nnx.split(module)
        example = jax.ShapeDtypeStruct((3, num_in), dtype)
        out = jax.eval_shape(lambda s, x, graph=graph: nnx.merge(graph, s)(x), state, example)
        if out.shape != (3, num_out):
            raise ValueError(
                f"networks[{name!r}] must map (3, {num_in}) to (3, {num_out}), not to {out.shape}."
            )
    return {name: MLP(size, rngs, dtype) for name, size in sizes.items()} | networks
