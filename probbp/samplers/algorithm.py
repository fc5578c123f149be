"""What a sampler of ours offers: BlackJAX's own API object, and the acceptance rate to tune for."""

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from blackjax import GenerateSamplingAPI
from blackjax.base import SamplingAlgorithm


@dataclasses.dataclass
class Algorithm(GenerateSamplingAPI):
    """A BlackJAX algorithm that knows its best acceptance rate.

    Called, it takes `(logdensity_fn, step_size, inverse_mass_matrix=None, **options)` and returns
    a `blackjax.SamplingAlgorithm`; `init` and `build_kernel` are BlackJAX's. Options are keywords
    of the kernel, so that `blackjax.window_adaptation(algorithm, logdensity_fn, **options)` and
    `functools.partial(algorithm, **options)` both work.
    """

    target_acceptance_rate: Callable[..., float]

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
                " Of the algorithms here probbp.mala alone takes an estimator; the others make "
                "their own estimate, along their tangents."
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
    options: dict[str, Any] = {}
    while isinstance(algorithm, partial):
        options = {**algorithm.keywords, **options}
        algorithm = algorithm.func
    if not isinstance(algorithm, Algorithm):
        raise ValueError(
            f"No target acceptance rate is known for {algorithm}: pass target_acceptance_rate "
            "(0.234 for random walks, 0.574 for MALA, 0.8 for HMC and NUTS)."
        )
    return algorithm.target_acceptance_rate(**options)
