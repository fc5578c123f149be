"""Ranks and widths from spectra: known answers, exhaustive searches, and digits."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap import compiled
from scipy import integrate
from sklearn.datasets import load_digits

from probbp.optim.dsbp.architecture import (
    allocate,
    effective_rank,
    energy_rank,
    in_series,
    marchenko_pastur_median,
    noise_threshold,
    select_units,
    stable_rank,
)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


# spectrum -> effective, stable, 99 % and 100 % energy rank
SPECTRA = {
    "equal": ([2.0] * 5, 5, 5, 5, 5),
    "with zeros": ([0.0, 3.0, 0.0, 3.0], 2, 2, 2, 2),
    "two sizes": ([9.0, 1.0], math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1)), 10 / 9, 2, 2),
    "a tail": (
        [95.0] + [1.0] * 5,
        math.exp(0.05 * math.log(100) - 0.95 * math.log(0.95)),
        100 / 95,
        5,
        6,
    ),
    "nothing": ([0.0, 0.0], 0, 0, 0, 0),
}


@jax.jit
def ranks(spectrum):
    return (
        effective_rank(spectrum),
        stable_rank(spectrum),
        energy_rank(spectrum),
        energy_rank(spectrum, share=1.0),
    )


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, "float64") for name in SPECTRA] + [("equal", "float32")]
)
def test_ranks_of_known_spectra(name, dtype):
    effective, *expected = SPECTRA[name][1:]
    spectrum = np.array(SPECTRA[name][0], dtype)
    rtol = 10 * float(jnp.finfo(dtype).eps)
    for some in (spectrum, 7 * spectrum[::-1]):
        first, *others = ranks(some)
        assert first.dtype == dtype
        np.testing.assert_allclose(first, effective, rtol=rtol)
        np.testing.assert_allclose(others, expected, rtol=rtol)


def test_ranks_of_random_spectra_agree_with_the_plain_definition_and_batch():
    spectra = normal(0, 6, 9) ** 2
    for share in (0.3, 0.9, 0.999):
        plain = []
        for spectrum in spectra:
            kept = np.cumsum(np.sort(spectrum)[::-1]) / np.sum(spectrum)
            plain.append(1 + np.argmax(kept >= share))
        assert energy_rank(np.array(spectra), share).tolist() == plain
    entropy = [-np.sum(p * np.log(p)) for p in spectra / spectra.sum(1, keepdims=True)]
    np.testing.assert_allclose(compiled(effective_rank)(spectra), np.exp(entropy), rtol=1e-12)
    np.testing.assert_allclose(stable_rank(spectra), spectra.sum(1) / spectra.max(1))


@pytest.mark.parametrize("ratio", [0.05, 0.4, 0.9, 1.0])
def test_half_of_the_marchenko_pastur_law_lies_below_its_median(ratio):
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2

    def density(angle):  # t = middle - half cos(angle), so that no end is singular
        t = (low + high) / 2 - (high - low) / 2 * math.cos(angle)
        return ((high - low) / 2 * math.sin(angle)) ** 2 / (2 * math.pi * ratio * max(t, 1e-300))

    median = marchenko_pastur_median(ratio)
    angle = math.acos(((low + high) / 2 - median) / ((high - low) / 2))
    below, _ = integrate.quad(density, 0, angle)
    total, _ = integrate.quad(density, 0, math.pi)
    assert abs(total - 1) < 1e-6
    assert abs(below - 0.5) < 1e-6
    # Gavish and Donoho's own approximation of omega, which they give to 0.02.
    omega = noise_threshold(np.ones(10), (10, round(10 / ratio)))
    beta = 10 / round(10 / ratio)
    assert abs(omega - (0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43)) < 0.03


@pytest.mark.parametrize("shape", [(60, 60), (40, 120)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_threshold_finds_the_rank_in_noise_of_any_scale(shape, scale):
    n, m = shape
    for seed in range(0, 30, 10):
        keys = range(seed, seed + 3)
        left, right = np.linalg.qr(normal(keys[0], n, 4))[0], np.linalg.qr(normal(keys[1], m, 4))[0]
        # Twice the edge of the noise, and as much more.
        sizes = (2 + np.arange(4)) * (n**0.5 + m**0.5)
        matrix = scale * (left * sizes @ right.T + normal(keys[2], n, m))
        values = jnp.linalg.svd(matrix, compute_uv=False)
        assert int(np.sum(values > noise_threshold(values, shape))) == 4


SHAPES = [(8, 6), (6, 6), (6, 3)]


def best_error(spectra, shapes, budget, uses):
    """Return the least error of all combinations of ranks."""
    options = []
    for spectrum, (m, n), use in zip(spectra, shapes, uses, strict=True):
        some = [(use * r * (m + n), np.sum(spectrum[r:])) for r in range(len(spectrum))]
        options.append([*some, (use * m * n, 0.0)])
    errors = []
    for combination in itertools.product(*options):
        if sum(cost for cost, _ in combination) <= budget:
            errors.append(sum(error for _, error in combination))
    return min(errors)


@pytest.mark.parametrize("seed", range(0, 40, 10))
@pytest.mark.parametrize("uses", [None, [1, 4, 2]])
def test_an_allocation_is_as_good_as_it_says_it_is(seed, uses):
    keys = range(seed, seed + 3)
    spectra = [np.sort(normal(k, min(s)) ** 4)[::-1] for k, s in zip(keys, SHAPES, strict=True)]
    given = uses or [1, 1, 1]
    dense = sum(use * m * n for use, (m, n) in zip(given, SHAPES, strict=True))
    exact = 0
    for budget in [*np.linspace(0, 1.05 * dense, 23)]:
        found = allocate(spectra, SHAPES, budget, uses=uses)
        best = best_error(spectra, SHAPES, budget, given)
        cost = error = 0.0
        for rank, spectrum, (m, n), use in zip(found.ranks, spectra, SHAPES, given, strict=True):
            cost += use * min(rank * (m + n), m * n)
            error += np.sum(spectrum[rank:])
        assert found.cost == pytest.approx(cost)
        assert found.cost <= budget
        assert found.error == pytest.approx(error, abs=1e-12)
        assert found.error - found.skipped - 1e-9 <= best <= found.error + 1e-9
        # A budget that its own steps fill holds nothing better.
        again = allocate(spectra, SHAPES, found.cost, uses=uses)
        if again.cost == found.cost and again.ranks == found.ranks and not found.skipped:
            exact += 1
            assert found.error == pytest.approx(best, abs=1e-9)
    assert exact


def test_steps_that_fill_the_budget_are_optimal_and_beat_uniform_ranks():
    # Layers of one shape: each direction costs the same, so that the best are simply the largest.
    spectra = [np.array([16.0, 8, 4, 2, 1, 0.5]), np.array([3.0, 1, 0.3, 0.1, 0.1, 0.1])]
    shapes = [(30, 6), (30, 6)]
    largest = np.sort(np.concatenate(spectra))[::-1]
    for rank in range(3):
        found = allocate(spectra, shapes, budget=rank * 2 * 36)
        assert found.error == pytest.approx(np.sum(largest[2 * rank :]))
        uniform = sum(np.sum(s[rank:]) for s in spectra)
        assert found.error <= uniform
    # Five directions cost what a kernel does, which has no error: [6, 1] beats [5, 1] and [3, 3].
    assert allocate(spectra, shapes, budget=216).ranks == [6, 1]


def test_in_series_the_product_of_kept_shares_is_the_largest_and_no_layer_is_cut():
    spectra = [np.sort(normal(seed, 6) ** 4)[::-1] for seed in (0, 1)] + [np.zeros(6)]
    logs = [in_series(np.array(spectrum)) for spectrum in spectra]
    for spectrum, gains in zip(spectra[:2], logs, strict=False):
        kept = np.cumsum(spectrum) / np.sum(spectrum)
        np.testing.assert_allclose(np.cumsum(gains[1:]), np.log(kept[1:] / kept[0]), atol=1e-12)
        assert np.all(np.diff(gains) <= 1e-12)
    np.testing.assert_array_equal(logs[2], 0)
    shapes = [(30, 6), (30, 6)]
    for steps in (2, 3, 5, 6):
        found = allocate(logs[:2], shapes, budget=steps * 36)
        if max(found.ranks) < 6:  # directions that all cost the same fill the budget
            kept = [np.cumsum(spectrum) / np.sum(spectrum) for spectrum in spectra[:2]]
            products = {
                (r, steps - r): kept[0][r - 1] * kept[1][steps - r - 1]
                for r in range(1, min(steps, 5))
            }
            assert tuple(found.ranks) == max(products, key=products.get)
        assert min(found.ranks) > 0


def test_few_units_give_all_where_activations_are_of_low_rank():
    hidden = normal(0, 80, 3) @ normal(1, 3, 9) + normal(2, 9)
    hidden[:, 4] = 0  # a unit that never fires
    hidden[:, 7] = 2.5  # one that never changes, and is large
    units = compiled(select_units, static_argnums=1)(hidden, 3)
    assert not {4, 7} & set(units.indices.tolist())
    np.testing.assert_allclose(
        hidden[:, units.indices] @ units.weights + units.offset, hidden, atol=1e-10
    )
    # Of more than the rank each comes once, and those that tell nothing last.
    more = select_units(np.array(hidden), 8).indices.tolist()
    assert len(set(more)) == 8
    assert more[:3] == units.indices.tolist()
    # The network around it: narrower before, refitted after, the same outputs.
    kernel, bias = normal(3, 9, 4), normal(4, 4)
    small = hidden[:, units.indices] @ (units.weights @ kernel) + bias + units.offset @ kernel
    np.testing.assert_allclose(small, hidden @ kernel + bias, atol=1e-10)


@pytest.mark.parametrize("with_kernel", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_each_unit_leaves_the_least_error_and_the_refit_is_least_squares(dtype, with_kernel):
    hidden = np.maximum(normal(5, 4, 30, 7) @ normal(6, 7, 7), 0).astype(dtype)
    kernel = normal(7, 7, 2).astype(dtype) if with_kernel else None
    units = select_units(np.array(hidden), 3, kernel=kernel)
    assert units.weights.dtype == dtype
    # Plainly: each time the unit with which the fit is best, of all that are left.
    rows = hidden.reshape(-1, 7).astype(float)
    outputs = rows @ kernel if with_kernel else rows
    chosen = []

    def fit(indices):
        with_one = np.c_[rows[:, indices], np.ones(len(rows))]
        weights = np.linalg.lstsq(with_one, outputs)[0]
        return np.sum((with_one @ weights - outputs) ** 2), weights

    for _ in range(3):
        left = [j for j in range(7) if j not in chosen]
        chosen.append(left[int(np.argmin([fit([*chosen, j])[0] for j in left]))])
    assert units.indices.tolist() == chosen
    _, weights = fit(chosen)
    ours = (units.weights, units.offset)
    if with_kernel:
        ours = [part @ kernel for part in ours]
    atol = 1e3 * np.finfo(dtype).eps
    np.testing.assert_allclose(np.vstack(ours), weights, atol=atol)


def test_on_digits_refitted_units_beat_the_largest_weights_out_of_sample():
    data = load_digits()
    x = data.data / 16
    train, test = slice(0, 600), slice(600, None)
    targets = np.eye(10)[data.target]
    select = compiled(select_units, static_argnums=1)
    for seed in range(0, 30, 10):
        keys = range(seed, seed + 2)
        hidden = np.maximum(x @ normal(keys[0], 64, 80) / 4 + normal(keys[1], 80), 0)
        gram = hidden[train].T @ hidden[train] + np.eye(80)
        kernel = np.linalg.solve(gram, hidden[train].T @ targets[train])
        full = hidden[test] @ kernel
        units = select(hidden[train], 40, kernel=kernel)
        ours = hidden[test][:, units.indices] @ (units.weights @ kernel) + units.offset @ kernel
        largest = np.argsort(np.linalg.norm(kernel, axis=1))[40:]
        # The same refit for units by weight, so that the choice alone differs.
        with_one = np.c_[hidden[:, largest], np.ones(len(x))]
        refit = np.linalg.lstsq(with_one[train], hidden[train] @ kernel)[0]
        plain = hidden[test][:, largest] @ kernel[largest]
        errors = [np.mean((y - full) ** 2) for y in (ours, with_one[test] @ refit, plain)]
        assert errors[0] < errors[1] < errors[2]


ONE = np.ones(3)
REFUSED = {
    r"in \(0, 1\]": lambda: energy_rank(ONE, 0.0),
    "shorter side over the longer": lambda: marchenko_pastur_median(1.5),
    "All are needed": lambda: noise_threshold(ONE, (4, 5)),
    "has 4 singular values": lambda: allocate([ONE], [(4, 4)], 10),
    "One spectrum, one shape": lambda: allocate([ONE], [(3, 3), (3, 3)], 10),
    "budget must be in": lambda: allocate([ONE], [(3, 3)], -1),
    "2 examples of 3 units": lambda: select_units(np.ones((2, 3)), 3),
    "inputs are 3": lambda: select_units(np.ones((4, 3)), 2, kernel=np.ones((2, 3))),
    "got 0": lambda: select_units(np.ones((2, 3)), 0),
}


@pytest.mark.parametrize(("message", "call"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_is_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()
