"""The theory as code: the modified equation at its order, the certificate and its conditions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from cheap import compiled, keys_of, normal
from jax.flatten_util import ravel_pytree
from scipy import stats
from sklearn.datasets import load_breast_cancer

from probbp.optim.dsbp.modified_equation import modified_equation, simulate, third_derivative
from probbp.optim.dsbp.pac_bayes import (
    Posterior,
    certificate,
    divergence,
    embed,
    kl_inverse,
    laplace,
    optimal_variances,
    prior,
)

KEYS = keys_of(0, 8)


# ---------------------------------------------------------------------------------------
# The modified equation. A loss of five parameters, and a projection on three directions.

DIM = 5
BASIS = np.linalg.qr(normal(0, DIM, 3))[0]
P = BASIS @ BASIS.T
MIX = normal(1, DIM, DIM) / 2
START = normal(2, DIM)


def loss_fn(w):
    """Neither quadratic nor convex."""
    return jnp.sum(jnp.log(jnp.cosh(MIX @ w - 1))) + 0.3 * jnp.sin(w[0] * w[1]) + jnp.sum(w**2) / 8


def penalised(w, rho):
    """The loss with the penalty on its largest curvature, by autodiff of the eigenvalue."""
    return loss_fn(w) + rho**2 / 2 * jnp.linalg.eigvalsh(jax.hessian(loss_fn)(w))[-1]


def leading(w):
    return jnp.linalg.eigh(jax.hessian(loss_fn)(w))[1][:, -1]


def tree(flat):
    return {"a": flat[:2].reshape(1, 2), "b": flat[2:]}


def test_drift_and_diffusion_are_their_formulas_on_a_pytree():
    eta = 0.2

    def of_tree(w):
        return loss_fn(ravel_pytree(w)[0])

    def project(grad):
        flat, unravel = ravel_pytree(grad)
        return unravel(P @ flat)

    def noise_root(w, noise):
        return jax.tree.map(lambda w, z: jnp.cosh(w) * z, w, noise)

    @compiled
    def ours(w, noise):
        equations = [
            modified_equation(of_tree, eta, project=project, noise_root=noise_root, order=order)
            for order in (1, 2)
        ]
        first, second = (equation.drift(w) for equation in equations)
        return first, second, equations[1].diffusion(w, noise)

    noise = normal(3, DIM)
    first, second, kick = (ravel_pytree(x)[0] for x in ours(tree(START), tree(noise)))
    grad, hessian = compiled(lambda w: (jax.grad(loss_fn)(w), jax.hessian(loss_fn)(w)))(START)
    np.testing.assert_allclose(first, -P @ grad, atol=1e-12)
    np.testing.assert_allclose(second, -P @ (grad + eta / 2 * hessian @ P @ grad), atol=1e-12)
    np.testing.assert_allclose(kick, eta**0.5 * P @ (np.cosh(START) * noise), atol=1e-12)


DESCENTS = {
    "gradient": (jax.grad(loss_fn), {}),
    # Of the penalised loss itself: with the two-point gradient rho^4 would be added.
    "penalty": (jax.grad(partial(penalised, rho=0.5)), {"leading_fn": leading, "rho": 0.5}),
}


@pytest.mark.parametrize("name", DESCENTS)
def test_descent_follows_the_flow_at_the_stated_order(name):
    grad_fn, options = DESCENTS[name]
    span = 1.6

    def error(num_steps):
        eta = span / num_steps
        step = lambda _, w: w - eta * P @ grad_fn(w)
        end = jax.lax.fori_loop(0, num_steps, step, START)
        ours = partial(modified_equation, loss_fn, eta, project=lambda g: P @ g, **options)
        return [
            jnp.linalg.norm(end - simulate(KEYS[0], ours(order=order), START, span, 160))
            for order in (1, 2)
        ]

    # The number of steps is traced: one program for both.
    coarse, fine = map(jax.jit(error), (16, 32))
    assert coarse[0] / fine[0] == pytest.approx(2, rel=0.15)
    assert coarse[1] / fine[1] == pytest.approx(4, rel=0.15)


def test_the_two_point_gradient_s_penalty_is_exact_to_fourth_order():
    w = START

    @compiled
    def all_of(rhos):
        grad, e = jax.grad(loss_fn), leading(w)
        third = third_derivative(loss_fn, w, e)

        def error(rho):
            two_point = (grad(w + rho * e) + grad(w - rho * e)) / 2
            return jnp.linalg.norm(two_point - grad(w) - rho**2 / 2 * third)

        equation = modified_equation(loss_fn, 0.1, order=1, leading_fn=leading, rho=0.1)
        largest = jax.grad(lambda w: jnp.linalg.eigvalsh(jax.hessian(loss_fn)(w))[-1])(w)
        return jax.lax.map(error, rhos), third, largest, equation.drift(w), grad(w)

    errors, third, largest, drift, grad = all_of(np.array([0.2, 0.1]))
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.05)
    np.testing.assert_allclose(third, largest, rtol=1e-8)
    np.testing.assert_allclose(drift, -(grad + 0.1**2 / 2 * largest), rtol=1e-8)


def test_a_penalty_goes_no_further_than_the_projection():
    """In a valley with walls in x that are less steep at y = 0, only the penalty moves y."""

    def valley(w):
        return w[0] ** 2 / 2 * (1 + w[1] ** 2)

    def end(rho, mask):
        equation = modified_equation(
            valley,
            1e-3,
            project=lambda g: jnp.array(mask) * g,
            order=1,
            rho=rho,
            leading_fn=(lambda w: jnp.array([1.0, 0.0])) if rho else None,
        )
        return simulate(KEYS[0], equation, jnp.array([0.0, 0.8]), time=2.0, num_steps=100)

    assert end(0.0, [1.0, 1.0])[1] == 0.8
    assert end(0.5, [1.0, 0.0])[1] == 0.8
    # dy/dt = -rho^2 y
    np.testing.assert_allclose(end(0.5, [1.0, 1.0])[1], 0.8 * np.exp(-0.25 * 2), rtol=1e-4)


CURVATURE, FIXED, GROWING = 1.5, 0.8, 0.6  # noise of variance FIXED + GROWING w^2


def noisy(eta, order):
    return modified_equation(
        lambda w: CURVATURE * w**2 / 2,
        eta,
        noise_root=lambda w, noise: jnp.sqrt(FIXED + GROWING * w**2) * noise,
        order=order,
    )


def moments_of_equation(eta, order, span, start):
    """Mean and second moment by their own equations, from the drift and diffusion at 0 and 1."""
    equation = noisy(eta, order)
    rate = equation.drift(1.0)
    still, grown = (equation.diffusion(w, 1.0) ** 2 for w in (0.0, 1.0))
    pace = 2 * rate + grown - still  # dm/dt = pace m + still
    second = (start**2 + still / pace) * jnp.exp(pace * span) - still / pace
    return start * jnp.exp(rate * span), second


@pytest.mark.parametrize("order", [1, 2])
def test_a_noisy_descent_has_the_equation_s_moments_at_the_stated_order(order):
    """With noise that depends on where one is, and no correction of its covariance."""
    span, start = 1.0, 2.0

    def errors(num_steps):
        eta = span / num_steps
        mean, second = start, start**2
        for _ in range(num_steps):
            mean = (1 - eta * CURVATURE) * mean
            second = (1 - eta * CURVATURE) ** 2 * second + eta**2 * (FIXED + GROWING * second)
        theory = moments_of_equation(eta, order, span, start)
        return np.abs(np.array([mean, second]) - np.array(theory))

    np.testing.assert_allclose(errors(80) / errors(160), 2**order, rtol=0.1)


def test_simulated_paths_have_the_equation_s_moments():
    eta, span, start = 0.2, 1.0, 2.0
    run = partial(simulate, equation=noisy(eta, 2), params=start, time=span, num_steps=50)
    ends = compiled(jax.vmap(run))(jax.random.split(KEYS[4], 20_000))
    for power, moment in enumerate(moments_of_equation(eta, 2, span, start), 1):
        draws = ends**power
        # The solver's own bias is of the order of h^2 + eta h = 0.004, against a moment of 0.2.
        assert abs(draws.mean() - moment) < 4 * draws.std() / len(draws) ** 0.5 + 2e-3


# ---------------------------------------------------------------------------------------
# The certificate's parts.


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_kl_inverse_is_the_root(dtype):
    def kl(q, p):
        return sum(a * np.log(a / b) for a, b in ((q, p), (1 - q, 1 - p)) if a > 0)

    risks, budgets = np.array([0.0, 0.01, 0.3, 0.9, 1.0]), np.array([[0.005], [0.1], [2.0]])
    ours = kl_inverse(np.asarray(risks, dtype), np.asarray(budgets, dtype))

    def root(q, c):
        return scipy.optimize.brentq(lambda p: kl(q, p) - c, max(q, 1e-12), 1 - 1e-12, xtol=1e-13)

    roots = [[root(q, c) for q in risks[:4]] for c in budgets[:, 0]]
    np.testing.assert_allclose(ours[:, :4], roots, rtol=1e-11 if dtype == "float64" else 2e-5)
    np.testing.assert_array_equal(ours[:, 4], 1)
    np.testing.assert_allclose(kl_inverse(0.3, 0.0), 0.3, rtol=1e-6)
    # Pinsker's inequality is the weaker one.
    assert np.all(ours[:, :4] <= np.minimum(risks[:4] + np.sqrt(budgets / 2), 1) + 1e-6)


def test_what_the_kl_inverse_returns_is_never_too_small():
    """Its kl has reached the budget, or it is 1: of the last bracket this is the upper end.

    Where a budget is large, p is near 1, and a step of one rounding changes the kl by far more than
    the kl itself is rounded. There the two ends of the bracket are told apart.
    """
    risks = np.concatenate([[0.0, 1.0], np.linspace(0.001, 0.999, 41)])[:, None]
    budgets = np.array([0.0, 1e-4, 0.003, 0.02, 0.1, 0.7, 2.0, 5.0, 10.0, 20.0, 30.0])
    q, c = np.broadcast_arrays(risks, budgets)
    p = compiled(kl_inverse)(q, c)
    assert np.all((q <= p) & (p <= 1))

    def term(a, b):
        """Return a ln(a / b) in the precision of long doubles, where 1 - p is exact."""
        a, b = np.asarray(a, np.longdouble), np.asarray(b, np.longdouble)
        safe = (a > 0) & (b > 0)
        value = np.where(safe, a, 0) * np.log(np.where(safe, a, 1) / np.where(safe, b, 1))
        return np.where((a > 0) & (b == 0), np.inf, value)

    one = np.longdouble(1)
    kl = term(q, p) + term(one - q, one - p)
    reached = kl >= c - 8 * np.finfo(float).eps * (1 + c)
    assert np.all(reached | (p == 1))
    assert np.sum(reached & (p < 1) & (c >= 5)) > 50  # it is seen where it can be


def test_the_divergence_is_that_of_two_gaussians():
    scale, mean = 0.7, np.asarray(normal(1, 4))
    axes, variances = np.linalg.qr(normal(2, 4, 4))[0], np.array([0.1, 0.3, 0.5, 1.2])
    covariance = axes @ np.diag(variances) @ axes.T
    posterior = stats.multivariate_normal(mean, covariance)
    draws = posterior.rvs(40_000, random_state=0)
    ratios = posterior.logpdf(draws) - stats.norm(0, scale).logpdf(draws).sum(1)
    ours = float(divergence(Posterior(mean, axes, variances), scale))
    assert abs(ratios.mean() - ours) < 4 * ratios.std() / 200
    exact = np.trace(covariance) / scale**2 + np.sum(mean**2) / scale**2 - 4
    exact = (exact - np.linalg.slogdet(covariance / scale**2)[1]) / 2
    assert ours == pytest.approx(float(exact))


def test_the_optimal_variances_minimise_the_objective():
    curvature, scale, n = np.array([0.0, 0.2, 3.0]), 0.5, 50

    def objective(log_variances):
        variances = jnp.exp(log_variances)
        posterior = Posterior(jnp.zeros(3), jnp.eye(3), variances)
        return n * jnp.sum(variances * curvature) / 2 + divergence(posterior, scale)

    best = jnp.log(optimal_variances(curvature, scale, n))
    slope, hessian = compiled(lambda z: (jax.grad(objective)(z), jax.hessian(objective)(z)))(best)
    np.testing.assert_allclose(slope, 0, atol=1e-12)
    assert np.all(np.linalg.eigvalsh(hessian) > 0)
    # A hill is no reason to be wider than the prior.
    assert optimal_variances(np.array([-1.0]), scale, n) == scale**2


def test_laplace_takes_the_curvature_within_the_subspace():
    hessian = np.asarray(MIX @ MIX.T)
    line = prior(tree(START), BASIS, 0.5, independent=True)
    z = np.array([0.3, -0.2, 0.1])
    np.testing.assert_allclose(ravel_pytree(embed(line, z))[0], START + BASIS @ z)

    @compiled
    def fitted(z):
        quadratic = lambda w: ravel_pytree(w)[0] @ hessian @ ravel_pytree(w)[0] / 2
        return laplace(quadratic, line, z, num_rows=20)

    _, axes, variances = map(np.asarray, fitted(z))
    precision = 20 * BASIS.T @ hessian @ BASIS + np.eye(3) / 0.5**2
    covariance = axes @ np.diag(variances) @ axes.T
    np.testing.assert_allclose(covariance, np.linalg.inv(precision), rtol=1e-9)


def test_the_draws_mean_loss_is_the_posterior_s():
    """For a quadratic loss it is L(w) + tr(Sigma H) / 2."""
    line = prior(np.zeros(DIM), BASIS, 1.0, independent=True)
    posterior = Posterior(
        np.array([0.5, 0.2, -0.3]),
        np.linalg.qr(normal(3, 3, 3))[0],
        np.array([0.3, 0.1, 0.05]),
    )
    rows = np.linspace(0.5, 1.5, 4)
    result = certificate(
        KEYS[4],
        lambda w, r: jnp.minimum(r * (w @ MIX @ MIX.T @ w) / 60, 1.0),  # far from 1
        line,
        posterior,
        rows,
        range(4),
        num_draws=4_000,
    )
    mean, axes, variances = map(np.asarray, posterior)
    inside = BASIS.T @ np.asarray(MIX @ MIX.T) @ BASIS / 60
    covariance = axes @ np.diag(variances) @ axes.T
    exact = mean @ inside @ mean + np.trace(covariance @ inside)
    variance = 2 * np.trace(inside @ covariance @ inside @ covariance)
    variance += 4 * mean @ inside @ covariance @ inside @ mean
    assert abs(result.empirical - exact) < 4 * (variance / 4_000) ** 0.5
    assert result.empirical < result.empirical_bound < result.bound <= result.sqrt_bound


# ---------------------------------------------------------------------------------------
# Coverage over draws of the data.

NUM, WIDE, NARROW = 60, 100, 20


def errors(w, batch):
    x, y = batch
    return (jnp.sign(x @ w) != y).astype(float)


def certified(key, basis_of, scale=1.0):
    """Fit labels that are coin flips, of true risk 1/2 whatever the weights, and certify."""
    key_x, key_y, key_basis, key_draws = jax.random.split(key, 4)
    x = jax.random.normal(key_x, (NUM, WIDE))
    y = jax.random.rademacher(key_y, (NUM,), float)
    line = prior(jnp.zeros(WIDE), basis_of(key_basis, x, y), scale, independent=True)

    def smooth(w):
        return jnp.mean(jax.nn.softplus(-3 * y * (x @ w)))

    dim, n = line.vectors.shape[1], 4 * NUM
    objective = lambda z: n * smooth(embed(line, z)) + jnp.sum(z**2) / (2 * scale**2)
    mean = jnp.zeros(dim)
    for _ in range(5):  # Newton's method
        mean -= jnp.linalg.solve(jax.hessian(objective)(mean), jax.grad(objective)(mean))
    posterior = laplace(smooth, line, mean, n)
    return certificate(
        key_draws,
        errors,
        line,
        posterior,
        (x, y),
        range(NUM),
        delta=0.1,
        delta_draws=0.1,
        num_draws=100,
    )


def of_chance(key, x, y):
    return jnp.linalg.qr(jax.random.normal(key, (WIDE, NARROW)))[0]


def of_the_labels(key, x, y):
    """The gradient at zero: what a tracker finds on the very examples of the bound."""
    direction = x.T @ y
    return (direction / jnp.linalg.norm(direction))[:, None]


@pytest.mark.slow
def test_the_bound_holds_over_draws_of_the_data_unless_the_basis_has_seen_them():
    keys = jax.random.split(KEYS[5], 100)
    run = compiled(jax.vmap(partial(certified, basis_of=of_chance)))
    valid = run(keys)
    assert np.mean(valid.bound < 0.5) <= 0.2 + 3 * (0.2 * 0.8 / 100) ** 0.5
    # Not for want of power: the fit itself is far below the risk, and the KL makes up for it.
    assert np.mean(valid.empirical_bound < 0.5) > 0.5
    assert np.all(valid.bound <= valid.sqrt_bound)
    false = compiled(jax.vmap(partial(certified, basis_of=of_the_labels)))(keys)
    assert np.mean(false.bound < 0.5) > 0.5


def test_so_few_draws_are_made_up_for():
    """Losses that are 1 with probability 0.3 over draws of the parameters, the same in each row."""
    plane = prior(np.zeros(1), np.eye(1), 1.0, independent=True)
    posterior = Posterior(np.zeros(1), np.eye(1), np.ones(1))
    level = stats.norm.ppf(0.3)

    def one(key):
        losses = lambda w, rows: jnp.full(rows.shape, w[0] < level).astype(float)
        return certificate(
            key, losses, plane, posterior, jnp.zeros(3), range(3), delta_draws=0.2, num_draws=20
        )

    results = compiled(jax.vmap(one))(jax.random.split(KEYS[6], 500))
    assert np.all(results.kl == 0)
    missed = np.mean(results.empirical_bound < 0.3)
    exact = stats.binom(20, 0.3).pmf(
        [k for k in range(21) if kl_inverse(k / 20, np.log(5) / 20) < 0.3]
    )
    assert missed == pytest.approx(exact.sum(), abs=4 * (0.25 / 500) ** 0.5)
    assert 0.01 < missed <= 0.2


# ---------------------------------------------------------------------------------------
# Real data: logistic regression of breast cancer, certified with and without a look at a half.


def newton(x, y, offset, penalty):
    """Penalised logistic regression on y in {-1, 1}."""
    w = np.zeros(x.shape[1])
    for _ in range(15):
        p = 1 / (1 + np.exp(y * (x @ w + offset)))
        slope = penalty * w - x.T @ (y * p) / len(x)
        hessian = penalty * np.eye(len(w)) + (x.T * (p * (1 - p))) @ x / len(x)
        w -= np.linalg.solve(hessian, slope)
    return w, hessian


def test_a_certificate_of_real_data_is_far_from_vacuous():
    x, y = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    seen, rows, held = order[:180], order[180:420], order[420:]
    # The scaler is a part of the prior, and of the same rows.
    x = np.c_[(x - x[seen].mean(0)) / x[seen].std(0), np.ones(len(x))]
    y = 2.0 * y - 1
    center, hessian = newton(x[seen], y[seen], 0.0, 1e-2)
    random = np.linalg.qr(normal(7, 31, 5))[0]
    priors = {
        "informed": prior(np.asarray(center), np.linalg.eigh(hessian)[1][:, -5:], 0.3, rows=seen),
        "random": prior(np.zeros(31), random, 1.0, rows=seen),
    }
    results, held_out = {}, {}
    for name, line in priors.items():
        penalty = 1 / line.scale**2 / len(rows)
        inside, offset = x[rows] @ line.vectors, np.asarray(x[rows] @ line.center)
        mean, hessian = newton(inside, y[rows], offset, penalty)
        # laplace's: its curvature is that of the loss alone.
        curvature, axes = np.linalg.eigh(hessian)
        variances = optimal_variances(curvature - penalty, line.scale, len(rows))
        posterior = Posterior(np.asarray(mean), np.asarray(axes), variances)
        args = errors, line, posterior, (x, y)
        results[name] = certificate(KEYS[0], *args, rows, num_draws=400)
        # The risk itself, from examples that nothing above has seen.
        at_mean = np.asarray(embed(line, posterior.mean))
        held_out[name] = np.mean(np.sign(x[held] @ at_mean) != y[held])
    assert results["informed"].bound < 0.15
    assert results["informed"].bound < results["random"].bound
    for name, result in results.items():
        assert held_out[name] < result.bound
        assert result.delta == pytest.approx(0.035)
    with pytest.raises(ValueError, match="made from 180 of the 420 rows"):
        certificate(KEYS[0], *args, order[:420])


# ---------------------------------------------------------------------------------------
# The door.

FREE = partial(prior, np.zeros(2), np.eye(2), 1.0, independent=True)
SPLIT = partial(prior, np.zeros(2), np.eye(2), 1.0, rows=np.arange(3))
POSTERIOR = Posterior(np.array([1.0, 0.0]), np.eye(2), np.ones(2))  # a KL of a half


def certify(rows, line=None, losses=lambda w, x: 0 * x):
    return certificate(
        KEYS[0], losses, line or SPLIT(), POSTERIOR, jnp.arange(9.0), rows, num_draws=2
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: prior(np.zeros(2), np.eye(2), 1.0), "Say what the prior was made from"),
        (
            lambda: prior(np.zeros(2), np.eye(2), 1.0, rows=[1], independent=True),
            "Say what the prior was made from",
        ),
        (lambda: prior(np.zeros(3), np.eye(2), 1.0, independent=True), r"must be \(3, dim\)"),
        (lambda: prior(np.zeros(2), np.eye(2), 0.0, independent=True), "scale must be positive"),
        (
            lambda: prior(np.zeros(2), np.eye(2), 1.0, rows=np.array([True, False])),
            r"take jnp.flatnonzero\(mask\)",
        ),
        (lambda: prior(np.zeros(2), np.eye(2), 1.0, rows=[-1]), "second name"),
        (lambda: certify([2, 3]), "made from 1 of the 2 rows of the bound"),
        (lambda: certify([-1]), "second name"),
        (lambda: certify([4, 4]), "none of them twice"),
        (lambda: certify([9]), "rows must be from 0 to 8"),
        (lambda: certify([]), "rows must be from 0 to 8"),
        (lambda: certify([4, 5], losses=lambda w, x: 0 * x - 1), "2 losses within 0 and 1"),
        (lambda: certify([4, 5], losses=lambda w, x: x / 0), "2 losses within 0 and 1"),
        (lambda: certify([4, 5], losses=lambda w, x: 0.0 * w[0]), "one for each row"),
        (lambda: modified_equation(jnp.sum, 0.1, order=3), "order must be an integer from 1 to 2"),
        (lambda: modified_equation(jnp.sum, 0.1, rho=0.1), "both leading_fn and a rho"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_what_cannot_be_raised_certifies_nothing():
    result = compiled(lambda c: certify([4, 5], losses=lambda w, x: c * x))(2.0)
    assert (result.bound, result.sqrt_bound) == (1, 1)
    result = compiled(lambda c: certify([4, 5], losses=lambda w, x: c * x))(0.0)
    assert result.bound < 1


def test_each_of_many_candidates_costs_its_share():
    many = FREE(num_candidates=20)
    one, of_twenty = (certify(range(9), line=line) for line in (FREE(), many))

    def spent(c):
        """The kl of the two bounds, which is what (KL + confidence) / n was."""
        q, p = float(c.empirical_bound), float(c.bound)
        return q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))

    assert spent(one) == pytest.approx((0.5 + np.log(2 * 3 / 0.025)) / 9)
    assert spent(of_twenty) - spent(one) == pytest.approx(np.log(20) / 9)
