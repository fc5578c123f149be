"""A physical model that is known, and a simulator that knows more."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from probbp.checks import check_count, check_rng_key

Values = Mapping[str, Any]


class Case(NamedTuple):
    """A physical model, and a simulator of what is measured.

    Attributes:
        physics: `(parameters) -> response`, or `(parameters, known) -> response`, for one record.
        priors: of the physics' parameters, by name.
        factors: distributions of all that the simulator varies, by name.
        response: `(factors) -> response` of one record, without noise.
        domain: the factors observed as c, environment and operation.
        classes: the factors observed as y, condition.
        known: those of the domain that are inputs of the physics.
        noise: standard deviation of the noise of x, c and y.
        reference: factors of domain and class at which the physics comes closest to the response.
    """

    physics: Callable[..., jax.Array]
    priors: dict[str, dist.Distribution]
    factors: dict[str, dist.Distribution]
    response: Callable[[Values], jax.Array]
    domain: tuple[str, ...]
    classes: tuple[str, ...]
    known: tuple[str, ...]
    noise: float
    reference: dict[str, float]


class Records(NamedTuple):
    """What was measured, and the truth behind it.

    Attributes:
        x: responses (records, outputs).
        c: domain (records, domain factors).
        y: classes (records, class factors).
        known: inputs of the physics (records, known factors), `None` where it has none.
        factors: the simulator's, each (records,).
    """

    x: jax.Array
    c: jax.Array
    y: jax.Array
    known: jax.Array | None
    factors: dict[str, jax.Array]


def simulate(
    rng_key: jax.Array, case: Case, num_records: int, factors: Values | None = None
) -> Records:
    """Draw factors, responses and labels, all with the case's noise; known inputs without.

    Args:
        rng_key: a key.
        case: the case.
        num_records: how many.
        factors: values of some factors, broadcast to (num_records,), instead of draws.

    Example:
        >>> import jax
        >>> from probbp.models.physics import oscillator
        >>> records = simulate(jax.random.key(0), oscillator(), 5, {"temperature": 20.0})
        >>> records.x.shape, records.c.shape, records.y.shape
        ((5, 64), (5, 1), (5, 1))
    """
    check_rng_key("rng_key", rng_key)
    num_records = check_count("num_records", num_records)
    if unknown := sorted(set(factors or {}) - set(case.factors)):
        raise ValueError(f"factors has {unknown}, but must be of {list(case.factors)}.")
    key_factors, key_x, key_c, key_y = jax.random.split(rng_key, 4)
    keys = jax.random.split(key_factors, len(case.factors))
    values = {
        name: prior.sample(key, (num_records,))
        for key, (name, prior) in zip(keys, case.factors.items(), strict=True)
    }
    for name, value in (factors or {}).items():
        values[name] = jnp.broadcast_to(jnp.asarray(value, float), (num_records,))

    def noisy(key, clean):
        return clean + case.noise * jax.random.normal(key, clean.shape, clean.dtype)

    def columns(names):
        return jnp.stack([values[name] for name in names], -1)

    return Records(
        noisy(key_x, jax.vmap(case.response)(values)),
        noisy(key_c, columns(case.domain)),
        noisy(key_y, columns(case.classes)),
        columns(case.known) if case.known else None,
        values,
    )
