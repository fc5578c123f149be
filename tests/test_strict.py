"""JAX's strict modes: what is ours runs under them."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from tables import ALGORITHMS, IN_INFERENCE, build, members

import probbp
from probbp.ops import sdo, sus

KEY = jax.random.key(0)


@pytest.fixture
def single_precision():
    """JAX's default, as strict modes are for those who count bits.

    Not where NumPy's arrays are closed over that other tests have, too: JAX 0.10 may take one that
    it has traced in the other precision for what it was there.
    """
    with jax.enable_x64(False):
        yield


def attention(**options):
    options = {"keep": 2, "rng_key": KEY} | options

    def loss(q):
        return jnp.sum(sus.dot_product_attention(q, q, q, **options) ** 2)

    return jax.grad(loss)(jnp.linspace(-1.0, 1.0, 2 * 6 * 2 * 4).reshape(2, 6, 2, 4))


def diffusion():
    schedule = sdo.linear(10)

    def loss(scale):
        x = sdo.sample(
            lambda x, time: scale * x,
            jnp.ones((2, 3)),
            schedule,
            rng_key=KEY,
            keep_step="random",
        )
        return jnp.sum(x**2)

    return jax.grad(loss)(0.5)


def density(x):
    return -jnp.sum(x**2) / 2


def chains():
    return probbp.sample(
        KEY,
        lambda *args, **options: probbp.mala(density, *args, **options),
        jnp.zeros(2),
        num_warmup=20,
        num_samples=10,
        target_acceptance_rate=0.57,
        progress_bar=False,
    )


OPS = {
    "sus": attention,
    "sus, causal": lambda: attention(is_causal=True),
    "sus, a window": lambda: attention(local_window_size=(2, 1)),
    "sus, lengths": lambda: attention(
        query_seq_lengths=jnp.array([3, 6]), key_value_seq_lengths=jnp.array([6, 4])
    ),
    "sdo": diffusion,
}


@pytest.mark.usefixtures("single_precision")
@pytest.mark.parametrize("name", [*OPS, "sample"])
def test_ranks_are_not_promoted(name):
    with jax.numpy_rank_promotion("raise"):
        (OPS | {"sample": chains})[name]()


@pytest.mark.usefixtures("single_precision")
@pytest.mark.parametrize("name", OPS)
def test_types_are_not_promoted(name):
    with jax.numpy_dtype_promotion("strict"):
        OPS[name]()


# One of a kind; those that are left are the same programs with other settings.
SOME = ["mala", "pc_fmala", "line_fmala, plane", "surrogate"]


@members([name for name in ALGORITHMS if "wrong" not in name], quick=SOME)
def test_a_compiled_sampler_leaks_no_tracer_and_moves_nothing(name):
    position, scale = jnp.ones(3), None if name == "surrogate" else jnp.ones(3)
    algorithm = build(name, density, inverse_mass_matrix=scale)
    init = algorithm.init if name == "surrogate" else partial(algorithm.init, rng_key=KEY)
    with jax.checking_leaks(), jax.transfer_guard("disallow"):
        state = jax.jit(init)(position)
        jax.block_until_ready(jax.jit(algorithm.step)(KEY, state))


@members(IN_INFERENCE, quick=["rtrl.scan, last carry", "sus.dot_product_attention"])
def test_a_compiled_operation_leaks_no_tracer_and_moves_nothing(name):
    op, _ = IN_INFERENCE[name]

    def value_and_pushed(x, rng_key):  # forward mode, which they all have
        return jax.jvp(lambda x: op(x, rng_key), (x,), (x,))

    x = jnp.linspace(0.3, 0.7, 2)
    with jax.checking_leaks(), jax.transfer_guard("disallow"):
        jax.block_until_ready(jax.jit(value_and_pushed)(x, KEY))


def test_a_run_moves_nothing_by_itself():
    """What is on the host is put on the device explicitly; from there NumPy reads it."""
    position = jnp.zeros(2)
    with jax.transfer_guard("disallow"):
        probbp.sample(
            KEY,
            partial(probbp.mala, density),
            position,
            num_warmup=20,
            num_samples=10,
            progress_bar=False,
        )
