"""A run in a process of its own that signals may stop, for `tests/test_signals.py`.

The process is forked from one that has imported what is slow to import and starts no thread: that
leaves BlackJAX, and so all that is ours, for the run itself.
"""

import os
import signal
import warnings
from functools import partial
from pathlib import Path

INTERRUPTED, TAKEN = 3, 4
"""How the process ends that was told to stop, and the one that came second."""

PRELOADED = ["jax", "optax", "arviz", "xarray", "zarr", "orbax.checkpoint", "signalled_run"]


def draw(folder, num_samples):
    """Draws of four chains; what there is of them in NumPy."""
    import jax
    import jax.numpy as jnp

    import probbp

    jax.config.update("jax_enable_x64", True)
    data = probbp.sample(
        jax.random.key(0),
        partial(probbp.line_fmala, lambda x: -0.5 * jnp.sum(x**2)),
        jnp.zeros(2),
        num_warmup=6,
        num_samples=num_samples,
        every=num_samples // 8,
        checkpoint=folder,
        progress_bar=False,
    )
    return {
        f"{group}.{name}": array.values
        for group in ("posterior", "sample_stats")
        for name, array in data[group].data_vars.items()
    }


def run(folder, result, num_samples):
    """Write to a file what was drawn, and to another what was said."""
    import numpy as np

    signal.signal(signal.SIGINT, signal.default_int_handler)
    told, code = [], 0
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            drawn = draw(folder, num_samples)
        told = [str(one.message) for one in caught]
        np.savez(f"{result}.partial.npz", **drawn)
        os.replace(f"{result}.partial.npz", result)
    except KeyboardInterrupt as interrupt:
        told, code = [str(interrupt)], INTERRUPTED
    except BlockingIOError as error:
        told, code = [str(error)], TAKEN
    Path(f"{result}.told").write_text("\n".join(told))
    os._exit(code)
