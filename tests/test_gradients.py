"""`gradient_quality`: what is unbiased looks so, what is not is named, and the costs are XLA's."""

import sys
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import stages
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from tables import ESTIMATORS, members

from probbp.diagnostics import gradient_quality, plot_gradient_quality
from probbp.estimators import forward, reverse, through

D = 12  # parameters of `fun`, in three leaves

UNBIASED = [name for name, member in ESTIMATORS.items() if member.variance and name != "reverse"]
PLOTTED = ("gaussian", "unit", "orthogonal", "averaged")


def params(dtype=None):
    a = jnp.linspace(0.1, 1, 6, dtype=dtype)
    return {"a": a, "b": (2 * a[:5].reshape(5, 1), a[5])}


def fun(params):
    return jnp.sum(jnp.sin(params["a"])) * jnp.sum(params["b"][0] ** 2) + params["b"][1] ** 3


def without(leaf, estimator):
    """Set a leaf of the estimates to zero."""

    def planted(fun, has_aux=False):
        def value_and_grad(rng_key, params):
            value, grad = estimator(fun, has_aux)(rng_key, params)
            return value, {**grad, leaf: jax.tree.map(jnp.zeros_like, grad[leaf])}

        return value_and_grad

    return planted


def flipped(fun, has_aux=False):
    """Return nothing or twice the gradient, by the toss of a coin: relative variance one."""

    def value_and_grad(rng_key, params):
        value, grad = jax.value_and_grad(fun, has_aux=has_aux)(params)
        factor = 2.0 * jax.random.bernoulli(rng_key)
        return value, jax.tree.map(lambda g: (factor * g).astype(g.dtype), grad)

    return value_and_grad


@cache
def measured(name, seed):
    estimator = ESTIMATORS[name].estimator
    return gradient_quality(jax.random.key(seed), estimator, fun, params(), num_keys=2001)


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
@members(UNBIASED, quick=PLOTTED)
def test_what_is_unbiased_looks_unbiased_and_has_its_variance(name, seed):
    quality = measured(name, seed)
    assert quality.biased == ()
    for row in (quality.overall, *quality.leaves.values()):
        assert row.z < 4.5
        assert abs(row.slope - 1) < 4.5 * row.slope_error
        assert row.bias < 4 * row.bias_error
        assert 0 < row.cosine < 1
    overall, variance = quality.overall, ESTIMATORS[name].variance(D)
    error = overall.relative_variance_error
    assert 0 < error < 0.1 * overall.relative_variance
    assert abs(overall.relative_variance - variance) < 4.5 * error
    np.testing.assert_allclose(overall.snr, 1 / variance, rtol=0.3)


def test_against_a_plain_computation():
    """All estimates at once, in NumPy; the batches don't divide the number of keys."""
    num_keys = 250
    key = jax.random.key(3)
    quality = gradient_quality(key, forward(2), fun, params(), num_keys=num_keys, batch_size=64)
    keys = jax.random.split(key, num_keys)
    _, grads = jax.jit(jax.vmap(forward(2)(fun), in_axes=(0, None)))(keys, params())
    estimates = [np.asarray(leaf).reshape(num_keys, -1) for leaf in jax.tree.leaves(grads)]
    exact = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(jax.grad(fun)(params()))]
    assert list(quality.leaves) == ["a", "b.0", "b.1"]
    rows = [*quality.leaves.values(), quality.overall]
    estimates.append(np.hstack(estimates))
    exact.append(np.hstack(exact))
    for row, estimate, g in zip(rows, estimates, exact, strict=True):
        mean, norm = estimate.mean(0), np.linalg.norm(g)
        variance = estimate.var(axis=0, ddof=1)
        total = variance.sum() / norm**2
        z = np.max(np.abs(mean - g) / np.sqrt(variance / num_keys))
        projections = estimate @ g / norm**2
        lengths = np.linalg.norm(estimate, axis=1)
        assert row.size == len(g)
        for value, expected in (
            (row.norm, norm),
            (row.bias, np.linalg.norm(mean - g) / norm),
            (row.bias_error, np.sqrt(total / num_keys)),
            (row.slope, projections.mean()),
            (row.slope_error, projections.std(ddof=1) / np.sqrt(num_keys)),
            (row.z, z),
            (row.relative_variance, total),
            (row.cosine, np.mean(projections * norm / lengths)),
            (row.snr, max(mean @ mean / norm**2 - total / num_keys, 0) / total),
        ):
            np.testing.assert_allclose(value, expected, rtol=1e-6)
        squares = np.sum((estimate - mean) ** 2, axis=1) / norm**2
        expected = squares.std(ddof=1) / np.sqrt(num_keys)
        np.testing.assert_allclose(row.relative_variance_error, expected, rtol=0.1)


