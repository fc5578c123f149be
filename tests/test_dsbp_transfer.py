"""A prior from another task's curvature, exact where that is all there is; and old outputs kept."""

import math
import sys
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from cheap import compiled, key_of
from jax.flatten_util import ravel_pytree
from numpyro.infer.util import log_density
from scipy import stats
from sklearn.datasets import load_digits

from probbp.optim.dsbp import transfer
from probbp.optim.dsbp.truncation import patches

KEY = key_of(0)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


# ---------------------------------------------------------------------------------------
# The prior. A small logistic regression: its Gauss-Newton matrix is its Hessian.

X, LABELS = normal(0, 40, 3) * np.array([3.0, 1.0, 0.3]), np.arange(40) % 3
START = {"bias": np.zeros(3), "kernel": np.array(normal(1, 3, 3)) / 4}
SIZE = 12


def outputs(params):
    return X @ params["kernel"] + params["bias"]


def negative_log_likelihood(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).sum()


def loss(params):
    return negative_log_likelihood(outputs(params))


def of_hessian(params, rank, num_products=None):
    return transfer.laplace(KEY, loss, params, rank=rank, rest=0.5, num_products=num_products)


def of_gauss_newton(params, rank, num_products=None):
    return transfer.laplace(
        KEY,
        negative_log_likelihood,
        params,
        rank=rank,
        rest=0.5,
        outputs_fn=outputs,
        num_products=num_products,
    )


def flat_basis(prior):
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(prior.basis)]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def dense(prior):
    """Return the precision that a prior stands for."""
    basis = flat_basis(prior)
    return basis.T * np.asarray(prior.curvatures) @ basis + float(prior.rest) * np.eye(
        basis.shape[1]
    )


flat = np.concatenate([START["bias"], START["kernel"].ravel()])


def unravel(w):
    return {"bias": w[:3], "kernel": w[3:].reshape(3, 3)}


@cache
def made():
    return compiled(of_gauss_newton, static_argnums=(1, 2))(START, 4, SIZE)


def test_the_eigenpairs_are_those_of_the_dense_curvature():
    hessian = compiled(jax.hessian(lambda w: loss(unravel(w))))(flat)
    values, vectors = np.linalg.eigh(hessian)
    np.testing.assert_allclose(made().curvatures, values[:-5:-1], rtol=1e-9)
    overlap = np.abs(flat_basis(made()) @ vectors[:, :-5:-1])
    np.testing.assert_allclose(overlap, np.eye(4), atol=1e-6)
    # All of them, by the Hessian itself: it is the posterior's precision.
    whole = compiled(of_hessian, static_argnums=(1, 2))(START, SIZE)
    np.testing.assert_allclose(dense(whole), hessian + 0.5 * np.eye(SIZE), atol=1e-9)


def test_gauss_newton_is_not_the_hessian_where_outputs_bend_and_is_never_negative():
    x = normal(2, 8, 3)

    def bent(params):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    def squares(y):
        return jnp.sum((y - 3) ** 2) / 2

    params = {"a": np.array(normal(3, 3, 2)), "b": np.array(normal(4, 2))}
    w, back = ravel_pytree(params)
    jacobian = compiled(jax.jacobian(lambda w: bent(back(w))))(w)
    hessian = compiled(jax.hessian(lambda w: squares(bent(back(w)))))(w)
    assert np.linalg.eigvalsh(hessian)[0] < -0.1

    def made(params, loss_fn, outputs_fn=None):
        return transfer.laplace(KEY, loss_fn, params, rank=8, rest=1.0, outputs_fn=outputs_fn)

    made = compiled(made, static_argnums=(1, 2))
    ours = made(params, squares, bent)
    np.testing.assert_allclose(dense(ours), jacobian.T @ jacobian + np.eye(8), atol=1e-9)
    # Of the Hessian, what bends down counts as flat.
    values, vectors = np.linalg.eigh(hessian)
    plain = vectors * np.maximum(values, 0) @ vectors.T + np.eye(8)
    ours = made(params, lambda p: squares(bent(p)))
    np.testing.assert_allclose(dense(ours), plain, atol=1e-9)


