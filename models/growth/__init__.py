"""Networks that grow dendrites where the evidence asks for one.

On `probbp.ops.dendrites`. A state machine alternates between neurons, which learn until they stop
improving, and dendrites, which learn to say what the neurons get wrong; then each dendrite is
accepted or not, and a set that did not help is taken back (Brenner & Itti, 2025, arXiv:2501.18018).
Two hosts: any loss of a network that takes its layers as an argument (`from_loss`; Flax NNX models
unedited, by `from_nnx`), and NumPyro's SVI (`from_svi`).

    host = from_loss(loss_fn, params, optax.adam(1e-2), train, validation)
    result = grow(rng_key, host, max_sets=3)
    logits = network(result.params, x, host.layer(result.dendrites))
"""

from probbp.models.growth.acceptance import Acceptance, Proposal, Search
from probbp.models.growth.flax import from_nnx
from probbp.models.growth.loss import from_loss
from probbp.models.growth.machine import Event, Grown, Host, grow
from probbp.models.growth.pruning import prune
from probbp.models.growth.svi import from_svi
from probbp.models.growth.weights import with_dendrites

__all__ = [
    "Acceptance",
    "Event",
    "Grown",
    "Host",
    "Proposal",
    "Search",
    "from_loss",
    "from_nnx",
    "from_svi",
    "grow",
    "prune",
    "with_dendrites",
]
