"""Train a denoiser on data, and tune it for what its samples should be."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from probbp.checks import check_choice, check_count, check_number, check_rng_key
from probbp.models.diffusion.descent import descend
from probbp.models.modules import check_module
from probbp.ops import sdo


class Trained(NamedTuple):
    """A network, and how it came about.

    Attributes:
        network: a new one; that which was given is as it was.
        losses: (num_steps,).
    """

    network: Any
    losses: np.ndarray


def train(
    rng_key: jax.Array,
    network: Any,
    x: jax.Array,
    schedule: sdo.Schedule,
    *,
    condition: jax.Array | None = None,
    num_steps: int,
    batch_size: int = 128,
    optimiser: optax.GradientTransformation | None = None,
    prediction: sdo.Prediction = "v",
    drop: float = 0.1,
    decay: float = 0.999,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 500,
    progress_bar: bool = True,
) -> Trained:
    r"""Train a network to denoise.

    .. math:: E_{x_0, t, \epsilon} | f_\theta(\sqrt{\bar\alpha_t} x_0 + \sqrt{1 - \bar\alpha_t}
        \epsilon, t) - \epsilon |^2

    for `prediction="eps"`, the mean over the numbers of a sample, with t uniform; in the place of
    the last :math:`\epsilon` v for "v".

    Args:
        rng_key: of the run: the same key gives the same network, interrupted or not.
        network: an NNX module, `(x, t)` or, with `condition`, `(x, t, condition)`.
        x: (rows, ...), the data, of about unit variance.
        schedule: any with the `train_signal` that the sampler will have.
        condition: (rows, n), of each row, such as one-hot classes.
        num_steps: of the optimiser.
        batch_size: rows of a step, drawn with replacement.
        optimiser: by default Adam at 1e-3, warmed up and decayed on a cosine.
        prediction: what the network predicts, as `probbp.ops.sdo.sample` is told.
        drop: probability with which a row's condition is zeros, so that the network can be run
            without one and its guidance be strengthened (Ho & Salimans, 2022, arXiv:2207.12598).
        decay: of the average of parameters that is returned, by step.
        checkpoint: a folder of Orbax checkpoints, made where it is not there; a second call goes on
            from the last. It belongs to this key, network, data and these options.
        every: steps between checkpoints.
        progress_bar: whether to show steps and loss.

    Returns:
        The network with averaged parameters, and the losses.

    Raises:
        FloatingPointError: where the loss is no longer finite.
        ImportError: for a checkpoint without the package orbax-checkpoint.
        ValueError: for counts that are not positive, and another run's checkpoint.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from probbp.models import diffusion
        >>> from probbp.ops import sdo
        >>> x = jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, (200, 2)), 1.0, -1.0)
        >>> schedule = sdo.linear(20)
        >>> network = diffusion.Denoiser((2,), width=32, num_blocks=1, rngs=nnx.Rngs(0))
        >>> options = {"num_steps": 200, "batch_size": 64, "progress_bar": False}
        >>> trained = diffusion.train(jax.random.key(1), network, x, schedule, **options)
        >>> bool(trained.losses[-20:].mean() < trained.losses[:20].mean())
        True
    """
    check_rng_key("rng_key", rng_key)
    num_steps, every = check_count("num_steps", num_steps), check_count("every", every)
    batch_size = check_count("batch_size", batch_size)
    check_choice("prediction", prediction, get_args(sdo.Prediction))
    check_number("drop", drop, "[0, 1]")
    check_number("decay", decay, "[0, 1)")
    check_module("network", network)
    graph, params, rest = nnx.split(network, nnx.Param, ...)
    if optimiser is None:
        rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, num_steps // 20 + 1, num_steps)
        optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    train_signal = jnp.asarray(schedule.train_signal, x.dtype)

    def loss_fn(params, rng_key, data):
        x, condition = data
        key_rows, key_time, key_noise, key_drop = jax.random.split(rng_key, 4)
        rows = jax.random.randint(key_rows, (batch_size,), 0, len(x))
        t = jax.random.randint(key_time, (batch_size,), 0, len(train_signal))
        clean = x[rows]
        noise = jax.random.normal(key_noise, clean.shape, clean.dtype)
        signal = train_signal[t].reshape(-1, *[1] * (clean.ndim - 1))
        noisy = jnp.sqrt(signal) * clean + jnp.sqrt(1 - signal) * noise
        target = noise
        if prediction == "v":
            target = jnp.sqrt(signal) * noise - jnp.sqrt(1 - signal) * clean
        args = noisy, t.astype(x.dtype)
        if condition is not None:
            kept = jax.random.bernoulli(key_drop, 1 - drop, (batch_size, 1))
            args = (*args, condition[rows] * kept)
        output = nnx.merge(graph, params, rest)(*args)
        return jnp.mean((output - target) ** 2)

    state = descend(
        rng_key,
        loss_fn,
        params,
        (x, condition),
        optimiser,
        num_steps=num_steps,
        decay=decay,
        checkpoint=checkpoint,
        every=every,
        progress_bar=progress_bar,
        title="training",
    )
    return Trained(nnx.merge(graph, state.average, rest), np.asarray(state.losses))


def tune(
    rng_key: jax.Array,
    network: Any,
    loss_fn: Callable[[jax.Array], jax.Array],
    shape: tuple[int, ...],
    schedule: sdo.Schedule,
    *,
    num_steps: int,
    batch_size: int = 32,
    optimiser: optax.GradientTransformation | None = None,
    keep_step: Any = "random",
    prediction: sdo.Prediction = "v",
    surrogate: sdo.GaussianPath | None = None,
    remat: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 20,
    progress_bar: bool = True,
) -> Trained:
    """Move a network's parameters so that a metric of its samples falls.

    Each step draws fresh noise, runs the sampler (DDIM), and descends the metric of the samples by
    the derivative through `keep_step`. Estimated: that derivative; with the default it has the
    right sign rather than the right length, so that an optimiser that normalises, as Adam does,
    is called for. `examples/papers/sdo.py` compares.

    Nothing holds the samples to the data but the number of steps and their size: a metric that can
    be had by leaving the data behind, will. Watch the samples.

    Args:
        rng_key: of the run.
        network: an NNX module, `(x, t)`, trained.
        loss_fn: samples `(batch, *shape)` to a scalar, the metric to be lowered.
        shape: of a sample.
        schedule: of the sampler.
        num_steps: of the optimiser.
        batch_size: samples of a step.
        optimiser: by default Adam at 1e-4.
        keep_step: as in `probbp.ops.sdo.sample`.
        prediction: what the network predicts.
        surrogate: as in `probbp.ops.sdo.sample`.
        remat: its `checkpoint`: recompute instead of store.
        checkpoint: a folder of Orbax checkpoints, as in `train`.
        every: steps between checkpoints.
        progress_bar: whether to show steps and metric.

    Returns:
        The network, and the metric before each step.

    Raises:
        FloatingPointError: where the metric is no longer finite.
        ImportError: for a checkpoint without the package orbax-checkpoint.
        ValueError: for counts that are not positive, and another run's checkpoint.

    Reference:
        Dou et al., 2025, arXiv:2505.07477; a random step of each sample, instead of one for the
        batch, is ours.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from probbp.models import diffusion
        >>> from probbp.ops import sdo
        >>> network = diffusion.Denoiser((2,), width=8, num_blocks=1, rngs=nnx.Rngs(0))
        >>> options = {"num_steps": 2, "batch_size": 4, "progress_bar": False}
        >>> def loss_fn(x):
        ...     return (x**2).mean()
        >>> tuned = diffusion.tune(
        ...     jax.random.key(1), network, loss_fn, (2,), sdo.linear(4), **options
        ... )
        >>> tuned.losses.shape
        (2,)
    """
    check_rng_key("rng_key", rng_key)
    num_steps, every = check_count("num_steps", num_steps), check_count("every", every)
    batch_size = check_count("batch_size", batch_size)
    check_choice("prediction", prediction, get_args(sdo.Prediction))
    check_module("network", network)
    graph, params, rest = nnx.split(network, nnx.Param, ...)
    dtype = jnp.result_type(*jax.tree.leaves(params))

    def metric(params, rng_key, _):
        key_noise, key_keep = jax.random.split(rng_key)
        noise = jax.random.normal(key_noise, (batch_size, *shape), dtype)
        samples = sdo.sample(
            nnx.merge(graph, params, rest),
            noise,
            schedule,
            keep_step=keep_step,
            surrogate=surrogate,
            rng_key=key_keep,
            prediction=prediction,
            checkpoint=remat,
        )
        return loss_fn(samples)

    state = descend(
        rng_key,
        metric,
        params,
        None,
        optax.adam(1e-4) if optimiser is None else optimiser,
        num_steps=num_steps,
        decay=0.0,
        checkpoint=checkpoint,
        every=every,
        progress_bar=progress_bar,
        title="tuning",
    )
    return Trained(nnx.merge(graph, state.params, rest), np.asarray(state.losses))
