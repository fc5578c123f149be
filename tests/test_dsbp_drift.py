"""The reference is a Gaussian with a likelihood, levels that hold, and a memory; and digits."""

import jax.numpy as jnp
import numpy as np
import pytest
from cheap import compiled
from scipy import linalg, stats
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from probbp.optim.dsbp import drift

SIZE, RANK = 6, 2
EXACT = compiled(drift.reference, static_argnums=1)
FOLLOW = compiled(drift.follow)
DISTANCE, OUTSIDE = compiled(drift.mahalanobis), compiled(drift.energy_outside)
P_VALUE, LIKELIHOOD = compiled(drift.p_value), compiled(drift.log_likelihood)
RECOLOUR = compiled(drift.recolour)
ANGLES = compiled(drift.principal_angles)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


MIX = normal(0, SIZE, SIZE) * np.array([4.0, 2.0, 0.3, 0.3, 0.2, 0.1])[:, None]


def activations(seed, n):
    return normal(seed, n, SIZE) @ MIX + 1.0


def dense(seen):
    """Return the covariance that a reference stands for."""
    basis = np.asarray(seen.basis)
    inside = basis * np.asarray(seen.variances) @ basis.T
    return inside + float(seen.noise) * (np.eye(len(basis)) - basis @ basis.T)


def drawn(seed, seen, n):
    return seen.mean + normal(seed, n, len(seen.mean)) @ np.linalg.cholesky(dense(seen)).T


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_reference_is_the_maximum_of_its_likelihood(dtype):
    x = activations(1, 200).astype(dtype)
    seen = EXACT(x, RANK)
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(seen.basis.T @ seen.basis, np.eye(RANK), atol=30 * eps)
    # scikit-learn's divides by n - 1 where the maximum of the likelihood has n.
    peer = PCA(RANK, svd_solver="full").fit(x.astype(float))
    np.testing.assert_allclose(dense(seen), peer.get_covariance() * 199 / 200, rtol=1e3 * eps)
    ours = LIKELIHOOD(seen, x)
    assert ours.dtype == dtype
    plain = stats.multivariate_normal(np.asarray(seen.mean), dense(seen)).logpdf(x)
    np.testing.assert_allclose(ours, plain, rtol=1e4 * eps)
    if dtype == "float64":
        for scale in (0.97, 1.03):
            worse = seen._replace(noise=scale * seen.noise)
            assert np.mean(LIKELIHOOD(worse, x)) < np.mean(ours)
            worse = seen._replace(variances=scale * seen.variances)
            assert np.mean(LIKELIHOOD(worse, x)) < np.mean(ours)


def test_distances_and_shares_agree_with_dense_matrices():
    x = activations(1, 200)
    seen = EXACT(x, RANK)
    y = activations(2, 5) + 3
    centred = y - np.asarray(seen.mean)
    plain = np.sum(centred @ np.linalg.inv(dense(seen)) * centred, 1)
    np.testing.assert_allclose(DISTANCE(seen, y), plain, rtol=1e-9)
    assert np.mean(DISTANCE(seen, x)) == pytest.approx(SIZE)
    basis = np.asarray(seen.basis)
    outside = centred - centred @ basis @ basis.T
    share = np.sum(outside**2, 1) / np.sum(centred**2, 1)
    np.testing.assert_allclose(OUTSIDE(seen, y), share, rtol=1e-9)
    mean = np.asarray(seen.mean)
    edge = np.stack([mean, mean + 1e-3 * basis[:, 0], *np.zeros((3, SIZE))])
    np.testing.assert_allclose(OUTSIDE(seen, edge)[:2], [0, 0], atol=1e-12)
    # Activations exactly of low rank still have a likelihood, and leave the subspace in full.
    flat = EXACT(x[:, :1] * np.ones(3), 1)
    assert np.isfinite(LIKELIHOOD(flat, x[0, :1] * np.ones(3)))
    assert P_VALUE(flat, flat.mean + np.array([1.0, -1.0, 0.0])) == 0


def test_the_level_holds_on_gaussian_activations_and_the_power_is_the_noncentral_law_s():
    n = 4_000
    seen = EXACT(activations(1, 200), RANK)
    p = np.asarray(P_VALUE(seen, drawn(3, seen, n)))
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    shift = np.linalg.cholesky(dense(seen)) @ np.full(SIZE, 0.9)
    p = np.asarray(P_VALUE(seen, drawn(4, seen, n) + shift))
    for level in (0.01, 0.1, 0.5):
        power = stats.ncx2(SIZE, SIZE * 0.81).sf(stats.chi2(SIZE).isf(level))
        assert abs(np.mean(p < level) - power) < 4 * np.sqrt(power * (1 - power) / n)


