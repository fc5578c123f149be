r"""How much signal is left at each step of a diffusion, and what a step of the sampler multiplies.

A noisy sample is :math:`x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\,\epsilon`.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Literal, NamedTuple, get_args

from probbp.checks import check_choice, check_count, check_number

Prediction = Literal["eps", "v"]
"""What a denoiser predicts: the noise, or v, its mixture with the sample."""


class Schedule(NamedTuple):
    """The steps of a sampler, from noise to data: plain numbers, fit for a static argument.

    Attributes:
        times: falling: the steps of training at which the network is called.
        signal: alpha-bar at each time, and at the end 1, the data: one number more.
        train_signal: alpha-bar of all steps of training.
    """

    times: tuple[int, ...]
    signal: tuple[float, ...]
    train_signal: tuple[float, ...]


class Steps(NamedTuple):
    """The sampler as a recursion, x' = keep x + push output + spread noise: a number a step."""

    keep: tuple[float, ...]
    push: tuple[float, ...]
    spread: tuple[float, ...]


def linear(
    num_steps: int,
    *,
    num_train_steps: int = 1000,
    first_beta: float = 1e-4,
    last_beta: float = 0.02,
    start: int | None = None,
) -> Schedule:
    """Return the schedule of Ho et al., whose noise variances beta rise linearly.

    Args:
        num_steps: of the sampler; at most `num_train_steps`.
        num_train_steps: for which the network was trained.
        first_beta: variance of the noise added in the first step of training.
        last_beta: in the last.
        start: the step of training at which the sampler starts; by default the last, pure noise.
            Less is for data that were noised only so far.

    Raises:
        ValueError: for steps or variances out of range.

    Example:
        >>> schedule = linear(4)
        >>> schedule.times, schedule.signal[-1]
        ((999, 749, 499, 249), 1.0)

    Reference:
        Ho et al., 2020, arXiv:2006.11239. The choice of times, from the last step of training down
        in equal strides, is that of Lin et al., 2023, arXiv:2305.08891, table 2.
    """
    num_train_steps = check_count("num_train_steps", num_train_steps)
    check_number("first_beta", first_beta, "(0, 1)")
    check_number("last_beta", last_beta, "(0, 1)")
    if first_beta > last_beta:
        raise ValueError(f"first_beta <= last_beta, got {first_beta} and {last_beta}: swap them.")
    stride = (last_beta - first_beta) / max(num_train_steps - 1, 1)
    return _spaced([first_beta + stride * t for t in range(num_train_steps)], num_steps, start)


def cosine(
    num_steps: int, *, num_train_steps: int = 1000, offset: float = 0.008, start: int | None = None
) -> Schedule:
    r"""Return the schedule of Nichol & Dhariwal: alpha-bar falls as a squared cosine.

    At its end hardly any signal is left (alpha-bar about 2e-9 for 1,000 steps), so that a step
    which predicts the noise divides by next to nothing. `prediction="v"` does not.

    Args:
        num_steps: of the sampler; at most `num_train_steps`.
        num_train_steps: for which the network was trained.
        offset: s, which keeps the first variances from vanishing.
        start: as in `linear`.

    Raises:
        ValueError: for steps out of range.

    Reference:
        Nichol & Dhariwal, 2021, arXiv:2102.09672, equation 17; variances are at most 0.999.
    """
    num_train_steps = check_count("num_train_steps", num_train_steps)
    check_number("offset", offset, "[0, inf)")

    def level(t):
        return math.cos((t / num_train_steps + offset) / (1 + offset) * math.pi / 2) ** 2

    betas = [min(1 - level(t + 1) / level(t), 0.999) for t in range(num_train_steps)]
    return _spaced(betas, num_steps, start)


def steps_of(schedule: Schedule, prediction: Prediction, eta: float) -> Steps:
    r"""Return the coefficients of a sampler.

    With the signal :math:`\bar\alpha` of this step and :math:`\bar\alpha'` of the next,

    .. math::
        \sigma = \eta \sqrt{\frac{1 - \bar\alpha'}{1 - \bar\alpha}
            \Big(1 - \frac{\bar\alpha}{\bar\alpha'}\Big)}, \qquad
        x' = \sqrt{\bar\alpha'}\,\hat x_0 + \sqrt{1 - \bar\alpha' - \sigma^2}\,\hat\epsilon
            + \sigma w,

    where :math:`\hat x_0` and :math:`\hat\epsilon` are linear in x and in the network's output.

    Reference:
        Song et al., 2021, arXiv:2010.02502, equations 12 and 16; Salimans & Ho, 2022,
        arXiv:2202.00512, for v.
    """
    check_choice("prediction", prediction, get_args(Prediction))
    check_number("eta", eta, "[0, 1]", "It is 0 for DDIM, 1 for DDPM.")
    if prediction == "eps" and schedule.signal[0] <= 0:
        raise ValueError(
            "No signal is left at the first step, so that its data can't be told from predicted "
            "noise. Take a network with prediction='v', or another schedule."
        )
    pairs = zip(schedule.signal[:-1], schedule.signal[1:], strict=True)
    return Steps(*zip(*(_step(now, then, prediction, eta) for now, then in pairs), strict=True))


def _step(now: float, then: float, prediction: Prediction, eta: float):
    """Return the three coefficients of a step from one signal to the next."""
    spread = eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then))
    # What is left of the noise's scale for the predicted noise; rounding may make it negative.
    rest = math.sqrt(max(1 - then - spread**2, 0.0))
    root, noise = math.sqrt(now), math.sqrt(1 - now)
    if prediction == "eps":
        keep = math.sqrt(then) / root
        return keep, rest - keep * noise, spread
    return math.sqrt(then) * root + rest * noise, rest * root - math.sqrt(then) * noise, spread


def _spaced(betas: Sequence[float], num_steps: int, start: int | None) -> Schedule:
    num_train_steps = len(betas)
    num_steps = check_count("num_steps", num_steps)
    start = num_train_steps - 1 if start is None else check_count("start", start, 0)
    if not 1 <= num_steps <= start + 1 <= num_train_steps:
        raise ValueError(
            f"1 <= num_steps <= start + 1 <= num_train_steps, got {num_steps}, {start} and "
            f"{num_train_steps}."
        )
    train_signal = tuple(accumulate((1 - beta for beta in betas), mul))
    times = tuple(round((start + 1) * (1 - n / num_steps)) - 1 for n in range(num_steps))
    return Schedule(times, (*(train_signal[t] for t in times), 1.0), train_signal)
