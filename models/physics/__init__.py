"""Structures whose physical model is incomplete: a beam, an oscillator, a population of bridges.

The case studies of Koune & Cicirello, 2025, arXiv:2506.13658, simulated from equations. In each a
`Case` holds the physics that is known and a simulator that knows more: supports that give, damping,
temperature, damage. `bridges` has a beam finite-element model of its own.

    case = beam()
    records = simulate(jax.random.key(0), case, 1024)
"""

from probbp.models.physics.beams import POINTS, beam
from probbp.models.physics.cases import Case, Records, simulate
from probbp.models.physics.finite_elements import WINDOW, bridges
from probbp.models.physics.oscillators import TIMES, oscillator

__all__ = [
    "POINTS",
    "TIMES",
    "WINDOW",
    "Case",
    "Records",
    "beam",
    "bridges",
    "oscillator",
    "simulate",
]
