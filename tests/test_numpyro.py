"""`Kernel` in NumPyro's own MCMC."""

import pickle
import subprocess
import sys
from functools import partial

import arviz as az
import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, DiscreteGibbs, Gibbs

import probbp
from probbp.numpyro import Kernel

Y = jnp.array([1.2, -0.3, 0.8, 2.1, 0.4])


def conjugate(y):
    """Posterior of the mean is N(sum(y) / (n + 1/4), 1 / (n + 1/4)); scale is a positive site."""
    mean = numpyro.sample("mean", dist.Normal(0, 2))
    numpyro.sample("scale", dist.HalfNormal(1.0))
    numpyro.deterministic("double", 2 * mean)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(mean, 1), obs=y)


PRECISION = len(Y) + 0.25
MOMENTS = {
    "mean": (float(jnp.sum(Y)) / PRECISION, 1 / PRECISION),
    "scale": (np.sqrt(2 / np.pi), 1 - 2 / np.pi),
}

KERNELS = {
    "mala": probbp.mala,
    "fmala": probbp.fmala,
    "line_fmala": probbp.line_fmala,
    "plane": partial(probbp.line_fmala, num_tangents=2),
    "pc_fmala": probbp.pc_fmala,
    "pc_line_fmala": probbp.pc_line_fmala,
}


def mcmc_of(kernel, num_warmup=500, num_samples=3_000, num_chains=2, **options):
    options = {"chain_method": "vectorized", "progress_bar": False} | options
    return MCMC(
        kernel, num_warmup=num_warmup, num_samples=num_samples, num_chains=num_chains, **options
    )


def assert_moments(data, moments, names=None):
    for name, (mean, variance) in moments.items():
        draws = data.posterior[name].values
        for values, truth in ((draws, mean), ((draws - mean) ** 2, variance)):
            assert abs(values.mean() - truth) < 4.5 * float(az.mcse(values)), name


@pytest.mark.parametrize("metric", ["diag", "dense"])
@pytest.mark.parametrize("name", KERNELS)
def test_moments(name, metric):
    mcmc = mcmc_of(Kernel(conjugate, KERNELS[name], metric=metric), num_samples=6_000)
    fields = ("potential_energy", "accept_prob", "adapt_state.step_size")
    mcmc.run(jax.random.key(0), Y, extra_fields=fields)
    data = az.from_numpyro(mcmc)
    assert_moments(data, MOMENTS)
    np.testing.assert_allclose(data.posterior["double"], 2 * data.posterior["mean"])
    assert {"acceptance_rate", "lp", "step_size", "diverging"} <= set(data.sample_stats)
    assert len(np.unique(data.sample_stats["step_size"])) == 2


@pytest.mark.parametrize("chain_method", ["sequential", "vectorized", jax.vmap])
@pytest.mark.parametrize("num_chains", [1, 2])
@pytest.mark.filterwarnings("ignore:Some donated buffers:UserWarning")  # NumPyro's, for jax.vmap
def test_chain_methods(chain_method, num_chains):
    mcmc = mcmc_of(
        Kernel(conjugate, probbp.line_fmala), num_chains=num_chains, chain_method=chain_method
    )
    mcmc.run(jax.random.key(1), Y)
    assert_moments(az.from_numpyro(mcmc), MOMENTS)


PARALLEL = """
import numpyro
numpyro.set_host_device_count(2)
import arviz as az, jax, jax.numpy as jnp, numpyro.distributions as dist, probbp
from numpyro.infer import MCMC
from probbp.numpyro import Kernel
def model(y):
    mean = numpyro.sample("mean", dist.Normal(0, 2))
    numpyro.sample("y", dist.Normal(mean, 1), obs=y)
mcmc = MCMC(Kernel(model, probbp.pc_line_fmala), num_warmup=200, num_samples=500, num_chains=2)
mcmc.run(jax.random.key(0), jnp.ones(5))
assert mcmc.chain_method == "parallel"
print(az.from_numpyro(mcmc).posterior["mean"].shape, mcmc.get_samples()["mean"].mean())
"""