def test_it_is_a_normalised_gaussian_with_its_draws_and_its_derivatives():
    precision = dense(made())
    params = jax.tree.map(lambda leaf: leaf + 0.3, START)
    moved = ravel_pytree(params)[0] - flat
    plain = stats.multivariate_normal(flat, np.linalg.inv(precision))
    ours = compiled(transfer.log_density)
    np.testing.assert_allclose(ours(made(), params), plain.logpdf(flat + moved), rtol=1e-9)
    tempered = stats.multivariate_normal(flat, np.linalg.inv(0.1 * precision))
    np.testing.assert_allclose(
        ours(transfer.tempered(made(), 0.1), params), tempered.logpdf(flat + moved), rtol=1e-9
    )

    def penalty(w):
        return transfer.penalty(made(), unravel(w))

    @compiled
    def derivatives(w):
        return jax.grad(penalty)(w), jax.jacfwd(jax.grad(penalty))(w)

    grad, hessian = derivatives(flat + moved)
    np.testing.assert_allclose(grad, precision @ moved, rtol=1e-9)
    np.testing.assert_allclose(hessian, precision, atol=1e-9)

    # Draws: an affine map whose square is the covariance.
    @compiled
    def draw(z):
        return ravel_pytree(transfer.unwhiten(made(), unravel(z)))[0]

    np.testing.assert_allclose(draw(np.zeros(SIZE)), flat)
    root = compiled(jax.vmap(draw))(np.eye(SIZE)) - flat
    np.testing.assert_allclose(root.T @ root, np.linalg.inv(precision), atol=1e-9)
    # Without curvature it is L2-SP.
    plain = made()._replace(curvatures=np.zeros(4))
    np.testing.assert_allclose(compiled(transfer.penalty)(plain, params), 0.25 * np.sum(moved**2))


def test_in_single_precision_all_of_it_is_single():
    half = jax.tree.map(lambda leaf: leaf.astype("float32"), START)
    x = X.astype("float32")

    @compiled
    def everything(params):
        prior = transfer.laplace(
            KEY,
            negative_log_likelihood,
            params,
            rank=3,
            rest=0.5,
            outputs_fn=lambda p: x @ p["kernel"] + p["bias"],
        )
        white = transfer.unwhiten(prior, params)
        return prior, white, transfer.penalty(prior, white), transfer.log_density(prior, white)

    prior, *rest = everything(half)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((prior, rest))} == {"float32"}
    np.testing.assert_allclose(prior.curvatures, made().curvatures[:3], rtol=1e-4)


# Two linear regressions on the same weights: what the first leaves is the prior of the second.
NOISE = 0.5
FIRST, SECOND = normal(5, 12, 4) * np.array([1.0, 2.0, 0.2, 1.0]), normal(6, 6, 4)
TRUE = np.array([1.0, -1.0, 0.5, 2.0])
Y_FIRST, Y_SECOND = FIRST @ TRUE + NOISE * normal(7, 12), SECOND @ TRUE + NOISE * normal(8, 6)


def regression_prior():
    def loss(w):
        return jnp.sum((FIRST @ w["w"] - Y_FIRST) ** 2) / (2 * NOISE**2)

    precision = FIRST.T @ FIRST / NOISE**2 + np.eye(4)
    optimum = np.linalg.solve(precision, FIRST.T @ Y_FIRST / NOISE**2)
    return jax.jit(lambda w: transfer.laplace(KEY, loss, w, rank=4, rest=1.0))({"w": optimum})


def with_factor(prior):
    w = numpyro.sample("w", dist.ImproperUniform(dist.constraints.real, (), (4,)))
    numpyro.factor("transfer", transfer.log_density(prior, {"w": w}))
    numpyro.sample("y", dist.Normal(SECOND @ w, NOISE), obs=Y_SECOND)


def with_white_sites(prior):
    z = numpyro.sample("z", dist.Normal().expand([4]).to_event(1))
    w = numpyro.deterministic("w", transfer.unwhiten(prior, {"w": z})["w"])
    numpyro.sample("y", dist.Normal(SECOND @ w, NOISE), obs=Y_SECOND)


