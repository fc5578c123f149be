"""Dynamic spectral backpropagation: the tracked basis, its Optax transform, and sharpness."""

from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from cheap import compiled, key_of, normal
from numpyro.infer import SVI, Trace_ELBO
from numpyro.primitives import mutable
from optax.contrib import MuonDimensionNumbers
from sklearn.datasets import load_breast_cancer

from probbp.estimators import reverse
from probbp.numpyro import Optim
from probbp.optim import dsbp
from probbp.optim.dsbp.transform import WITH_INNER, Mode

MODES = get_args(Mode)
every_mode = pytest.mark.parametrize("mode", MODES)


def gradients(num, shape, seed=0, dtype=float):
    return normal(seed, num, *shape).astype(dtype)


def gapped(shape, seed=0):
    """A matrix whose singular values fall by a factor of 3 each, so that a basis is found soon."""
    u, s, vt = np.linalg.svd(gradients(1, shape, seed)[0], full_matrices=False)
    return (u * 3.0 ** -np.arange(s.shape[-1])) @ vt


def sent(transform, grads, params=None, **extra):
    """Send gradients, stacked on the first axis, through a transform; the last update and state."""
    params = jax.tree.map(lambda g: jnp.zeros_like(g[0]), grads) if params is None else params

    def step(carry, grad):
        state, _ = carry
        updates, state = transform.update(grad, state, params, **extra)
        return (state, updates), None

    first = jax.tree.map(lambda g: g[0], grads)
    (state, updates), _ = jax.lax.scan(step, (transform.init(params), first), grads)
    return updates, state


def run(transform, grads, **extra):
    return compiled(lambda grads: sent(transform, grads, **extra))(grads)


def settled(transform, grad, **extra):
    """The update once the basis has forgotten where it began."""

    def repeated(grad):
        grads = jax.tree.map(lambda g: jnp.broadcast_to(g, (15, *g.shape)), grad)
        return sent(transform, grads, **extra)

    return compiled(repeated)(grad)


def angle(a, b):
    """Sine of the largest principal angle of two bases."""
    return float(np.linalg.norm(b - a @ (a.T @ b), ord=2))


# The tracker.


def symmetric(eigenvalues, seed=0):
    size = len(eigenvalues)
    vectors = np.linalg.qr(normal(seed, size, size))[0]
    return (vectors * np.asarray(eigenvalues)) @ vectors.T, vectors


def track_all(matrices, rank, decay, seed=2):
    """Bases after each of the matrices, stacked."""

    def step(spectrum, matrix):
        spectrum = dsbp.track(spectrum, lambda v: matrix @ v, jnp.trace(matrix), decay)
        return spectrum, spectrum

    @compiled
    def run(rng_key, matrices):
        first = dsbp.start(rng_key, matrices.shape[-1], rank, dtype=matrices.dtype)
        return jax.lax.scan(step, first, matrices)[1]

    return run(key_of(seed), matrices)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_the_angle_to_a_constant_matrix_s_subspace_falls_at_the_known_rate(decay):
    eigenvalues = np.array([5.0, 4.0, 2.0, 1.5, 1.0, 0.5])
    matrix, vectors = symmetric(eigenvalues)
    spectra = track_all(jnp.tile(matrix, (200, 1, 1)), 2, decay)
    angles = np.array([angle(vectors[:, :2], q) for q in spectra.vectors])
    # From a hundredth to a billionth.
    window = angles[(angles < 1e-2) & (angles > 1e-9)]
    rate = (window[-1] / window[0]) ** (1 / (len(window) - 1))
    # The average of the same matrix is that matrix, but its image keeps what was there: the
    # error shrinks by decay + (1 - decay) lambda_3 / lambda_2.
    assert len(window) > 10
    assert abs(rate - (decay + (1 - decay) * 2 / 4)) < 0.02
    assert angles[-1] < 1e-3
    np.testing.assert_allclose(spectra.values[-1], eigenvalues[:2], rtol=1e-5)
    np.testing.assert_allclose(spectra.bulk[-1], np.mean(eigenvalues[2:]), rtol=1e-5)


