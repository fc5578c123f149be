"""Dendrites: the layer and its switches, probes, the local search, evidence and tests of it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from cheap import compiled, key_of
from jax.test_util import check_grads

import probbp
from probbp.ops import dendrites as ops
from probbp.ops.dendrites import Candidate, Dendrites

KEY = key_of(0)
SWITCHES = [(freeze, perforate) for freeze in (False, True) for perforate in (False, True)]


def normal(seed, *shape, dtype=jnp.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def with_zeros(array, *where):
    array = array.copy()
    array[where] = 0
    return array


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def branches(seed, slots, *kernel, dtype=jnp.float64):
    """Return dendrites with random entries everywhere, above the diagonal too."""
    n = kernel[-1]
    shapes = (slots, *kernel), (slots, n), (slots, slots, n), (slots, n)
    leaves = [normal(seed + i, *shape, dtype=dtype) for i, shape in enumerate(shapes)]
    return Dendrites(*leaves, (normal(seed + 9, slots, n) > -0.5).astype(dtype))


X, W, B = normal(1, 7, 4), normal(2, 4, 3), normal(3, 3)


def by_hand(x, kernel, bias, there):
    """The equation, neuron by neuron and dendrite by dendrite."""
    z = np.array(x @ kernel + bias)
    for p, i in np.ndindex(z.shape):
        said = []
        for k in range(len(there.bias)):
            s = x[p] @ there.kernel[k, :, i] + there.bias[k, i]
            s += sum(there.cascade[k, j, i] * said[j] for j in range(k))
            said.append(there.mask[k, i] * np.tanh(s))
            z[p, i] += there.weight[k, i] * said[k]
    return z


# ---------------------------------------------------------------------------------------
# The layer.


def test_the_layer_is_its_equation():
    there = branches(5, 3, 4, 3)
    z = compiled(ops.dense)(X, W, B, there)
    np.testing.assert_allclose(z, by_hand(X, W, B, there), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "how", [compiled, pytest.param(lambda fun: fun, marks=pytest.mark.slow, id="to the bit")]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(("freeze", "perforate"), SWITCHES)
def test_without_dendrites_it_is_the_plain_layer(freeze, perforate, dtype, how):
    """Operation by operation to the bit; of one program each sum may round in another order."""
    x, kernel, bias = (leaf.astype(dtype) for leaf in (X, W, B))
    masked = branches(5, 2, 4, 3, dtype=dtype)
    masked = masked._replace(mask=np.zeros_like(masked.mask))

    def loss(layer, x, kernel, bias):
        return jnp.sum(jnp.sin(layer(x, kernel, bias)))

    def derivatives(*arrays):
        layers = [
            partial(ops.dense, dendrites=there, freeze=freeze, perforate=perforate)
            for there in (None, ops.empty(kernel), masked)
        ]
        layers.append(lambda x, w, b: x @ w + b)
        return [jax.value_and_grad(partial(loss, f), (0, 1, 2))(*arrays) for f in layers]

    *found, expected = how(derivatives)(x, kernel, bias)
    tolerance = 0 if how is not compiled else 16 * float(jnp.finfo(dtype).eps)
    for actual in found:
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert a.dtype == dtype
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_growing_changes_nothing(dtype):
    """From none, and into a waiting slot, to the bit; beside others, but for rounding."""
    x, kernel, bias = (leaf.astype(dtype) for leaf in (X, W, B))
    there = branches(5, 3, 4, 3, dtype=dtype)
    there = there._replace(mask=with_zeros(there.mask, 2))
    candidate = Candidate(kernel, bias, normal(6, 3, 3, dtype=dtype))
    first = candidate._replace(cascade=np.zeros((0, 3), dtype))
    layer = compiled(ops.dense)
    for before, after in (
        (ops.empty(kernel), ops.grow(ops.empty(kernel), first)),
        (there, compiled(partial(ops.grow, slot=2))(there, candidate)),
    ):
        z = layer(x, kernel, bias, before)
        np.testing.assert_array_equal(layer(x, kernel, bias, after), z)
    more = ops.grow(there, candidate)
    assert more.kernel.shape == (4, 4, 3)
    np.testing.assert_allclose(
        layer(x, kernel, bias, more), z, rtol=0, atol=50 * jnp.finfo(dtype).eps
    )


def test_waiting_slots_and_appended_ones_agree():
    masks = np.array([1.0, 0, 1]), np.array([1.0, 1, 0])

    def loss(there):
        return jnp.sum(jnp.sin(ops.dense(X, W, B, there)))

    @compiled
    def everything():
        static, waiting = ops.empty(W), ops.empty(W, slots=3)
        for slot, mask in enumerate(masks):
            candidate = Candidate(normal(slot, 4, 3), normal(slot + 5, 3), normal(slot + 7, 3, 3))
            weight = normal(slot + 9, 3)
            waiting = ops.grow(waiting, candidate, mask, weight, slot=slot)
            candidate = candidate._replace(cascade=candidate.cascade[:slot])
            static = ops.grow(static, candidate, mask, weight)
        return [(there, jax.value_and_grad(loss)(there)) for there in (static, waiting)]

    (static, (value, slope)), (waiting, (value_2, slope_2)) = everything()
    np.testing.assert_allclose(value, value_2, rtol=1e-13)
    for a, b in zip(slope[:2], slope_2[:2], strict=True):
        np.testing.assert_allclose(a, b[:2], rtol=0, atol=1e-12)
        np.testing.assert_array_equal(b[2], 0)
    # m + 2 numbers for each of four dendrites, and one cascade: neuron 0 has two.
    assert ops.num_params(static) == ops.num_params(waiting) == 4 * 6 + 1


@pytest.mark.parametrize(("freeze", "perforate"), SWITCHES)
def test_the_switches_cut_what_they_say_and_no_more(freeze, perforate):
    there, target = branches(5, 2, 4, 3), normal(4, 7, 3)

    def loss(x, kernel, there, **switches):
        return jnp.sum((ops.dense(x, kernel, B, there, **switches) - target) ** 2) / 2

    options = {"freeze": freeze, "perforate": perforate}
    tangent = jax.tree.map(np.cos, (X, there))

    @compiled
    def everything(x, kernel, there):
        cut, full = (
            jax.grad(partial(loss, **o), (0, 1, 2))(x, kernel, there) for o in (options, {})
        )
        forward = jax.jvp(lambda x, t: loss(x, kernel, t, **options), (x, there), tangent)[1]
        return cut, full, forward, ops.dense(x, kernel, B, there) - target, ops.outputs(x, there)

    (dx, dw, own), (full_dx, _, full), slope, error, outputs = everything(X, W, there)
    np.testing.assert_allclose(dw, X.T @ error, rtol=1e-12)
    np.testing.assert_allclose(own.weight, np.sum(error * outputs, 1), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(dx, error @ W.T if perforate else full_dx, rtol=1e-12)
    for name in ("kernel", "bias", "cascade"):
        expected = getattr(full, name)
        np.testing.assert_allclose(
            getattr(own, name), 0 * expected if freeze else expected, rtol=1e-13, atol=0
        )
    np.testing.assert_array_equal(own.mask, 0)
    # Forward mode is the transpose.
    expected = np.vdot(flat((dx, own)), flat(tangent))
    np.testing.assert_allclose(slope, expected, rtol=1e-12)


def test_uncut_it_is_the_true_gradient():
    there = branches(5, 2, 4, 3)
    fun = lambda x, kernel, there: ops.dense(
        x, kernel, B, there._replace(mask=jax.lax.stop_gradient(there.mask))
    )
    fixed = there.mask
    uncut = jax.jit(lambda x, k, *t: fun(x, k, Dendrites(*t, fixed)))
    check_grads(uncut, (X, W, *there[:4]), order=1)


def test_the_cascade_hears_only_earlier_dendrites():
    there = branches(5, 3, 4, 3)._replace(mask=np.ones((3, 3)))
    jacobian = compiled(jax.jacobian(lambda g: ops.outputs(X, there._replace(cascade=g))))(
        there.cascade
    )
    heard = jnp.any(jacobian != 0, axis=1)  # (slot, neuron, slot, slot, neuron)
    for k, i, a, j, i2 in np.ndindex(heard.shape):
        # Dendrite k hears dendrite j through Gamma_kj, and an earlier a's Gamma through a.
        assert heard[k, i, a, j, i2] == (i == i2 and j < a <= k)


def test_a_convolution_with_a_window_of_one_is_dense():
    there = branches(5, 2, 4, 3)
    images = normal(1, 2, 5, 6, 4)
    wide = there._replace(kernel=there.kernel[:, None, None])
    z, dense = compiled(
        lambda: (
            ops.conv_general_dilated(images, W[None, None], (1, 1), "SAME", B, wide),
            ops.dense(images, W, B, there),
        )
    )()
    np.testing.assert_allclose(z, dense, rtol=0, atol=1e-12)


def test_a_convolution_is_a_dense_layer_of_its_windows_in_any_layout():
    there, kernel = branches(5, 2, 3, 2, 4, 3), normal(2, 3, 2, 4, 3)
    images = normal(1, 2, 5, 6, 4)
    channels_first = images.transpose(0, 3, 1, 2)

    def turned(kernel):
        return jnp.moveaxis(kernel, -2, -4).reshape(*kernel.shape[:-4], -1, 3)

    @compiled
    def everything():
        args = kernel, (2, 1), "VALID", B, there
        windows = jax.lax.conv_general_dilated_patches(
            channels_first, (3, 2), (2, 1), "VALID"
        ).transpose(0, 2, 3, 1)  # channels before the window
        same = there._replace(kernel=turned(there.kernel))
        return (
            ops.conv_general_dilated(images, *args),
            ops.dense(windows, turned(kernel), B, same),
            ops.conv_general_dilated(
                channels_first, *args, dimension_numbers=("NCHW", "HWIO", "NCHW")
            ),
        )

    z, dense, first = everything()
    np.testing.assert_allclose(z, dense, rtol=0, atol=1e-11)
    np.testing.assert_allclose(first.transpose(0, 2, 3, 1), z, rtol=0, atol=1e-12)


def test_vmap_is_a_loop():
    each = [branches(seed, 2, 4, 3) for seed in (1, 2)]
    there = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    xs, kernels = normal(1, 2, 7, 4), normal(2, 2, 4, 3)
    z, ones = compiled(
        lambda: (
            jax.vmap(lambda x, k, t: ops.dense(x, k, B, t))(xs, kernels, there),
            [ops.dense(xs[i], kernels[i], B, each[i]) for i in range(2)],
        )
    )()
    np.testing.assert_allclose(z, np.stack(ones), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------
# The candidate that learns in the same backward pass.


def test_the_live_candidate_climbs_its_covariance():
    there, target = branches(5, 2, 4, 3), normal(4, 7, 3)
    candidate = Candidate(normal(6, 4, 3), normal(7, 3), normal(8, 2, 3))

    def loss(x, kernel, there, candidate, sign):
        z = ops.dense(x, kernel, B, there)
        if candidate is not None:
            z = ops.live(z, x, there, candidate, sign)
        return jnp.mean((z - target) ** 2) / 2

    def covariances(candidate):
        z = ops.dense(X, W, B, there)
        error = (z - target) / z.size
        d = ops.outputs(X, ops.grow(there, candidate))[-1]
        return jnp.sum((d - d.mean(0)) * (error - error.mean(0)), 0)

    @compiled
    def everything():
        own = covariances(candidate)
        arguments = X, W, there, candidate, jnp.sign(own)
        tangent = jax.tree.map(jnp.cos, arguments)
        _, slope = jax.jvp(loss, arguments, tangent)
        climbing = jax.grad(lambda c: -jnp.sum(jnp.abs(covariances(c))))(candidate)
        plain = jax.value_and_grad(loss, (0, 1, 2))(X, W, there, None, None)
        ours = jax.value_and_grad(loss, (0, 1, 2, 3, 4))(*arguments)
        return ours, plain, climbing, own, slope, tangent

    (value, slopes), (plain, plain_slopes), climbing, own, slope, tangent = everything()
    np.testing.assert_allclose(value, plain, rtol=1e-14)
    for a, b in zip(jax.tree.leaves(slopes[:3]), jax.tree.leaves(plain_slopes), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-14)
    for a, b in zip(slopes[3], climbing, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-14)
    np.testing.assert_allclose(slopes[4], -own, rtol=0, atol=1e-14)
    np.testing.assert_allclose(slope, np.vdot(flat(slopes), flat(tangent)), rtol=1e-10)


# ---------------------------------------------------------------------------------------
# Probes.


def network(params, x, layer):
    """A convolution with channels first, and a dense layer."""
    linear = partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NCHW", "HWIO", "NCHW"),
    )
    hidden = jnp.tanh(layer("conv", x, params[0], linear=linear, axis=1))
    return layer("out", hidden.reshape(len(x), -1), params[1])


def test_errors_are_the_gradient_of_each_neuron():
    """With them the gradient of every weight is a product: no other errors give all of these."""
    params = normal(1, 3, 3, 2, 4), normal(2, 4 * 25, 3)
    x, y = normal(3, 6, 2, 5, 5), normal(4, 6, 3)
    there = {"conv": branches(5, 1, 3, 3, 2, 4)}

    def loss(params, there, layer=None):
        z = network(params, x, layer or ops.grown(there))
        return jnp.sum(jnp.cos(z - y))

    @compiled
    def both(params, there):
        seen = ops.observe(partial(loss, params, there), ops.grown(there))
        return seen, jax.value_and_grad(loss, (0, 1))(params, there)

    (value, seen), (expected, (slopes, own)) = both(params, there)
    np.testing.assert_allclose(value, expected)
    assert seen["conv"].errors.shape == (6, 5, 5, 4)
    conv, out = seen["conv"], seen["out"]
    np.testing.assert_allclose(
        np.einsum("bhwm,bhwn->mn", *conv), slopes[0].reshape(-1, 4), rtol=0, atol=1e-10
    )
    np.testing.assert_allclose(out.inputs.T @ out.errors, slopes[1], rtol=0, atol=1e-10)
    d = compiled(ops.outputs)(conv.inputs, ops.flat(there["conv"]))[0]
    np.testing.assert_allclose(
        contributions(d, conv.errors).sum(0), own["conv"].weight[0], rtol=0, atol=1e-10
    )
    # An example's error does not know the others.
    alone = compiled(lambda: network(params, x[:1], ops.grown(there)))()
    np.testing.assert_allclose(out.errors[0], -np.sin(alone - y[:1])[0], atol=1e-12)


def test_sensitivities_are_roots_of_the_gauss_newton_matrix():
    params, x = (normal(1, 4, 3), normal(2, 3, 5)), normal(3, 6, 4)

    def mlp(layer):
        return layer("out", jnp.tanh(layer("hidden", x, params[0])), params[1])

    @compiled
    def everything():
        p = jax.nn.softmax(mlp(ops.grown({})))
        factor = jax.vmap(lambda p: jnp.diag(jnp.sqrt(p)) - jnp.outer(p, jnp.sqrt(p)))(p)
        roots = ops.sensitivities(mlp, ops.grown({}), factor)
        hidden = x @ params[0]
        jacobian = jax.vmap(jax.jacobian(lambda z: jnp.tanh(z) @ params[1]))(hidden)
        return roots["hidden"], jacobian, jax.vmap(lambda p: jnp.diag(p) - jnp.outer(p, p))(p)

    roots, jacobian, curvature = everything()
    np.testing.assert_allclose(
        np.einsum("api,apj->pij", roots, roots),
        np.einsum("pai,pab,pbj->pij", jacobian, curvature, jacobian),
        atol=1e-12,
    )


# ---------------------------------------------------------------------------------------
# Scores and the local search.

orthogonalise, score_test, false_discovery = map(
    compiled, (ops.orthogonalise, ops.score_test, ops.false_discovery)
)
log_evidence_gain, joint_log_evidence_gain, prune = map(
    compiled, (ops.log_evidence_gain, ops.joint_log_evidence_gain, ops.prune)
)
elbo_change, laplace = compiled(ops.elbo_change), compiled(ops.laplace)
contributions, gain = compiled(ops.contributions), compiled(ops.gain)
correlation, covariance = compiled(ops.correlation), compiled(ops.covariance)


def test_scores_are_what_they_say():
    d, errors, h = normal(1, 50, 3), normal(2, 50, 3), normal(3, 50, 3) ** 2
    expected = [abs(np.corrcoef(d[:, i], errors[:, i])[0, 1]) for i in range(3)]
    np.testing.assert_allclose(correlation(d, errors), expected, rtol=1e-10)
    affine = correlation(2 - 3 * d, 5 * errors + 1)
    np.testing.assert_allclose(affine, expected, rtol=1e-10)
    np.testing.assert_allclose(covariance(-d, errors), covariance(d, errors))
    np.testing.assert_allclose(
        covariance(d, errors), np.array(expected) * np.std(d, axis=0), rtol=1e-10
    )
    for i, best in enumerate(gain(d, errors, h)):
        v = np.linspace(-3, 3, 60_001)
        fall = -v * np.mean(errors * d, 0)[i] - v**2 / 2 * np.mean(h * d**2, 0)[i]
        np.testing.assert_allclose(best, fall.max(), rtol=0, atol=1e-8)  # steps of 1e-4


def test_the_slope_of_the_covariance_is_the_papers():
    """dS/dU = sign * sum (delta - mean) phi'(s) x, with the means as constants."""
    error = normal(2, 7, 3)

    def total(kernel):
        d = jnp.tanh(X @ kernel)
        return jnp.sum(len(X) * ops.covariance(d, error) * jnp.std(error, axis=0))

    d = np.tanh(X @ W)
    centred = error - error.mean(0)
    signs = np.sign(np.sum(centred * d, 0))
    expected = signs * (X.T @ (centred * (1 - d**2)))
    np.testing.assert_allclose(compiled(jax.grad(total))(W), expected, rtol=0, atol=1e-12)