def test_angles_are_those_of_scipy_and_small_ones_are_exact():
    bases = [np.linalg.qr(normal(seed, 7, k))[0] for seed, k in ((0, 3), (1, 2), (2, 3))]
    for a, b in ((bases[0], bases[1]), (bases[1], bases[2]), (bases[0], bases[2])):
        np.testing.assert_allclose(ANGLES(a, b), linalg.subspace_angles(a, b)[::-1], rtol=1e-9)
    a, b = bases[0], bases[2]
    distance = np.linalg.norm(a @ a.T - b @ b.T)
    np.testing.assert_allclose(distance, np.sqrt(2) * np.linalg.norm(np.sin(ANGLES(a, b))))
    turned = a @ linalg.expm(normal(3, 3, 3) - normal(3, 3, 3).T)  # the same subspace
    np.testing.assert_allclose(ANGLES(a, turned), 0, atol=1e-14)
    small = np.array([[np.cos(1e-5)], [np.sin(1e-5)]], jnp.float32)
    np.testing.assert_allclose(ANGLES(np.eye(2, 1, dtype="float32"), small), 1e-5, rtol=1e-6)


def test_recolouring_gives_the_stream_the_moments_of_the_reference():
    seen, now = EXACT(activations(1, 200), RANK), EXACT(3 * activations(2, 200) - 1, RANK)
    stream = drawn(5, now, 50)
    back = np.asarray(RECOLOUR(stream, seen, now))
    np.testing.assert_allclose(DISTANCE(seen, back), DISTANCE(now, stream), rtol=1e-9)
    # What it does is affine: its matrix takes the one covariance to the other.
    zero = np.asarray(RECOLOUR(np.zeros(SIZE), seen, now))
    matrix = np.asarray(RECOLOUR(np.eye(SIZE), seen, now)) - zero
    np.testing.assert_allclose(matrix.T @ dense(now) @ matrix, dense(seen), atol=1e-9)
    np.testing.assert_allclose(RECOLOUR(now.mean, seen, now), seen.mean, atol=1e-12)


# ---------------------------------------------------------------------------------------
# Following a stream.


def angle(seen, vectors):
    return float(ANGLES(seen.basis, vectors)[-1])


def test_mean_and_trace_are_those_of_the_mixture_for_batches_of_any_size():
    seen = now = EXACT(activations(1, 200), RANK)
    mean, second = np.asarray(seen.mean), dense(seen) + np.outer(seen.mean, seen.mean)
    for batch in (activations(2, 30).reshape(5, 6, SIZE), activations(3, 1) + 2, activations(4, 7)):
        now = FOLLOW(now, batch, decay=0.7)
        rows = batch.reshape(-1, SIZE)
        mean = 0.7 * mean + 0.3 * rows.mean(0)
        second = 0.7 * second + 0.3 * rows.T @ rows / len(rows)
        np.testing.assert_allclose(now.mean, mean, rtol=1e-12)
        trace = np.trace(second) - mean @ mean
        np.testing.assert_allclose(np.trace(dense(now)), trace, rtol=1e-12)
        np.testing.assert_allclose(now.basis.T @ now.basis, np.eye(RANK), atol=1e-13)
        assert now.variances[0] >= now.variances[1]
    # With a rank that leaves one direction, and nothing to forget, it is the reference itself.
    x = activations(1, 200)
    whole = EXACT(x, SIZE - 1)
    np.testing.assert_allclose(dense(FOLLOW(whole, x)), dense(whole), rtol=1e-9, atol=1e-12)


def test_on_a_stream_that_stays_it_goes_to_the_leading_directions_at_the_rate_stated():
    x = activations(1, 400)
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    # A little off, the second direction towards the third.
    nearly, _ = np.linalg.qr(vectors[:, :-3:-1] + np.outer(vectors[:, -3], [0, 0.02]))
    for decay in (0.5, 0.9):
        now, angles = EXACT(x, RANK)._replace(basis=np.array(nearly)), []
        for _ in range(25):
            now = FOLLOW(now, x, decay)
            angles.append(angle(now, vectors[:, -2:]))
        rate = decay + (1 - decay) * values[-3] / values[-2]
        assert (angles[-1] / angles[4]) ** (1 / 20) == pytest.approx(rate, rel=1e-3)
    # From anywhere, with everything to be forgotten.
    now = drift.Reference(np.zeros(SIZE), np.eye(SIZE)[:, :RANK], np.ones(2), np.array(0.1))
    for _ in range(60):
        now = FOLLOW(now, x, 0.5)
    assert angle(now, vectors[:, -2:]) < 1e-9
    np.testing.assert_allclose(now.variances, values[:-3:-1], rtol=1e-9)
    np.testing.assert_allclose(now.noise, np.mean(values[:-2]), rtol=1e-9)


