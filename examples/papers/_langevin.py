"""The Langevin samplers that are compared, and how: shared by two scripts."""

import sys
import time
from functools import partial

import arviz as az
import blackjax
import jax.numpy as jnp
import numpy as np
from _evidence import above, exact, over_seeds

import probbp
from probbp.diagnostics import from_blackjax

BEGIN = time.perf_counter()
# Those by which the claim is judged.
FORWARD = ("FMALA, published", "Line-FMALA", "PC-Line-FMALA")
FEW = ("MALA", *FORWARD)  # for a smoke test
CLAIM = """   Paper: forward mode is "competitive with the original MALA, while even outperforming
   it depending on the probabilistic model" (abstract; no figure at hand)."""


def random_walk(logdensity_fn, step_size):
    return blackjax.normal_random_walk(logdensity_fn, jnp.sqrt(2 * step_size))


# Each takes (logdensity_fn, step_size) with BlackJAX's h; the paper's epsilon is sqrt(2 h).
# "Published" is the paper's algorithm where the package has another default.
SAMPLERS = {
    "RWM": random_walk,
    "MALA": blackjax.mala,
    "FMALA, published": partial(probbp.fmala, key_policy="refreshed"),
    "FMALA, carried": probbp.fmala,
    "Line-FMALA": probbp.line_fmala,
    "Line-FMALA, 4 tangents": partial(probbp.line_fmala, num_tangents=4),
    "PC-FMALA, shared": probbp.pc_fmala,
    "PC-FMALA, published": partial(probbp.pc_fmala, key_policy="refreshed", floor=0.0),
    "PC-Line-FMALA": probbp.pc_line_fmala,
}


def ess(draws):
    """Bulk ESS by ArviZ of draws (chain, draw, ...); 0 where nothing ever moved."""
    values = np.asarray(az.ess(from_blackjax({"x": draws}))["x"])
    return np.where(np.ptp(draws, axis=1).max(0) > 0, np.nan_to_num(values), 0.0)


def verdict(what, figures):
    """Say which samplers agree with the paper; a larger figure is better."""
    if what.startswith("ESS"):  # below 10 it tells nothing apart
        figures = {name: np.maximum(values, 10) for name, values in figures.items()}
    mala = figures["MALA"]
    better = [name for name in figures if figures[name].min() > mala.max()]
    worse = [name for name in figures if figures[name].max() < mala.min()]
    near = [name for name in figures if name not in better + worse + ["MALA"]]
    print(f"""   Ours, {what}, every run against every run of MALA:
     better than MALA (agrees: outperforms): {listed(better)}
     not told apart (agrees: competitive): {listed(near)}
     worse than MALA (doesn't agree): {listed(worse)}""")


def chosen(samplers, fast):
    return {k: v for k, v in samplers.items() if not fast or k in FEW}


def listed(names):
    return "; ".join(names) or "none"


def spread(values, spec):
    return f"{np.median(values):{spec}} [{np.min(values):{spec}}, {np.max(values):{spec}}]"


def table(*rows):
    rows = [row.split("|") for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print("   " + "  ".join([name.ljust(widths[0]), *cells]))


def progress(text):
    print(f"   ... {time.perf_counter() - BEGIN:4.0f} s {text}", file=sys.stderr, flush=True)


def log_ratio(what, ours, theirs):
    """Return a figure of the paired log ratio; ESS below 10 tells nothing apart.

    It has no interval where one is zero: a chain that never moved.
    """
    if "ESS" in what:
        ours, theirs = np.maximum(ours, 10), np.maximum(theirs, 10)
    if min(*ours, *theirs) <= 0:
        return exact(f"log {what}, paired", np.nan)
    return over_seeds(f"log {what}, paired", np.log(ours) - np.log(theirs))


def competitive(what, name, figures):
    """Return checks: the forward samplers come to half of MALA's figure, the last to more."""
    checks = [
        above(
            f"{sampler} is competitive, at least half of MALA's: {name}",
            log_ratio(f"{what} over MALA's", figures[sampler], figures["MALA"]),
            np.log(0.5),
        )
        for sampler in FORWARD
    ]
    best = checks[-1].figure
    return [*checks, above(f"{FORWARD[-1]} outperforms MALA: {name}", best)]


def bars(ax, figures):
    """Draw intervals of the log ratio to MALA, of each sampler."""
    drawn = {name: log_ratio("", values, figures["MALA"]) for name, values in figures.items()}
    means = np.array([figure.mean for figure in drawn.values()])
    ax.errorbar(means, range(len(means)), xerr=means - [f.low for f in drawn.values()], fmt="o")
    ax.axvline(0.0, color="grey", linestyle=":")
    ax.set_yticks(range(len(means)), list(drawn), fontsize=7)
    for place in np.flatnonzero(np.isnan(means)):
        ax.text(0.02, place, "a chain never moved", transform=ax.get_yaxis_transform(), va="center")
    ax.invert_yaxis()
