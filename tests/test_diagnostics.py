"""`from_blackjax`: the object of the installed ArviZ, whichever that is."""

import arviz as az
import blackjax
import jax
import jax.numpy as jnp
import pytest

import probbp
from probbp.diagnostics import from_blackjax


def run(algorithm, start, num=25):
    def chain(key):
        return blackjax.util.run_inference_algorithm(key, algorithm, num, initial_position=start)[1]

    return jax.vmap(chain)(jax.random.split(jax.random.key(0), 3))


def test_our_samplers():
    algorithm = probbp.line_fmala(
        lambda p: -0.5 * jnp.sum(p["a"]["b"] ** 2) - 0.5 * jnp.sum(p["c"][0] ** 2), 0.5
    )
    states, infos = run(algorithm, {"a": {"b": jnp.zeros(2)}, "c": [jnp.zeros(())]})
    data = from_blackjax(
        states, infos, dims={"a.b": ["coordinate"]}, coords={"coordinate": ["u", "v"]}
    )
    assert data.posterior["a.b"].dims == ("chain", "draw", "coordinate")
    assert list(data.posterior["coordinate"].values) == ["u", "v"]
    assert data.posterior["c.0"].shape == (3, 25)
    assert (data.sample_stats["lp"].values == states.logdensity).all()
    assert (data.sample_stats["acceptance_rate"].values == infos.acceptance_rate).all()
    assert data.sample_stats["diverging"].dtype == bool
    assert set(az.summary(data).index) == {"a.b[u]", "a.b[v]", "c.0"}


def test_nuts():
    algorithm = blackjax.nuts(lambda x: -0.5 * jnp.sum(x**2), 0.5, jnp.ones(2))
    states, infos = run(algorithm, jnp.zeros(2))
    data = from_blackjax(states, infos)
    assert (data.posterior["x"].values == states.position).all()
    assert {"n_steps", "energy", "diverging"} <= set(data.sample_stats)


def test_positions_alone_and_a_transformation():
    positions = {"x": jnp.ones((2, 5, 3))}
    data = from_blackjax(positions, postprocess_fn=lambda p: {"y": 2 * p["x"][0]})
    assert data.posterior["y"].shape == (2, 5)
    assert (data.posterior["y"] == 2).all()


def test_a_chain_axis_is_asked_for():
    with pytest.raises(ValueError, match="leading axes"):
        from_blackjax({"x": jnp.ones((2, 5)), "y": jnp.ones(5)})
