"""What one call of a NumPyro model is handed from outside: the key of its operations, its rows.

NumPyro's samplers differentiate one and the same function. An estimate of the gradient takes
another key each time, and another mini-batch; both reach the model here.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.handlers import seed, substitute, trace
from numpyro.primitives import Messenger

Plates = dict[str, tuple[int, int]]
"""The plates that subsample: name to (size, subsample_size)."""

Rows = dict[str, jax.Array]
"""Name of a plate to the indices of the rows that it holds."""


def handed(model: Callable) -> Callable:
    """Return the model with two more arguments: the key of its `numpyro.prng_key()`, its rows.

    A plate that is handed no rows holds them all, whatever its `subsample_size`.
    """

    def handed_model(*args, key_of_model=None, rows_of_plates=None, **kwargs):
        with _GivenRows({} if rows_of_plates is None else rows_of_plates):
            if key_of_model is None:  # NumPyro then hands out a fixed one, and none in its `scan`
                return model(*args, **kwargs)
            with _Keys(key_of_model):
                return model(*args, **kwargs)

    return handed_model


class _Keys(Messenger):
    """Hands out what `numpyro.prng_key()` returns, and notes whether anything asked for it.

    Keys alone: unlike `numpyro.handlers.seed` it draws no site and no subsample, which would enter
    the value of the log density. What a handler inside the model has seeded is left alone.
    """

    def __init__(self, rng_key: jax.Array):
        super().__init__()
        self.rng_key = rng_key
        self.was_asked = False

    def process_message(self, msg):
        # A loop (`numpyro.contrib.control_flow.scan`) hides what its body asks for.
        if msg["type"] in ("prng_key", "control_flow") and not _is_set(msg):
            self.was_asked = True
            self.rng_key, rng_key = jax.random.split(self.rng_key)
            if msg["type"] == "prng_key":
                msg["value"] = rng_key
            else:
                msg["kwargs"]["rng_key"] = rng_key


class _GivenRows(Messenger):
    """Hands rows to the plates that subsample: all of them where it has none for a plate.

    A plate that a handler inside the model has given its rows (`numpyro.handlers.substitute`), or a
    key to draw them once (`numpyro.handlers.seed`), is left alone.
    """

    def __init__(self, rows: Rows):
        super().__init__()
        self.rows = rows

    def process_message(self, msg):
        if msg["type"] == "plate" and not _is_set(msg):
            size, _ = msg["args"]
            rows = self.rows.get(msg["name"])
            msg["value"] = jnp.arange(size) if rows is None else jnp.asarray(rows)
            # NumPyro scales by the number of rows it finds, and warns of any but the model's own.
            msg["args"] = (size, len(msg["value"]))


class _SeenPlates(Messenger):
    """Notes the plates that wait for a subsample, and hands them their first rows."""

    def __init__(self):
        super().__init__()
        self.plates: Plates = {}

    def process_message(self, msg):
        if msg["type"] == "plate" and not _is_set(msg):
            size, subsample_size = msg["args"]
            if self.plates.setdefault(msg["name"], (size, subsample_size)) != msg["args"]:
                raise ValueError(
                    f"There are two plates of the name {msg['name']!r} with other sizes: "
                    f"{self.plates[msg['name']]} and {msg['args']}. Give each its own name."
                )
            if not 0 < subsample_size <= size:
                raise ValueError(
                    f"The plate {msg['name']!r} can't draw subsample_size={subsample_size} of its "
                    f"{size} rows: give a subsample_size from 1 to {size}."
                )
            msg["value"] = jnp.arange(subsample_size)


def _is_set(msg: dict[str, Any]) -> bool:
    """Whether a handler further inside has given a value, or the key from which it is drawn."""
    return msg["value"] is not None or msg["kwargs"].get("rng_key") is not None


def inspect_model(
    model: Callable,
    rng_key: jax.Array,
    model_args: tuple,
    model_kwargs: dict,
    init_strategy: Callable,
) -> tuple[Plates, bool]:
    """Return the plates that subsample, and whether the model asks for keys; refuse what can't be.

    Raises:
        ValueError: for a model without latent sites, with discrete ones, or with latent sites
            inside a plate that subsamples.
    """
    keys, seen = _Keys(rng_key), _SeenPlates()

    def seen_model(*args, **kwargs):
        with keys, seen:
            return model(*args, **kwargs)

    started = substitute(seed(seen_model, rng_key), substitute_fn=init_strategy)
    sites = trace(started).get_trace(*model_args, **model_kwargs)
    _check_sites(sites, seen.plates)
    return seen.plates, keys.was_asked


def _check_sites(sites: dict[str, Any], plates: Plates) -> None:
    """Require latent sites, all of them continuous, and none for each row of a mini-batch."""
    latent = {
        name: site
        for name, site in sites.items()
        if site["type"] == "sample" and not site["is_observed"]
    }
    discrete = [name for name, site in latent.items() if site["fn"].support.is_discrete]
    if discrete:
        raise ValueError(
            f"The latent sites {discrete} are discrete, and Langevin moves can't change them. Sum "
            "them out (numpyro.distributions.MixtureSameFamily), or make this kernel a block of "
            "numpyro.infer.Gibbs beside DiscreteGibbs."
        )
    if not latent:
        raise ValueError(
            "The model has no latent site to sample: every sample site is observed. Check the "
            "arguments of MCMC.run, and numpyro.handlers.condition."
        )
    local = [
        (name, frame.name)
        for name, site in latent.items()
        for frame in site["cond_indep_stack"]
        if frame.name in plates
    ]
    if local:
        name, plate = local[0]
        raise ValueError(
            f"The latent site {name!r} lies inside the plate {plate!r}, which subsamples: a "
            f"mini-batch would have {plates[plate][1]} of its {plates[plate][0]} values, others "
            "each time. Sum it out; or draw all its values outside and take the mini-batch's "
            f"inside: `{name} = numpyro.sample({name!r}, prior.expand([size]).to_event(1))`, then "
            f"`with plate as index: {name}[index]`."
        )
