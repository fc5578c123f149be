"""What many calls hold: memory, arrays on devices, and compiled programs."""

import gc
import weakref
from functools import partial

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC

import probbp
from probbp.numpyro import Kernel

NUM_CALLS = 120


def normal(x):
    return -0.5 * jnp.sum(x**2)


def sample(i, logdensity_fn=normal):
    probbp.sample(
        jax.random.key(i),
        partial(probbp.mala, logdensity_fn),
        jnp.zeros(2),
        num_warmup=2,
        num_samples=2,
        num_chains=2,
        metric=None,
        progress_bar=False,
    )


def model():
    numpyro.sample("a", dist.Normal(0, 1))


def memory():
    """Return the resident memory of this process [MB]."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


def held():
    gc.collect()
    return len(jax.live_arrays())


@pytest.mark.slow
def test_the_same_call_again_and_again_holds_no_more():
    for i in range(20):
        sample(i)
    arrays, before = held(), memory()
    for i in range(NUM_CALLS):
        sample(i)
    assert held() <= arrays
    # A result that is kept would be a tenth of a megabyte a call, a program some megabytes.
    assert memory() - before < 6


@pytest.mark.slow
def test_other_closures_are_let_go():
    """Each call compiles; what it closed over goes with the next one."""
    gone = []

    def call(i):
        data = jnp.full(1000, float(i))
        gone.append(weakref.ref(data))
        sample(i, lambda x: normal(x) + jnp.mean(data) * jnp.sum(x))

    for i in range(5):
        call(i)
    arrays = held()
    for i in range(8):
        call(i)
    assert held() <= arrays + 2
    assert sum(ref() is not None for ref in gone) <= 2


@pytest.mark.slow
def test_one_mcmc_again_and_again_holds_no_more_arrays():
    """NumPyro compiles its loop at every `run`, with any kernel, and JAX keeps the programs."""
    mcmc = MCMC(
        Kernel(model, probbp.mala),
        num_warmup=5,
        num_samples=5,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    for i in range(3):
        mcmc.run(jax.random.key(i))
    arrays = held()
    for i in range(8):
        mcmc.run(jax.random.key(i))
    assert held() <= arrays
