"""Meta-learning in the basis of the tasks' gradients: P, its inner loops, and what they reach."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cheap import compiled, normal
from statsmodels.datasets import elnino

from probbp.optim.dsbp.meta import (
    Rates,
    adapt,
    outer_loss,
    posterior_mode,
    precondition,
    task_basis,
)


def tree(flat):
    """A vector of eight, or a stack of them, as a pytree."""
    kernel = flat[..., :6].reshape(*flat.shape[:-1], 2, 3)
    return {"bias": flat[..., 6:], "layer": {"kernel": kernel}}


def flatten(params):
    """Return the leaves of a tree or of a stack, in the order of `jax.tree.leaves`."""
    bias, kernel = params["bias"], params["layer"]["kernel"]
    return jnp.concatenate([bias, kernel.reshape(*bias.shape[:-1], 6)], -1)


VECTORS = np.linalg.qr(normal(0, 8, 3))[0].T
RATES = Rates(np.array([0.7, 0.5, 0.3]), np.array(0.1))
DENSE = VECTORS.T @ np.diag(RATES.along) @ VECTORS + RATES.rest * (np.eye(8) - VECTORS.T @ VECTORS)
START = normal(1, 8)


def loss_fn(params, target):
    """Neither quadratic nor separable."""
    w = flatten(params)
    return jnp.sum(jnp.cosh(w - target)) + jnp.sin(w[0] * w[5])


# ---------------------------------------------------------------------------------------
# P and its basis.


def test_the_basis_is_that_of_the_second_moment_of_the_gradients():
    flat = normal(2, 12, 8) * np.arange(1.0, 9)
    grads = tree(flat)
    moment = flatten(grads).T @ flatten(grads) / 12
    values, vectors = np.linalg.eigh(moment)
    basis = task_basis(grads, 3)
    np.testing.assert_allclose(basis.values, values[:-4:-1], rtol=1e-10)
    np.testing.assert_allclose(basis.rest, values[:5].mean(), rtol=1e-10)
    ours = flatten(basis.vectors)
    np.testing.assert_allclose(ours.T @ ours, vectors[:, -3:] @ vectors[:, -3:].T, atol=1e-10)
    assert jax.tree.map(jnp.shape, basis.vectors) == {
        "bias": (3, 2),
        "layer": {"kernel": (3, 2, 3)},
    }
    # Of fewer tasks than parameters too, and in the leaves' own precision.
    few = task_basis(jax.tree.map(lambda g: g[:4].astype("float32"), grads), 2)
    assert few.vectors["bias"].dtype == jnp.float32
    values = np.linalg.eigvalsh(flatten(grads)[:4].T @ flatten(grads)[:4] / 4)
    np.testing.assert_allclose(few.values, values[:-3:-1], rtol=1e-5)
    np.testing.assert_allclose(few.rest, values[:6].mean(), rtol=1e-5)


def test_batches_of_tasks_add_up_to_a_decaying_second_moment():
    # Gradients in a plane: two pairs remember all of it, whatever the number of batches.
    plane = np.linalg.qr(normal(3, 8, 2))[0]
    batches = normal(4, 5, 6, 2) @ plane.T
    basis, moment = task_basis(tree(batches[0]), 2), batches[0].T @ batches[0] / 6
    add = compiled(lambda batch, so_far: task_basis(tree(batch), 2, so_far, decay=0.7))
    for batch in batches[1:]:
        basis = add(batch, basis)
        moment = 0.7 * moment + 0.3 * batch.T @ batch / 6
    np.testing.assert_allclose(basis.values, np.linalg.eigvalsh(moment)[:-3:-1], rtol=1e-9)
    np.testing.assert_allclose(basis.rest, 0, atol=1e-12)
    # In all directions the trace is kept.
    batches = normal(4, 2, 6, 8)
    basis = add(batches[1], task_basis(tree(batches[0]), 2))
    trace = 0.7 * jnp.sum(batches[0] ** 2) / 6 + 0.3 * jnp.sum(batches[1] ** 2) / 6
    np.testing.assert_allclose(basis.values.sum() + 6 * basis.rest, trace, rtol=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_preconditioning_is_the_product_with_the_dense_matrix(dtype):
    cast = partial(jax.tree.map, lambda leaf: leaf.astype(dtype))
    # The tree's leaves come in the order of their names, so the matrix is turned to fit.
    vectors, grad, rates = cast((tree(VECTORS), tree(START), RATES))
    rows = flatten(tree(VECTORS))
    dense = rows.T @ jnp.diag(RATES.along - RATES.rest) @ rows + RATES.rest * np.eye(8)
    result = compiled(precondition)(grad, vectors, rates)
    assert jax.tree.map(jnp.shape, result) == jax.tree.map(jnp.shape, grad)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(result))
    tolerance = 10 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        flatten(result), dense @ flatten(tree(START)), rtol=0, atol=tolerance
    )


# ---------------------------------------------------------------------------------------
# The inner loops.


def test_with_equal_rates_it_is_the_plain_inner_loop():
    target, rate = normal(2, 8), 0.05
    rates = Rates(np.full(3, rate), np.array(rate))

    @compiled
    def both():
        w = tree(START)
        for _ in range(3):
            w = jax.tree.map(lambda w, g: w - rate * g, w, jax.grad(loss_fn)(w, target))
        return w, adapt(loss_fn, tree(START), target, tree(VECTORS), rates, num_steps=3)

    plain, ours = both()
    np.testing.assert_allclose(flatten(ours), flatten(plain), rtol=1e-12)


def test_with_no_rate_outside_a_task_stays_in_the_subspace():
    rates = Rates(RATES.along, np.array(0.0))
    moved = adapt(loss_fn, tree(START), np.ones(8), tree(VECTORS), rates, num_steps=2)
    step, rows = flatten(moved) - flatten(tree(START)), flatten(tree(VECTORS))
    assert np.linalg.norm(step) > 0.1
    np.testing.assert_allclose(rows.T @ (rows @ step), step, atol=1e-12)


INNER = {
    "adapt": partial(adapt, num_steps=2),
    "posterior_mode": partial(posterior_mode, num_steps=3),
}


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_both_modes_differentiate_through_the_inner_loop(inner):
    support, query = normal(2, 2, 2, 8)

    def outer(start, rates, vectors):
        params = tree(start)
        return outer_loss(loss_fn, params, rates, tree(vectors), support, query, inner)

    def at(h, direction):
        moved = jax.tree.map(lambda x, d: x + h * d, (START, RATES), direction)
        return outer(*moved, VECTORS)

    @compiled
    def everything(direction):
        value, grads = jax.value_and_grad(outer, (0, 1, 2))(START, RATES, VECTORS)
        slope = jax.jvp(lambda h: at(h, direction), (0.0,), (1.0,))[1]
        return (
            value,
            grads,
            slope,
            jax.lax.map(lambda h: at(h, direction), jnp.array([1e-5, -1e-5])),
        )

    direction = jax.tree.map(jnp.cos, (START, RATES))
    value, (*grads, still), forward, ends = everything(direction)
    np.testing.assert_allclose(value, ends.mean(), rtol=1e-7)
    np.testing.assert_allclose(forward, optax.tree.vdot(tuple(grads), direction), rtol=1e-9)
    np.testing.assert_allclose(forward, (ends[0] - ends[1]) / 2e-5, rtol=1e-6)
    assert np.all(still == 0)


def test_the_outer_loss_is_the_mean_over_tasks_of_what_is_left():
    support, query = np.array([[1.0], [3.0]]), np.array([[2.0], [7.0]])
    rates = Rates(np.array([0.5]), np.array(0.0))
    value = outer_loss(
        lambda w, target: jnp.sum((w - target) ** 2) / 2,
        np.zeros(1),
        rates,
        np.ones((1, 1)),
        support,
        query,
    )
    # Half way to 1 and to 3, and from there to 2 and to 7.
    assert value == ((2 - 0.5) ** 2 + (7 - 1.5) ** 2) / 4


def test_the_mode_of_the_posterior_is_where_its_slope_is_zero():
    x, y = normal(2, 5, 8), np.array([0.0, 1, 1, 0, 1])

    def nll(w, batch):
        return jnp.sum(optax.sigmoid_binary_cross_entropy(batch[0] @ w, batch[1]))

    solve = compiled(
        partial(posterior_mode, nll, vectors=VECTORS, num_products=6),
        static_argnames=("num_steps",),
    )
    mode = solve(START, (x, y), rates=RATES, num_steps=7)
    slope = compiled(jax.grad(nll))(mode, (x, y)) + jnp.linalg.solve(DENSE, mode - START)
    np.testing.assert_allclose(slope, 0, atol=1e-9)
    # Without evidence it is the prior's mean; with a prior of no width too.
    none = Rates(np.zeros(3), np.array(0.0))
    np.testing.assert_allclose(solve(START, (x, y), rates=none, num_steps=1), START)


def test_the_learnt_rates_are_the_inverse_curvatures():
    """Tasks that differ in one plane of a common quadratic: one step can solve each."""
    curvature = np.array([4.0, 0.5])
    plane = np.linalg.qr(normal(3, 6, 2))[0]
    hessian = plane @ jnp.diag(curvature) @ plane.T + 0.3 * (np.eye(6) - plane @ plane.T)
    targets = normal(4, 40, 2) @ plane.T

    def quadratic(w, target):
        return (w - target) @ hessian @ (w - target) / 2

    grads = compiled(jax.vmap(jax.grad(quadratic), (None, 0)))(np.zeros(6), targets)
    basis = task_basis(grads, 2)
    np.testing.assert_allclose(basis.rest, 0, atol=1e-12)
    optimiser = optax.adam(0.05)

    def step(carry, _):
        rates, state = carry
        slope = jax.grad(outer_loss, 2)(quadratic, jnp.zeros(6), rates, plane.T, targets, targets)
        updates, state = optimiser.update(slope, state)
        return (optax.apply_updates(rates, updates), state), None

    start = Rates(np.full(2, 0.1), np.array(0.1))
    carry, _ = jax.lax.scan(step, (start, optimiser.init(start)), length=2_000)
    np.testing.assert_allclose(carry[0].along, 1 / curvature, rtol=1e-4)
    np.testing.assert_allclose(carry[0].rest, 0.1, atol=1e-4)  # no task asks for it


# ---------------------------------------------------------------------------------------
# Linear regression, weights on a k-dimensional subspace: the oracle is known.

DIM, RANK, SHOTS, NOISE = 20, 3, 10, 0.3
TRUE = np.linalg.qr(normal(5, DIM, RANK))[0]
VARIANCES = np.array([2.0, 1.0, 0.5])


def draw_tasks(seed, num_tasks):
    """Return x (tasks, shots, dim), y (tasks, shots) and weights (tasks, dim)."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(num_tasks, RANK)) * np.sqrt(VARIANCES) @ TRUE.T
    x = rng.normal(size=(num_tasks, SHOTS, DIM))
    y = np.einsum("tnd,td->tn", x, w) + NOISE * rng.normal(size=(num_tasks, SHOTS))
    return x, y, w


