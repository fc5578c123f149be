"""The table of what an estimator of the gradient is worth."""

from typing import NamedTuple

import numpy as np
import xarray

_LEVEL = 1e-3  # of all tests of one result together


class LeafQuality(NamedTuple):
    """How the estimates of one leaf of the gradient, or of all together, compare with the exact g.

    Everything but `size` and `norm` is an estimate from the keys. In a leaf whose exact gradient is
    zero up to rounding, what is relative to it is 0 or infinite; `slope` and `cosine` are NaN.

    Attributes:
        size: number of entries.
        norm: |g|, exact.
        bias: |mean - g| / |g|. Noise alone makes it about `bias_error`, never zero.
        bias_error: root mean square of `bias` if there were none: sqrt(relative_variance / keys).
        slope: mean of <estimate, g> / |g|^2, the estimate's share of the gradient along the
            gradient: 1 without bias, 0.9 where a tenth is lost.
        slope_error: its standard error.
        z: largest |z| over the entries of mean - g.
        p_value: of the hypothesis that there is no bias, from `z` and `slope`, by Bonferroni.
        relative_variance: E|estimate - E estimate|^2 / |g|^2.
        relative_variance_error: its standard error.
        cosine: mean of the cosine between estimate and g; an estimate of zero counts as 0.
        snr: signal to noise, |E estimate|^2 / E|estimate - E estimate|^2; what noise adds to
            the squared length of the mean is taken off.
    """

    size: int
    norm: float
    bias: float
    bias_error: float
    slope: float
    slope_error: float
    z: float
    p_value: float
    relative_variance: float
    relative_variance_error: float
    cosine: float
    snr: float


class GradientQuality(NamedTuple):
    """The answer of `gradient_quality`; prints as a table.

    Attributes:
        overall: of all leaves together, as one vector.
        leaves: by name, the path of the leaf joined by dots; "x" if there is only one array.
        num_keys: how many estimates were made.
        reference: how the exact gradient was made, "reverse mode" or "forward mode".
        flops: of one estimate, value included, as XLA counts them; NaN where it does not say.
        memory: temporary buffers of one estimate [bytes]; NaN where XLA does not say.
        reference_flops: of the exact value and gradient.
        reference_memory: of the exact value and gradient [bytes].
    """

    overall: LeafQuality
    leaves: dict[str, LeafQuality]
    num_keys: int
    reference: str
    flops: float
    memory: float
    reference_flops: float
    reference_memory: float

    @property
    def flops_ratio(self) -> float:
        """Operations of one estimate over those of the exact gradient."""
        return self.flops / self.reference_flops if self.reference_flops else np.nan

    @property
    def memory_ratio(self) -> float:
        """Temporary memory of one estimate over that of the exact gradient."""
        return self.memory / self.reference_memory if self.reference_memory else np.nan

    @property
    def biased(self) -> tuple[str, ...]:
        """Names of the rows with a bias beyond chance: one in a thousand results errs.

        The level is shared among the leaves and "overall", which sees a bias spread over many.
        """
        rows = self.rows()
        return tuple(name for name, row in rows.items() if row.p_value < _LEVEL / len(rows))

    def to_xarray(self) -> xarray.Dataset:
        """Return the table along a coordinate `leaf`, "overall" last; the costs are attributes."""
        rows = self.rows()
        data = {
            field: ("leaf", np.array([getattr(row, field) for row in rows.values()]))
            for field in LeafQuality._fields
        }
        names = ("num_keys", "reference", "flops", "memory", "reference_flops", "reference_memory")
        attributes = {name: getattr(self, name) for name in names}
        return xarray.Dataset(data, coords={"leaf": list(rows)}, attrs=attributes)

    def __repr__(self) -> str:
        """Return the table."""
        rows = self.rows()
        biased = self.biased
        width = max(len("overall"), *(len(name) for name in rows)) + 1
        lines = [
            f"{self.num_keys} estimates beside the exact gradient ({self.reference})",
            f"{'':{width}s}{'size':>8s}{'|g|':>10s}{'bias':>10s}{'by noise':>10s}{'max|z|':>8s}"
            f"{'slope':>17s}{'rel. variance':>19s}{'cosine':>8s}{'snr':>9s}",
        ]
        for name, row in rows.items():
            mark = "*" if name in biased else " "
            lines.append(
                f"{name:{width - 1}s}{mark}{row.size:8d}{row.norm:10.3g}{row.bias:10.2g}"
                f"{row.bias_error:10.2g}{_at_most(row.z, 999):>8s}"
                f"{_with_error(row.slope, row.slope_error):>17s}"
                f"{_with_error(row.relative_variance, row.relative_variance_error):>19s}"
                f"{row.cosine:8.3f}{row.snr:9.2g}"
            )
        lines.append(
            f"* biased beyond chance: {', '.join(biased)}" if biased else "no bias beyond chance"
        )
        lines.append(
            f"cost, over that of the exact gradient: flops {self.flops_ratio:.3g}, "
            f"temporary memory {self.memory_ratio:.3g}"
        )
        return "\n".join(lines)

    def rows(self) -> dict[str, LeafQuality]:
        """Return the rows by name, "overall" last."""
        return {**self.leaves, "overall": self.overall}


def _at_most(value: float, limit: float) -> str:
    return f"{value:.1f}" if value <= limit else f">{limit}"


def _with_error(value: float, error: float) -> str:
    return f"{value:.3g} ± {error:.1g}"
