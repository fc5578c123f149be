r"""An Optax transform that treats the leading directions of a layer differently from the rest.

Dynamic spectral backpropagation (Muthuraman, 2025, arXiv:2505.23369) moves weights along a few
eigenvectors only. That is `mode="project"` here, kept for reproduction: it stands still wherever
the gradient is orthogonal to its basis, and `examples/papers/dsbp.py` prints what it loses. The
other modes use the same basis and leave no direction out. With Q the basis, G the gradient as a
matrix (m, n), lambda the eigenvalues, b the mean of those not tracked:

=========== ===================================================================================
mode        update
=========== ===================================================================================
`residual`  :math:`Q\, f(Q^\top G) + s\,(I - QQ^\top) G,\; s = \|f(Q^\top G)\| / \|Q^\top G\|`
`whiten`    :math:`Q (\lambda + \delta)^{-1/2} Q^\top G + (b + \delta)^{-1/2} (I - QQ^\top) G`
`damp`      :math:`Q \min(1, \sqrt{b / \lambda})\, Q^\top G + (I - QQ^\top) G`
`project`   :math:`Q\, f(Q^\top G)`
`random`    as `project`, with a Q drawn anew at every refresh
`bulk`      :math:`(I - QQ^\top) G`
=========== ===================================================================================

with :math:`\delta = \epsilon\, \mathrm{tr} / m`, a share of the mean eigenvalue; f is an optimiser
whose moments live in the basis (k n numbers in place of m n), and turn with it.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from probbp.checks import check_choice, check_count, check_number, check_rng_key
from probbp.optim.dsbp import tracker
from probbp.optim.dsbp.leaves import Matrices, matrices, precision
from probbp.optim.dsbp.tracker import Spectrum
from probbp.types import Tree

Mode = Literal["residual", "whiten", "damp", "project", "random", "bulk"]
Source = Literal["gradient", "activations"]
Side = Literal["in", "out"]
WITH_INNER = ("residual", "project", "random")


class DynamicSpectralState(NamedTuple):
    """State of `scale_by_dynamic_spectral`.

    Attributes:
        count: updates made.
        rng_key: of the bases that `random` draws.
        tracked: a `tracker.Spectrum` whose fields are trees like the parameters, with None where
            there is no matrix; as hosts expect it, each leaf is one array.
        inner: of the optimiser inside the bases.
        energy: a tree like the parameters, the share of the last gradient that lay in the basis.
        rotation: a tree like the parameters, how far the last refresh turned the basis: 0 not at
            all, 1 to an orthogonal one.
    """

    count: jax.Array
    rng_key: jax.Array
    tracked: Spectrum
    inner: Any
    energy: Tree
    rotation: Tree

    @property
    def spectra(self) -> Tree:
        """A tree like the parameters, with a `tracker.Spectrum` of each matrix."""
        return jax.tree.map(Spectrum, *self.tracked)


def scale_by_dynamic_spectral(
    rank: int,
    mode: Mode = "residual",
    *,
    source: Source = "gradient",
    side: Side = "in",
    inner: optax.GradientTransformation | None = None,
    decay: float = 0.9,
    refresh: int = 10,
    eps: float = 1e-3,
    weight_dimension_numbers: Tree | Callable[[Tree], Tree] | None = None,
    seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Track each layer's leading directions, and scale them and the rest apart.

    The update is no estimate: it is a deterministic function of the gradients so far. As an
    optimiser, every mode but `project` and `bulk` has a positive definite preconditioner between
    refreshes (`random` over refreshes), so that it comes to rest only where the gradient vanishes.
    `project` and `bulk` come to rest wherever the gradient lies outside, or inside, of the basis.
    At full rank `project` changes nothing, and `whiten` is the one-sided Shampoo. With
    `inner=optax.identity()` neither does `residual`.

    It chains as any transform does: `optax.chain(optax.clip_by_global_norm(1.0),
    scale_by_dynamic_spectral(8), optax.scale_by_learning_rate(1e-3))`; `whiten` and `damp` like
    `optax.trace(0.9)` behind them. A gradient that is not finite would stay in the basis: where it
    can happen, wrap the chain in `optax.apply_if_finite`.

    Args:
        rank: k, at most; a smaller m is tracked whole.
        mode: see the table at the top of `probbp.optim.dsbp.transform`.
        source: what the basis follows: the second moment of the gradient, :math:`G G^\top`, or of
            activations, :math:`A^\top A / n`, which come as the extra argument `acts` of `update`:
            a tree like the parameters, with an array (..., m) at each matrix and None elsewhere
            (of stacked layers: `(*stacked, ..., m)`). `activations` with `side="out"` is the
            paper's; with `side="in"` a gradient, which lies in the span of the layer's inputs,
            loses nothing once k reaches their rank.
        side: the axis whose directions are tracked: "in", a kernel's inputs, or "out".
        inner: f, for `residual`, `project` and `random`, made of `optax.scale_by_adam`,
            `optax.trace` and what has no moments; leaves that are no matrices go through it as they
            are. By default `optax.scale_by_adam()` for `residual`, and nothing for the others.
        decay: the weight of the past in the spectra, at each refresh.
        refresh: updates between two refreshes; the first update is one.
        eps: what is added to eigenvalues in `whiten`, in units of their mean. The larger, the
            less a direction is blown up in which no gradient has been yet.
        weight_dimension_numbers: which axes make a matrix, as in `optax.contrib.muon`. By default
            the last axis against all others, from two axes on, as of dense and convolutional
            kernels. Stacked layers need it: `MuonDimensionNumbers(1, 2)` for (layers, in, out).
        seed: of the first bases, and of those that `random` draws; an integer or a key.

    Returns:
        A transformation. A call costs about 4 m n k operations for a matrix, a refresh as many
        again and the order of m k^2; its state m k numbers, beside those of f.
        `tests/benchmarks/dsbp.py` prints both beside those of other optimisers.

    Raises:
        ValueError: for options that do not exist or do not go together, and activations that are
            missing or of another shape.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from probbp.optim import dsbp
        >>> optimiser = optax.chain(
        ...     dsbp.scale_by_dynamic_spectral(rank=2), optax.scale_by_learning_rate(0.1))
        >>> params = {"kernel": jnp.ones((6, 3)), "bias": jnp.zeros(3)}
        >>> state = optimiser.init(params)
        >>> updates, state = optimiser.update(params, state, params)
        >>> round(float(state[0].energy["kernel"]), 3)
        1.0

    Reference:
        Muthuraman, 2025, arXiv:2505.23369 (`project`); Chen et al., 2024, arXiv:2410.01623 (the
        scale of the residual); Gupta et al., 2018, arXiv:1802.09568 (whitening); Song, Ahn & Yun,
        2025, arXiv:2405.16002 (`bulk`); He et al., 2024, arXiv:2410.11289 (`random`).
    """
    rank = check_count("rank", rank)
    check_number("decay", decay, "[0, 1]")
    check_number("eps", eps, "[0, inf)")
    if not isinstance(refresh, Tracer):
        refresh = check_count("refresh", refresh)
    _check(mode, source, side, inner)
    _check_seed(seed)
    default = optax.scale_by_adam() if mode == "residual" else optax.identity()
    optimiser = default if inner is None else inner

    def init_fn(params: Tree) -> DynamicSpectralState:
        found = matrices(params, weight_dimension_numbers, side)
        rng_key, key_start = jax.random.split(_key(seed))
        spectra = _bases(key_start, found, rank, params)
        small = [
            jnp.zeros((*view.batch, spectrum.values.shape[-1], view.other), spectrum.values.dtype)
            for view, spectrum in zip(found.views, spectra, strict=True)
        ]
        moments = optimiser.init(found.put(small, params))
        _turn(moments, found, None)  # refuses moments that it would not know how to turn
        nothing = found.put([jnp.zeros_like(spectrum.trace) for spectrum in spectra])
        return DynamicSpectralState(
            jnp.zeros((), jnp.int32), rng_key, _put(found, spectra), moments, nothing, nothing
        )

    def update_fn(
        updates: Tree,
        state: DynamicSpectralState,
        params: Tree | None = None,
        *,
        acts: Tree | None = None,
        **extra: Any,
    ) -> tuple[Tree, DynamicSpectralState]:
        del params, extra
        found = matrices(updates, weight_dimension_numbers, side)
        gradients = found.of(updates)
        followed = gradients if source == "gradient" else _activations(acts, found)
        rng_key, key_random = jax.random.split(state.rng_key)

        def refreshed(old: list[Spectrum], moments: Any, _: list) -> tuple:
            if mode == "random":
                new = _bases(key_random, found, rank, updates)
            else:
                new = [_follow(s, a, decay) for s, a in zip(old, followed, strict=True)]
            pairs = list(zip(old, new, strict=True))
            turns = found.put([_transposed(b.vectors) @ a.vectors for a, b in pairs])
            return new, _turn(moments, found, turns), [tracker.rotation(a, b) for a, b in pairs]

        spectra, moments, rotations = jax.lax.cond(
            state.count % refresh == 0,
            refreshed,
            lambda *same: same,
            [Spectrum(*fields) for fields in zip(*map(found.at, state.tracked), strict=True)],
            state.inner,
            found.at(state.rotation),
        )
        inside = [_transposed(s.vectors) @ g for s, g in zip(spectra, gradients, strict=True)]
        moved, passed = inside, updates
        if mode in WITH_INNER:
            passed, moments = optimiser.update(found.put(inside, updates), moments)
            moved = found.at(passed)
        combined = [
            _combine(mode, eps, *parts)
            for parts in zip(spectra, gradients, inside, moved, strict=True)
        ]
        energy = [tracker.captured(s, g) for s, g in zip(spectra, gradients, strict=True)]
        return found.put_back(combined, found.put(found.at(updates), passed)), DynamicSpectralState(
            state.count + 1,
            rng_key,
            _put(found, spectra),
            moments,
            found.put(energy),
            found.put(rotations),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _combine(
    mode: Mode,
    eps: float,
    spectrum: Spectrum,
    gradient: jax.Array,
    inside: jax.Array,
    moved: jax.Array,
) -> jax.Array:
    """Return one matrix's update; `moved` is f(Q^T G)."""
    values, bulk = spectrum.values[..., None], spectrum.bulk[..., None, None]
    if mode in ("project", "random"):
        return spectrum.vectors @ moved
    outside = 1.0
    if mode == "residual":
        norm, norm_moved = (
            jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) for x in (inside, moved)
        )
        outside = jnp.where(norm > 0, norm_moved / jnp.where(norm > 0, norm, 1), 1)
    elif mode == "whiten":
        # The least number keeps a gradient of zero from being divided by zero.
        floor = eps * spectrum.trace[..., None, None] / gradient.shape[-2]
        floor = floor + jnp.finfo(gradient.dtype).tiny
        moved, outside = inside * (values + floor) ** -0.5, (bulk + floor) ** -0.5
    elif mode == "damp":
        moved = inside * jnp.sqrt(jnp.minimum(bulk / jnp.where(values > 0, values, 1), 1))
    elif mode == "bulk":
        moved = jnp.zeros_like(inside)
    # Q moved + outside (I - Q Q^T) G, in one product.
    return outside * gradient + spectrum.vectors @ (moved - outside * inside)