def test_parallel_chains():
    run = subprocess.run([sys.executable, "-c", PARALLEL], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("(2, 500)")


IMPORT_ORDER = """
import arviz as az
from numpyro.infer import MCMC
import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, probbp
from probbp.numpyro import Kernel
def model():
    numpyro.sample("x", dist.Normal(0, 1))
mcmc = MCMC(Kernel(model, probbp.mala), num_warmup=5, num_samples=5, progress_bar=False)
mcmc.run(jax.random.key(0))
az.from_numpyro(mcmc)
"""


def test_arviz_may_be_imported_first():
    run = subprocess.run([sys.executable, "-c", IMPORT_ORDER], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_progress_bar_tells_step_size_and_acceptance():
    mcmc = mcmc_of(Kernel(conjugate, probbp.mala), num_warmup=20, num_samples=20, num_chains=1)
    mcmc.run(jax.random.key(0), Y)
    text = mcmc.sampler.get_diagnostics_str(mcmc.last_state)
    assert text.startswith("step size ")
    assert "acc. prob=0." in text or "acc. prob=1." in text


def test_a_run_goes_on_from_its_last_state():
    mcmc = mcmc_of(Kernel(conjugate, probbp.pc_line_fmala), num_samples=2_000)
    mcmc.run(jax.random.key(2), Y)
    step_size = mcmc.last_state.adapt_state.step_size
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(mcmc.last_state.rng_key, Y)
    assert_moments(az.from_numpyro(mcmc), MOMENTS)
    np.testing.assert_array_equal(mcmc.last_state.adapt_state.step_size, step_size)


def test_nothing_adapts_after_warmup():
    mcmc = mcmc_of(Kernel(conjugate, probbp.line_fmala), num_warmup=100, num_samples=50)
    mcmc.run(jax.random.key(0), Y, extra_fields=("adapt_state.step_size",))
    step_sizes = mcmc.get_extra_fields(group_by_chain=True)["adapt_state.step_size"]
    assert (step_sizes == step_sizes[:, :1]).all()
    warm = mcmc_of(Kernel(conjugate, probbp.line_fmala), num_warmup=100, num_samples=50)
    warm.warmup(jax.random.key(0), Y, collect_warmup=True, extra_fields=("adapt_state.step_size",))
    assert len(np.unique(warm.get_extra_fields()["adapt_state.step_size"])) > 50


def test_arguments_may_be_traced():
    mcmc = mcmc_of(Kernel(conjugate, probbp.mala), jit_model_args=True, num_samples=500)
    mcmc.run(jax.random.key(0), Y)
    mcmc.run(jax.random.key(0), Y + 10)
    assert mcmc.get_samples()["mean"].mean() > 8


def test_a_potential_instead_of_a_model():
    kernel = Kernel(potential_fn=lambda x: 0.5 * jnp.sum((x - 3) ** 2), algorithm=probbp.line_fmala)
    mcmc = mcmc_of(kernel)
    with pytest.raises(ValueError, match="init_params"):
        mcmc.run(jax.random.key(0))
    mcmc.run(jax.random.key(0), init_params=jnp.zeros((2, 2)))
    draws = np.asarray(mcmc.get_samples(group_by_chain=True))
    assert draws.shape == (2, 3_000, 2)
    for values in (draws[..., 0], draws[..., 1]):
        assert abs(values.mean() - 3) < 4.5 * float(az.mcse(values))


def test_blackjax_s_nuts_is_an_algorithm_too():
    mcmc = mcmc_of(Kernel(conjugate, blackjax.nuts, target_accept_prob=0.8), num_samples=1_000)
    mcmc.run(jax.random.key(0), Y)
    assert_moments(az.from_numpyro(mcmc), MOMENTS)


def test_a_model_that_reverse_mode_refuses():
    def model(y):
        mean = numpyro.sample("mean", dist.Normal(0, 2))
        # The identity, by a loop whose length depends on the value.
        _, mean = jax.lax.while_loop(
            lambda c: c[0] < jnp.abs(jax.lax.stop_gradient(mean)) * 10,
            lambda c: (c[0] + 1, 0.5 * (c[1] + mean)),
            (0.0, mean),
        )
        numpyro.sample("y", dist.Normal(mean, 1), obs=y)

    with pytest.raises(ValueError, match="[Rr]everse-mode"):
        mcmc_of(Kernel(model, probbp.mala)).run(jax.random.key(0), Y)
    mcmc = mcmc_of(Kernel(model, probbp.pc_line_fmala))
    mcmc.run(jax.random.key(0), Y)
    assert_moments(az.from_numpyro(mcmc), {"mean": MOMENTS["mean"]})


def mixture(y):
    weight = numpyro.sample("weight", dist.Beta(2, 2))
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", dist.Bernoulli(weight))
        numpyro.sample("y", dist.Normal(3.0 * z, 1), obs=y)


def test_a_block_of_gibbs_beside_discrete_sites():
    def marginal(y):
        weight = numpyro.sample("weight", dist.Beta(2, 2))
        parts = dist.MixtureSameFamily(
            dist.Categorical(jnp.stack([1 - weight, weight])), dist.Normal(jnp.array([0.0, 3.0]), 1)
        )
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", parts, obs=y)

    y = jnp.array([0.1, 2.8, 3.3, -0.5, 3.1, 2.9])
    draws = []
    for kernel in (
        Gibbs([(Kernel(mixture, probbp.mala), ["weight"]), (DiscreteGibbs(mixture), ["z"])]),
        Kernel(marginal, probbp.mala),
    ):
        mcmc = mcmc_of(kernel, num_samples=6_000, chain_method="sequential")
        mcmc.run(jax.random.key(0), y)
        draws.append(np.asarray(mcmc.get_samples(group_by_chain=True)["weight"]))
    error = np.hypot(*(float(az.mcse(d)) for d in draws))
    assert abs(draws[0].mean() - draws[1].mean()) < 4.5 * error


def test_pickle():
    mcmc = mcmc_of(Kernel(conjugate, partial(probbp.line_fmala, num_tangents=2)), num_samples=20)
    mcmc.run(jax.random.key(0), Y)
    copy = pickle.loads(pickle.dumps(mcmc))
    np.testing.assert_array_equal(copy.get_samples()["mean"], mcmc.get_samples()["mean"])
    copy.run(jax.random.key(1), Y)


def no_sites(y):
    numpyro.sample("y", dist.Normal(0, 1).expand([len(y)]).to_event(1), obs=y)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: Kernel(), "either a model or a potential_fn"),
        (lambda: Kernel(conjugate, probbp.mala, potential_fn=jnp.sum), "either a model or a"),
        (lambda: Kernel(conjugate), "an algorithm, such as"),
        (lambda: Kernel(conjugate, blackjax.nuts), "pass target_acceptance_rate"),
        (
            lambda: mcmc_of(Kernel(mixture, probbp.mala)).run(jax.random.key(0), Y),
            r"\['z'\] are discrete.*Gibbs",
        ),
        (
            lambda: mcmc_of(Kernel(no_sites, probbp.mala)).run(jax.random.key(0), Y),
            "no latent site",
        ),
    ],
)
def test_bad_input(act, words):
    with pytest.raises(ValueError, match=words):
        act()
