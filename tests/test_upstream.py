"""Each part beside what it stands in for: names, their order, defaults, and layouts of states."""

import inspect
from inspect import Parameter

import blackjax
import jax
import jax.numpy as jnp
import numpyro
import optax
import pytest
from numpyro.infer.mcmc import MCMCKernel
from numpyro.optim import optax_to_numpyro
from tables import SAMPLERS, members

import probbp
from probbp.estimators import forward, reverse
from probbp.numpyro import Kernel, Optim
from probbp.ops import feedback, rtrl, sus

# Ours, the host's, what of the host's is left out (an error names it), what is only ours.
FUNCTIONS = {
    "attention": (
        sus.dot_product_attention,
        jax.nn.dot_product_attention,
        {"implementation", "return_residual"},
        {"keep", "rng_key", "sampling"},
    ),
    "scan": (rtrl.scan, jax.lax.scan, {"_split_transpose"}, {"batch_size", "by_leaf"}),
    "mala": (
        probbp.mala,
        blackjax.mcmc.mala.as_top_level_api,
        set(),
        {"inverse_mass_matrix", "estimator", "key_policy"},
    ),
    "mala's start": (
        probbp.samplers.mala.init,
        blackjax.mcmc.mala.init,
        set(),
        {"rng_key", "inverse_mass_matrix", "estimator"},
    ),
    "value_and_grad": (
        reverse(),
        jax.value_and_grad,
        {"argnums", "holomorphic", "allow_int", "reduce_axes"},
        set(),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures(name):
    """Who calls the host's function by position or by name calls ours alike."""
    ours, theirs, left_out, added = FUNCTIONS[name]
    ours, theirs = (inspect.signature(f).parameters for f in (ours, theirs))
    assert left_out <= set(theirs) - set(ours)
    assert added == set(ours) - set(theirs)
    shared = [name for name in theirs if name not in left_out]
    assert [name for name in ours if name not in added] == shared
    for key in shared:
        default = theirs[key].default
        assert ours[key].default == default, key
        assert ours[key].kind == theirs[key].kind, key
    # What is ours comes after, so that positions are the host's.
    positional = [key for key in ours if ours[key].kind == Parameter.POSITIONAL_OR_KEYWORD]
    num_shared = sum(key in shared for key in positional)
    assert all(key in shared for key in positional[:num_shared])


@pytest.mark.parametrize("name", ["einsum", "dot_general", "conv_general_dilated"])
def test_feedback_takes_the_options_of_jax(name):
    """Through `**options`; the weights of the backward pass are the only name of ours."""
    ours = inspect.signature(getattr(feedback, name)).parameters
    assert ours["feedback"].kind == Parameter.KEYWORD_ONLY
    assert ours["options"].kind == Parameter.VAR_KEYWORD
    if name != "einsum":  # its operands have no names
        theirs = inspect.signature(getattr(jax.lax, name)).parameters
        named = [key for key in ours if key not in ("feedback", "options")]
        assert named == list(theirs)[: len(named)]


@members(SAMPLERS)
def test_a_sampler_is_one_of_blackjax(name):
    logdensity_fn = lambda x: -jnp.sum(x**2) / 2
    sampler = getattr(probbp, name)
    algorithm = sampler(logdensity_fn, 0.1)
    assert isinstance(algorithm, blackjax.base.SamplingAlgorithm)
    state = algorithm.init(jnp.ones(2), jax.random.key(0))
    new, info = algorithm.step(jax.random.key(1), state)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    # What BlackJAX's adaptation reads.
    assert {"position", "logdensity", "logdensity_grad"} <= set(state._fields)
    assert {"acceptance_rate", "is_accepted"} <= set(info._fields)
    assert hasattr(sampler, "init")
    assert hasattr(sampler, "build_kernel")


def test_mala_s_state_is_blackjax_s():
    algorithm = probbp.mala(lambda x: -jnp.sum(x**2) / 2, 0.1)
    assert isinstance(algorithm.init(jnp.ones(2)), blackjax.mcmc.mala.MALAState)
    fields = blackjax.mcmc.mala.MALAInfo._fields
    info = algorithm.step(jax.random.key(1), algorithm.init(jnp.ones(2)))[1]
    assert info._fields[: len(fields)] == fields


def public(cls):
    return {name for name in dir(cls) if not name.startswith("_")}


def test_the_kernel_is_one_of_numpyro():
    assert issubclass(Kernel, MCMCKernel)
    assert public(Kernel) - public(MCMCKernel) == {"model"}  # as in HMC: ArviZ reads it
    for name in ("init", "sample", "postprocess_fn", "get_diagnostics_str"):
        ours, theirs = (getattr(cls, name) for cls in (Kernel, MCMCKernel))
        if callable(ours):
            assert list(inspect.signature(ours).parameters) == list(
                inspect.signature(theirs).parameters
            ), name


def test_the_optimiser_is_one_of_numpyro():
    ours, theirs = Optim(optax.adam(0.1), forward()), optax_to_numpyro(optax.adam(0.1))
    assert isinstance(ours, numpyro.optim._NumPyroOptim)
    assert public(type(ours)) == public(type(theirs))
    params = {"x": jnp.ones(2)}
    assert jax.tree.all(jax.tree.map(jnp.array_equal, ours.get_params(ours.init(params)), params))
