"""What a sampler of ours offers: BlackJAX's own API object, and the acceptance rate to tune for."""

import dataclasses
import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from blackjax import GenerateSamplingAPI
from blackjax.base import SamplingAlgorithm, build_sampling_algorithm
from blackjax.mcmc.metrics import default_metric

from probbp.checks import check_function
from probbp.samplers import checks
from probbp.types import LogDensity, Tree

LEARNS = "step_size", "inverse_mass_matrix"
"""Options of an algorithm that warm-up finds, unless it brings a warm-up of its own."""


class Warmup(NamedTuple):
    """The warm-up that an algorithm brings, of all chains together.

    What it carries is a pair: the kernel's states, with the chains as leading axis, and a rest that
    has a field `step_size`, (chains,).

    Attributes:
        schedule: (num_steps, ...), what each step is for, an array.
        chunk: how many steps are made between two returns to the host.
        init: `starts -> carry`, of positions with the chains as leading axis.
        run: `(rng_key, carry, schedule) -> (carry, acceptance rates)`, a chunk of steps; the rates
            are (chains, steps).
        parameters: `rest -> parameters` of the algorithm, which all chains share.
        check: `rest -> None`, called before the draws; it warns where they will not be good.
        report: `(rest, log_weight) -> dict`, what was learned and what it cost, as numbers; it
            warns where the draws can't be trusted.
    """

    schedule: jax.Array
    chunk: int
    init: Callable[[Tree], tuple[Any, Any]]
    run: Callable[[jax.Array, tuple[Any, Any], jax.Array], tuple[tuple[Any, Any], jax.Array]]
    parameters: Callable[[Any], dict[str, Any]]
    check: Callable[[Any], None]
    report: Callable[[Any, Any], dict[str, float]]


@dataclasses.dataclass
class Algorithm(GenerateSamplingAPI):
    """A BlackJAX algorithm that knows its best acceptance rate.

    Called, it takes `(logdensity_fn, step_size, inverse_mass_matrix=None, **options)` and returns
    a `blackjax.SamplingAlgorithm`; `init` and `build_kernel` are BlackJAX's. Options are keywords
    of the kernel, so that `blackjax.window_adaptation(algorithm, logdensity_fn, **options)` and
    `functools.partial(algorithm, **options)` both work.

    One that needs more than a step size and a scale brings its own warm-up,
    `(logdensity_fn, num_steps, in_chunks, batch_size, **options) -> Warmup`, and says by `learns`
    which of its options that finds.
    """

    target_acceptance_rate: Callable[..., float]
    warmup: Callable[..., Warmup] | None = None
    learns: tuple[str, ...] = LEARNS

    def __post_init__(self) -> None:
        """Show the docstring of the algorithm, not of this class."""
        self.__doc__ = self.differentiable.__doc__

    def __call__(self, *args: Any, **options: Any) -> SamplingAlgorithm:
        """Bind the algorithm to a log density.

        Raises:
            TypeError: for an option that it does not have.
        """
        known = list(inspect.signature(self.differentiable).parameters)
        unknown = [name for name in options if name not in known]
        if unknown:
            hint = (
                " Of the algorithms here probbp.mala takes an estimator, and probbp.surrogate "
                "for its warm-up; the others make their own estimate, along their tangents."
            )
            raise TypeError(
                f"This algorithm has no option {unknown[0]!r}: it takes {', '.join(known)}."
                + (hint if "estimator" in unknown else "")
            )
        return self.differentiable(*args, **options)

    def __getattr__(self, name: str) -> Any:
        """Show the signature of the algorithm; it is not stored, as it can't be pickled."""
        if name == "__signature__":
            return inspect.signature(self.differentiable)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def target_acceptance_rate(algorithm: Callable) -> float:
    """Look up the acceptance rate that an algorithm, or a `functools.partial` of one, is tuned for.

    Raises:
        ValueError: if the algorithm is none of ours, whose best rate is the caller's to say.
    """
    algorithm, _, options = _unwrapped(algorithm)
    if not isinstance(algorithm, Algorithm):
        raise ValueError(
            f"No target acceptance rate is known for {_name(algorithm)}: pass one, as "
            "target_acceptance_rate to probbp.sample, as target_accept_prob to Kernel (0.234 for "
            "random walks, 0.574 for MALA, 0.8 for HMC and NUTS)."
        )
    return algorithm.target_acceptance_rate(**options)


