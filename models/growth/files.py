"""The state machine on disk: networks of arrays, whose shapes their masks tell, and a note."""

from typing import Any

import numpy as np

from probbp.models.growth.machine import Event, Fit, Host, State

FITS = ("current", "best", "kept")


def parts(state: State) -> tuple[dict[str, Fit], dict[str, Any]]:
    """Return the networks of a state, and all else as JSON has it."""
    fits = {name: getattr(state, name) for name in FITS}
    note = {name: value for name, value in state._asdict().items() if name not in FITS}
    note["history"] = [list(event) for event in state.history]
    note["masks"] = {
        name: {layer: np.asarray(d.mask).tolist() for layer, d in fit.dendrites.items()}
        for name, fit in fits.items()
    }
    return fits, note


def like(host: Host, note: dict[str, Any]) -> dict[str, Fit]:
    """Return networks of the shapes that a note tells."""
    return {name: host.like(masks) for name, masks in note["masks"].items()}


def joined(fits: dict[str, Fit], note: dict[str, Any]) -> State:
    """Return the state of which these are the parts."""
    rest = {name: value for name, value in note.items() if name not in ("history", "masks")}
    return State(**fits, history=tuple(Event(*event) for event in note["history"]), **rest)
