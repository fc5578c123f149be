"""Rotations: their steps, the optimiser of orthogonal weights, and exact moves on manifolds."""

from functools import partial
from typing import Any, NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate
import scipy.linalg
from cheap import compiled, keys_of, normal
from invariance import FAIL, PASS, z_scores_of
from jax.scipy.linalg import expm
from sklearn.datasets import load_wine
from statsmodels.multivariate.factor_rotation import rotate_factors

from probbp.optim.dsbp.geodesics import geodesic_hmc, random_rotation
from probbp.optim.dsbp.rotations import (
    brockett_step,
    cayley,
    jacobi_step,
    low_rank_cayley,
    on_lie_algebra,
)

KEYS = keys_of(0, 8)
EPS = float(jnp.finfo(float).eps)


OMEGA = normal(0, 2, 5, 5)
OMEGA = (OMEGA - np.swapaxes(OMEGA, 1, 2)) / 2


def frame(seed, n, k):
    return np.linalg.qr(normal(seed, n, k))[0]


def low_rank(omega):
    """Any generator is A B^T - B A^T for A = omega / 2 and B = I."""
    identity = jnp.eye(omega.shape[-1], dtype=omega.dtype)
    return low_rank_cayley(omega / 2, identity, identity)


# ---------------------------------------------------------------------------------------
# Rotations from skew-symmetric matrices.

RETRACTIONS = {"cayley": cayley, "low_rank": low_rank}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_rotation_is_orthogonal_and_its_inverse_is_the_way_back(dtype):
    @compiled
    @jax.vmap
    def both_ways(omega):
        return {name: (fun(omega), fun(-omega)) for name, fun in RETRACTIONS.items()}

    tolerance = 50 * float(jnp.finfo(dtype).eps)
    for there, back in both_ways(3 * OMEGA.astype(dtype)).values():
        assert there.dtype == dtype
        there, back = np.asarray(there), np.asarray(back)
        for product in (there @ np.swapaxes(there, 1, 2), there @ back):
            np.testing.assert_allclose(product, np.stack([np.eye(5)] * 2), atol=tolerance)
        np.testing.assert_allclose(np.linalg.det(there), 1, atol=tolerance)


def test_it_is_the_exponential_to_second_order_in_both_modes():
    def of(fun, t):
        weights = jnp.cos(OMEGA[1])
        error = jnp.linalg.norm(fun(t * OMEGA[0]) - expm(t * OMEGA[0]))
        _, forward = jax.jvp(lambda t: fun(t * OMEGA[0]), (t,), (jnp.ones(()),))
        reverse = jax.grad(lambda t: jnp.sum(weights * fun(t * OMEGA[0])))(t)
        return error, jnp.sum(weights * forward), reverse

    run = compiled(partial(jax.lax.map, lambda t: [of(fun, t) for fun in RETRACTIONS.values()]))
    for error, forward, reverse in run(np.array([0.02, 0.01])):
        # The third-order terms differ by omega^3 / 12: eight times less at half the angle.
        assert error[0] / error[1] == pytest.approx(8, rel=0.02)
        np.testing.assert_allclose(forward, reverse, rtol=1e-10)


def test_woodbury_s_identity_gives_the_same_rotation_of_a_thin_matrix():
    a, b, x = normal(1, 7, 2), normal(2, 7, 2), normal(3, 7, 3)
    np.testing.assert_allclose(
        low_rank_cayley(a, b, x), cayley(a @ b.T - b @ a.T) @ x, atol=100 * EPS
    )


# ---------------------------------------------------------------------------------------
# Eigenbases.


def off_diagonal(basis, matrix):
    rotated = np.asarray(basis).T @ np.asarray(matrix) @ np.asarray(basis)
    return np.linalg.norm(rotated - np.diag(np.diagonal(rotated)))


def turned(values, turn):
    """Return the symmetric matrix with these eigenvalues and eigenvectors."""
    return turn * values @ turn.T


