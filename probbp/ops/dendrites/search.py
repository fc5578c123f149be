"""The local problem: candidates that learn to say what their neurons get wrong."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probbp.checks import check_count, check_number, check_rng_key
from probbp.ops.dendrites.layer import Activation, Candidate, Dendrites, outputs
from probbp.ops.dendrites.probes import Observation
from probbp.ops.dendrites.regression import regression
from probbp.ops.dendrites.scores import correlation

Score = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Rows(NamedTuple):
    """What a layer saw, example and position alike, and what its dendrites said.

    Attributes:
        inputs: (rows, m).
        errors: (rows, n).
        curvature: (rows, n), of the loss in z.
        previous: (slots, rows, n), the outputs of the dendrites that are there.
    """

    inputs: jax.Array
    errors: jax.Array
    curvature: jax.Array
    previous: jax.Array


def rows(
    observation: Observation,
    dendrites: Dendrites,
    *,
    activation: Activation = jnp.tanh,
    curvature: jax.Array | None = None,
) -> Rows:
    """Return the rows of an observation.

    Args:
        observation: from `observe`.
        dendrites: those of the layer at that time.
        activation: theirs.
        curvature: as the errors; by default their square, the empirical Fisher information.

    Returns:
        The `Rows` that `search` takes, the windows of a convolution flat.
    """
    inputs = observation.inputs.reshape(-1, observation.inputs.shape[-1])
    errors = observation.errors.reshape(-1, observation.errors.shape[-1])
    curvature = errors**2 if curvature is None else curvature.reshape(errors.shape)
    return Rows(inputs, errors, curvature, outputs(inputs, flat(dendrites), activation=activation))


def preactivation(candidate: Candidate, inputs: jax.Array, previous: jax.Array) -> jax.Array:
    """Return s (..., n) of a candidate with flat windows.

    Args:
        candidate: its kernel (m, n).
        inputs: (..., m).
        previous: (slots, ..., n), the outputs of the dendrites that are there.

    Example:
        >>> import jax.numpy as jnp
        >>> from probbp.ops.dendrites import Candidate
        >>> candidate = Candidate(jnp.ones((3, 2)), jnp.zeros(2), jnp.zeros((0, 2)))
        >>> preactivation(candidate, jnp.ones((1, 3)), jnp.zeros((0, 1, 2))).tolist()
        [[3.0, 3.0]]
    """
    s = inputs @ candidate.kernel + candidate.bias
    return s + jnp.einsum("kn,k...n->...n", candidate.cascade, previous)


class Found(NamedTuple):
    """The best candidate for each neuron.

    Attributes:
        candidate: with the kernel's windows flat, (m, n).
        score: (n,), on the rows that were held out. It is the best of all steps and candidates, so
            it flatters.
    """

    candidate: Candidate
    score: jax.Array


def search(
    rng_key: jax.Array,
    train: Rows,
    held: Rows,
    optimizer: Any,
    *,
    score: Score = correlation,
    num_candidates: int = 8,
    num_steps: int = 200,
    activation: Activation = jnp.tanh,
    init_scale: float = 1.0,
    partial_out: bool = True,
) -> Found:
    """Fit a pool of candidates to the errors of a layer's neurons, each neuron for itself.

    The network does not move, so its inputs and errors are constants: no step goes through it. A
    neuron's candidates climb its score on `train`; of all steps of all candidates it gets the one
    that is best on `held`: early stopping and the choice from the pool are elementwise. Inputs are
    standardised for the search, a rare one by its range, and the candidate is given back for the
    inputs as they are.

    On the rows of `held` the score of the best is flattered by the choice: test it on others.

    Args:
        rng_key: a key.
        train: rows to learn from.
        held: rows to choose by.
        optimizer: of Optax, or anything with its `init` and `update`.
        score: `(d, errors, curvature) -> (n,)`, such as `correlation`, `covariance`, `gain`.
        num_candidates: for each neuron.
        num_steps: of the optimizer.
        activation: phi.
        init_scale: standard deviation of a candidate's argument at the start. Small ones are nearly
            linear, and what is linear in the inputs the trained neuron says itself.
        partial_out: whether what the inputs and a constant say of d by a linear regression is taken
            out of it before it is scored. The neuron says that itself, and a plain correlation
            charges for it: candidates then avoid the middle of phi, where it is nearly linear, and
            find one side of a branch. `False` is Cascade-Correlation's score.

    Returns:
        A `Found`.

    Reference:
        Fahlman & Lebiere, 1989; Brenner & Itti, 2025, arXiv:2501.18018. Evci et al., 2022,
        arXiv:2201.05125, choose incoming weights by the gradient that a new unit brings.

    Example:
        A neuron that ignores where its two inputs meet.

        >>> import jax
        >>> import optax
        >>> from probbp.ops.dendrites import empty, grown, observe
        >>> x, kernel = jax.random.normal(jax.random.key(0), (200, 2)), jnp.zeros((2, 1))
        >>> def loss(layer):
        ...     return jnp.sum((layer("out", x, kernel)[:, 0] - x[:, 0] * x[:, 1]) ** 2) / 2
        >>> _, observed = observe(loss, grown({}))
        >>> seen = rows(observed["out"], empty(kernel))
        >>> train, held = (jax.tree.map(lambda a, p=p: a[..., p::2, :], seen) for p in (0, 1))
        >>> found = search(jax.random.key(1), train, held, optax.adam(0.05), num_steps=20)
        >>> found.candidate.kernel.shape
        (2, 1)
    """
    check_rng_key("rng_key", rng_key)
    num_candidates = check_count("num_candidates", num_candidates)
    num_steps = check_count("num_steps", num_steps, 0)
    check_number("init_scale", init_scale, "(0, inf)")
    mean = train.inputs.mean(0)
    # No row is further than 5 from the mean, so that inputs that hardly vary are not blown up.
    scale = jnp.maximum(train.inputs.std(0), jnp.abs(train.inputs - mean).max(0) / 5)
    scale = jnp.where(scale > 1e-6, scale, 1.0)
    m, n = train.inputs.shape[1], train.errors.shape[1]
    slots, dtype = train.previous.shape[0], train.inputs.dtype
    key_kernel, key_bias = jax.random.split(rng_key)

    def normal(key, *shape):
        return init_scale * jax.random.normal(key, (num_candidates, *shape), dtype)

    pool = Candidate(
        normal(key_kernel, m, n) / jnp.sqrt(m).astype(dtype),
        normal(key_bias, n) / 2,
        jnp.zeros((num_candidates, slots, n), dtype),
    )

    def standardised(rows):
        return rows._replace(inputs=(rows.inputs - mean) / scale)

    def scores(rows):
        rows = standardised(rows)
        residual = regression(rows.inputs, ridge=1e-3)

        def of(candidate):
            d = activation(preactivation(candidate, rows.inputs, rows.previous))
            return score(residual(d) if partial_out else d, rows.errors, rows.curvature)

        return jax.vmap(of)

    train_scores, held_scores = scores(train), scores(held)

    def better(found, pool):
        best, best_score = found
        now = held_scores(pool)
        is_better = now > best_score

        def choose(new, old):
            shape = (num_candidates, *(1,) * (new.ndim - 2), n)
            return jnp.where(is_better.reshape(shape), new, old)

        return jax.tree.map(choose, pool, best), jnp.maximum(now, best_score)

    def step(carry, _):
        pool, state, found = carry
        # A neuron's score depends on its own candidate alone, so that the sum has all gradients.
        slope = jax.grad(lambda pool: -jnp.sum(train_scores(pool)))(pool)
        updates, state = optimizer.update(slope, state, pool)
        pool = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), pool, updates)
        return (pool, state, better(found, pool)), None

    carry = pool, optimizer.init(pool), (pool, held_scores(pool))
    _, _, (best, best_score) = jax.lax.scan(step, carry, None, length=num_steps)[0]
    winner = jnp.argmax(best_score, 0)

    def pick(leaf):
        return jnp.take_along_axis(leaf, winner.reshape(1, *(1,) * (leaf.ndim - 2), n), 0)[0]

    candidate = jax.tree.map(pick, best)
    kernel = candidate.kernel / scale[:, None]
    candidate = Candidate(kernel, candidate.bias - mean @ kernel, candidate.cascade)
    return Found(candidate, best_score.max(0))


def flat(dendrites: Dendrites) -> Dendrites:
    """Return the dendrites of a convolution as those of a dense layer of its windows.

    Args:
        dendrites: of a layer with kernels `(*window, m, n)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from probbp.ops.dendrites import empty
        >>> flat(empty(jnp.ones((3, 3, 4, 2)), slots=1)).kernel.shape
        (1, 36, 2)
    """
    slots, *window, n = dendrites.kernel.shape
    size = math.prod(window)
    return dendrites._replace(kernel=dendrites.kernel.reshape(slots, size, n))