def test_with_all_directions_the_second_task_has_the_posterior_of_both():
    both, y = np.vstack([FIRST, SECOND]), np.r_[Y_FIRST, Y_SECOND]
    precision = both.T @ both / NOISE**2 + np.eye(4)
    mean = np.linalg.solve(precision, both.T @ y / NOISE**2)
    prior = regression_prior()

    def evidence(x, y):
        return stats.multivariate_normal(cov=x @ x.T + NOISE**2 * np.eye(len(y))).logpdf(y)

    @partial(compiled, static_argnums=0)
    def everything(model, site):
        def potential(site):
            return -log_density(model, (prior,), {}, site)[0]

        (name, value), *_ = site.items()
        at = lambda value: potential({name: value})
        return *jax.value_and_grad(at)(value), jax.hessian(at)(value)

    # Sites that are the weights, and a factor.
    value, grad, hessian = everything(with_factor, {"w": np.array(mean)})
    np.testing.assert_allclose(grad, 0, atol=1e-9)
    np.testing.assert_allclose(hessian, precision, atol=1e-9)
    # White sites: here the weights are an affine map of them.
    zero = np.asarray(transfer.unwhiten(prior, {"w": np.zeros(4)})["w"])
    root = np.stack([transfer.unwhiten(prior, {"w": z})["w"] for z in np.eye(4)]).T - zero[:, None]
    z = np.linalg.solve(root, mean - zero)
    white_value, grad, hessian = everything(with_white_sites, {"z": np.array(z)})
    np.testing.assert_allclose(grad, 0, atol=1e-9)
    np.testing.assert_allclose(hessian, root.T @ precision @ root, atol=1e-9)
    # The normalising constants too: the evidence of the second task, given the first.
    expected = evidence(both, y) - evidence(FIRST, Y_FIRST)
    for potential, matrix in ((value, precision), (white_value, hessian)):
        _, log_det = np.linalg.slogdet(matrix / (2 * math.pi))
        np.testing.assert_allclose(-potential - log_det / 2, expected, rtol=1e-9)


def test_on_digits_it_stands_for_the_source_s_data():
    """The fit to the target alone, with the prior, is nearly the best fit to both tasks' data."""
    data = load_digits()
    coarse = data.images.reshape(-1, 4, 2, 4, 2).mean((2, 4)) / 16
    moved = np.roll(coarse, 1, axis=2)
    labels = data.target < 5
    source = coarse[:600].reshape(-1, 16), labels[:600]
    target = moved[600:700].reshape(-1, 16), labels[600:700]
    zero = {"kernel": np.zeros(16), "bias": np.zeros(())}

    def logits(params, x):
        return x @ params["kernel"] + params["bias"]

    def negative(logits, labels):
        return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, labels))

    def nll(params, x, labels):
        return negative(logits(params, x), labels)

    @compiled
    def derivatives(params, prior, of_source, of_target):
        w, back = ravel_pytree(params)

        def loss(w):
            params = back(w)
            tasks = of_source * nll(params, *source) + of_target * nll(params, *target)
            return tasks + transfer.penalty(prior, params)

        return loss(w), back(w - jnp.linalg.solve(jax.hessian(loss)(w), jax.grad(loss)(w)))

    def fit(*loss):
        """Newton's method, the loss being strongly convex."""
        params = zero
        for _ in range(12):
            value, params = derivatives(params, *loss)
        assert abs(derivatives(params, *loss)[0] - value) < 1e-6 * value
        return params

    empty = jax.tree.map(lambda leaf: jnp.zeros((10, *leaf.shape)), zero)
    none = transfer.Prior(zero, empty, np.zeros(10), np.array(1.0))
    optimum = fit(none, 1.0, 0.0)
    prior = compiled(
        lambda params: transfer.laplace(
            KEY,
            partial(negative, labels=source[1]),
            params,
            rank=10,
            rest=1.0,
            num_products=17,
            outputs_fn=lambda params: logits(params, source[0]),
        )
    )(optimum)
    priors = {"ours": prior, "none": none}
    for rest in (1.0, 3.0, 10.0, 30.0, 100.0):
        priors[f"distance {rest}"] = none._replace(mean=optimum, rest=np.array(rest))
    of_both = {name: derivatives(fit(p, 0.0, 1.0), none, 1.0, 1.0)[0] for name, p in priors.items()}
    best = derivatives(fit(none, 1.0, 1.0), none, 1.0, 1.0)[0]
    ours = of_both.pop("ours") - best
    assert 0 < ours < 0.25 * (min(of_both.values()) - best)


# ---------------------------------------------------------------------------------------
# Old outputs kept.


def conv(images, kernel):
    return jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


class Layer(NamedTuple):
    """How it acts, old inputs that leave it free to move, its shape, and what to protect."""

    apply: Any
    x: Any
    shape: tuple
    directions: Any


FEW, STACKED, IMAGES = normal(0, 5, 8), normal(2, 2, 4, 8), np.zeros((1, 6, 6, 2))
IMAGES[:, 2:4, 2] = normal(1, 1, 2, 2)