def test_the_jacobi_step_converges_quadratically_to_eigh_s_basis():
    values = np.array([-2.0, -1.0, 0.5, 1.0, 3.0, 4.0])  # of either sign
    turn = frame(1, 6, 6)
    matrix = turned(values, turn)
    a = np.asarray(normal(2, 6, 6))
    basis = turn @ scipy.linalg.expm(0.05 * (a - a.T))
    step, errors = jax.jit(jacobi_step), []
    for _ in range(6):
        errors.append(off_diagonal(basis, matrix))
        basis = step(basis, matrix)
    assert errors[0] > 0.3
    # Off diagonal E leaves at most C |E|^2, with C of the order of 1 / gap: here a half.
    assert errors[1] < errors[0] ** 2
    assert errors[2] < errors[1] ** 2
    assert errors[-1] < 100 * EPS
    _, vectors = np.linalg.eigh(matrix)
    np.testing.assert_allclose(np.abs(vectors.T @ basis), np.eye(6), atol=1e-10)
    assert off_diagonal(basis, matrix) < 100 * EPS
    np.testing.assert_allclose(basis.T @ basis, np.eye(6), atol=20 * EPS)
    assert np.all(np.diagonal(turn.T @ basis) > 0.99)  # neither swapped nor flipped


def test_columns_follow_their_eigenvectors_through_a_crossing():
    turn = frame(3, 3, 3)

    def at(t):
        """Eigenvalues 1 + t, 2 - t and 0: the first two change places at t = 1/2."""
        rotation = expm(t * OMEGA[0][:3, :3]) @ turn
        return rotation, rotation @ jnp.diag(jnp.array([1 + t, 2 - t, 0.0])) @ rotation.T

    def follow(basis, t):
        rotation, matrix = at(t)
        basis = jacobi_step(basis, matrix)
        return basis, jnp.diagonal(rotation.T @ basis)

    times = np.linspace(0, 1, 302)  # none of them meets the crossing
    _, overlaps = compiled(partial(jax.lax.scan, follow))(turn, times)
    # Where the gap is below what a step turns, the pair may lag; it is back soon after.
    assert np.all(overlaps[-50:] > 0.999)
    first, last = (np.linalg.eigh(at(t)[1])[1] for t in (0.0, 1.0))
    swapped = np.abs(at(0.0)[0].T @ first).argmax(0), np.abs(at(1.0)[0].T @ last).argmax(0)
    assert swapped[0].tolist() != swapped[1].tolist()  # eigh's columns did change places


def test_a_lone_pair_is_solved_at_once_and_equal_values_are_left_alone():
    step = compiled(jax.vmap(partial(jacobi_step, np.eye(2))))
    # A tie that is coupled turns by an eighth, the most there is.
    matrices = np.array(
        [[[1.0, 0.7], [0.7, 1.2]], [[1.2, 0.7], [0.7, 1.0]], [[1.0, 0.1], [0.1, 1.0]]]
    )
    for basis, matrix in zip(step(matrices), matrices, strict=True):
        assert off_diagonal(basis, matrix) < 10 * EPS
        assert np.abs(basis[0, 1]) <= 0.5**0.5 + EPS
    tied = 2 * np.eye(2)[None]
    slope = compiled(jax.jacrev(step))(tied)
    np.testing.assert_array_equal(step(tied)[0], np.eye(2))
    assert np.all(np.isfinite(slope))


@pytest.mark.parametrize("rank", [2, 6])
def test_the_brockett_flow_climbs_to_the_sorted_basis(rank):
    values = np.array([2.0, -3.0, 1.0, 0.0, -1.0, 3.0])
    turn, start = frame(4, 6, 6), frame(5, 6, rank)
    matrix = turned(values, turn)
    weights = np.arange(rank, 0, -1)

    def climb(basis, _):
        basis = brockett_step(basis, matrix, 1 / 6.1)
        return basis, jnp.diagonal(basis.T @ matrix @ basis) @ weights

    basis, heights = compiled(partial(jax.lax.scan, climb, length=600))(start)
    assert np.all(np.diff(heights) > -1e-12)
    order = np.argsort(values)[::-1][:rank]
    # The slowest pair closes like exp(-gap weight step t), a gap of 1 and weight 1 / rank.
    np.testing.assert_allclose(np.abs(turn[:, order].T @ basis), np.eye(rank), atol=1e-4)
    np.testing.assert_allclose(basis.T @ basis, np.eye(rank), atol=1e-12)