def half_squares(w, batch):
    """Negative log likelihood of a task."""
    x, y = batch
    return jnp.sum((x @ w - y) ** 2) / (2 * NOISE**2)


def ridge(x, y, covariance):
    """Return the posterior mean under N(0, covariance), from the space of examples."""
    gram = x @ covariance @ x.T + NOISE**2 * jnp.eye(len(x))
    return covariance @ x.T @ jnp.linalg.solve(gram, y)


def risk(estimates, w):
    """Excess squared error on new x, E (x w - x w*)^2."""
    return jnp.mean(jnp.sum((estimates - w) ** 2, -1))


def learnt_prior(x, y):
    """Read the prior's covariance from the tasks' gradients at zero, by moments.

    With g = -X^T y / n and X standard normal, E g g^T = (1 + 1/n) Sigma + (tr Sigma + s^2) / n I:
    the same eigenvectors, and eigenvalues that are shifted and stretched.
    """
    grads = -jnp.einsum("tnd,tn->td", x, y) / SHOTS
    basis = task_basis(grads, RANK)
    along = (basis.values - basis.rest) * SHOTS / (SHOTS + 1)
    return basis, Rates(along, jnp.array(0.0))


def test_the_mode_under_the_true_prior_is_the_oracle_s_ridge_regression():
    x, y, _ = draw_tasks(6, 4)
    rates = Rates(VARIANCES, np.array(0.01))
    covariance = TRUE @ jnp.diag(VARIANCES - 0.01) @ TRUE.T + 0.01 * np.eye(DIM)
    solve = compiled(
        jax.vmap(
            partial(
                posterior_mode,
                half_squares,
                np.zeros(DIM),
                vectors=TRUE.T,
                rates=rates,
                num_products=2 * SHOTS,
            )
        )
    )
    np.testing.assert_allclose(
        solve((x, y)), compiled(jax.vmap(ridge, (0, 0, None)))(x, y, covariance), atol=1e-8
    )


