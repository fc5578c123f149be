"""What is given as an algorithm and is none: the error says what to write."""

from functools import partial

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blackjax.adaptation.metric_recipes import lookup_recipe
from numpyro.infer import NUTS

import probbp
from probbp.numpyro import Kernel
from probbp.samplers.adaptation import adaptation
from probbp.samplers.algorithm import check_algorithm


def logdensity_fn(x):
    return -0.5 * jnp.sum(x**2)


OF_MALA = r"pass functools.partial\(probbp.mala, logdensity_fn\)"
# What is given to `probbp.sample`, and what the error says.
REFUSED = {
    "a name": ("mala", f"got an object of type str: {OF_MALA}"),
    "a class of NumPyro": (NUTS, "got NUTS: .* runs in numpyro.infer.MCMC"),
    "a kernel of NumPyro": (NUTS(lambda: None), "type NUTS: .* runs in numpyro.infer.MCMC"),
    "one that is built": (probbp.mala(logdensity_fn, 0.1), f"built already.*{OF_MALA}"),
    "the log density": (
        logdensity_fn,
        "logdensity_fn does not: pass the sampler, not the log density",
    ),
    "the position": (jnp.zeros(3), "The order is rng_key, algorithm, position"),
    "probbp.sample": (
        probbp.sample,
        "must take step_size=..., and sample does not: pass the sampler",
    ),
    "a module": (blackjax, f"got an object of type module: {OF_MALA}"),
    "one without log density": (probbp.mala, f"argument: 'logdensity_fn'; {OF_MALA}"),
    "BlackJAX's without log density": (
        blackjax.nuts,
        r"'logdensity_fn'; pass functools.partial\(blackjax.nuts, logdensity_fn\)",
    ),
    "one with its step size": (
        partial(probbp.mala, logdensity_fn, 0.1),
        f"'step_size'; {OF_MALA}, as warm-up finds the step size",
    ),
    "one that lacks an option": (
        partial(blackjax.hmc, logdensity_fn),
        "'num_integration_steps'; .* with all its arguments",
    ),
    "one without step size": (
        partial(blackjax.additive_step_random_walk, logdensity_fn),
        "additive_step_random_walk does not: pass a function of step_size",
    ),
    "one without mass matrix": (
        lambda step_size: blackjax.mala(logdensity_fn, step_size),
        "metric=None learns no inverse mass matrix",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_algorithm_is_told_what_to_write(name):
    algorithm, words = REFUSED[name]
    with pytest.raises(TypeError, match=words):
        probbp.sample(jax.random.key(0), algorithm, jnp.zeros(2), progress_bar=False)
    with pytest.raises(TypeError, match=words):
        probbp.warmup(jax.random.key(0), algorithm, jnp.zeros(2))


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        ("mala", "type str: pass probbp.mala"),
        (NUTS, "runs in numpyro.infer.MCMC"),
        (probbp.mala(logdensity_fn, 0.1), "built already.*: pass probbp.mala"),
        (logdensity_fn, "must take step_size=..., and logdensity_fn does not"),
        (partial(probbp.mala, logdensity_fn), "pass probbp.mala, as the model gives"),
        (partial(blackjax.nuts, logdensity_fn), "pass blackjax.nuts, as the model gives"),
    ],
)
def test_kernel_tells_it_too(algorithm, words):
    with pytest.raises(TypeError, match=words):
        Kernel(lambda: None, algorithm)


def test_the_rate_that_is_not_known_has_the_name_that_each_door_takes():
    with pytest.raises(ValueError, match="blackjax.nuts.*target_accept_prob to Kernel"):
        Kernel(lambda: None, blackjax.nuts)


@pytest.mark.parametrize(
    "algorithm",
    [
        partial(probbp.mala, logdensity_fn),
        partial(probbp.surrogate, logdensity_fn),
        partial(partial(probbp.line_fmala, num_tangents=2), logdensity_fn=logdensity_fn),
        partial(blackjax.nuts, logdensity_fn),
        lambda **learned: probbp.mala(logdensity_fn, **learned),
        lambda step_size=1.0, inverse_mass_matrix=None: None,
    ],
)
def test_algorithms_pass(algorithm):
    check_algorithm(algorithm, "diag", on_density=True)


@pytest.mark.parametrize("algorithm", [probbp.mala, probbp.surrogate, blackjax.nuts])
def test_algorithms_pass_for_kernel(algorithm):
    check_algorithm(algorithm, "diag", on_density=False)


# ---------------------------------------------------------------------------------------
# What warm-up finds, given all the same.

