"""The state machine of growth: neurons, dendrites, accept or take back, stop."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from probbp.checks import check_count, check_number, check_rng_key
from probbp.models.growth.acceptance import Proposal
from probbp.ops.dendrites import Dendrites, num_params
from probbp.runs.devices import put
from probbp.runs.fingerprints import fingerprint
from probbp.runs.loop import opened


class Fit(NamedTuple):
    """A network in training.

    Attributes:
        state: what the host trains: parameters and the optimiser's state.
        dendrites: of each layer that may grow, by name.
    """

    state: Any
    dendrites: dict[str, Dendrites]


class Host(Protocol):
    """What the state machine asks of a way to train: of `from_loss`, `from_svi`, or yours."""

    @property
    def max_sets(self) -> int | None:
        """How many sets there is room for, if that is settled."""
        ...

    @property
    def layer(self) -> Callable[[dict[str, Dendrites]], Any]:
        """Return dendrites to the layer that the network was trained with."""
        ...

    def init(self) -> Fit:
        """Return the network without dendrites."""
        ...

    def like(self, masks: dict[str, Any]) -> Fit:
        """Return a network of the shapes that dendrites with these masks, (slots, n), bring."""
        ...

    def epoch(self, rng_key: jax.Array, fit: Fit) -> tuple[Fit, jax.Array]:
        """Train for an epoch; return also the score, of which a higher one is better."""
        ...

    def propose(self, rng_key: jax.Array, fit: Fit) -> Proposal:
        """Seek dendrites for the network as it is."""
        ...

    def grow(self, fit: Fit, proposal: Proposal, slot: int) -> Fit:
        """Connect them, with a fresh optimizer; `slot` counts the sets."""
        ...

    def params(self, fit: Fit) -> Any:
        """Return the parameters without the dendrites."""
        ...

    def programs(self, fit: Fit) -> dict[str, tuple[Callable, tuple]]:
        """Return functions and their arguments by name: what a checkpoint is of."""
        ...


class Event(NamedTuple):
    """What happened: one entry of the history.

    Attributes:
        kind: "neurons", an epoch; "grown", a set was added; "kept" and "taken back", the judgement
            on the newest set; "nothing asked", a proposal of no dendrite; "stopped".
        epoch: epochs up to now.
        score: of the epoch, or the best of the phase that is judged.
        num_sets: sets of dendrites in the network.
        num_dendrites: dendrites in it.
        num_params: what they add, in numbers.
    """

    kind: str
    epoch: int
    score: float
    num_sets: int
    num_dendrites: int
    num_params: int


class State(NamedTuple):
    """Between two steps of the machine.

    Attributes:
        current: in training.
        best: of this phase.
        kept: the best before the newest set: what a roll back restores.
        phase: "neurons", "dendrites" or "done".
        best_score: of `best`.
        kept_score: of `kept`.
        since: epochs since the best.
        epoch: epochs up to now.
        in_phase: epochs of this phase.
        num_sets: in `current`.
        tries: sets taken back since one was kept.
        step: of the machine; the keys hang on it.
        is_early: whether the dendrites' phase began before a plateau.
        history: of events.
    """

    current: Fit
    best: Fit
    kept: Fit
    phase: str = "neurons"
    best_score: float = -np.inf
    kept_score: float = -np.inf
    since: int = 0
    epoch: int = 0
    in_phase: int = 0
    num_sets: int = 0
    tries: int = 0
    step: int = 0
    is_early: bool = False
    history: tuple[Event, ...] = ()


class Grown(NamedTuple):
    """What `grow` returns.

    Attributes:
        params: of the network; of SVI, the guide's, by name and constrained.
        dendrites: of each layer, by name.
        score: the best.
        history: of events.
    """

    params: Any
    dendrites: dict[str, Dendrites]
    score: float
    history: tuple[Event, ...]


def grow(
    rng_key: jax.Array,
    host: Host,
    *,
    max_sets: int = 3,
    max_tries: int = 2,
    patience: int = 10,
    max_epochs: int = 200,
    min_improvement: float = 1e-3,
    every: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress_bar: bool = True,
) -> Grown:
    """Train a network, and let it grow dendrites for as long as they help.

    1. Neurons: epochs, until the score has not risen for `patience` of them. Back to the best.
    2. Judgement: the best must beat the best without the newest set; else that set is taken back,
       parameters and all, and another is sought, `max_tries` times.
    3. Dendrites: the host proposes some for the network as it is. Where it proposes none, nothing
       asks for a dendrite, and growth stops. Otherwise they are connected, and 1. follows.

    The same key gives the same network, also where the run was interrupted: with a checkpoint each
    phase's end is saved, and a second call goes on from the last. Each phase is compiled by the
    host; the machine itself is plain Python.

    Args:
        rng_key: key of the whole run.
        host: from `from_loss` or `from_svi`.
        max_sets: sets of dendrites at most, one dendrite a neuron at most in each.
        max_tries: how many sets in a row may fail to help.
        patience: epochs without a rise that end a phase.
        max_epochs: of one phase.
        min_improvement: the share of the score's absolute value by which it must rise to count.
        every: ask for dendrites every so many epochs, before the plateau; where none is asked for
            training goes on. By default the plateau alone is the trigger.
        checkpoint: a folder of Orbax checkpoints, made where it is not there. It belongs to this
            key, host with its data, and these options.
        progress_bar: whether to show epochs, score and dendrites.

    Returns:
        The best network, and its history.

    Raises:
        FloatingPointError: where the score of the first epoch is not finite.
        ImportError: for a checkpoint without the package orbax-checkpoint.
        ValueError: for counts that are not positive, more sets than slots, and another run's
            checkpoint.

    Reference:
        Brenner & Itti, 2025, arXiv:2501.18018; the phases as in the authors' open-source library.
    """
    from probbp.models.growth import files  # which knows the state

    check_rng_key("rng_key", rng_key)
    max_sets, max_tries = check_count("max_sets", max_sets, 0), check_count("max_tries", max_tries)
    patience, max_epochs = check_count("patience", patience), check_count("max_epochs", max_epochs)
    check_number("min_improvement", min_improvement, "[0, inf)")
    every = None if every is None else check_count("every", every)
    if host.max_sets is not None and max_sets > host.max_sets:
        raise ValueError(
            f"max_sets is {max_sets}, and the host has {host.max_sets} slots. Give it more slots."
        )
    rules = _Rules(max_sets, max_tries, patience, max_epochs, min_improvement, every)
    steps = {"neurons": _train, "dendrites": _sprout}
    first = host.init()
    state = State(first, first, first)
    with opened(
        None,
        checkpoint=checkpoint,
        prints=lambda: fingerprint(host.programs(first), (rng_key, first), rules._asdict()),
        like=lambda done, note: files.like(host, note),
        unit=" epochs",
        progress_bar=progress_bar,
    ) as loop:
        if loop.state is not None:
            state = files.joined(put(loop.state), loop.note)
        while state.phase != "done":
            phase, key = state.phase, jax.random.fold_in(rng_key, state.step)
            state = steps[phase](key, state, host, rules)._replace(step=state.step + 1)
            num_dendrites = state.history[-1].num_dendrites
            words = f"score {state.best_score:.4g}, dendrites {num_dendrites}"
            loop.show(state.epoch - loop.bar.n, words)
            if state.phase != phase:
                fits, told = files.parts(state)
                loop.keep(state.step, lambda fits=fits: fits, told)
    return Grown(
        host.params(state.best), state.best.dendrites, float(state.best_score), state.history
    )


def programs_of(host: Host, fit: Fit) -> dict[str, tuple[Callable, tuple]]:
    """Return the `programs` of a host whose functions are JAX's."""
    # Masks may be read on the way, and so they are no arguments.
    args = jax.random.key(0), fit.state
    return {
        "the training or its data": (lambda k, s: host.epoch(k, Fit(s, fit.dendrites)), args),
        "the search for dendrites": (lambda k, s: host.propose(k, Fit(s, fit.dendrites)), args),
    }


