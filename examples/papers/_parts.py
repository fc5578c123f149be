"""The parts of a long script: run one after the other, each with its table, under one bar."""

from collections.abc import Callable

import numpy as np
from _evidence import over_seeds
from tqdm import tqdm


def run(parts: dict[str, Callable[[bool], list[str]]], fast: bool) -> None:
    """Call each part, `fast -> lines`, and print what it returns."""
    with tqdm(total=len(parts)) as bar:
        for title, part in parts.items():
            bar.set_description(title)
            lines = part(fast)
            bar.clear()
            print("\n" + "\n".join(lines), flush=True)
            bar.update()


def shown(values, digits=3) -> str:
    """Return mean and standard deviation."""
    values = np.asarray(values, float)
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


def with_interval(values, digits=3) -> str:
    """Return mean and half width of the 95 % interval."""
    figure = over_seeds("", values)
    return f"{figure.mean:.{digits}f} +- {figure.high - figure.mean:.{digits}f}"
