"""Which of the dendrites that were found a network gets."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from probbp.checks import check_choice, check_count, check_number
from probbp.ops import dendrites as ops
from probbp.ops.dendrites import Candidate, Dendrites, Observation

Acceptance = Literal["all", "score test", "evidence"]
"""Which dendrites of a set are taken; see `propose`."""


class Proposal(NamedTuple):
    """Dendrites for the neurons of each layer, by the layer's name.

    Attributes:
        candidates: one for each neuron.
        masks: (n,), which neurons get theirs.
        weights: (n,), with which weight they start.
        scores: (n,), of the search, on the rows by which it chose.
        p_values: (n,), of the score test, on rows that the search did not see; none in SVI.
        gains: (n,), nats of evidence that each accepted brought when it came; 0 for the others.
        scales: (n,), of the weights' posteriors, where they are random.
    """

    candidates: dict[str, Candidate]
    masks: dict[str, jax.Array]
    weights: dict[str, jax.Array]
    scores: dict[str, jax.Array]
    p_values: dict[str, jax.Array] | None
    gains: dict[str, jax.Array]
    scales: dict[str, jax.Array] | None = None


class Search(NamedTuple):
    """How candidates are sought: the options of `probbp.ops.dendrites.search`.

    Attributes:
        optimizer: of Optax, of the candidates.
        score: of a candidate.
        num_candidates: for each neuron.
        num_steps: of the optimizer.
        init_scale: of a candidate's argument at the start.
        activation: phi, of the dendrites.
        partial_out: whether the score is of what the inputs do not say linearly; the papers' score
            is without.

    Example:
        >>> Search(num_steps=50)._replace(partial_out=False).num_candidates
        4
    """

    optimizer: Any = optax.adam(0.02)
    score: Callable[..., jax.Array] = ops.correlation
    num_candidates: int = 4
    num_steps: int = 200
    init_scale: float = 1.0
    activation: Callable[[jax.Array], jax.Array] = jnp.tanh
    partial_out: bool = True


def checked_search(search: Search | None) -> Search:
    """Return a search, the default one for `None`, whose numbers are in range.

    Raises:
        TypeError: for what is no `Search`.
        ValueError: for a number out of range.
    """
    search = Search() if search is None else search
    if not isinstance(search, Search):
        raise TypeError(f"search must be a probbp.models.growth.Search, got {search!r}.")
    check_number("init_scale", search.init_scale, "(0, inf)")
    return search._replace(
        num_candidates=check_count("num_candidates", search.num_candidates),
        num_steps=check_count("num_steps", search.num_steps, 0),
    )


def check_acceptance(acceptance: str) -> None:
    """Raise for an unknown way of acceptance."""
    check_choice("acceptance", acceptance, get_args(Acceptance))


def propose(
    rng_key: jax.Array,
    train: Mapping[str, Observation],
    held: Mapping[str, Observation],
    test: Mapping[str, Observation],
    dendrites: Mapping[str, Dendrites],
    search: Search,
    *,
    acceptance: Acceptance,
    prior_scale: float,
    level: float,
) -> Proposal:
    """Seek a dendrite for each neuron, and accept. Pure: it may be compiled and vectorised.

    Candidates climb on `train`, are chosen by `held`, and accepted by `test`. There only that part
    of a dendrite counts that its neuron's own weights cannot say. "score test" takes those that a
    test of v = 0 rejects, with a false discovery rate of `level` over all neurons of all layers;
    "evidence" takes greedily, all layers at once, while the joint evidence of the test rows rises,
    with the empirical Fisher information for its curvature. The loss should then be a negative log
    likelihood; for another multiple of it the score test is the same, and the evidence's price of
    a weight shifts by the logarithm.

    Args:
        rng_key: a key.
        train: of the layers that may grow, by name.
        held: as train.
        test: as train.
        dendrites: those that are there.
        search: how candidates are sought.
        acceptance: "all", "score test" or "evidence".
        prior_scale: tau, of the weights.
        level: of the score test.
    """
    keys = jax.random.split(rng_key, len(train))
    found, d, parts, p_values = {}, {}, {}, {}
    for key, name in zip(keys, sorted(train), strict=True):
        there = dendrites[name]
        found[name] = ops.search(
            key,
            ops.rows(train[name], there, activation=search.activation),
            ops.rows(held[name], there, activation=search.activation),
            **search._asdict(),
        )
        d[name] = said(found[name].candidate, test[name].inputs, there, search.activation)
        new = ops.orthogonalise(d[name], test[name].inputs)
        parts[name] = ops.contributions(new, test[name].errors)
        p_values[name] = ops.score_test(new, test[name].errors)[1]

    names = sorted(train)
    joined = jnp.concatenate([parts[name] for name in names], 1)
    if acceptance == "all":
        mask, gains = jnp.ones(joined.shape[1], bool), jnp.zeros(joined.shape[1])
    elif acceptance == "score test":
        mask = ops.false_discovery(jnp.concatenate([p_values[name] for name in names]), level)
        gains = jnp.zeros(joined.shape[1])
    else:
        mask, gains = ops.greedy(-joined.sum(0), joined.T @ joined, prior_scale)

    masks, gains = by_layer(mask, parts), by_layer(gains, parts)
    return Proposal(
        {name: _shaped(found[name].candidate, dendrites[name]) for name in names},
        masks,
        {name: jnp.zeros(mask.shape, dendrites[name].bias.dtype) for name, mask in masks.items()},
        {name: found[name].score for name in names},
        p_values,
        gains,
    )


def said(candidate: Candidate, inputs: jax.Array, dendrites: Dendrites, activation) -> jax.Array:
    """Return d (..., n) of a candidate with flat windows, for inputs (..., m)."""
    previous = ops.outputs(inputs, ops.flat(dendrites), activation=activation)
    return activation(ops.preactivation(candidate, inputs, previous))


def by_layer(joined: jax.Array, layers: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Cut an array of all neurons into those of each layer, in the order of the names."""
    cut, start = {}, 0
    for name in sorted(layers):
        size = layers[name].shape[-1]
        cut[name] = joined[start : start + size]
        start += size
    return cut


def _shaped(candidate, dendrites):
    return candidate._replace(kernel=candidate.kernel.reshape(dendrites.kernel.shape[1:]))
