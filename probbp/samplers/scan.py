"""`jax.lax.scan` that may be interrupted: for NumPyro's SVI, an Optax loop, any such update."""

import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from probbp.checks import check_count, check_function
from probbp.runs.devices import put
from probbp.runs.fingerprints import fingerprint
from probbp.runs.loop import NUM_UPDATES, opened
from probbp.samplers import checks
from probbp.samplers.programs import latest
from probbp.types import Tree


def checkpointed_scan(
    f: Callable[[Tree, None], tuple[Tree, Tree]],
    init: Tree,
    length: int,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int | None = None,
    progress_bar: bool = True,
) -> tuple[Tree, Tree]:
    """Run `jax.lax.scan(f, init, None, length)`, and save its carry on the way.

    The same call, made again after whatever stopped the loop, goes on from the newest checkpoint
    and gives, bit for bit, what an uninterrupted one gives. (NumPyro's `Trace_ELBO` adds its sites
    in the order of a Python set: across processes set the environment variable PYTHONHASHSEED, or
    be warned that it is so to rounding.) The keys of random steps belong in the
    carry, where `numpyro.infer.SVI` and `probbp.numpyro.Optim` have them. Everything that `f`
    closes over is part of the checkpoint's fingerprint: with other data, another optimiser, or
    another `init` it is refused.

    Args:
        f: `(carry, None) -> (carry, y)`, as in `jax.lax.scan`.
        init: the first carry, a pytree of arrays and keys.
        length: number of steps.
        checkpoint: a folder, made where it is not there; `None` to save nothing.
        every: steps after which the loop comes back to the host, and saves; by default a fortieth
            of `length`.
        progress_bar: whether to show progress, and the last y where it is a scalar.

    Returns:
        The last carry, and the outputs (length, ...) as NumPy arrays. They are in memory, and in
        each checkpoint: let them be scalars, such as losses.

    Raises:
        ImportError: for a checkpoint without Orbax.
        OSError: for a folder to which another run writes at this moment.
        TypeError: inside of a transformation of JAX.
        ValueError: for counts that are not positive, and a checkpoint that is damaged or another
            loop's.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax, tempfile
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from probbp.estimators import forward
        >>> from probbp.numpyro import Optim
        >>> from probbp import checkpointed_scan
        >>> def model(y):
        ...     mean = numpyro.sample("mean", dist.Normal(0, 1))
        ...     numpyro.sample("y", dist.Normal(mean, 1), obs=y)
        >>> y = jnp.ones(5)
        >>> optim = Optim(optax.adam(0.05), forward(num_tangents=2))
        >>> svi = SVI(model, AutoNormal(model), optim, Trace_ELBO())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     state, losses = checkpointed_scan(
        ...         lambda state, _: svi.update(state, y), svi.init(jax.random.key(0), y), 100,
        ...         checkpoint=folder + "/svi", every=50, progress_bar=False)
        >>> params = svi.get_params(state)
    """
    check_function("f", f, "Pass (carry, None) -> (carry, y), as to jax.lax.scan.")
    length = check_count("length", length)
    every = -(-length // NUM_UPDATES) if every is None else every
    every = check_count("every", every)
    checks.check_folder("checkpoint", checkpoint)
    _refuse_tracers(init)
    init = _typed(f, jax.tree.map(jnp.asarray, init))
    y = jax.eval_shape(f, init, None)[1]

    def steps(carry, num):
        return jax.lax.scan(f, carry, None, length=num)

    described = {"the program": (lambda c: steps(c, 1), (init,))}
    run = latest((), described, jax.jit(steps, static_argnums=1))

    def like(done, note):
        del note
        ys = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((done, *leaf.shape), leaf.dtype), y)
        return jax.eval_shape(lambda: init), ys

    settings = {"length": length, "every": every}
    with opened(
        length,
        checkpoint=checkpoint,
        prints=lambda: fingerprint(described, init, settings),
        like=like,
        progress_bar=progress_bar,
    ) as loop:
        carry, *history = (init,) if loop.state is None else loop.state
        carry = put(carry)

        def state():
            history[:] = [_joined(history)]
            return carry, history[0]

        for start, num in loop.stretches(every, length):
            carry, ys = run(carry, num)
            _refuse_tracers(carry)
            history.append(jax.device_get(ys))
            loop.show(num, _words(history[-1]))
            loop.keep(start + num, state)
    return carry, _joined(history)


def _typed(f, init):
    """Give Python's numbers in the first carry the types that `jax.lax.scan` gives them.

    Else the second stretch, which begins with what the first has returned, would be compiled again.
    """
    carry, _ = jax.eval_shape(f, init, None)
    if jax.tree.structure(carry) != jax.tree.structure(init):
        return init  # which JAX's scan refuses in words of its own

    def typed(leaf, out):
        is_weak = getattr(leaf, "weak_type", False)  # a key has no such attribute
        return jnp.asarray(leaf, out.dtype) if is_weak else leaf

    return jax.tree.map(typed, init, carry)


def _refuse_tracers(carry):
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(carry)):
        raise TypeError(
            "checkpointed_scan comes back to the host between steps: it can't be inside jax.jit, "
            "jax.vmap or jax.grad. Call it outside of them, or take jax.lax.scan there."
        )


def _joined(history):
    return jax.tree.map(lambda *parts: np.concatenate(parts), *history)


def _words(ys: Tree) -> str:
    """Return the last of the outputs, where they are scalars."""
    leaves = jax.tree.leaves(ys)
    return f"{leaves[0][-1]:.4g}" if len(leaves) == 1 and np.ndim(leaves[0]) == 1 else ""