@cache
def layers():
    used = transfer.used_directions
    return {
        "dense": Layer(jnp.matmul, FEW, (8, 3), used(FEW)),
        "convolution": Layer(conv, IMAGES, (3, 3, 2, 4), used(patches(np.array(IMAGES), (3, 3)))),
        "stacked": Layer(jnp.matmul, STACKED, (2, 8, 3), np.stack([used(x) for x in STACKED])),
        "bias": Layer(jnp.add, FEW, (8,), np.ones((1, 1))),
        "stacked bias": Layer(lambda x, b: x + b[:, None], STACKED, (2, 8), np.ones((2, 1, 1))),
    }


OPTIMISERS = {
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "clip": optax.chain(optax.clip(0.01), optax.sgd(0.1)),
}


@partial(jax.jit, static_argnums=0)
def run(optimiser, params):
    def step(carry, i):
        params, state = carry
        grad = jax.tree.map(lambda p: jnp.sin(p * (1 + i)) + jnp.cos(p + i), params)
        updates, state = optimiser.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimiser.init(params)), jnp.arange(20))[0][0]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_old_outputs_stay_and_new_ones_do_not(dtype):
    def as_params(tree):
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)

    params = as_params({name: normal(4, *layer.shape) for name, layer in layers().items()})
    params = {"layers": params, "head": {"free": np.ones(2, dtype)}}
    directions = as_params({name: layer.directions for name, layer in layers().items()})
    protect = transfer.protect({"layers": directions, "head": None})
    after = run(optax.chain(OPTIMISERS["adamw"], protect), params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(after)} == {dtype}
    assert np.all(after["head"]["free"] != params["head"]["free"])
    # 20 roundings of numbers near 3 in single precision; what is asked of double is 1e-6.
    tolerance = 1e-12 if dtype == "float64" else 20 * 3 * np.finfo(dtype).eps
    for name, layer in layers().items():
        before, now = params["layers"][name], after["layers"][name]
        x = as_params(layer.x)
        change = jnp.max(jnp.abs(layer.apply(x, now) - layer.apply(x, before)))
        assert change < tolerance, name
        moved = jnp.max(jnp.abs(now - before))
        assert moved == 0 if "bias" in name else moved > 0.1, name


@pytest.mark.parametrize("name", OPTIMISERS)
def test_it_stands_last(name):
    layer = layers()["dense"]
    params = np.array(normal(4, *layer.shape))
    protect = transfer.protect(layer.directions)
    last = run(optax.chain(OPTIMISERS[name], protect, optax.scale(0.5)), params)
    first = run(optax.chain(protect, OPTIMISERS[name], optax.scale(0.5)), params)
    changes = [np.max(np.abs(layer.x @ np.asarray(after - params))) for after in (last, first)]
    assert changes[0] < 1e-12
    if name == "momentum":  # linear, and so the same
        np.testing.assert_allclose(first, last, atol=1e-12)
    else:
        assert changes[1] > 1e-3


def test_it_is_the_projector_and_leaves_a_branch_alone():
    _, x, shape, directions = layers()["dense"]
    updates = {"a": np.array(normal(5, *shape)), "b": {"c": np.ones(3), "d": np.ones(())}}
    optimiser = transfer.protect({"a": directions, "b": None})
    state = optimiser.init(updates)
    ours, state = compiled(optimiser.update)(updates, state, None, value=1.0)
    plain = updates["a"] - np.linalg.pinv(x) @ x @ np.asarray(updates["a"])
    np.testing.assert_allclose(ours["a"], plain, atol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, ours["b"], updates["b"])
    again, _ = optimiser.update(ours, state)
    np.testing.assert_allclose(again["a"], ours["a"], atol=1e-12)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [directions.shape]
    low = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), updates)
    assert optimiser.update(low, state)[0]["a"].dtype == "bfloat16"


def test_directions_are_as_few_as_hold_the_share_and_those_before_stay():
    x = normal(6, 30, 7) * 2.0 ** -np.arange(7)
    squares = np.linalg.svd(x)[1] ** 2
    for share in (0.9, 1.0):
        q = np.asarray(transfer.used_directions(np.array(x), share=share))
        k = q.shape[1]
        np.testing.assert_allclose(q.T @ q, np.eye(k), atol=1e-13)
        held = np.sum((x @ q) ** 2) / np.sum(x**2)
        np.testing.assert_allclose(held, np.sum(squares[:k]) / np.sum(squares))
        assert held >= share - 1e-12
        assert k == 1 or np.sum(squares[: k - 1]) / np.sum(squares) < share
    # Another task: what is known counts, and what is new is added across it.
    first = transfer.used_directions(np.array(x[:2]))
    z = np.vstack([x[:1], normal(7, 1, 7)])
    q = np.asarray(transfer.used_directions(np.array(z), so_far=first))
    assert q.shape == (7, 3)
    np.testing.assert_array_equal(q[:, :2], first)
    np.testing.assert_allclose(q.T @ q, np.eye(3), atol=1e-13)
    for rows in (x[:2], z):
        np.testing.assert_allclose(rows @ q @ q.T, rows, atol=1e-12)
    again = transfer.used_directions(np.array(x[:2]), so_far=first)
    np.testing.assert_array_equal(again, first)
    # In single precision, of exact rank: neither more nor fewer.
    low = (normal(8, 30, 3) @ normal(9, 3, 7)).astype("float32")
    assert transfer.used_directions(np.array(low)).shape == (7, 3)