@pytest.mark.parametrize(
    ("make", "leaves", "slope"),
    [
        (lambda: through(optax.scale(0.9), flipped), ("a", "b.0", "b.1"), 0.9),
        (lambda: through(optax.clip(0.5), flipped), ("a", "b.0", "b.1"), None),
        (lambda: without("b", flipped), ("b.0", "b.1"), None),
        (lambda: through(optax.scale(0.999), reverse()), ("a", "b.0", "b.1"), 0.999),
    ],
    ids=["scaled", "clipped", "zeroed", "scaled without noise"],
)
def test_a_planted_bias_is_flagged_and_its_leaf_named(make, leaves, slope):
    quality = gradient_quality(jax.random.key(4), make(), fun, params(), num_keys=6000)
    assert quality.biased == (*leaves, "overall")
    if slope:
        overall = quality.overall
        assert abs(overall.slope - slope) < 4.5 * overall.slope_error + 1e-9
    assert f"biased beyond chance: {', '.join(quality.biased)}" in str(quality)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_reverse_is_exact(dtype):
    quality = gradient_quality(jax.random.key(5), reverse(), fun, params(dtype), num_keys=7)
    assert quality.biased == ()
    assert quality.reference == "reverse mode"
    for row in (quality.overall, *quality.leaves.values()):
        assert row.relative_variance == 0
        assert row.relative_variance_error == row.slope_error == row.bias_error == 0
        assert row.slope == pytest.approx(1, abs=2 * float(jnp.finfo(dtype).eps))
        assert row.cosine == pytest.approx(1, abs=2 * float(jnp.finfo(dtype).eps))
        assert row.snr == np.inf
    assert quality.flops_ratio == pytest.approx(1)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_single_precision_neither_overflows_nor_underflows(scale):
    p = {"a": jnp.linspace(1, 2, 8, dtype=jnp.float32), "b": jnp.float32(1.0)}
    quality = gradient_quality(
        jax.random.key(6), flipped, lambda p: scale * (jnp.sum(p["a"] ** 2) + p["b"]), p
    )
    row = quality.overall
    assert quality.biased == ()
    assert row.relative_variance == pytest.approx(1, abs=0.01)
    assert abs(row.slope - 1) < 4.5 / np.sqrt(1000)
    assert row.cosine == pytest.approx(row.slope / 2, abs=1e-5)
    assert row.norm == pytest.approx(scale * np.sqrt(4 * np.sum(np.square(p["a"])) + 1), rel=1e-5)


def test_a_leaf_without_gradient():
    p = {"used": jnp.ones(3), "idle": jnp.ones(2)}
    for estimator, spread in ((forward(2), np.inf), (reverse(), 0)):
        quality = gradient_quality(
            jax.random.key(7), estimator, lambda p: jnp.sum(p["used"] ** 2), p, num_keys=50
        )
        idle = quality.leaves["idle"]
        assert quality.biased == ()
        assert idle.relative_variance == idle.bias_error == spread
        assert np.isnan(idle.slope)
        assert np.isnan(idle.cosine)
        assert np.isfinite(quality.overall.relative_variance)


def test_loops_of_dynamic_length_are_compared_with_forward_mode():
    def loop(p):
        doubled = jax.lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: 2 * x, p["a"])
        return jnp.sum(doubled) + p["b"], {"doubled": doubled}

    quality = gradient_quality(
        jax.random.key(8),
        forward(2),
        loop,
        {"a": jnp.ones(3), "b": jnp.float32(1)},
        num_keys=200,
        has_aux=True,
    )
    assert quality.reference == "forward mode"
    assert "forward mode" in str(quality)
    assert quality.biased == ()
    assert quality.leaves["a"].norm == pytest.approx(64 * np.sqrt(3))
    assert quality.flops_ratio > 0


def test_operations_without_a_transpose_are_compared_with_forward_mode():
    """JAX refuses them by `NotImplementedError`, and loops by `ValueError`."""
    double = Primitive("double")
    double.def_abstract_eval(lambda x: x)
    mlir.register_lowering(double, mlir.lower_fun(lambda x: 2 * x, multiple_results=False))
    ad.defjvp(double, lambda tangent, x: double.bind(tangent))
    batching.defvectorized(double)

    def fun(p):
        return jnp.sum(double.bind(p))

    with pytest.raises(NotImplementedError):
        jax.jit(jax.grad(fun)).lower(jnp.ones(3))
    quality = gradient_quality(jax.random.key(8), forward(2), fun, jnp.ones(3), num_keys=200)
    assert quality.reference == "forward mode"
    assert quality.biased == ()


def test_what_cannot_be_differentiated_at_all_keeps_its_own_error():
    def fun(p):
        return jnp.sum(p * jax.lax.rng_uniform(p[0], p[1], (2,)))

    with pytest.raises(NotImplementedError, match="rng_uniform"):
        gradient_quality(jax.random.key(8), forward(2), fun, jnp.ones(2), num_keys=2)


