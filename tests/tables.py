"""The members of each room, by name: a new one joins by its line all the laws over its table.

A name with a comma is a setting of the member before the comma. What stands in `SAMPLERS`,
`VARIANTS` and `SETTINGS` is tested for invariance, for faults and for dtypes, and what stands in
`ESTIMATORS` for value, shape and bias, without another line. Operations are in two tables: `OPS`
beside the function that each stands in for, and `IN_INFERENCE` with two parameters and a key.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import probbp
from probbp.estimators import averaged, control_variate, forward, reverse, spsa, through
from probbp.ops import dendrites, feedback, gradient_reversal, rate, rtrl, sdo, substitute, sus
from probbp.types import Estimator, keyed


def members(table: Iterable[str], quick: Iterable[str] | None = None) -> Any:
    """Return a mark that runs a test over the names of a table, in `make test` over `quick` alone.

    By default all are quick.
    """
    names = list(table)
    quick = set(names if quick is None else quick)
    assert quick <= set(names), quick - set(names)
    return pytest.mark.parametrize(
        "name",
        [pytest.param(n, marks=() if n in quick else pytest.mark.slow, id=n) for n in names],
    )


# ---------------------------------------------------------------------------------------
# Estimators.


class Member(NamedTuple):
    """An unbiased estimator, and its relative variance where there is a formula.

    variance: from the number of parameters d; E|g - grad|^2 / |grad|^2.
    """

    estimator: Estimator
    variance: Callable[[int], float] | None = None


def nine_tenths_known(fun, has_aux=False):
    """Estimate what an approximation leaves that has the direction right and a tenth too little."""

    def approximate_grad(params):
        grad = jax.grad(keyed(fun, jax.random.key(0)), has_aux=has_aux)(params)
        return optax.tree.scale(0.9, grad[0] if has_aux else grad)

    return control_variate(forward(4), approximate_grad)(fun, has_aux)


ESTIMATORS = {
    "reverse": Member(reverse(), lambda d: 0),
    "gaussian": Member(forward(num_tangents=4), lambda d: (d + 1) / 4),
    "unit": Member(forward(num_tangents=4, tangents="unit"), lambda d: (d - 1) / 4),
    "orthogonal": Member(forward(num_tangents=4, tangents="orthogonal"), lambda d: d / 4 - 1),
    "in batches": Member(forward(num_tangents=5, batch_size=2), lambda d: (d + 1) / 5),
    "spsa": Member(spsa(num_pairs=4), lambda d: (d - 1) / 4),
    "averaged": Member(averaged(forward(num_tangents=2), 3), lambda d: (d + 1) / 6),
    "averaged in batches": Member(
        averaged(forward(tangents="unit"), 4, batch_size=2), lambda d: (d - 1) / 4
    ),
    "scaled": Member(through(optax.scale(1.0), forward(num_tangents=4)), lambda d: (d + 1) / 4),
    # A tenth of the gradient is left to estimate, and with it a hundredth of the variance.
    "nine tenths known": Member(nine_tenths_known, lambda d: (d + 1) / 400),
    "controlled": Member(
        control_variate(
            forward(num_tangents=4), lambda p: jax.tree.map(lambda leaf: 0.3 * leaf + 0.1, p)
        )
    ),
}


def wrong_but_deterministic(fun, has_aux=False):
    """An estimator of nothing: exact value, nonsensical field that ignores its key."""
    return lambda rng_key, x: (fun(x), jax.tree.map(lambda leaf: 3 * jnp.sin(5 * leaf) + 1, x))


def wrong_and_keyed(fun, has_aux=False):
    """The same, with an amplitude and a sign that the key draws."""

    def value_and_grad(rng_key, x):
        draw = jax.random.normal(rng_key)
        return fun(x), jax.tree.map(lambda leaf: 2 * draw.astype(leaf.dtype) * leaf, x)

    return value_and_grad


# ---------------------------------------------------------------------------------------
# Samplers.


class Sampler(NamedTuple):
    """A sampler with its options.

    algorithm: `(logdensity_fn, step_size, inverse_mass_matrix) -> SamplingAlgorithm`.
    step_size: for a target of unit scale in two to ten dimensions.
    evaluations: of the log density in a move; one that is pushed forward counts as one.
    num_samples: of four chains, which tell moments of a target of three dimensions and scales.
    is_reverse: whether it needs reverse mode.
    """

    algorithm: Callable
    step_size: float
    evaluations: int
    num_samples: int = 10_000
    is_reverse: bool = False


mala, fmala = probbp.mala, probbp.fmala
unit = forward(tangents="unit")
opposite = lambda x: jax.tree.map(jnp.negative, x)

SAMPLERS = {
    "mala": Sampler(mala, 0.3, 1, 4_000, is_reverse=True),
    "fmala": Sampler(fmala, 0.3, 1, 20_000),
    "line_fmala": Sampler(probbp.line_fmala, 0.8, 2),
    "pc_fmala": Sampler(probbp.pc_fmala, 0.3, 2, 20_000),
    "pc_line_fmala": Sampler(probbp.pc_line_fmala, 1.28, 2),
}
# Other programs of theirs.
VARIANTS = {
    "mala, forward": Sampler(partial(mala, estimator=averaged(forward(), 2)), 0.1, 1),
    "mala, refreshed": Sampler(partial(mala, estimator=unit, key_policy="refreshed"), 0.1, 2),
    "mala, shared": Sampler(partial(mala, estimator=unit, key_policy="shared"), 0.1, 2),
    "fmala, refreshed": Sampler(partial(fmala, key_policy="refreshed"), 0.3, 2),
    "fmala, shared": Sampler(partial(fmala, key_policy="shared"), 0.3, 2),
    "line_fmala, plane": Sampler(partial(probbp.line_fmala, num_tangents=2), 0.8, 2),
    "line_fmala, held": Sampler(partial(probbp.line_fmala, num_inner_steps=3), 0.8, 2),
    "line_fmala, plane, held": Sampler(
        partial(probbp.line_fmala, num_tangents=2, num_inner_steps=2), 0.8, 2
    ),
    "pc_line_fmala, plane": Sampler(partial(probbp.pc_line_fmala, num_tangents=2), 0.8, 2),
    "pc_line_fmala, held": Sampler(partial(probbp.pc_line_fmala, num_inner_steps=3), 1.28, 2),
}
# The same programs with another estimator or another constant.
SETTINGS = {
    "mala, controlled": Sampler(
        partial(mala, estimator=control_variate(forward(), opposite)), 0.1, 1
    ),
    "mala, clipped": Sampler(
        partial(mala, estimator=through(optax.clip_by_global_norm(1.0), reverse())),
        0.3,
        1,
        is_reverse=True,
    ),
    "mala, wrong": Sampler(partial(mala, estimator=wrong_but_deterministic), 0.3, 1),
    "mala, wrong, keyed": Sampler(partial(mala, estimator=wrong_and_keyed), 0.3, 1),
    "mala, wrong, keyed, refreshed": Sampler(
        partial(mala, estimator=wrong_and_keyed, key_policy="refreshed"), 0.3, 2
    ),
    "mala, wrong, keyed, shared": Sampler(
        partial(mala, estimator=wrong_and_keyed, key_policy="shared"), 0.3, 2
    ),
    "fmala, unbiased drift": Sampler(partial(fmala, drift_scale=2.0), 0.3, 1),
    "pc_fmala, as published": Sampler(
        partial(probbp.pc_fmala, key_policy="refreshed", floor=0.0), 0.3, 2
    ),
    "pc_line_fmala, as published": Sampler(partial(probbp.pc_line_fmala, floor=0.0), 1.28, 2),
}
PROGRAMS = SAMPLERS | VARIANTS
EVERY = PROGRAMS | SETTINGS
# Those that keep no gradient and take no inverse mass matrix, as a frozen kernel that has learned
# nothing; what they learn has tests of its own.
LEARNING = {
    "surrogate": Sampler(
        lambda logdensity_fn, step_size, _: probbp.surrogate(logdensity_fn, step_size), 0.45, 1
    ),
}
ALGORITHMS = EVERY | LEARNING


def build(name, logdensity_fn, step_size=None, inverse_mass_matrix=None):
    """Return a sampler of the tables, bound to a log density."""
    member = ALGORITHMS[name]
    return member.algorithm(logdensity_fn, step_size or member.step_size, inverse_mass_matrix)


# ---------------------------------------------------------------------------------------
# Operations beside the function that they stand in for.


class Op(NamedTuple):
    """An operation beside the function it stands in for.

    value_fn: what it returns.
    derivative_fn: what it is differentiated as.
    limit: the operation where its derivative is the true one.
    """

    op: Any
    value_fn: Any
    derivative_fn: Any
    limit: Any


W = np.array([[1.0, -2.0], [0.5, 3.0], [-1.0, 0.25]])


def dense(x, *, b):
    return feedback.dense(jnp.tanh(x), jnp.asarray(W, x.dtype), jnp.asarray(b))


OPS = {
    "substitute": Op(
        lambda x: substitute(jnp.round(x), x**2),
        jnp.round,
        lambda x: x**2,
        limit=lambda x: substitute(jnp.round(x), jnp.round(x)),
    ),
    "feedback.dense": Op(
        partial(dense, b=np.ones((3, 2))),
        lambda x: jnp.tanh(x) @ jnp.asarray(W, x.dtype),
        lambda x: jnp.tanh(x) @ jnp.ones((3, 2), x.dtype),
        limit=partial(dense, b=W),
    ),
    "gradient_reversal": Op(
        partial(gradient_reversal, strength=0.7),
        lambda x: x,
        lambda x: -0.7 * x,
        limit=partial(gradient_reversal, strength=-1.0),
    ),
}


# ---------------------------------------------------------------------------------------
# Operations in inference: of two parameters and a key, with JAX's own function of them.

rng = np.random.default_rng(0)
A, B = rng.normal(size=(2, 2, 3))
Q, K, V = rng.normal(size=(3, 4, 1, 2))
U = np.sin(np.arange(8.0))[:, None] + np.ones(2)


def attention(x, attend):
    return attend(x[0] * Q, jnp.asarray(K), x[1] * V)


def recurrence(x, scan):
    return scan(lambda h, u: (jnp.tanh(x * h + u), h), jnp.zeros(2), jnp.asarray(U))


def integrate_and_fire(x):
    def step(potential, _):
        potential = 0.2 * potential + x
        spikes = (potential >= 1) * 1.0
        return potential - spikes, spikes

    return jax.lax.scan(step, jnp.zeros(2), length=6)[1].mean(0)


def layers(x):
    return [lambda u: jnp.tanh(u * x), lambda h: h @ (x[:, None] * A)]


def with_branches(x):
    branches = dendrites.grow(
        dendrites.empty(jnp.asarray(A)),
        dendrites.Candidate(jnp.asarray(B), jnp.zeros(3), jnp.zeros((0, 3))),
        weight=jnp.ones(3),
    )
    return dendrites.dense(x, jnp.asarray(A), None, branches, perforate=True)


def denoiser(x, t):
    return jnp.tanh(x @ A[:, :2]) * (1 + t[:, None] / 10)


def schedule():
    return sdo.linear(3, num_train_steps=10, last_beta=0.2)


def ddim(x):
    steps = schedule()
    for t, (now, then) in zip(steps.times, pairwise(steps.signal), strict=True):
        noise = denoiser(x, jnp.full(1, float(t)))
        x = then**0.5 * (x - (1 - now) ** 0.5 * noise) / now**0.5 + (1 - then) ** 0.5 * noise
    return x[0]


def squares(y):
    return jnp.sum((y - 0.5) ** 2)


def of_error(error):
    return jnp.sqrt(error)[None]


# name -> (the operation of two parameters and a key, JAX's own function of them)
IN_INFERENCE = {
    "substitute": (lambda x, key: substitute(jnp.round(x), x), jnp.round),
    "gradient_reversal": (
        lambda x, key: jnp.sin(gradient_reversal(x, 0.5)) + x,
        lambda x: jnp.sin(x) + x,
    ),
    "sus.dot_product_attention": (
        lambda x, key: attention(x, partial(sus.dot_product_attention, keep=1.5, rng_key=key)),
        lambda x: attention(x, jax.nn.dot_product_attention),
    ),
    "rtrl.scan, last carry": (
        lambda x, key: recurrence(x, rtrl.scan)[0],
        lambda x: recurrence(x, jax.lax.scan)[0],
    ),
    "rtrl.scan, outputs": (
        lambda x, key: recurrence(x, rtrl.scan)[1][3],
        lambda x: recurrence(x, jax.lax.scan)[1][3],
    ),
    "rate.simulate": (
        lambda x, key: rate.simulate(lambda spike, u: spike(u), rate.constant(x), 6),
        integrate_and_fire,
    ),
    "feedback.dense": (
        lambda x, key: feedback.dense(jnp.tanh(x), jnp.asarray(A), jnp.asarray(B)),
        lambda x: jnp.tanh(x) @ A,
    ),
    "feedback.direct": (
        lambda x, key: of_error(
            feedback.direct(squares, layers(x), jnp.ones((1, 2)), [jnp.asarray(B.T)])
        ),
        lambda x: of_error(squares(jnp.tanh(x) @ (x[:, None] * A))),
    ),
    "dendrites.dense": (
        lambda x, key: with_branches(x),
        lambda x: x @ A + jnp.tanh(x @ B),
    ),
    "sdo.sample": (
        lambda x, key: sdo.sample(denoiser, x[None], schedule(), keep_step="random", rng_key=key)[
            0
        ],
        lambda x: ddim(x[None]),
    ),
}
