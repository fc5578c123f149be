"""Properties over pytrees, shapes and dtypes that nobody thought of: drawn by hypothesis.

Trees of positions are nested dictionaries, lists and tuples, with scalars, empty arrays and `None`
among their leaves, in half to double precision.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from tables import ESTIMATORS, SAMPLERS, build, members

import probbp
from probbp import diagnostics
from probbp.ops import feedback, gradient_reversal, rtrl, substitute, sus
from probbp.optim import dsbp

few = partial(settings, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))

DTYPES = st.sampled_from(["float16", "float32", "float64"])
SHAPES = array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3)


@st.composite
def leaves(draw, dtypes=DTYPES):
    dtype, shape = draw(dtypes), draw(SHAPES)
    values = draw(arrays(dtype, shape, elements=st.sampled_from([-1.5, -0.25, 0.0, 0.5, 1.0])))
    return jnp.asarray(values)


def trees(leaf, max_leaves=4):
    """Return pytrees that hold at least one number."""
    nested = st.recursive(
        leaf | st.none(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner, inner)
            | st.dictionaries(st.sampled_from(["a", "b", "c"]), inner, max_size=3)
        ),
        max_leaves=max_leaves,
    )
    return nested.filter(lambda tree: sum(x.size for x in jax.tree.leaves(tree)) > 0)


def quadratic(tree):
    """A function of all leaves, in the widest of their dtypes."""
    return sum(-jnp.sum(leaf**2 + leaf / 2) / 2 for leaf in jax.tree.leaves(tree))


def described(tree):
    return jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


@members(ESTIMATORS, quick=["gaussian", "orthogonal"])
@few(max_examples=3)
@given(tree=trees(leaves(), max_leaves=3))
def test_estimators_keep_the_value_and_the_shape_of_the_parameters(name, tree):
    tree = tree, jnp.ones(4)  # room for four orthogonal tangents
    value, grad = ESTIMATORS[name].estimator(quadratic)(jax.random.key(0), tree)
    assert value == quadratic(tree)
    assert described(grad) == described(tree)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(grad))


@members(SAMPLERS)
@few(max_examples=2)
@given(tree=trees(leaves(st.sampled_from(["float32", "float64"]))))
def test_samplers_keep_the_shape_of_the_position(name, tree):
    algorithm = build(name, quadratic, 0.1)
    state = algorithm.init(tree, jax.random.key(0))
    after, info = algorithm.step(jax.random.key(1), state)
    assert described(state) == described(after)
    assert described(after.position) == described(tree)
    assert 0 <= info.acceptance_rate <= 1


@few(max_examples=2)
@given(tree=trees(leaves(st.just("float64")), max_leaves=3))
def test_a_run_has_a_variable_for_each_leaf(tree):
    data = probbp.sample(
        jax.random.key(0),
        partial(probbp.fmala, quadratic),
        tree,
        num_warmup=0,
        num_samples=3,
        num_chains=2,
        metric=None,
        progress_bar=False,
    )
    found = sorted(x.shape for x in data.posterior.data_vars.values())
    assert found == sorted((2, 3, *leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
@few(max_examples=8)
@given(tree=trees(leaves()), strength=st.sampled_from([-1.0, 0.0, 0.5]))
def test_substitutes_keep_values_bit_for_bit(tree, strength):
    def surrogate(x):
        return jax.tree.map(lambda leaf: strength * leaf, x)

    for op in (
        lambda x: substitute(x, surrogate(x)),
        lambda x: gradient_reversal(x, -strength),
    ):
        jax.tree.map(np.testing.assert_array_equal, op(tree), tree)
        assert described(op(tree)) == described(tree)
        grad = jax.grad(lambda x, op=op: jnp.asarray(quadratic(op(x)), float))(tree)
        exact = jax.grad(lambda x: jnp.asarray(quadratic(x), float))(tree)
        jax.tree.map(
            lambda g, e: np.testing.assert_allclose(g, strength * e, rtol=2e-3), grad, exact
        )


@pytest.mark.slow
@few(max_examples=6)
@given(
    batch=st.integers(1, 3),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_feedback_through_the_kernel_itself_is_backpropagation(batch, sizes, dtype):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (batch, sizes[0]), dtype)
    kernel = jax.random.normal(keys[1], sizes, dtype)

    def loss(op):
        return jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(op(x, w))), argnums=(0, 1))

    ours = loss(lambda x, w: feedback.dense(x, w, w))(x, kernel)
    theirs = loss(jnp.matmul)(x, kernel)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), ours, theirs)


@pytest.mark.slow
@few(max_examples=3)
@given(
    batch=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    time=st.integers(1, 5),
    keys=st.integers(1, 6),
)
def test_attention_that_keeps_all_is_exact(batch, heads, time, keys):
    num, num_keys = heads
    query = jax.random.normal(jax.random.key(0), (batch, time, num, 3))
    key, value = jax.random.normal(jax.random.key(1), (2, batch, keys, num_keys, 3))

    def loss(attention, **options):
        return jax.value_and_grad(lambda *args: jnp.sum(attention(*args, **options) ** 2))

    ours = loss(sus.dot_product_attention, keep=keys, rng_key=jax.random.key(2))
    theirs = loss(jax.nn.dot_product_attention)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        ours(query, key, value),
        theirs(query, key, value),
    )


@few(max_examples=5)
@given(tree=trees(leaves(st.just("float64")), max_leaves=3), length=st.integers(0, 4))
def test_a_loop_of_any_parameters_is_lax_scan(tree, length):
    def loss(scan, params):
        total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))

        def step(carry, x):
            return jnp.sin(carry + total * x), None

        return scan(step, jnp.ones(()), jnp.arange(float(length)))[0]

    ours, theirs = (jax.value_and_grad(partial(loss, f))(tree) for f in (rtrl.scan, jax.lax.scan))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), ours, theirs)


@few(max_examples=2)
@given(
    tree=trees(leaves(st.just("float32")), max_leaves=2),
    mode=st.sampled_from(["residual", "whiten", "damp"]),
)
def test_the_spectral_transform_takes_any_tree(tree, mode):
    transform = dsbp.scale_by_dynamic_spectral(rank=2, mode=mode)
    state = transform.init(tree)
    for grad in (jax.tree.map(jnp.zeros_like, tree), tree):
        updates, state = transform.update(grad, state, tree)
        assert described(updates) == described(tree)
        assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(updates))


@pytest.mark.slow
@few(max_examples=8)
@given(
    logits=arrays(
        "float64",
        st.tuples(st.integers(1, 12), st.integers(2, 4)),
        elements=st.floats(-5, 5),
    ),
    seed=st.integers(0, 99),
)
def test_scores_of_probabilities_stay_in_their_range(logits, seed):
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.random.default_rng(seed).integers(0, probs.shape[1], len(probs))
    assume(len(probs) > 0)
    assert 0 <= diagnostics.expected_calibration_error(probs, labels) <= 1
    assert 0 <= diagnostics.brier_score(probs, labels) <= 2
    assert diagnostics.negative_log_likelihood(probs, labels) >= 0
    certain = np.eye(probs.shape[1])[labels]
    assert diagnostics.brier_score(certain, labels) == 0
    np.testing.assert_allclose(diagnostics.expected_calibration_error(certain, labels), 0)