def test_another_function_may_be_the_reference():
    """An operation with another backward pass is compared with the original."""

    def straight_through(x):
        return x + jax.lax.stop_gradient(jnp.sin(x) - x)

    quality = gradient_quality(
        jax.random.key(9),
        reverse(),
        lambda x: jnp.sum(straight_through(x)),
        jnp.full(3, 0.5),
        num_keys=2,
        reference=lambda x: jnp.sum(jnp.sin(x)),
    )
    assert quality.biased == ("x", "overall")
    assert quality.overall.slope == pytest.approx(1 / np.cos(0.5))


def deep(p):
    hidden, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), jnp.ones((64, 8)), p)
    return jnp.sum(hidden**2)


def test_one_tangent_needs_less_memory_than_reverse_mode_on_a_deep_function():
    p = jax.random.normal(jax.random.key(0), (50, 8, 8))
    quality = gradient_quality(jax.random.key(10), forward(), deep, p, num_keys=2)
    assert 0 < quality.memory_ratio < 1
    compiled = jax.jit(jax.value_and_grad(deep)).lower(p).compile()
    assert quality.reference_memory == compiled.memory_analysis().temp_size_in_bytes
    assert quality.reference_flops == compiled.cost_analysis()["flops"]


@pytest.mark.parametrize("analysis", [None, {}])
def test_costs_that_the_backend_does_not_know(analysis, monkeypatch):
    monkeypatch.setattr(stages.Compiled, "cost_analysis", lambda self: analysis)
    monkeypatch.setattr(stages.Compiled, "memory_analysis", lambda self: None)
    quality = gradient_quality(jax.random.key(0), reverse(), jnp.sum, jnp.ones(2), num_keys=2)
    assert np.isnan([quality.flops, quality.flops_ratio, quality.memory_ratio]).all()
    assert "flops nan" in str(quality)
    assert plot_gradient_quality({"reverse": quality}) is not None


def test_the_table():
    lines = str(measured("gaussian", 0)).splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["a", "b.0", "b.1", "overall"]
    assert len({len(line) for line in lines[1:6]}) == 1
    assert max(map(len, lines)) <= 120
    assert "2001 estimates" in lines[0]
    assert "no bias beyond chance" in lines


def test_xarray():
    quality = measured("gaussian", 0)
    data = quality.to_xarray()
    assert list(data["leaf"].values) == ["a", "b.0", "b.1", "overall"]
    rows = {**quality.leaves, "overall": quality.overall}
    for name, row in rows.items():
        for field, value in row._asdict().items():
            assert data[field].sel(leaf=name).item() == value
    assert data.attrs["num_keys"] == 2001
    assert data.attrs["reference"] == "reverse mode"
    assert data.identical(type(data).from_dict(data.to_dict()))


def test_plots():
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes

    results = {name: measured(name, 0) for name in PLOTTED}
    results["reverse"] = gradient_quality(jax.random.key(0), reverse(), fun, params(), num_keys=2)
    ax = plot_gradient_quality(results)
    assert isinstance(ax, Axes)
    assert {text.get_text() for text in ax.texts} == {*PLOTTED, "reverse (exact)"}
    _, given = plt.subplots()
    assert plot_gradient_quality(results["gaussian"], ax=given) is given
    assert [label.get_text() for label in given.get_yticklabels()] == ["a", "b.0", "b.1", "overall"]
    plt.close("all")


def test_plots_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'probbp\[examples\]'"):
        plot_gradient_quality({})


def shapeless(fun):
    return lambda rng_key, params: (fun(params), jnp.zeros(()))


def sometimes_nan(fun):
    return lambda rng_key, params: (
        fun(params),
        jnp.where(jax.random.bernoulli(rng_key), jnp.nan, params),
    )


def measure(fun=jnp.sum, params=None, estimator=None, **options):
    params = jnp.ones(2) if params is None else params
    return gradient_quality(jax.random.key(0), estimator or reverse(), fun, params, **options)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: measure(num_keys=1),
            ValueError,
            "num_keys must be an integer of at least 2",
        ),
        (lambda: measure(batch_size=0), ValueError, "batch_size must be a positive integer, got 0"),
        (lambda: measure(params={}), ValueError, "no entries"),
        (lambda: measure(params={"n": jnp.arange(2)}), TypeError, "'n' has dtype int64"),
        (lambda: measure(lambda x: x), TypeError, "scalar-output"),
        (
            lambda: measure(lambda p: jnp.sqrt(p["x"]), {"x": jnp.zeros(())}),
            ValueError,
            "exact gradient is not finite in 'x'",
        ),
        (lambda: measure(lambda x: jnp.sum(x**2), jnp.zeros(2)), ValueError, "stationary point"),
        (lambda: measure(estimator=shapeless), ValueError, "like the parameters"),
        (
            lambda: measure(estimator=sometimes_nan, num_keys=50),
            ValueError,
            r"\d+ of 50 estimates are not finite, in 'x'",
        ),
        (lambda: plot_gradient_quality({}), ValueError, "at least one result of gradient_quality"),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()
