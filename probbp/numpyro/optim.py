"""Any gradient estimate in NumPyro's `SVI`, by way of its optimiser."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from numpyro.optim import _NumPyroOptim

from probbp.checks import check_estimator, check_function, check_rng_key
from probbp.types import Estimator, Tree, ways_out


class OptimState(NamedTuple):
    """What `Optim` keeps beside the number of steps made.

    Attributes:
        params: what is optimised, unconstrained.
        optax_state: state of the Optax transformation.
        rng_key: key of the next estimate; `_replace` sets another.
    """

    params: Tree
    optax_state: Any
    rng_key: jax.Array


class Optim(_NumPyroOptim):
    """An optimiser for `numpyro.infer.SVI` that differentiates by any estimator.

    SVI itself stays as it is: `run`, `update`, `stable_update`, the progress bar, constrained
    parameters, mutable state, subsampling. With `estimators.reverse()` the losses and parameters
    are, bit for bit, those of SVI with the plain Optax transformation.

    Exact: the loss. Estimated: its gradient with respect to the unconstrained parameters, beside
    what the ELBO's own sample does. Each step has a fresh key, which follows from `rng_key` alone;
    a model's random operations (`numpyro.prng_key()`) have fresh ones from SVI. What remembers past
    gradients, such as clipping to a running scale, belongs in the transformation: `optax.chain`.

    Args:
        transformation: an Optax optimiser.
        estimator: such as `probbp.estimators.forward(num_tangents=16)`.
        rng_key: key of the estimates. SVI gives an optimiser none, so that runs which differ in
            SVI's key alone share the directions of their estimates.
        extra_args: what the transformation's `update` is given beside `value`, as a function of the
            model's mutable state (`numpyro.mutable`) after the step: `lambda state: {"acts": ...}`
            for the activations that `probbp.optim.dsbp` tracks.

    Raises:
        TypeError: for a transformation that is not Optax's, or an estimator that is none.
        ValueError: when SVI is asked for `forward_mode_differentiation`, which is the estimator's
            choice here.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from probbp.estimators import forward
        >>> from probbp.numpyro import Optim
        >>> def model(y):
        ...     mean = numpyro.sample("mean", dist.Normal(0, 1))
        ...     numpyro.sample("y", dist.Normal(mean, 1), obs=y)
        >>> optim = Optim(optax.adam(0.05), forward(num_tangents=2))
        >>> svi = SVI(model, AutoNormal(model), optim, Trace_ELBO())
        >>> result = svi.run(jax.random.key(0), 100, jnp.ones(5), progress_bar=False)
    """

    def __init__(  # noqa: D107 (the class has the docstring)
        self,
        transformation: optax.GradientTransformation,
        estimator: Estimator,
        *,
        rng_key: jax.Array | None = None,
        extra_args: Callable[[Any], dict[str, Any]] | None = None,
    ):
        if not isinstance(transformation, optax.GradientTransformation):
            raise TypeError(
                f"transformation must be one of Optax's, such as optax.adam(1e-2), got an "
                f"object of type {type(transformation).__name__}."
            )
        check_estimator(estimator)
        rng_key = jax.random.key(0) if rng_key is None else rng_key
        check_rng_key("rng_key", rng_key)
        if extra_args is not None:
            check_function("extra_args", extra_args, "Pass mutable state -> keyword arguments.")
        transformation = optax.with_extra_args_support(transformation)

        def init_fn(params):
            return OptimState(params, transformation.init(params), rng_key)

        def update_fn(step, grads, state, value, **extra):
            updates, optax_state = transformation.update(
                grads, state.optax_state, state.params, value=value, **extra
            )
            params = optax.apply_updates(state.params, updates)
            return OptimState(params, optax_state, state.rng_key)

        def make():
            return init_fn, update_fn, lambda state: state.params

        super().__init__(make, update_with_value=True)
        self._estimator = estimator
        self._extra_args = extra_args

    def update(self, g, state, value=None, mutable_state=None):
        """Take one step on a gradient."""
        step, optim_state = state
        extra = {} if self._extra_args is None else self._extra_args(mutable_state)
        return step + 1, self.update_fn(step, g, optim_state, value=value, **extra)

    def eval_and_update(self, fn, state, forward_mode_differentiation=False):
        """Take one step on the estimate of `fn`'s gradient; called by `SVI.update`."""
        (out, aux), grads, state = self._estimate(fn, state, forward_mode_differentiation)
        return (out, aux), self.update(grads, state, value=out, mutable_state=aux)

    def eval_and_stable_update(self, fn, state, forward_mode_differentiation=False):
        """Do the same unless the loss or the estimate is not finite: then only the key moves on."""
        (out, aux), grads, state = self._estimate(fn, state, forward_mode_differentiation)
        finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((out, grads))]
        out, state = jax.lax.cond(
            jnp.all(jnp.stack(finite)),
            lambda: (out, self.update(grads, state, value=out, mutable_state=aux)),
            lambda: (jnp.full_like(out, jnp.nan), state),
        )
        return (out, aux), state

    def _estimate(self, fn, state, forward_mode_differentiation):
        if forward_mode_differentiation:
            raise ValueError(
                "Optim differentiates by its estimator: leave forward_mode_differentiation out. "
                "estimators.forward is forward mode; exactly so with tangents='orthogonal' and as "
                "many tangents as parameters."
            )
        step, optim_state = state
        next_key, key_estimate = jax.random.split(optim_state.rng_key)
        with ways_out():
            value, grads = self._estimator(fn, has_aux=True)(key_estimate, optim_state.params)
        return value, grads, (step, optim_state._replace(rng_key=next_key))