def test_values_need_no_warm_up():
    """The first matrix weighs as a whole: a basis that is right has the right values at once."""
    matrix, vectors = symmetric([3.0, 1.0, 0.5])

    @compiled
    def tracked():
        spectrum = dsbp.start(key_of(0), 3, 2)._replace(vectors=jnp.asarray(vectors[:, 1::-1]))
        return dsbp.track(spectrum, lambda v: matrix @ v, 4.5, decay=0.99)

    spectrum = tracked()
    np.testing.assert_allclose(spectrum.values, [3, 1], rtol=1e-12)


@pytest.mark.parametrize("decay", [0.5, 0.8])
def test_a_turning_matrix_is_followed_with_the_lag_of_its_memory(decay):
    """A line that turns by a small angle a step is followed decay / (1 - decay) steps behind."""
    rate = 1e-3
    angles = rate * np.arange(400)
    leading = np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1)
    matrices = leading[:, :, None] * leading[:, None, :]
    spectra = track_all(matrices, 1, decay)
    behind = angle(leading[-1][:, None], spectra.vectors[-1]) / rate
    assert abs(behind - decay / (1 - decay)) < 0.05


def test_a_mean_of_all_with_decay_one():
    matrices = compiled(jax.vmap(lambda g: g @ g.T))(gradients(50, (4, 2)))
    spectrum = jax.tree.map(lambda leaf: leaf[-1], track_all(matrices, 4, 1.0))
    mean = (spectrum.vectors * spectrum.values) @ spectrum.vectors.T
    np.testing.assert_allclose(mean, matrices.mean(0), atol=1e-12)
    np.testing.assert_allclose(spectrum.trace, np.trace(matrices.mean(0)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1.0, 1e12])
def test_the_basis_is_always_orthonormal(dtype, scale):
    """Also of zero matrices, of rank below k, and side by side."""
    matrices = scale * gradients(30, (2, 6, 2), dtype=dtype)

    @compiled
    def tracked(matrices):
        spectrum = dsbp.start(key_of(0), 6, 4, (2,), dtype)
        for rows in matrices:
            spectrum = dsbp.track(
                spectrum,
                lambda v, rows=rows: rows @ (rows.mT @ v),
                jnp.sum(rows**2, axis=(1, 2)),
            )
        return spectrum

    spectrum = tracked(matrices[:5])
    gram = spectrum.vectors.mT @ spectrum.vectors
    np.testing.assert_allclose(gram, np.tile(np.eye(4), (2, 1, 1)), atol=1e-5)
    assert spectrum.vectors.dtype == dtype
    assert np.isfinite(spectrum.values).all()


# The transform.


@every_mode
def test_it_is_a_transform(mode):
    """`scan`, `vmap`, a chain, one program for all calls; shapes and dtypes stay."""
    chain = optax.chain(
        optax.clip_by_global_norm(1.0),
        dsbp.scale_by_dynamic_spectral(2, mode, refresh=3),
        optax.trace(0.9),
        optax.scale_by_learning_rate(0.1),
    )
    grads = {
        "kernel": gradients(4, (6, 3), dtype=jnp.float32),
        "half": gradients(4, (4, 3), dtype=jnp.bfloat16),
        "bias": gradients(4, (3,), dtype=jnp.float32),
    }
    updates, state = run(chain, grads)
    same = jax.tree.map(lambda u, g: (u.shape, u.dtype) == (g.shape[1:], g.dtype), updates, grads)
    assert all(jax.tree.leaves(same))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(updates))
    spectral = state[1]
    assert int(spectral.count) == 4
    assert spectral.spectra["bias"] is None
    assert spectral.spectra["half"].vectors.dtype == jnp.float32
    for share in jax.tree.leaves((spectral.energy, spectral.rotation)):
        assert -1e-6 < share < 1 + 1e-6
    if mode != "residual":
        return
    both = jax.tree.map(lambda g: np.stack([g, 2 * g], axis=1), grads)
    batched = compiled(jax.vmap(lambda g: run(chain, g)[0], in_axes=1))(both)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a[0].astype(float), b.astype(float), rtol=1e-3, atol=1e-4
        ),
        batched,
        updates,
    )
    step = jax.jit(chain.update)
    params = jax.tree.map(lambda g: g[0], grads)
    state = chain.init(params)
    for _ in range(3):
        _, state = step(params, state, params)
    assert step._cache_size() == 1


