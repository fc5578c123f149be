r"""Bayesian low-rank adaptation: a posterior over the update of a pretrained network.

BLoB, Wang, Shi, Han, Metaxas & Wang, 2024, arXiv:2406.11675. A weight W becomes
:math:`W + s B A` with :math:`s = \alpha / r`, where A (r, in) is random, with prior
:math:`N(0, \sigma_p^2)` and posterior :math:`q(A) = N(M, \Omega^2)`, :math:`\Omega = G \circ G`
elementwise, and B (out, r) is not. With noise on A alone every deviation from the pretrained
network carries the factor B, which starts at zero.

    lora = bayesian_lora(apply_fn, params, target="query|value", example=(x,))
    svi = SVI(lora.model, lora.guide, optax.adam(1e-3), TraceMeanField_ELBO())
    result = svi.run(rng_key, 2_000, params, x, y=y, progress_bar=False)
    logits = predict(lora, rng_key, result.params, params, x_test)
"""

from probbp.models.blob.divergence import root_of_std, std
from probbp.models.blob.files import load, save
from probbp.models.blob.model import (
    BayesianLora,
    bayesian_lora,
    categorical,
    kl,
)
from probbp.models.blob.prediction import merge, predict, to_arviz
from probbp.models.blob.rule import AlternatingState, alternating, rescaled_cycle
from probbp.models.blob.training import svi

__all__ = [
    "AlternatingState",
    "BayesianLora",
    "alternating",
    "bayesian_lora",
    "categorical",
    "kl",
    "load",
    "merge",
    "predict",
    "rescaled_cycle",
    "root_of_std",
    "save",
    "std",
    "svi",
    "to_arviz",
]
