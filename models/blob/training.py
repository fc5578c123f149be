"""Fits of a Bayesian low-rank update: NumPyro's SVI on the ELBO, or by the rule of BLoB's code.

Wang, Shi, Han, Metaxas & Wang, 2024, arXiv:2406.11675.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
from numpyro.infer import SVI, TraceMeanField_ELBO

from probbp.checks import check_choice
from probbp.models.blob.model import BayesianLora
from probbp.models.blob.rule import alternating


def svi(
    lora: BayesianLora,
    optimiser: optax.GradientTransformation,
    *,
    schedule: Literal["elbo", "blob"] = "elbo",
    cycle: int | None = None,
    kl_learning_rate: float | Callable[[jax.Array], Any] = 0.01,
) -> SVI:
    """Return NumPyro's SVI for one of two objectives.

    - "elbo": the ELBO, exact but for the draw of A and the batch, one optimiser for all. It is
      `SVI(lora.model, lora.guide, optimiser, TraceMeanField_ELBO())` and nothing else.
    - "blob": the rule of the paper's code, which minimises no one objective: `optimiser` takes M
      and B down the mean loss of the batch, and plain gradient descent takes M and G down the
      divergence with the weights of `alternating`, and G down the loss. What `update` returns is
      the mean negative log likelihood without the divergence; `num_data` and `kl_weight` are
      ignored.

    SVI compiles `update` for the caller in `run` alone. In a loop of one's own,
    `step = jax.jit(lambda state, base, x, y: svi.update(state, base, x, y=y))` keeps the network's
    parameters an argument, where `run` with its progress bar would compile them into the program.

    Args:
        lora: from `bayesian_lora`.
        optimiser: an Optax transformation; the paper's is AdamW at 1e-4.
        schedule: which objective.
        cycle: for "blob", as in `alternating`.
        kl_learning_rate: for "blob", as in `alternating`.

    Raises:
        ValueError: for another schedule, or "blob" without a cycle.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from probbp.models.blob import bayesian_lora, rescaled_cycle
        >>> network, params = lambda params, x: x @ params["w"], {"w": jnp.zeros((4, 2))}
        >>> x, y = jnp.eye(4), jnp.array([0, 0, 1, 1])
        >>> lora = bayesian_lora(network, params, target="w", example=(x,), rank=2)
        >>> published = svi(lora, optax.adamw(0.1), schedule="blob", cycle=rescaled_cycle(4, 4))
        >>> result = published.run(jax.random.key(0), 100, params, x, y=y, progress_bar=False)
        >>> bool(result.losses[-1] < result.losses[0])
        True
    """
    check_choice("schedule", schedule, ("elbo", "blob"))
    if schedule == "elbo":
        return SVI(lora.model, lora.guide, optimiser, TraceMeanField_ELBO())
    if cycle is None:
        raise ValueError(
            "schedule='blob' needs a cycle: the steps in an epoch, or rescaled_cycle(...)."
        )

    def mean_loss(program):
        def without_divergence(base, *inputs, **options):
            return program(base, *inputs, **(options | {"num_data": 1, "kl_weight": 0.0}))

        return without_divergence

    transformation = alternating(
        optimiser,
        prior_scale=lora.prior_scale,
        cycle=cycle,
        kl_learning_rate=kl_learning_rate,
    )
    return SVI(mean_loss(lora.model), mean_loss(lora.guide), transformation, TraceMeanField_ELBO())