@pytest.mark.parametrize("mode", ["residual", "whiten", "random"])
def test_other_arrays_than_matrices_are_seen_as_such(mode):
    """Kernels of convolutions as (size * channels, out), stacked layers one by one, many heads."""
    # What is inside must be linear: signs of the first basis differ from leaf to leaf.
    inner = {"inner": optax.trace(0.1)} if mode in WITH_INNER else {}
    make = partial(dsbp.scale_by_dynamic_spectral, 2, mode, refresh=1, decay=0.0, **inner)
    layers = np.stack([gapped((6, 5), seed) for seed in range(4)])
    views = {
        "stacked": (layers, {"weight_dimension_numbers": MuonDimensionNumbers(1, 2)}),
        "conv": (layers[0].reshape(2, 1, 3, 5), {}),
        "heads": (
            layers[0].reshape(2, 3, 5).transpose(2, 0, 1),
            {"weight_dimension_numbers": lambda _: MuonDimensionNumbers((1, 2), 0)},
        ),
    }
    updates = {name: settled(make(**options), grad)[0] for name, (grad, options) in views.items()}
    assert all(updates[name].shape == grad.shape for name, (grad, _) in views.items())
    if mode == "random":  # whose bases have no reason to agree
        return
    one_by_one = compiled(jax.vmap(lambda layer: settled(make(), layer)[0]))(layers)
    np.testing.assert_allclose(updates["stacked"], one_by_one, atol=1e-8)
    np.testing.assert_allclose(updates["conv"].reshape(6, 5), one_by_one[0], atol=1e-8)
    heads = updates["heads"].transpose(1, 2, 0).reshape(6, 5)
    np.testing.assert_allclose(heads, one_by_one[0], atol=1e-8)


def test_all_directions_leave_nothing_to_do():
    """At full rank `project` is the identity; whatever the basis, its parts add up."""
    grads = gradients(5, (4, 7))
    full, state = run(dsbp.scale_by_dynamic_spectral(4, "project"), grads)
    np.testing.assert_allclose(full, grads[-1], atol=1e-12)
    np.testing.assert_allclose(state.energy, 1)
    identity = dsbp.scale_by_dynamic_spectral(2, "residual", inner=optax.identity())
    np.testing.assert_allclose(run(identity, grads)[0], grads[-1], atol=1e-12)
    inside, state = run(dsbp.scale_by_dynamic_spectral(2, "project"), grads)
    outside, _ = run(dsbp.scale_by_dynamic_spectral(2, "bulk"), grads)
    np.testing.assert_allclose(inside + outside, grads[-1], atol=1e-12)
    np.testing.assert_allclose(np.vdot(inside, outside), 0, atol=1e-12)
    np.testing.assert_allclose(state.energy, np.sum(inside**2) / np.sum(grads[-1] ** 2))


def test_project_is_the_projection_on_the_leading_directions():
    """Of G G^T, once the basis has found them; of G^T G for the other side."""
    grad = gapped((6, 4))
    u, _, vt = np.linalg.svd(grad)
    make = partial(dsbp.scale_by_dynamic_spectral, 2, "project", refresh=1, decay=0.0)
    np.testing.assert_allclose(settled(make(), grad)[0], u[:, :2] @ u[:, :2].T @ grad, atol=1e-8)
    right, _ = settled(make(side="out"), grad)
    np.testing.assert_allclose(right, grad @ vt[:2].T @ vt[:2], atol=1e-8)


def test_whiten_is_shampoo_s_one_sided_update_at_full_rank():
    grads = gradients(6, (4, 7))
    decay, eps = 0.8, 1e-3
    update, _ = run(
        dsbp.scale_by_dynamic_spectral(4, "whiten", decay=decay, refresh=1, eps=eps), grads
    )
    # Shampoo by itself: the decayed mean, and the inverse root of all of it.
    weights = decay ** np.arange(len(grads))[::-1]
    moment = np.einsum("t,tin,tjn->ij", weights / weights.sum(), grads, grads)
    values, vectors = np.linalg.eigh(moment)
    root = vectors @ np.diag((values + eps * values.mean()) ** -0.5) @ vectors.T
    np.testing.assert_allclose(update, root @ grads[-1], rtol=1e-6)


