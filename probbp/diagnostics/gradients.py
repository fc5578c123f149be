"""What an estimator of the gradient is worth at a point: bias, variance, direction and cost."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from probbp.checks import check_count, check_estimator, check_function, check_rng_key
from probbp.diagnostics.names import leaf_names
from probbp.diagnostics.quality import GradientQuality, LeafQuality
from probbp.types import Estimator, Tree, ValueAndGrad, ways_out

_NUMBERS_AT_ONCE = 2**18  # entries of the gradients of one batch, by default


@ways_out()
def gradient_quality(
    rng_key: jax.Array,
    estimator: Estimator,
    fun: Callable,
    params: Tree,
    *,
    num_keys: int = 1000,
    batch_size: int | None = None,
    has_aux: bool = False,
    reference: Callable | None = None,
) -> GradientQuality:
    """Compare an estimator of the gradient with the exact gradient at a point.

    The exact gradient comes from reverse mode, and where that is impossible (a loop of dynamic
    length) from forward mode, `jax.jacfwd`, whose memory grows with the number of parameters. Bias,
    variance and direction are estimates from independent keys, with standard errors; a key costs
    one call of the estimator. No more than a batch of gradients is held at once, beside a mean and
    a variance of every entry.

    An estimator that is deterministic has variance and standard errors of exactly zero; deviations
    below eps^(2/3) of the gradient's largest entry count as rounding. A bias that is small beside
    its standard error cannot be seen: `bias_error` and `slope_error` say how large it could be.

    Operations and memory are what XLA reports of the compiled call. It counts the body of a loop
    once, however often it runs, so that `batch_size` of an estimator seems to save operations, and
    it does not count what LAPACK does for it.

    Args:
        rng_key: from which all keys are split.
        estimator: `estimator(fun)(rng_key, params)` returns value and gradient.
        fun: params to a scalar, or to `(scalar, aux)` with `has_aux`. One with an argument
            `rng_key` is compared with its derivative at the argument's default.
        params: any tree of floating-point arrays.
        num_keys: how many estimates are made.
        batch_size: how many of them at once; by default as many as have 2^18 entries together.
        has_aux: whether `fun` has auxiliary output.
        reference: the function whose derivative is the exact gradient, `fun` by default. Where
            `fun` contains an operation with another backward pass, give the same function with the
            original operation.

    Returns:
        A `GradientQuality`: print it, look at `overall`, `leaves["name"]` and `biased`.

    Raises:
        ValueError: if there are fewer than two keys or no parameters, or two leaves of one name; if
            the gradient is not finite, or zero; if an estimate is not finite, or not shaped as the
            parameters.
        TypeError: if a leaf is not floating point, or the function's value not a scalar.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from probbp.estimators import forward
        >>> from probbp.diagnostics.gradients import gradient_quality
        >>> fun = lambda p: jnp.sum(jnp.sin(p["a"])) + p["b"] ** 2
        >>> params = {"a": jnp.arange(3.0), "b": jnp.array(1.0)}
        >>> quality = gradient_quality(jax.random.key(0), forward(), fun, params)
        >>> quality.biased
        ()
        >>> error = quality.overall.relative_variance - (4 + 1) / 1  # (d + 1) / k
        >>> bool(abs(error) < 4 * quality.overall.relative_variance_error)
        True
    """
    check_rng_key("rng_key", rng_key)
    check_estimator(estimator)
    check_function("fun", fun, "Pass one that maps params to a scalar.")
    if reference is not None:
        check_function("reference", reference, "Pass `fun` with the original operations.")
    num_keys = check_count("num_keys", num_keys, 2)
    batch_size = None if batch_size is None else check_count("batch_size", batch_size)
    names = _names(params)
    params = jax.tree.map(jnp.asarray, params)
    value_and_grad = estimator(fun, has_aux=True) if has_aux else estimator(fun)
    mode, compiled = _exact(reference or fun, has_aux, params)
    value, exact = compiled(params)
    _require_gradient(exact, names)
    _require_shapes(value_and_grad, rng_key, params)
    estimate_cost = _cost(jax.jit(value_and_grad).lower(rng_key, params).compile())

    # All sums are of numbers around one: each leaf is measured in units of its largest entry.
    exact = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(exact)]
    rounding = _rounding(exact, params, jax.tree.leaves(value)[0].dtype)
    units = _units(exact, rounding)
    scaled = [leaf / unit for leaf, unit in zip(exact, units, strict=True)]
    keys, is_counted = _batches(rng_key, num_keys, batch_size, sum(leaf.size for leaf in exact))
    means, squares, along = _stream(value_and_grad, params, scaled, units, keys, is_counted)
    along = np.asarray(along, np.float64).reshape(-1, len(names), 3)[:num_keys]
    _require_finite(np.isfinite(along[..., 2]), names)

    deviations = [
        unit * (np.asarray(mean, np.float64) - leaf)
        for mean, leaf, unit in zip(means, scaled, units, strict=True)
    ]
    variances = [
        unit**2 * np.asarray(square, np.float64) / (num_keys - 1)
        for square, unit in zip(squares, units, strict=True)
    ]
    along = along * np.square(units)[:, None]
    rows = [
        _summary(*leaf)
        for leaf in zip(exact, deviations, variances, along.swapaxes(0, 1), rounding, strict=True)
    ]
    overall = _summary(
        np.concatenate(exact),
        np.concatenate(deviations),
        np.concatenate(variances),
        along.sum(axis=1),
        np.concatenate(rounding),
    )
    return GradientQuality(
        overall,
        dict(zip(names, rows, strict=True)),
        num_keys,
        mode,
        *estimate_cost,
        *_cost(compiled),
    )


def _rounding(exact: list[np.ndarray], params: Tree, value_dtype: Any) -> list[np.ndarray]:
    """Return what counts as rounding, (size,) for each leaf.

    That is in the precision of the leaf, or of the value where that is coarser.
    """
    largest = max(np.abs(leaf).max(initial=0) for leaf in exact)
    value_eps = jnp.finfo(value_dtype).eps
    return [
        np.full(leaf.size, float(max(jnp.finfo(leaf.dtype).eps, value_eps)) ** (2 / 3) * largest)
        for leaf in jax.tree.leaves(params)
    ]


def _units(exact: list[np.ndarray], rounding: list[np.ndarray]) -> list[float]:
    """Return the largest entry of each leaf, or of all leaves where a leaf's is mere rounding."""
    units = [np.abs(leaf).max(initial=0) for leaf in exact]
    return [
        float(unit if np.all(unit > floor) else max(units))
        for unit, floor in zip(units, rounding, strict=True)
    ]


