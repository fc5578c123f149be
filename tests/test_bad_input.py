"""Bad input to every public function: a message of ours that names the argument, at the door.

A row is a function, an argument and a value. Most follow from what kind of argument it is; what
does not fit together (shapes, options that exclude each other) is listed by hand.
"""

import importlib
import inspect
import json
import re
import traceback
from collections import Counter
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from flax import linen, nnx
from numpyro.handlers import seed

import probbp
from probbp import diagnostics, estimators
from probbp.models import (
    blob,
    bnn,
    checkpoints,
    diffusion,
    growth,
    hierarchical,
    ivon,
    physics,
    physics_vae,
    runge_kutta,
    snn,
    state_space,
    tfb,
    transformer,
)
from probbp.models import feedback as feedback_models
from probbp.numpyro import Kernel, Optim, subsampled, surrogate_report
from probbp.ops import dendrites, feedback, gradient_reversal, rate, rtrl, sdo, substitute, sus
from probbp.optim import dsbp
from probbp.optim import feedback as feedback_optim
from probbp.optim.dsbp import (
    architecture,
    drift,
    geodesics,
    meta,
    modified_equation,
    pac_bayes,
    rotations,
    transfer,
    truncation,
)

ROOT = Path(probbp.__file__).resolve().parents[1]
NAN, INF = float("nan"), float("inf")

# What no argument of a kind may be. A wrong type raises TypeError, a wrong value ValueError.
COUNT = (0, -1, 2.5, NAN, "2", True)
NATURAL = (-1, 2.5, NAN, "2", True)
FINITE = (NAN, INF, "1", 1j)
POSITIVE = (0.0, -1.0, NAN, INF, "1")
NOT_NEGATIVE = (-1.0, NAN, INF, "1")
PROBABILITY = (-0.1, 1.1, NAN, "1")
OPEN = (0.0, 1.0, NAN, "1")
SHARE = (0.0, 1.1, NAN, "1")
STEP_SIZE = (0.0, -1.0, NAN, INF, "1", True)
CHOICE = ("nonsense", None, 3)
FUNCTION = ("nonsense", 3, {})
FOLDER = ("", 3, ["run"])
METRIC = ("nonsense", np.ones(2), 3)
ALGORITHM = ("mala", 3, None, jnp.sum, dict)
RNG_KEY = ("x", 0, 1.5, np.zeros(2), np.zeros((3, 2), np.uint32))


class Door(NamedTuple):
    """A function with arguments that are right, and the kinds of those that may be wrong."""

    call: Any
    kinds: dict[str, tuple]
    good: dict[str, Any] = {}


def key():
    return jax.random.key(0)


def square(x):
    return -jnp.sum(jnp.square(x)) / 2


def drawn(**options):
    options = {"algorithm": partial(probbp.mala, square), "position": np.zeros(2)} | options
    return probbp.sample(key(), **{"num_warmup": 1, "num_samples": 1} | options)


def warmed_up(**options):
    options = {"algorithm": partial(probbp.mala, square), "position": np.zeros(2)} | options
    return probbp.warmup(key(), **{"num_steps": 1} | options)


def calibrated(**options):
    options = {"simulate": lambda k: (0.0, 0.0), "infer": lambda k, y: np.zeros(3)} | options
    return diagnostics.simulation_based_calibration(key(), **{"num_simulations": 1} | options)


def judged(**options):
    options = {"estimator": estimators.reverse(), "fun": square, "params": np.ones(2)} | options
    return diagnostics.gradient_quality(key(), **options)


def evidence(**options):
    options = {"logdensity_fn": square, "draws": np.zeros((2, 100, 1))} | options
    return probbp.log_evidence(key(), **options)


def kernel(**options):
    return Kernel(**{"model": nothing, "algorithm": probbp.mala} | options)


def minibatches(**options):
    return subsampled(key(), **{"model": nothing} | options)


def looped(**options):
    options = {"f": lambda carry, _: (carry, None), "init": np.zeros(2), "length": 1} | options
    return probbp.checkpointed_scan(**options, progress_bar=False)


def nothing():
    """A model without sites."""


def ranks():
    return diagnostics.RankStatistics({"x": np.arange(9)}, 9)


def sampled(**options):
    options = {"rng_key": key()} | options
    return sdo.sample(lambda x, t: x, jnp.ones((2, 3)), sdo.linear(4), **options)


def simulated(num_steps=4, **options):
    return rate.simulate(
        lambda spike, x: spike(x), rate.constant(jnp.ones(2)), num_steps, **options
    )


def attention(**options):
    x = jnp.ones((5, 2, 4))
    return sus.dot_product_attention(x, x, x, **{"keep": 2} | options)


def rows():
    return dendrites.Rows(jnp.ones((4, 2)), jnp.ones((4, 3)), jnp.ones((4, 3)), jnp.ones((0, 4, 3)))


def network():
    return snn.MLP([2, 3], rngs=nnx.Rngs(0))


def denoiser():
    return diffusion.Denoiser((2,), width=4, num_blocks=1, rngs=nnx.Rngs(0))


def trained(**options):
    options = {"num_steps": 1, "batch_size": 2, "progress_bar": False} | options
    return diffusion.train(key(), denoiser(), jnp.ones((3, 2)), sdo.linear(4), **options)


def tuned(**options):
    options = {"num_steps": 1, "batch_size": 2, "progress_bar": False} | options
    return diffusion.tune(key(), denoiser(), jnp.sum, (2,), sdo.linear(4), **options)


def lora(**options):
    weights, x = {"w": np.ones((2, 3))}, np.ones((4, 2))
    options = {"target": "w", "example": (x,)} | options
    return blob.bayesian_lora(lambda params, x: x @ params["w"], weights, **options)


@cache
def small_lora():
    return lora()


@cache
def vae():
    return physics_vae.physics_vae(
        lambda p: p["a"] * jnp.ones(2),
        {"a": dist.Normal(0.0, 1.0)},
        np.arange(8.0).reshape(4, 2),
        domain=physics_vae.continuous(np.arange(4.0)[:, None]),
        width=4,
    )


def built(**options):
    label = physics_vae.continuous(np.arange(4.0)[:, None])
    options = {"domain": label, "width": 4} | options
    prior = {"a": dist.Normal(0.0, 1.0)}
    x = options.pop("x", np.arange(8.0).reshape(4, 2))
    return physics_vae.physics_vae(lambda p: p["a"] * jnp.ones(2), prior, x, **options)


def searching(options):
    """Options, of which those of a `Search` are put into one."""
    names = growth.Search._fields
    search = {name: value for name, value in options.items() if name in names}
    rest = {name: value for name, value in options.items() if name not in names}
    return rest | ({"search": growth.Search(**search)} if search else {})


def grown(**options):
    params = {"w": np.ones((2, 1))}

    def loss_fn(params, layer, batch, key):
        return jnp.mean((layer("a", batch[0], params["w"]) - batch[1]) ** 2)

    data = np.ones((4, 2)), np.ones((4, 1))
    options = {"batch_size": 2} | searching(options)
    return growth.from_loss(loss_fn, params, optax.sgd(0.1), data, data, **options)


def host():
    return SimpleNamespace(max_sets=3)


def series(model, **options):
    with seed(rng_seed=0):
        return model(options.pop("y", np.ones(4)), **options)


def rows_model(model, *args, **options):
    with seed(rng_seed=0):
        return model(*args, **options)


def certified(**options):
    gaussian = pac_bayes.Posterior(jnp.zeros(1), jnp.eye(1), jnp.ones(1))
    before = pac_bayes.prior(np.zeros(2), np.ones((2, 1)), 1.0, independent=True)
    data = np.ones(4)
    rows = options.pop("rows", [0, 1])
    losses = lambda w, x: x * 0.5
    return pac_bayes.certificate(key(), losses, before, gaussian, data, rows, **options)


def low_rank(of_rank=None, tolerance=None):
    moment = truncation.second_moment(np.ones((4, 3)))
    return truncation.truncate(np.ones((3, 2)), moment, rank=of_rank, tolerance=tolerance)


