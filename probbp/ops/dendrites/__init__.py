r"""Dendrites: side branches of single neurons, grown on a trained network.

Brenner & Itti, 2025, arXiv:2501.18018 (perforated backpropagation), after Cascade-Correlation
(Fahlman & Lebiere, 1989). A neuron of a dense or convolutional layer gets K branches of its own,

.. math:: z = W x + b + \sum_k v_k \odot d_k, \qquad
    d_k = \phi\Big(U_k x + c_k + \sum_{j<k} \Gamma_{kj} \odot d_j\Big),

that see what it sees and talk to nobody else. With :math:`v_k = 0` a new branch changes nothing.
Two switches say what is differentiated: `freeze` cuts the branches' own parameters off, `perforate`
the way through a branch to its inputs. Around the layer stands what growing needs: the error of
every neuron from one backward pass (`observe`), candidates fitted to it (`search`), and the
evidence for each (`log_evidence_gain`, `greedy`, `score_test`, `false_discovery`).
`probbp.models.growth` drives them.
"""

from probbp.ops.dendrites.evidence import (
    elbo_change,
    greedy,
    joint_log_evidence_gain,
    laplace,
    log_evidence_gain,
    prune,
)
from probbp.ops.dendrites.layer import (
    Candidate,
    Dendrites,
    conv_general_dilated,
    dense,
    empty,
    grow,
    grown,
    num_params,
    outputs,
)
from probbp.ops.dendrites.live import live
from probbp.ops.dendrites.probes import Observation, observe, sensitivities
from probbp.ops.dendrites.scores import contributions, correlation, covariance, gain
from probbp.ops.dendrites.search import Found, Rows, flat, preactivation, rows, search
from probbp.ops.dendrites.significance import false_discovery, orthogonalise, score_test

__all__ = [
    "Candidate",
    "Dendrites",
    "Found",
    "Observation",
    "Rows",
    "contributions",
    "conv_general_dilated",
    "correlation",
    "covariance",
    "dense",
    "elbo_change",
    "empty",
    "false_discovery",
    "flat",
    "gain",
    "greedy",
    "grow",
    "grown",
    "joint_log_evidence_gain",
    "laplace",
    "live",
    "log_evidence_gain",
    "num_params",
    "observe",
    "orthogonalise",
    "outputs",
    "preactivation",
    "prune",
    "rows",
    "score_test",
    "search",
    "sensitivities",
]