def check_algorithm(algorithm: Any, metric: Any, *, on_density: bool) -> None:
    """Require an algorithm that takes what warm-up learns, and needs nothing else.

    Args:
        algorithm: what a caller has given.
        metric: as given to warm-up; `None` learns no inverse mass matrix.
        on_density: whether the log density is bound already, as `probbp.sample` wants it, or is
            still to come, as in `Kernel`.

    Raises:
        TypeError: with what to write instead.
    """
    base, args, options = _unwrapped(algorithm)
    wanted = "probbp.mala"
    if on_density:
        wanted = f"functools.partial({_path(base) or wanted}, logdensity_fn)"
    if isinstance(base, SamplingAlgorithm):
        raise TypeError(
            "This algorithm is built already, with a step size of its own, which warm-up is to "
            f"find: pass {wanted}."
        )
    if not callable(base) or inspect.isclass(base):
        way = " The order is rng_key, algorithm, position." if on_density else ""
        if (base if inspect.isclass(base) else type(base)).__module__.startswith("numpyro"):
            way = " A kernel of NumPyro runs in numpyro.infer.MCMC."
        raise TypeError(
            f"algorithm must be one of probbp's or BlackJAX's, got {_name(base)}: pass {wanted}."
            f"{way}"
        )
    _refuse_what_warmup_finds(base, options, metric, on_density)
    if brings_warmup(base):
        return
    try:
        signature = inspect.signature(getattr(base, "differentiable", base))
    except ValueError:  # made in C: it will tell by itself
        return
    takes = signature.parameters
    if "step_size" not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        way = f"pass the sampler, not the log density or a result, as {wanted}"
        if _path(base):
            way = "pass a function of step_size that returns it built"
        raise TypeError(f"algorithm must take step_size=..., and {_name(base)} does not: {way}.")
    if isinstance(base, Algorithm):  # which tells of other options by itself
        options = {name: value for name, value in options.items() if name in takes}
    learnt = {"step_size": 1.0} | ({} if metric is None else {"inverse_mass_matrix": None})
    density = () if on_density else (lambda position: 0.0,)
    try:
        signature.bind(*args, *density, **{**options, **learnt})
    except TypeError as error:
        if args and not on_density:
            way = f"pass {_path(base) or wanted}, as the model gives the log density"
        elif "inverse_mass_matrix" in str(error):
            way = "metric=None learns no inverse mass matrix"
        elif "step_size" in str(error):
            way = f"pass {wanted}, as warm-up finds the step size"
        else:
            way = f"pass {wanted}, with all its arguments but those that warm-up finds"
        raise TypeError(f"algorithm {_name(base)}: {error}; {way}.") from None


def _refuse_what_warmup_finds(base, options, metric, on_density):
    """Raise for a parameter that warm-up would write over without a word."""
    found = set(getattr(base, "learns", LEARNS))
    if metric is None:
        found.discard("inverse_mass_matrix")
    given = sorted(found & set(options))
    if not given:
        return
    start = "initial_step_size of probbp.sample" if on_density else "step_size of Kernel"
    ways = {
        "step_size": f"{start} says where the search starts",
        "inverse_mass_matrix": "with metric=None it is kept as given",
    }
    ways = {} if brings_warmup(base) else ways
    words = "".join(f"; {ways[name]}" for name in given if name in ways)
    raise TypeError(
        f"Warm-up finds {' and '.join(given)} of {_name(base)} and would write over what it is "
        f"given: leave {'it' if len(given) == 1 else 'them'} out of the functools.partial{words}."
    )


def brings_warmup(algorithm: Callable) -> bool:
    """Whether an algorithm, or a `functools.partial` of one, brings its own warm-up."""
    return getattr(_unwrapped(algorithm)[0], "warmup", None) is not None


def own_warmup(
    algorithm: Callable, num_steps: int, *, in_chunks: bool = True, batch_size: int | None = None
) -> Warmup | None:
    """Return the warm-up that an algorithm on a log density brings, `None` where it brings none.

    Args:
        algorithm: such as `functools.partial(probbp.surrogate, logdensity_fn)`.
        num_steps: length of the warm-up.
        in_chunks: whether it is made in chunks, and `num_steps` rounded up to a multiple of them;
            else step by step.
        batch_size: how many chains run at once; all by default.
    """
    if not brings_warmup(algorithm):
        return None
    algorithm, args, options = _unwrapped(algorithm)
    logdensity_fn = args[0] if args else options.pop("logdensity_fn", None)
    if logdensity_fn is None:
        raise ValueError(
            "This algorithm learns from values of the log density: give it as "
            "functools.partial(probbp.surrogate, logdensity_fn)."
        )
    return algorithm.warmup(logdensity_fn, num_steps, in_chunks, batch_size, **options)


def _unwrapped(algorithm):
    """Return what nested `functools.partial` objects call, and with what."""
    args: tuple = ()
    options: dict[str, Any] = {}
    while isinstance(algorithm, partial):
        args = (*algorithm.args, *args)
        options = {**algorithm.keywords, **options}
        algorithm = algorithm.func
    return algorithm, args, options


def _path(base):
    """Return the name under which users find an algorithm, "" if it has none."""
    module = getattr(getattr(base, "differentiable", None), "__module__", "").partition(".")[0]
    names = vars(sys.modules[module]).items() if module in sys.modules else ()
    return next((f"{module}.{name}" for name, value in names if value is base), "")


def _name(algorithm):
    """Return how a message names what was given as an algorithm."""
    known = _path(algorithm) or getattr(algorithm, "__qualname__", "")
    return known or f"an object of type {type(algorithm).__name__}"


def top_level_api(
    build_kernel: Callable[[], Callable],
    init: Callable,
    logdensity_fn: LogDensity,
    step_size: Any,
    inverse_mass_matrix: Any,
    **options: Any,
) -> SamplingAlgorithm:
    """Bind a kernel to a log density, a step size, a scale and its options, all checked here."""
    check_function("logdensity_fn", logdensity_fn, checks.A_LOG_DENSITY)
    checks.check_step_size(step_size)
    metric = None if inverse_mass_matrix is None else default_metric(inverse_mass_matrix)
    return build_sampling_algorithm(
        partial(build_kernel(), **options),
        lambda position, logdensity_fn, rng_key: init(
            position, logdensity_fn, rng_key, inverse_mass_matrix=metric
        ),
        logdensity_fn,
        kernel_args=(step_size, metric),
        pass_rng_key_to_init=True,
    )