EVIDENCE = {"gradient": np.ones(2), "curvature": np.ones(2)}
MATRICES = {"gradient": np.ones(2), "curvature": np.eye(2)}
PROBS = {"probs": np.full((3, 2), 0.5), "labels": np.array([0, 1, 0])}
ROWS_OF = {"x": np.ones((3, 2)), "y": np.ones(3)}
NORMAL = {"labels": np.zeros(3, int), "x": np.ones((3, 2))}

SAMPLER = {
    "logdensity_fn": FUNCTION,
    "step_size": STEP_SIZE,
}
LINE = {"num_tangents": COUNT, "num_inner_steps": COUNT}
ON_SQUARE = {"logdensity_fn": square, "step_size": 0.1}

DOORS = {
    "probbp.mala": Door(
        probbp.mala,
        SAMPLER | {"key_policy": CHOICE, "estimator": ("forward", 3, estimators.forward)},
        ON_SQUARE,
    ),
    "probbp.fmala": Door(
        probbp.fmala, SAMPLER | {"key_policy": CHOICE, "drift_scale": FINITE}, ON_SQUARE
    ),
    "probbp.line_fmala": Door(probbp.line_fmala, SAMPLER | LINE, ON_SQUARE),
    "probbp.pc_fmala": Door(
        probbp.pc_fmala,
        SAMPLER | {"key_policy": CHOICE, "drift_scale": FINITE, "floor": NOT_NEGATIVE},
        ON_SQUARE,
    ),
    "probbp.pc_line_fmala": Door(
        probbp.pc_line_fmala, SAMPLER | LINE | {"floor": NOT_NEGATIVE}, ON_SQUARE
    ),
    "probbp.surrogate": Door(
        probbp.surrogate,
        SAMPLER
        | {
            "weights": (np.ones(3), np.ones(4), "x"),
            "num_inner_transitions": COUNT,
            "num_inner_steps": COUNT,
        },
        ON_SQUARE,
    ),
    "probbp.sample": Door(
        drawn,
        {
            "algorithm": ALGORITHM,
            "position": (np.zeros(2, int), "x", None, {}),
            "num_warmup": NATURAL,
            "num_samples": COUNT,
            "num_chains": COUNT,
            "thinning": COUNT,
            "metric": METRIC,
            "target_acceptance_rate": OPEN,
            "initial_step_size": POSITIVE,
            "dispersion": NOT_NEGATIVE,
            "postprocess_fn": FUNCTION,
            "coords": (3, {"a": 3}),
            "dims": (3, {"x": 3}),
            "every": COUNT,
            "checkpoint": FOLDER,
            "stream": FOLDER,
            "mesh": (3, "cpu"),
            "batch_size": COUNT,
        },
    ),
    "probbp.warmup": Door(
        warmed_up,
        {
            "algorithm": ALGORITHM,
            "position": (np.zeros(2, int), "x", None, {}),
            "num_steps": NATURAL,
            "metric": METRIC,
            "target_acceptance_rate": OPEN,
            "initial_step_size": POSITIVE,
        },
    ),
    "probbp.log_evidence": Door(
        evidence,
        {
            "logdensity_fn": FUNCTION,
            "draws": (np.zeros(3), np.zeros((2, 3, 1)), np.zeros((2, 200), int), "x", None),
            "num_evaluations": COUNT,
            "batch_size": COUNT,
        },
    ),
    "probbp.checkpointed_scan": Door(
        looped, {"f": FUNCTION, "length": COUNT, "every": COUNT, "checkpoint": FOLDER}
    ),
    "probbp.diagnostics.simulation_based_calibration": Door(
        calibrated,
        {
            "simulate": FUNCTION,
            "infer": FUNCTION,
            "quantities": FUNCTION,
            "num_simulations": COUNT,
            "batch_size": COUNT,
        },
    ),
    "probbp.diagnostics.gradient_quality": Door(
        judged,
        {
            "estimator": ("forward", 3, None, estimators.forward),
            "fun": FUNCTION,
            "params": (np.ones(2, int), "x", None, {}),
            "num_keys": (*COUNT, 1),
            "batch_size": COUNT,
            "reference": FUNCTION,
        },
    ),
    "probbp.diagnostics.from_blackjax": Door(
        diagnostics.from_blackjax,
        {
            "states": (None, {}, np.ones(3)),
            "postprocess_fn": FUNCTION,
            "sample_stats": (3, {"lp": np.ones(3)}),
            "coords": (3, {"a": 3}),
            "dims": (3, {"x": 3}),
        },
        {"states": np.ones((2, 3))},
    ),
    "probbp.diagnostics.numpyro_simulator": Door(
        lambda **o: diagnostics.numpyro_simulator(**{"model": nothing, "data": "y"} | o)(key()),
        {"model": FUNCTION, "data": (3, "z", ("z", 3))},
    ),
    "probbp.diagnostics.plot_ranks": Door(
        lambda **o: diagnostics.plot_ranks(**{"result": ranks()} | o),
        {"num_bins": (*COUNT, 11), "result": (None, np.arange(3))},
    ),
    "probbp.diagnostics.uniformity": Door(diagnostics.uniformity, {"result": (None, np.arange(3))}),
    "probbp.diagnostics.plot_gradient_quality": Door(
        diagnostics.plot_gradient_quality, {"quality": (None, 3, {}, {"a": 3})}
    ),
    "probbp.numpyro.Kernel": Door(
        kernel,
        {
            "model": ("nonsense", 3),
            "algorithm": ALGORITHM,
            "step_size": STEP_SIZE,
            "target_accept_prob": OPEN,
            "metric": METRIC,
            "batch_size": COUNT,
            "init_strategy": FUNCTION,
        },
    ),
    "probbp.numpyro.Optim": Door(
        Optim,
        {
            "transformation": ("adam", None, optax.adam),
            "estimator": ("forward", 3, None, estimators.forward),
            "rng_key": RNG_KEY,
            "extra_args": FUNCTION,
        },
        {"transformation": optax.sgd(0.1), "estimator": estimators.reverse()},
    ),
    "probbp.numpyro.subsampled": Door(
        minibatches,
        {
            "model": FUNCTION,
            "model_args": (3,),
            "model_kwargs": (3, [1]),
            "estimator": ("forward", 3, estimators.forward),
            "batch_size": COUNT,
            "init_strategy": FUNCTION,
        },
    ),
    "probbp.numpyro.surrogate_report": Door(surrogate_report, {"mcmc": (None, 3, "x")}),
    "probbp.estimators.forward": Door(
        estimators.forward, {"num_tangents": COUNT, "tangents": CHOICE, "batch_size": COUNT}
    ),
    "probbp.estimators.spsa": Door(
        estimators.spsa, {"num_pairs": COUNT, "size": POSITIVE, "batch_size": COUNT}
    ),
    "probbp.estimators.averaged": Door(
        lambda **o: estimators.averaged(estimators.reverse(), **o),
        {"num": COUNT, "batch_size": COUNT},
        {"num": 2},
    ),
    "probbp.diagnostics.expected_calibration_error": Door(
        diagnostics.expected_calibration_error, {"num_bins": COUNT, "bins": CHOICE}, PROBS
    ),
    "probbp.diagnostics.reliability_diagram": Door(
        diagnostics.reliability_diagram, {"num_bins": COUNT, "bins": CHOICE}, PROBS
    ),
    "probbp.ops.gradient_reversal": Door(
        lambda **o: gradient_reversal(jnp.ones(2), **o), {"strength": (*FINITE, np.ones(2))}
    ),
    "probbp.ops.dendrites.empty": Door(
        lambda **o: dendrites.empty(np.ones((2, 3)), **o), {"slots": NATURAL}
    ),
    "probbp.ops.dendrites.false_discovery": Door(
        dendrites.false_discovery,
        {"level": OPEN, "p_values": (np.array([0.5, 1.5]), np.array([NAN]), "1")},
        {"p_values": np.full(3, 0.5)},
    ),
    "probbp.ops.dendrites.log_evidence_gain": Door(
        dendrites.log_evidence_gain, {"prior_scale": POSITIVE}, EVIDENCE
    ),
    "probbp.ops.dendrites.joint_log_evidence_gain": Door(
        dendrites.joint_log_evidence_gain, {"prior_scale": POSITIVE}, MATRICES
    ),
    "probbp.ops.dendrites.greedy": Door(dendrites.greedy, {"prior_scale": POSITIVE}, MATRICES),
    "probbp.ops.dendrites.prune": Door(
        dendrites.prune, {"prior_scale": POSITIVE}, MATRICES | {"weight": np.ones(2)}
    ),
    "probbp.ops.dendrites.laplace": Door(dendrites.laplace, {"prior_scale": POSITIVE}, EVIDENCE),
    "probbp.ops.dendrites.elbo_change": Door(
        dendrites.elbo_change,
        {"prior_scale": POSITIVE, "scale": POSITIVE},
        EVIDENCE | {"loc": np.ones(2), "scale": np.ones(2), "prior_scale": 1.0},
    ),
    "probbp.ops.dendrites.search": Door(
        lambda **o: dendrites.search(key(), rows(), rows(), optax.sgd(0.1), **o),
        {"num_candidates": COUNT, "num_steps": NATURAL, "init_scale": POSITIVE},
    ),
    "probbp.ops.feedback.normal": Door(
        lambda **o: feedback.normal(key(), np.ones((2, 3)), **o), {"scale": POSITIVE}
    ),
    "probbp.ops.rate.bernoulli": Door(
        lambda rates: rate.bernoulli(key(), rates), {"rates": (*PROBABILITY, np.array([0.5, 2.0]))}
    ),
    "probbp.ops.rate.lif": Door(
        rate.lif, {"leak": PROBABILITY, "threshold": POSITIVE, "reset": CHOICE}
    ),
    "probbp.ops.rate.simulate": Door(
        simulated, {"num_steps": COUNT, "gradient": CHOICE, "order": CHOICE}
    ),
    "probbp.ops.rate.spike_trains": Door(
        lambda num_steps: rate.spike_trains(
            lambda spike, x: spike(x), rate.constant(jnp.ones(2)), num_steps
        ),
        {"num_steps": COUNT},
    ),
    "probbp.ops.rtrl.recommended": Door(
        rtrl.recommended,
        {"num_states": COUNT, "num_params": NATURAL, "length": NATURAL},
        {"num_states": 2, "num_params": 3, "length": 5},
    ),
    "probbp.ops.rtrl.scan": Door(
        lambda **o: rtrl.scan(lambda c, x: (c, None), 0.0, None, **{"length": 2} | o),
        {"length": NATURAL, "batch_size": COUNT},
    ),
    "probbp.ops.sdo.linear": Door(
        lambda num_steps=4, **o: sdo.linear(num_steps, **o),
        {
            "num_steps": COUNT,
            "num_train_steps": COUNT,
            "first_beta": OPEN,
            "last_beta": OPEN,
            "start": NATURAL,
        },
    ),
    "probbp.ops.sdo.cosine": Door(
        lambda num_steps=4, **o: sdo.cosine(num_steps, **o),
        {"num_steps": COUNT, "num_train_steps": COUNT, "offset": NOT_NEGATIVE, "start": NATURAL},
    ),
    "probbp.ops.sdo.gaussian_path": Door(
        sdo.gaussian_path, {"covariance": (-1.0, NAN, INF, "1", np.array([1.0, -1.0]))}
    ),
    "probbp.ops.sdo.sample": Door(
        sampled,
        {
            "keep_step": ("nonsense", None, 4, -5, 2.5, True),
            "prediction": CHOICE,
            "eta": PROBABILITY,
        },
    ),
    "probbp.ops.sus.dot_product_attention": Door(
        attention,
        {
            "keep": (0, -1.0, NAN, "many"),
            "sampling": CHOICE,
            "scale": (NAN, INF, "wide"),
            "local_window_size": (-1, 2.5, "2", True),
        },
    ),
    "probbp.ops.sus.suggested_keep": Door(
        lambda **o: sus.suggested_keep(
            key(), lambda p, x, *, keep, rng_key: p * x, 1.0, np.ones(3), **o
        ),
        {"tolerance": POSITIVE, "num_draws": COUNT, "keeps": ((0,), (8, NAN), ("a",))},
    ),
    "probbp.optim.dsbp.inverse_mass_matrix": Door(
        lambda **o: dsbp.inverse_mass_matrix(dsbp.start(key(), 3, 2), **o),
        {"of": CHOICE, "scale": POSITIVE},
    ),
    "probbp.optim.dsbp.leading_eigenpairs": Door(
        lambda **o: dsbp.leading_eigenpairs(key(), lambda v: v, np.ones(3), **{"rank": 1} | o),
        {"rank": COUNT, "num_products": COUNT, "num_probes": COUNT},
    ),
    "probbp.optim.dsbp.scale_by_dynamic_spectral": Door(
        lambda rank=2, **o: dsbp.scale_by_dynamic_spectral(rank, **o),
        {
            "rank": COUNT,
            "mode": CHOICE,
            "source": CHOICE,
            "side": CHOICE,
            "decay": PROBABILITY,
            "refresh": COUNT,
            "eps": NOT_NEGATIVE,
            "seed": ("x", -1, 1.5, True, np.zeros(2), np.zeros((3, 2), np.uint32)),
        },
    ),
    "probbp.optim.dsbp.start": Door(
        lambda size=3, rank=1: dsbp.start(key(), size, rank), {"size": COUNT, "rank": (*COUNT, 4)}
    ),
    "probbp.optim.dsbp.track": Door(
        lambda decay: dsbp.track(dsbp.start(key(), 3, 1), lambda v: v, 3.0, decay),
        {"decay": PROBABILITY},
    ),
    "probbp.optim.dsbp.tracked_metric": Door(dsbp.tracked_metric, {"rank": COUNT}),
    "probbp.optim.dsbp.two_point": Door(
        dsbp.two_point, {"rho": POSITIVE, "num_products": COUNT}, {"rho": 0.1}
    ),
    "probbp.optim.dsbp.architecture.energy_rank": Door(
        partial(architecture.energy_rank, np.ones(3)), {"share": SHARE}
    ),
    "probbp.optim.dsbp.architecture.marchenko_pastur_median": Door(
        architecture.marchenko_pastur_median, {"ratio": SHARE}
    ),
    "probbp.optim.dsbp.architecture.allocate": Door(
        architecture.allocate,
        {
            "budget": (-1.0, NAN, "1"),
            "uses": ([0.0], [NAN], ["1"]),
            "spectra": ([np.array([1.0, -1.0])], [np.array([1.0, NAN])]),
        },
        {"spectra": [np.ones(2)], "shapes": [(2, 3)], "budget": 5},
    ),
    "probbp.optim.dsbp.architecture.select_units": Door(
        partial(architecture.select_units, np.ones((4, 3))), {"num_units": (*COUNT, 4)}
    ),
    "probbp.optim.dsbp.drift.reference": Door(
        partial(drift.reference, np.ones((4, 3))), {"rank": (*NATURAL, 3)}
    ),
    "probbp.optim.dsbp.drift.follow": Door(
        lambda decay: drift.follow(drift.reference(np.ones((4, 3)), 1), np.ones((4, 3)), decay),
        {"decay": OPEN},
    ),
    "probbp.optim.dsbp.geodesics.random_rotation": Door(
        geodesics.random_rotation, {"scale": POSITIVE}
    ),
    "probbp.optim.dsbp.geodesics.geodesic_hmc": Door(
        partial(geodesics.geodesic_hmc, square),
        {"step_size": POSITIVE, "num_integration_steps": COUNT},
        {"step_size": 0.1, "num_integration_steps": 2},
    ),
    "probbp.optim.dsbp.meta.task_basis": Door(
        lambda rank=1, **o: meta.task_basis(np.ones((3, 4)), rank, **o),
        {"rank": COUNT, "decay": PROBABILITY},
    ),
    "probbp.optim.dsbp.meta.adapt": Door(
        partial(meta.adapt, square, 1.0, None, None, None), {"num_steps": NATURAL}
    ),
    "probbp.optim.dsbp.meta.posterior_mode": Door(
        partial(meta.posterior_mode, square, 1.0, None, None, None),
        {"num_steps": NATURAL, "num_products": COUNT},
    ),
    "probbp.optim.dsbp.modified_equation.modified_equation": Door(
        partial(modified_equation.modified_equation, square),
        {"step_size": POSITIVE, "order": (0, 3, 1.5, "1"), "rho": NOT_NEGATIVE},
        {"step_size": 0.1},
    ),
    "probbp.optim.dsbp.modified_equation.simulate": Door(
        lambda **o: modified_equation.simulate(key(), None, 1.0, **o),
        {"time": NOT_NEGATIVE, "num_steps": COUNT},
        {"time": 1.0, "num_steps": 2},
    ),
    "probbp.optim.dsbp.pac_bayes.prior": Door(
        partial(pac_bayes.prior, np.zeros(2), np.ones((2, 1)), independent=True),
        {"scale": POSITIVE, "num_candidates": COUNT},
        {"scale": 1.0},
    ),
    "probbp.optim.dsbp.pac_bayes.optimal_variances": Door(
        partial(pac_bayes.optimal_variances, np.ones(2)),
        {"scale": POSITIVE, "num_rows": NOT_NEGATIVE},
        {"scale": 1.0, "num_rows": 3},
    ),
    "probbp.optim.dsbp.pac_bayes.divergence": Door(
        partial(pac_bayes.divergence, pac_bayes.Posterior(np.zeros(1), np.eye(1), np.ones(1))),
        {"scale": POSITIVE},
    ),
    "probbp.optim.dsbp.pac_bayes.kl_inverse": Door(
        pac_bayes.kl_inverse,
        {"risk": (*PROBABILITY, np.array([0.5, 2.0])), "budget": (-1.0, NAN, "1")},
        {"risk": 0.1, "budget": 0.1},
    ),
    "probbp.optim.dsbp.pac_bayes.certificate": Door(
        certified, {"delta": OPEN, "delta_draws": OPEN, "num_draws": COUNT}
    ),
    "probbp.optim.dsbp.rotations.brockett_step": Door(
        partial(rotations.brockett_step, np.eye(2), np.eye(2)), {"step_size": POSITIVE}
    ),
    "probbp.optim.dsbp.transfer.laplace": Door(
        lambda **o: transfer.laplace(key(), square, np.ones(3), **{"rank": 1, "rest": 1.0} | o),
        {"rest": POSITIVE, "rank": COUNT, "num_products": COUNT},
    ),
    "probbp.optim.dsbp.transfer.tempered": Door(
        partial(transfer.tempered, transfer.Prior(0.0, 0.0, np.ones(1), np.ones(()))),
        {"weight": POSITIVE},
    ),
    "probbp.optim.dsbp.transfer.used_directions": Door(
        partial(transfer.used_directions, np.ones((3, 2))), {"share": SHARE}
    ),
    "probbp.optim.dsbp.truncation.truncate": Door(
        lambda rank=None, tolerance=None: low_rank(rank, tolerance),
        {"rank": (*NATURAL, 3), "tolerance": PROBABILITY},
    ),
    "probbp.optim.dsbp.truncation.end_to_end_bound": Door(
        partial(truncation.end_to_end_bound, []), {"lipschitz": NOT_NEGATIVE, "errors": ([-1.0],)}
    ),
    "probbp.optim.feedback.alignment_budget": Door(
        feedback_optim.alignment_budget,
        {
            "learning_rate": NOT_NEGATIVE,
            "weight_decay": NOT_NEGATIVE,
            "num_steps": COUNT,
            "width": COUNT,
        },
        {"learning_rate": 0.1, "weight_decay": 0.1, "num_steps": 3, "width": 4},
    ),
    "probbp.optim.feedback.decay_until_aligned": Door(
        feedback_optim.decay_until_aligned,
        {
            "budget": NOT_NEGATIVE,
            "learning_rate": POSITIVE,
            "weight_decay": POSITIVE,
            "width": COUNT,
        },
        {"budget": 1.0, "learning_rate": 0.1, "weight_decay": 0.1, "width": 4},
    ),
    "probbp.models.blob.alternating": Door(
        partial(blob.alternating, optax.sgd(0.1)),
        {"prior_scale": POSITIVE, "cycle": COUNT, "kl_learning_rate": NOT_NEGATIVE},
        {"prior_scale": 0.2, "cycle": 3},
    ),
    "probbp.models.blob.bayesian_lora": Door(
        lora,
        {
            "rank": COUNT,
            "alpha": POSITIVE,
            "prior_scale": POSITIVE,
            "init_std": POSITIVE,
            "noise": CHOICE,
        },
    ),
    "probbp.models.blob.rescaled_cycle": Door(
        blob.rescaled_cycle,
        {"num_data": COUNT, "batch_size": COUNT, "gamma": POSITIVE},
        {"num_data": 10, "batch_size": 2},
    ),
    "probbp.models.blob.predict": Door(
        lambda **o: blob.predict(small_lora(), key(), {}, {}, np.ones((4, 2)), **o),
        {"num_samples": NATURAL},
    ),
    "probbp.models.blob.save": Door(
        lambda **o: blob.save(small_lora(), {}, "nowhere", **o), {"format": CHOICE}
    ),
    "probbp.models.blob.svi": Door(
        lambda **o: blob.svi(small_lora(), optax.sgd(0.1), **{"cycle": 2} | o),
        {"schedule": CHOICE},
    ),
    "probbp.models.bnn.model": Door(
        partial(rows_model, bnn.model),
        {
            "num_outputs": COUNT,
            "widths": ((0,), (2.5,), ("2",)),
            "prior_scale": POSITIVE,
            "noise_scale": POSITIVE,
        },
        ROWS_OF,
    ),
    "probbp.models.diffusion.mixture": Door(
        diffusion.mixture,
        {
            "weights": ([-1.0], [NAN], "1"),
            "means": ([[NAN]], "1"),
            "covariances": ([[[INF]]], "1"),
        },
        {"weights": [1.0], "means": [[0.0]], "covariances": [[[1.0]]]},
    ),
    "probbp.models.diffusion.mixture_of": Door(
        diffusion.mixture_of,
        {"num_classes": COUNT, "ridge": NOT_NEGATIVE},
        NORMAL | {"num_classes": 1, "ridge": 0.1},
    ),
    "probbp.models.diffusion.prior": Door(
        lambda **o: rows_model(diffusion.prior, "x", lambda x, t: x, (2,), sdo.linear(4), **o),
        {"eta": PROBABILITY, "keep_step": ("nonsense", 4, 2.5), "prediction": CHOICE},
    ),
    "probbp.models.diffusion.train": Door(
        trained,
        {
            "num_steps": COUNT,
            "batch_size": COUNT,
            "every": COUNT,
            "prediction": CHOICE,
            "drop": PROBABILITY,
            "decay": (-0.1, 1.0, NAN, "1"),
        },
    ),
    "probbp.models.diffusion.tune": Door(
        tuned, {"num_steps": COUNT, "batch_size": COUNT, "every": COUNT, "prediction": CHOICE}
    ),
    "probbp.models.growth.from_loss": Door(
        grown,
        {
            "batch_size": COUNT,
            "slots": COUNT,
            "acceptance": CHOICE,
            "prior_scale": POSITIVE,
            "level": OPEN,
            "search": (3, {}),
            "num_candidates": COUNT,
            "num_steps": NATURAL,
            "init_scale": POSITIVE,
        },
    ),
    "probbp.models.growth.from_svi": Door(
        lambda **o: growth.from_svi(key(), None, None, layers=[], **searching(o)),
        {
            "prior_scale": POSITIVE,
            "epoch_steps": COUNT,
            "num_particles": COUNT,
            "num_draws": COUNT,
            "search": (3, {}),
            "num_candidates": COUNT,
            "num_steps": NATURAL,
            "init_scale": POSITIVE,
        },
    ),
    "probbp.models.growth.grow": Door(
        lambda **o: growth.grow(key(), host(), progress_bar=False, **o),
        {
            "max_sets": NATURAL,
            "max_tries": COUNT,
            "patience": COUNT,
            "max_epochs": COUNT,
            "min_improvement": NOT_NEGATIVE,
            "every": COUNT,
        },
    ),
    "probbp.models.growth.with_dendrites": Door(
        partial(growth.with_dendrites, None, {}), {"prior_scale": POSITIVE}
    ),
    "probbp.models.hierarchical.model": Door(
        partial(rows_model, hierarchical.model),
        {
            "num_groups": COUNT,
            "scale": POSITIVE,
            "group": (np.array([0, 1, 2]), np.array([0, -1, 0]), np.ones(3)),
        },
        ROWS_OF | {"group": np.array([0, 1, 0]), "num_groups": 2},
    ),
    "probbp.models.ivon.ivon": Door(
        ivon.ivon,
        {
            "learning_rate": NOT_NEGATIVE,
            "num_data": (*POSITIVE, np.float32(-1)),
            "prior_scale": (*POSITIVE, np.float32(-1)),
            "kl_weight": POSITIVE,
            "hessian_init": POSITIVE,
            "decay": ((0.9, 1.0), (-0.1, 0.9), (0.9,), ("a", 0.9)),
        },
        {"learning_rate": 0.1, "num_data": 10},
    ),
    "probbp.models.physics.beam": Door(physics.beam, {"confounder": CHOICE}),
    "probbp.models.physics.simulate": Door(
        lambda **o: physics.simulate(key(), physics.beam(), **{"num_records": 2} | o),
        {"num_records": COUNT, "factors": ({"mass": 1.0},)},
    ),
    "probbp.models.physics_vae.categorical": Door(
        physics_vae.categorical,
        {"num_classes": (*COUNT, 1), "probs": ([-0.1, 1.1], [NAN, 1.0], [1.0])},
        {"num_classes": 2},
    ),
    "probbp.models.physics_vae.continuous": Door(
        physics_vae.continuous, {"values": (np.ones(3), np.array([[NAN]]), "1")}
    ),
    "probbp.models.physics_vae.dann_schedule": Door(
        physics_vae.dann_schedule,
        {"peak": FINITE, "num_steps": COUNT, "sharpness": POSITIVE},
        {"peak": 1.0, "num_steps": 3},
    ),
    "probbp.models.physics_vae.cyclical_schedule": Door(
        physics_vae.cyclical_schedule,
        {"peak": FINITE, "period": COUNT, "ramp": SHARE},
        {"peak": 1.0, "period": 3},
    ),
    "probbp.models.physics_vae.physics_vae": Door(
        built, {"domain_dim": COUNT, "class_dim": COUNT, "width": (0, 1, 2.5), "guide": CHOICE}
    ),
    "probbp.models.physics_vae.predict": Door(
        lambda **o: physics_vae.predict(vae(), key(), {}, np.ones((1, 2)), **o),
        {"num_samples": COUNT},
    ),
    "probbp.models.physics_vae.pareto_k": Door(
        lambda **o: physics_vae.pareto_k(vae(), key(), {}, np.ones((1, 2)), **o),
        {"num_samples": COUNT},
    ),
    "probbp.models.physics_vae.svi": Door(
        lambda **o: physics_vae.svi(vae(), optax.sgd(0.1), **o),
        {"strength": FINITE, "invariance": FINITE},
    ),
    "probbp.models.runge_kutta.solve": Door(
        partial(runge_kutta.solve, lambda x: x, np.ones(1), np.arange(3.0)),
        {"num_substeps": COUNT},
    ),
    "probbp.models.snn.MLP": Door(
        lambda sizes: snn.MLP(sizes, rngs=nnx.Rngs(0)), {"sizes": ((2, 0), (2, 2.5), ("2", 3))}
    ),
    "probbp.models.snn.ConvNet": Door(
        lambda **o: snn.ConvNet(**{"num_channels": 1, "num_outputs": 2} | o, rngs=nnx.Rngs(0)),
        {"num_channels": COUNT, "num_outputs": COUNT, "widths": ((0,), (2.5, 3))},
    ),
    "probbp.models.snn.BatchNorm": Door(
        snn.BatchNorm,
        {"num_features": COUNT, "momentum": PROBABILITY, "epsilon": POSITIVE},
        {"num_features": 2},
    ),
    "probbp.models.snn.model": Door(
        lambda **o: rows_model(snn.model, np.ones((3, 2)), **{"network": network()} | o),
        {
            "num_steps": COUNT,
            "num_rows": (2, -1, 2.5),
            "prior_scale": POSITIVE,
            "temperature": POSITIVE,
            "network": (None, nnx.Linear, linen.Dense(3)),
        },
    ),
    "probbp.models.snn.guide": Door(
        lambda **o: snn.guide(snn.model, **{"network": network()} | o),
        {"init_scale": POSITIVE, "network": (None, linen.Dense(3))},
    ),
    "probbp.models.diffusion.Denoiser": Door(
        lambda shape=(2,), **o: diffusion.Denoiser(shape, **{"width": 4} | o, rngs=nnx.Rngs(0)),
        {
            "shape": ((0,), (2.5,)),
            "width": COUNT,
            "num_blocks": NATURAL,
            "num_conditions": NATURAL,
            "num_frequencies": COUNT,
        },
    ),
    "probbp.models.state_space.garch": Door(
        partial(series, state_space.garch),
        {
            "scale": POSITIVE,
            "first_scale": POSITIVE,
            "y": (np.ones((3, 1)), np.array([1.0, NAN]), np.ones(0)),
        },
    ),
    "probbp.models.state_space.local_linear_trend": Door(
        partial(series, state_space.local_linear_trend),
        {"scale": POSITIVE, "y": (np.ones((3, 1)), np.ones(0))},
    ),
    "probbp.models.state_space.hidden_markov": Door(
        partial(series, state_space.hidden_markov),
        {"num_regimes": COUNT, "scale": POSITIVE, "y": (np.ones((3, 1)), np.array([1.0, NAN]))},
    ),
    "probbp.models.state_space.pendulum": Door(
        lambda **o: series(state_space.pendulum, **{"time_step": 0.1} | o),
        {
            "time_step": POSITIVE,
            "num_substeps": COUNT,
            "max_frequency": POSITIVE,
            "y": (np.ones((3, 1)), np.array([1.0, NAN])),
        },
    ),
    "probbp.models.tfb.training_free": Door(
        lambda **o: tfb.training_free(small_lora(), {}, **o), {"sigma": NOT_NEGATIVE}
    ),
    "probbp.models.tfb.search": Door(
        partial(tfb.search, square),
        {
            "tolerance": NOT_NEGATIVE,
            "bounds": ((0.0, 1.0), (1.0, 0.5), (NAN, 1.0)),
            "num_steps": COUNT,
        },
    ),
    "probbp.models.transformer.init": Door(
        lambda **o: transformer.init(
            key(), **{"num_classes": 2, "max_length": 3, "vocabulary": 5} | o
        ),
        {
            "num_classes": COUNT,
            "max_length": COUNT,
            "vocabulary": COUNT,
            "width": COUNT,
            "num_layers": NATURAL,
            "hidden_width": COUNT,
        },
    ),
    "probbp.models.transformer.patches": Door(
        lambda size: transformer.patches(np.ones((1, 4, 4)), size), {"size": COUNT}
    ),
}