FOUND = {
    "a step size": (probbp.mala, {"step_size": 0.1}, "step_size of probbp.mala"),
    "a scale": (probbp.fmala, {"inverse_mass_matrix": np.ones(3)}, "inverse_mass_matrix of"),
    "both": (
        probbp.pc_line_fmala,
        {"step_size": 0.1, "inverse_mass_matrix": np.ones(3)},
        "inverse_mass_matrix and step_size of probbp.pc_line_fmala",
    ),
    "BlackJAX's": (blackjax.hmc, {"step_size": 0.1, "num_integration_steps": 3}, "blackjax.hmc"),
    "the surrogate's": (
        probbp.surrogate,
        {"step_size": 0.1, "weights": np.ones(4) / 4},
        "step_size and weights of probbp.surrogate",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_warm_up_would_write_over_is_refused(name):
    algorithm, options, words = FOUND[name]
    for on_density in (True, False):
        args = (logdensity_fn,) if on_density else ()
        with pytest.raises(TypeError, match=f"{words}.* leave (it|them) out"):
            check_algorithm(partial(algorithm, *args, **options), "diag", on_density=on_density)


def test_a_fixed_scale_is_kept_where_none_is_learned():
    algorithm = partial(probbp.mala, inverse_mass_matrix=np.ones(3))
    check_algorithm(algorithm, None, on_density=False)


# ---------------------------------------------------------------------------------------
# What else a run is given.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_warmup": -5}, "num_warmup must be an integer of at least 0, got -5"),
        ({"num_warmup": 2.5}, "num_warmup must be an integer of at least 0, got 2.5"),
        ({"num_samples": "10"}, "num_samples must be a positive integer, got '10'"),
        ({"num_samples": jnp.nan}, "num_samples must be a positive integer, got nan"),
        ({"num_chains": True}, "num_chains must be a positive integer, got True"),
        ({"every": 2.5}, "every must be a positive integer, got 2.5"),
        (
            {"initial_step_size": "0.1"},
            "initial_step_size must be a number, .* got '0.1'",
        ),
        (
            {"initial_step_size": None},
            "initial_step_size must be a number, .* got None",
        ),
        (
            {"target_acceptance_rate": "0.5"},
            r"acceptance_rate must be a number, in \(0, 1\)",
        ),
        (
            {"target_acceptance_rate": jnp.nan},
            r"acceptance_rate must be in \(0, 1\), got nan",
        ),
        ({"dispersion": jnp.nan}, "dispersion must be finite and not negative, got nan"),
        ({"dispersion": -1.0}, "dispersion must be finite and not negative, got -1"),
        ({"dispersion": "1"}, "dispersion must be a number, finite and not negative, got '1'"),
        ({"metric": True}, "metric must be 'diag'.* or None, got True"),
        ({"metric": jnp.ones(3)}, "metric must be 'diag'.*given to the algorithm itself"),
        ({"checkpoint": ""}, "checkpoint must be the path of a folder.*got ''"),
        ({"checkpoint": True}, "checkpoint must be the path of a folder.*got True"),
        ({"stream": ""}, "stream must be the path of a folder.*got ''"),
    ],
)
def test_nonsense_is_refused_with_the_argument_s_name(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        probbp.sample(
            jax.random.key(0),
            partial(probbp.mala, logdensity_fn),
            jnp.zeros(3),
            **{"progress_bar": False} | options,
        )


@pytest.mark.parametrize("step_size", ["0.1", None, True, jnp.inf])
@pytest.mark.parametrize("algorithm", [probbp.mala, probbp.fmala, probbp.line_fmala])
def test_a_step_size_that_is_none(step_size, algorithm):
    with pytest.raises(ValueError, match="step_size must be positive and finite, got"):
        algorithm(logdensity_fn, step_size)


def test_an_array_is_no_metric_for_an_algorithm_that_learns_all_by_itself():
    algorithm = partial(probbp.surrogate, logdensity_fn)
    with pytest.raises(ValueError, match="leave out metric"):
        probbp.sample(jax.random.key(0), algorithm, jnp.zeros(3), metric=jnp.ones(3))


def test_counts_of_numpy_and_jax_are_counts():
    adapt = adaptation(2, jnp.array(7), jnp.array(0.5), metric=lookup_recipe("welford_diag"))
    assert adapt.schedule.shape == (7, 2)
    data = probbp.sample(
        jax.random.key(0),
        partial(probbp.mala, logdensity_fn),
        jnp.zeros(3),
        num_warmup=np.int64(0),
        num_samples=np.uint8(3),
        num_chains=jnp.array(2),
        metric=None,
        dispersion=np.float32(0.5),
        progress_bar=False,
    )
    assert data.posterior["x"].shape == (2, 3, 3)


def test_warm_up_has_no_negative_length():
    with pytest.raises(ValueError, match="num_steps must be an integer of at least 0, got -1"):
        probbp.warmup(jax.random.key(0), partial(probbp.mala, logdensity_fn), jnp.zeros(2), -1)


def test_a_loop_s_folder_has_a_name():
    with pytest.raises(ValueError, match="checkpoint must be the path of a folder"):
        probbp.checkpointed_scan(lambda c, _: (c, c), jnp.zeros(()), 3, checkpoint="")