def test_what_is_learnt_from_tasks_approaches_the_oracle():
    covariance = TRUE @ jnp.diag(VARIANCES) @ TRUE.T
    new_x, new_y, new_w = draw_tasks(7, 200)
    oracle = risk(compiled(jax.vmap(ridge, (0, 0, None)))(new_x, new_y, covariance), new_w)
    plain = risk(
        compiled(jax.vmap(ridge, (0, 0, None)))(new_x, new_y, np.eye(DIM) * 3.5 / DIM), new_w
    )

    @compiled
    @jax.vmap
    def learn(x, y):
        basis, rates = learnt_prior(x, y)
        sine = jnp.linalg.norm(TRUE - basis.vectors.T @ (basis.vectors @ TRUE), 2)
        solve = partial(
            posterior_mode,
            half_squares,
            jnp.zeros(DIM),
            vectors=basis.vectors,
            rates=rates,
            num_products=2 * SHOTS,
        )
        return sine, risk(jax.vmap(solve)((new_x, new_y)), new_w)

    def four(num_tasks):
        x, y, _ = draw_tasks(5, 4 * num_tasks)
        return learn(x.reshape(4, -1, SHOTS, DIM), y.reshape(4, -1, SHOTS))

    few, many = four(200), four(3_200)
    # Sixteen times the tasks, a quarter of the angle; its standard error over 4 draws is 0.03.
    ratio = many[0].mean() / few[0].mean()
    assert 0.15 < ratio < 0.4
    # The excess over the oracle goes with the angle's square, and ridge without a basis stays off.
    assert few[1].mean() - oracle > 8 * (many[1].mean() - oracle) > 0
    assert many[1].mean() < 2 * oracle
    assert plain > 5 * many[1].mean()


