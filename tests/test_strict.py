"""JAX's strict modes: what is ours runs under them."""

import jax
import jax.numpy as jnp
import pytest

import probbp
from probbp.ops import sdo, sus

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def single_precision():
    """JAX's default, as strict modes are for those who count bits."""
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


@pytest.mark.parametrize("name", [*OPS, "sample"])
def test_ranks_are_not_promoted(name):
    with jax.numpy_rank_promotion("raise"):
        (OPS | {"sample": chains})[name]()


@pytest.mark.parametrize("name", OPS)
def test_types_are_not_promoted(name):
    with jax.numpy_dtype_promotion("strict"):
        OPS[name]()
