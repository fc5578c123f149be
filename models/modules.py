"""Whether a network is one of Flax NNX's: other kinds of modules pass through its functions."""

from typing import Any

from flax import linen, nnx

_WRAPPED = "A Linen module becomes one by nnx.bridge.ToNNX(module, rngs=...).lazy_init(x)."


def check_module(name: str, module: Any, of_linen: str = _WRAPPED) -> None:
    """Require an NNX module.

    Args:
        name: of the argument.
        module: what was given.
        of_linen: what to do with a Linen module.

    Raises:
        TypeError: for another kind of module, or what is none, with the way out.
    """
    if isinstance(module, nnx.Module):
        return
    way_out = "Pass the module, not its class or its parameters."
    if isinstance(module, linen.Module):
        way_out = of_linen
    elif any(kind.__module__.startswith("equinox") for kind in type(module).__mro__):
        way_out = "An Equinox module has to be written as an nnx.Module."
    raise TypeError(f"{name} must be a Flax NNX module, got {type(module).__name__}. {way_out}")
