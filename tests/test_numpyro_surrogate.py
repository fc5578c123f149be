"""The surrogate transition as a kernel of NumPyro's `MCMC`: its warm-up, pooled and alone."""

import pickle
import warnings

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, DiscreteGibbs, Gibbs
from test_numpyro import MOMENTS, Y, assert_moments, conjugate

import probbp
from probbp.numpyro import Kernel, surrogate_report
from probbp.samplers.surrogate import learning
from probbp.samplers.surrogate.transport import inflate


def mcmc_of(model=conjugate, num_warmup=600, num_samples=1_500, num_chains=8, **options):
    options = {"chain_method": "vectorized", "progress_bar": False} | options
    return MCMC(
        Kernel(model, probbp.surrogate),
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        **options,
    )


@pytest.fixture(autouse=True, scope="module")
def unrefined():
    """What the door does hangs on no map: spare its refinement, which is long to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "refine", lambda first, *values: inflate(first, 1.1))
        yield


@pytest.fixture(scope="module")
def pooled():
    mcmc = mcmc_of()
    mcmc.run(jax.random.key(1), Y, extra_fields=("potential_energy", "accept_prob"))
    return mcmc


def test_a_run_has_the_right_moments_and_says_what_it_cost(pooled):
    data = az.from_numpyro(pooled)
    assert_moments(data, MOMENTS)
    report = surrogate_report(pooled)
    assert report["num_warmup_evaluations"] == 8 * (600 + 1)
    assert report["held_out_std"] < 0.3
    assert report["pareto_k"] < 1
    assert data.sample_stats["log_weight"].shape == (8, 1_500)
    assert data.sample_stats["acceptance_rate"].values.mean() > 0.7
    # What was learned is frozen, and one for all.
    assert len(np.unique(pooled.last_state.adapt_state.step_size)) == 1


@pytest.mark.slow
def test_a_run_goes_on_from_its_warm_up():
    """With nothing learned again, and draws of the same law."""
    first = mcmc_of()
    first.warmup(jax.random.key(0), Y)
    again = first.last_state
    assert int(again.i[0]) == 600
    other = mcmc_of()
    other.post_warmup_state = again
    other.run(jax.random.key(1), Y)
    assert_moments(az.from_numpyro(other), MOMENTS)
    for old, new in zip(
        jax.tree.leaves(again.adapt_state),
        jax.tree.leaves(other.last_state.adapt_state),
        strict=True,
    ):
        np.testing.assert_array_equal(old, new)


def test_it_can_be_pickled(pooled):
    kernel = pickle.loads(pickle.dumps(pooled.sampler))
    assert kernel.default_fields == ("z", "diverging", "log_weight")


@pytest.mark.slow
@pytest.mark.parametrize("num_chains", [1, 2])
def test_chains_one_after_the_other_learn_alone(num_chains):
    mcmc = mcmc_of(
        num_chains=num_chains, num_warmup=1_500, num_samples=4_000, chain_method="sequential"
    )
    mcmc.run(jax.random.key(2), Y)
    assert_moments(az.from_numpyro(mcmc), MOMENTS)
    assert surrogate_report(mcmc)["num_warmup_evaluations"] == num_chains * 1_501


@pytest.mark.slow
def test_a_pooled_chain_of_one():
    mcmc = mcmc_of(num_chains=1, num_warmup=1_500, num_samples=4_000)
    mcmc.run(jax.random.key(3), Y)
    assert_moments(az.from_numpyro(mcmc), MOMENTS)


def test_the_bar_tells_the_error_on_unseen_points(pooled):
    words = pooled.sampler.get_diagnostics_str(pooled.last_state)
    assert words.startswith("held-out error 0.")
    assert "acc. prob=0." in words


@pytest.mark.slow
def test_a_model_that_reverse_mode_refuses():
    def model():
        x = numpyro.sample("x", dist.Normal(0, 1))
        root = jax.lax.while_loop(
            lambda r: jnp.abs(r * r - jnp.exp(x)) > 1e-9,
            lambda r: (r + jnp.exp(x) / r) / 2,
            1.0 + jnp.exp(x),
        )
        numpyro.factor("loop", -((root - 1) ** 2) / 2)

    mcmc = mcmc_of(model, num_warmup=300, num_samples=200, num_chains=4)
    mcmc.run(jax.random.key(0))
    x = mcmc.get_samples()["x"]
    grid = np.linspace(-6, 6, 2_001)
    density = np.exp(-(grid**2) / 2 - (np.exp(grid / 2) - 1) ** 2 / 2)
    mean = (grid * density).sum() / density.sum()
    assert abs(x.mean() - mean) < 5 * x.std() / 150**0.5


@pytest.mark.slow
def test_a_funnel_is_distrusted():
    def funnel():
        v = numpyro.sample("v", dist.Normal(0, 3))
        with numpyro.plate("i", 9):
            numpyro.sample("x", dist.Normal(0, jnp.exp(v / 2)))

    mcmc = mcmc_of(funnel, num_warmup=580, num_samples=300, num_chains=4)
    mcmc.run(jax.random.key(0))
    with pytest.warns(UserWarning, match="may be wrong"):
        surrogate_report(mcmc)


def test_what_can_be_trusted_is_silent(pooled):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        surrogate_report(pooled)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metric": "dense"}, "leave out metric"),
        ({"target_accept_prob": 0.8}, "leave out target_accept_prob"),
        ({"step_size": 0.3}, "leave out step_size"),
    ],
)
def test_what_does_not_concern_it_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Kernel(conjugate, probbp.surrogate, **options)


def test_no_warm_up_is_refused():
    with pytest.raises(ValueError, match="num_warmup must be positive, got 0"):
        mcmc_of(num_warmup=0).run(jax.random.key(0), Y)


def test_the_report_is_of_the_surrogate_alone():
    mcmc = MCMC(Kernel(conjugate, probbp.fmala), num_warmup=1, num_samples=1, progress_bar=False)
    with pytest.raises(ValueError, match="surrogate_report reads a run"):
        surrogate_report(mcmc)


def test_a_block_of_gibbs_is_refused():
    """Its density changes at each step, and would be another than that which was learned."""

    def model():
        component = numpyro.sample("component", dist.Bernoulli(0.5))
        numpyro.sample("mean", dist.Normal(2.0 * component, 1))

    blocks = [(Kernel(model, probbp.surrogate), ["mean"]), (DiscreteGibbs(model), ["component"])]
    mcmc = MCMC(Gibbs(blocks), num_warmup=10, num_samples=10, progress_bar=False)
    with pytest.raises(ValueError, match="no block of Gibbs"):
        mcmc.run(jax.random.key(0))
