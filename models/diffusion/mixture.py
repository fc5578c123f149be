"""A Gaussian mixture's own denoiser, in closed form: a diffusion model with known posteriors."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from probbp.checks import check_count, check_number, check_numbers
from probbp.ops.sdo import Schedule


def mixture(
    weights: jax.typing.ArrayLike,
    means: jax.typing.ArrayLike,
    covariances: jax.typing.ArrayLike,
) -> dist.MixtureSameFamily:
    """Return a mixture of Gaussians as NumPyro has it.

    Args:
        weights: (k,), summing to one.
        means: (k, d).
        covariances: (k, d, d), or (d, d) for all.

    Returns:
        A `MixtureSameFamily`. See `mixture_denoiser` for an example.
    """
    check_numbers("weights", weights, "[0, inf)")
    check_numbers("means", means, "(-inf, inf)")
    check_numbers("covariances", covariances, "(-inf, inf)")
    means = jnp.asarray(means, float)
    if means.ndim != 2:
        raise ValueError(f"means must be (components, d), got {means.shape}.")
    covariances = jnp.broadcast_to(jnp.asarray(covariances, float), (*means.shape, means.shape[1]))
    return dist.MixtureSameFamily(
        dist.Categorical(jnp.asarray(weights, float)), dist.MultivariateNormal(means, covariances)
    )


def mixture_of(
    x: jax.Array, labels: jax.Array, num_classes: int, *, ridge: float
) -> dist.MixtureSameFamily:
    """Return the mixture with a Gaussian of its own for each class of the data.

    Args:
        x: (rows, d).
        labels: (rows,), integers below `num_classes`, each of which occurs.
        num_classes: number of Gaussians.
        ridge: variance that is added in every direction.

    Returns:
        A `MixtureSameFamily`.

    Example:
        >>> import jax.numpy as jnp
        >>> x, labels = jnp.array([[0.0], [1.0], [5.0], [7.0]]), jnp.array([0, 0, 1, 1])
        >>> mixture_of(x, labels, 2, ridge=0.1).component_distribution.loc[:, 0].tolist()
        [0.5, 6.0]
    """
    num_classes = check_count("num_classes", num_classes)
    check_number("ridge", ridge, "[0, inf)")
    member = jax.nn.one_hot(labels, num_classes, dtype=x.dtype)
    counts = member.sum(0)
    means = member.T @ x / counts[:, None]
    second = jnp.einsum("rk,ri,rj->kij", member, x, x) / counts[:, None, None]
    covariances = second - means[:, :, None] * means[:, None, :]
    covariances = covariances + ridge * jnp.eye(x.shape[1], dtype=x.dtype)
    return mixture(counts / len(x), means, covariances)


def mixture_denoiser(
    data: dist.MixtureSameFamily, schedule: Schedule
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    r"""Return the best prediction of the noise for data from a mixture.

    Noised, a mixture stays one, with means :math:`\sqrt{\bar\alpha} m_k` and covariances
    :math:`\bar\alpha C_k + (1 - \bar\alpha) I`. Exact: :math:`\epsilon(x, t) =
    -\sqrt{1 - \bar\alpha_t}\, \nabla \log p_t(x)`. A sampler's law comes as close to the mixture as
    its number of steps, and what signal is left at its start, let it.

    Args:
        data: from `mixture`.
        schedule: that of the sampler.

    Returns:
        `(x (batch, d), t (batch,)) -> (batch, d)`, for `prediction="eps"`. k products with d x d
        matrices a sample.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from probbp.ops import sdo
        >>> schedule = sdo.linear(100)
        >>> data = mixture([0.25, 0.75], [[-2.0], [2.0]], [[0.01]])
        >>> z = jax.random.normal(jax.random.key(0), (1000, 1))
        >>> x = sdo.sample(mixture_denoiser(data, schedule), z, schedule)
        >>> bool(abs(jnp.mean(x > 0) - 0.75) < 0.05)
        True
    """
    gaussians = data.component_distribution
    log_weights = jax.nn.log_softmax(data.mixing_distribution.logits)
    means = gaussians.loc
    variances, bases = jnp.linalg.eigh(gaussians.covariance_matrix)
    train_signal = schedule.train_signal

    def denoiser(x, t):
        signal = jnp.asarray(train_signal, x.dtype)[t.astype(int)][:, None, None]
        scale = signal * variances.astype(x.dtype) + 1 - signal  # (batch, k, d)
        centred = x[:, None, :] - jnp.sqrt(signal) * means.astype(x.dtype)
        basis = bases.astype(x.dtype)
        coordinates = jnp.einsum("bki,kij->bkj", centred, basis)
        distances = jnp.sum(coordinates**2 / scale + jnp.log(scale), axis=-1)
        shares = jax.nn.softmax(log_weights.astype(x.dtype) - distances / 2)
        pull = jnp.einsum("bk,bkj,kij->bi", shares, coordinates / scale, basis)
        return jnp.sqrt(1 - signal[:, 0]) * pull

    return denoiser


def mixture_posterior(
    data: dist.MixtureSameFamily, matrix: jax.Array, y: jax.Array, scale: float
) -> dist.MixtureSameFamily:
    """Return the law of x from a mixture, given y ~ N(matrix x, scale^2 I): a mixture again.

    Args:
        data: from `mixture`; the prior.
        matrix: (outputs, d).
        y: (outputs,).
        scale: standard deviation of the noise.

    Returns:
        A `MixtureSameFamily`.

    Example:
        >>> import jax.numpy as jnp
        >>> data = mixture([0.5, 0.5], [[-2.0, 0.0], [2.0, 0.0]], jnp.eye(2))
        >>> seen = mixture_posterior(data, jnp.array([[1.0, 0.0]]), jnp.array([2.0]), 1.0)
        >>> seen.mixing_distribution.probs.round(2).tolist()
        [0.02, 0.98]
    """
    check_number("scale", scale, "(0, inf)")
    gaussians = data.component_distribution
    covariances = gaussians.covariance_matrix
    cross = covariances @ matrix.T  # (k, d, outputs)
    total = matrix @ cross + scale**2 * jnp.eye(len(y), dtype=cross.dtype)
    predicted = gaussians.loc @ matrix.T
    gain = jnp.swapaxes(jnp.linalg.solve(total, jnp.swapaxes(cross, -1, -2)), -1, -2)
    evidence = dist.MultivariateNormal(predicted, total).log_prob(y)
    logits = data.mixing_distribution.logits + evidence
    means = gaussians.loc + jnp.einsum("kio,ko->ki", gain, y - predicted)
    covariances = covariances - gain @ jnp.swapaxes(cross, -1, -2)
    return mixture(jax.nn.softmax(logits), means, covariances)