# ---------------------------------------------------------------------------------------
# The optimiser of weights that rotate.


def test_with_sgd_it_is_riemannian_descent_on_the_orthogonal_group():
    w, grad = frame(1, 5, 5), normal(2, 5, 5)
    optimiser = on_lie_algebra(optax.sgd(0.1), expm)
    updates, _ = compiled(optimiser.update)(grad, optimiser.init(w), w)
    w, grad, updates = map(np.asarray, (w, grad, updates))
    body = w.T @ grad
    there = w @ scipy.linalg.expm(-0.1 * (body - body.T) / 2)
    np.testing.assert_allclose(w + updates, there, atol=50 * EPS)


def test_momentum_lives_on_the_lie_algebra():
    w, target = frame(1, 4, 4), normal(2, 4, 4)
    optimiser = on_lie_algebra(optax.sgd(0.1, momentum=0.9))
    state, ours, update = optimiser.init(w), w, jax.jit(optimiser.update)
    plain, target, velocity = np.asarray(w), np.asarray(target), np.zeros((4, 4))
    for _ in range(5):
        updates, state = update(ours - target, state, ours)
        ours = ours + updates
        slope = (plain - target) @ plain.T
        velocity = 0.9 * velocity + (slope - slope.T) / 2
        half = -0.1 * velocity / 2
        plain = np.linalg.solve(np.eye(4) - half, (np.eye(4) + half) @ plain)
    np.testing.assert_allclose(ours, plain, atol=100 * EPS)
    (trace,) = jax.tree.leaves(state)
    np.testing.assert_allclose(trace, velocity, atol=100 * EPS)


def test_singular_values_stay_whatever_the_optimiser():
    dtype = "float32"
    params = {
        "square": normal(1, 2, 4, 4),  # stacked, and not orthogonal
        "tall": frame(2, 6, 3),
        "wide": frame(3, 5, 2).T,
    }
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    targets = jax.tree.map(jnp.cos, params)
    optimiser = on_lie_algebra(optax.adam(0.05))

    def loss(params):
        return optax.tree.norm(optax.tree.sub(params, targets), squared=True)

    def step(carry, _):
        params, state = carry
        updates, state = optimiser.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), loss(params)

    carry = params, optimiser.init(params)
    (end, _), losses = compiled(partial(jax.lax.scan, step, length=100))(carry)
    # A step of the loss was made by each leaf, and every step rounds a few times.
    assert losses[-1] < 0.9 * losses[0]
    for before, after in zip(*map(jax.tree.leaves, (params, end)), strict=True):
        assert after.dtype == dtype
        assert np.linalg.norm(after - before) > 0.1
        goal = jnp.cos(before)  # each came nearer to its own
        assert np.linalg.norm(after - goal) < 0.98 * np.linalg.norm(before - goal)
        spectra = (np.linalg.svd(np.asarray(a, float), compute_uv=False) for a in (before, after))
        np.testing.assert_allclose(*spectra, atol=100 * float(jnp.finfo(dtype).eps))


def descend(loss, learning_rate):
    """Minimise a loss of rotations of four axes."""
    optimiser = on_lie_algebra(optax.sgd(learning_rate, momentum=0.8))

    def step(_, carry):
        w, state = carry
        updates, state = optimiser.update(jax.grad(loss)(w), state, w)
        return w + updates, state

    carry = jnp.eye(4), optimiser.init(jnp.eye(4))
    return jax.jit(lambda carry: jax.lax.fori_loop(0, 1_000, step, carry))(carry)[0]


