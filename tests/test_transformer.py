"""The small transformer: what its options change, and what they leave alone."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cheap import compiled, key_of, like
from sklearn.datasets import load_digits

from probbp.models import transformer

SMALL = {"num_classes": 3, "max_length": 7, "width": 8, "hidden_width": 12, "num_layers": 1}
TOKENS = 1 + np.arange(14).reshape(2, 7) * 3 % 5
PATCHES = np.sin(np.arange(70.0)).reshape(2, 7, 5)
# name -> (the inputs' size, inputs)
INPUTS = {
    "tokens": ({"vocabulary": 6}, TOKENS),
    "patches": ({"num_features": 5}, PATCHES),
}
every_input = pytest.mark.parametrize("name", INPUTS)


@cache
def draw(name, dtype=jnp.float64, **sizes):
    """Return parameters, with a head that is not zero, and inputs."""
    size, inputs = INPUTS[name]
    init = partial(transformer.init, **SMALL | size | sizes, dtype=dtype)
    drawn = like(jax.eval_shape(init, key_of(0)))
    # Around one for the scales of norms, around zero for the others.
    params = {
        name: (name.endswith("scale") + 0.4 * leaf).astype(dtype) for name, leaf in drawn.items()
    }
    return params, inputs


apply = compiled(transformer.apply)


def assert_equal(a, b, **tolerance):
    # The attention's softmax is computed in single precision.
    jax.tree.map(
        partial(np.testing.assert_allclose, **({"rtol": 1e-4, "atol": 1e-6} | tolerance)), a, b
    )


@every_input
def test_shapes_names_and_size(name):
    params, inputs = draw(name, num_layers=3)
    assert jax.eval_shape(transformer.apply, params, inputs).shape == (2, 3)
    assert jax.eval_shape(transformer.encode, params, inputs).shape == (2, 7, 8)
    adapted = [key for key in params if re.search(r"attention\.(query|value)\.kernel$", key)]
    assert len(adapted) == 6
    assert {params[key].shape for key in adapted} == {(8, 8)}
    assert params["layers.2.mlp.up.kernel"].shape == (8, 12)
    assert params["head.kernel"].shape == (8, 3)


def test_the_network_equals_one_written_out():
    """Two heads, one block, one example, no mask: by loops over heads and tokens."""
    params, inputs = draw("tokens")
    params = {k: np.asarray(v) for k, v in params.items()}

    def dense(x, name):
        return x @ params[f"{name}.kernel"] + params[f"{name}.bias"]

    def norm(x, name):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * params[f"{name}.scale"]

    x = params["embedding.kernel"][np.asarray(inputs[0])] + params["embedding.position"]
    normed = norm(x, "layers.0.attention.norm")
    query, key, value = (
        dense(normed, f"layers.0.attention.{part}") for part in ("query", "key", "value")
    )
    mixed = np.zeros_like(x)
    for head in (slice(0, 4), slice(4, 8)):
        for t in range(7):
            weights = np.exp(key[:, head] @ query[t, head] / 2)
            mixed[t, head] = weights @ value[:, head] / weights.sum()
    x = x + dense(mixed, "layers.0.attention.output")
    up = compiled(jax.nn.gelu)(dense(norm(x, "layers.0.mlp.norm"), "layers.0.mlp.up"))
    x = norm(x + dense(up, "layers.0.mlp.down"), "norm")
    logits = compiled(partial(transformer.apply, num_heads=2))(params, inputs[:1])
    assert_equal(logits[0], dense(x.mean(0), "head"))


def test_an_untrained_network_has_no_opinion():
    params = compiled(partial(transformer.init, **SMALL, vocabulary=6))(key_of(0))
    assert_equal(apply(params, TOKENS), np.zeros((2, 3)), atol=0)


@pytest.mark.parametrize(("name", "is_causal"), [("tokens", False), ("patches", True)])
def test_padding_changes_nothing(name, is_causal):
    params, inputs = draw(name)
    apply = compiled(partial(transformer.apply, params, is_causal=is_causal))
    mask = np.arange(7) < np.array([[7], [4]])
    logits = apply(inputs, mask)
    assert_equal(logits[1:], apply(inputs[1:, :4]))
    assert_equal(logits[:1], apply(inputs[:1]))
    assert_equal(
        logits, apply(np.where(mask.reshape(2, 7, *[1] * (inputs.ndim - 2)), inputs, 0), mask)
    )
    assert np.max(abs(logits[1] - apply(inputs)[1])) > 1e-3
    assert np.all(np.isfinite(apply(inputs, np.zeros_like(mask))))


def test_under_a_causal_mask_a_token_does_not_see_what_comes_after_it():
    params, inputs = draw("tokens", num_layers=2)
    changed = inputs + (np.arange(7) == 4)
    for is_causal in (True, False):
        encode = compiled(partial(transformer.encode, params, is_causal=is_causal))
        difference = abs(encode(changed) - encode(inputs)).max((0, 2))
        assert bool(np.all(difference[:4] < 1e-12)) == is_causal
        assert np.all(difference[4:] > 1e-6)


def test_the_attention_is_an_argument():
    """Another value shows that it is called, and another derivative that it is differentiated."""
    seen = []

    def attention(query, key, value, bias=None, mask=None, *, is_causal=False):
        seen.append((query.shape, None if mask is None else mask.shape, is_causal))
        mixed = jax.nn.dot_product_attention(query, key, value, bias, mask, is_causal=is_causal)
        return jax.lax.stop_gradient(mixed)

    params, inputs = draw("tokens")
    mask = np.ones((2, 7), bool)

    def loss(params, attention):
        return transformer.apply(params, inputs, mask, attention=attention, is_causal=True).sum()

    value, grad = compiled(jax.value_and_grad(loss))(params, attention)
    plain, plain_grad = compiled(jax.value_and_grad(loss))(params, jax.nn.dot_product_attention)
    assert seen == [((2, 7, 4, 2), (2, 1, 1, 7), True)]
    assert_equal(value, plain)
    assert not np.any(grad["layers.0.attention.query.kernel"])
    assert np.any(plain_grad["layers.0.attention.query.kernel"])
    jax.eval_shape(partial(transformer.apply, attention=attention), params, inputs)
    assert seen[-1] == ((2, 7, 4, 2), None, False)


@every_input
def test_transformations_agree(name):
    params, inputs = draw(name)
    mask = np.arange(7) < np.array([[7], [4]])

    def loss(params, remat=False):
        logits = transformer.apply(params, inputs, mask, remat=remat)
        return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])

    tangent = jax.tree.map(lambda leaf: np.cos(np.arange(leaf.size)).reshape(leaf.shape), params)

    @compiled
    def derivatives(params):
        both = (loss, partial(loss, remat=True))
        return [(jax.value_and_grad(f)(params), jax.jvp(f, (params,), (tangent,))) for f in both]

    plain, remat = derivatives(params)
    assert_equal(remat, plain)
    (value, grad), forward = plain
    assert_equal(value, compiled(loss)(params))
    assert_equal(forward, (value, sum(np.vdot(grad[k], tangent[k]) for k in grad)))
    assert all(np.any(leaf != 0) for k, leaf in grad.items() if k != "embedding.kernel")

    @compiled
    def batched(params):  # over one kernel, and over examples
        key = "layers.0.attention.value.kernel"
        several = jax.vmap(lambda c: loss(params | {key: c * params[key]}))
        one = jax.vmap(lambda x, m: transformer.apply(params, x[None], m[None])[0])
        return several(jnp.array([0.0, 1.0])), one(inputs, mask)

    several, one = batched(params)
    assert_equal(several[1], value)
    assert abs(several[0] - value) > 1e-4
    assert_equal(one, apply(params, inputs, mask))


def test_recomputing_stores_less():
    params, inputs = draw("tokens", num_layers=4)

    def stored(remat):
        def loss(params):
            return transformer.apply(params, inputs, remat=remat).sum()

        pullback = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert stored(True) < 0.6 * stored(False)


@pytest.mark.parametrize(("name", "dtype"), [("tokens", "bfloat16"), ("patches", "float32")])
def test_precision_is_the_parameters_(name, dtype):
    exact_params, inputs = draw(name)
    exact = apply(exact_params, inputs)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), exact_params)
    logits = apply(params, inputs)
    assert jax.eval_shape(transformer.encode, params, inputs).dtype == dtype
    assert logits.dtype == jnp.float32
    # Eight or twenty-four bits, over one block.
    assert_equal(logits, exact, rtol=0, atol=10 * jnp.finfo(dtype).eps * np.max(abs(exact)))
    grad = compiled(jax.grad(lambda p: transformer.apply(p, inputs).sum()))(params)
    assert {leaf.dtype for leaf in grad.values()} == {jnp.dtype(dtype)}
    assert draw(name, dtype)[0]["layers.0.mlp.up.kernel"].dtype == dtype


def test_patches_are_cut_row_by_row():
    images = np.arange(2 * 4 * 6).reshape(2, 4, 6)
    cut = np.asarray(transformer.patches(images, 2))
    assert cut.shape == (2, 6, 4)
    assert cut[0, 0].tolist() == [0, 1, 6, 7]
    assert cut[0, 1].tolist() == [2, 3, 8, 9]
    assert cut[1, 3].tolist() == [36, 37, 42, 43]
    colours = transformer.patches(jnp.stack([images, -images], axis=-1), 2)
    assert colours[0, 0].tolist() == [0, 0, 1, -1, 6, -6, 7, -7]
    with pytest.raises(ValueError, match="Patches of 4 do not tile images of 4 x 6"):
        transformer.patches(images, 4)


@pytest.mark.slow
def test_digits_are_learnt():
    digits = load_digits()
    images = transformer.patches(jnp.asarray(digits.images / 16), 2).astype(jnp.float32)
    labels = jnp.asarray(digits.target)
    params = transformer.init(
        key_of(0), num_classes=10, max_length=16, num_features=4, width=32, num_layers=1
    )
    optimiser = optax.adam(3e-3)

    def loss(params, x, y):
        logits = transformer.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(carry, rows):
        params, state = carry
        value, grad = jax.value_and_grad(loss)(params, images[rows], labels[rows])
        updates, state = optimiser.update(grad, state)
        return (optax.apply_updates(params, updates), state), value

    rows = jax.random.randint(key_of(1), (400, 64), 0, 1200)
    run = compiled(lambda params: jax.lax.scan(step, (params, optimiser.init(params)), rows))
    (params, _), losses = run(params)
    assert abs(losses[0] - np.log(10)) < 1e-4
    test = transformer.apply(params, images[1200:])
    assert np.mean(np.argmax(test, axis=1) == labels[1200:]) > 0.8


def test_what_does_not_fit_is_refused():
    params, _ = draw("tokens")
    patch_params, _ = draw("patches")
    for sizes in ({}, {"vocabulary": 6, "num_features": 5}):
        with pytest.raises(ValueError, match="one of vocabulary .* and num_features"):
            transformer.init(key_of(0), **SMALL, **sizes)
    with pytest.raises(ValueError, match="8, is not a multiple of num_heads=3"):
        transformer.apply(params, TOKENS, num_heads=3)
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 7\), got \(7,\)"):
        transformer.apply(params, TOKENS, np.ones(7, bool))
    with pytest.raises(ValueError, match="integers .*got float64"):
        transformer.apply(params, PATCHES)
    with pytest.raises(ValueError, match=r"patches \(batch, time, 5\), got \(2, 7\)"):
        transformer.apply(patch_params, TOKENS)
    with pytest.raises(ValueError, match="8 is longer than max_length=7"):
        transformer.apply(params, np.ones((1, 8), int))
    assert np.all(np.isnan(apply(params, np.full((1, 7), 6))))
