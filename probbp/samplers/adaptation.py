"""Warm-up: the step size by BlackJAX's dual averaging, the scale from the chain's own draws.

Nothing adapts afterwards. The schedule is Stan's (an interval for the step size, windows of
doubling length for the scale, an interval for the step size), but all of it grows with the length
of the warm-up: a chain that moves along one direction at a time says nothing of its scale in 25
steps.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from blackjax.adaptation.metric_recipes import MetricRecipe, lookup_recipe
from blackjax.adaptation.staged_adaptation import build_schedule
from blackjax.adaptation.step_size import dual_averaging_adaptation

from probbp.checks import check_choice, check_count, check_number, check_rng_key
from probbp.samplers import checks
from probbp.samplers.algorithm import check_algorithm
from probbp.samplers.algorithm import target_acceptance_rate as best_acceptance_rate
from probbp.types import Tree

_RECIPES = {"diag": "welford_diag", "dense": "welford_dense", "low_rank": "sample_cov_low_rank"}

Metric = Literal["diag", "dense", "low_rank"] | MetricRecipe | None


class AdaptationState(NamedTuple):
    """What warm-up carries from step to step.

    Attributes:
        step_size: of the next step.
        inverse_mass_matrix: of the next step; `None` if it is not learnt.
        dual_averaging: BlackJAX's state for the step size.
        metric: BlackJAX's state for the scale.
    """

    step_size: jax.Array
    inverse_mass_matrix: Any
    dual_averaging: Any
    metric: Any


class Adaptation(NamedTuple):
    """A first state, two pure functions, and the schedule that says what each step is for.

    Attributes:
        initial: the `AdaptationState` of the first step.
        update: `(state, stage, position, acceptance_rate) -> AdaptationState`, with `stage` a row
            of the schedule.
        final: `AdaptationState -> AdaptationState` at the end of warm-up, with the averaged step.
        schedule: (num_steps, 2), whether a step serves the scale, and whether it ends a window.
    """

    initial: AdaptationState
    update: Callable
    final: Callable
    schedule: jax.Array


def adaptation(
    num_params: int,
    num_steps: int,
    target_acceptance_rate: float,
    *,
    metric: Metric = "diag",
    initial_step_size: float = 1.0,
) -> Adaptation:
    """Build the warm-up of one chain.

    Args:
        num_params: size of the position.
        num_steps: length of the warm-up.
        target_acceptance_rate: what dual averaging steers to.
        metric: the scale to learn: `"diag"`, `"dense"`, `"low_rank"` (a diagonal and the ten
            leading directions of the sample covariance), a BlackJAX `MetricRecipe` that needs
            positions only, or `None` to learn the step size alone.
        initial_step_size: where dual averaging starts.

    Raises:
        TypeError: for a metric that is none, such as an array.
        ValueError: for an unknown metric, one that consumes gradients (ours are estimates), a
            target outside (0, 1), or a negative number of steps.
    """
    check_number("initial_step_size", initial_step_size, "(0, inf)")
    check_metric(metric)
    check_number("target_acceptance_rate", target_acceptance_rate, "(0, 1)")
    num_steps = check_count("num_steps", num_steps, 0)
    step_init, step_update, step_final = dual_averaging_adaptation(target_acceptance_rate)
    # BlackJAX makes small arrays of Python's numbers, which are moved to the device once.
    with jax.transfer_guard_host_to_device("allow"):
        schedule = jnp.array(
            build_schedule(
                num_steps,
                initial_buffer_size=max(75, num_steps // 10),
                final_buffer_size=max(50, num_steps // 10),
                first_window_size=max(25, num_steps // 20),
            )
        ).reshape(num_steps, 2)
        step_size = jnp.asarray(initial_step_size, dtype=float)
        initial = AdaptationState(step_size, None, step_init(step_size), None)
        if metric is not None:
            learn = _recipe(metric, num_params).build_core(buffer_size=max(num_steps, 1))
            state = learn.init(num_params)
            initial = initial._replace(inverse_mass_matrix=state.inverse_mass_matrix, metric=state)
        # Of the types that updates have: weak ones would compile the warm-up a second time.
        initial = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), initial)

    def end_window(state: AdaptationState) -> AdaptationState:
        metric_state = learn.final(state.metric)
        dual_averaging = step_init(step_final(state.dual_averaging))
        return AdaptationState(
            jnp.exp(dual_averaging.log_step_size),
            metric_state.inverse_mass_matrix,
            dual_averaging,
            metric_state,
        )

    def update(
        state: AdaptationState, stage: jax.Array, position: Tree, acceptance_rate: jax.Array
    ) -> AdaptationState:
        serves_scale, ends_window = stage
        dual_averaging = step_update(state.dual_averaging, acceptance_rate)
        state = state._replace(
            step_size=jnp.exp(dual_averaging.log_step_size), dual_averaging=dual_averaging
        )
        if metric is None:
            return state
        metric_state = jax.lax.cond(
            serves_scale, lambda s: learn.update(s, position, None), lambda s: s, state.metric
        )
        return jax.lax.cond(
            ends_window, end_window, lambda s: s, state._replace(metric=metric_state)
        )

    def final(state: AdaptationState) -> AdaptationState:
        return state._replace(step_size=step_final(state.dual_averaging))

    return Adaptation(initial, update, final, schedule)


def warmup(
    rng_key: jax.Array,
    algorithm: Callable,
    position: Tree,
    num_steps: int = 1000,
    *,
    metric: Metric = "diag",
    target_acceptance_rate: float | None = None,
    initial_step_size: float = 1.0,
) -> tuple[Any, dict[str, Any]]:
    """Find a chain's step size and scale.

    Args:
        rng_key: key of the run.
        algorithm: `(step_size=..., inverse_mass_matrix=...) -> SamplingAlgorithm`, such as
            `functools.partial(probbp.fmala, logdensity_fn)`; without `inverse_mass_matrix` if
            `metric` is `None`.
        position: where the chain starts.
        num_steps: length of the warm-up.
        metric: the scale to learn, as in `adaptation`.
        target_acceptance_rate: by default the algorithm's best, known for ours.
        initial_step_size: where the search starts.

    Returns:
        The last state, and the parameters that `algorithm` takes.

    Example:
        >>> import jax, jax.numpy as jnp, probbp
        >>> from functools import partial
        >>> algorithm = partial(probbp.mala, lambda x: -0.5 * jnp.sum(x**2))
        >>> state, parameters = probbp.warmup(jax.random.key(0), algorithm, jnp.zeros(3), 200)
        >>> sampler = algorithm(**parameters)
    """
    check_rng_key("rng_key", rng_key)
    check_algorithm(algorithm, metric, on_density=True)
    checks.check_position(position)
    if target_acceptance_rate is None:
        target_acceptance_rate = best_acceptance_rate(algorithm)
    adapt = adaptation(
        optax.tree.size(position),
        num_steps,
        target_acceptance_rate,
        metric=metric,
        initial_step_size=initial_step_size,
    )
    key_init, key_steps = jax.random.split(rng_key)
    kernel_state = algorithm(**parameters(adapt.initial)).init(position, key_init)
    (kernel_state, state), _ = jax.lax.scan(
        partial(warmup_step, algorithm, adapt),
        (kernel_state, adapt.initial),
        (jax.random.split(key_steps, num_steps), adapt.schedule),
    )
    return kernel_state, parameters(adapt.final(state))


def warmup_step(
    algorithm: Callable, adapt: Adaptation, carry: tuple[Any, AdaptationState], per_step: tuple
) -> tuple[tuple[Any, AdaptationState], Any]:
    """Make one step of warm-up; the body of a scan over keys and schedule."""
    kernel_state, state = carry
    rng_key, stage = per_step
    kernel_state, info = algorithm(**parameters(state)).step(rng_key, kernel_state)
    state = adapt.update(state, stage, kernel_state.position, info.acceptance_rate)
    return (kernel_state, state), info.acceptance_rate


def parameters(state: AdaptationState) -> dict[str, Any]:
    """Return what an algorithm takes from warm-up."""
    learnt = {"step_size": state.step_size}
    if state.inverse_mass_matrix is not None:
        learnt["inverse_mass_matrix"] = state.inverse_mass_matrix
    return learnt


def check_metric(metric: Metric) -> None:
    """Require a known name, a recipe that needs positions only, or `None`."""
    if metric is None:
        return
    if isinstance(metric, str):
        check_choice("metric", metric, tuple(_RECIPES))
    elif not isinstance(metric, MetricRecipe):
        raise TypeError(
            f"metric must be {', '.join(map(repr, _RECIPES))}, a MetricRecipe of BlackJAX or None, "
            f"got {metric!r}. (A fixed matrix is given to the algorithm itself, with metric=None.)"
        )
    elif "gradients" in metric.needs:
        raise ValueError(
            "This metric recipe takes gradients at their word, and ours are estimates: choose a "
            "metric that needs positions only ('diag', 'dense' or 'low_rank')."
        )


def _recipe(metric: str | MetricRecipe, num_params: int) -> MetricRecipe:
    """Look a metric up, and fit its rank to the position."""
    recipe = lookup_recipe(_RECIPES[metric]) if isinstance(metric, str) else metric
    if recipe.max_rank is not None and recipe.max_rank > num_params:
        recipe = dataclasses.replace(recipe, max_rank=num_params)
    return recipe