def test_it_solves_the_procrustes_problem():
    """The nearest rotation of B onto A is U diag(1, .., det) V^T of A B^T."""
    a, b = np.asarray(normal(1, 4, 10)), np.asarray(normal(2, 4, 10))
    u, _, vt = np.linalg.svd(a @ b.T)
    sign = np.diag([1, 1, 1, np.linalg.det(u @ vt)])
    w = descend(lambda w: jnp.sum((a - w @ b) ** 2) / 2, 0.02)
    np.testing.assert_allclose(w, u @ sign @ vt, atol=1e-8)


def test_varimax_of_real_loadings_is_statsmodels_s():
    """Four principal components of thirteen measurements of wines."""
    x = load_wine().data
    x = (x - x.mean(0)) / x.std(0)
    _, singular, vt = np.linalg.svd(x, full_matrices=False)
    loadings = np.asarray(vt[:4].T * singular[:4] / len(x) ** 0.5)
    rotated, _ = rotate_factors(np.asarray(loadings), "varimax", tol=1e-10, max_tries=1_000)

    def varimax(loadings):
        return (loadings**2).var(axis=0).sum()

    w = descend(lambda w: -varimax(loadings @ w), 0.5)
    np.testing.assert_allclose(varimax(np.asarray(loadings @ w)), varimax(rotated), rtol=1e-8)
    assert varimax(rotated) > 1.2 * varimax(np.asarray(loadings))


# ---------------------------------------------------------------------------------------
# Moves on manifolds.


def haar(rng, num, n, k):
    q, r = np.linalg.qr(rng.normal(size=(num, n, n)))
    q = q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None]
    if n == k:  # rotations alone
        q[:, :, 0] *= np.linalg.det(q)[:, None]
    return q[..., :k]


class Target(NamedTuple):
    """A density on frames (n, k), with exact draws by rejection from the uniform ones."""

    shape: tuple[int, int]
    logdensity_fn: Any
    top: float  # no log density is above it

    def draw(self, rng_key, num):
        rng = np.random.default_rng(np.asarray(jax.random.key_data(rng_key)))
        x = haar(rng, 40 * num, *self.shape)
        keep = np.log(rng.uniform(size=len(x))) < self.logdensity_fn(x) - self.top
        assert keep.sum() >= num
        return x[keep][:num]

    @property
    def statistics(self):
        n, k = self.shape
        entries = {f"{i}{j}": lambda x, i=i, j=j: x[:, i, j] for i in range(n) for j in range(k)}
        squares = {f"{i}{j}^2": lambda x, i=i, j=j: x[:, i, j] ** 2 for i, j in ((0, 0), (1, 0))}
        return entries | squares | {"log": self.logdensity_fn}


def fisher(f, x):
    return (f * x).sum((-1, -2))


def bingham(a, b, x):
    """tr(B X^T A X), with diagonal A and B."""
    return (a[:, None] * x**2 * b).sum((-1, -2))


A4 = np.array([1.5, 0.5, -0.5, -1.0])
TARGETS = {
    # von Mises-Fisher on the sphere, matrix Fisher on rotations, matrix Bingham on frames.
    "sphere": Target((3, 1), partial(fisher, np.array([[0.0], [0.0], [2.0]])), 2.0),
    "rotations": Target((3, 3), partial(fisher, np.diag([1.2, 0.6, -0.3])), 1.5),
    "frames": Target((4, 2), partial(bingham, A4, np.array([1.0, 0.3])), 1.65),
}
MOVES = {
    "random walk": lambda f: blackjax.rmh(f, random_rotation(0.7)),
    "random walk, cayley": lambda f: blackjax.rmh(f, random_rotation(0.7, cayley)),
    "hmc": lambda f: blackjax.SamplingAlgorithm(*geodesic_hmc(f, 0.5, 3)),
}


@pytest.mark.parametrize(
    ("move", "target"),
    [("random walk, cayley", "rotations"), ("random walk", "frames")]
    + [("hmc", "sphere"), ("hmc", "frames")],
)
def test_a_move_keeps_its_target(move, target):
    target = TARGETS[target]
    z = z_scores_of(KEYS[6], MOVES[move](target.logdensity_fn), target, 4_000, 4)
    assert max(abs(value) for value in z.values()) < PASS, z


