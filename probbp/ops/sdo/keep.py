"""Which steps' networks are differentiated: the choices that `sample` takes, and their checks."""

from typing import Literal, NamedTuple

Name = Literal["first", "random", "each", "all"]


class Last(NamedTuple):
    """The last steps, differentiated as they are.

    Attributes:
        num_steps: how many.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from probbp.ops import sdo
        >>> schedule = sdo.linear(10)
        >>> x = sdo.sample(lambda x, t: x, jnp.ones((1, 2)), schedule, keep_step=Last(3))
    """

    num_steps: int


class Subset(NamedTuple):
    """Each step with a probability, weighted by its inverse: unbiased.

    Attributes:
        probability: p, in (0, 1]. 1 is the exact derivative.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from probbp.ops import sdo
        >>> options = {"keep_step": Subset(0.5), "rng_key": jax.random.key(0)}
        >>> x = sdo.sample(lambda x, t: x, jnp.ones((1, 2)), sdo.linear(10), **options)
    """

    probability: float


Keep = Name | int | Last | Subset
"""What to keep: a name, the number of a step, `Last` or `Subset`."""


def live_steps(keep: Keep, num_steps: int) -> tuple[int, int] | None:
    """Return the range of steps that are kept as they are; `None` for the other choices.

    Raises:
        ValueError: for a choice that does not exist or does not fit the number of steps.
    """
    if keep == "first":
        return 0, 1
    if keep == "all":
        return 0, num_steps
    if isinstance(keep, Last) and 1 <= keep.num_steps <= num_steps:
        return num_steps - keep.num_steps, num_steps
    if isinstance(keep, int) and not isinstance(keep, bool) and -num_steps <= keep < num_steps:
        return keep % num_steps, keep % num_steps + 1
    if isinstance(keep, Subset) and 0 < keep.probability <= 1:
        return None
    if keep in ("random", "each"):
        return None
    raise ValueError(
        f"keep_step is 'first', 'random', 'each', 'all', the number of one of the {num_steps} "
        f"steps, Last(num_steps) with 1 to {num_steps}, or Subset(probability) in (0, 1]; got "
        f"{keep!r}."
    )