def test_on_a_stream_that_turns_it_lags_by_the_memory():
    """The plane's leading direction turns by w a batch: the angle behind is w times the memory."""
    turn, decay = 0.01, 0.8
    now = drift.Reference(np.zeros(3), np.eye(3, 1), np.ones(1) * 9.0, np.array(0.01))
    spread = np.array([3.0, 0.1, 0.1]) * np.vstack([np.eye(3), -np.eye(3)]) * np.sqrt(3)
    behind = []
    for t in range(1, 61):
        c, s = np.cos(turn * t), np.sin(turn * t)
        rotation = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
        now = FOLLOW(now, spread @ rotation, decay)
        behind.append(angle(now, rotation[:1].T))
    memory = decay / (1 - decay)  # 0, 1, 2 ... batches behind, with weights (1 - b) b^i
    assert behind[-1] == pytest.approx(turn * memory, rel=0.05)


# ---------------------------------------------------------------------------------------
# Real data.


def test_on_digits_it_sees_what_the_length_of_activations_does_not():
    data = load_digits()
    x = data.data / 16
    turned = np.rot90(data.images, axes=(1, 2)).reshape(-1, 64) / 16  # the same pixels
    layer = normal(6, 64, 50) / 8
    hidden, hidden_turned = (np.maximum(a @ layer, 0) for a in (x, turned))
    seen = EXACT(hidden[:900], 20)

    def auc(score):
        normal_ones, others = score(hidden[900:]), score(hidden_turned[900:])
        labels = np.r_[np.zeros(len(normal_ones)), np.ones(len(others))]
        return roc_auc_score(labels, np.r_[normal_ones, others])

    length = auc(lambda a: np.linalg.norm(a, axis=1))
    # For scores without power the area has a standard deviation of some 0.29 sqrt(2 / n).
    sd = 0.29 * (2 / 897) ** 0.5
    for score in (DISTANCE, OUTSIDE):
        assert auc(lambda a, score=score: np.asarray(score(seen, a))) > max(length, 0.5) + 6 * sd
    surprise = auc(lambda a: -np.asarray(LIKELIHOOD(seen, a)))
    assert surprise == pytest.approx(auc(lambda a: np.asarray(DISTANCE(seen, a))))


def test_on_digits_a_change_of_light_is_taken_back_without_labels():
    data = load_digits()
    x, y = data.data / 16, data.target
    kernel = np.linalg.lstsq(np.c_[x[:900], np.ones(900)], np.eye(10)[y[:900]])[0]

    def accuracy(images):
        return np.mean(np.argmax(images @ kernel[:-1] + kernel[-1], 1) == y[900:])

    # Each pixel's light and contrast change, as with another scanner.
    rng = np.random.default_rng(7)
    dimmed = x[900:] * rng.uniform(0.3, 1.7, 64) + rng.normal(size=64) / 4
    seen, now = EXACT(x[:900], 30), EXACT(dimmed, 30)
    clean, before = accuracy(x[900:]), accuracy(dimmed)
    centred = accuracy(dimmed - np.asarray(now.mean) + np.asarray(seen.mean))
    recoloured = accuracy(np.asarray(RECOLOUR(dimmed, seen, now)))
    sd = (0.25 / 897) ** 0.5
    assert before + 6 * sd < centred
    assert before + 6 * sd < recoloured <= clean


SEEN = drift.Reference(np.zeros(SIZE), np.eye(SIZE)[:, :RANK], np.ones(RANK), np.array(0.1))
REFUSED = {
    "from 0 to 2, got 3. Of the 3 units": lambda: drift.reference(np.ones((5, 3)), 3),
    "got -1": lambda: drift.reference(np.ones((5, 3)), -1),
    r"decay must be in \(0, 1\), got 1": lambda: drift.follow(SEEN, np.ones((5, SIZE)), 1.0),
    "take `reference` of the batch": lambda: drift.follow(SEEN, np.ones((5, SIZE)), 0.0),
    "activations have 5": lambda: drift.follow(SEEN, np.ones((5, 5))),
    "Two bases of one space": lambda: drift.principal_angles(np.eye(3), np.eye(4)),
}


@pytest.mark.parametrize(("message", "call"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_is_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()
