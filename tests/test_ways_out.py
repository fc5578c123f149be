"""JAX's refusals to differentiate say, at each door, what can be done instead."""

from functools import partial

import blackjax
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from cheap import key_of, normal
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

import probbp
from probbp.diagnostics.gradients import gradient_quality
from probbp.estimators import averaged, forward, reverse
from probbp.numpyro import Kernel, Optim, subsampled
from probbp.samplers.curvature import gauss_newton

START = normal(0, 3)


def with_a_loop(x):
    """A log density that reverse mode refuses."""
    return -jax.lax.while_loop(lambda x: jnp.sum(x**2) > 1, lambda x: x / 2, x).sum()


@jax.custom_vjp
def with_a_vjp(x):
    """A log density that forward mode refuses."""
    return -0.5 * jnp.sum(x**2)


with_a_vjp.defvjp(lambda x: (with_a_vjp(x), x), lambda x, g: (-g * x,))


def model_of(fun, num_rows=None):
    def model():
        x = numpyro.sample("x", dist.Normal(0, 1).expand([3]).to_event(1))
        with numpyro.plate("rows", 6, subsample_size=num_rows), numpyro.handlers.scale(scale=1 / 6):
            numpyro.factor("f", fun(x))

    return model


def kernel(algorithm, fun):
    options = {"target_accept_prob": 0.8} if algorithm is blackjax.nuts else {}
    return Kernel(model_of(fun), algorithm, **options).init(key_of(0), 0, None, (), {})


def svi(estimator, fun):
    model = model_of(fun)
    guide = AutoNormal(model, forward_mode_differentiation=fun is with_a_loop)
    svi = SVI(model, guide, Optim(optax.sgd(0.1), estimator), Trace_ELBO())
    return svi.update(svi.init(key_of(0)))


def stochastic_gradient(fun):
    parts = subsampled(key_of(0), model_of(fun, num_rows=2))
    return parts.grad_estimator(parts.position, parts.draw(key_of(1)))


def theirs(fun, has_aux=False):
    return lambda rng_key, params: jax.value_and_grad(fun, has_aux=has_aux)(params)


REVERSE = {
    "mala": lambda: probbp.mala(with_a_loop, 0.1).init(START),
    "mala, reverse": lambda: probbp.mala(with_a_loop, 0.1, estimator=reverse()).init(START),
    "mala, another's": lambda: probbp.mala(with_a_loop, 0.1, estimator=theirs).init(START),
    "reverse": lambda: reverse()(with_a_loop)(key_of(0), START),
    "averaged": lambda: averaged(reverse(), 2)(with_a_loop)(key_of(0), START),
    "Kernel, mala": lambda: kernel(probbp.mala, with_a_loop),
    "Kernel, blackjax.nuts": lambda: kernel(blackjax.nuts, with_a_loop),
    "Optim": lambda: svi(reverse(), with_a_loop),
    "Optim, another's": lambda: svi(theirs, with_a_loop),
    "gradient_quality": lambda: gradient_quality(key_of(0), reverse(), with_a_loop, START),
    "gradient_quality, another's": lambda: gradient_quality(key_of(0), theirs, with_a_loop, START),
    "subsampled": lambda: stochastic_gradient(with_a_loop),
    "sample": lambda: probbp.sample(key_of(0), partial(probbp.mala, with_a_loop), START),
}
FORWARD = {
    **{
        name: lambda name=name: getattr(probbp, name)(with_a_vjp, 0.1).init(START)
        for name in ("fmala", "line_fmala", "pc_fmala", "pc_line_fmala")
    },
    "forward": lambda: forward()(with_a_vjp)(key_of(0), START),
    "mala, forward": lambda: probbp.mala(with_a_vjp, 0.1, estimator=forward()).init(START),
    "Kernel, fmala": lambda: kernel(probbp.fmala, with_a_vjp),
    "Optim": lambda: svi(forward(), with_a_vjp),
    "gradient_quality": lambda: gradient_quality(key_of(0), forward(), with_a_vjp, START),
    "sample": lambda: probbp.sample(key_of(0), partial(probbp.fmala, with_a_vjp), START),
    "gauss_newton": lambda: gauss_newton(with_a_vjp, jnp.sum, jnp.sum)(None)(START, START[None]),
}


def note_of(error):
    """Return our note, which is said once; JAX has one of its own."""
    (note,) = [note for note in error.__notes__ if "probbp" in note]
    return note


@pytest.mark.parametrize("act", REVERSE.values(), ids=REVERSE)
def test_reverse_mode_of_a_loop(act):
    with pytest.raises(ValueError, match="Reverse-mode differentiation") as caught:
        act()
    for words in ("probbp.fmala", "estimators.forward()", "forward_mode_differentiation=True"):
        assert words in note_of(caught.value)


@pytest.mark.parametrize("act", FORWARD.values(), ids=FORWARD)
def test_forward_mode_of_a_custom_vjp(act):
    with pytest.raises(TypeError, match="custom_vjp") as caught:
        act()
    for words in ("probbp.mala", "estimators.reverse()", "adjoint=diffrax.ForwardMode()"):
        assert words in note_of(caught.value)
