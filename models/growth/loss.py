"""Growth of any network that takes its layers as an argument, by its loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from probbp.checks import check_count, check_number
from probbp.models.growth.acceptance import (
    Acceptance,
    Search,
    check_acceptance,
    checked_search,
    propose,
)
from probbp.models.growth.machine import Fit, Host, programs_of
from probbp.ops import dendrites as ops
from probbp.ops.dendrites import Dendrites, Observation


def from_loss(
    loss_fn: Callable[..., jax.Array],
    params: Any,
    optimiser: optax.GradientTransformation,
    train: Any,
    validation: Any,
    *,
    batch_size: int = 64,
    layers: Sequence[str] | None = None,
    freeze: bool = False,
    perforate: bool = False,
    slots: int | None = None,
    acceptance: Acceptance = "evidence",
    prior_scale: float = 1.0,
    level: float = 0.05,
    search: Search | None = None,
) -> Host:
    """Return what `grow` drives: a network, its loss, its optimiser and its data.

    The loss is any function of the form below: least squares, a penalised likelihood (MAP), the
    negative ELBO of an amortised guide, whose networks then grow. An epoch is one pass through the
    shuffled rows; the score that growth is judged by is minus the validation loss.

    In the dendrites' phase the network is observed once: candidates climb on the training rows, are
    chosen by one half of the validation rows, and accepted by the other.

    By default dendrites start from what the search found and are then trained with all else. The
    paper's way is to set `freeze=True`, `perforate=True`, `acceptance="all"` and
    `search=Search(partial_out=False)`.

    Args:
        loss_fn: `(params, layer, batch, rng_key) -> mean loss of the batch`, where the network
            calls `layer(name, x, kernel, bias)` of `probbp.ops.dendrites.grown`.
        params: where training starts, a pytree.
        optimiser: of params and dendrites; it starts anew with each set.
        train: pytree of arrays with the examples on their first axis.
        validation: as train, at least two examples.
        batch_size: rows of a step. Those that fill no batch wait for the next epoch.
        layers: names of those that may grow; all by default.
        freeze: whether accepted dendrites stay as the search left them.
        perforate: whether their errors stop at them. Not a gradient then.
        slots: masked slots to lay out from the start, so that nothing is compiled twice; by default
            a set appends one.
        acceptance: "evidence", "score test", or "all", a dendrite for each neuron.
        prior_scale: tau, of a dendrite's weight, for the evidence.
        level: false discovery rate of the score test.
        search: how candidates are sought; `Search()` by default.

    Raises:
        ValueError: for an unknown acceptance or layer, and for too few rows.
    """
    check_acceptance(acceptance)
    batch_size = check_count("batch_size", batch_size)
    slots = None if slots is None else check_count("slots", slots)
    check_number("prior_scale", prior_scale, "(0, inf)")
    check_number("level", level, "(0, 1)")
    _check_rows(train, validation, batch_size)
    search = checked_search(search)
    layer = partial(ops.grown, activation=search.activation, freeze=freeze, perforate=perforate)
    kernels = _kernels(loss_fn, params, train, layers)
    rules = {"acceptance": acceptance, "prior_scale": prior_scale, "level": level}
    accept = partial(propose, search=search, **rules)
    return _LossHost(
        params,
        kernels,
        optimiser,
        freeze,
        (train, validation),
        _epoch_fn(loss_fn, layer, optimiser, batch_size, freeze),
        _propose_fn(loss_fn, layer, list(kernels), accept),
        layer,
        slots,
    )


@dataclass(frozen=True)
class _LossHost:
    """A network, its loss, its optimizer and its data."""

    first: Any
    kernels: dict[str, jax.ShapeDtypeStruct]
    optimizer: optax.GradientTransformation
    freeze: bool
    data: tuple[Any, Any]
    run_epoch: Callable
    run_propose: Callable
    layer: Callable
    max_sets: int | None

    def init(self):
        return self.like({name: [None] * (self.max_sets or 0) for name in self.kernels})

    def like(self, masks):
        dendrites = {
            name: ops.empty(jnp.zeros(kernel.shape, kernel.dtype), len(masks[name]))
            for name, kernel in self.kernels.items()
        }
        return self._fresh(self.first, dendrites)

    def epoch(self, rng_key, fit):
        return self.run_epoch(rng_key, fit, *self.data)

    def propose(self, rng_key, fit):
        return self.run_propose(rng_key, fit, *self.data)

    def grow(self, fit, proposal, slot):
        dendrites = {
            name: ops.grow(
                there,
                proposal.candidates[name],
                proposal.masks[name],
                proposal.weights[name],
                slot=None if self.max_sets is None else slot,
            )
            for name, there in fit.dendrites.items()
        }
        return self._fresh(self.params(fit), dendrites)

    def params(self, fit):
        return fit.state[0]

    def programs(self, fit):
        return programs_of(self, fit)

    def _fresh(self, params, dendrites):
        """Return the network with a new state of the optimizer."""
        state = self.optimizer.init(_trained(params, dendrites, self.freeze))
        return Fit((params, state), dendrites)


def _epoch_fn(loss_fn, layer_fn, optimiser, batch_size, freeze):
    """Return a compiled pass through the shuffled rows, with the validation score at its end."""

    def step(train, carry, inputs):
        fit, (rows, key) = carry, inputs
        batch = jax.tree.map(lambda leaf: leaf[rows], train)
        (params, state), dendrites = fit

        def loss(trained):
            params, own = trained
            return loss_fn(params, layer_fn(_with(dendrites, own)), batch, key)

        trained = _trained(params, dendrites, freeze)
        updates, state = optimiser.update(jax.grad(loss)(trained), state, trained)
        params, own = optax.apply_updates(trained, updates)
        return Fit((params, state), _with(dendrites, own)), None

    @jax.jit
    def run_epoch(rng_key, fit, train, validation):
        key_order, key_steps = jax.random.split(rng_key)
        num_rows = _num_rows(train)
        num_batches = num_rows // batch_size
        order = jax.random.permutation(key_order, num_rows)[: num_batches * batch_size]
        batches = order.reshape(num_batches, batch_size), jax.random.split(key_steps, num_batches)
        fit = jax.lax.scan(partial(step, train), fit, batches)[0]
        # One key for all epochs: where the loss is an estimate, scores share its noise.
        key_score = jax.random.key(0)
        loss = loss_fn(fit.state[0], layer_fn(fit.dendrites), validation, key_score)
        return fit, -loss

    return run_epoch


def _propose_fn(loss_fn, layer_fn, names, search_and_accept):
    """Return a compiled proposal: dendrites sought on training rows, judged by validation rows."""

    def observed(rng_key, fit, rows):
        def loss(layer):
            return _num_rows(rows) * loss_fn(fit.state[0], layer, rows, rng_key)

        seen = ops.observe(loss, layer_fn(fit.dendrites))[1]
        return {name: seen[name] for name in names}

    @jax.jit
    def run_propose(rng_key, fit, train, validation):
        key_loss, key_halves, key_search = jax.random.split(rng_key, 3)
        num_rows = _num_rows(validation)
        order = jax.random.permutation(key_halves, num_rows)
        half = num_rows // 2
        there = observed(key_loss, fit, validation)
        held, test = (_at(there, rows) for rows in (order[:half], order[half:]))
        return search_and_accept(
            key_search, observed(key_loss, fit, train), held, test, fit.dendrites
        )

    return run_propose


def _check_rows(train, validation, batch_size):
    num_train, num_validation = _num_rows(train), _num_rows(validation)
    if num_validation < 2 or num_train < batch_size:
        raise ValueError(
            f"{num_train} training rows for batches of {batch_size} and {num_validation} for "
            "validation: a batch must be full, and validation has two halves."
        )


def _trained(params: Any, dendrites: dict[str, Dendrites], freeze: bool):
    """Return what the optimiser moves: frozen leaves have no state and suffer no weight decay."""
    names = ("weight",) if freeze else ("kernel", "bias", "cascade", "weight")
    own = {name: {n: getattr(there, n) for n in names} for name, there in dendrites.items()}
    return params, own


def _with(dendrites: dict[str, Dendrites], own: dict[str, dict[str, jax.Array]]):
    return {name: there._replace(**own[name]) for name, there in dendrites.items()}


def _at(observed, rows):
    return {name: Observation(*(leaf[rows] for leaf in seen)) for name, seen in observed.items()}


def _kernels(loss_fn, params, train, layers):
    """Return the shapes of the kernels of the layers that may grow, in the order of the calls."""
    kernels = {}
    plain = ops.grown({})

    def note(name, x, kernel, bias=None, **options):
        kernels[name] = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)
        return plain(name, x, kernel, bias, **options)

    key = jax.random.key(0)
    jax.eval_shape(lambda params, rows: loss_fn(params, note, rows, key), params, train)
    names = kernels if layers is None else layers
    unknown = [name for name in names if name not in kernels]
    if unknown or not kernels:
        raise ValueError(f"The network calls the layers {list(kernels)}, and not {unknown}.")
    return {name: kernels[name] for name in names}


def _num_rows(data):
    return jax.tree.leaves(data)[0].shape[0]
