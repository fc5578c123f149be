"""One kernel in NumPyro's MCMC by each chain method, run, resumed and transformed.

`python tests/chain_methods.py parallel resume ...` does so for the ways that are named; parallel
chains need two devices, which a process has from its start.
"""

import os
import sys

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    )

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from cheap import key_of
from numpyro.infer import MCMC

import probbp
from probbp.numpyro import Kernel

Y = np.array([1.2, -0.3, 0.8])


def model(y):
    mean = numpyro.sample("mean", dist.Normal(0, 2))
    numpyro.sample("y", dist.Normal(mean, 1), obs=y)


def mcmc_of(method, **options):
    return MCMC(
        Kernel(model, probbp.mala),
        num_warmup=6,
        num_samples=4,
        num_chains=2,
        chain_method=method,
        progress_bar=False,
        **options,
    )


def draws_of(mcmc):
    return mcmc.get_samples(group_by_chain=True)["mean"]


def run(method, y=Y, **options):
    """All that other ways are held against: warm-up and draws at once."""
    mcmc = mcmc_of(method, **options)
    mcmc.run(key_of(0), y)
    return mcmc


def warmup_then_run(method):
    mcmc = mcmc_of(method)
    mcmc.warmup(key_of(0), Y)
    warm = mcmc.post_warmup_state
    mcmc.run(warm.rng_key, Y)
    return draws_of(mcmc)


def run_twice(method):
    mcmc = run(method)
    mcmc.run(key_of(0), Y)
    return draws_of(mcmc)


def resume(method):
    mcmc = run(method)
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(mcmc.last_state.rng_key, Y)
    assert int(np.max(mcmc.last_state.i)) == 14
    assert np.all(draws_of(mcmc) != draws_of(run(method)))
    return draws_of(run(method))


def jit_model_args(method):
    mcmc = run(method, jit_model_args=True)
    mcmc.run(key_of(0), Y)
    return draws_of(mcmc)


def inside_jit(method):
    return jax.jit(lambda y: draws_of(run(method, y)))(Y)


def vmap_of_the_whole(method):
    return jax.vmap(lambda y: draws_of(run(method, y)))(np.stack([Y, Y]))[1]


WAYS = {
    way.__name__: way
    for way in (
        warmup_then_run,
        run_twice,
        resume,
        jit_model_args,
        inside_jit,
        vmap_of_the_whole,
    )
}


def check(method, way):
    """Require the draws of one plain run; finite, and apart from chain to chain."""
    expected = draws_of(run(method))
    assert expected.shape == (2, 4)
    assert np.all(np.isfinite(expected))
    assert np.all(expected[0] != expected[1])
    np.testing.assert_allclose(WAYS[way](method), expected, rtol=1e-9, err_msg=way)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    assert jax.local_device_count() == 2
    method, *ways = sys.argv[1:]
    for way in ways:
        check(method, way)
    print("as one run:", *ways)