def public_functions():
    """Return the functions that the packages of ours show, by name."""
    packages = [path.parent for path in (ROOT / "probbp").glob("[!m]*/**/__init__.py")]
    packages += [path.parent for path in (ROOT / "probbp" / "models").glob("*/__init__.py")]
    modules = {".".join(path.relative_to(ROOT).parts) for path in packages}
    reference = (ROOT / "docs" / "reference").glob("*.md")
    pages = "".join(path.read_text() for path in reference)
    modules |= {"probbp", *re.findall(r"automodule:: (\S+)", pages)}
    for module in map(importlib.import_module, sorted(modules)):
        for name in getattr(module, "__all__", vars(module)):
            thing = getattr(module, name)
            is_own = hasattr(module, "__all__") or inspect.getmodule(thing) is module
            if inspect.isfunction(thing) and is_own and not name.startswith("_"):
                yield f"{module.__name__}.{name}", thing


def keyed_doors():
    """Return a door for each function that takes a key, which is looked at before all else."""
    # Where other arguments are looked at first, or the key may be left out.
    others = {
        "probbp.ops.sdo.sample": partial(sampled, keep_step="random"),
        "probbp.ops.sus.dot_product_attention": attention,
        "probbp.models.blob.predict": lambda rng_key: blob.predict(None, rng_key, {}, {}),
    }
    for name, function in public_functions():
        parameters = inspect.signature(function).parameters
        if "rng_key" in parameters and not name.startswith(INTERNAL):
            required = [p for p in parameters.values() if p.default is p.empty]
            args = {p.name: None for p in required if p.kind is not p.VAR_KEYWORD}
            args = {} if name in others else args
            yield name, Door(others.get(name, function), {"rng_key": RNG_KEY}, args)


