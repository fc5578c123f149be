"""What an argument must be: a count, a number in an interval, one of some names, a random key.

Python's, NumPy's and JAX's scalars are taken alike. Of a tracer, whose value is not known, only
the kind is checked.
"""

import inspect
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_WORDS = {
    "(0, inf)": "positive and finite",
    "(0, inf]": "positive",
    "[0, inf)": "finite and not negative",
    "(-inf, inf)": "finite",
    "[0, 1]": "between 0 and 1",
}


def check_count(
    name: str, value: Any, least: int = 1, most: int | None = None, way_out: str = ""
) -> int:
    """Return an integer of at least `least`, and at most `most`, as Python's.

    Counts are shapes and lengths of loops: a tracer raises.
    """
    if most is not None:
        wanted = f"an integer from {least} to {most}"
    else:
        wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
    if isinstance(value, Tracer):
        raise TypeError(
            f"{name} must be {wanted} that is known when the program is traced, got {value}. Give "
            "it as a static argument (jax.jit's static_argnames, optax.inject_hyperparams' "
            "static_args)."
        )
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(_sentence(f"{name} must be {wanted}, got {_shown(value)}", way_out))
    if number < least or (most is not None and number > most):
        raise ValueError(_sentence(f"{name} must be {wanted}, got {number}", way_out))
    return number


def check_number(name: str, value: Any, interval: str, way_out: str = "") -> None:
    """Require a scalar in an interval, written as in mathematics: `"(0, 1]"`, `"[0, inf)"`."""
    check_numbers(name, value, interval, way_out)
    if np.shape(value):
        raise ValueError(
            _sentence(f"{name} must be one number, got an array of {np.shape(value)}", way_out)
        )


def check_numbers(name: str, value: Any, interval: str, way_out: str = "") -> None:
    """Require a scalar or an array whose numbers all lie in an interval, as `check_number`'s."""
    wanted = _WORDS.get(interval, f"in {interval}")
    if not _is_real(value):
        raise TypeError(
            _sentence(f"{name} must be a number, {wanted}, got {_shown(value)}", way_out)
        )
    if isinstance(value, Tracer):
        return
    numbers = np.asarray(value).astype(float)
    low, high = (float(end) for end in interval[1:-1].split(","))
    is_above = numbers > low if interval[0] == "(" else numbers >= low
    is_below = numbers < high if interval[-1] == ")" else numbers <= high
    is_inside = is_above & is_below
    if not np.all(is_inside):
        outside = float(np.extract(~is_inside, numbers)[0])
        found = f"{outside:g} in an array of {numbers.shape}" if numbers.ndim else f"{outside:g}"
        raise ValueError(_sentence(f"{name} must be {wanted}, got {found}", way_out))


def check_choice(name: str, value: Any, choices: Sequence[str], way_out: str = "") -> None:
    """Require one of the names."""
    if not isinstance(value, str) or value not in choices:
        *first, last = map(repr, choices)
        listed = f"{', '.join(first)} or {last}" if first else last
        raise ValueError(_sentence(f"Unknown {name}={_shown(value)}: choose {listed}", way_out))


def check_function(name: str, value: Any, way_out: str = "") -> None:
    """Require what can be called."""
    if not callable(value):
        raise TypeError(_sentence(f"{name} must be a function, got {_shown(value)}", way_out))


def check_estimator(estimator: Any) -> None:
    """Require a function of a function: an estimator, not its name, and not what makes one."""
    way_out = (
        "Pass what a function of probbp.estimators returns, such as reverse() or forward(8): call "
        "the function that makes it."
    )
    check_function("estimator", estimator, way_out)
    name = getattr(estimator, "__qualname__", "")
    makes_one = name.isidentifier() and not name.startswith("_")
    if makes_one and estimator.__module__ == "probbp.estimators":
        raise TypeError(_sentence(f"estimator must be an estimator, got {name}", way_out))
    try:
        signature = inspect.signature(estimator)
    except (TypeError, ValueError):  # a builtin without a signature
        return
    try:
        signature.bind(jnp.sum)
    except TypeError:
        words = f"estimator must take a function, and {name or estimator} takes {signature}"
        raise TypeError(_sentence(words, way_out)) from None


def check_rng_key(name: str, value: Any) -> None:
    """Require one key of JAX's, of either kind."""
    dtype: Any = getattr(value, "dtype", None)
    is_typed = isinstance(value, jax.Array) and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    is_raw = not is_typed and dtype == np.uint32
    if not (is_typed or is_raw):
        raise TypeError(
            f"{name} must be a key such as jax.random.key(0), got {_shown(value)}. Its seed is an "
            "integer."
        )
    if np.ndim(value) != is_raw:
        raise ValueError(
            f"{name} must be one key, got an array of {np.shape(value)}. Take one of them, or "
            "jax.vmap over all."
        )


def _is_real(value: Any) -> bool:
    """Whether it is a number, or an array of them: no key, complex number or Boolean."""
    try:
        dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    except ValueError:  # of rows that differ in length
        return False
    kinds = (np.floating, np.integer)
    return any(jnp.issubdtype(dtype, kind) for kind in kinds)


def _shown(value: Any) -> str:
    """Return a value as it is written, or what it is where that is long."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"


def _sentence(fault: str, way_out: str) -> str:
    return f"{fault}. {way_out}" if way_out else f"{fault}."