def test_whiten_and_damp_below_full_rank():
    """From the eigenvalues of the matrix itself."""
    grad = gapped((6, 9))
    u, s, vt = np.linalg.svd(grad, full_matrices=False)
    values = s**2
    bulk = values[2:].mean()
    make = partial(dsbp.scale_by_dynamic_spectral, 2, refresh=1, decay=0.0)
    scales = np.concatenate([values[:2] ** -0.5, np.full(4, bulk**-0.5)])
    whiten, _ = settled(make(mode="whiten", eps=0.0), grad)
    np.testing.assert_allclose(whiten, (u * scales * s) @ vt, atol=1e-7)
    scales = np.concatenate([np.sqrt(bulk / values[:2]), np.ones(4)])
    damp, _ = settled(make(mode="damp"), grad)
    np.testing.assert_allclose(damp, (u * scales * s) @ vt, atol=1e-7)


@pytest.mark.parametrize("mode", ["project", "random"])
def test_momentum_turns_with_the_basis(mode):
    """At full rank a basis is a change of coordinates, which momentum does not feel."""
    grads = gradients(9, (4, 3))
    inside = dsbp.scale_by_dynamic_spectral(4, mode, inner=optax.trace(0.9), refresh=2)
    np.testing.assert_allclose(run(inside, grads)[0], run(optax.trace(0.9), grads)[0], rtol=1e-9)


def test_second_moments_turn_with_the_basis():
    """Rows that never meet keep the basis on the axes; when their order changes, Adam's must."""
    sizes = np.array([3.0, 2.0, 1.0])
    # Each row has a column to itself, so that G G^T is diagonal, and its order turns round.
    grads = np.stack([np.diag(sizes)] * 4 + [np.diag(sizes[::-1] ** 2)] * 8)
    grads = grads * np.sign(normal(0, 12, 1, 3))
    inside = dsbp.scale_by_dynamic_spectral(3, "project", inner=optax.scale_by_adam(), refresh=2)
    for num in (6, 12):
        ours, plain = (run(t, grads[:num])[0] for t in (inside, optax.scale_by_adam()))
        np.testing.assert_allclose(ours, plain, atol=1e-6)


def test_the_residual_moves_as_far_as_the_optimiser_inside():
    """The scale s is the length of f's step over the gradient's, both inside the basis."""
    grads = gradients(7, (8, 5))
    transform = dsbp.scale_by_dynamic_spectral(2)
    update, state = run(transform, grads)
    q = state.spectra.vectors
    inside, outside = q.T @ update, update - q @ (q.T @ update)
    g_inside, g_outside = q.T @ grads[-1], grads[-1] - q @ (q.T @ grads[-1])
    s = np.linalg.norm(inside) / np.linalg.norm(g_inside)
    np.testing.assert_allclose(outside, s * g_outside, rtol=1e-9)
    # A gradient outside of the basis passes as it is.
    nothing = {"inner": optax.identity(), "refresh": 10**6}
    transform = dsbp.scale_by_dynamic_spectral(1, **nothing)

    @compiled
    def outside_of_it():
        state = transform.init(jnp.zeros((3, 2)))._replace(count=jnp.array(1))
        q = state.spectra.vectors
        grad = jnp.ones((3, 2)) - q @ (q.T @ jnp.ones((3, 2)))
        return grad, transform.update(grad, state)[0]

    grad, update = outside_of_it()
    np.testing.assert_allclose(update, grad, atol=1e-12)


# Where the top of the spectrum is noise: mode -> learning rate, steps. A new plane of 20 dimensions
# at a time needs more of them.
CONVERGE = {
    "residual": (0.3, 3_000),
    "whiten": (1.0, 3_000),
    "damp": (0.3, 3_000),
    "random": (0.3, 30_000),
}


@pytest.mark.parametrize(
    "mode",
    ["project", "residual", "whiten", "damp", pytest.param("random", marks=pytest.mark.slow)],
)
def test_projection_stalls_where_noise_leads_and_the_others_converge(mode):
    """0.05 |W|^2, 20 x 10, with gradient noise in two rows: the loss of the other 18."""
    learning_rate, num = CONVERGE.get(mode, (1.0, 30_000))
    transform = dsbp.scale_by_dynamic_spectral(2, mode)
    start = normal(0, 20, 10)

    def step(carry, per_step):
        w, state = carry
        i, key = per_step
        noise = 3 * jax.random.normal(key, (2, 10))
        update, state = transform.update((0.1 * w).at[:2].add(noise), state)
        return (w - learning_rate / (1 + i / 500) * update, state), None

    @compiled
    def descend(rng_key):
        per_step = jnp.arange(num), jax.random.split(rng_key, num)
        return jax.lax.scan(step, (start, transform.init(start)), per_step)[0][0]

    left = np.sum(descend(key_of(1))[2:] ** 2) / np.sum(start[2:] ** 2)
    assert left > 0.5 if mode == "project" else left < 0.05, left