INTERNAL = ("probbp.samplers.", "probbp.types.")
KEYED = dict(keyed_doors())


def is_ours(error):
    """The message was written here, and not by JAX, NumPy or Python."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    file = Path(frame.filename).resolve()
    is_here = file.is_relative_to(ROOT / "probbp") or file.is_relative_to(ROOT / "models")
    # JAX leaves its own frames out, so that what it says seems to come from us.
    return is_here and frame.line.startswith("raise ")


# What can be done instead: what must be given, by a verb, a range, a choice or an example.
WAY_OUT = re.compile(
    r"must (be|have|hold|map|take|return|lie)|\b([Pp]ass|[Gg]ive|[Cc]hoose|[Tt]ake|[Uu]se|[Ss]ay|"
    r"[Ll]eave|[Rr]aise|[Ll]ower|[Cc]ast|[Cc]all|[Mm]ake|[Rr]ead|[Nn]ame)\b|such as|from -?\d+ to"
)


def answer_to(call, named):
    """Return what a call with a bad argument comes to, and the message.

    `named` is a pattern for the argument's name, or for what else the message must say.
    """
    try:
        call()
    except Exception as error:
        if not (is_ours(error) and isinstance(error, TypeError | ValueError)):
            return "an error of a host", repr(error)
        if not re.search(named, str(error)):
            return "the argument is not named", str(error)
        if not WAY_OUT.search(str(error)):
            return "no way out", str(error)
        return "in words", str(error)
    return "no error", ""


def answers(name, door):
    """Yield what each row of a door comes to: its name, the answer, and the message."""
    for argument, values in door.kinds.items():
        for value in values:
            call = partial(door.call, **door.good | {argument: value})
            yield f"{name}({argument}={value!r})", *answer_to(call, rf"\b{argument}\b")


ALL = [*DOORS.items(), *KEYED.items()]


@pytest.mark.parametrize(("name", "door"), ALL, ids=[name for name, _ in ALL])
def test_an_argument_of_another_kind_is_told_in_words(name, door):
    assert [row for row in answers(name, door) if row[1] != "in words"] == []


def two_layers(**options):
    layers = [lambda x: x, lambda x: x]
    return feedback.direct(jnp.sum, layers, jnp.ones((2, 3)), **options)


def written(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    return checkpoints.load(tmp_path)


BERT = {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 4}
X, W, B = np.ones((4, 2)), np.ones((2, 3)), np.ones(3)

# What does not fit together: public name, number, call, words.
FITS = {
    "probbp.diagnostics.brier_score, logits": (
        lambda: diagnostics.brier_score([[2.0, -1.0]], [0]),
        "turn logits into probabilities",
    ),
    "probbp.diagnostics.brier_score, nan": (
        lambda: diagnostics.brier_score([NAN, 0.5], [0, 1]),
        "probs has NaN, first in row 0",
    ),
    "probbp.diagnostics.negative_log_likelihood, column": (
        lambda: diagnostics.negative_log_likelihood([0.1, 0.5], [[0], [1]]),
        r"labels\[:, 0\]",
    ),
    "probbp.diagnostics.negative_log_likelihood, one-hot": (
        lambda: diagnostics.negative_log_likelihood([0.1, 0.5], [[0, 1], [1, 0]]),
        "labels.argmax",
    ),
    "probbp.diagnostics.negative_log_likelihood, class": (
        lambda: diagnostics.negative_log_likelihood([0.1, 0.5], [0, 2]),
        "labels runs from 0 to 2",
    ),
    "probbp.estimators.averaged, not called": (
        lambda: estimators.averaged(estimators.forward, 2),
        "call the function that makes it",
    ),
    "probbp.estimators.averaged, a name": (
        lambda: estimators.averaged("forward", 2),
        "estimator must be a function, got 'forward'",
    ),
    "probbp.estimators.control_variate, not called": (
        lambda: estimators.control_variate(estimators.reverse, lambda x: x),
        "such as reverse",
    ),
    "probbp.estimators.through, not called": (
        lambda: estimators.through(optax.sgd(0.1), estimators.forward),
        "such as reverse",
    ),
    "probbp.estimators.forward, integers": (
        lambda: estimators.forward()(lambda p: p * 1.0)(key(), jnp.array(2)),
        "cast it",
    ),
    "probbp.estimators.forward, too many": (
        lambda: estimators.forward(3, tangents="orthogonal")(jnp.sum)(key(), jnp.ones(2)),
        "lower num_tangents",
    ),
    "probbp.ops.substitute, structure": (
        lambda: substitute({"a": X}, [X]),
        "differ in structure",
    ),
    "probbp.ops.substitute, shape": (lambda: substitute(X, X[:2]), "Broadcast"),
    "probbp.ops.dendrites.empty, vector": (lambda: dendrites.empty(B), "neurons"),
    "probbp.ops.dendrites.dense, kernel": (
        lambda: dendrites.dense(X, W, B, dendrites.empty(np.ones((3, 3)))),
        "empty",
    ),
    "probbp.ops.dendrites.grow, cascade": (
        lambda: dendrites.grow(dendrites.empty(W), dendrites.Candidate(W, B, np.zeros((1, 3)))),
        "cascade",
    ),
    "probbp.ops.dendrites.grow, slot": (
        lambda: dendrites.grow(
            dendrites.empty(W, 1), dendrites.Candidate(W, B, np.zeros((1, 3))), slot=1
        ),
        "slot must be an integer from -1 to 0, got 1",
    ),
    "probbp.ops.dendrites.conv_general_dilated, outputs": (
        lambda: dendrites.conv_general_dilated(
            X, W, (1,), "SAME", dimension_numbers=("NWC", "OWI", "NWC")
        ),
        "transpose",
    ),
    "probbp.ops.dendrites.observe, twice": (
        lambda: dendrites.observe(
            lambda layer: jnp.sum(layer("a", layer("a", X, W @ W.T), W)), dendrites.grown({})
        ),
        "twice",
    ),
    "probbp.ops.feedback.direct, number": (
        lambda: two_layers(feedback=[]),
        "2 layers take 1 feedback",
    ),
    "probbp.ops.feedback.direct, shape": (
        lambda: two_layers(feedback=[np.ones((2, 2))]),
        r"feedback\[0\] has shape",
    ),
    "probbp.ops.feedback.dense, transposed": (
        lambda: feedback.dense(X, W, W.T),
        "not that of its transpose",
    ),
    "probbp.ops.feedback.through, integers": (
        lambda: feedback.through(jnp.matmul, X, W, W.astype(int)),
        "cast it",
    ),
    "probbp.ops.feedback.dot_general, transposed": (
        lambda: feedback.dot_general(X, W, (((1,), (0,)), ((), ())), feedback=W.T),
        "not that of its transpose",
    ),
    "probbp.ops.feedback.einsum, transposed": (
        lambda: feedback.einsum("ij,jk->ik", X, W, feedback=W.T),
        "not that of its transpose",
    ),
    "probbp.ops.feedback.conv_general_dilated, shape": (
        lambda: feedback.conv_general_dilated(
            np.ones((1, 1, 4)), np.ones((1, 1, 3)), (1,), "SAME", feedback=np.ones((1, 1, 2))
        ),
        "kernel's own shape",
    ),
    "probbp.ops.feedback.fixed_magnitude, shape": (
        lambda: feedback.fixed_magnitude(W, W.T),
        "kernel's own shape",
    ),
    "probbp.ops.feedback.kolen_pollack, shape": (
        lambda: feedback.kolen_pollack(W, W.T),
        "kernel's own shape",
    ),
    "probbp.ops.feedback.normal, zeros": (
        lambda: feedback.normal(key(), 0 * W),
        "Pass scale=",
    ),
    "probbp.ops.feedback.redrawn, zeros": (
        lambda: feedback.redrawn(key(), 0 * W),
        "Pass scale=",
    ),
    "probbp.ops.rate.simulate, integers": (
        lambda: rate.simulate(lambda s, x: s(x), rate.constant(jnp.ones(2, int)), 4),
        "floating-point arrays",
    ),
    "probbp.ops.rate.simulate, checkpoint": (
        lambda: simulated(checkpoint=True),
        "nothing is stored",
    ),
    "probbp.ops.rtrl.scan, no steps": (
        lambda: rtrl.scan(lambda c, x: (c, None), 0.0),
        "length of them: pass one",
    ),
    "probbp.ops.rtrl.scan, steps": (
        lambda: rtrl.scan(lambda c, x: (c, None), 0.0, (np.ones(3), np.ones(4))),
        "as many in each",
    ),
    "probbp.ops.rtrl.scan, length": (
        lambda: rtrl.scan(lambda c, x: (c, None), 0.0, np.ones(3), 4),
        "length=4",
    ),
    "probbp.ops.rtrl.diagonal_scan, units": (
        lambda: rtrl.diagonal_scan(None, np.ones(2), np.ones(3), np.ones(4), None),
        "units on the first axis",
    ),
    "probbp.ops.sdo.linear, order": (
        lambda: sdo.linear(4, first_beta=0.2, last_beta=0.1),
        "first_beta <= last_beta",
    ),
    "probbp.ops.sdo.linear, steps": (lambda: sdo.linear(1001), "num_steps <= start"),
    "probbp.ops.sdo.cosine, start": (lambda: sdo.cosine(4, start=1000), "num_train_steps"),
    "probbp.ops.sdo.gaussian_path, shape": (
        lambda: sdo.gaussian_path(np.ones((2, 3))),
        "flatten samples",
    ),
    "probbp.ops.sdo.gaussian_path, indefinite": (
        lambda: sdo.gaussian_path(np.array([[1.0, 2.0], [2.0, 1.0]])),
        "no negative eigenvalue",
    ),
    "probbp.ops.sdo.sample, no batch": (
        lambda: sdo.sample(lambda x, t: x, np.ones(3), sdo.linear(4)),
        "noise.None.",
    ),
    "probbp.ops.sdo.sample, arity": (
        lambda: sdo.sample(lambda x: x, np.ones((2, 3)), sdo.linear(4)),
        "denoiser must be a function of x and t",
    ),
    "probbp.ops.sdo.sample, no function": (
        lambda: sdo.sample(None, np.ones((2, 3)), sdo.linear(4)),
        "got NoneType",
    ),
    "probbp.ops.sdo.sample, a tuple": (
        lambda: sdo.sample(lambda x, t: (x, t), np.ones((2, 3)), sdo.linear(4)),
        "an array like x",
    ),
    "probbp.ops.sdo.sample, no key": (
        lambda: sdo.sample(lambda x, t: x, np.ones((2, 3)), sdo.linear(4), keep_step="random"),
        "needs an rng_key",
    ),
    "probbp.ops.sdo.sample, subset": (
        lambda: sampled(keep_step=sdo.Subset(0.0)),
        r"Subset's probability must be in \(0, 1\]",
    ),
    "probbp.ops.sdo.sample, last": (
        lambda: sampled(keep_step=sdo.Last(5)),
        "Last's num_steps must be an integer from 1 to 4",
    ),
    "probbp.ops.sdo.sample, noise": (lambda: sampled(eta=0.5), "step_noise"),
    "probbp.ops.sus.dot_product_attention, heads": (
        lambda: sus.dot_product_attention(
            np.ones((5, 3, 4)), np.ones((5, 2, 4)), np.ones((5, 2, 4)), keep=2
        ),
        "3 heads are not a multiple of 2",
    ),
    "probbp.ops.sus.dot_product_attention, mask": (
        lambda: attention(mask=np.ones((2, 5, 5))),
        "mask must be boolean",
    ),
    "probbp.ops.sus.dot_product_attention, window": (
        lambda: attention(local_window_size=(1, 2, 3)),
        "back, ahead",
    ),
    "probbp.optim.dsbp.architecture.noise_threshold, values": (
        lambda: architecture.noise_threshold(np.ones(3), (4, 5)),
        "All are needed",
    ),
    "probbp.optim.dsbp.drift.principal_angles, spaces": (
        lambda: drift.principal_angles(np.eye(3), np.eye(4)),
        "Two bases of one space",
    ),
    "probbp.optim.dsbp.geodesics.geodesic_hmc, start": (
        lambda: geodesics.geodesic_hmc(jnp.sum, 0.1, 1)[0](jnp.ones((3, 2))),
        "not orthonormal",
    ),
    "probbp.optim.dsbp.guide_params, spectrum": (
        lambda: dsbp.guide_params(np.zeros(3), dsbp.start(key(), 3, 1)),
        "unexplored",
    ),
    "probbp.optim.dsbp.meta.precondition, rates": (
        lambda: meta.precondition(np.ones(2), np.ones((1, 2)), meta.Rates(np.ones(3), np.ones(()))),
        "take rates of shapes",
    ),
    "probbp.optim.dsbp.modified_equation.modified_equation, penalty": (
        lambda: modified_equation.modified_equation(jnp.sum, 0.1, rho=0.1),
        "both leading_fn and a rho",
    ),
    "probbp.optim.dsbp.pac_bayes.prior, origin": (
        lambda: pac_bayes.prior(np.zeros(2), np.eye(2), 1.0),
        "Say what the prior was made from",
    ),
    "probbp.optim.dsbp.pac_bayes.certificate, rows": (
        lambda: certified(rows=[0, 9]),
        "rows must be from 0 to 3",
    ),
    "probbp.optim.dsbp.rotations.on_lie_algebra, vector": (
        lambda: rotations.on_lie_algebra(optax.sgd(0.1)).init(np.ones(3)),
        "optax.partition",
    ),
    "probbp.optim.dsbp.scale_by_dynamic_spectral, inner": (
        lambda: dsbp.scale_by_dynamic_spectral(2, "damp", inner=optax.trace(0.9)),
        "chain it behind",
    ),
    "probbp.optim.dsbp.transfer.protect, shape": (
        lambda: transfer.protect(np.eye(3)).init(np.ones(3)),
        "do not fit a parameter",
    ),
    "probbp.optim.dsbp.truncation.second_moment, layers": (
        lambda: truncation.second_moment(X, truncation.second_moment(np.ones((4, 3)))),
        "one SecondMoment for each layer",
    ),
    "probbp.optim.dsbp.truncation.patches, axes": (
        lambda: truncation.patches(X, (3, 3)),
        "takes 4",
    ),
    "probbp.optim.dsbp.truncation.error_on, layout": (
        lambda: truncation.error_on(W.T, W.T, truncation.second_moment(X)),
        "transpose one",
    ),
    "probbp.optim.dsbp.truncation.truncate, both": (
        lambda: low_rank(1, 0.1),
        "Give a rank or a tolerance",
    ),
    "probbp.models.bnn.model, products": (
        lambda: rows_model(bnn.model, X, widths=(3,), dense=[jnp.matmul]),
        "dense has 1 products",
    ),
    "probbp.models.bnn.model, one input": (lambda: rows_model(bnn.model, B), r"x\[:, None\]"),
    "probbp.models.bnn.model, column": (
        lambda: rows_model(bnn.model, X, np.ones((4, 1))),
        r"y\[:, 0\]",
    ),
    "probbp.models.hierarchical.model, rows": (
        lambda: rows_model(hierarchical.model, X, np.zeros(3, int), num_groups=1),
        "group must have one entry for each of the 4 rows",
    ),
    "probbp.models.diffusion.mixture, means": (
        lambda: diffusion.mixture([1.0], [0.0], [[1.0]]),
        "means must be .components, d.",
    ),
    "probbp.models.diffusion.train, module": (
        lambda: diffusion.train(key(), linen.Dense(3), X, sdo.linear(4), num_steps=1),
        "network must be a Flax NNX module.*nnx.bridge",
    ),
    "probbp.models.diffusion.tune, class": (
        lambda: diffusion.tune(key(), nnx.Linear, jnp.sum, (2,), sdo.linear(4), num_steps=1),
        "not its class",
    ),
    "probbp.models.feedback.with_feedback, linen": (
        lambda: feedback_models.with_feedback(linen.Dense(3), key()),
        "linen_interceptor",
    ),
    "probbp.models.feedback.with_feedback, nothing": (
        lambda: feedback_models.with_feedback(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), key()),
        "no Linear, LinearGeneral or Conv",
    ),
    "probbp.models.growth.from_nnx, linen": (
        lambda: growth.from_nnx(linen.Dense(3)),
        "growth.from_loss",
    ),
    "probbp.models.growth.from_nnx, equinox": (
        lambda: growth.from_nnx(equinox.nn.Linear(2, 3, key=key())),
        "An Equinox module",
    ),
    "probbp.models.growth.from_nnx, nothing": (
        lambda: growth.from_nnx(nnx.BatchNorm(3, rngs=nnx.Rngs(0))),
        "nothing in it could grow",
    ),
    "probbp.models.growth.from_loss, layers": (lambda: grown(layers=["b"]), "and not .'b'."),
    "probbp.models.growth.from_loss, batch": (lambda: grown(batch_size=5), "a batch must be full"),
    "probbp.models.growth.grow, slots": (
        lambda: growth.grow(key(), host(), max_sets=4),
        "Give it more slots",
    ),
    "probbp.models.blob.bayesian_lora, dtype": (lambda: lora(dtype="float16"), "single precision"),
    "probbp.models.lora.layouts, target": (lambda: lora(target="v"), "target"),
    "probbp.models.blob.svi, cycle": (
        lambda: blob.svi(small_lora(), optax.sgd(0.1), schedule="blob"),
        "needs a cycle",
    ),
    "probbp.models.physics_vae.physics_vae, no label": (
        lambda: built(domain=None),
        "a domain, classes or both",
    ),
    "probbp.models.physics_vae.physics_vae, shape": (
        lambda: built(x=np.ones(4)),
        "x must be finite and .records, outputs.",
    ),
    "probbp.models.transformer.init, inputs": (
        lambda: transformer.init(key(), num_classes=2, max_length=3),
        "one of vocabulary",
    ),
    "probbp.models.transformer.patches, tiles": (
        lambda: transformer.patches(np.ones((1, 4, 6)), 4),
        "do not tile",
    ),
}


@pytest.mark.parametrize("name", FITS)
def test_what_does_not_fit_together(name):
    call, words = FITS[name]
    answer, message = answer_to(call, words)
    # Of shapes a message often says what they are for, and not by one of the words above.
    assert answer in ("in words", "no way out"), message


FILES = {
    "a list": ("[]", "holds a list"),
    "null": ("null", "holds a NoneType"),
    "a number": ("3", "holds a int"),
    "half": ('{"hidden', "is not JSON"),
    "no sizes": (json.dumps(BERT), "lacks intermediate_size"),
    "no architecture": ("{}", "say which by `architecture`"),
    "unknown": ('{"architectures": ["GPT2Model"]}', "not supported"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_configuration_that_is_none(name, tmp_path):
    text, words = FILES[name]
    with pytest.raises(ValueError, match=words) as info:
        written(tmp_path, text)
    assert is_ours(info.value)


# Functions without such arguments: formulas of arrays and trees, whose shapes JAX checks, and
# those whose refusals are tested beside what they do.
FORMULAS = """
probbp.ops.dendrites: contributions correlation covariance flat gain grown live num_params
    orthogonalise outputs preactivation rows score_test sensitivities
