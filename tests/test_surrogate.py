"""The learned surrogate transition: exact whatever was learned, and what it learns."""

from functools import partial
from typing import NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from invariance import FAIL, PASS, largest_z_of
from jax.flatten_util import ravel_pytree
from targets import TARGETS, anisotropic

import probbp
from probbp.samplers.surrogate import inner, kernel, polynomial, regression, transport, warmup
from probbp.samplers.surrogate.kernel import WALK, whiten
from probbp.samplers.surrogate.transport import Transport

NUM_CHAINS, NUM_STEPS = 20_000, 8
KEY = jax.random.key(0)


def absurd_transport(dim, seed=0):
    """Return a map that has nothing to do with any target, every part of it in use."""
    rng = np.random.default_rng(seed)
    num = max(1, dim // 3)
    drivers = np.arange(dim)[::-1][:num]
    is_driver = np.isin(np.arange(dim), drivers)
    factor = np.tril(0.3 * rng.normal(size=(dim, dim))) * (is_driver[:, None] == is_driver)
    np.fill_diagonal(factor, rng.uniform(0.6, 1.3, dim))
    num_features = (num + 1) * (num + 2) // 2
    marginals = np.stack(
        [
            0.2 * rng.normal(size=dim),
            rng.uniform(0.8, 1.2, dim),
            0.3 * rng.normal(size=dim),
            rng.uniform(0.8, 1.2, dim),
        ]
    )
    mean = np.where(is_driver, 0, 0.3 * rng.normal(size=(num_features, dim)))
    log_scale = np.where(is_driver, 0, 0.4 * rng.normal(size=(num, dim)))
    return jax.tree.map(
        jnp.asarray,
        Transport(
            0.2 * rng.normal(size=dim),
            rng.uniform(0.7, 1.5, dim),
            0.1 * rng.normal(size=dim),
            factor,
            np.linalg.inv(factor),
            marginals,
            drivers,
            np.ones(num, bool),
            mean,
            log_scale,
        ),
    )


def absurd_surrogate(dim, seed=0, degree=4, size=1.0):
    """Return a polynomial that has nothing to do with any target."""
    rng = np.random.default_rng(seed)
    parts = [
        size * rng.normal(size=(polynomial.num_monomials(dim, k) - (k > 0) * previous)) / 4**k
        for k in range(degree + 1)
        for previous in [polynomial.num_monomials(dim, k - 1) if k else 0]
    ]
    return polynomial.from_coefficients(jnp.asarray(np.concatenate(parts)), dim, degree)


class Setting(NamedTuple):
    """Parameters under which a bug shows: a coarse inner step, a heavy walk."""

    step_size: float = 0.45
    weights: tuple = (0.4, 0.2, 0.2, 0.2)
    size: float = 1.0


COARSE = Setting(step_size=1.5, weights=(0.7, 0.1, 0.1, 0.1), size=2.0)
HEAVY_WALK = Setting(weights=(0.2, 0.05, 0.05, 0.7), size=2.0)


def absurd(target, setting=Setting(), seed=0):
    return probbp.surrogate(
        target.logdensity_fn,
        setting.step_size,
        absurd_transport(target.dim, seed),
        absurd_surrogate(target.dim, seed, size=setting.size),
        setting.weights,
    )


# ---------------------------------------------------------------------------------------
# Exactness.


@pytest.mark.parametrize("setting", [Setting(), COARSE, HEAVY_WALK], ids=["", "coarse", "walk"])
@pytest.mark.parametrize(
    ("seed", "dtype", "name"),
    [(0, "float64", "g2"), (1, "float32", "f2"), (2, "float64", "mix"), (3, "float64", "f10")],
)
def test_the_target_is_invariant_under_absurd_maps_and_surrogates(seed, dtype, name, setting):
    target = TARGETS[name]
    algorithm = absurd(target, setting, seed)
    assert (
        largest_z_of(jax.random.key(seed), algorithm, target, NUM_CHAINS, NUM_STEPS, dtype) < PASS
    )


def test_the_target_is_invariant_under_no_map_and_no_surrogate():
    target = TARGETS["mix"]
    algorithm = probbp.surrogate(target.logdensity_fn)
    assert largest_z_of(KEY, algorithm, target, NUM_CHAINS, NUM_STEPS) < PASS


def patched(module, name, replacement):
    """Return a builder of the algorithm with a function of a module replaced."""

    def build(monkeypatch, target, setting):
        monkeypatch.setattr(module, name, replacement)
        return absurd(target, setting)

    return build


def with_state_dependent(parameter):
    """Return a builder of an algorithm whose parameters depend on its state."""

    def build(monkeypatch, target, setting):
        right = absurd(target, setting)

        def step(rng_key, state):
            parameters = {
                "step_size": setting.step_size,
                "transport": absurd_transport(target.dim),
                "surrogate": absurd_surrogate(target.dim, size=setting.size),
                "weights": jnp.asarray(setting.weights),
            }
            name, change = parameter
            parameters[name] = change(parameters[name], state)
            if name == "transport":
                state = whiten(parameters[name], state.position, state.logdensity)
            return kernel.build_kernel()(rng_key, state, target.logdensity_fn, **parameters)

        return blackjax.SamplingAlgorithm(right.init, step)

    return build


def without_the_surrogate(kind, state, proposal, here, there):
    return kernel.log_density(proposal) - kernel.log_density(state)


def with_the_wrong_sign(kind, state, proposal, here, there):
    change = kernel.surrogate_logdensity(there) - kernel.surrogate_logdensity(here)
    ratio = kernel.log_density(proposal) - kernel.log_density(state)
    return ratio + jnp.where(kind == WALK, 0, change)


def with_the_surrogate_on_walks(kind, state, proposal, here, there):
    change = kernel.surrogate_logdensity(there) - kernel.surrogate_logdensity(here)
    return kernel.log_density(proposal) - kernel.log_density(state) - change


def always_accept(rng_key, log_ratio, point, end):
    return end, jnp.ones_like(log_ratio)


def a_kick_too_few(predict, point, momentum, step_size):
    momentum = momentum + step_size / 2 * point.grad
    cos, sin = jnp.cos(step_size), jnp.sin(step_size)
    rotated = cos * point.whitened + sin * momentum
    return inner.point_at(predict, rotated), cos * momentum - sin * point.whitened


def long_then_short(rng_key, predict, point, step_size, num_transitions, num_steps):
    rates = []
    for i, key in enumerate(jax.random.split(rng_key, num_transitions)):
        size = step_size * (1.0 if i == 0 else 0.25)
        point, rate = inner.inner_transition(key, predict, point, size, num_steps)
        rates.append(rate)
    return point, jnp.mean(jnp.stack(rates))


def stale(part):
    """Return a builder of an algorithm that took a part of its state from an older map."""

    def build(monkeypatch, target, setting):
        right = absurd(target, setting)
        old = absurd_transport(target.dim, seed=1)

        def init(position, rng_key=None):
            state = right.init(position)
            older = whiten(old, position, state.logdensity)
            return state._replace(**{name: getattr(older, name) for name in part})

        return blackjax.SamplingAlgorithm(init, right.step)

    return build


WRONG = {
    "no surrogate ratio": (patched(kernel, "log_ratio", without_the_surrogate), "mix", Setting()),
    "sign of the ratio": (patched(kernel, "log_ratio", with_the_wrong_sign), "mix", Setting()),
    "no log determinant": (
        patched(kernel, "log_density", lambda state: state.logdensity),
        "mix",
        Setting(),
    ),
    "step size from the state": (
        with_state_dependent(("step_size", lambda h, s: h * (0.2 + jnp.tanh(s.whitened[0]) ** 2))),
        "mix",
        Setting(),
    ),
    "kind from the state": (
        with_state_dependent(
            (
                "weights",
                lambda w, s: jnp.where(s.whitened[0] > 0, w, jnp.roll(w, 1)),
            )
        ),
        "mix",
        Setting(),
    ),
    "map from the state": (
        with_state_dependent(
            ("transport", lambda t, s: t._replace(loc=t.loc + jnp.tanh(s.position)))
        ),
        "mix",
        Setting(),
    ),
    "inner transitions not tested": (patched(inner, "accept_inner", always_accept), "mix", COARSE),
    "a kick too few": (patched(inner, "leapfrog", a_kick_too_few), "mix", COARSE),
    "surrogate ratio on walks": (
        patched(kernel, "log_ratio", with_the_surrogate_on_walks),
        "mix",
        HEAVY_WALK,
    ),
    "inner steps of two sizes in a fixed order": (
        patched(kernel, "inner_transitions", long_then_short),
        "mix",
        COARSE,
    ),
    "stale log determinant": (stale(["log_det"]), "mix", Setting()),
    "stale whitened point": (stale(["whitened", "log_det"]), "mix", Setting()),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_invariance_test_rejects_every_planted_bug(name, monkeypatch):
    build, target_name, setting = WRONG[name]
    target = TARGETS[target_name]
    algorithm = build(monkeypatch, target, setting)
    assert largest_z_of(KEY, algorithm, target, NUM_CHAINS, NUM_STEPS) > FAIL
