"""Any algorithm of BlackJAX's shape as a kernel of NumPyro's `MCMC`, and a block of its `Gibbs`."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from numpyro.infer import init_to_uniform
from numpyro.infer.mcmc import MCMCKernel
from numpyro.infer.util import initialize_model
from numpyro.util import identity, is_prng_key

from probbp.checks import check_count, check_function, check_number, check_rng_key
from probbp.numpyro.calls import Plates, handed, inspect_model
from probbp.numpyro.pooled import first_chain, init_chains, of_one_chain, step_chains
from probbp.numpyro.rows import check_rows, draw_rows, over_all_rows, with_gradient_of_rows
from probbp.numpyro.state import KernelState
from probbp.samplers import checks
from probbp.samplers.adaptation import Metric, adaptation, check_metric, parameters
from probbp.samplers.algorithm import (
    brings_warmup,
    check_algorithm,
    own_warmup,
    target_acceptance_rate,
)
from probbp.types import LogDensity, Tree, ways_out


class Kernel(MCMCKernel):
    """A sampler for `numpyro.infer.MCMC` from any algorithm of ours or of BlackJAX.

    Every `chain_method` works (sequential, parallel, vectorized), as do `extra_fields`
    (`potential_energy`, `accept_prob`, `adapt_state.step_size`), resuming from `last_state`, and
    NumPyro's `Gibbs` for models with discrete sites. Nothing differentiates the model but the
    algorithm itself: with the forward ones, models with loops of dynamic length are accepted.

    An operation of the model whose backward pass is random takes `numpyro.prng_key()`, which hangs
    on the key of the algorithm's estimate: the same at both ends of a move where these share it, so
    that the chain stays exact. With an algorithm that draws no estimates, such as `blackjax.nuts`,
    the key is always the same, and the derivative a fixed one.

    In a plate with `subsample_size` the log density is that of all rows, and stays exact; an
    estimate of its gradient takes a mini-batch that hangs on its key (`probbp.numpyro.subsampled`
    says more). An algorithm that draws no estimates has the gradient of all rows.

    Args:
        model: a NumPyro model with continuous latent sites.
        algorithm: `(logdensity_fn, step_size=..., inverse_mass_matrix=...) -> SamplingAlgorithm`,
            such as `probbp.fmala` or `functools.partial(probbp.line_fmala, num_tangents=4)`.
        potential_fn: instead of a model, minus the log density of a position; `MCMC.run` then needs
            `init_params`.
        step_size: where the search for a step size starts.
        target_accept_prob: by default the algorithm's best, known for ours.
        metric: the scale to learn: "diag", "dense", "low_rank", a BlackJAX `MetricRecipe`, or
            `None` for an algorithm that takes no inverse mass matrix.
        batch_size: how many rows of the largest plate that subsamples are in memory at once where
            all are evaluated; all by default.
        init_strategy: NumPyro's, per site.

    Raises:
        ValueError: for starts that are not those of the model's latent sites, one for each chain;
            for neither or both of `model` and `potential_fn`, a model without latent
            sites, one with discrete ones or with latent sites inside a plate that subsamples, one
            whose mini-batches don't average to all rows, or one whose log density depends on
            `numpyro.prng_key()`.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, probbp
        >>> from numpyro.infer import MCMC
        >>> from probbp.numpyro import Kernel
        >>> def model(y):
        ...     mean = numpyro.sample("mean", dist.Normal(0, 1))
        ...     numpyro.sample("y", dist.Normal(mean, 1), obs=y)
        >>> mcmc = MCMC(Kernel(model, probbp.pc_line_fmala), num_warmup=100, num_samples=100,
        ...             progress_bar=False)
        >>> mcmc.run(jax.random.key(0), jnp.ones(5))
    """

    sample_field = "z"

    def __init__(  # noqa: D107 (the class has the docstring)
        self,
        model: Callable | None = None,
        algorithm: Callable | None = None,
        *,
        potential_fn: LogDensity | None = None,
        step_size: float = 1.0,
        target_accept_prob: float | None = None,
        metric: Metric = "diag",
        batch_size: int | None = None,
        init_strategy: Callable = init_to_uniform,
    ):
        if (model is None) == (potential_fn is None):
            raise ValueError("Give Kernel either a model or a potential_fn.")
        if algorithm is None:
            raise ValueError("Give Kernel an algorithm, such as probbp.pc_line_fmala.")
        if potential_fn is None:
            check_function("model", model, "Pass a NumPyro model.")
        else:
            check_function("potential_fn", potential_fn, "Pass minus a log density.")
        check_algorithm(algorithm, metric, on_density=False)
        checks.check_step_size(step_size)
        check_metric(metric)
        if target_accept_prob is not None:
            check_number("target_accept_prob", target_accept_prob, "(0, 1)")
        batch_size = None if batch_size is None else check_count("batch_size", batch_size)
        check_function("init_strategy", init_strategy, "Pass one of numpyro.infer, or of yours.")
        if brings_warmup(algorithm):
            _refuse_beside_own_warmup(step_size, target_accept_prob, metric)
        if target_accept_prob is None:
            target_accept_prob = target_acceptance_rate(algorithm)
        self._model = model
        self._algorithm = algorithm
        self._potential_fn: Any = potential_fn
        self._step_size = step_size
        self._target_accept_prob = target_accept_prob
        self._metric = metric
        self._batch_size = batch_size
        self._init_strategy = init_strategy
        self._reset()

    def _reset(self) -> None:
        self._potential_fn_gen: Callable | None = None
        self._draws_keys = False
        self._plates: Plates = {}
        self._postprocess_fn: Callable | None = None
        self._sample_fn: Callable | None = None

    @property
    def default_fields(self) -> tuple[str, ...]:
        """What is collected without being asked for."""
        return ("z", "diverging", *(["log_weight"] if brings_warmup(self._algorithm) else []))

    @property
    def model(self) -> Callable | None:
        """The model, which ArviZ reads; `None` for a kernel from a potential."""
        return self._model

    def init(self, rng_key, num_warmup, init_params, model_args, model_kwargs):
        """Return the first state: one chain's, or several chains' for several keys."""
        model_kwargs = {} if model_kwargs is None else model_kwargs
        is_single = is_prng_key(rng_key)
        is_several = getattr(rng_key, "ndim", 0) and not is_single
        check_rng_key("rng_key", rng_key[0] if is_several else rng_key)
        split = jax.random.split if is_single else jax.vmap(jax.random.split, out_axes=1)
        rng_key, key_model = split(rng_key)
        start = self._start(key_model, init_params, model_args, model_kwargs)
        if not is_single:
            _check_number_of_starts(start, len(rng_key))
        if brings_warmup(self._algorithm):
            return self._init_pooled(rng_key, num_warmup, start, model_args, model_kwargs)
        num_chains = 1 if is_single else len(rng_key)
        # NumPyro traces this for parallel chains, and `sample` outlives the trace.
        with jax.ensure_compile_time_eval():
            adapt = adaptation(
                optax.tree.size(start) // num_chains,
                num_warmup,
                self._target_accept_prob,
                metric=self._metric,
                initial_step_size=self._step_size,
            )

        def init_chain(key, position):
            key, key_init = jax.random.split(key)
            bound = self._bind(adapt.initial, model_args, model_kwargs)
            state = bound.init(position, key_init)
            zero = jnp.zeros_like(state.logdensity)
            return KernelState(
                jnp.zeros((), dtype=jnp.int32),
                state.position,
                -state.logdensity,
                zero,
                zero,
                jnp.array(False),
                adapt.initial,
                state,
                key,
            )

        def sample_chain(state, model_args, model_kwargs):
            return self._step(adapt, num_warmup, state, model_args, model_kwargs)

        self._sample_fn = (
            sample_chain if is_single else jax.vmap(sample_chain, in_axes=(0, None, None))
        )
        with ways_out():
            state = (init_chain if is_single else jax.vmap(init_chain))(rng_key, start)
        _check_start(state)  # of several chains `init` sees none
        return state

    def sample(self, state, model_args, model_kwargs):
        """Make one step."""
        if self._sample_fn is None:
            raise RuntimeError("Kernel.init must be called before Kernel.sample.")
        with ways_out():
            return self._sample_fn(state, model_args, model_kwargs)

    def postprocess_fn(self, model_args, model_kwargs):
        """Return the map from unconstrained positions to the model's sites."""
        if self._postprocess_fn is None:
            return identity
        return self._postprocess_fn(*model_args, **model_kwargs)

    def get_diagnostics_str(self, state):
        """Return what the progress bar says."""
        acceptance = f"acc. prob={jnp.mean(state.mean_accept_prob):.2f}"
        if brings_warmup(self._algorithm):
            held_out_std = state.adapt_state.held_out_std
            return f"held-out error {held_out_std:.2f}. {acceptance}"
        return f"step size {state.adapt_state.step_size:.2e}. {acceptance}"

    def refresh(self, state, model_args, model_kwargs):
        """Recompute what the state holds of the log density, for changed conditioning values."""
        if brings_warmup(self._algorithm):
            raise ValueError(
                "This algorithm learns one log density, and is no block of Gibbs, where that "
                "changes at each step. Take probbp.pc_line_fmala for the block."
            )
        rng_key, key_init = jax.random.split(state.rng_key)
        bound = self._bind(state.adapt_state, model_args, model_kwargs or {})
        algorithm_state = bound.init(state.z, key_init)
        return state._replace(
            potential_energy=-algorithm_state.logdensity,
            algorithm_state=algorithm_state,
            rng_key=rng_key,
        )

    def wrap_model(self, wrapper):
        """Return a copy of this kernel for `wrapper(model)`."""
        if self._model is None:
            raise ValueError("A Kernel built from a potential_fn has no model to wrap.")
        kernel = copy.copy(self)
        kernel._model = wrapper(self._model)
        kernel._reset()
        return kernel

    def _start(self, rng_key, init_params, model_args, model_kwargs) -> Tree:
        if self._model is None:
            if init_params is None:
                raise ValueError("A Kernel built from a potential_fn needs MCMC.run(init_params=).")
            return init_params
        one_key = rng_key if is_prng_key(rng_key) else rng_key[0]
        self._plates, self._draws_keys = inspect_model(
            self._model, one_key, model_args, model_kwargs, self._init_strategy
        )
        rows = draw_rows(one_key, self._plates)
        info = initialize_model(
            rng_key,
            handed(self._model),
            init_strategy=self._init_strategy,
            dynamic_args=True,
            model_args=model_args,
            model_kwargs={**model_kwargs, "rows_of_plates": rows},
            validate_grad=False,
        )
        self._potential_fn_gen = info.potential_fn
        self._postprocess_fn = info.postprocess_fn
        start = info.param_info.z if init_params is None else init_params
        _check_sites_of_start(start, info.param_info.z)
        one_start = start if is_prng_key(rng_key) else jax.tree.map(lambda leaf: leaf[0], start)
        if self._draws_keys:
            checks.check_key(self._logdensity_fn(model_args, model_kwargs), one_start)
        if self._plates:
            density = self._density(model_args, model_kwargs)
            check_rows(density, self._plates, self._batch_size, one_start)
        return start

    def _init_pooled(self, rng_key, num_warmup, start, model_args, model_kwargs):
        """Return the first state for an algorithm whose chains learn from each other."""

        def bind(model_args, model_kwargs):
            bound = partial(self._algorithm, self._logdensity_fn(model_args, model_kwargs))
            warmup = own_warmup(bound, num_warmup, in_chunks=False)
            assert warmup is not None
            return bound, warmup

        def sample_chains(state, model_args, model_kwargs):
            algorithm, warmup = bind(model_args, model_kwargs)
            step = partial(step_chains, warmup, algorithm, num_warmup)
            return (of_one_chain(step) if is_single else step)(state)

        is_single = is_prng_key(rng_key)
        self._sample_fn = sample_chains
        _, warmup = bind(model_args, model_kwargs)
        if is_single:
            rng_key, start = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (rng_key, start))
        state = init_chains(warmup, rng_key, start)
        _check_start(state)
        return first_chain(state) if is_single else state

    def _bind(self, adapt_state, model_args, model_kwargs):
        """Return the algorithm on this model's log density with the current parameters."""
        logdensity_fn = self._logdensity_fn(model_args, model_kwargs)
        return self._algorithm(logdensity_fn, **parameters(adapt_state))

    def _logdensity_fn(self, model_args, model_kwargs) -> LogDensity:
        if self._potential_fn_gen is None:
            return lambda z: -self._potential_fn(z)
        density = self._density(model_args, model_kwargs)
        if self._plates:
            whole = over_all_rows(density, self._plates, self._batch_size)
            return with_gradient_of_rows(density, self._plates, whole)
        if self._draws_keys:
            return lambda z, rng_key=None: density(z, rng_key, {})
        return lambda z: density(z, None, {})

    def _density(self, model_args, model_kwargs):
        def density(z, rng_key, rows):
            assert self._potential_fn_gen is not None
            handed_kwargs = {**model_kwargs, "key_of_model": rng_key, "rows_of_plates": rows}
            return -self._potential_fn_gen(*model_args, **handed_kwargs)(z)

        return density

    def _step(self, adapt, num_warmup, state, model_args, model_kwargs):
        rng_key, key_step = jax.random.split(state.rng_key)
        bound = self._bind(state.adapt_state, model_args, model_kwargs)
        algorithm_state, info = bound.step(key_step, state.algorithm_state)
        adapt_state = state.adapt_state
        if num_warmup:
            adapt_state = jax.lax.cond(
                state.i < num_warmup,
                lambda s: adapt.update(
                    s,
                    adapt.schedule[jnp.minimum(state.i, num_warmup - 1)],
                    algorithm_state.position,
                    info.acceptance_rate,
                ),
                lambda s: s,
                adapt_state,
            )
            adapt_state = jax.lax.cond(
                state.i == num_warmup - 1, adapt.final, lambda s: s, adapt_state
            )
        diverging = getattr(info, "is_divergent", jnp.array(False))
        return state.advanced(
            num_warmup, algorithm_state, info.acceptance_rate, diverging
        )._replace(adapt_state=adapt_state, rng_key=rng_key)

    def __getstate__(self):
        """Leave closures out of a pickle; `init` makes them anew."""
        return self.__dict__ | {
            "_sample_fn": None,
            "_potential_fn_gen": None,
            "_postprocess_fn": None,
        }