def rows(x, errors):
    return ops.rows(ops.Observation(x, errors), ops.empty(np.zeros((x.shape[1], errors.shape[1]))))


search = compiled(partial(ops.search, optimizer=optax.adam(0.05), num_candidates=4, num_steps=120))


def test_a_planted_branch_is_found():
    """Teachers z = w.x + v tanh(u.x), one a neuron; the base is the best linear layer."""
    num, m, n = 400, 5, 3
    x = normal(1, 3 * num, m) * np.arange(1, m + 1) + 2
    direction = normal(2, m, n) / np.arange(1, m + 1)[:, None]
    direction = 2 * direction / np.linalg.norm(direction * np.arange(1, m + 1)[:, None], axis=0)
    noise = 0.1 * normal(5, 3 * num, n)
    y = x @ normal(3, m, n) + np.tanh((x - 2) @ direction) + noise
    design = np.concatenate([x, np.ones_like(x[:, :1])], 1)
    errors = design @ np.linalg.lstsq(design[:num], y[:num], rcond=None)[0] - y
    found = search(KEY, rows(x[:num], errors[:num]), rows(x[num:-num], errors[num:-num]))
    u = found.candidate.kernel
    cosine = np.sum(u * direction, 0) / np.linalg.norm(u, axis=0)
    assert np.all(np.abs(cosine) / np.linalg.norm(direction, axis=0) > 0.95)
    # With it the best fit of fresh rows is down at the noise: 0.01 within 4 of its standard errors,
    # and a fiftieth of what was there, for a direction that is not quite right.
    d = np.tanh(x @ u + found.candidate.bias)
    fresh = slice(-num, None)
    for i in range(n):
        columns = np.concatenate([design[fresh], d[fresh, i : i + 1]], 1)
        left = y[fresh, i] - columns @ np.linalg.lstsq(columns, y[fresh, i], rcond=None)[0]
        there = errors[fresh, i].var()
        assert left.var() < 0.01 * (1 + 4 * (2 / num) ** 0.5) + there / 50
        assert there > 0.05
    _, p_values = score_test(orthogonalise(d[fresh], x[fresh]), errors[fresh])
    assert np.all(p_values < 1e-10)