def _follow(spectrum: Spectrum, rows: jax.Array, decay: float) -> Spectrum:
    """Take in the second moment of a matrix (..., m, n) along its first axis."""

    def product(vectors: jax.Array) -> jax.Array:
        # The wide matrix is last in both products: in this order XLA's on a CPU are ten times
        # as fast.
        inside = _transposed(vectors) @ rows
        return jnp.einsum("...mn,...kn->...mk", rows, inside)

    return tracker.track(
        spectrum,
        product,
        trace=jnp.sum(rows**2, axis=(-2, -1)),
        decay=decay,
    )


def _bases(rng_key: jax.Array, found: Matrices, rank: int, tree: Tree) -> list[Spectrum]:
    keys = jax.random.split(rng_key, max(len(found.views), 1))
    return [
        tracker.start(key, view.size, min(rank, view.size), view.batch, precision(leaf.dtype))
        for key, view, leaf in zip(keys, found.views, found.at(tree), strict=False)
    ]


def _put(found: Matrices, spectra: list[Spectrum]) -> Spectrum:
    """Return spectra as one, whose fields are trees like the parameters."""
    return Spectrum(
        *[found.put([getattr(one, field) for one in spectra]) for field in Spectrum._fields]
    )


def _turn(state: Any, found: Matrices, turns: Tree | None) -> Any:
    """Express an optimiser's moments in the new basis.

    First moments turn as vectors do. Second moments are turned by the squares of the rotation,
    which is right for coordinates that are uncorrelated; in an eigenbasis of the second moment they
    are. Directions that are new to the basis start from nothing.
    """

    def applied(moments: Tree, power: int) -> Tree:
        if turns is None:
            return moments
        pairs = zip(found.at(turns), found.at(moments), strict=True)
        return found.put([(turn**power) @ moment for turn, moment in pairs], moments)

    if isinstance(state, optax.ScaleByAdamState):
        return state._replace(mu=applied(state.mu, 1), nu=applied(state.nu, 2))
    if isinstance(state, optax.TraceState):
        return state._replace(trace=applied(state.trace, 1))
    if type(state) is tuple:  # of `optax.chain`
        return tuple(_turn(part, found, turns) for part in state)
    if all(jnp.ndim(leaf) == 0 for leaf in jax.tree.leaves(state)):
        return state
    raise ValueError(
        f"The moments of {type(state).__name__} can't be turned with the basis: make `inner` of "
        "optax.scale_by_adam and optax.trace, and chain what else there is behind."
    )


