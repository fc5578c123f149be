"""What an argument must be: scalars of all kinds are taken alike, and the rest is named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.core import Tracer

from probbp import estimators
from probbp.checks import check_choice, check_count, check_number, check_numbers
from probbp.diagnostics import expected_calibration_error
from probbp.ops import rate, rtrl, sdo, sus
from probbp.optim import dsbp

INTEGERS = {
    "python": int,
    "int8": np.int8,
    "int64": np.int64,
    "uint32": np.uint32,
    "array": np.array,
    "jax": jnp.asarray,
}
FLOATS = {
    "python": float,
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
    "bfloat16": jnp.bfloat16,
    "array": np.array,
    "jax": jnp.asarray,
}


@pytest.mark.parametrize("kind", INTEGERS)
def test_a_count_is_returned_as_pythons(kind):
    count = check_count("n", INTEGERS[kind](4))
    assert type(count) is int
    assert count == 4
    with pytest.raises(ValueError, match="n must be an integer of at least 5, got 4"):
        check_count("n", INTEGERS[kind](4), 5)
    with pytest.raises(ValueError, match="n must be an integer from 0 to 3, got 4. Take less."):
        check_count("n", INTEGERS[kind](4), 0, 3, "Take less.")


@pytest.mark.parametrize(
    "value", [4.0, np.float32(4), "4", None, True, np.True_, jnp.ones((), bool), [4], np.ones(1)]
)
def test_what_is_no_count(value):
    with pytest.raises(TypeError, match="n must be a positive integer, got "):
        check_count("n", value)


def test_a_count_is_known_when_a_program_is_traced():
    with pytest.raises(TypeError, match="n must be a positive integer that is known .* static"):
        jax.jit(lambda n: check_count("n", n))(4)


@pytest.mark.parametrize("kind", FLOATS)
def test_a_number_is_taken_and_refused_whatever_its_kind(kind):
    kind = FLOATS[kind]
    check_number("x", kind(0.5), "(0, 1)")
    check_number("x", kind(1.0), "(0, 1]")
    for value, interval, words in (
        (1.0, "(0, 1)", r"x must be in \(0, 1\), got 1"),
        (-1.0, "(0, inf)", "x must be positive and finite, got -1"),
        (0.0, "(0, inf)", "x must be positive and finite, got 0"),
        (-0.5, "[0, inf)", "x must be finite and not negative, got -0.5"),
        (np.nan, "(-inf, inf)", "x must be finite, got nan"),
        (np.nan, "(0, inf]", "x must be positive, got nan"),
        (np.inf, "[0, inf)", "x must be finite and not negative, got inf"),
        (np.nan, "[0, 1]", "x must be between 0 and 1, got nan"),
    ):
        with pytest.raises(ValueError, match=words):
            check_number("x", kind(value), interval)


@pytest.mark.parametrize(
    "value", ["0.5", None, True, 1j, [[1.0], [1.0, 2.0]], jax.random.key(0), len]
)
def test_what_is_no_number(value):
    with pytest.raises(TypeError, match="x must be a number, finite, got"):
        check_numbers("x", value, "(-inf, inf)")


def test_one_number_is_no_array():
    with pytest.raises(ValueError, match=r"x must be one number, got an array of \(2,\)"):
        check_number("x", np.ones(2), "(0, inf)")
    with pytest.raises(ValueError, match=r"x must be positive and finite, got -1 in an array"):
        check_numbers("x", np.array([1.0, -1.0]), "(0, inf)")


def test_tracers_pass_where_only_their_value_is_wrong():
    def fun(x):
        assert isinstance(x, Tracer)
        check_number("x", x, "(0, 1)")
        with pytest.raises(ValueError, match="one number"):
            check_number("x", jnp.stack([x, x]), "(0, 1)")
        with pytest.raises(TypeError, match="a number"):
            check_number("x", x > 0, "(0, 1)")
        return x

    assert jax.jit(fun)(2.0) == 2


def test_a_choice():
    check_choice("way", "up", ("up", "down"))
    for value in ("left", None, 3, np.ones(2), ["up"]):
        with pytest.raises(ValueError, match="Unknown way=.*: choose 'up' or 'down'. Or stay."):
            check_choice("way", value, ("up", "down"), "Or stay.")


FOUR = {
    "simulate": lambda n: rate.simulate(lambda spike, x: x, rate.constant(jnp.ones(2)), n),
    "keep_step": lambda n: sdo.sample(lambda x, t: x, jnp.ones((1, 2)), sdo.linear(8), keep_step=n),
    "Last": lambda n: sdo.sample(
        lambda x, t: x, jnp.ones((1, 2)), sdo.linear(8), keep_step=sdo.Last(n)
    ),
    "linear": sdo.linear,
    "local_window_size": lambda n: sus.dot_product_attention(
        *[jnp.ones((1, 6, 1, 2))] * 3, keep=None, local_window_size=n
    ),
    "seed": lambda n: dsbp.scale_by_dynamic_spectral(2, seed=n).init({"k": jnp.ones((4, 3))}),
    "rank": lambda n: dsbp.scale_by_dynamic_spectral(n).init({"k": jnp.ones((8, 3))}),
    "length": lambda n: rtrl.scan(lambda c, _: (c + 1.0, None), jnp.zeros(()), None, n),
    "num_bins": lambda n: expected_calibration_error([0.2, 0.9], [0, 1], num_bins=n),
    "num_tangents": lambda n: estimators.forward(n)(jnp.sum)(jax.random.key(0), jnp.ones(3)),
}


@pytest.mark.parametrize("door", FOUR)
def test_integers_of_all_kinds_at_the_doors(door):
    """All give what Python's gives."""
    expected = FOUR[door](4)
    for kind in ("int64", "jax"):
        found = FOUR[door](INTEGERS[kind](4))
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(
                *(
                    jax.random.key_data(x) if hasattr(x, "aval") and _is_key(x) else x
                    for x in (a, b)
                )
            ),
            found,
            expected,
        )


def _is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def test_hyperparameters_may_be_injected():
    """Those that are numbers; a rank is a shape, and the message says what to do."""
    params = {"k": jnp.arange(12.0).reshape(4, 3)}
    inject = optax.inject_hyperparams
    make = inject(dsbp.scale_by_dynamic_spectral, static_args=("rank", "refresh", "seed"))
    plain, injected = dsbp.scale_by_dynamic_spectral(2, decay=0.5), make(2, decay=0.5)
    expected, _ = jax.jit(plain.update)(params, plain.init(params))
    found, _ = jax.jit(injected.update)(params, injected.init(params))
    np.testing.assert_allclose(found["k"], expected["k"], rtol=1e-6)
    careless = inject(dsbp.scale_by_dynamic_spectral)(2)
    state = careless.init(params)
    with pytest.raises(TypeError, match="rank must be a positive integer that is known .*static"):
        jax.jit(careless.update)(params, state)