# ---------------------------------------------------------------------------------------
# Real data: a year's sea surface temperatures from its first months.


def test_a_year_s_curve_from_its_first_months():
    """Tasks are years, weights the twelve months' anomalies: a basis reaches months not seen.

    Few shots are the months to April, queries the others. A step of plain MAML moves the months
    seen alone, and so does ridge regression on the indicators of months: both stay at the mean
    curve. (To carry April's anomaly on does nearly as well: `examples/papers/dsbp_meta.py`.)
    """
    months = np.asarray(elnino.load_pandas().data.to_numpy()[:60, 1:])
    seen, noise, rank = np.eye(12)[:4], 0.3, 3

    def nll(w, batch):
        x, y = batch
        return jnp.sum((x @ w - y) ** 2) / (2 * noise**2)

    @compiled
    @jax.vmap
    def left_out(fold):
        """Squared errors of a year's later months, from the years of the other folds."""
        turned = jnp.roll(months, -12 * fold, axis=0)
        train, answers = turned[12:], turned[:12] - turned[12:].mean(0)
        # The gradients of all months of a year at the mean curve are its anomalies, but for a sign.
        basis = task_basis(train - train.mean(0), rank)
        solve = partial(
            posterior_mode, nll, jnp.zeros(12), vectors=basis.vectors, num_products=seen.size
        )
        covariance = basis.vectors.T * (basis.values - basis.rest) @ basis.vectors
        covariance += basis.rest * jnp.eye(12)
        inverse = jnp.linalg.inv(covariance[:4, :4] + noise**2 * jnp.eye(4))
        spread = jnp.mean(basis.values) / 12
        estimates = {
            "ours": jax.vmap(lambda y: solve((seen, y), rates=Rates(basis.values, basis.rest))),
            "plain": jax.vmap(
                lambda y: solve((seen, y), rates=Rates(jnp.full(rank, spread), spread))
            ),
            # The Gaussian conditional of the same covariance, written down at once.
            "exact": lambda y: y @ inverse @ covariance[:4],
        }
        errors = {
            k: jnp.mean((f(answers[:, :4]) - answers)[:, 4:] ** 2, 1) for k, f in estimates.items()
        }
        return errors | {"mean": jnp.mean(answers[:, 4:] ** 2, 1)}

    errors = jax.tree.map(jnp.ravel, left_out(np.arange(5)))
    np.testing.assert_allclose(errors["ours"], errors["exact"], rtol=1e-8)
    np.testing.assert_allclose(errors["plain"], errors["mean"], rtol=1e-8)
    gain = errors["plain"] - errors["ours"]  # paired over sixty years, each left out once
    assert gain.mean() > 2 * gain.std(ddof=1) / len(gain) ** 0.5


# ---------------------------------------------------------------------------------------
# The door.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: task_basis(np.ones((2, 5)), 3), "Take the gradients of more tasks"),
        (lambda: task_basis(np.ones((2, 5)), 0), "rank must be a positive integer, got 0"),
        (
            lambda: task_basis(np.ones((2, 5)), 1, task_basis(np.ones((2, 4)), 1)),
            "so_far is of 4 parameters",
        ),
        (
            lambda: task_basis(np.ones((2, 5)), 1, task_basis(np.ones((2, 5)), 1), decay=1.5),
            "decay must be between 0 and 1",
        ),
        (
            lambda: precondition(np.ones(3), np.eye(3)[:2], Rates(np.ones(3), np.ones(()))),
            r"2 vectors take rates of shapes \(2,\) and \(\)",
        ),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()
