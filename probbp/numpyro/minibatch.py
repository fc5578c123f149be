r"""Mini-batches of a NumPyro model, for exact samplers and for BlackJAX's stochastic-gradient ones.

A plate with `subsample_size` says which rows a gradient takes. Two things are made of it, and they
are not the same:

- **Exact.** `logdensity_fn` has the value of all rows and the gradient of some. `probbp.mala` keeps
  the posterior with it, as with any estimate. Each step pays one evaluation on all rows, without
  their gradient.
- **Not exact.** `grad_estimator` is for `blackjax.sgld`, `sghmc`, `sgnht` and `csgld`, which never
  look at all rows, and have no test that would correct them. From a Gaussian posterior of precision
  P, with gradients of variance V, SGLD of step size h draws with the variance times
  :math:`(2 + hV) / (2 - hP) \approx 1 + h (V + P) / 2`.

Of a logistic regression with 6366 rows, 9 coefficients and mini-batches of 100,
`tests/benchmarks/large_data.py` tells, in rows touched per effective draw after warm-up:

- The mini-batch drift is no bargain. MALA on all rows touches 31 thousand; with mini-batches of 100
  its steps must be so small that it doesn't converge, with 1000 it is 75 times as many. Control
  variates around the mode divide the gradient's variance by a thousand; then it is 54 thousand,
  most of them without gradient: a fifth less work than MALA's.
- SGLD's standard deviations are off by 13, 30 and 92 % at h = 4e-6, 1.6e-5 and 6.4e-5, with 61, 14
  and 3 thousand rows; with control variates by 4 and 11 % at h = 6.4e-5 and 2.5e-4, with 6 and 1.5.
- NumPyro's own HMCECS with its Taylor proxy touches 0.6 thousand, and is nearly exact. Where the
  posterior is as close to a Gaussian as here, take that; it needs second derivatives of each row's
  likelihood, and all of its rows' at the start.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import optax
from jax.lax import stop_gradient
from numpyro.infer import init_to_uniform
from numpyro.infer.util import initialize_model

from probbp.checks import check_count, check_estimator, check_function, check_rng_key
from probbp.numpyro.calls import Rows, handed, inspect_model
from probbp.numpyro.rows import (
    KeyedLogDensity,
    check_rows,
    draw_rows,
    over_all_rows,
    with_gradient_of_rows,
)
from probbp.samplers import checks
from probbp.types import Estimator, Tree, ways_out


class Minibatch(NamedTuple):
    """What a stochastic gradient is handed beside the position.

    Attributes:
        rows: name of each plate that subsamples to the indices of its rows, any number of them;
            a plate that is missing holds all its rows, and `None` stands for all rows of all.
        rng_key: key of the estimator's, and of `numpyro.prng_key()`.
    """

    rows: Rows | None
    rng_key: jax.Array


class Subsampled(NamedTuple):
    """A NumPyro model as functions of an unconstrained position, a dictionary by sites.

    Attributes:
        position: where a chain may start.
        logdensity_fn: `(position, rng_key=None)`: value of all rows, exact. Its gradient is that of
            all rows, too, or, given a key, as our estimators give it, of a mini-batch. Exact in
            every Metropolis sampler.
        minibatch_logdensity_fn: `(position, minibatch)`: an unbiased estimate of it.
        grad_estimator: `(position, minibatch)`: an unbiased estimate of its gradient, as BlackJAX's
            stochastic-gradient samplers take it. Not exact there.
        draw: `rng_key -> Minibatch`, rows drawn with replacement.
        all_rows: the `Minibatch` of all rows; its gradient is the exact one.
        with_gradient: `grad_estimator -> logdensity_fn`: value of all rows, and another gradient
            estimator's gradient, such as one with control variates. Exact again.
        constrain_fn: a position to the model's sites, deterministic ones included.
    """

    position: Tree
    logdensity_fn: KeyedLogDensity
    minibatch_logdensity_fn: Callable[[Tree, Minibatch], jax.Array]
    grad_estimator: Callable[[Tree, Minibatch], Tree]
    draw: Callable[[jax.Array], Minibatch]
    all_rows: Minibatch
    with_gradient: Callable[[Callable[[Tree, Minibatch], Tree]], KeyedLogDensity]
    constrain_fn: Callable[[Tree], Tree]


def subsampled(
    rng_key: jax.Array,
    model: Callable,
    *,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
    estimator: Estimator | None = None,
    batch_size: int | None = None,
    init_strategy: Callable = init_to_uniform,
) -> Subsampled:
    """Take a NumPyro model with plates that subsample apart into functions of the position.

    Transforms to unconstrained space and their log Jacobians are NumPyro's; the prior counts once,
    the likelihood of n of N rows N / n times. Plates may be nested, several, at any `dim`; rows are
    taken by `numpyro.subsample` or by index.

    A function that closes over data has them in its compiled program, twice in memory and slow to
    compile where they are large. So call this inside the function that you compile, with the data
    as that one's argument. `probbp.numpyro.Kernel` needs no such care, for `MCMC` hands it the
    data: it takes the same models, with the same meaning, and is always exact.

    Args:
        rng_key: key of the start.
        model: a NumPyro model with continuous latent sites, none of them inside a plate that
            subsamples.
        model_args: the model's arguments, with all rows.
        model_kwargs: its keyword arguments.
        estimator: how a mini-batch's log density is differentiated by `grad_estimator`, e.g.
            `probbp.estimators.forward(num_tangents=4)`; reverse mode by default. All rows are
            always differentiated in reverse mode. A sampler of ours has its own `estimator`.
        batch_size: how many rows of the largest plate are in memory at once where all are
            evaluated; all by default.
        init_strategy: NumPyro's, per site.

    Returns:
        A `Subsampled`.

    Raises:
        ValueError: for a model without a plate that subsamples, with latent sites inside one, with
            discrete latent sites or none, with more rows to draw than there are; and, unless it is
            being traced, where mini-batches don't average to all rows.
        TypeError: for an estimator that is none.

    Example:
        >>> import blackjax, jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, probbp
        >>> from probbp.numpyro import subsampled
        >>> def model(y):
        ...     mean = numpyro.sample("mean", dist.Normal(0, 10))
        ...     with numpyro.plate("rows", len(y), subsample_size=10) as index:
        ...         numpyro.sample("y", dist.Normal(mean, 1), obs=y[index])
        >>> parts = subsampled(jax.random.key(0), model, model_args=(jnp.linspace(0, 1, 1000),))
        >>> mala = probbp.mala(parts.logdensity_fn, step_size=1e-4)  # exact
        >>> state, info = mala.step(jax.random.key(1), mala.init(parts.position))
        >>> sgld = blackjax.sgld(parts.grad_estimator)  # not exact
        >>> minibatch = parts.draw(jax.random.key(2))
        >>> position = sgld.step(jax.random.key(3), parts.position, minibatch, 1e-4)

    Reference:
        Welling & Teh, 2011 (stochastic gradient Langevin dynamics); Baker et al., 2019,
        arXiv:1706.05439 (control variates: `blackjax.sgmcmc.gradients.control_variates`).
    """
    check_rng_key("rng_key", rng_key)
    if estimator is not None:
        check_estimator(estimator)
    check_function("model", model, "Pass a NumPyro model.")
    check_function("init_strategy", init_strategy, "Pass one of numpyro.infer, or of yours.")
    batch_size = None if batch_size is None else check_count("batch_size", batch_size)
    key_trace, key_rows, key_init, key_all = jax.random.split(rng_key, 4)
    model_kwargs = {} if model_kwargs is None else model_kwargs
    if not isinstance(model_args, tuple | list):
        raise TypeError(f"model_args must be a tuple, got {model_args!r}.")
    if not isinstance(model_kwargs, dict):
        raise TypeError(f"model_kwargs must be a dictionary, got {model_kwargs!r}.")
    plates, draws_keys = inspect_model(model, key_trace, model_args, model_kwargs, init_strategy)
    if not plates:
        raise ValueError(
            "The model has no plate that subsamples. Say which rows a gradient takes: "
            "`with numpyro.plate('rows', N, subsample_size=n) as index:`, with n below N, and the "
            "data taken by `[index]` or numpyro.subsample (inside numpyro.contrib.control_flow a "
            "plate isn't seen). Without mini-batches, numpyro.infer.util.initialize_model and "
            "probbp.numpyro.Kernel do."
        )
    info = initialize_model(
        key_init,
        handed(model),
        init_strategy=init_strategy,
        dynamic_args=True,
        model_args=model_args,
        model_kwargs={**model_kwargs, "rows_of_plates": draw_rows(key_rows, plates)},
        validate_grad=False,
    )

    def density(position, rng_key, rows):
        keywords = {**model_kwargs, "key_of_model": rng_key, "rows_of_plates": rows}
        return -info.potential_fn(*model_args, **keywords)(position)

    whole = over_all_rows(density, plates, batch_size)
    position = info.param_info.z
    logdensity_fn = with_gradient_of_rows(density, plates, whole)
    if draws_keys:
        checks.check_key(logdensity_fn, position)
    check_rows(density, plates, batch_size, position)

    def minibatch_logdensity_fn(position, minibatch):
        if minibatch.rows is None:
            return whole(position, minibatch.rng_key)
        return density(position, minibatch.rng_key, minibatch.rows)

    def grad_estimator(position, minibatch):
        if minibatch.rows is None or estimator is None:
            with ways_out():
                return jax.grad(minibatch_logdensity_fn)(position, minibatch)

        def fun(position, rng_key=None):
            return density(position, rng_key, minibatch.rows)

        return estimator(fun)(minibatch.rng_key, position)[1]

    def draw(rng_key):
        key_rows, key_rest = jax.random.split(rng_key)
        return Minibatch(draw_rows(key_rows, plates), key_rest)

    return Subsampled(
        position,
        logdensity_fn,
        minibatch_logdensity_fn,
        grad_estimator,
        draw,
        Minibatch(None, key_all),
        partial(_with_gradient, whole, draw),
        info.postprocess_fn(*model_args, **model_kwargs),
    )


def _with_gradient(
    whole: KeyedLogDensity, draw: Callable, grad_estimator: Callable
) -> KeyedLogDensity:
    def logdensity_fn(position, rng_key=None):
        if rng_key is None:
            return whole(position)
        here = stop_gradient(position)
        grad = stop_gradient(grad_estimator(here, draw(rng_key)))
        # A plane through the value: zero here, and its slope is the estimate.
        return whole(here) + optax.tree.vdot(grad, optax.tree.sub(position, here))

    return logdensity_fn