probbp.ops.feedback: alignment direct_weights uniform_sign
probbp.ops.rate: agreement constant events
probbp.ops.rtrl: advance attach gauss_newton
probbp.optim.dsbp: captured gauss_newton_product hessian_product rotation
probbp.optim.dsbp.architecture: effective_rank in_series stable_rank
probbp.optim.dsbp.drift: energy_outside log_likelihood mahalanobis p_value recolour
probbp.optim.dsbp.meta: outer_loss
probbp.optim.dsbp.modified_equation: third_derivative
probbp.optim.dsbp.pac_bayes: embed laplace
probbp.optim.dsbp.rotations: cayley jacobi_step low_rank_cayley skew
probbp.optim.dsbp.transfer: log_density penalty unwhiten
probbp.optim.feedback: frozen is_trained
probbp.estimators: reverse
probbp.models.blob: categorical kl merge root_of_std std to_arviz
probbp.models.diffusion: mixture_denoiser
probbp.models.feedback: linen_interceptor linen_weights stored
probbp.models.growth: prune
probbp.models.ivon: init mean_loss posterior
probbp.models.lora: apply merge named_leaves
probbp.models.physics: bridges oscillator
probbp.models.physics_vae: decode disentanglement leakage refinement roles to_arviz
probbp.models.rotary: rotary rotate
probbp.models.runge_kutta: step
probbp.models.state_space: kalman streamed
"""
ELSEWHERE = """
probbp.models.blob: load
probbp.models.checkpoints: load
probbp.models.diffusion: mixture_posterior
probbp.models.transformer: apply encode
"""


def listed(text):
    lines = re.findall(r"(?m)^([\w.]+): ((?:.|\n    )*)", text)
    return {f"{module}.{name}" for module, names in lines for name in names.split()}


def test_every_public_function_is_in_a_table():
    public = {name for name, _ in public_functions()}
    tested = {*DOORS, *(name.split(",")[0] for name in FITS)}
    other = listed(FORMULAS) | listed(ELSEWHERE)
    internal = {name for name in public if name.startswith(INTERNAL)}
    assert len(public) > 200
    assert public - tested - other - internal == set()
    assert other <= public
    assert not tested & other
    num_rows = sum(len(values) for _, door in ALL for values in door.kinds.values())
    assert num_rows >= 1700
    # All of these name the argument and a way out.
    assert num_rows / (num_rows + len(FITS)) >= 0.85


def main():
    """Print what all rows come to."""
    rows = [row for name, door in ALL for row in answers(name, door)]
    rows += [(name, *answer_to(*row)) for name, row in FITS.items()]
    for name, answer, message in rows:
        if answer != "in words":
            print(f"{name}: {answer}. {message}")
    for answer, count in Counter(answer for _, answer, _ in rows).most_common():
        print(f"{count:5} of {len(rows)} rows, {count / len(rows):.1%}: {answer}")


if __name__ == "__main__":
    main()