def _activations(acts: Tree | None, found: Matrices) -> list[jax.Array]:
    """Return activations as `(*batch, m, examples)`, whose second moment is the mean of a^T a."""
    if acts is None:
        raise ValueError(
            "source='activations' needs them in each call: update(grads, state, params, acts=acts)."
            " Let the loss return them as its auxiliary output."
        )
    rows = []
    for view, act in zip(found.views, found.at(acts), strict=True):
        ahead = len(view.batch)
        if (
            act is None
            or act.ndim <= ahead
            or (*act.shape[:ahead], act.shape[-1])
            != (
                *view.batch,
                view.size,
            )
        ):
            shape = None if act is None else act.shape
            raise ValueError(
                f"Activations of shape {shape} for matrices of {(*view.batch, view.size)}: they "
                "are (*stacked, ..., m), m the kernel's inputs for side='in' and outputs for 'out'."
            )
        flat = act.reshape(*view.batch, -1, view.size).astype(precision(act.dtype))
        rows.append(_transposed(flat) / flat.shape[-2] ** 0.5)
    return rows


def _transposed(matrix: jax.Array) -> jax.Array:
    return jnp.swapaxes(matrix, -1, -2)


def _key(seed: int | jax.Array) -> jax.Array:
    return jnp.asarray(seed) if _is_key(seed) else jax.random.key(seed)


def _check_seed(seed: int | jax.Array) -> None:
    """Require an integer or a key."""
    if _is_key(seed):
        check_rng_key("seed", seed)
    elif not isinstance(seed, Tracer):
        check_count("seed", seed, 0, way_out="Or a key, such as jax.random.key(0).")


def _is_key(seed: Any) -> bool:
    """Whether it is a key, of either kind, and not an integer."""
    dtype = getattr(seed, "dtype", None)
    return dtype is not None and (jnp.issubdtype(dtype, jax.dtypes.prng_key) or seed.ndim > 0)


def _check(mode, source, side, inner) -> None:
    check_choice("mode", mode, get_args(Mode))
    check_choice("source", source, get_args(Source))
    check_choice("side", side, get_args(Side))
    if inner is not None and mode not in WITH_INNER:
        raise ValueError(
            f"mode={mode!r} has no optimiser inside: chain it behind, or choose one of "
            f"{', '.join(WITH_INNER)}."
        )
