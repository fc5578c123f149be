r"""Spiking networks whose backward pass is one of rates, whatever the number of time steps.

Yu et al., 2024, arXiv:2410.11488. A network of spiking neurons is simulated as it is. Meanwhile
each neuron keeps two averages: its rate :math:`e`, and its gain :math:`g = dr / dc`, the derivative
of the rate with respect to a constant current. Then there is one backward pass through the static
network whose activations are the :math:`e` and whose slopes are the :math:`g`,

.. math:: \frac{dL}{dr^l} = W^{l+1\,T} \frac{dL}{dc^{l+1}}, \qquad
    \frac{dL}{dc^l} = g^l \frac{dL}{dr^l}, \qquad
    \frac{dL}{dW^l} = \frac{dL}{dc^l}\, e^{l-1\,T},

with the scale of backpropagation through time (the paper divides it by the number of steps).
Inside a neuron the gain holds all that backpropagation would find. Lost is how errors and spikes
vary together in time: where timing carries the information the gradient is wrong, and `agreement`
measures it.
"""

from probbp.ops.rate.agreement import agreement
from probbp.ops.rate.inputs import bernoulli, constant, events
from probbp.ops.rate.neurons import Neuron, lif
from probbp.ops.rate.runs import Spike
from probbp.ops.rate.simulate import simulate, spike_trains

__all__ = [
    "Neuron",
    "Spike",
    "agreement",
    "bernoulli",
    "constant",
    "events",
    "lif",
    "simulate",
    "spike_trains",
]
