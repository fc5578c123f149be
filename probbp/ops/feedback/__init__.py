r"""Layers that send the error back through other weights than they sent the signal forward.

Lillicrap et al., 2014, arXiv:1411.0247; when it converges and when it aligns, Song, Xu & Lafferty,
2021, arXiv:2106.06044. For :math:`y = x W` an error :math:`\delta` goes back as

.. math:: \bar W = x^T \delta, \qquad \bar x = \delta B^T,

with feedback weights B of the kernel's shape in the place of W. The layers take B as an argument,
and a rule is a function that makes it: `normal` (fixed random), `uniform_sign`, `fixed_magnitude`
and `redrawn` (the signs of W), W itself (backpropagation). `kolen_pollack` lets B learn, and
`direct` sends the error from the output to every layer at once. `alignment` says how far it all
points where the gradient does.

What comes out is not the gradient of anything. Descent on it has no guarantee beyond the theory's,
line searches and quasi-Newton methods have nothing to hold on to, and numerical gradient checks
must fail. Hamiltonian and Langevin chains stay exact as long as B is fixed or a function of the
position (weights that learn must be frozen after the warm-up), and they are slow: of a Bayesian
network with 49 parameters, HMC made 152 effective draws in 1,000 iterations with the gradient, 58
with `uniform_sign`, 21 with the weights of the mode and 4 with random ones, each at its best step
size (`examples/papers/feedback.py`).
"""

from probbp.ops.feedback.alignment import alignment
from probbp.ops.feedback.direct import direct, direct_weights
from probbp.ops.feedback.through import (
    conv_general_dilated,
    dense,
    dot_general,
    einsum,
    through,
)
from probbp.ops.feedback.weights import (
    fixed_magnitude,
    kolen_pollack,
    normal,
    redrawn,
    uniform_sign,
)

__all__ = [
    "alignment",
    "conv_general_dilated",
    "dense",
    "direct",
    "direct_weights",
    "dot_general",
    "einsum",
    "fixed_magnitude",
    "kolen_pollack",
    "normal",
    "redrawn",
    "through",
    "uniform_sign",
]
