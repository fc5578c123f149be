"""The one door to Orbax, which comes with an extra."""

from typing import Any


def orbax() -> Any:
    """Return the module `orbax.checkpoint`.

    Raises:
        ImportError: without the package, naming the extra that has it.
    """
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(
            "Checkpoints need the package orbax-checkpoint: pip install 'probbp[runs]'."
        ) from error
    return ocp
