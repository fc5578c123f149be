r"""Training-free Bayesian low-rank adaptation: a posterior put around a trained adapter.

TFB, Shi, Wang, Han, Zhang & Wang, 2024, arXiv:2412.05723. The update B A of a finished fit is
rewritten by the singular values d of B, and A gets the standard deviation :math:`\sigma_q / d_i` in
its row i: isotropic noise on the weight, in the space of the update. The one number
:math:`\sigma_q` is the largest that leaves the loss on some anchor data where it was.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from probbp.checks import check_count, check_number
from probbp.models.blob import BayesianLora


def training_free(
    lora: BayesianLora, params: Mapping[str, jax.Array], sigma: float | jax.Array
) -> dict[str, jax.Array]:
    r"""Return a posterior around a trained adapter, for one scale of its noise.

    With the singular value decomposition :math:`B = U \mathrm{diag}(d) V^T`,

    .. math::
        B' = U \mathrm{diag}(d), \qquad M' = V^T M, \qquad \Omega'_{ij} = \sigma_q / d_i

    The mean of the update is what it was: B' M' = B M. Directions that B does not use
    (:math:`d_i` below a thousandth of the largest) get no noise: it would do nothing.

    Args:
        lora: from `bayesian_lora`.
        params: of a fit, `w_loc` and `w_B` for each adapted weight; `w_g` is ignored.
        sigma: sigma_q, a standard deviation in units of the weight, before the scale alpha / rank.

    Returns:
        Parameters for `probbp.models.blob.predict`.

    Raises:
        ValueError: for stacked layers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from probbp.models.blob import bayesian_lora
        >>> network, base = lambda params, x: x @ params["w"], {"w": jnp.zeros((4, 2))}
        >>> lora = bayesian_lora(network, base, target="w", example=(jnp.eye(4),), rank=2)
        >>> trained = {"w_loc": jnp.ones((2, 4)), "w_B": jnp.array([[1.0, 0.0], [0.0, 2.0]])}
        >>> sorted(training_free(lora, trained, 0.1))
        ['w_B', 'w_g', 'w_loc']
    """
    check_number("sigma", sigma, "[0, inf)")
    posterior = {}
    for name in lora.layouts:
        loc, b = params[f"{name}_loc"], params[f"{name}_B"]
        if b.ndim != 2:
            raise ValueError(
                f"{name!r} is a stack of weights, of which TFB would need a decomposition each: "
                "adapt unstacked layers."
            )
        rank = b.shape[1]
        u, d, vt = jnp.linalg.svd(b, full_matrices=False)
        # More rows of A than outputs: the last ones have no direction to act in.
        missing = rank - len(d)
        u, d, vt = (
            jnp.pad(u, ((0, 0), (0, missing))),
            jnp.pad(d, (0, missing)),
            jnp.pad(vt, ((0, missing), (0, 0))),
        )
        is_used = d > 1e-3 * jnp.max(d)
        omega = jnp.where(is_used, sigma / jnp.where(is_used, d, 1.0), 0.0)
        posterior[f"{name}_loc"] = vt @ loc
        posterior[f"{name}_B"] = u * d
        posterior[f"{name}_g"] = jnp.broadcast_to(jnp.sqrt(omega)[:, None], loc.shape)
    return posterior


def search(
    loss_fn: Callable[[jax.Array], Any],
    *,
    tolerance: float = 0.003,
    bounds: tuple[float, float] = (1e-4, 1.0),
    num_steps: int = 12,
) -> jax.Array:
    """Find the largest noise that an anchor loss does not feel: bisection, on a logarithmic scale.

    The loss is taken to grow with the noise. Draw with the same key for every scale, so that it
    does.

    Args:
        loss_fn: sigma_q to the loss of the anchor data, the mean negative log likelihood of the
            mean prediction, as `training_free` and `predict` give it.
        tolerance: by how much the loss may grow, relative to that at the lower bound. The paper has
            0.3 %.
        bounds: of sigma_q.
        num_steps: halvings of the interval.

    Returns:
        sigma_q, a scalar.

    Raises:
        ValueError: for bounds that are not positive and increasing.

    Example:
        >>> sigma = search(lambda sigma: 1 + sigma**2, tolerance=0.01, num_steps=20)
        >>> bool(abs(sigma - 0.1) < 1e-3)
        True
    """
    num_steps = check_count("num_steps", num_steps)
    check_number("tolerance", tolerance, "[0, inf)")
    low, high = bounds
    if not 0 < low < high:
        raise ValueError(f"bounds must be positive and increasing, got {bounds}.")
    most = loss_fn(jnp.asarray(low)) * (1 + tolerance)

    def halve(_, interval):
        low, high = interval
        middle = (low + high) / 2
        is_fine = loss_fn(jnp.exp(middle)) <= most
        return jnp.where(is_fine, middle, low), jnp.where(is_fine, high, middle)

    interval = jnp.log(jnp.asarray(low)), jnp.log(jnp.asarray(high))
    return jnp.exp(jax.lax.fori_loop(0, num_steps, halve, interval)[0])
