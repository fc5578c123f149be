r"""How wide and of what rank a layer has to be, read from spectra.

The spectral architecture search of dynamic spectral backpropagation (Muthuraman, 2025,
arXiv:2505.23369) in parts that can be checked: how many directions a spectrum holds; which ranks
share a budget best; which units can go, with the next layer refitted.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from probbp.checks import check_count, check_number, check_numbers


class Allocation(NamedTuple):
    """Ranks under a budget.

    Attributes:
        ranks: one for each layer; `min(shape)` means the kernel as it is.
        cost: multiplications, for all layers.
        error: the sum of the layers' errors.
        skipped: the error that the first step that the budget could not hold would have saved, 0 if
            there was none. No allocation within the budget has an error below `error - skipped`.
    """

    ranks: list[int]
    cost: float
    error: float
    skipped: float


class Units(NamedTuple):
    """Units to keep, and the rest as affine functions of them.

    Activations are `activations[:, indices] @ weights + offset`, by least squares. The layer before
    is `kernel[:, indices]` and `bias[indices]`; the next `weights @ kernel`, with
    `bias + offset @ kernel` as its bias.

    Attributes:
        indices: (k,), the most telling first.
        weights: (k, d).
        offset: (d,).
    """

    indices: jax.Array
    weights: jax.Array
    offset: jax.Array


def effective_rank(variances: jax.Array) -> jax.Array:
    r"""Return :math:`\exp H(\lambda / \sum \lambda)`, the exponential of the spectrum's entropy.

    Roy & Vetterli, 2007, for eigenvalues in place of singular values. k for k equal ones: a layer
    whose k kept variances are nearly equal, `effective_rank(kept)` close to k, has a flat spectrum
    that ends where it was cut, and is the one to widen.

    Args:
        variances: (..., d), not negative: eigenvalues of a covariance, squared singular values. If
            all are zero, so is the rank.

    Example:
        >>> import jax.numpy as jnp
        >>> round(float(effective_rank(jnp.array([2.0, 2.0, 2.0, 0.0]))), 4)
        3.0
    """
    total = jnp.sum(variances, axis=-1)
    shares = variances / jnp.where(total > 0, total, 1)[..., None]
    rank = jnp.exp(jnp.sum(jax.scipy.special.entr(shares), axis=-1))
    return jnp.where(total > 0, rank, 0)


def stable_rank(variances: jax.Array) -> jax.Array:
    """Return the sum over the largest: of squared singular values, at most the rank.

    Args:
        variances: (..., d), as for `effective_rank`.

    Example:
        >>> import jax.numpy as jnp
        >>> float(stable_rank(jnp.array([4.0, 2.0, 2.0])))
        2.0
    """
    largest = jnp.max(variances, axis=-1)
    return jnp.sum(variances, axis=-1) / jnp.where(largest > 0, largest, 1)


def energy_rank(variances: jax.Array, share: float = 0.99) -> jax.Array:
    """Return how many of the largest make up a share of the sum.

    Args:
        variances: (..., d), in any order.
        share: in (0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> int(energy_rank(jnp.array([1.0, 90.0, 9.0]), share=0.95))
        2
    """
    check_number("share", share, "(0, 1]")
    rising = jnp.sort(variances, axis=-1)
    left_out = jnp.cumsum(rising, axis=-1)
    size = variances.shape[-1]
    # What the rest holds, added from the smallest on; a rounding of the sum is not a direction.
    slack = jnp.finfo(variances.dtype).eps * size
    return size - jnp.sum(left_out <= (1 - share + slack) * left_out[..., -1:], axis=-1)


def noise_threshold(singular_values: jax.Array, shape: tuple[int, int]) -> jax.Array:
    r"""Return the singular value below which a direction is not worth keeping, noise unknown.

    Gavish & Donoho, 2014, arXiv:1305.5870, section III.E: for a matrix of low rank in white noise,
    :math:`\omega(\beta)` times the median of the singular values, 2.858 for square ones. With
    :math:`\mu_\beta` the median of the Marchenko-Pastur law,

    .. math:: \omega(\beta) = \lambda_*(\beta) / \sqrt{\mu_\beta}, \qquad
        \lambda_*^2 = 2 (\beta + 1) + \frac{8 \beta}{\beta + 1 + \sqrt{\beta^2 + 14 \beta + 1}}.

    Hard thresholding there is best, for large matrices, in the mean squared error of the matrix.
    The noise must fill at least half of the spectrum: trained kernels, or activations after a relu,
    are not such matrices, and the threshold may then keep all or nothing.

    Args:
        singular_values: (min(shape),), all of them, in any order.
        shape: of the matrix.

    Example:
        >>> import jax.numpy as jnp
        >>> round(float(noise_threshold(jnp.ones(9), (9, 9))), 3)
        2.858
    """
    _check_complete(singular_values, shape)
    ratio = min(shape) / max(shape)
    squared = 2 * (ratio + 1) + 8 * ratio / (ratio + 1 + math.sqrt(ratio**2 + 14 * ratio + 1))
    return math.sqrt(squared / marchenko_pastur_median(ratio)) * jnp.median(singular_values)


def marchenko_pastur_median(ratio: float) -> float:
    r"""Return the median of the Marchenko-Pastur law with unit variance.

    By bisection of its distribution function, for which there is a closed form (derived here): with
    :math:`\rho^2 = \beta` and :math:`t = 1 + \beta - 2 \rho \cos\theta`,

    .. math:: \pi F = \theta + \rho \sin\theta - \frac{1 - \beta}{\beta} \Big(
        \arctan \frac{\rho \sin\theta}{1 - \rho \cos\theta} - \rho \sin\theta \Big).

    Args:
        ratio: beta in (0, 1], the shorter side of the matrix over the longer.

    Example:
        >>> round(marchenko_pastur_median(1.0), 4)
        0.6528
    """
    check_number("ratio", ratio, "(0, 1]", "It is the shorter side over the longer.")
    rho = math.sqrt(ratio)

    def distribution(theta):
        sine = rho * math.sin(theta)
        angle = math.atan2(sine, 1 - rho * math.cos(theta))
        return (theta + sine - (1 - ratio) / ratio * (angle - sine)) / math.pi

    low, high = 0.0, math.pi
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if distribution(middle) < 0.5 else (low, middle)
    return 1 + ratio - 2 * rho * math.cos(low)


def in_series(spectrum: jax.Array) -> jax.Array:
    r"""Return what each direction adds to the log of the share that a layer keeps.

    For `allocate`, of layers that follow one another: with the sum of logs as the objective their
    kept shares multiply, as what a first layer loses no later one gives back, and no layer goes to
    rank 0, which would cut the network, as long as each can have one direction. The sum of errors
    cuts it at small budgets. It is a heuristic that does not bound the error at the end, and worth
    little on small networks: of digits the accuracy is within 2.5 points of that of equal ranks at
    the same cost, above and below (`examples/papers/dsbp_truncation.py`).

    Args:
        spectrum: (k,), falling: `Truncation.spectrum`.

    Returns:
        (k,), :math:`\log K_r - \log K_{r-1}` with :math:`K_r` the sum of the first r, and the
        dtype's epsilon as the share that nothing keeps.

    Example:
        >>> import jax.numpy as jnp
        >>> [round(float(gain), 4) for gain in in_series(jnp.array([2.0, 2.0, 0.0]))[1:]]  # log 2
        [0.6931, 0.0]
    """
    kept, eps = jnp.cumsum(spectrum), jnp.finfo(spectrum.dtype).eps
    share = jnp.where(kept[-1] > 0, kept / jnp.where(kept[-1] > 0, kept[-1], 1), 1)
    before = jnp.concatenate([jnp.where(kept[-1:] > 0, eps, 1), share[:-1]])
    return jnp.log(share) - jnp.log(before)


def allocate(
    spectra: Sequence[jax.Array],
    shapes: Sequence[tuple[int, int]],
    budget: float,
    *,
    uses: Sequence[float] | None = None,
) -> Allocation:
    r"""Share a budget of multiplications among layers, so that the sum of their errors is least.

    A layer of rank r costs :math:`\min(r (m + n), m n)`: two factors, or the kernel itself, which
    has no error. The budget goes step by step to what saves most error for a multiplication, along
    the lower convex hull of each layer's cost and error. That is optimal whenever the steps fill
    the budget exactly, and otherwise within `Allocation.skipped` of the optimum; a search for the
    last bit is a knapsack problem.

    Args:
        spectra: for each layer the errors that its directions save, falling: `Truncation.spectrum`.
            Divide them by their sum where layers differ in scale, weigh them where an error in one
            matters more, and take `in_series` of them where layers follow one another.
        shapes: (in, out) of each kernel; `kernel.size // out` for a convolution's `in`.
        budget: multiplications.
        uses: how often a kernel is used for one example, the positions of a convolution; once if
            not given.

    Raises:
        ValueError: for lists that do not fit, or a budget that is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> spectra = [jnp.array([9.0, 4.0, 1.0, 0.1]), jnp.array([5.0, 0.2, 0.1, 0.1])]
        >>> allocate(spectra, [(8, 4), (4, 8)], budget=36).ranks
        [2, 1]
    """
    uses = [1] * len(shapes) if uses is None else uses
    if not len(spectra) == len(shapes) == len(uses):
        raise ValueError(
            f"One spectrum, one shape and one use for each layer; got {len(spectra)}, "
            f"{len(shapes)} and {len(uses)}."
        )
    check_number("budget", budget, "[0, inf]")
    for use in uses:
        check_number("uses", use, "(0, inf)")
    for spectrum in spectra:
        check_numbers("spectra", spectrum, "[0, inf)", "Singular values enter squared.")
    steps = []
    for layer, (spectrum, shape, use) in enumerate(zip(spectra, shapes, uses, strict=True)):
        _check_complete(spectrum, shape)
        hull = _hull(_options([float(x) for x in spectrum], shape, use))
        for (cost, error, _), (next_cost, next_error, rank) in zip(hull, hull[1:], strict=False):
            saved, price = error - next_error, next_cost - cost
            # Within a layer slopes fall; a stable sort keeps the order of equal ones.
            steps.append((-saved / price, layer, price, saved, rank))
    steps.sort(key=lambda step: step[0])

    ranks, cost = [0] * len(shapes), 0.0
    error = sum(float(jnp.sum(spectrum)) for spectrum in spectra)
    closed, skipped = set(), 0.0
    for _, layer, price, saved, rank in steps:
        if layer in closed:
            continue
        if cost + price > budget:
            closed.add(layer)
            # Any gain within the budget is less than this step's, in whole.
            skipped = skipped or saved
            continue
        ranks[layer], cost, error = rank, cost + price, error - saved
    return Allocation(ranks, cost, max(error, 0.0), skipped)


def select_units(
    activations: jax.Array, num_units: int, *, kernel: jax.Array | None = None
) -> Units:
    r"""Choose the units of a layer from which the next layer's inputs follow best, and say how.

    Forward selection by orthogonal least squares (Chen, Billings & Luo, 1989): the next unit is the
    one that, with those chosen before, leaves the least squared error of the best fit. It is a
    greedy choice, and no best subset; but where activations are of rank k, but for a constant in
    each unit, k units give all others exactly. The next layer, refitted as `Units` says, is the
    least squares fit to its old outputs, whatever its kernel. Units that never fire, or never
    change, come last. Of digits 64-128-128-10, 16 and 16 units keep an accuracy of 93.3 % of 97.3 %
    without training; the largest weights 84.2 % with the same refit, 29.0 % without, and as much as
    ours at 64 (`examples/papers/dsbp_truncation.py`).

    Args:
        activations: (..., d), after the nonlinearity: all axes but the last are examples. More
            examples than `num_units`, or the fit is to noise.
        num_units: k.
        kernel: (d, out), of the layer that reads the units; of several, side by side. The error is
            then that of its outputs, and the choice better for it. If not given, it is that of
            the activations.

    Returns:
        `Units`. O(n d^2 + k d (d + out)) operations, one program for each `num_units`.

    Raises:
        ValueError: if there are fewer units or examples than `num_units`, or another number of
            inputs in `kernel`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> key_x, key_mix = jax.random.split(jax.random.key(0))
        >>> x = jax.random.normal(key_x, (50, 2)) @ jax.random.normal(key_mix, (2, 5)) + 1.0
        >>> units = select_units(x, 2)
        >>> bool(jnp.allclose(x[:, units.indices] @ units.weights + units.offset, x, atol=1e-4))
        True
    """
    size = activations.shape[-1]
    rows = activations.reshape(-1, size)
    way_out = f"There are {len(rows)} examples of {size} units."
    num_units = check_count("num_units", num_units, 1, min(rows.shape), way_out)
    if kernel is not None and (kernel.ndim != 2 or len(kernel) != size):
        raise ValueError(f"kernel is (in, out), and its inputs are {size}; got {kernel.shape}.")
    mean = jnp.mean(rows, axis=0)
    centred = rows - mean
    products = jnp.matmul(centred.T, centred, precision="highest")
    targets = products if kernel is None else jnp.matmul(products, kernel, precision="highest")
    # Below this a unit's square, less what those chosen explain, is rounding.
    floor = size * jnp.finfo(rows.dtype).eps * jnp.diagonal(products)

    def choose(carry: tuple, _: None) -> tuple:
        products, targets, free = carry  # of what the chosen units leave unexplained
        squares = jnp.diagonal(products)
        known = squares <= floor
        scale = jnp.where(known, 0, 1 / jnp.where(known, 1, squares))
        gains = scale * jnp.sum(targets**2, axis=-1)
        best = jnp.argmax(jnp.where(free, gains, -1))
        share = scale[best] * products[:, best]
        products = products - jnp.outer(share, products[best])
        targets = targets - jnp.outer(share, targets[best])
        return (products, targets, free.at[best].set(False)), best

    start = products, targets, jnp.ones(size, bool)
    _, indices = jax.lax.scan(choose, start, length=num_units)
    weights = jnp.linalg.lstsq(centred[:, indices], centred)[0]
    return Units(indices, weights, mean - mean[indices] @ weights)


def _check_complete(spectrum: jax.Array, shape: tuple[int, int]) -> None:
    if spectrum.shape != (min(shape),):
        raise ValueError(
            f"A matrix of shape {tuple(shape)} has {min(shape)} singular values; got "
            f"{spectrum.shape}. All are needed, zeros and noise too."
        )


def _options(
    spectrum: list[float], shape: tuple[int, int], use: float
) -> list[tuple[float, float, int]]:
    """Return (cost, error, rank) of the ranks cheaper than the kernel, and of the kernel."""
    rows, columns = shape
    factors = use * (rows + columns)
    dense = use * rows * columns
    errors = [0.0]
    for value in reversed(spectrum):
        errors.append(errors[-1] + value)
    errors.reverse()
    low = [(rank * factors, error, rank) for rank, error in enumerate(errors)]
    return [option for option in low if option[0] < dense] + [(dense, 0.0, min(shape))]


def _hull(options: list[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """Return the options on the lower convex hull: nobody offers more for a mixture of two."""
    hull: list[tuple[float, float, int]] = []
    for option in options:
        while len(hull) > 1 and _slope(hull[-2], option) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        if not hull or option[1] < hull[-1][1]:
            hull.append(option)
    return hull


def _slope(start: tuple[float, float, int], end: tuple[float, float, int]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])
