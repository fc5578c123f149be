"""What a network with a posterior predicts: draws, ArviZ's object, merged weights."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
import numpyro.distributions as dist
from numpyro.handlers import lift
from numpyro.infer import Predictive

from probbp.checks import check_count, check_rng_key
from probbp.models import lora as low_rank
from probbp.models.blob.divergence import std
from probbp.models.blob.model import BayesianLora, Noise
from probbp.models.lora import Factors


def predict(
    lora: BayesianLora,
    rng_key: jax.Array,
    params: Mapping[str, jax.Array],
    base: Any,
    *inputs: Any,
    num_samples: int = 10,
    noise: Noise = "shared",
) -> Any:
    """Return the network's output for draws of A from the posterior.

    The prediction is the mean of their softmax. NumPyro's `Predictive` draws one after the other,
    in the memory of one forward pass. With shared noise a draw is one function of all inputs, as
    quantities of several of them want it (mutual information, joint densities); the other two are
    right for each input alone.

    Args:
        lora: from `bayesian_lora`.
        rng_key: a key.
        params: of SVI; with `w_B_g` beside `w_B`, as `probbp.models.ivon.posterior` gives it, B is
            drawn as well, one for all examples.
        base: the network's parameters.
        inputs: as the network takes them.
        num_samples: draws; 0 for the posterior's mean, A = M, in the place of a draw.
        noise: as in `bayesian_lora`.

    Returns:
        Logits (num_samples, batch, ...), and (1, batch, ...) for the mean.
    """
    check_rng_key("rng_key", rng_key)
    num_samples = check_count("num_samples", num_samples, 0)
    if num_samples == 0:
        logits = lora.apply(base, _factors(lora, params), *inputs)
        return jax.tree.map(lambda leaf: leaf[None], logits)
    random = {
        f"{name}_B": dist.Normal(params[f"{name}_B"], std(params[f"{name}_B_g"])).to_event()
        for name in lora.layouts
        if f"{name}_B_g" in params
    }
    predictive = Predictive(
        lift(partial(lora.model, noise=noise), random),
        guide=lora.guide,
        params={name: leaf for name, leaf in params.items() if name not in random},
        num_samples=num_samples,
        return_sites=["logits"],
    )
    return predictive(rng_key, base, *inputs)["logits"]


def to_arviz(draws: Mapping[str, Any], observed: Mapping[str, Any] | None = None) -> Any:
    """Turn draws of `Predictive` into ArviZ's object, one chain.

    Args:
        draws: sites with the draws on the first axis: `logits`, `y`.
        observed: data under the names of their sites.

    Returns:
        An `arviz.InferenceData` (ArviZ 0.x) or `xarray.DataTree` (ArviZ 1.x) with
        `posterior_predictive` and, where given, `observed_data`.
    """
    from probbp.inference_data import from_groups

    groups: dict[str, Any] = {
        "posterior_predictive": {name: np.asarray(draw)[None] for name, draw in draws.items()}
    }
    if observed:
        groups["observed_data"] = {name: np.asarray(value) for name, value in observed.items()}
    return from_groups(groups)


def merge(
    lora: BayesianLora,
    params: Mapping[str, jax.Array],
    base: Any,
    sample: Mapping[str, jax.Array] | None = None,
) -> Any:
    """Return the network's parameters with the update added, dense: for export, without this file.

    Args:
        lora: from `bayesian_lora`.
        params: of SVI.
        base: the network's parameters.
        sample: one draw of the sites `w_A`, and `w_B` where B is random; the posterior's mean by
            default.

    Returns:
        A pytree like `base`, in its dtypes.
    """
    return low_rank.merge(base, lora.layouts, _factors(lora, params, sample), lora.scale)


def _factors(lora, params, sample=None):
    sample = {} if sample is None else sample
    return {
        name: Factors(
            sample.get(f"{name}_A", params[f"{name}_loc"]),
            sample.get(f"{name}_B", params[f"{name}_B"]),
        )
        for name in lora.layouts
    }