def test_a_proposal_that_is_not_symmetric_is_found_out():
    def drifting(rng_key, x):
        return expm(0.6 * OMEGA[0][:3, :3]) @ random_rotation(0.7)(rng_key, x)

    target = TARGETS["rotations"]
    z = z_scores_of(KEYS[6], blackjax.rmh(target.logdensity_fn, drifting), target, 4_000, 4)
    assert max(abs(value) for value in z.values()) > FAIL


def test_from_one_start_a_chain_finds_the_moments_of_the_matrix_fisher_density():
    """With F = kappa I the angle of a rotation has the density (1 - cos) exp(2 kappa cos)."""
    kappa = 1.3

    def density(angle):
        return (1 - np.cos(angle)) * np.exp(2 * kappa * np.cos(angle))

    total = scipy.integrate.quad(density, 0, np.pi)[0]
    trace = scipy.integrate.quad(lambda t: (1 + 2 * np.cos(t)) * density(t), 0, np.pi)[0] / total
    init, step = geodesic_hmc(lambda x: kappa * jnp.trace(x["r"]), 0.5, 3)
    begin = frame(1, 3, 3)
    begin = begin * jnp.linalg.det(begin)  # else the chain samples reflections

    @compiled
    @jax.vmap
    def chain(key):
        keys = jax.random.split(key, 40)
        start = init({"r": begin})

        def body(state, key):
            state, info = step(key, state)
            return state, (jnp.trace(state.position["r"]), info.acceptance_rate)

        return jax.lax.scan(body, start, keys)

    state, (traces, rates) = chain(jax.random.split(KEYS[7], 400))
    means = traces[:, 10:].mean(1)
    assert abs(means.mean() - trace) < 4 * means.std(ddof=1) / 20
    assert 0.8 < rates.mean() < 0.999
    np.testing.assert_allclose(np.linalg.det(state.position["r"]), 1, atol=1e-12)
    np.testing.assert_allclose(
        state.logdensity, kappa * np.trace(state.position["r"], axis1=1, axis2=2), atol=1e-12
    )


def test_the_energy_is_kept_to_second_order():
    """The share rejected is the error's, which is four times less at half the step."""

    def rough(x):
        return jnp.sum(jnp.sin(x) * jnp.arange(9.0).reshape(3, 3)) / 3

    @partial(compiled, static_argnums=0)
    def rejected(num_steps):
        init, step = geodesic_hmc(rough, 0.4 / num_steps, num_steps)
        state = init(jnp.eye(3))
        _, info = jax.vmap(step, (0, None))(jax.random.split(KEYS[2], 100), state)
        return 1 - info.acceptance_rate.mean()

    coarse, fine = rejected(8), rejected(16)
    assert 1e-5 < fine < 1e-2
    assert coarse / fine == pytest.approx(4, rel=0.1)


def test_a_proposal_without_a_density_is_rejected():
    init, step = geodesic_hmc(lambda x: jnp.where(x[0, 0] == 1, 0.0, jnp.nan), 0.5, 2)
    state, info = compiled(step)(KEYS[0], init(np.eye(3)))
    assert not info.is_accepted
    assert info.acceptance_rate == 0
    np.testing.assert_array_equal(state.position, np.eye(3))


# ---------------------------------------------------------------------------------------
# The door.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: on_lie_algebra(optax.sgd(0.1)).init({"b": np.ones(3)}), "optax.partition"),
        (
            lambda: on_lie_algebra(optax.sgd(0.1)).update(
                np.eye(2), on_lie_algebra(optax.sgd(0.1)).init(np.eye(2))
            ),
            "needs the weights",
        ),
        (lambda: geodesic_hmc(jnp.sum, 0.1, 1)[0](np.ones((3, 2))), "not orthonormal"),
        (lambda: geodesic_hmc(jnp.sum, 0.1, 1)[0](np.eye(3)[:2]), "wide matrix transposed"),
        (lambda: geodesic_hmc(jnp.sum, 0.1, 1)[0](np.ones(3)), r"A unit vector is \(n, 1\)"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()