def _batches(
    rng_key: jax.Array, num_keys: int, batch_size: int | None, num_entries: int
) -> tuple[jax.Array, jax.Array]:
    """Return keys (batches, batch), and which of them count.

    The last batch is filled up with keys of the first ones, which do not.
    """
    batch_size = min(num_keys, batch_size or max(1, _NUMBERS_AT_ONCE // num_entries))
    num_batches = -(-num_keys // batch_size)
    index = np.arange(num_batches * batch_size).reshape(num_batches, batch_size)
    keys = jax.random.split(rng_key, num_keys)[index % num_keys]
    return keys, jnp.asarray(index < num_keys)


def _stream(
    value_and_grad: ValueAndGrad,
    params: Tree,
    exact: list[np.ndarray],
    units: list[float],
    keys: jax.Array,
    counts: jax.Array,
) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
    """Take means and sums of squares over keys, a batch at a time.

    Args:
        value_and_grad: of the estimator.
        params: where.
        exact: the leaves of the exact gradient, flat, in their units.
        units: one of each leaf.
        keys: (batches, batch).
        counts: (batches, batch), false for a key that fills up the last batch.

    Returns:
        For every leaf the mean, and the sum of squares about it, both (size,); and for every
        estimate and leaf, (batches, batch, leaves, 3): the squared distance from the running mean,
        <estimate - exact, exact>, and the squared length.
    """
    dtypes = [jnp.promote_types(leaf.dtype, jnp.float32) for leaf in jax.tree.leaves(params)]

    def add_batch(state, batch):
        num_before, means, squares = state
        batch_keys, is_counted = batch
        num_new = jnp.sum(is_counted)
        num = num_before + num_new
        _, grads = jax.vmap(value_and_grad, in_axes=(0, None))(batch_keys, params)
        new_means, new_squares, along = [], [], []
        for i, grad in enumerate(jax.tree.leaves(grads)):
            grad = grad.reshape(len(batch_keys), -1).astype(dtypes[i]) / units[i]
            # Chan et al.'s update. Offsets from the batch's first estimate make it exact, and its
            # squares zero, where all estimates are equal.
            offset = jnp.where(is_counted[:, None], grad - grad[0], 0)
            mean_offset = jnp.sum(offset, 0) / num_new
            spread = jnp.where(is_counted[:, None], (offset - mean_offset) ** 2, 0)
            step = grad[0] + mean_offset - means[i]
            mean = means[i] + step * (num_new / num).astype(dtypes[i])
            weight = (num_before * (num_new / num)).astype(dtypes[i])
            new_means.append(mean)
            new_squares.append(squares[i] + jnp.sum(spread, 0) + weight * step**2)
            truth = jnp.asarray(exact[i], dtypes[i])
            parts = ((grad - mean) ** 2, (grad - truth) * truth, grad**2)
            along.append(jnp.stack([jnp.sum(part, axis=1) for part in parts], axis=-1))
        along = jnp.stack([part.astype(jnp.result_type(*dtypes)) for part in along], axis=1)
        return (num, new_means, new_squares), along

    @jax.jit
    def run(keys, counts):
        zeros = [jnp.zeros(leaf.size, dtype) for leaf, dtype in zip(exact, dtypes, strict=True)]
        return jax.lax.scan(add_batch, (jnp.sum(counts[0]) * 0, zeros, zeros), (keys, counts))

    (_, means, squares), along = run(keys, counts)
    return means, squares, along


def _summary(
    exact: np.ndarray,
    deviation: np.ndarray,
    variance: np.ndarray,
    along: np.ndarray,
    rounding: np.ndarray,
) -> LeafQuality:
    """Put what was accumulated into words.

    Args:
        exact: (size,) the gradient.
        deviation: (size,) of the mean estimate.
        variance: (size,) of the estimates.
        along: (keys, 3), as from `_stream`.
        rounding: (size,) below which a deviation says nothing.
    """
    num_keys = len(along)
    distances, products, lengths = along.T
    norm = np.sqrt(np.sum(exact**2))
    total = np.sum(variance)
    floor = np.sqrt(np.sum(rounding**2))
    is_zero = norm <= floor

    # The largest entry, and the projection on the gradient, share the level.
    entry_z = np.abs(deviation) / np.hypot(np.sqrt(variance / num_keys), rounding)
    z = np.max(entry_z, initial=0)
    p_value = exact.size * 2 * scipy.stats.t.sf(z, num_keys - 1)
    slope = slope_error = cosine = np.nan
    if not is_zero:
        slope = 1 + _mean(products) / norm**2
        slope_error = _error(products) / norm**2
        noise = np.hypot(slope_error, floor / norm)
        slope_p_value = 2 * scipy.stats.t.sf(abs(slope - 1) / noise, num_keys - 1)
        p_value = 2 * min(p_value, slope_p_value)
        lengths = np.sqrt(np.where(lengths > 0, lengths, 1))
        cosines = np.where(along[:, 2] > 0, (norm**2 + products) / (norm * lengths), 0)
        cosine = _mean(np.clip(cosines, -1, 1))

    def relative(length):
        if is_zero:
            return np.inf if length > floor else 0.0
        return float(length / norm)

    signal = np.sum((exact + deviation) ** 2) - total / num_keys
    signal = signal if signal > floor**2 else 0.0
    return LeafQuality(
        size=exact.size,
        norm=float(norm),
        bias=relative(np.sqrt(np.sum(deviation**2))),
        bias_error=relative(np.sqrt(total / num_keys)),
        slope=float(slope),
        slope_error=float(slope_error),
        z=float(z),
        p_value=float(min(p_value, 1)),
        relative_variance=relative(np.sqrt(total)) ** 2,
        relative_variance_error=relative(np.sqrt(_error(distances))) ** 2,
        cosine=float(cosine),
        snr=float(signal / total) if total > 0 else (np.inf if signal > 0 else 0.0),
    )


def _mean(values: np.ndarray) -> float:
    """Return the mean, exactly where all values are equal."""
    return float(values[0] + np.mean(values - values[0]))


def _error(values: np.ndarray) -> float:
    """Return the standard error of the mean, exactly zero where all values are equal."""
    return float(np.std(values - values[0], ddof=1) / np.sqrt(len(values)))


def _exact(fun: Callable, has_aux: bool, params: Tree) -> tuple[str, Any]:
    """Compile the exact value and gradient, by forward mode where reverse mode is impossible."""

    def by_forward_mode(params):
        def twice(params):
            output = fun(params)
            return (output[0] if has_aux else output), output

        grad, output = jax.jacfwd(twice, has_aux=True)(params)
        return output, grad

    by_reverse_mode = jax.value_and_grad(fun, has_aux=has_aux)
    try:
        return "reverse mode", jax.jit(by_reverse_mode).lower(params).compile()
    except (ValueError, NotImplementedError) as error:  # by which JAX refuses reverse mode
        try:
            return "forward mode", jax.jit(by_forward_mode).lower(params).compile()
        except Exception:  # `fun` fails in either mode: its own error is the one to read
            raise error from None


def _cost(compiled: Any) -> tuple[float, float]:
    """Return operations and temporary memory [bytes], NaN where XLA does not say."""
    flops = (compiled.cost_analysis() or {}).get("flops", np.nan)
    memory = getattr(compiled.memory_analysis(), "temp_size_in_bytes", np.nan)
    return float(flops), float(memory)


def _names(params: Tree) -> list[str]:
    """Name the leaves by their paths, and see that they are floating point."""
    names = leaf_names(params)
    for name, leaf in zip(names, jax.tree.leaves(params), strict=True):
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"Gradients are compared on floating-point params, but {name!r} has dtype {dtype}: "
                "cast it, or close over it."
            )
    if not sum(np.size(leaf) for leaf in jax.tree.leaves(params)):
        raise ValueError("params has no entries: give a tree with at least one array.")
    return names


def _require_finite(is_finite: np.ndarray, names: list[str]) -> None:
    """Require it of all estimates, (keys, leaves)."""
    num_bad = int(np.sum(~is_finite.all(axis=1)))
    if num_bad:
        bad = [repr(name) for i, name in enumerate(names) if not np.all(is_finite[:, i])]
        raise ValueError(
            f"{num_bad} of {len(is_finite)} estimates are not finite, in {', '.join(bad)}, "
            "though the exact gradient is: lower the estimator's step or scale, or move params."
        )


def _require_gradient(exact: Tree, names: list[str]) -> None:
    leaves = jax.tree.leaves(exact)
    bad = [
        repr(name)
        for name, leaf in zip(names, leaves, strict=True)
        if not bool(jnp.all(jnp.isfinite(leaf)))
    ]
    if bad:
        raise ValueError(
            f"The exact gradient is not finite in {', '.join(bad)}: choose params inside the "
            "support of the function, or mend its derivative there."
        )
    if not any(bool(jnp.any(leaf != 0)) for leaf in leaves):
        raise ValueError(
            "The exact gradient is zero at params, and nothing can be relative to it: move away "
            "from the stationary point."
        )


def _require_shapes(value_and_grad: ValueAndGrad, rng_key: jax.Array, params: Tree) -> None:
    def shapes(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), tree)

    _, grad = jax.eval_shape(value_and_grad, rng_key, params)
    if shapes(grad) != shapes(params):
        raise ValueError(
            f"The estimator's gradient has shapes {shapes(grad)}, but params have "
            f"{shapes(params)}: return a gradient like the parameters."
        )
