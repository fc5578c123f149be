"""The laws that every estimator satisfies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tables import ESTIMATORS, Member, members

from probbp.estimators import averaged, control_variate, forward, reverse, spsa, through
from probbp.ops import substitute

D = 12  # parameters of `fun`, in two leaves of different shape


def params(dtype=None):
    a = jnp.linspace(-1, 1, 6, dtype=dtype)
    return {"a": a, "b": (2 * a[:5].reshape(5, 1), a[5])}


def fun(params):
    return jnp.sum(jnp.sin(params["a"])) * jnp.sum(params["b"][0] ** 2) + params["b"][1] ** 3


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
@members(ESTIMATORS)
def test_the_value_is_exact_and_the_gradient_has_the_shape_of_the_parameters(name, dtype):
    p = params(dtype)
    value, grad = jax.jit(ESTIMATORS[name].estimator(fun))(jax.random.key(0), p)
    np.testing.assert_allclose(value, fun(p), rtol=1e-6)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), grad) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), p
    )


@members(ESTIMATORS, quick=["reverse", "gaussian", "orthogonal", "in batches", "averaged"])
def test_the_key_decides_the_gradient(name):
    value_and_grad = ESTIMATORS[name].estimator(fun)
    grads = [value_and_grad(jax.random.key(seed), params())[1]["a"] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(grads[0], grads[1])
    assert (name == "reverse") == bool(jnp.all(grads[0] == grads[2]))


@members(ESTIMATORS)
def test_the_mean_over_keys_is_the_gradient(name):
    keys = jax.random.split(jax.random.key(1), 20_000)
    _, grads = jax.jit(jax.vmap(ESTIMATORS[name].estimator(fun), in_axes=(0, None)))(keys, params())
    exact = jax.grad(fun)(params())
    for estimate, truth in zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True):
        error = estimate.std(axis=0) / np.sqrt(len(keys))
        z = (estimate.mean(axis=0) - truth) / jnp.maximum(error, 1e-12)
        assert jnp.all(jnp.abs(z) < 4.5)


def keyed_fun(params, rng_key):
    """`fun` with a backward pass that drops three entries of four at random, unbiased."""
    a = params["a"]
    kept = jax.random.bernoulli(rng_key, 0.25, a.shape)
    return fun(params | {"a": substitute(a, 4 * kept * a)})


@members(ESTIMATORS, quick=["reverse", "gaussian", "orthogonal", "averaged", "controlled"])
def test_a_function_s_own_key_is_derived_from_the_estimator_s(name):
    """Independent of the tangents, too: otherwise the mean would be off."""
    value_and_grad = jax.jit(jax.vmap(ESTIMATORS[name].estimator(keyed_fun), in_axes=(0, None)))
    values, grads = value_and_grad(jax.random.split(jax.random.key(4), 20_000), params())
    np.testing.assert_allclose(values, fun(params()), rtol=1e-12)
    assert jnp.all(grads["a"].std(axis=0) > 0)
    exact = jax.grad(fun)(params())["a"]
    error = grads["a"].std(axis=0) / np.sqrt(len(values))
    assert jnp.all(jnp.abs(grads["a"].mean(axis=0) - exact) < 4.5 * error)


@pytest.mark.parametrize(
    "split",
    [
        lambda key: key,
        lambda key: jax.random.split(key, 1)[0],
        lambda key: jax.random.split(key)[0],
        lambda key: jax.random.split(jax.random.split(key)[0], 1)[0],
    ],
    ids=["the key", "its one part", "its first half", "the one part of that"],
)
def test_tangents_share_no_key_with_the_function(split):
    """A function that draws as `forward` does: with one key for both its derivative is tripled."""

    def squares(params, rng_key):
        noise = optax.tree.random_like(split(rng_key), params)
        return jnp.sum(substitute(params["a"], noise["a"] ** 2 * params["a"]))

    one = {"a": jnp.ones(6)}
    keys = jax.random.split(jax.random.key(6), 20_000)
    _, grads = jax.jit(jax.vmap(forward()(squares), in_axes=(0, None)))(keys, one)
    error = grads["a"].std(axis=0) / np.sqrt(len(keys))
    assert jnp.all(jnp.abs(grads["a"].mean(axis=0) - 1) < 4.5 * error)


def with_tangents(tangents, k):
    formula = {"gaussian": (D + 1) / k, "unit": (D - 1) / k, "orthogonal": D / k - 1}
    return Member(forward(num_tangents=k, tangents=tangents), lambda d: formula[tangents])


@pytest.mark.parametrize(
    "member",
    [
        *(pytest.param(m, id=name) for name, m in ESTIMATORS.items() if m.variance is not None),
        *(
            pytest.param(with_tangents(tangents, k), id=f"{tangents}, {k}", marks=pytest.mark.slow)
            for tangents in ("gaussian", "unit", "orthogonal")
            for k in (1, 12)
        ),
    ],
)
def test_the_variance_is_as_documented(member):
    keys = jax.random.split(jax.random.key(2), 20_000)
    _, grads = jax.jit(jax.vmap(member.estimator(fun), in_axes=(0, None)))(keys, params())
    exact = jax.grad(fun)(params())
    deviation = jax.vmap(lambda g: optax.tree.norm(optax.tree.sub(g, exact), squared=True))(grads)
    deviation = deviation / optax.tree.norm(exact, squared=True)
    error = deviation.std() / np.sqrt(len(keys)) + 1e-12
    assert abs(deviation.mean() - member.variance(D)) < 4.5 * error


def test_a_control_variate_leaves_the_variance_of_the_rest():
    """(d + 1) / k times the squared length of what the approximation misses."""
    exact = jax.grad(fun)

    def almost(p):
        return jax.tree.map(lambda g: 0.9 * g, exact(p))

    def variance(approximate_grad):
        estimator = control_variate(forward(num_tangents=2), approximate_grad)
        keys = jax.random.split(jax.random.key(5), 20_000)
        _, grads = jax.jit(jax.vmap(estimator(fun), in_axes=(0, None)))(keys, params())
        rest = jax.vmap(lambda g: optax.tree.sub(g, exact(params())))(grads)
        squares = jax.vmap(lambda g: optax.tree.norm(g, squared=True))(rest)
        squares = squares / optax.tree.norm(exact(params()), squared=True)
        return squares.mean(), squares.std() / np.sqrt(len(keys))

    assert variance(exact)[0] < 1e-20
    mean, error = variance(almost)
    assert abs(mean - 0.01 * (D + 1) / 2) < 4.5 * error


def test_all_orthogonal_tangents_are_the_exact_gradient():
    _, grad = forward(num_tangents=D, tangents="orthogonal")(fun)(jax.random.key(0), params())
    jax.tree.map(
        lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-10, atol=1e-12),
        grad,
        jax.grad(fun)(params()),
    )


def test_batches_change_nothing():
    grads = [
        forward(num_tangents=5, batch_size=size)(fun)(jax.random.key(3), params())[1]
        for size in (None, 1, 2, 5)
    ]
    for other in grads[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), grads[0], other)


@members(ESTIMATORS)
def test_auxiliary_output(name):
    value_and_grad = ESTIMATORS[name].estimator(
        lambda p: (fun(p), {"count": jnp.array(3)}), has_aux=True
    )
    (value, aux), _ = value_and_grad(jax.random.key(0), params())
    np.testing.assert_allclose(value, fun(params()))
    assert aux["count"] == 3


def test_forward_accepts_loops_of_dynamic_length():
    def loop(p):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: 2 * x, p).sum()

    with pytest.raises(ValueError, match="[Rr]everse-mode"):
        reverse()(loop)(jax.random.key(0), jnp.ones(3))
    exact = forward(num_tangents=3, tangents="orthogonal")
    _, grad = exact(loop)(jax.random.key(0), jnp.ones(3))
    np.testing.assert_allclose(grad, 64.0)


def on_host(x):
    """A function of which JAX knows nothing but values."""
    out = jax.ShapeDtypeStruct((), x.dtype)
    return jax.pure_callback(lambda x: np.sum(x**2, -1), out, x, vmap_method="expand_dims")


@pytest.mark.parametrize("batch_size", [None, 2])
def test_values_alone_are_enough_for_spsa(batch_size):
    """Of one parameter of a parabola the estimate is the gradient, whatever the step."""
    x = jnp.array([3.0])
    for size in (None, 1e-3, 10.0):
        estimator = spsa(5, size=size, batch_size=batch_size)
        value, grad = jax.jit(estimator(on_host))(jax.random.key(0), x)
        assert value == 9
        np.testing.assert_allclose(grad, 6.0, rtol=1e-6)


def test_a_step_of_spsa_that_rounding_swallows_is_told():
    """And no gradient of zero."""
    _, grad = spsa()(jnp.sum)(jax.random.key(0), jnp.array([1e12, 1.0]))
    assert not jnp.isfinite(grad[0])


def test_through_starts_its_state_afresh():
    """Twice the same key, twice the same gradient, though Adam's state would have moved."""
    value_and_grad = through(optax.adam(0.1), reverse())(fun)
    first = value_and_grad(jax.random.key(0), params())[1]
    again = value_and_grad(jax.random.key(0), params())[1]
    np.testing.assert_array_equal(first["a"], again["a"])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: forward(num_tangents=0), ValueError, "num_tangents must be a positive"),
        (lambda: forward(fun), TypeError, r"call it first, as in estimator=forward\(\)"),
        (lambda: forward(tangents="sobol"), ValueError, "'gaussian', 'unit' or 'orthogonal'"),
        (lambda: averaged(reverse(), 0), ValueError, "num must be a positive"),
        (
            lambda: forward(num_tangents=13, tangents="orthogonal")(fun)(
                jax.random.key(0), params()
            ),
            ValueError,
            "lower num_tangents",
        ),
        (
            lambda: forward()(lambda p: p["n"] * 1.0)(jax.random.key(0), {"n": jnp.array(2)}),
            TypeError,
            r"params\['n'\] has dtype int64",
        ),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()
