"""The laws that every operation satisfies."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import OPS

from probbp.ops import gradient_reversal, substitute

every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
X = jnp.array([0.3, -1.2, 2.6])


def assert_equal(a, b, **tolerance):
    jax.tree.map(partial(np.testing.assert_allclose, **({"rtol": 1e-12} | tolerance)), a, b)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every_op
def test_the_value_is_the_function_s(op, dtype):
    x = X.astype(dtype)
    for value in (op.op(x), jax.jit(op.op)(x), jax.vmap(op.op)(x[None])[0]):
        assert value.dtype == x.dtype
        assert_equal(value, op.value_fn(x), rtol=1e-6)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.checkpoint])
@every_op
def test_the_derivative_is_the_surrogate_s_in_both_modes(op, transform):
    exact = jax.jacrev(op.derivative_fn)(X)
    assert_equal(jax.jacrev(transform(op.op))(X), exact, atol=1e-12)
    assert_equal(jax.jacfwd(transform(op.op))(X), exact, atol=1e-12)
    batch = jnp.stack([X, 2 * X])
    assert_equal(
        jax.vmap(jax.jacrev(transform(op.op)))(batch), jax.vmap(jax.jacrev(op.derivative_fn))(batch)
    )
    second = jax.jacfwd(jax.jacrev(op.derivative_fn))(X)
    assert_equal(jax.jacfwd(jax.jacrev(transform(op.op)))(X), second, atol=1e-12)


@every_op
def test_the_limit_is_exact(op):
    assert_equal(op.limit(X), op.value_fn(X))
    assert_equal(jax.jacrev(op.limit)(X), jax.jacrev(op.value_fn)(X))


def test_substitute_takes_pytrees_and_leaves_without_a_derivative():
    def both(x):
        value = {"a": jnp.round(x), "count": jnp.arange(2)}
        return substitute(value, {"a": x, "count": jnp.arange(2)})

    value, tangent = jax.jvp(both, (X,), (jnp.ones(3),))
    assert_equal(value["a"], jnp.round(X))
    assert_equal(tangent["a"], jnp.ones(3))
    assert value["count"].dtype == jnp.arange(2).dtype


def test_the_value_may_be_what_reverse_mode_refuses():
    def double_until_large(x):
        return jax.lax.while_loop(lambda y: jnp.sum(y) < 100, lambda y: 2 * y, x)

    grad = jax.grad(lambda x: substitute(double_until_large(x), 64 * x).sum())(X)
    assert_equal(grad, jnp.full(3, 64.0))


def test_the_surrogate_costs_nothing_where_nothing_is_differentiated():
    def op(x):
        return substitute(jnp.sin(x), jnp.linalg.inv(x))

    def factorises(fun):
        return "lapack" in jax.jit(fun).lower(jnp.eye(20)).compile().as_text()

    assert not factorises(op)
    assert factorises(jax.grad(lambda x: jnp.sum(op(x))))


def test_reversal_has_a_schedule_and_gives_it_no_gradient():
    grads = jax.jit(jax.grad(lambda x, s: jnp.sum(gradient_reversal(x, s) ** 2), argnums=(0, 1)))
    for strength in (0.0, 0.5, 2.0):
        grad, grad_strength = grads(X, strength)
        assert_equal(grad, -strength * 2 * X)
        assert grad_strength == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: substitute({"a": X}, [X]), "differ in structure"),
        (lambda: substitute({"a": X}, {"a": X[:2]}), r"value\['a'\] has shape \(3,\)"),
        (lambda: substitute(X, X.astype("float32")), "cast them alike"),
        (lambda: gradient_reversal(X, X), "strength must be one number"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()
