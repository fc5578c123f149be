"""Which of three ways to differentiate a long loop."""

from typing import Literal


def recommended(
    num_states: int, num_params: int, length: int
) -> Literal["rtrl.scan", "lax.scan", "checkpoint"]:
    """Return how to differentiate a loop: forward, backward, or backward with checkpoints.

    A rule of thumb from `tests/benchmarks/rtrl.py`, which prints time and memory of all three:

    - "rtrl.scan" for up to eight parameters: about the time of reverse mode, from a quarter to
      several times of it, and no memory to speak of.
    - "lax.scan", plain reverse mode, for more, where what it stores, some ten times the state a
      step, fits into 100 MB. Dense networks are here: forward sensitivities take P + 1 directional
      derivatives a step, and lose in time from a width of two on.
    - "checkpoint" for the rest: a scan with about sqrt(T) checkpoints, such as Equinox's
      (`equinox.internal.scan`, kind "checkpointed"), in several times the time of reverse mode.

    The rule knows sizes alone. Whatever they are, forward it is where data stream (`advance`), and
    for one layer of units that do not act on each other (`diagonal_scan`).

    Args:
        num_states: n, floating-point numbers in the carry.
        num_params: P, floating-point numbers that are differentiated.
        length: T, steps.

    Example:
        >>> recommended(num_states=3, num_params=4, length=1_000_000)
        'rtrl.scan'
        >>> recommended(num_states=64, num_params=8_192, length=1_000)
        'lax.scan'
    """
    if num_params <= 8:
        return "rtrl.scan"
    return "lax.scan" if 80 * num_states * length < 100e6 else "checkpoint"
