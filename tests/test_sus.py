"""Sparse attention gradients: JAX's value, the definition's derivative, whose mean is exact.

The definition is written here densely, on `substitute`. Where it is compared, blocks are made
small, so that there are several, the last one not full.
"""

import math
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from cheap import compiled, fitted, key_of, like, normal
from flax import linen, nnx
from numpyro.infer import MCMC, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

import probbp
from probbp.estimators import reverse
from probbp.models import transformer
from probbp.numpyro import Kernel, Optim
from probbp.ops import substitute, sus
from probbp.ops.sus import forward, sparse
from probbp.ops.sus.systematic import systematic

B, T, S, N, K, H = 2, 13, 21, 4, 2, 8
QUERY = 2 * normal(0, B, T, N, H)
KEY, VALUE = normal(1, 2, B, S, K, H)
BIAS = normal(2, B, N, T, S)
MASK = normal(3, B, N, T, S) > -0.25  # six of ten
BLIND = MASK.copy()
BLIND[:, :, 2:5] = False
LENGTHS = {
    "query_seq_lengths": np.array([13, 4], np.int32),
    "key_value_seq_lengths": np.array([9, 21], np.int32),
}
# name -> (heads, key heads, bias, mask, other arguments)
CASES = {
    "bias of a head, causal": (N, N, BIAS[:1, :, :1], None, {"is_causal": True}),
    "grouped queries, bias of a query": (N, K, BIAS[:, :1, :, :1], None, {"scale": 0.7}),
    "one key head, bias": (N, 1, BIAS, None, {}),
    "blind queries": (N, K, BIAS[:1, :1], BLIND, {}),
    "padding, lengths, window": (
        1,
        1,
        None,
        MASK[:, :1, :1],
        LENGTHS | {"local_window_size": (9, 2)},
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
in_blocks = pytest.mark.usefixtures("small_blocks")
every_rule = pytest.mark.parametrize("sampling", ["systematic", "filled", "independent"])


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(forward, "_LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(forward, "_LEAST_ROWS", 5)
    monkeypatch.setattr(sparse, "_GATHERED_AT_ONCE", 1)


def arguments(case, dtype):
    heads, key_heads, bias, mask, options = case
    arrays = QUERY[:, :, :heads], KEY[:, :, :key_heads], VALUE[:, :, :key_heads]
    if key_heads == N:
        arrays = QUERY, *(np.concatenate([x, -x], axis=2) for x in (KEY, VALUE))
    bias = None if bias is None else bias.astype(dtype)
    return *(x.astype(dtype) for x in arrays), bias, mask, options


def assert_equal(a, b, **tolerance):
    jax.tree.map(
        partial(np.testing.assert_allclose, **({"rtol": 1e-9, "atol": 1e-9} | tolerance)), a, b
    )


# ---------------------------------------------------------------------------------------
# The definition.


def softmax(query, key, bias, mask, options):
    """Return the weights, (batch, heads, time, keys), and which logits count."""
    batch, time, heads, width = query.shape
    keys = key.shape[1]
    key = jnp.repeat(key, heads // key.shape[2], axis=2)
    logits = jnp.einsum("btnh,bsnh->bnts", query, key) * options.get("scale", width**-0.5)
    logits = logits if bias is None else logits + bias
    seen = jnp.ones(logits.shape, bool) if mask is None else jnp.broadcast_to(mask, logits.shape)
    t, s = jnp.arange(time)[:, None], jnp.arange(keys)
    if options.get("is_causal"):
        seen = seen & (s <= t)
    if "local_window_size" in options:
        before, after = np.broadcast_to(options["local_window_size"], 2)
        seen = seen & (t - s <= before) & (s - t <= after)
    if "query_seq_lengths" in options:
        seen = seen & (t < options["query_seq_lengths"][:, None, None, None])
        seen = seen & (s < options["key_value_seq_lengths"][:, None, None, None])
    return jnp.where(seen, logits, -1e30), seen


def definition(query, key, value, bias, mask, kept, options, mean="exact"):
    """Return the attention, differentiated through `kept`, (batch, heads, time, keys), alone.

    `mean` is the wrong rule where it is not "exact": both factors of D_i then have the same draw.
    """
    logits, _ = softmax(query, key, bias, mask, options)
    value = jnp.repeat(value, query.shape[2] // value.shape[2], axis=2)
    output = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), value)
    stop = jax.lax.stop_gradient
    kept = stop(kept)
    subtracted = output if mean == "exact" else jnp.einsum("bnts,bsnh->btnh", kept, value)
    moved = kept * logits
    surrogate = jnp.einsum("bnts,bsnh->btnh", moved, stop(value))
    surrogate -= jnp.einsum("bnts,btnh->btnh", moved, stop(subtracted))
    surrogate += jnp.einsum("bnts,bsnh->btnh", kept, value)
    mixed = substitute(output, surrogate)
    if "query_seq_lengths" in options:
        real = jnp.arange(query.shape[1]) < options["query_seq_lengths"][:, None]
        mixed = mixed * real[:, :, None, None]
    return mixed


def kept_weights(query, key, bias=None, mask=None, **options):
    """Read the weights that the backward pass uses off the gradient with respect to the value.

    dV_j = sum_i W_ij G_i: with as many features as queries, and G the identity, that is W.
    """
    batch, time, heads, width = query.shape
    key = jnp.repeat(key, heads // key.shape[2], axis=2)
    padding = [(0, 0)] * 3 + [(0, time - width)]
    options = {"scale": width**-0.5} | options

    def attend(value):
        return sus.dot_product_attention(
            jnp.pad(query, padding), jnp.pad(key, padding), value, bias, mask, **options
        )

    _, pullback = jax.vjp(attend, jnp.zeros((batch, key.shape[1], heads, time), query.dtype))
    identity = jnp.eye(time, dtype=query.dtype)[:, None]
    (weights,) = pullback(jnp.broadcast_to(identity, (batch, time, heads, time)))
    return jnp.einsum("bsnt->bnts", weights)


# ---------------------------------------------------------------------------------------
# The value, and the limit.


@in_blocks
@every_case
def test_the_value_is_jax_s(case):
    @partial(jax.jit, static_argnums=0)
    def compute(dtype, rng_key):
        *arrays, options = arguments(case, dtype)
        query, key, value, bias, mask = arrays
        op = partial(sus.dot_product_attention, bias=bias, mask=mask, **options)
        exact = op(query, key, value, keep=None)
        # What is differentiated computes the value beside the draw.
        sparse, pullback = jax.vjp(lambda v: op(query, key, v, keep=3, rng_key=rng_key), value)
        grad = pullback(sparse)
        return (exact, sparse), grad, jax.nn.dot_product_attention(*arrays, **options)

    # The exponential multiplies the rounding of logits, which is single in both, by their size.
    for dtype, num_eps in (("float32", 32), ("bfloat16", 4)):
        values, grad, expected = jax.device_get(compute(dtype, key_of(1)))
        tolerance = num_eps * float(jnp.finfo(dtype).eps)
        assert expected.dtype == dtype
        for value in values:
            assert value.dtype == dtype
            pair = (x.astype("float32") for x in (value, expected))
            assert_equal(*pair, rtol=tolerance, atol=tolerance)
            # Of what sampling would add there is nothing, to the last bits.
            pair = (x.astype("float32") for x in (value, values[0]))
            assert_equal(*pair, rtol=8 * tolerance / num_eps, atol=8 * tolerance / num_eps)
        same, other_grad, _ = jax.device_get(compute(dtype, key_of(2)))
        np.testing.assert_array_equal(same[1], values[1])
        assert np.any(other_grad[0] != grad[0])


def test_without_a_batch():
    arrays = QUERY, KEY, VALUE, BIAS, MASK

    @compiled
    def everything():
        op = partial(sus.dot_product_attention, keep=3, rng_key=key_of(1))
        single = [x[0] for x in arrays]
        of_one = op(*(x[:1] for x in arrays))[0]
        return op(*single), of_one, jax.nn.dot_product_attention(*single)

    single, of_one, expected = everything()
    assert_equal(single, of_one)
    assert_equal(single, expected, rtol=1e-5, atol=1e-5)


def scalar(attention, mask, options):
    """Return a loss of query, key, value and bias that leaves none of them out."""

    def loss(query, key, value, bias):
        mixed = attention(query, key, value, bias, mask, **options)
        return jnp.sum(jnp.sin(mixed + jnp.arange(mixed.shape[-1])))

    return loss


@in_blocks
@every_case
def test_the_limit_is_exact(case):
    *arrays, mask, options = arguments(case, "float64")
    argnums = tuple(i for i, x in enumerate(arrays) if x is not None)
    tangents = tuple(None if x is None else np.cos(x) for x in arrays)

    def dense(query, key, value, bias, mask, **options):
        weights = jax.nn.softmax(softmax(query, key, bias, mask, options)[0])
        return definition(query, key, value, bias, mask, weights, options)

    @compiled
    def derivatives(arrays):
        ours = scalar(partial(sus.dot_product_attention, keep=None), mask, options)
        forward = jax.jvp(ours, arrays, tangents)[1]
        exact = jax.grad(scalar(dense, mask, options), argnums)(*arrays)
        return jax.grad(ours, argnums)(*arrays), exact, forward

    ours, exact, forward = derivatives(tuple(arrays))
    assert_equal(ours, exact)
    along = (np.vdot(grad, tangents[i]) for i, grad in zip(argnums, exact, strict=True))
    assert_equal(forward, sum(along))


def test_the_limit_is_reached():
    @jax.jit
    def grads(rng_key):
        limits = [
            {"keep": None},
            {"keep": float("inf"), "rng_key": rng_key},
            {"keep": S, "rng_key": rng_key},
            {"keep": 2},
        ]
        ops = [partial(sus.dot_product_attention, **limit) for limit in limits]
        return [jax.grad(lambda q, op=op: jnp.sum(op(q, KEY, VALUE) ** 2))(QUERY) for op in ops]

    exact, *others = grads(key_of(0))
    for grad in others:
        np.testing.assert_array_equal(grad, exact)
    # "filled" has as many slots as a causal query has keys, and more, for the first of them.
    op = partial(sus.dot_product_attention, QUERY, KEY, is_causal=True)
    estimate, exact = jax.jit(
        lambda key: [
            jax.grad(lambda v, f=f: jnp.sum(f(v)[:, :2] ** 2))(VALUE)
            for f in (partial(op, keep=20, rng_key=key, sampling="filled"), partial(op, keep=None))
        ]
    )(key_of(0))
    assert_equal(estimate, exact, rtol=0, atol=1e-3)


def test_only_the_limit_has_second_derivatives():
    def loss(size, **options):
        arrays = size * SMALL["query"], SMALL["key"], SMALL["value"]
        return jnp.sum(jnp.sin(sus.dot_product_attention(*arrays, **options)))

    slope, step = jax.grad(partial(loss, keep=None)), 1e-4
    everything = compiled(lambda x: (jax.grad(slope)(x), slope(x + step), slope(x - step)))
    exact, above, below = everything(1.0)
    assert_equal(exact, (above - below) / (2 * step), rtol=1e-4)
    sparse = partial(loss, keep=3, rng_key=key_of(0))
    for second in (
        jax.hessian(sparse),
        jax.jacfwd(jax.jacfwd(sparse)),
        jax.jacrev(jax.grad(sparse)),
    ):
        with pytest.raises(TypeError, match="Use keep=None where second"):
            jax.eval_shape(second, 1.0)


# ---------------------------------------------------------------------------------------
# The draw.


@pytest.mark.parametrize(("num", "num_slots"), [(1, 1), (5, 3), (16, 4), (17, 5), (300, 40)])
def test_systematic_sampling_has_the_odds_it_is_given(num, num_slots):
    """Over a grid of offsets a frequency is its probability up to a step of the grid or two."""
    grid = (np.arange(4096) + 0.5) / 4096
    inclusion = np.random.default_rng(num).uniform(size=num) ** 3
    inclusion[:: num // 2 + 1], inclusion[1::7] = 1.0, 0.0
    sample = compiled(jax.vmap(lambda u, p, s: systematic(u, p, num_slots, s), (0, None, None)))

    def frequencies(indices):
        return np.bincount(indices.ravel(), minlength=num + 1)[:-1] / 4096

    for sum_over_slots in (0.8, 1.0, 2.5):  # the last does not fit
        scaled = inclusion
        for _ in range(50):  # to the wanted sum, as nearly as entries up to 1 can have it
            scaled = np.minimum(1, scaled * sum_over_slots * num_slots / np.sum(scaled))
        total = np.sum(scaled)
        indices, spacing = sample(grid, scaled, 1.0)
        assert_equal(spacing, np.full(4096, np.maximum(1, total / num_slots)))
        assert np.all(np.diff(indices, axis=-1) >= 0)
        frequency = frequencies(indices)
        assert_equal(frequency, scaled / spacing[0], rtol=0, atol=2 / 4096)
        numbers = set(np.unique(np.sum(indices < num, axis=-1)).tolist())
        hits = float(total / spacing[0])
        assert numbers <= {math.floor(hits + 1e-9), math.ceil(hits - 1e-9)}
        assert not np.any(frequency[scaled == 0])
    # Entries longer than the spacing are chosen once.
    lengths = np.where(inclusion > 0.9, 3.7, inclusion)
    asked = lengths.sum() / num_slots
    indices, spacing = sample(grid, lengths, asked)
    assert_equal(spacing, np.full(4096, asked))
    assert_equal(frequencies(indices), np.minimum(1, lengths / asked), rtol=0, atol=2 / 4096)


@every_rule
@pytest.mark.parametrize("num_keys", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_weight_is_kept_as_often_as_it_should(sampling, num_keys):
    keep, query, memory, mask = 3.5, QUERY[:1], KEY[:1], MASK[:1].copy()
    mask[:, 0, 3] = False
    options = {"keep": keep, "sampling": sampling}

    @compiled
    def run(rng_key):
        def draw(rng_key):
            return kept_weights(query, memory, None, mask, rng_key=rng_key, **options)

        kept = jax.lax.map(draw, jax.random.split(rng_key, num_keys), batch_size=500)
        return kept, jax.nn.softmax(softmax(query, memory, None, mask, {})[0])

    kept, weights = run(key_of(3))
    rate = np.full((*weights.shape[:3], 1), keep)
    if sampling == "filled":
        for _ in range(2):
            rate = rate * keep / np.minimum(1, rate * weights).sum(-1, keepdims=True)
    chance = np.minimum(1, rate * weights)
    is_kept = kept > 0
    # What is kept weighs W / q, or more where coins fell on more than there is place for.
    expected = np.where(weights > 0, weights / np.maximum(chance, 1e-300), 0)
    if sampling == "independent":
        assert np.all(is_kept.sum(-1) <= math.ceil(keep + 4 * math.sqrt(keep)))
        assert np.all(kept[is_kept] >= 0.999999 * np.broadcast_to(expected, kept.shape)[is_kept])
    else:
        assert np.all(is_kept.sum(-1) <= math.ceil(keep))
        total = chance.sum(-1)
        # An entry longer than the spacing takes one point more or less.
        long = (rate * weights > 1).sum(-1) if sampling == "systematic" else 0
        assert np.all(np.abs(is_kept.sum(-1) - total) < 1 + long + 1e-6)
        assert_equal(kept, np.where(is_kept, expected, 0))
    spread = np.sqrt(chance * (1 - chance) / num_keys) + 1e-12
    z = (is_kept.mean(0) - chance) / spread
    assert np.abs(z[chance < 1 - 1e-9]).max() < 4.8  # of about a thousand
    assert np.all(is_kept[:, (chance > 1 - 1e-9) & (weights > 0)])
    assert chance.sum(-1).max() <= keep + 1e-9
    if sampling == "filled":
        assert chance.sum(-1).mean() > np.minimum(1, keep * weights).sum(-1).mean() + 0.2


def test_coins_that_find_no_slot_are_made_up_for(monkeypatch):
    monkeypatch.setattr(forward.Options, "num_slots", 3)
    query, memory, num_keys = QUERY[:1], KEY[:1], 2_500

    @compiled
    def run(rng_key):
        options = {"keep": 3.5, "sampling": "independent"}
        draw = lambda rng_key: kept_weights(query, memory, rng_key=rng_key, **options)
        kept = jax.lax.map(draw, jax.random.split(rng_key, num_keys), batch_size=500)
        kept = kept.reshape(num_keys, N, T, S)
        weights = jax.nn.softmax(softmax(query, memory, None, None, {})[0])[0]
        return weights, kept.mean(0), kept.std(0), jnp.max(jnp.sum(kept > 0, axis=-1))

    weights, mean, spread, most = run(key_of(3))
    often = (weights > 0.02) & (spread > 1e-9)  # rarer ones are far from normal
    assert most == 3
    assert np.sum(often) > 100
    assert np.max(np.abs(mean - weights)[often] / spread[often]) < 4.8 / num_keys**0.5


def test_draws_of_rows_heads_and_examples_are_independent():
    """Equal rows, whose number kept would be equal if their draws were."""
    flat, num_keys = np.zeros((2, 40, 2, 4)), 1_000

    @compiled
    def run(rng_key):
        draw = lambda rng_key: kept_weights(flat, flat[:, :9], keep=2.5, rng_key=rng_key)
        kept = jax.vmap(draw)(jax.random.split(rng_key, num_keys))
        return jnp.sum(kept > 0, axis=-1).reshape(num_keys, -1)

    counts = run(key_of(0))
    assert set(np.unique(counts)) == {2, 3}
    correlation = np.corrcoef(counts.T) - np.eye(160)
    assert np.max(abs(correlation)) < 5.5 / math.sqrt(num_keys)  # of 12720


# ---------------------------------------------------------------------------------------
# The derivative.


@in_blocks
@every_case
def test_the_sparse_rule_is_the_definition_in_both_modes(case):
    *arrays, mask, options = arguments(case, "float64")
    argnums = tuple(i for i, x in enumerate(arrays) if x is not None)
    sampling = "filled" if mask is not None else "systematic"
    sparse = {"keep": 2.5, "rng_key": key_of(5), "sampling": sampling}

    @compiled
    def derivatives(arrays, tangents):
        query, key, _, bias = arrays
        kept = kept_weights(query, key, bias, mask, **sparse, **options)

        def dense(query, key, value, bias, mask, **options):
            return definition(query, key, value, bias, mask, kept, options)

        op = scalar(partial(sus.dot_product_attention, **sparse), mask, options)
        value, tangent_map = jax.linearize(op, *arrays)
        ours = jax.linear_transpose(tangent_map, *arrays)(jnp.ones_like(value))
        expected = jax.grad(scalar(dense, mask, options), argnums)(*arrays)
        return [ours[i] for i in argnums], tangent_map(*tangents), list(expected)

    tangents = tuple(None if x is None else np.cos(x) for x in arrays)
    ours, forward, expected = derivatives(tuple(arrays), tangents)
    assert_equal(ours, expected)
    along = (np.vdot(grad, tangents[i]) for i, grad in zip(argnums, expected, strict=True))
    assert_equal(forward, sum(along))
    assert all(np.any(grad != 0) for grad in ours)


SMALL = dict(zip(("query", "key", "value"), normal(8, 3, 1, 6, 2, 3), strict=True))
SMALL["bias"] = normal(9, 1, 2, 6, 6)


def one_layer(params, rng_key=None, attention=sus.dot_product_attention, **options):
    mixed = attention(**params, rng_key=rng_key, **{"keep": 2.0, "is_causal": True} | options)
    return jnp.sum(jnp.sin(2 * mixed + jnp.arange(3)))


def several_layers(params, rng_key=None, num_layers=3, shared=False):
    """Return a loss of a residual network, its layers in a scan."""
    first_key = key_of(0) if rng_key is None else rng_key
    keys = jax.random.split(first_key, num_layers)
    if shared:
        keys = jnp.broadcast_to(keys[0], keys.shape)

    def layer(hidden, inputs):
        kernels, own_key = inputs
        parts = (jnp.tensordot(hidden, kernel, 1) for kernel in kernels)
        own_key = None if rng_key is None else own_key
        return hidden + sus.dot_product_attention(*parts, keep=2.0, rng_key=own_key), None

    hidden, _ = jax.lax.scan(layer, params["hidden"], (params["kernels"][:num_layers], keys))
    return jnp.sum(jnp.sin(2 * hidden))


DEEP = {
    "hidden": normal(10, 5, 1, 3),
    "kernels": normal(11, 3, 3, 3, 3),
}


def z_scores(funs, params, num_keys):
    """Return for each function the largest |z| over all entries of its gradient's mean.

    The gradient without a key is the exact one.
    """

    def flat(fun, rng_key):
        grads = jax.grad(fun)(params, rng_key)
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grads)])

    @compiled
    def moments(rng_key):
        exact = [flat(fun, None) for fun in funs]

        def batch(keys):
            errors = [
                jax.vmap(partial(flat, f))(keys) - e for f, e in zip(funs, exact, strict=True)
            ]
            return [(jnp.sum(e, axis=0), jnp.sum(e**2, axis=0)) for e in errors]

        keys = jax.random.split(rng_key, (num_keys // 2000, 2000))
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.lax.map(batch, keys))

    largest = []
    for total, squares in moments(key_of(1)):
        is_random = squares > 1e-12 * num_keys
        z = total[is_random] / np.sqrt(squares[is_random])
        largest.append(float(np.max(np.abs(z))))
        assert np.all(np.abs(total[~is_random]) < 1e-6 * num_keys)
        assert np.mean(is_random) > 0.7  # what is not seen has no gradient
    return largest


CHANCE = 5.0  # |z| that any of 180 entries exceeds once in ten thousand tests


# As many as show a wrong rule, below; and five times as many.
few_and_many = pytest.mark.parametrize(
    "num_keys", [20_000, pytest.param(100_000, marks=pytest.mark.slow)]
)


@few_and_many
def test_the_mean_is_exact(num_keys):
    rules = ("systematic", "filled", "independent")
    largest = z_scores([partial(one_layer, sampling=rule) for rule in rules], SMALL, num_keys)
    assert max(largest) < CHANCE, largest


@few_and_many
def test_layers_need_keys_of_their_own(num_keys):
    funs = {
        "two": partial(several_layers, num_layers=2),
        "three": several_layers,
        "one key": partial(several_layers, shared=True),
    }
    *own, shared = z_scores(list(funs.values()), DEEP, num_keys)
    assert max(own) < CHANCE, own
    assert shared > 2 * CHANCE


def coins(rng_key, weights, keep):
    return jax.random.bernoulli(rng_key, jnp.minimum(1, keep * weights), weights.shape)


def same_draw_in_both_factors(query, key, value, bias, *, rng_key, keep, is_causal):
    options = {"is_causal": is_causal}
    weights = jax.nn.softmax(softmax(query, key, bias, None, options)[0])
    if rng_key is None:
        return definition(query, key, value, bias, None, weights, options)
    kept = jnp.where(coins(rng_key, weights, keep), jnp.maximum(weights, 1 / keep), 0)
    return definition(query, key, value, bias, None, kept, options, mean="sampled")


def dropped_overflow(query, key, value, bias, *, rng_key, keep, is_causal):
    options = {"is_causal": is_causal}
    weights = jax.nn.softmax(softmax(query, key, bias, None, options)[0])
    if rng_key is None:
        return definition(query, key, value, bias, None, weights, options)
    is_kept = coins(rng_key, weights, keep)
    is_kept = is_kept & (jnp.cumsum(is_kept, axis=-1) <= keep)
    kept = jnp.where(is_kept, jnp.maximum(weights, 1 / keep), 0)
    return definition(query, key, value, bias, None, kept, options)


def test_a_wrong_rule_is_seen_to_be_biased():
    rules = (same_draw_in_both_factors, dropped_overflow)
    funs = [partial(one_layer, attention=rule) for rule in rules]
    assert min(z_scores(funs, SMALL, 20_000)) > 2 * CHANCE


# ---------------------------------------------------------------------------------------
# Cost.


def test_memory_is_linear_in_the_length():
    keep, width = 16, 32

    def pieces(length):
        shape = jax.ShapeDtypeStruct((1, length, 1, width), jnp.float32)

        def pullback(query, key, value, rng_key):
            op = partial(sus.dot_product_attention, keep=keep, rng_key=rng_key)
            return jax.vjp(op, query, key, value)[1]

        stored = jax.eval_shape(pullback, shape, shape, shape, jax.random.key(0))
        backward = jax.jit(lambda pullback, grad: pullback(grad)).lower(stored, shape).compile()
        sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(stored)]
        return sizes, backward.memory_analysis().temp_size_in_bytes / 4

    for length in (4096, 8192):
        sizes, temporary = pieces(length)
        # Query, key, value and output; indices and weights.
        assert sum(sizes) <= length * (4 * width + 2 * keep) + 100
        assert temporary < 32 * length * width  # the weights are 8192 a query, gathered keys 512


# ---------------------------------------------------------------------------------------
# Transformations, precision.


def test_transformations_agree():
    arrays = tuple(SMALL[name] for name in ("query", "key", "value"))

    def loss(query, rng_key):
        mixed = sus.dot_product_attention(query, *arrays[1:], keep=2, rng_key=rng_key)
        return jnp.sum(jnp.sin(mixed))

    grad = jax.grad(loss)

    @compiled
    def batches(queries, rng_key):
        keys = jax.random.split(rng_key, 2)
        alone = [grad(queries[i], keys[j]) for i, j in ((0, 0), (1, 1), (0, 1))]
        remat = jax.grad(jax.checkpoint(loss))
        scanned = jax.lax.scan(lambda c, x: (c, remat(*x)), 0, (queries, keys))[1]
        over_keys = jax.vmap(grad, in_axes=(None, 0))(queries[0], keys)
        return alone, jax.vmap(grad)(queries, keys), scanned, over_keys

    alone, vmapped, scanned, over_keys = batches(np.stack([arrays[0], -arrays[0]]), key_of(0))
    *expected, other = alone
    assert np.any(expected[0] != other)
    assert_equal(vmapped, np.stack(expected))
    assert_equal(scanned, np.stack(expected))
    assert_equal(over_keys, np.stack([expected[0], other]))


def test_half_precision_is_accumulated_in_single():
    half = [SMALL[name].astype("bfloat16") for name in ("query", "key", "value")]

    @compiled
    def grads(arrays):
        op = partial(sus.dot_product_attention, keep=3, rng_key=key_of(0))
        return jax.grad(lambda a: jnp.sum(op(*a).astype("float32") ** 2))(arrays)

    ours, expected = grads(half), grads([x.astype("float32") for x in half])
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        eps = float(jnp.finfo("bfloat16").eps)
        assert_equal(a.astype("float32"), b, rtol=2 * eps, atol=4 * eps * np.max(abs(b)))


SHARDED = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from probbp.ops import sus
mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
arrays = jax.random.normal(jax.random.key(0), (3, 2, 256, 2, 4))
def loss(arrays, rng_key):
    return jnp.sum(sus.dot_product_attention(*arrays, keep=4, rng_key=rng_key) ** 2)
grad = jax.jit(jax.grad(loss))
expected = grad(list(arrays), jax.random.key(1))
split = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch"))) for x in arrays]
compiled = grad.lower(split, jax.random.key(1)).compile()
print(*(word in compiled.as_text() for word in ("all-gather(", "all-to-all(", "permute(")))
for a, b in zip(expected, compiled(split, jax.random.key(1))):
    assert jnp.allclose(a, b, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.slow
def test_a_batch_on_two_devices_is_not_gathered():
    run = subprocess.run(
        [sys.executable, "-c", SHARDED],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["False"] * 3


# ---------------------------------------------------------------------------------------
# Hosts.


class Attention(nnx.Module):
    """What NNX's layers take for `attention_fn`, with a stream of keys of its own."""

    def __init__(self, keep, *, rngs):
        self.keep, self.rngs = keep, rngs.fork()

    def __call__(self, query, key, value, mask=None, *, is_causal=False, **_):
        return sus.dot_product_attention(
            query, key, value, mask=mask, is_causal=is_causal, keep=self.keep, rng_key=self.rngs()
        )


def test_flax_s_layers_take_it():
    x = normal(0, 1, 6, 4)
    mask = np.tril(np.ones((6, 6), bool))[None, None]
    sizes = {"num_heads": 2, "in_features": 4, "decode": False}
    plain = nnx.MultiHeadAttention(**sizes, rngs=nnx.Rngs(0))
    sparse = nnx.MultiHeadAttention(
        **sizes, rngs=nnx.Rngs(0), attention_fn=Attention(2, rngs=nnx.Rngs(1))
    )

    @nnx.jit
    def value_and_grad(layer):
        return nnx.value_and_grad(lambda layer: jnp.sum(layer(x, mask=mask) ** 2))(layer)

    (value, exact), (first, one), (second, two) = map(value_and_grad, (plain, sparse, sparse))
    assert_equal((first, second), (value, value), rtol=1e-5)
    grads = [np.asarray(grad["value"]["kernel"][...]) for grad in (exact, one, two)]
    assert all(np.any(grads[i] != grads[j]) for i, j in ((0, 1), (0, 2), (1, 2)))

    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x):
            rng_key = self.make_rng("sus") if self.has_rng("sus") else None
            attention = partial(sus.dot_product_attention, keep=2, rng_key=rng_key)
            return linen.MultiHeadDotProductAttention(2, attention_fn=attention)(x, mask=mask)

    network = linen.Sequential([Layer(), Layer()])
    params = like(jax.eval_shape(network.init, key_of(0), x))

    @compiled
    def of_key(params, rng_key=None):
        rngs = {} if rng_key is None else {"sus": rng_key}
        return jax.value_and_grad(lambda p: jnp.sum(network.apply(p, x, rngs=rngs) ** 2))(params)

    value, exact = of_key(params)
    first, one = of_key(params, key_of(1))
    assert_equal(first, value, rtol=1e-5)
    for layer in ("layers_0", "layers_1"):
        parts = [
            g["params"][layer]["MultiHeadDotProductAttention_0"]["value"] for g in (exact, one)
        ]
        assert np.any(parts[0]["kernel"] != parts[1]["kernel"])


def attending_with_fresh_keys(*args, **kwargs):
    return sus.dot_product_attention(*args, keep=2, rng_key=numpyro.prng_key(), **kwargs)


@pytest.mark.slow
def test_a_numpyro_transformer_is_fitted_by_svi():
    """Each layer asks NumPyro for a key."""
    x = normal(20, 3, 8, 2)
    sizes = {"num_classes": 2, "max_length": 8, "num_features": 2, "width": 4, "hidden_width": 4}
    network = jax.jit(partial(transformer.init, **sizes))(key_of(0)) | {
        "head.kernel": normal(1, 4, 2)
    }

    def model(attention):
        with numpyro.plate("rows", 4):
            bias = numpyro.sample("bias", dist.Normal(jnp.ones(4), 1))
        params = network | {"embedding.bias": bias}
        logits = transformer.apply(params, x, num_heads=1, attention=attention)
        y = np.array([0, 1, 1])
        numpyro.sample("y", dist.Categorical(logits=logits).to_event(1), obs=y)

    def losses(attention, num_steps):
        guide = AutoNormal(partial(model, jax.nn.dot_product_attention))
        svi = SVI(partial(model, attention), guide, Optim(optax.adam(0.1), reverse()), Trace_ELBO())
        return compiled(partial(fitted, svi, num_steps=num_steps))(key_of(0))[1]

    ours = losses(attending_with_fresh_keys, 300)
    assert_equal(ours[0], losses(jax.nn.dot_product_attention, 1)[0], rtol=1e-5)
    assert np.mean(ours[-100:]) < 0.7 * np.mean(ours[:20])


@pytest.mark.slow
def test_a_chain_with_it_is_exact():
    """The posterior of a factor on the queries, by MALA with a key for every estimate."""
    query, key, value = SMALL["query"], SMALL["key"], SMALL["value"]

    def predict(factor, rng_key):
        return sus.dot_product_attention(factor * query, key, value, keep=1.5, rng_key=rng_key)

    y = jax.jit(predict)(1.5, None) + 0.3

    def model():
        factor = numpyro.sample("factor", dist.Normal(0, 2))
        mean = predict(factor, numpyro.prng_key())
        numpyro.sample("y", dist.Normal(mean, 0.5).to_event(4), obs=y)

    mcmc = MCMC(Kernel(model, probbp.mala), num_warmup=500, num_samples=4000, progress_bar=False)
    mcmc.run(jax.random.key(0))
    grid = jnp.linspace(-10, 10, 2001)

    def logdensity(factor):
        errors = (y - predict(factor, None)) / 0.5
        return -0.5 * (jnp.sum(errors**2) + (factor / 2) ** 2)

    weights = jax.nn.softmax(jax.jit(jax.vmap(logdensity))(grid))
    mean = jnp.sum(weights * grid)
    draws = mcmc.get_samples()["factor"]
    for x, expected in ((draws, mean), ((draws - mean) ** 2, weights @ (grid - mean) ** 2)):
        batches = jnp.mean(x.reshape(40, 100), axis=1)
        error = jnp.std(batches, ddof=1) / math.sqrt(40)
        assert abs(jnp.mean(x) - expected) < 4.5 * error


# ---------------------------------------------------------------------------------------
# Bad input.


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"keep": 0}, ValueError, "keep must be positive, got 0"),
        ({"keep": -1.0}, ValueError, "keep=None keeps all"),
        ({"sampling": "topk"}, ValueError, "choose 'systematic', 'filled' or 'independent'"),
        ({"query": QUERY[0, 0]}, ValueError, "query must have three axes"),
        ({"query": QUERY[..., :3]}, ValueError, "key and value .batch, keys, key heads, width"),
        ({"value": VALUE[:, :5]}, ValueError, "key and value .batch, keys, key heads, width"),
        ({"query": QUERY[:, :, :3]}, ValueError, "3 heads are not a multiple of 2"),
        ({"bias": BIAS[:, :2]}, ValueError, r"bias must be broadcastable to \(2, 4, 13, 21\)"),
        ({"mask": MASK[:, :2]}, ValueError, "mask must be broadcastable"),
        ({"mask": MASK.astype(float)}, ValueError, "pass what is added to the logits as bias"),
        ({"key_value_seq_lengths": np.ones(2)}, ValueError, "must be integers of shape"),
        ({"query_seq_lengths": np.array([3])}, ValueError, "must be integers of shape"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"query": QUERY, "key": KEY, "value": VALUE, "keep": 3}
    with pytest.raises(error, match=words):
        sus.dot_product_attention(**arguments | change)


@pytest.mark.parametrize("name", ["keep", "scale"])
def test_what_is_known_at_tracing_is_not_traced(name):
    def loss(x):
        return sus.dot_product_attention(QUERY, KEY, VALUE, **{"keep": 3, name: x}).sum()

    with pytest.raises(TypeError, match=f"{name} must be a number"):
        jax.jit(loss)(2.0)


def test_the_suggested_keep_is_the_smallest_that_is_quiet_enough():
    """Gradients x of variance 2, with noise of variance 1 / keep^2."""
    x = np.array([0.0, 2.0, 0.0, 2.0, 2.0, 0.0, 3.0, -1.0])

    def loss_fn(scale, x, *, keep, rng_key):
        noise = 0.0 if keep is None else jax.random.normal(rng_key) / keep
        return scale * (x + noise)

    suggest = partial(sus.suggested_keep, key_of(2), loss_fn, 1.0, x, keeps=(8, 2), num_draws=500)
    keep, added = suggest(tolerance=1e9)
    assert keep == 2
    for keep, ratio in added.items():  # a mean of 4000 squares of normal numbers
        assert abs(ratio * x.var(ddof=1) * keep**2 - 1) < 4.5 * (2 / 4000) ** 0.5
    assert suggest(tolerance=added[8])[0] == 8
    assert suggest(tolerance=0.99 * added[8])[0] is None
    with pytest.raises(ValueError, match="two"):
        sus.suggested_keep(key_of(0), loss_fn, 1.0, x[:1])


@pytest.mark.slow
def test_the_suggested_keep_of_attention():
    scale, rng_key, batch = np.ones(8), key_of(2), normal(0, 6, 32, 3, 8)

    def loss_fn(scale, x, *, keep, rng_key):
        query, key, value = jnp.moveaxis(x * scale, 1, 0)[:, :, None]
        mixed = sus.dot_product_attention(query, key, value, keep=keep, rng_key=rng_key)
        return jnp.mean(mixed**3)

    _, added = sus.suggested_keep(rng_key, loss_fn, scale, batch, keeps=(8, 2), num_draws=40)
    assert added[2] > added[8] > 0

    # The ratio, with other draws.
    @compiled
    def by_hand(rng_key):
        grad = jax.grad(loss_fn)
        exact = jax.vmap(lambda x: grad(scale, x, keep=None, rng_key=None))(batch)
        draw = lambda x, k: grad(scale, x, keep=8, rng_key=k)
        draws = jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(
            batch, jax.random.split(rng_key, 200)
        )
        return exact, draws

    grads, draws = by_hand(key_of(5))
    between = np.sum((grads - grads.mean(0)) ** 2) / 5
    within = np.mean(np.sum((draws - grads[:, None]) ** 2, -1))
    assert 0.5 < added[8] / (within / between) < 2
