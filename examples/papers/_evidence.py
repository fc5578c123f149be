"""Figures with intervals, and checks that they decide: a claim holds where the whole interval does.

A figure has a 95 % interval, and a check names a side of a bound. The check holds where the whole
interval lies on that side, and so for a difference paired by seed it says more than that the mean
does. A figure that is exact (bytes, a share that is counted) has an interval of one point. Where a
figure is not finite no check on it holds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Figure(NamedTuple):
    """A number, its 95 % interval, what it is in words, and its unit."""

    what: str
    mean: float
    low: float
    high: float
    unit: str = ""


class Check(NamedTuple):
    """One part of a claim: `figure` lies below or above `bound`."""

    claim: str
    figure: Figure
    side: str
    bound: float

    @property
    def holds(self) -> bool:
        if self.side == "below":
            return bool(self.figure.high < self.bound)
        return bool(self.figure.low > self.bound)


def over_seeds(what: str, values, unit: str = "") -> Figure:
    """Return the mean of independent values, with Student's interval."""
    values = np.asarray(values, float)
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    mean = values.mean()
    return Figure(what, float(mean), float(mean - half), float(mean + half), unit)


def jackknifed(what: str, value, left_out, unit: str = "") -> Figure:
    """Return a statistic of all seeds, with an interval by those that leave out one seed each."""
    left_out = np.asarray(left_out, float)
    num = len(left_out)
    error = ((num - 1) * left_out.var()) ** 0.5
    half = stats.t.ppf(0.975, num - 1) * error
    return Figure(what, float(value), float(value - half), float(value + half), unit)


def median_of(what: str, values, unit: str = "") -> Figure:
    """Return the median, with an interval that holds for any distribution, at least 95 %.

    Its ends are order statistics; where fewer than six values cannot give 95 %, the least and the
    largest.
    """
    values = np.sort(np.asarray(values, float))
    rank = int(max(stats.binom.ppf(0.025, len(values), 0.5), 1))
    return Figure(
        what, float(np.median(values)), float(values[rank - 1]), float(values[-rank]), unit
    )


def exact(what: str, value, unit: str = "") -> Figure:
    """Return a number that is not drawn."""
    return Figure(what, float(value), float(value), float(value), unit)


def below(claim: str, figure: Figure, bound: float = 0.0) -> Check:
    return Check(claim, figure, "below", float(bound))


def above(claim: str, figure: Figure, bound: float = 0.0) -> Check:
    return Check(claim, figure, "above", float(bound))


def verdict(holds: Sequence[bool]) -> str:
    """Return what checks come to."""
    if not holds:
        raise ValueError("A claim without checks has no verdict. Give one check for each part.")
    return "holds" if all(holds) else "partly" if any(holds) else "doesn't"