def test_activations_come_as_an_extra_argument():
    """In: a gradient lies in the span of its inputs. Out: the paper's E E^T G."""
    x, delta = gapped((50, 3)) @ gradients(1, (3, 8))[0], gapped((50, 6), seed=1)
    grad = {"w": x.T @ delta, "b": delta.sum(0)}
    make = partial(
        dsbp.scale_by_dynamic_spectral, mode="project", source="activations", refresh=1, decay=0.0
    )
    transform = make(3, side="in")
    update, state = settled(transform, grad, acts={"w": x.reshape(5, 10, 8), "b": None})
    np.testing.assert_allclose(update["w"], grad["w"], atol=1e-10)
    np.testing.assert_array_equal(update["b"], grad["b"])
    np.testing.assert_allclose(state.spectra["w"].trace, np.sum(x**2) / 50)
    update, _ = settled(make(2, side="out"), grad, acts={"w": delta, "b": None})
    e = np.linalg.eigh(delta.T @ delta)[1][:, -2:]
    np.testing.assert_allclose(update["w"], grad["w"] @ e @ e.T, atol=1e-8)
    for acts, words in (
        (None, "acts=acts"),
        ({"w": x[:, :2], "b": None}, r"\(50, 2\)"),
        ({"w": None, "b": None}, "None"),
    ):
        with pytest.raises(ValueError, match=words):
            transform.update(grad, transform.init(grad), acts=acts)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"refresh": 0}, "refresh must be a positive integer, got 0"),
        ({"mode": "flat"}, "'residual', 'whiten'"),
        ({"source": "hessian"}, "'gradient' or 'activations'"),
        ({"side": "left"}, "'in' or 'out'"),
        ({"decay": 1.5}, "between 0 and 1"),
        ({"mode": "damp", "inner": optax.trace(0.9)}, "chain it behind"),
        ({"inner": optax.scale_by_rms()}, "ScaleByRmsState"),
        ({"weight_dimension_numbers": MuonDimensionNumbers(0, 2)}, "does not have"),
        ({"weight_dimension_numbers": MuonDimensionNumbers(0, -2)}, "twice"),
    ],
)
def test_options_that_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        dsbp.scale_by_dynamic_spectral(**{"rank": 2} | options).init(np.ones((4, 3)))


# Sharpness.


def wavy(params):
    """Five parameters, two leaves, all derivatives."""
    x = jnp.concatenate([params["a"], jnp.ravel(params["b"])])
    return jnp.sum(jnp.cos(x) * jnp.arange(1, 6)) + jnp.prod(jnp.sin(x + 1)) + x[0] ** 2 * x[3] ** 2


WAVY_AT = {"a": np.array([0.3, -0.5]), "b": np.array([[0.8, 0.2, -0.4]])}
FLAT = np.array([0.3, -0.5, 0.8, 0.2, -0.4])


def unravel(x):
    return {"a": x[:2], "b": x[None, 2:]}


def hessian_of_wavy(x):
    return jax.hessian(lambda x: wavy(unravel(x)))(x)


@pytest.mark.parametrize("is_tracked", [False, True])
def test_two_points_give_the_gradient_of_the_penalised_loss_to_fourth_order(is_tracked):
    """Against automatic differentiation of the eigenvalue."""
    rhos = (0.2, 0.1, 0.05)

    def top(flat):
        return jnp.linalg.eigh(hessian_of_wavy(flat))[0][-1]

    @compiled
    def exact():
        grads = jax.grad(lambda x: wavy(unravel(x)))(FLAT), jax.grad(top)(FLAT)
        return wavy(WAVY_AT), *grads, jnp.linalg.eigh(hessian_of_wavy(FLAT))[1][:, -1]

    loss, exact_grad, penalty, direction = exact()

    @compiled
    def estimates(params):
        along = direction if is_tracked else None
        return [dsbp.two_point(rho, along)(wavy)(key_of(0), params) for rho in rhos]

    errors = []
    for rho, (value, grad) in zip(rhos, estimates(WAVY_AT), strict=True):
        np.testing.assert_allclose(value, loss, rtol=1e-14)
        ours = np.append(grad["a"], grad["b"])
        errors.append(np.linalg.norm(ours - exact_grad - rho**2 / 2 * penalty))
    assert errors[-1] < 0.05 * 0.05**2 / 2 * np.linalg.norm(penalty)
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.all(abs(orders - 4) < 0.2), orders


