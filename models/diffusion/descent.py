"""Minimise a noisy loss: the loop of training and of fine-tuning, with progress and checkpoints."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm.auto import tqdm

from probbp.checks import check_count
from probbp.runs import checkpoints
from probbp.runs.devices import devices
from probbp.runs.fingerprints import fingerprint


class Descent(NamedTuple):
    """Where a descent is.

    Attributes:
        params: what is moved.
        average: of the parameters so far, exponentially weighted.
        optax_state: of the optimiser.
        losses: (num_steps,); NaN where the descent has not been.
    """

    params: Any
    average: Any
    optax_state: Any
    losses: jax.Array


def descend(
    rng_key: jax.Array,
    loss_fn: Callable[..., jax.Array],
    params: Any,
    data: Any,
    optimiser: optax.GradientTransformation,
    *,
    num_steps: int,
    decay: float,
    checkpoint: str | os.PathLike[str] | None,
    every: int,
    progress_bar: bool,
    title: str,
) -> Descent:
    """Take steps of an optimiser on `loss_fn(params, rng_key, data)`, each with a key of its own.

    The same key gives the same run, also where that was interrupted: a second call with the same
    checkpoint goes on from the last that was written. It belongs to the key, the loss with all that
    it closes over, the start, the data, the optimiser and `num_steps`; others are refused.

    Args:
        rng_key: of the run.
        loss_fn: a scalar.
        params: where to start, a pytree.
        data: pytree of arrays, handed to the compiled step.
        optimiser: of Optax.
        num_steps: in all.
        decay: of the average, by step; its start is that of the parameters, whose weight at step n
            is at most 10 / (n + 10) whatever the decay.
        checkpoint: a folder of Orbax checkpoints, made where it is not there.
        every: steps between checkpoints, and between returns from the compiled loop.
        progress_bar: whether to show steps and loss.
        title: of the bar.

    Raises:
        FloatingPointError: where the loss is no longer finite.
        ImportError: for a checkpoint without the package orbax-checkpoint.
        ValueError: for counts that are not positive, and another run's checkpoint.
    """
    num_steps, every = check_count("num_steps", num_steps), check_count("every", every)

    data = jax.tree.map(jnp.asarray, data)
    steps = _steps(loss_fn, optimiser, decay)
    advance = jax.jit(steps, static_argnums=4, donate_argnums=1)
    on = devices(None, 1)
    # Copies, because the compiled loop writes over its argument.
    params, average = (jax.tree.map(jnp.array, params) for _ in range(2))
    state = Descent(params, average, optimiser.init(params), jnp.full(num_steps, jnp.nan))
    done = 0
    with ExitStack() as stack:
        save = None
        if checkpoint is not None:
            stack.enter_context(checkpoints.only_writer(checkpoint, on))
            like = jax.eval_shape(lambda: state)
            one_step = lambda key, state, begin: steps(key, state, begin, data, 1)
            described = {"the training step or its data": (one_step, (rng_key, like, 0))}
            prints = fingerprint(described, (rng_key, params), {"num_steps": num_steps})
            found = checkpoints.newest(checkpoint, prints, lambda done, note: like)
            save = stack.enter_context(checkpoints.saver(checkpoint, prints, found, on))
            if found is not None:
                done, state = found.done, on.put(found.state)
        bar = tqdm(total=num_steps, initial=done, desc=title, disable=not progress_bar)
        stack.enter_context(bar)
        while done < num_steps:
            length = min(every, num_steps - done)
            state = advance(rng_key, state, done, data, length)
            losses = np.asarray(state.losses[done : done + length])
            _check_finite(losses, done)
            done += length
            bar.update(length)
            bar.set_postfix_str(f"loss {losses.mean():.4g}", False)
            if save is not None:
                save(done, state)
    return state


def _steps(loss_fn, optimiser, decay):
    """Return `(rng_key, state, begin, data, length) -> state` after so many steps."""

    def steps(rng_key, state, begin, data, length):
        def step(state, n):
            key = jax.random.fold_in(rng_key, n)
            loss, grad = jax.value_and_grad(loss_fn)(state.params, key, data)
            updates, optax_state = optimiser.update(grad, state.optax_state, state.params)
            params = optax.apply_updates(state.params, updates)
            share = jnp.maximum(1 - decay, 10 / (n + 10))
            average = jax.tree.map(
                lambda mean, leaf: mean + share.astype(leaf.dtype) * (leaf - mean),
                state.average,
                params,
            )
            losses = state.losses.at[n].set(loss.astype(state.losses.dtype))
            return Descent(params, average, optax_state, losses), None

        return jax.lax.scan(step, state, begin + jnp.arange(length))[0]

    return steps


def _check_finite(losses, begin):
    if not np.isfinite(losses).all():
        raise FloatingPointError(
            f"The loss is {losses[~np.isfinite(losses)][0]} within steps {begin} to "
            f"{begin + len(losses)}. Lower the learning rate, or clip by "
            "optax.clip_by_global_norm."
        )
