"""Which of three ways to differentiate a long loop."""

from typing import Literal

from probbp.checks import check_count


def recommended(
    num_states: int, num_params: int, length: int
) -> Literal["rtrl.scan", "lax.scan", "checkpoint"]:
    """Return how to differentiate a loop: forward, backward, or backward with checkpoints.

    A rule of thumb from `tests/benchmarks/rtrl.py`, which prints time and memory of all three:

    - "rtrl.scan" for up to four parameters: from a third of the time of reverse mode to as much,
      and no memory to speak of.
    - "lax.scan", plain reverse mode, for more, where what it stores, some ten times the state a
      step, fits into 100 MB. Forward sensitivities took up to eighteen times its time there.
    - "rtrl.scan" again for up to a hundred parameters where it does not fit: slower than reverse
      mode, and faster than checkpoints.
    - "checkpoint" for the rest, such as wide dense networks: a scan with about sqrt(T) checkpoints,
      as Equinox has it (`equinox.internal.scan`, kind "checkpointed").

    The rule knows sizes alone. Whatever they are, forward it is where data stream (`advance`), and
    for one layer of units that do not act on each other (`diagonal_scan`), which took 1.4 to 1.7
    times as long as reverse mode.

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
    num_states = check_count("num_states", num_states)
    num_params = check_count("num_params", num_params, 0)
    length = check_count("length", length, 0)
    if num_params <= 4:
        return "rtrl.scan"
    if 80 * num_states * length < 100e6:
        return "lax.scan"
    return "rtrl.scan" if num_params <= 100 else "checkpoint"
