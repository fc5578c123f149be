"""Numbers that have a range stay in it, whatever the data: constant, of rank one, tiny or huge.

Nothing here is NaN, and no zero is divided by.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from probbp import diagnostics
from probbp.ops import dendrites, feedback
from probbp.ops.dendrites import scores, significance
from probbp.optim import dsbp
from probbp.optim import feedback as feedback_optim
from probbp.optim.dsbp import architecture, drift, meta, pac_bayes, rotations, transfer, truncation

ROWS = np.random.default_rng(0).normal(size=(6, 4))
FIRST = np.arange(6)[:, None] == 0
DATA = {
    "ordinary": ROWS,
    "zeros": 0 * ROWS,
    "constant": 0 * ROWS + 3,
    "of rank one": np.outer(ROWS[:, 0], ROWS[0]),
    "one row": np.where(FIRST, ROWS, 0),
    "columns twice": ROWS[:, [0, 0, 1, 1]],
    "tiny": 1e-12 * ROWS,
    "huge": 1e6 * ROWS,
    "far away": ROWS + 1e4,
}
INF = float("inf")


class Case(NamedTuple):
    """A function of a matrix (6, 4), and between what all its numbers lie."""

    fun: Any
    low: float
    high: float


def moved(x):
    return jnp.roll(x, 1, axis=0)


def variances(x):
    return jnp.sort(jnp.maximum(jnp.linalg.eigvalsh(x.T @ x), 0))[::-1]


def basis(x):
    return jnp.linalg.qr(x)[0]


def seen(x):
    return drift.reference(x, rank=2)


def tracked(x):
    start = dsbp.start(jax.random.key(0), 6, 2, dtype=x.dtype)
    return start, dsbp.track(start, lambda v: x @ (x.T @ v), jnp.sum(x**2))


def truncated(x, **options):
    return truncation.truncate(x[:4], truncation.second_moment(x), **options)


CASES = {
    "effective_rank": Case(lambda x: architecture.effective_rank(variances(x)), 0, 4),
    "stable_rank": Case(lambda x: architecture.stable_rank(variances(x)), 0, 4),
    "energy_rank": Case(lambda x: architecture.energy_rank(variances(x)), 0, 4),
    "noise_threshold": Case(
        lambda x: architecture.noise_threshold(jnp.sqrt(variances(x)), x.shape), 0, INF
    ),
    "in_series": Case(lambda x: architecture.in_series(variances(x)), 0, INF),
    "kl_inverse": Case(lambda x: pac_bayes.kl_inverse(jax.nn.sigmoid(x), jnp.abs(x)), 0, 1),
    "kl_inverse, ends": Case(lambda x: pac_bayes.kl_inverse((x > 0) * 1.0, jnp.abs(x)), 0, 1),
    "p_value": Case(lambda x: drift.p_value(seen(x), moved(x)), 0, 1),
    "p_value, elsewhere": Case(lambda x: drift.p_value(seen(x), 2 * x + 1), 0, 1),
    "p_value, followed": Case(lambda x: drift.p_value(drift.follow(seen(x), moved(x)), x), 0, 1),
    "energy_outside": Case(lambda x: drift.energy_outside(seen(x), 2 * x + 1), 0, 1),
    "mahalanobis": Case(lambda x: drift.mahalanobis(seen(x), 2 * x + 1), 0, INF),
    "log_likelihood": Case(lambda x: drift.log_likelihood(seen(x), x), -1e4, 1e4),
    "recolour": Case(lambda x: drift.recolour(x, seen(x), seen(moved(x))), -1e8, 1e8),
    "principal_angles": Case(
        lambda x: drift.principal_angles(basis(x)[:, :2], basis(moved(x))[:, :3]), 0, np.pi / 2
    ),
    "score_test": Case(lambda x: significance.score_test(x, moved(x))[0], 0, 6),
    "score_test, p": Case(lambda x: significance.score_test(x, moved(x))[1], 0, 1),
    "orthogonalise": Case(lambda x: significance.orthogonalise(x[:, :2], x[:, 2:]), -1e8, 1e8),
    "covariance": Case(lambda x: scores.covariance(x, moved(x)), 0, INF),
    "correlation": Case(lambda x: scores.correlation(x, moved(x)), 0, 1),
    "correlation, alike": Case(lambda x: scores.correlation(x, x), 0, 1),
    "gain": Case(lambda x: scores.gain(x, moved(x)), 0, 1e3),
    "evidence": Case(lambda x: dendrites.log_evidence_gain(x[:, 0], x[:, 1] ** 2, 1.0), -30, 1e13),
    "evidence, greedy": Case(lambda x: dendrites.greedy(x[0], x.T @ x, 1.0)[1], 0, 1e13),
    "alignment": Case(lambda x: feedback.alignment(x, moved(x)), -1, 1),
    "alignment, alike": Case(lambda x: feedback.alignment(x, x, axis=1), 0, 1),
    "captured": Case(lambda x: dsbp.captured(tracked(x)[0], x), 0, 1),
    "captured, tracked": Case(lambda x: dsbp.captured(tracked(x)[1], x), 0, 1),
    "rotation": Case(lambda x: dsbp.rotation(*tracked(x)), 0, 1),
    "truncate": Case(lambda x: truncated(x, rank=2).error, 0, 1e26),
    "task_basis": Case(lambda x: meta.task_basis(x, rank=2).values, 0, 1e14),
    "cayley": Case(lambda x: rotations.cayley(rotations.skew(x[:4])), -1, 1),
    "jacobi_step": Case(lambda x: rotations.jacobi_step(jnp.eye(4, dtype=x.dtype), x.T @ x), -1, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers_stay_in_their_range(name):
    """In single precision, the harder one."""
    fun, low, high = CASES[name]
    slack = 100 * float(jnp.finfo(jnp.float32).eps)
    stacked = jnp.stack([jnp.asarray(x, jnp.float32) for x in DATA.values()])
    found = jax.jit(partial(jax.lax.map, fun))(stacked)
    for data, values in zip(DATA, np.asarray(found, float), strict=True):
        assert not np.any(np.isnan(values)), data
        assert np.all(values >= low - slack), (data, values.min())
        assert np.all(values <= high + slack * max(high, 1)), (data, values.max())


@pytest.mark.parametrize("data", DATA)
def test_ranks_that_are_found_fit(data):
    """Whose number follows from the values, and the directions are orthonormal."""
    x = jnp.asarray(DATA[data], jnp.float32)
    left = truncated(x, tolerance=0.1).left
    assert 0 <= left.shape[1] <= 4
    assert jnp.all(jnp.isfinite(left))
    directions = transfer.used_directions(x)
    identity = jnp.eye(directions.shape[1])
    np.testing.assert_allclose(directions.T @ directions, identity, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_a_test_of_scores_is_blind_to_their_scale(scale):
    """In single precision too, where squares of such scores are zero or infinite."""
    x = jnp.asarray(ROWS, jnp.float32)
    plain = significance.score_test(x, moved(x))
    scaled = significance.score_test(scale * x, scale * moved(x))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4), scaled, plain)


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_correlations_are_blind_to_a_shift(shift):
    x = jnp.asarray(ROWS, jnp.float32)
    exact = np.abs([np.corrcoef(a, b)[0, 1] for a, b in zip(ROWS.T, moved(x).T, strict=True)])
    # A shift of 1e4 leaves a number of order one 1e4 eps = 1.2e-3 to be told from others.
    np.testing.assert_allclose(scores.correlation(x + shift, moved(x)), exact, atol=5e-3)


def test_activations_of_a_dead_layer_have_a_reference():
    """What is where it always was is no surprise; whatever moves is the greatest."""
    known = seen(jnp.full((6, 4), 3.0))
    assert drift.p_value(known, jnp.full(4, 3.0)) == 1
    assert drift.p_value(known, jnp.full(4, 3.1)) == 0
    assert jnp.isfinite(drift.log_likelihood(known, jnp.full(4, 3.0)))


@pytest.mark.parametrize(
    "ranks",
    [np.zeros(50, int), np.full(50, 9), np.arange(50) % 10, np.tile([0, 9], 25)],
    ids=["lowest", "highest", "even", "both ends"],
)
def test_probabilities_of_ranks_are_some(ranks):
    each, overall = diagnostics.uniformity(diagnostics.RankStatistics({"x": ranks}, 9))
    assert 0 < each["x"] <= 1
    assert 0 < overall <= 1
    assert (overall > 0.5) == (len(set(ranks.tolist())) == 10)


PARAMS = {
    "layers": [
        {"kernel": jnp.eye(4)[:, :3], "feedback": jnp.ones((4, 3)), "bias": jnp.zeros(3)},
        (jnp.ones((2, 4, 3)), None),
    ],
    "scale": jnp.ones(()),
    "nothing": {},
}
DIRECTIONS = {
    "layers": [
        {"kernel": jnp.eye(4)[:, :1], "feedback": None, "bias": None},
        (jnp.eye(4)[None, :, :2].repeat(2, 0), None),
    ],
    "scale": None,
    "nothing": None,
}
TRANSFORMS = {
    **{
        mode: dsbp.scale_by_dynamic_spectral(2, mode)
        for mode in ("residual", "whiten", "damp", "project", "random", "bulk")
    },
    "whiten, behind": optax.chain(
        dsbp.scale_by_dynamic_spectral(2, "whiten", side="out"), optax.trace(0.9)
    ),
    "frozen": feedback_optim.frozen(optax.adamw(0.1)),
    "protect": optax.chain(optax.adam(0.1), transfer.protect(DIRECTIONS)),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in TRANSFORMS), ("residual", "bfloat16"), ("damp", "bfloat16")],
)
def test_transforms_keep_the_tree_and_survive_no_gradient(name, dtype):
    """Zeros first, when nothing is known; then a gradient, one that is tiny, and zeros again."""
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    transform = TRANSFORMS[name]
    state, update = transform.init(params), jax.jit(transform.update)
    for size in (0.0, 1.0, 1e-15, 0.0):
        grads = jax.tree.map(lambda leaf, size=size: size * (leaf + jnp.ones((), dtype)), params)
        updates, after = update(grads, state, params)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
        assert jax.tree.map(lambda leaf: leaf.dtype, updates) == jax.tree.map(
            lambda leaf: leaf.dtype, params
        )
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), state
        )
        for leaf in jax.tree.leaves((updates, after)):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                assert jnp.all(jnp.isfinite(leaf)), size
        state = after