def test_where_nothing_is_left_nothing_is_found():
    """400 neurons with pure noise: the score test has its level, and evidence takes hardly any."""
    num, n = 200, 400
    x, y = normal(1, 3 * num, 3), normal(2, 3 * num, n)
    design = np.concatenate([x, np.ones_like(x[:, :1])], 1)
    # Fitted to the first third, the layer errs along its inputs in the others: a test has its level
    # with `orthogonalise` alone.
    errors = design @ np.linalg.lstsq(design[:num], y[:num], rcond=None)[0] - y
    found = compiled(
        partial(ops.search, optimizer=optax.adam(0.05), num_candidates=2, num_steps=20)
    )(KEY, rows(x[:num], errors[:num]), rows(x[num:-num], errors[num:-num]))
    fresh = slice(-num, None)
    d = np.tanh(x[fresh] @ found.candidate.kernel + found.candidate.bias)
    d = orthogonalise(d, x[fresh])
    _, p_values = score_test(d, errors[fresh])
    for level in (0.05, 0.2):
        expected = scipy.stats.binom(n, level)
        count = int((p_values < level).sum())
        assert expected.ppf(0.001) <= count <= expected.ppf(0.999)
    # An occasional false rejection is allowed to a procedure of this level.
    assert false_discovery(p_values, 0.01).sum() <= 2
    # One neuron's evidence: a false gain is above 0 where T > log(1 + H tau^2), about 5.
    curvature = np.sum(d**2, 0)
    gains = log_evidence_gain(-np.sum(errors[fresh] * d, 0), curvature, 1.0)
    threshold = np.log1p(curvature) * (1 + 1 / curvature)
    expected = scipy.stats.chi2(1).sf(np.asarray(threshold))
    spread = np.sqrt(np.sum(expected * (1 - expected)))
    assert abs(int((gains > 0).sum()) - expected.sum()) < 4 * spread + 1


