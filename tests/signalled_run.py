"""A run in a process of its own that signals may stop, for `tests/test_signals.py`."""

import os
import signal
import sys
import warnings
from pathlib import Path

import jax
import long_run
import numpy as np

INTERRUPTED, TAKEN = 3, 4
"""How the process ends that was told to stop, and the one that came second."""


def run(folder, result, num_samples):
    """Write to a file what was drawn, or what was said instead."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    jax.config.update("jax_enable_x64", True)
    told = []
    code = 0
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            drawn = long_run.draw(folder, 1, num_samples=num_samples, every=num_samples // 40)
        told = [str(one.message) for one in caught]
        np.savez(f"{result}.partial.npz", **drawn)
        os.replace(f"{result}.partial.npz", result)
    except KeyboardInterrupt as interrupt:
        told, code = [str(interrupt)], INTERRUPTED
    except BlockingIOError as error:
        told, code = [str(error)], TAKEN
    Path(f"{result}.told").write_text("\n".join(told))
    sys.stderr.flush()
    os._exit(code)
