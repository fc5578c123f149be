"""Our Optax transforms where others keep their state: Flax's NNX and `TrainState`, Equinox."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cheap import normal
from flax import nnx
from flax.training.train_state import TrainState
from tables import members

from probbp.optim import dsbp, feedback
from probbp.optim.dsbp.rotations import on_lie_algebra
from probbp.optim.dsbp.transfer import protect

X = normal(0, 5, 4)
PARAMS = {"feedback": normal(1, 4, 3), "kernel": normal(2, 4, 3)}


def loss(params):
    hidden = X @ params["kernel"] + jnp.tanh(X @ params["feedback"])
    return jnp.sum(hidden**2) / 10


def directions(params):
    return jax.tree.map(lambda kernel: jnp.eye(len(kernel))[:, :1], params)


# name -> the transform for a host's tree of parameters
TRANSFORMS = {
    "residual": lambda params: dsbp.scale_by_dynamic_spectral(2),
    "damp": lambda params: dsbp.scale_by_dynamic_spectral(2, "damp", refresh=2),
    "random": lambda params: dsbp.scale_by_dynamic_spectral(2, "random", refresh=1),
    "momentum": lambda params: dsbp.scale_by_dynamic_spectral(
        2, inner=optax.chain(optax.trace(0.9), optax.scale(0.5))
    ),
    "on_lie_algebra": lambda params: on_lie_algebra(optax.scale_by_adam()),
    "protect": lambda params: protect(directions(params)),
    "frozen": lambda params: feedback.frozen(optax.scale_by_adam()),
}


def bare(transform, params):
    return optax.chain(transform(params), optax.scale(-0.01))


def wrapped(transform, params):
    """Every wrapper of Optax around one another, none of which changes a step."""
    everywhere = jax.tree.map(lambda leaf: True, params)
    labels = jax.tree.map(lambda leaf: "all", params)

    def make(learning_rate):
        inner = optax.chain(transform(params), optax.scale(-1.0))
        inner = optax.multi_transform({"all": inner}, labels)
        inner = optax.MultiSteps(optax.masked(inner, everywhere), 1).gradient_transformation()
        return optax.chain(optax.apply_if_finite(inner, 3), optax.scale(learning_rate))

    return optax.inject_hyperparams(make)(learning_rate=0.01)


def plain(optimizer):
    """Three steps by hand."""
    optimizer = optimizer(PARAMS)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    start = PARAMS, optimizer.init(PARAMS)
    return jax.jit(lambda start: jax.lax.scan(step, start, length=3)[0][0])(start)


def through_orbax(state: Any, folder):
    """Save and restore."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", state)


def params_of(module):
    return {"kernel": module.kernel[...], "feedback": module.feedback[...]}


class Module(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.asarray(PARAMS["kernel"]))
        self.feedback = nnx.Param(jnp.asarray(PARAMS["feedback"]))


def in_nnx(optimizer, folder):
    def start():
        module = Module()
        optimizer_of_params = optimizer(nnx.as_pure(nnx.state(module, nnx.Param)))
        return module, nnx.Optimizer(module, optimizer_of_params, wrt=nnx.Param)

    @nnx.jit
    def step(module, host):
        host.update(module, nnx.grad(lambda module: loss(params_of(module)))(module))

    pair = start()
    step(*pair)
    saved = nnx.state(pair)
    pair = start()
    nnx.update(pair, through_orbax(saved, folder))
    step(*pair)
    step(*pair)
    return params_of(pair[0])


def in_train_state(optimizer, folder):
    step = jax.jit(lambda state: state.apply_gradients(grads=jax.grad(loss)(state.params)))
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = step(TrainState.create(apply_fn=None, params=params, tx=optimizer(params)))
    return step(step(through_orbax(state, folder))).params


class Layer(eqx.Module):
    feedback: jax.Array  # in the order of a dictionary's keys, by which bases are drawn
    kernel: jax.Array
    name: str = "layer"


def in_equinox(optimizer, folder):
    layer = Layer(**jax.tree.map(jnp.asarray, PARAMS))
    optimizer = optimizer(eqx.filter(layer, eqx.is_array))

    @eqx.filter_jit
    def step(layer, state):
        grads = eqx.filter_grad(lambda layer: loss(params_of(layer)))(layer)
        updates, state = optimizer.update(grads, state, eqx.filter(layer, eqx.is_array))
        return eqx.apply_updates(layer, updates), state

    layer, state = step(layer, optimizer.init(eqx.filter(layer, eqx.is_array)))
    state = through_orbax(state, folder)
    layer, state = step(layer, state)
    layer, state = step(layer, state)
    return params_of(layer)


@pytest.mark.parametrize("wrap", [pytest.param(bare, marks=pytest.mark.slow), wrapped])
@pytest.mark.parametrize("host", [in_nnx, in_train_state, in_equinox])
@members(TRANSFORMS, quick=["residual", "protect"])
def test_three_steps_in_a_host_are_optax_s(name, host, wrap, tmp_path):
    expected = plain(lambda params: bare(TRANSFORMS[name], params))
    found = host(lambda params: wrap(TRANSFORMS[name], params), tmp_path)
    assert np.max(np.abs(expected["kernel"] - PARAMS["kernel"])) > 1e-4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), expected, found)
