"""What inference is made of goes through `pickle`: to other processes, and to a file."""

import pickle
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from cheap import key_of, normal
from numpyro.infer import MCMC
from tables import ALGORITHMS, ESTIMATORS, build, members

import probbp
from probbp.estimators import averaged, control_variate, forward, reverse
from probbp.numpyro import Kernel
from probbp.samplers.curvature import gauss_newton

START = normal(0, 4)


def there_and_back(value):
    return pickle.loads(pickle.dumps(value))


def logdensity_fn(x):
    return -0.5 * jnp.sum(x**2)


def opposite(x):
    return -x


@members(
    [n for n in ESTIMATORS if n != "scaled"]
)  # its transformation is Optax's, which can't be pickled
def test_an_estimator_comes_back(name):
    estimator = ESTIMATORS[name].estimator
    if name == "controlled":  # by a lambda of the table
        estimator = control_variate(forward(4), opposite)
    kept = there_and_back(estimator)
    for expected, found in zip(
        estimator(logdensity_fn)(key_of(0), START),
        kept(logdensity_fn)(key_of(0), START),
        strict=True,
    ):
        np.testing.assert_array_equal(expected, found)


@members(ALGORITHMS)
def test_a_state_comes_back(name):
    state = jax.eval_shape(build(name, logdensity_fn).init, START, key_of(0))
    state = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), state)
    kept = there_and_back(state)
    assert type(kept) is type(state)
    jax.tree.map(np.testing.assert_array_equal, state, kept)


def program(algorithm, name):
    """Return the text of a step, without the addresses of what it calls."""
    args = () if algorithm is probbp.surrogate else (None,)
    sampler = algorithm(logdensity_fn, ALGORITHMS[name].step_size, *args)
    state = jax.eval_shape(sampler.init, START, key_of(0))
    return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(sampler.step)(key_of(1), state)))


# The table has these by a lambda, or of Optax's transformations, which can't be pickled.
IN_OTHER_WORDS = {
    "mala, controlled": partial(
        probbp.mala, estimator=control_variate(averaged(reverse(), 2), opposite)
    ),
    "mala, clipped": partial(probbp.mala, estimator=forward(2, tangents="orthogonal")),
    "surrogate": probbp.surrogate,
}


@members(ALGORITHMS)
def test_an_algorithm_comes_back(name):
    algorithm = IN_OTHER_WORDS.get(name, ALGORITHMS[name].algorithm)
    kept = there_and_back(algorithm)
    assert program(kept, name) == program(algorithm, name)


def test_a_curvature_comes_back():
    curvature = gauss_newton(opposite, logdensity_fn, logdensity_fn)
    values = [
        fun(logdensity_fn)(START, START[None])[2] for fun in (curvature, there_and_back(curvature))
    ]
    np.testing.assert_array_equal(*values)


def model(y):
    mean = numpyro.sample("mean", dist.Normal(0, 2))
    numpyro.sample("y", dist.Normal(mean, 1), obs=y)


def test_a_finished_run_comes_back_and_goes_on():
    kernel = Kernel(model, partial(probbp.mala, estimator=averaged(forward(), 2)))
    mcmc = MCMC(kernel, num_warmup=5, num_samples=5, progress_bar=False)
    mcmc.run(key_of(0), START)
    kept = there_and_back(mcmc)
    np.testing.assert_array_equal(kept.get_samples()["mean"], mcmc.get_samples()["mean"])
    for each in (mcmc, kept):
        each.post_warmup_state = each.last_state
        each.run(each.last_state.rng_key, START)
    np.testing.assert_array_equal(kept.get_samples()["mean"], mcmc.get_samples()["mean"])
