r"""A tracked spectrum as a Gaussian: the scale of a sampler, the first guess of a guide.

With Q the basis, lambda its eigenvalues and b the mean of the others, a `Spectrum` stands for
:math:`\Sigma = Q\, \mathrm{diag}(\lambda)\, Q^\top + b (I - QQ^\top)`, probabilistic principal
component analysis's covariance (Tipping & Bishop, 1999), or for the inverse of one. It has to be of
full rank: a sampler whose noise is projected leaves directions unexplored, whatever the
acceptance test does.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from blackjax.mcmc.metrics import LowRankInverseMassMatrix
from jax.core import Tracer

from probbp.checks import check_choice, check_numbers
from probbp.optim.dsbp.tracker import Spectrum


def inverse_mass_matrix(
    spectrum: Spectrum,
    *,
    of: Literal["covariance", "precision"] = "covariance",
    scale: jax.Array | float = 1.0,
) -> LowRankInverseMassMatrix:
    r"""Return the scale :math:`D \Sigma D`, or with the inverse, as BlackJAX's samplers take it.

    For `probbp.mala` and its siblings, `blackjax.nuts` and whatever calls its matrix
    `inverse_mass_matrix`. It is learnt before a run and frozen in it: then a chain is exact with
    any. In BlackJAX's form :math:`D' (I + U (\Lambda - I) U^\top) D'`, with D' the scale times the
    root of b.

    Args:
        spectrum: of the draws' covariance, or of a precision (a Hessian at the mode, say), in the
            order of `ravel_pytree(position)`.
        of: which of both.
        scale: the diagonal D, (d,) or a number, if the spectrum is of positions divided by it.

    Returns:
        BlackJAX's `LowRankInverseMassMatrix`: d (k + 1) numbers, and about 4 d k operations a use.

    Raises:
        ValueError: where an eigenvalue or `bulk` is not positive, outside of `jax.jit`: of k < d
            directions alone there is no scale.

    Example:
        >>> import jax, jax.numpy as jnp, probbp
        >>> from probbp.optim import dsbp
        >>> hessian = jnp.diag(jnp.array([100.0, 1.0, 1.0]))
        >>> spectrum = dsbp.leading_eigenpairs(
        ...     jax.random.key(0), lambda v: hessian @ v, jnp.zeros(3), rank=1)
        >>> metric = inverse_mass_matrix(spectrum, of="precision")
        >>> sampler = probbp.mala(
        ...     lambda x: -0.5 * x @ hessian @ x, step_size=0.3, inverse_mass_matrix=metric)
        >>> state = sampler.init(jnp.ones(3))
    """
    check_choice("of", of, ("covariance", "precision"))
    check_numbers("scale", scale, "(0, inf)")
    _require_full_rank(spectrum)
    size, rank = spectrum.vectors.shape
    # Without directions of its own the bulk is idle; the largest eigenvalue gives it a scale.
    bulk = spectrum.bulk if rank < size else spectrum.values[0]
    relative = spectrum.values / bulk
    root = bulk**0.5
    if of == "precision":
        relative, root = 1 / relative, 1 / root
    sigma = jnp.broadcast_to(scale * root, (size,))
    return LowRankInverseMassMatrix(sigma=sigma, U=spectrum.vectors, lam=relative)


def guide_params(
    loc: jax.Array, spectrum: Spectrum, *, prefix: str = "auto"
) -> dict[str, jax.Array]:
    r"""Return where NumPyro's `AutoLowRankMultivariateNormal` may start: at a tracked Gaussian.

    The guide's covariance is :math:`S (I + F F^\top) S` with a diagonal S; it takes the spectrum
    exactly where all eigenvalues are b at least, with S the root of b. Its parameters are then free
    to move.

    Args:
        loc: (d,), the mean, in unconstrained space and the order of `ravel_pytree`.
        spectrum: of the covariance, of the rank that the guide has. Of a precision the leading
            directions are the narrow ones, which this guide has no words for.
        prefix: the guide's.

    Returns:
        A dictionary for `SVI.init(..., init_params=...)` or `SVI.run(..., init_params=...)`.

    Raises:
        ValueError: as `inverse_mass_matrix`.

    Example:
        >>> import jax.numpy as jnp
        >>> from probbp.optim import dsbp
        >>> spectrum = dsbp.Spectrum(
        ...     jnp.array([[0.0], [1.0]]), jnp.array([4.0]), jnp.array(5.0), jnp.array(1))
        >>> start = guide_params(jnp.zeros(2), spectrum)
        >>> start["auto_scale"].tolist(), round(float(start["auto_cov_factor"][1, 0]) ** 2, 3)
        ([1.0, 1.0], 3.0)
    """
    _require_full_rank(spectrum)
    size, rank = spectrum.vectors.shape
    bulk = spectrum.bulk if rank < size else spectrum.values[-1]
    excess = jnp.maximum(spectrum.values / bulk - 1, 0)
    return {
        f"{prefix}_loc": loc,
        f"{prefix}_scale": jnp.full((size,), bulk**0.5),
        f"{prefix}_cov_factor": spectrum.vectors * excess**0.5,
    }


def _require_full_rank(spectrum: Spectrum) -> None:
    size, rank = spectrum.vectors.shape
    smallest = jnp.min(spectrum.values)
    if rank < size:
        smallest = jnp.minimum(smallest, spectrum.bulk)
    if isinstance(smallest, Tracer):
        return
    rounding = size * jnp.finfo(smallest.dtype).eps * spectrum.trace
    if not smallest > rounding:
        raise ValueError(
            f"The spectrum has {float(smallest):.3g} for an eigenvalue or for `bulk`, the mean of "
            "those not tracked, and a scale of that kind would leave directions unexplored. Track "
            "fewer directions, give `track` the trace of the whole matrix, or add a multiple of "
            "the identity (a prior's precision)."
        )