@pytest.mark.slow
def test_on_digits_a_network_learns_five_more_classes_and_keeps_the_old_logits():
    """Every layer protected: the outputs for the old examples stay through the whole network."""
    data = load_digits()
    x, y = data.data / 16, data.target
    old, new = np.flatnonzero(y < 5), np.flatnonzero(y >= 5)
    kept, learnt = old[:30], new[:300]  # fewer than the 64 inputs and 100 units

    def forward(params, x):
        hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
        return hidden, hidden @ params["last"]["kernel"] + params["last"]["bias"]

    params = {
        "first": {"kernel": np.array(normal(0, 64, 100)) / 8, "bias": np.zeros(100)},
        "last": {"kernel": np.array(normal(1, 100, 10)) / 10, "bias": np.zeros(10)},
    }

    @compiled
    def train(params, directions, rows):
        optimiser = optax.chain(optax.adam(1e-2), transfer.protect(directions))

        def loss(params):
            logits = forward(params, jnp.asarray(x)[rows])[1]
            labels = jnp.asarray(y)[rows]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        def step(carry, _):
            params, state = carry
            updates, state = optimiser.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimiser.init(params)), length=60)[0][0]

    def accuracy(params, rows):
        return np.mean(np.argmax(forward(params, x[rows])[1], 1) == y[rows])

    # No directions: kernels and biases are free.
    free = jax.tree.map(lambda p: jnp.zeros((p.shape[0] if p.ndim == 2 else 1, 30)), params)
    params = train(params, free, old[:300])
    hidden, logits = forward(params, x[kept])
    one = np.ones((1, 1)) * np.eye(1, 30)
    directions = {
        "first": {"kernel": transfer.used_directions(np.array(x[kept])), "bias": one},
        "last": {"kernel": transfer.used_directions(hidden), "bias": one},
    }
    after, plain = train(params, directions, learnt), train(params, free, learnt)
    np.testing.assert_allclose(forward(after, x[kept])[1], logits, atol=1e-6)
    assert np.max(np.abs(forward(plain, x[kept])[1] - logits)) > 1
    assert accuracy(after, kept) == accuracy(params, kept) > 0.9
    # What it has not seen: of the new classes' and the old ones' other examples.
    assert accuracy(params, new[300:]) == 0
    assert accuracy(after, new[300:]) > 0.1 + 6 * (0.25 / 600) ** 0.5
    assert accuracy(after, old[300:]) > accuracy(plain, old[300:]) + 4 * (0.5 / 600) ** 0.5


# ---------------------------------------------------------------------------------------
# What is refused.

REFUSED = {
    "the 12 products that are made": lambda: of_hessian(START, 13),
    "the 4 products .* got 5": lambda: of_hessian(START, 5, 4),
    "rest must be positive": lambda: transfer.laplace(KEY, loss, START, rank=1, rest=0),
    r"share must be in \(0, 1\]": lambda: transfer.used_directions(np.ones((2, 2)), share=0),
    "so_far is of 3 inputs": lambda: transfer.used_directions(np.eye(2), so_far=np.eye(3)),
    r"shape \(8, 5\) do not fit a parameter of shape \(7, 3\)": lambda: transfer.protect(
        layers()["dense"].directions
    ).init(np.ones((7, 3))),
    "bias": lambda: transfer.protect(np.eye(3)).init(np.ones(3)),
    r"shape \(2, 8, 4\)": lambda: transfer.protect(layers()["stacked"].directions).init(
        np.ones((3, 8, 3))
    ),
}


@pytest.mark.parametrize(("message", "call"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_is_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_matfree_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matfree", None)
    with pytest.raises(ImportError, match=r"probbp\[spectra\]"):
        of_hessian(START, 1)