def test_orthogonalise_leaves_what_a_regression_leaves():
    x, d, h = normal(1, 50, 4) + 3, normal(2, 50, 2), normal(3, 50, 2) ** 2
    x = with_zeros(x, slice(None), 3)  # an input that says nothing
    design = np.concatenate([x[:, :3], np.ones((50, 1))], 1)
    left = d - design @ np.linalg.lstsq(design, d)[0]
    np.testing.assert_allclose(orthogonalise(d, x), left, rtol=0, atol=1e-8)
    for i, weighted in enumerate(orthogonalise(d, x, h).T):
        root = np.sqrt(h[:, i])
        coefficients = np.linalg.lstsq(root[:, None] * design, root * d[:, i])[0]
        np.testing.assert_allclose(weighted, d[:, i] - design @ coefficients, rtol=0, atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("level", [0.05, 0.5])
def test_false_discovery_is_that_of_scipy(seed, level):
    p_values = np.random.default_rng(seed).uniform(size=30) ** 3
    adjusted = scipy.stats.false_discovery_control(np.asarray(p_values))
    np.testing.assert_array_equal(false_discovery(p_values, level), adjusted <= level)


# ---------------------------------------------------------------------------------------
# Evidence.


def linear_gaussian(seed, tau, sigma=0.7, num=40, n=5):
    """Return y, D of a conjugate model, and the log Bayes factor of columns against none."""
    d = normal(seed, num, n) @ (np.eye(n) + 0.5)
    y = d @ np.array([0.6, 0, -0.6, 0, 0]) + sigma * normal(seed + 2, num)

    def log_bayes_factor(columns):
        covariance = sigma**2 * np.eye(num) + tau**2 * d[:, columns] @ d[:, columns].T
        with_them = scipy.stats.multivariate_normal(np.zeros(num), covariance)
        without = scipy.stats.multivariate_normal(np.zeros(num), sigma**2 * np.eye(num))
        return with_them.logpdf(y) - without.logpdf(y)

    errors = -y / sigma**2
    gradient = -contributions(d, errors[:, None]).sum(0)
    return gradient, d.T @ d / sigma**2, log_bayes_factor


@pytest.mark.parametrize("tau", [0.3, 1.0, 10.0])
def test_evidence_is_the_exact_bayes_factor_where_all_is_gaussian(tau):
    gradient, curvature, log_bayes_factor = linear_gaussian(1, tau)
    single = log_evidence_gain(gradient, jnp.diag(curvature), tau)
    expected = [log_bayes_factor([i]) for i in range(5)]
    np.testing.assert_allclose(single, expected, rtol=0, atol=1e-10)
    joint = joint_log_evidence_gain(gradient, curvature, tau)
    np.testing.assert_allclose(joint, log_bayes_factor(list(range(5))), rtol=0, atol=1e-10)

    mask, gains = compiled(ops.greedy)(gradient, curvature, tau)
    taken = np.flatnonzero(mask)
    assert len(taken)
    np.testing.assert_allclose(gains.sum(), log_bayes_factor(taken), rtol=0, atol=1e-10)
    # The first is the best alone, and no other would add to those that are taken.
    first = np.argmax(expected)
    np.testing.assert_allclose(gains[first], expected[first], rtol=0, atol=1e-10)
    for i in set(range(5)) - set(taken.tolist()):
        assert log_bayes_factor([*taken, i]) <= log_bayes_factor(taken)
    # At any other weights the same is found: the quadratic is the same.
    weight = normal(9, 5)
    kept = prune(gradient - curvature @ weight, curvature, weight, tau)
    np.testing.assert_array_equal(kept, mask)


def test_the_elbo_changes_by_the_formula():
    """Against the expectation over draws of the weight, in a Gaussian model."""
    gradient, curvature, _ = linear_gaussian(1, 1.0)
    g, h, tau = gradient[0], curvature[0, 0], 1.5
    loc, scale = laplace(g, h, tau)
    np.testing.assert_allclose(
        elbo_change(loc, scale, g, h, tau), log_evidence_gain(g, h, tau), atol=1e-10
    )
    loc, scale = np.array(0.1), np.array(0.05)
    v = loc + scale * normal(3, 100_000)
    density = scipy.stats.norm.logpdf
    draws = g * v - h * v**2 / 2 + density(v, 0, tau) - density(v, loc, scale)
    error = draws.std() / len(v) ** 0.5
    assert abs(draws.mean() - elbo_change(loc, scale, g, h, tau)) < 4 * error


# ---------------------------------------------------------------------------------------
# Inside samplers.


def test_mala_stays_exact_with_a_perforated_force():
    """Moments by quadrature, and from chains that a cut gradient drives."""
    x, y = normal(1, 12, 2), normal(2, 12, 1)
    there = branches(6, 1, 1, 1)._replace(mask=np.ones((1, 1)), weight=np.full((1, 1), 2.0))

    def logdensity_fn(position, perforate=True):
        hidden = jnp.tanh(x @ position[:, None])
        z = ops.dense(hidden, jnp.ones((1, 1)), None, there, freeze=True, perforate=perforate)
        return -jnp.sum((z - y) ** 2) / 2 - jnp.sum(position**2) / 2

    axis = np.linspace(-6, 6, 241)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    mala = probbp.mala(logdensity_fn, step_size=0.3)

    def chain(key):
        def step(state, key):
            state, _ = mala.step(key, state)
            return state, state.position

        state = mala.init(jnp.zeros(2), key)
        positions = jax.lax.scan(step, state, jax.random.split(key, 1500))[1][300:]
        return jnp.concatenate([positions, positions**2], -1).mean(0)

    @compiled
    def everything(rng_key):
        cut = jax.grad(logdensity_fn)(jnp.ones(2))
        true = jax.grad(partial(logdensity_fn, perforate=False))(jnp.ones(2))
        weights = jax.nn.softmax(jax.lax.map(logdensity_fn, grid, batch_size=4096))
        return cut, true, weights, jax.vmap(chain)(jax.random.split(rng_key, 64))

    cut, true, weights, means = everything(KEY)
    assert np.linalg.norm(cut - true) > 0.1 * np.linalg.norm(true)
    expected = weights @ np.concatenate([grid, grid**2], -1)
    standard_error = means.std(0, ddof=1) / 64**0.5
    # Four moments, Student's t with 63 degrees of freedom: 4.5 has a probability of 1e-4.
    assert np.all(np.abs(means.mean(0) - expected) < 4.5 * standard_error)


# ---------------------------------------------------------------------------------------
# Doors.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.empty(B), "neurons"),
        (lambda: ops.dense(X, W, B, branches(1, 1, 4, 2)), "empty"),
        (lambda: ops.grow(ops.empty(W), Candidate(W, B, np.zeros((1, 3)))), "cascade"),
        (
            lambda: ops.conv_general_dilated(
                X, W, (1,), "SAME", dimension_numbers=("NWC", "OWI", "NWC")
            ),
            "transpose",
        ),
        (
            lambda: ops.observe(
                lambda layer: jnp.sum(layer("a", layer("a", X, W @ W.T), W)), ops.grown({})
            ),
            "twice",
        ),
    ],
)
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()
