"""Which steps' networks are differentiated: the choices that `sample` takes, and their checks."""

from typing import Literal, NamedTuple, get_args

from probbp.checks import check_choice, check_count, check_number

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
    if isinstance(keep, Last):
        num_last = check_count("Last's num_steps", keep.num_steps, 1, num_steps)
        return num_steps - num_last, num_steps
    if isinstance(keep, Subset):
        check_number("Subset's probability", keep.probability, "(0, 1]")
        return None
    if isinstance(keep, str):
        check_choice("keep_step", keep, get_args(Name), _OTHERS)
        return {"first": (0, 1), "all": (0, num_steps)}.get(keep)
    step = check_count("keep_step", keep, -num_steps, num_steps - 1, f"Or a name. {_OTHERS}")
    return step % num_steps, step % num_steps + 1


_OTHERS = "Or the number of a step, Last(num_steps), or Subset(probability)."
