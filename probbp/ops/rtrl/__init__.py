r"""Loops whose gradient is carried forward: exact, in memory that does not grow with their length.

Bird & Polivoda, 2021, arXiv:2103.15589; as real-time recurrent learning in Williams & Zipser, 1989.
With a state :math:`x_t = f(x_{t-1}, \theta, u_t)`, backpropagation stores every state. Here the
sensitivity :math:`S_t = dx_t / d\theta` goes along,

.. math:: S_t = J_t S_{t-1} + F_t, \qquad J_t = \partial f / \partial x_{t-1}, \quad
    F_t = \partial f / \partial \theta,

and nothing else is kept: n P numbers for n of state and P parameters, at the price of P + 1
directional derivatives a step. `recommended` says when that pays.
"""

from probbp.ops.rtrl.choice import recommended
from probbp.ops.rtrl.curvature import gauss_newton
from probbp.ops.rtrl.diagonal import diagonal_scan
from probbp.ops.rtrl.online import advance, attach
from probbp.ops.rtrl.scan import scan

__all__ = ["advance", "attach", "diagonal_scan", "gauss_newton", "recommended", "scan"]