def test_two_points_are_an_estimator():
    """Auxiliary output, a key for the function, float32, `vmap`; and what is refused."""

    def fun(w, rng_key):
        noise = jax.random.normal(rng_key, w.shape, w.dtype)
        return jnp.sum(w**4) + jnp.vdot(noise, w), noise

    w = np.ones(3, jnp.float32)
    estimator = dsbp.two_point(1e-2)(fun, has_aux=True)
    (value, aux), grad = compiled(estimator)(key_of(0), w)
    assert grad.dtype == jnp.float32
    np.testing.assert_allclose(value, 3 + np.sum(aux), rtol=1e-6)
    np.testing.assert_allclose(grad, 4 + aux, atol=5e-3)
    several = lambda rng_key, w: jax.vmap(estimator, (0, None))(jax.random.split(rng_key, 4), w)
    (values, _), grads = compiled(several)(key_of(1), w)
    assert values.shape == (4,)
    assert len(np.unique(grads)) == 12
    with pytest.raises(ValueError, match="positive"):
        dsbp.two_point(0.0)
    with pytest.raises(ValueError, match="ravel_pytree"):
        jax.eval_shape(dsbp.two_point(0.1, np.ones(2))(jnp.sum), key_of(0), w)


def test_two_points_leave_a_narrow_valley_and_a_projection_does_not():
    """In x^2 / 2 (1 + y^2) only the width changes along the floor."""

    def valley(w):
        return 0.5 * w[0] ** 2 * (1 + w[1] ** 2)

    rho, eta, start = 0.3, 0.3, np.array([0.1, 1.0])
    direction = np.array([1.0, 0.0])

    def descend(value_and_grad):
        def step(w, _):
            return w - eta * value_and_grad(key_of(0), w)[1], None

        return compiled(lambda w: jax.lax.scan(step, w, None, 100)[0])(start)

    flat = descend(dsbp.two_point(rho, direction)(valley))
    # y falls at the rate rho^2 / 2 d(1 + y^2)/dy = rho^2 y.
    np.testing.assert_allclose(flat[1], (1 - eta * rho**2) ** 100, rtol=0.05)
    projected = descend(lambda _, w: (0.0, jax.grad(valley)(w) * direction))
    assert projected[1] == 1


def test_products_are_the_matrices():
    def model(params):
        return jnp.sin(jnp.outer(params["a"], jnp.ravel(params["b"])))

    def loss(outputs):
        return jnp.sum(jnp.log(jnp.cosh(outputs)))

    @compiled
    def everything():
        product = dsbp.hessian_product(wavy, WAVY_AT)
        gauss_newton = dsbp.gauss_newton_product(model, loss, WAVY_AT)
        jacobian = jax.jacobian(lambda x: model(unravel(x)).ravel())(FLAT)
        middle = jax.hessian(loss)(model(WAVY_AT).ravel())
        products = product(np.eye(5)), product(FLAT), gauss_newton(np.eye(5))
        return products, hessian_of_wavy(FLAT), jacobian, middle

    (ours, of_one, gauss_newton), hessian, jacobian, middle = everything()
    np.testing.assert_allclose(ours, hessian, atol=1e-12)
    np.testing.assert_allclose(of_one, hessian @ FLAT, atol=1e-12)
    np.testing.assert_allclose(gauss_newton, jacobian.T @ middle @ jacobian, atol=1e-12)