def _check_start(state: KernelState) -> None:
    """Require a finite log density; NumPyro traces parallel chains, which are warned of."""
    checks.check_start(-state.potential_energy)
    checks.check_start_in_trace(-state.potential_energy)


def _check_sites_of_start(start: Tree, expected: dict[str, jax.Array]) -> None:
    """Require a value for each latent site of the model, and none beside."""
    if not isinstance(start, dict) or set(start) != set(expected):
        names = sorted(start) if isinstance(start, dict) else type(start).__name__
        raise ValueError(
            f"init_params must have the model's latent sites {sorted(expected)}, got {names}. Give "
            "one unconstrained value to each, or leave init_params out and choose by init_strategy."
        )
    for name, value in expected.items():
        if jnp.shape(start[name]) != jnp.shape(value):
            raise ValueError(
                f"init_params[{name!r}] must have the shape {jnp.shape(value)}, with the chains in "
                f"front where there are several, got {jnp.shape(start[name])}."
            )


def _check_number_of_starts(start: Tree, num_chains: int) -> None:
    """Require the chains as leading axis of each leaf."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(start):
        if jnp.shape(leaf)[:1] != (num_chains,):
            raise ValueError(
                f"init_params{jax.tree_util.keystr(path)} has the shape {jnp.shape(leaf)}: of "
                f"{num_chains} chains each needs a start, {num_chains} along the first axis."
            )


def _refuse_beside_own_warmup(step_size, target_accept_prob, metric):
    """Raise for what does not concern an algorithm that brings its own warm-up."""
    given = {
        "step_size": step_size != 1.0,
        "target_accept_prob": target_accept_prob is not None,
        "metric": metric != "diag",
    }
    names = [name for name, is_given in given.items() if is_given]
    if names:
        raise ValueError(
            f"This algorithm learns from its chains by a warm-up of its own: leave out "
            f"{', '.join(names)}."
        )