def note(state: State, kind: str, score: float) -> State:
    """Return the state with an event."""
    dendrites = state.current.dendrites.values()
    event = Event(
        kind,
        state.epoch,
        float(score),
        state.num_sets,
        int(sum(np.sum(np.asarray(d.mask) > 0) for d in dendrites)),
        int(sum(num_params(d) for d in dendrites)),
    )
    return state._replace(history=(*state.history, event))


class _Rules(NamedTuple):
    """When phases end and what counts as better: options of `grow`."""

    max_sets: int
    max_tries: int
    patience: int
    max_epochs: int
    min_improvement: float
    every: int | None

    def improves(self, score: float, best: float) -> bool:
        is_first = best == -np.inf
        return is_first or score > best + max(self.min_improvement * abs(best), 1e-5)


def _train(key: jax.Array, state: State, host: Host, rules: _Rules) -> State:
    """Run an epoch, and end the phase where the score no longer rises."""
    current, score = host.epoch(key, state.current)
    score = float(score)
    if state.epoch == 0 and not np.isfinite(score):
        raise FloatingPointError(
            f"The score of the first epoch is {score}. Lower the learning rate."
        )
    is_best = state.in_phase == 0 or rules.improves(score, state.best_score)
    state = state._replace(
        current=current,
        best=current if is_best else state.best,
        best_score=score if is_best else state.best_score,
        since=0 if is_best else state.since + 1,
        epoch=state.epoch + 1,
        in_phase=state.in_phase + 1,
    )
    state = note(state, "neurons", score)
    if state.since >= rules.patience or state.in_phase >= rules.max_epochs:
        return _judge(state, rules)
    is_asked = rules.every and state.in_phase % rules.every == 0 and state.num_sets < rules.max_sets
    if is_asked and rules.improves(state.best_score, state.kept_score):
        return state._replace(phase="dendrites", is_early=True)
    return state


def _judge(state: State, rules: _Rules) -> State:
    """Keep the newest set or take it back, and stop or seek another."""
    if rules.improves(state.best_score, state.kept_score):
        state = state._replace(kept=state.best, kept_score=state.best_score, tries=0)
        state = note(state, "kept", state.best_score)
    else:
        lost = state.best_score
        state = state._replace(
            current=state.kept,
            best=state.kept,
            best_score=state.kept_score,
            num_sets=state.num_sets - 1,
            tries=state.tries + 1,
        )
        state = note(state, "taken back", lost)
    if state.num_sets >= rules.max_sets or state.tries >= rules.max_tries:
        return _stop(state)
    return state._replace(phase="dendrites", is_early=False)


def _sprout(key: jax.Array, state: State, host: Host, rules: _Rules) -> State:
    """Connect the dendrites that the host proposes, or stop where it proposes none."""
    proposal = host.propose(key, state.best)
    if not any(np.any(mask) for mask in proposal.masks.values()):
        state = note(state, "nothing asked", state.best_score)
        return state._replace(phase="neurons") if state.is_early else _stop(state)
    current = host.grow(state.best, proposal, state.num_sets)
    state = state._replace(
        phase="neurons",
        current=current,
        kept=state.best,
        kept_score=state.best_score,
        since=0,
        in_phase=0,
        num_sets=state.num_sets + 1,
    )
    return note(state, "grown", state.best_score)


def _stop(state: State) -> State:
    return note(state._replace(phase="done"), "stopped", state.best_score)