# name -> eigenvalues of a matrix; some coincide, where Lanczos' method breaks down.
SPECTRA = {
    "all different": np.arange(30.0) ** 2 - 20,
    "three values": np.repeat(np.array([0.0, 1.0, 7.0]), 10),
    "one": np.full(30, 2.0),
    "nothing": np.zeros(30),
    "a few": np.array([3.0, -1.0]),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_leading_eigenpairs_are_found(name):
    eigenvalues = SPECTRA[name]
    matrix, _ = symmetric(eigenvalues)
    spectrum = compiled(
        lambda matrix: dsbp.leading_eigenpairs(
            key_of(2), lambda v: matrix @ v, jnp.zeros(len(matrix)), rank=2, num_products=28
        )
    )(matrix)
    found = spectrum.vectors
    np.testing.assert_allclose(spectrum.values, np.sort(eigenvalues)[:-3:-1], atol=1e-6)
    np.testing.assert_allclose(found.T @ found, np.eye(2), atol=1e-8)
    np.testing.assert_allclose(matrix @ found, found * spectrum.values, atol=1e-5)
    # The trace within five of the standard errors that the docstring promises.
    error = np.sqrt(2 / 10 * np.sum((matrix - np.diag(np.diag(matrix))) ** 2))
    assert abs(spectrum.trace - np.sum(eigenvalues)) <= 5 * error + 1e-9
    with pytest.raises(ValueError, match="rank"):
        dsbp.leading_eigenpairs(key_of(0), lambda v: v, np.zeros(3), rank=4)


# In SVI.


def logistic(x, y=None):
    weights = numpyro.sample("weights", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
    numpyro.sample("y", dist.Bernoulli(logits=x @ weights).to_event(1), obs=y)


def cancer():
    x, y = load_breast_cancer(return_X_y=True)
    return (x - x.mean(0)) / x.std(0), y


def matrix_model(x, y):
    """A two-layer network's weights as parameters, its activations as mutable state."""
    size, width = x.shape[1], 8
    draw = jnp.asarray(normal(0, size, width)) / size**0.5
    first = numpyro.param("first", draw)
    second = numpyro.param("second", jnp.ones((width, 1)) / width)
    seen = mutable("seen", {"hidden": jnp.zeros((len(x), width))})
    hidden = jnp.tanh(x @ first)
    seen["hidden"] = hidden
    numpyro.sample("y", dist.Bernoulli(logits=(hidden @ second)[:, 0]).to_event(1), obs=y)


SVI_ARMS = {mode: {"mode": mode} for mode in MODES} | {
    "activations": {"mode": "project", "source": "activations", "side": "out"}
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("residual", "activations") else pytest.mark.slow)
        for name in SVI_ARMS
    ],
)
def test_svi_takes_it_as_its_optimiser(name):
    x, y = cancer()
    transform = dsbp.scale_by_dynamic_spectral(2, **SVI_ARMS[name])
    step_size = 0.05 if name in ("residual", "whiten") else 2e-3
    optim = Optim(
        optax.chain(transform, optax.scale_by_learning_rate(step_size)),
        reverse(),
        extra_args=lambda state: {
            "acts": {"first": state["seen"]["hidden"], "second": jnp.zeros((len(x), 1))}
        },
    )
    svi = SVI(matrix_model, lambda x, y: None, optim, Trace_ELBO())

    @compiled
    def fit():
        state = svi.init(key_of(0), x, y)
        (state, losses) = jax.lax.scan(lambda s, _: svi.update(s, x, y), state, None, 60)
        return losses, state.optim_state[1].optax_state[0], state.mutable_state["seen"]["hidden"]

    losses, spectral, hidden = fit()
    assert losses[-1] < 0.95 * losses[0]
    assert int(spectral.count) == 60
    if name == "activations":
        np.testing.assert_allclose(
            spectral.spectra["first"].trace, np.sum(hidden**2) / len(x), rtol=0.2
        )


def test_sharpness_in_svi_finds_the_flatter_solution():
    """A lower top eigenvalue after as many steps, at about the same loss."""
    x, y = cancer()

    def loss(w):
        return jnp.mean(jax.nn.softplus(x @ w) - y * (x @ w))

    def model(x, y):
        numpyro.factor("loss", -loss(numpyro.param("w", jnp.zeros(x.shape[1]))))

    @compiled
    def fit(estimator):
        svi = SVI(model, lambda x, y: None, Optim(optax.sgd(0.5), estimator), Trace_ELBO())
        state = svi.init(key_of(0), x, y)
        state, _ = jax.lax.scan(lambda s, _: svi.update(s, x, y), state, None, 150)
        w = svi.get_params(state)["w"]
        return jnp.linalg.eigvalsh(jax.hessian(loss)(w))[-1], loss(w)

    (sharp, low), (flat, high) = fit(reverse()), fit(dsbp.two_point(1.0))
    assert flat < 0.9 * sharp
    assert abs(high / low - 1) < 0.05
