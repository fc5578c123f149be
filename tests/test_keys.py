"""Keys: of the older kind they serve as well, what is none is told, at every public door."""

import doctest
import inspect
import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from numpyro.infer import MCMC, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from tables import SAMPLERS, build, members
from test_bad_input import public_functions, rows

import probbp
from probbp import diagnostics
from probbp.estimators import forward
from probbp.models import diffusion, physics, transformer
from probbp.numpyro import Kernel, Optim
from probbp.ops import dendrites, feedback, rate, sdo, sus
from probbp.optim import dsbp

NO_KEYS = [3, None, "key", np.ones(2), jnp.zeros(3, jnp.uint32)]
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def square(x):
    return -jnp.sum(x**2) / 2


def model():
    numpyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1))


def sampled(rng_key, **options):
    options = {"num_warmup": 4, "num_samples": 3, "num_chains": 2, "progress_bar": False} | options
    algorithm = partial(probbp.mala, square)
    return probbp.sample(rng_key, algorithm, jnp.zeros(2), **options).posterior["x"].values


def in_mcmc(rng_key):
    mcmc = MCMC(
        Kernel(model, probbp.mala),
        num_warmup=4,
        num_samples=3,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(rng_key)
    return mcmc.get_samples()["x"]


def in_svi(rng_key):
    optim = Optim(optax.adam(0.1), forward(), rng_key=rng_key)
    svi = SVI(model, AutoNormal(model), optim, Trace_ELBO())
    return svi.run(rng_key, 3, progress_bar=False).losses


def ranks(rng_key):
    result = diagnostics.simulation_based_calibration(
        rng_key,
        lambda key: ({"a": jax.random.normal(key)}, 0.0),
        lambda key, _: {"a": jax.random.normal(key, (9,))},
        num_simulations=4,
        progress_bar=False,
    )
    return result.ranks["a"]


def quality(rng_key):
    found = diagnostics.gradient_quality(rng_key, forward(), square, jnp.ones(2), num_keys=4)
    return found.overall.bias


def evidence(rng_key):
    draws = np.random.default_rng(0).normal(size=(2, 100, 1))
    return probbp.log_evidence(rng_key, square, draws, num_evaluations=50).log_evidence


def attended(rng_key):
    x = jnp.linspace(-1.0, 1.0, 5 * 2 * 4).reshape(5, 2, 4)
    loss = lambda x: jnp.sum(sus.dot_product_attention(x, x, x, keep=2, rng_key=rng_key) ** 2)
    return jax.grad(loss)(x)


def diffused(rng_key):
    def loss(scale):
        denoiser = lambda x, t: scale * x
        options = {"keep_step": "random", "rng_key": rng_key}
        return jnp.sum(sdo.sample(denoiser, jnp.ones((1, 2)), sdo.linear(4), **options))

    return jax.grad(loss)(0.5)


def trained(rng_key):
    network = diffusion.Denoiser((2,), width=4, num_blocks=1, rngs=nnx.Rngs(0))
    options = {"num_steps": 2, "batch_size": 2, "progress_bar": False}
    return diffusion.train(rng_key, network, jnp.ones((3, 2)), sdo.linear(4), **options).losses


# name -> what a key gives
DOORS = {
    "sample": sampled,
    "warmup": lambda key: probbp.warmup(key, partial(probbp.fmala, square), jnp.ones(2), 4)[0],
    "Kernel": in_mcmc,
    "Optim": in_svi,
    "simulation_based_calibration": ranks,
    "gradient_quality": quality,
    "log_evidence": evidence,
    "sus.dot_product_attention": attended,
    "sdo.sample": diffused,
    "rate.bernoulli": lambda key: rate.bernoulli(key, jnp.full(8, 0.5))(jnp.int32(0)),
    "feedback.normal": lambda key: feedback.normal(key, {"a": np.ones((2, 3)), "b": np.ones(2)}),
    "dendrites.search": lambda key: dendrites.search(
        key, rows(), rows(), optax.sgd(0.1), num_candidates=2, num_steps=1
    ),
    "dsbp.start": lambda key: dsbp.start(key, 4, 2),
    "diffusion.train": trained,
    "physics.simulate": lambda key: physics.simulate(key, physics.beam(), num_records=2),
    "transformer.init": lambda key: transformer.init(
        key, num_classes=2, max_length=3, vocabulary=5
    ),
}
QUICK = ["rate.bernoulli", "feedback.normal"]


@members(DOORS, quick=QUICK)
def test_a_key_of_the_older_kind_gives_the_same(name):
    found, expected = (DOORS[name](make(0)) for make in (jax.random.PRNGKey, jax.random.key))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@members(SAMPLERS, quick=["mala"])
def test_a_sampler_steps_alike_with_a_key_of_the_older_kind(name):
    algorithm = build(name, square)

    def run(key):
        return algorithm.step(key, algorithm.init(jnp.ones(2), key))

    found, expected = (jax.jit(run)(make(0)) for make in (jax.random.PRNGKey, jax.random.key))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("no_key", NO_KEYS, ids=repr)
@pytest.mark.parametrize("name", ["sample", "warmup", "Kernel", "rate.bernoulli"])
def test_what_is_no_key_is_told(name, no_key):
    if name == "Kernel":  # NumPyro splits the key of several chains first
        kernel = Kernel(model, probbp.mala)
        call = lambda key: kernel.init(key, 4, None, (), {})
    else:
        call = DOORS[name]
    with pytest.raises(TypeError, match=r"^rng_key must be a key: pass jax.random.key\(0\), not"):
        call(no_key)


def test_several_keys_are_not_one():
    with pytest.raises(TypeError, match=r"^rng_key must be one key, got \(4,\) of them. .*vmap"):
        sampled(jax.random.split(jax.random.key(0), 4))


def doors():
    """Return the public functions that take a key, but for parts of samplers that are traced."""
    for name, fun in public_functions():
        is_traced = name.startswith(("probbp.samplers.", "probbp.types."))
        if "rng_key" in inspect.signature(fun).parameters and not is_traced:
            yield name, fun


KNOWN = {name.rpartition(".")[2] for name in DOORS}
NEW = "random.key("
OTHERS = {name: fun for name, fun in doors() if name.rpartition(".")[2] not in KNOWN}


def example_of(name):
    """Return the example of a door, or another of its room that goes through it."""
    fun, short = OTHERS[name], name.rpartition(".")[2]
    room = fun.__module__.rpartition(".")[0]
    modules = [fun.__module__, *(m for m in list(sys.modules) if m.startswith(f"{room}."))]
    for module in map(sys.modules.get, modules):
        for test in doctest.DocTestFinder().find(module):
            source = "".join(example.source for example in test.examples)
            if re.search(rf"\b{short}\(", source) and NEW in source:
                return test
    raise AssertionError(f"{name} is in no example")


@members(OTHERS, quick=["probbp.models.feedback.linen_weights"])
def test_an_example_of_a_door_runs_with_keys_of_the_older_kind(name):
    """And prints the same numbers."""
    test = example_of(name)
    for example in test.examples:
        example.source = example.source.replace(NEW, "random.PRNGKey(")
    assert doctest.DocTestRunner().run(test).failed == 0


def test_every_door_looks_at_its_key_first():
    """What else it is given is no argument at all."""
    looked_at = dict(doors())
    assert len(looked_at) > 25
    for name, fun in looked_at.items():
        if name in ("probbp.sample", "probbp.warmup"):  # a wrong order is told first
            continue
        needed = {
            name: None
            for name, parameter in inspect.signature(fun).parameters.items()
            if parameter.default is parameter.empty and parameter.kind not in VARIADIC
        }
        with pytest.raises(TypeError, match="^rng_key must be a key"):
            fun(**needed | {"rng_key": 3})


def test_a_checkpoint_belongs_to_a_kind_of_key(tmp_path):
    """One of the older kind is saved and resumed; another kind of the same bits is told."""
    old, new = jax.random.PRNGKey(0), jax.random.key(0)
    expected = sampled(new)
    for _ in range(2):
        found = sampled(old, checkpoint=tmp_path / "run")
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="another run. What differs: key and start"):
        sampled(new, checkpoint=tmp_path / "run")
