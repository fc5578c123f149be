r"""Claims about forward-mode MALA that have a closed form (Cobb & Jha, 2025, arXiv:2505.18081).

On a Gaussian, one step of PC-Line-FMALA from a stationary start is one-dimensional MALA. With
tau = (epsilon / 2)^3 its acceptance rate is 1 - (2 / pi) arctan(tau), in any dimension and for any
covariance.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap import compiled
from targets import anisotropic, gaussian

import probbp

NUM = 100_000


def one_step(algorithm, target, num=NUM, seed=0):
    """Acceptance probabilities and accepted squared jumps of a step from exact draws."""
    key_draw, key_init, key_step = jax.random.split(jax.random.key(seed), 3)

    @jax.jit
    @jax.vmap
    def step(position, key_init, key_step):
        state = algorithm.init(position, key_init)
        new, info = algorithm.step(key_step, state)
        return info.acceptance_rate, jnp.sum((new.position - position) ** 2)

    keys = [jax.random.split(key, num) for key in (key_init, key_step)]
    return step(target.draw(key_draw, num), *keys)


def assert_mean(draws, truth):
    assert abs(jnp.mean(draws) - truth) < 3.5 * jnp.std(draws) / np.sqrt(draws.size)


TARGETS = {
    "one dimension": (gaussian, 1),
    "anisotropic": (anisotropic, 30),
    "many dimensions": (gaussian, 30),
    "anisotropic in two": (anisotropic, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_acceptance_of_pc_line_on_any_gaussian(name):
    make, dim = TARGETS[name]
    target = make(dim)

    @compiled
    def rates_of(epsilon):
        algorithm = probbp.pc_line_fmala(target.logdensity_fn, epsilon**2 / 2, floor=0.0)
        return one_step(algorithm, target)[0]

    for epsilon in (0.4, 0.8, 1.2, 1.6, 2.4):
        assert_mean(rates_of(epsilon), 1 - 2 / np.pi * np.arctan((epsilon / 2) ** 3))


SLOW = [pytest.param(x, marks=pytest.mark.slow) for x in (0.8, 2.4, 1)]


@pytest.mark.parametrize("epsilon", [1.6, *SLOW[:2]])
@pytest.mark.parametrize("algorithm", [probbp.line_fmala, partial(probbp.pc_line_fmala, floor=0.0)])
@pytest.mark.parametrize("dim", [20, SLOW[2]])
def test_jump_distance_on_the_unit_gaussian(epsilon, algorithm, dim):
    target = gaussian(dim)
    _, jumps = one_step(algorithm(target.logdensity_fn, epsilon**2 / 2), target)
    tau = (epsilon / 2) ** 3
    lost = 2 / np.pi * (np.arctan(tau) + tau / (1 + tau**2))
    assert_mean(jumps, (epsilon**2 + epsilon**4 / 4) * (1 - lost))


def test_acceptance_of_line_is_a_mean_over_lines():
    """With P the precision, the step on the line v is epsilon sqrt(v^T P v) in its own units."""
    target, epsilon = anisotropic(10), 0.8
    rates, _ = one_step(probbp.line_fmala(target.logdensity_fn, epsilon**2 / 2), target)
    v = jax.random.normal(jax.random.key(1), (NUM, 10))
    v = v / jnp.linalg.norm(v, axis=1, keepdims=True)
    scale = jnp.sqrt(jnp.einsum("ni,ij,nj->n", v, jnp.linalg.inv(target.covariance), v))
    expected = 1 - 2 / np.pi * jnp.arctan((epsilon * scale / 2) ** 3)
    error = np.hypot(jnp.std(rates), jnp.std(expected)) / np.sqrt(NUM)
    assert abs(jnp.mean(rates) - jnp.mean(expected)) < 3.5 * error


@pytest.mark.slow
def test_the_published_pc_fmala_has_a_ceiling_and_a_shared_tangent_has_none():
    """As the step vanishes, fresh tangents disagree about the scale, in the limit of large d.

    With kappa the mean squared eigenvalue of the Hessian over the squared mean, acceptance tends
    to (2 / pi) arctan sqrt(2 / (kappa - 1)).
    """
    target = anisotropic(64, condition=100.0)
    eigenvalues = 1 / np.linalg.eigvalsh(target.covariance)
    kappa = np.mean(eigenvalues**2) / np.mean(eigenvalues) ** 2
    ceiling = 2 / np.pi * np.arctan(np.sqrt(2 / (kappa - 1)))
    rates = {
        policy: jnp.mean(
            one_step(
                probbp.pc_fmala(target.logdensity_fn, 1e-6, key_policy=policy, floor=0.0),
                target,
                20_000,
            )[0]
        )
        for policy in ("refreshed", "shared")
    }
    # The formula is asymptotic in d; at d = 64 it holds within three per cent.
    assert abs(rates["refreshed"] - ceiling) < 0.03
    assert rates["shared"] > 0.98


@pytest.mark.parametrize(
    "algorithm", [probbp.fmala, probbp.line_fmala, probbp.pc_line_fmala, probbp.pc_fmala]
)
def test_small_steps_are_accepted(algorithm):
    target = anisotropic(5)
    rates, _ = one_step(algorithm(target.logdensity_fn, 1e-7), target, 5_000)
    assert jnp.mean(rates) > 0.999


@pytest.mark.slow
def test_an_unbiased_drift_hurts():
    """The drift times d is unbiased for the gradient, and accepts far less at the same step.

    The step is the best of a random walk, h = 2.38^2 / 2 d, which accepts 0.234.
    """
    target = gaussian(64)
    rates = [
        jnp.mean(
            one_step(
                probbp.fmala(
                    target.logdensity_fn, 2.38**2 / 128, drift_scale=scale, key_policy="refreshed"
                ),
                target,
                20_000,
            )[0]
        )
        for scale in (1.0, 64.0)
    ]
    assert rates[0] > 0.22
    assert rates[1] < 0.05


@pytest.mark.parametrize(
    "algorithm",
    [probbp.pc_line_fmala, probbp.mala]
    + [
        pytest.param(algorithm, marks=pytest.mark.slow)
        for algorithm in (probbp.fmala, probbp.line_fmala, probbp.pc_fmala)
    ],
)
def test_memory_does_not_grow_with_the_length_of_a_scan(algorithm):
    """Forward mode keeps no trajectory; reverse mode keeps all of it."""

    def temporary_bytes(length):
        def logdensity_fn(x):
            def step(carry, _):
                return jnp.tanh(carry + x), None

            return -jnp.sum(jax.lax.scan(step, x, length=length)[0] ** 2)

        bound = algorithm(logdensity_fn, 0.1)
        state = jax.eval_shape(bound.init, jnp.zeros(8), jax.random.key(0))
        program = jax.jit(bound.step).lower(jax.random.key(0), state).compile()
        return program.memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(100), temporary_bytes(10_000)
    assert long > 20 * short if algorithm is probbp.mala else long < 1.5 * short
