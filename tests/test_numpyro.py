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
import optax
import pytest
from flax import nnx
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import nnx_module
from numpyro.distributions import constraints
from numpyro.handlers import seed
from numpyro.infer import HMC, MCMC, NUTS, SVI, DiscreteGibbs, Gibbs, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.elbo import RenyiELBO
from numpyro.infer.util import initialize_model
from tables import SAMPLERS, VARIANTS, members

import probbp
from probbp.estimators import averaged, forward, reverse, through
from probbp.numpyro import Kernel, Optim, subsampled
from probbp.ops import substitute

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

KERNELS = SAMPLERS | {"line_fmala, plane": VARIANTS["line_fmala, plane"]}


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


@pytest.mark.parametrize("metric", ["diag", pytest.param("dense", marks=pytest.mark.slow)])
@members(KERNELS, quick=["mala", "line_fmala", "pc_fmala"])
def test_moments(name, metric):
    kernel = Kernel(conjugate, KERNELS[name].algorithm, metric=metric)
    # Many chains, so that the error is known where one stands still in the tail of log(scale).
    mcmc = mcmc_of(kernel, num_samples=1_500, num_chains=20)
    fields = ("potential_energy", "accept_prob", "adapt_state.step_size")
    mcmc.run(jax.random.key(0), Y, extra_fields=fields)
    data = az.from_numpyro(mcmc)
    assert_moments(data, MOMENTS)
    np.testing.assert_allclose(data.posterior["double"], 2 * data.posterior["mean"])
    assert {"acceptance_rate", "lp", "step_size", "diverging"} <= set(data.sample_stats)
    assert len(np.unique(data.sample_stats["step_size"])) == 20


@pytest.mark.parametrize(
    ("chain_method", "num_chains"),
    [
        ("vectorized", 2),
        *(
            pytest.param(method, num, marks=pytest.mark.slow)
            for method in ("sequential", "vectorized", jax.vmap)
            for num in (1, 2)
            if (method, num) != ("vectorized", 2)
        ),
    ],
)
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


@pytest.mark.slow
def test_parallel_chains():
    run = subprocess.run([sys.executable, "-c", PARALLEL], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("(2, 500)")


LOST = """
import numpyro
numpyro.set_host_device_count(2)
import jax, jax.numpy as jnp, numpyro.distributions as dist, probbp, sys
from numpyro.infer import MCMC
from probbp.numpyro import Kernel
model = lambda: numpyro.sample("a", dist.Normal(0, 1))
start = {"a": jnp.array([0.0, float(sys.argv[1])])}
mcmc = MCMC(Kernel(model, probbp.mala), num_warmup=20, num_samples=20, num_chains=2,
            chain_method="parallel" if sys.argv[2] == "parallel" else jax.vmap, progress_bar=False)
mcmc.run(jax.random.key(0), init_params=start)
jax.block_until_ready(mcmc.get_samples())
"""


@pytest.mark.slow
@pytest.mark.parametrize("chain_method", ["parallel", "vmap"])
@pytest.mark.parametrize("start", ["nan", "0"])
def test_a_start_that_numpyro_traces_is_warned_of(start, chain_method):
    """There is nothing to look at before the run, and no error that could stop it."""
    command = [sys.executable, "-c", LOST, start, chain_method]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    is_told = "UserWarning: The log density at the start is" in run.stderr
    assert is_told == (start == "nan")


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


@pytest.mark.slow
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


@pytest.mark.slow
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
    """The marginal posterior of the weight is known on a grid."""
    y = np.array([0.1, 2.8, 3.3, -0.5, 3.1, 2.9])
    kernel = Gibbs([(Kernel(mixture, probbp.mala), ["weight"]), (DiscreteGibbs(mixture), ["z"])])
    mcmc = mcmc_of(kernel, num_samples=6_000, num_chains=1)
    mcmc.run(jax.random.key(0), jnp.asarray(y))
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["weight"])
    grid = np.linspace(0.0005, 0.9995, 1000)[:, None]
    likelihood = (1 - grid) * np.exp(-(y**2) / 2) + grid * np.exp(-((y - 3) ** 2) / 2)
    density = (grid * (1 - grid)).ravel() * likelihood.prod(1)
    truth = density @ grid.ravel() / density.sum()
    assert abs(draws.mean() - truth) < 4.5 * float(az.mcse(draws))


@pytest.mark.slow
def test_pickle():
    mcmc = mcmc_of(Kernel(conjugate, partial(probbp.line_fmala, num_tangents=2)), num_samples=20)
    mcmc.run(jax.random.key(0), Y)
    copy = pickle.loads(pickle.dumps(mcmc))
    np.testing.assert_array_equal(copy.get_samples()["mean"], mcmc.get_samples()["mean"])
    copy.run(jax.random.key(1), Y)


# ---------------------------------------------------------------------------------------
# Operations with another derivative inside a model.


def random_backward(x, rng_key):
    """Return x, with a derivative scaled at random; without a key, the true one."""
    if rng_key is None:
        return x
    return substitute(x, jax.random.uniform(rng_key, minval=-0.5, maxval=2.0) * x)


def with_random_backward(y):
    mean = numpyro.sample("mean", dist.Normal(0, 2))
    numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(random_backward(mean, numpyro.prng_key()), 1), obs=y)


def with_random_backward_in_a_loop(y):
    mean = numpyro.sample("mean", dist.Normal(0, 2))
    numpyro.sample("scale", dist.HalfNormal(1.0))

    def row(carry, y):
        numpyro.sample("y", dist.Normal(random_backward(mean, numpyro.prng_key()), 1), obs=y)
        return carry, None

    scan(row, None, y)


@pytest.mark.parametrize(
    ("model", "key_policy"),
    [
        (with_random_backward, "carried"),
        *(
            pytest.param(model, policy, marks=pytest.mark.slow)
            for model, policy in (
                (with_random_backward, "refreshed"),
                (with_random_backward, "shared"),
                (with_random_backward_in_a_loop, "shared"),
                (with_random_backward_in_a_loop, "carried"),
                (with_random_backward_in_a_loop, "refreshed"),
            )
        ),
    ],
)
def test_a_random_backward_pass_keeps_the_chain_exact(model, key_policy):
    mcmc = mcmc_of(Kernel(model, partial(probbp.mala, key_policy=key_policy)), num_samples=6_000)
    mcmc.run(jax.random.key(0), Y)
    assert_moments(az.from_numpyro(mcmc), MOMENTS)


@members([name for name in KERNELS if name != "mala"], quick=["fmala", "pc_line_fmala"])
def test_a_random_backward_pass_keeps_forward_samplers_exact(name):
    # At its usual rate, the best in many dimensions, fmala's carried slopes make it stick in two.
    kernel = Kernel(with_random_backward, KERNELS[name].algorithm, target_accept_prob=0.6)
    mcmc = mcmc_of(kernel, num_samples=6_000)
    mcmc.run(jax.random.key(0), Y)
    assert_moments(az.from_numpyro(mcmc), MOMENTS)


def estimates(kernel, num_samples=200):
    """Return positions and what the chain took for the gradient there."""
    mcmc = mcmc_of(kernel, num_warmup=0, num_samples=num_samples, num_chains=1)
    state = "algorithm_state.logdensity_grad"
    mcmc.run(jax.random.key(0), Y, extra_fields=(state,))
    return mcmc.get_samples()["mean"], mcmc.get_extra_fields()[state]["mean"]


def test_the_model_s_key_is_the_estimate_s():
    """At one and the same position different steps see different derivatives."""
    kernel = Kernel(with_random_backward, partial(probbp.mala, key_policy="refreshed"))
    mean, grad = estimates(kernel)
    true = jnp.sum(Y) - mean * len(Y) - mean / 4
    assert len(np.unique(np.round((grad + mean / 4) / (true + mean / 4), 8))) > 10


@pytest.mark.parametrize("chain_method", ["sequential", "vectorized"])
def test_a_model_whose_value_depends_on_the_key_is_refused(chain_method):
    def dropout(y):
        mean = numpyro.sample("mean", dist.Normal(0, 2))
        kept = jax.random.bernoulli(numpyro.prng_key(), 0.5, y.shape)
        numpyro.sample("y", dist.Normal(mean, 1).mask(kept), obs=y)

    with pytest.raises(ValueError, match="depends on its random key"):
        mcmc_of(Kernel(dropout, probbp.mala), chain_method=chain_method).run(jax.random.key(0), Y)


def seeded_inside(y):
    """The conjugate model with fixed shifts: the common random numbers of a simulator."""
    mean = numpyro.sample("mean", dist.Normal(0, 2))
    with seed(rng_seed=3):
        shift = jax.random.normal(numpyro.prng_key(), y.shape)

    def row(carry, y):
        return carry, jax.random.normal(numpyro.prng_key())

    with seed(rng_seed=4):
        _, other = scan(row, None, y)
    numpyro.sample("y", dist.Normal(mean + shift + other, 1), obs=y)


def subsampled_and_seeded_inside(y):
    """With rows of a plate that a handler inside the model has fixed once."""
    mean = numpyro.sample("mean", dist.Normal(0, 2))
    with seed(rng_seed=0), numpyro.plate("rows", len(y), subsample_size=2) as index:
        numpyro.sample("y", dist.Normal(mean, 1), obs=y[index])


@pytest.mark.parametrize("model", [seeded_inside, subsampled_and_seeded_inside])
def test_what_a_handler_inside_the_model_has_seeded_is_left_alone(model):
    """The log density is that of NumPyro's own samplers."""
    position = {"mean": jnp.array(0.3)}
    info = initialize_model(jax.random.key(0), model, model_args=(Y,))
    energy, grad = jax.value_and_grad(info.potential_fn)(position)
    state = Kernel(model, probbp.mala).init(jax.random.key(0), 0, position, (Y,), {})
    np.testing.assert_allclose(state.potential_energy, energy, rtol=1e-12)
    found = state.algorithm_state.logdensity_grad
    np.testing.assert_allclose(found["mean"], -grad["mean"], rtol=1e-12)


def test_subsampled_leaves_alone_what_is_seeded_inside_the_model():
    def model(y, subsample_size):
        mean = numpyro.sample("mean", dist.Normal(0, 2))
        with seed(rng_seed=3):
            shift = jax.random.normal(numpyro.prng_key(), y.shape)
        with seed(rng_seed=0), numpyro.plate("fixed", len(y), subsample_size=2) as index:
            numpyro.sample("x", dist.Normal(mean, 1), obs=y[index])
        with numpyro.plate("rows", len(y), subsample_size=subsample_size) as index:
            numpyro.sample("y", dist.Normal(mean + shift[index], 1), obs=y[index])

    parts = subsampled(jax.random.key(0), model, model_args=(Y, 2))
    assert set(parts.draw(jax.random.key(1)).rows) == {"rows"}
    position = {"mean": jnp.array(0.3)}
    info = initialize_model(jax.random.key(0), model, model_args=(Y, len(Y)))
    energy = info.potential_fn(position)
    np.testing.assert_allclose(parts.logdensity_fn(position), -energy, rtol=1e-12)


def with_a_wrong_derivative(y):
    """The conjugate model, differentiated as something else: a fixed field, and a wrong one."""
    mean = numpyro.sample("mean", dist.Normal(0, 2))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    seen = substitute(mean, 0.8 * mean + 0.1 * jnp.sin(3 * mean) + 0.1 * scale)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(seen, 1), obs=y)


@pytest.mark.parametrize(
    ("kernel", "forward_mode"),
    [
        (NUTS, False),
        pytest.param(NUTS, True, marks=pytest.mark.slow),
        pytest.param(partial(HMC, trajectory_length=1.5), False, marks=pytest.mark.slow),
        pytest.param(partial(HMC, trajectory_length=1.5), True, marks=pytest.mark.slow),
    ],
)
def test_numpyro_s_samplers_are_exact_with_a_wrong_derivative(kernel, forward_mode):
    kernel = kernel(with_a_wrong_derivative, forward_mode_differentiation=forward_mode)
    mcmc = mcmc_of(kernel, num_samples=6_000)
    mcmc.run(jax.random.key(0), Y)
    assert_moments(az.from_numpyro(mcmc), MOMENTS)


@pytest.mark.slow
def test_blackjax_s_nuts_is_exact_with_a_wrong_derivative():
    kernel = Kernel(with_a_wrong_derivative, blackjax.nuts, target_accept_prob=0.8)
    mcmc = mcmc_of(kernel, num_samples=3_000)
    mcmc.run(jax.random.key(0), Y)
    assert_moments(az.from_numpyro(mcmc), MOMENTS)


@pytest.mark.slow
def test_numpyro_s_samplers_hand_a_fixed_key_to_a_random_backward_pass():
    mcmc = mcmc_of(NUTS(with_random_backward), num_samples=3_000)
    mcmc.run(jax.random.key(0), Y)
    assert_moments(az.from_numpyro(mcmc), MOMENTS)


def test_svi_draws_a_fresh_key_at_every_step():
    """The estimates of one and the same gradient differ, and their mean is right."""

    def model(y):
        slope = numpyro.param("slope", 1.0)
        numpyro.factor("loss", random_unbiased(slope, numpyro.prng_key()))

    def random_unbiased(x, rng_key):
        return substitute(x, 2 * jax.random.bernoulli(rng_key) * x)

    svi = SVI(model, lambda y: None, Optim(optax.sgd(1.0), reverse()), Trace_ELBO())
    state, losses = svi.init(jax.random.key(0), Y), []
    for _ in range(200):
        before = svi.get_params(state)["slope"]
        state, _ = svi.update(state, Y)
        losses.append(float(svi.get_params(state)["slope"] - before))
    assert set(np.round(losses, 6)) == {0.0, 2.0}
    assert abs(np.mean(losses) - 1) < 4.5 / np.sqrt(200)


# ---------------------------------------------------------------------------------------
# SVI.

ROWS = jnp.linspace(-1, 1, 40)


def network_model(x, y):
    """Constrained parameters, a subsampling plate, and a Flax network with a mutable count."""
    network = nnx_module("network", NETWORK)
    noise = numpyro.param("noise", 0.5, constraint=constraints.positive)
    weight = numpyro.sample("weight", dist.Normal(0, 1))
    with numpyro.plate("rows", len(x), subsample_size=10) as index:
        mean = network(x[index][:, None])[:, 0] + weight
        numpyro.sample("y", dist.Normal(mean, noise), obs=y[index])


class Network(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(1, 4, rngs=rngs)
        self.outer = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.outer(jnp.tanh(self.inner(x)))


NETWORK = Network(nnx.Rngs(0))


def network_guide(x, y):
    loc = numpyro.param("loc", 0.3)
    scale = numpyro.param("scale", 0.1, constraint=constraints.interval(0.01, 2.0))
    numpyro.sample("weight", dist.Normal(loc, scale))


@pytest.mark.optimised  # without, the two programs may round apart
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"stable_update": True}, marks=pytest.mark.slow),
        pytest.param({"progress_bar": True}, marks=pytest.mark.slow),
    ],
)
def test_with_the_exact_gradient_it_is_plain_optax_bit_for_bit(options):
    y = jnp.sin(3 * ROWS)
    transformation = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(1e-2))
    plain, ours = (
        SVI(network_model, network_guide, optim, Trace_ELBO()).run(
            jax.random.key(0), 200, ROWS, y, **{"progress_bar": False} | options
        )
        for optim in (transformation, Optim(transformation, reverse()))
    )
    np.testing.assert_array_equal(plain.losses, ours.losses)
    jax.tree.map(np.testing.assert_array_equal, plain.params, ours.params)
    assert plain.losses[-20:].mean() < plain.losses[:20].mean()


# name -> (estimator, whether its gradient hangs on its key)
SVI_ESTIMATORS = {
    "reverse": (reverse(), False),
    "forward": (forward(num_tangents=4), True),
    "forward, in batches": (forward(num_tangents=4, batch_size=1), True),
    "all directions": (forward(num_tangents=4, tangents="orthogonal"), False),
    "through": (through(optax.scale(1.0), forward(num_tangents=8)), True),
}


@members(SVI_ESTIMATORS, quick=["forward"])
def test_svi_finds_a_conjugate_posterior(name):
    """The guide of `scale` is a normal on the log scale; that of `mean` holds the posterior."""
    estimator, _ = SVI_ESTIMATORS[name]
    optim = Optim(optax.adam(optax.cosine_decay_schedule(0.03, 4_000)), estimator)
    svi = SVI(conjugate, AutoNormal(conjugate), optim, Trace_ELBO(num_particles=4))
    params = svi.run(jax.random.key(0), 4_000, Y, progress_bar=False).params
    mean, variance = MOMENTS["mean"]
    assert abs(params["mean_auto_loc"] - mean) < 0.1 * np.sqrt(variance)
    assert abs(params["mean_auto_scale"] / np.sqrt(variance) - 1) < 0.1


@members(SVI_ESTIMATORS, quick=["forward", "all directions"])
def test_the_key_can_be_set_and_moves_on(name):
    estimator, is_random = SVI_ESTIMATORS[name]

    def losses(**options):
        optim = Optim(optax.sgd(1e-3), estimator, **options)
        svi = SVI(conjugate, AutoNormal(conjugate), optim, Trace_ELBO())
        result = svi.run(jax.random.key(0), 10, Y, progress_bar=False)
        return result.losses, result.state

    first, state = losses()
    np.testing.assert_array_equal(first, losses()[0])
    other, _ = losses(rng_key=jax.random.key(1))
    assert is_random == (not np.allclose(first[1:], other[1:], rtol=1e-10))
    step, optim_state = state.optim_state
    assert step == 10
    assert jnp.any(
        jax.random.key_data(optim_state.rng_key) != jax.random.key_data(jax.random.key(0))
    )


@pytest.mark.slow
def test_what_remembers_belongs_in_the_transformation():
    """A stateless transformation may stand on either side."""
    results = [
        SVI(conjugate, AutoNormal(conjugate), optim, Trace_ELBO()).run(
            jax.random.key(0), 50, Y, progress_bar=False
        )
        for optim in (
            Optim(optax.sgd(1e-2), through(optax.clip(0.5), forward())),
            Optim(optax.chain(optax.clip(0.5), optax.sgd(1e-2)), forward()),
        )
    ]
    np.testing.assert_array_equal(results[0].losses, results[1].losses)


def test_mutable_state_passes():
    """A batch norm keeps its running mean, and the losses are those of plain Optax."""
    module = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
    x = (ROWS + 3).astype("float32")

    def model(x):
        norm = nnx_module("norm", module)
        numpyro.sample("y", dist.Normal(norm(x[:, None])[:, 0], 1).to_event(1), obs=x)

    def run(optim):
        svi = SVI(model, lambda x: None, optim, Trace_ELBO())
        return svi.run(jax.random.key(0), 300, x, progress_bar=False)

    plain, ours = run(optax.sgd(1e-3)), run(Optim(optax.sgd(1e-3), reverse()))
    np.testing.assert_array_equal(plain.losses, ours.losses)
    jax.tree.map(np.testing.assert_array_equal, plain.state.mutable_state, ours.state.mutable_state)
    state = run(Optim(optax.sgd(1e-3), forward())).state.mutable_state
    means = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (1,)]
    assert any(abs(leaf[0] - 3) < 0.2 for leaf in means)


def test_a_loss_that_is_no_number_moves_only_the_key():
    def model(y):
        scale = numpyro.param("scale", -1.0)  # a bug of the user's: its logarithm is NaN
        numpyro.factor("f", jnp.log(scale) + y.sum())

    optim = Optim(optax.adam(0.1), forward())
    svi = SVI(model, lambda y: None, optim, Trace_ELBO())
    before = svi.init(jax.random.key(0), Y)
    after, loss = jax.jit(svi.stable_update)(before, Y)
    assert jnp.isnan(loss)
    np.testing.assert_array_equal(svi.get_params(after)["scale"], -1.0)
    assert after.optim_state[1].rng_key != before.optim_state[1].rng_key


@pytest.mark.parametrize("elbo", [Trace_ELBO(num_particles=3), RenyiELBO(num_particles=3)])
def test_a_model_that_reverse_mode_refuses_is_fitted(elbo):
    def model(y):
        mean = numpyro.sample("mean", dist.Normal(0, 2))
        # Halved until it is small: the number of turns is known at run time only.
        small = jax.lax.while_loop(lambda m: jnp.abs(m) > 1e-3, lambda m: m / 2, mean)
        turns = stop(jnp.where(small == 0, 1.0, mean / jnp.where(small == 0, 1.0, small)))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(small * turns, 1), obs=y)

    stop = jax.lax.stop_gradient
    guide = AutoNormal(model, forward_mode_differentiation=True)  # how it looks for a start
    svi = SVI(model, guide, Optim(optax.adam(0.02), forward(2)), elbo)
    params = svi.run(jax.random.key(0), 2_000, Y, progress_bar=False).params
    assert abs(params["mean_auto_loc"] - MOMENTS["mean"][0]) < 0.25


@pytest.mark.parametrize(
    ("algorithm", "options", "chain_method"),
    [
        (probbp.mala, {}, "sequential"),
        (probbp.mala, {}, "vectorized"),
        (blackjax.mala, {"metric": None, "target_accept_prob": 0.6}, "vectorized"),
        (probbp.surrogate, {}, "vectorized"),
    ],
)
@pytest.mark.filterwarnings("ignore:Out-of-support:UserWarning")  # of one chain, NumPyro's
def test_a_chain_that_starts_where_the_log_density_is_no_number_is_refused(
    algorithm, options, chain_method
):
    model = lambda: numpyro.sample("a", dist.Normal(0, 1))
    start = {"a": jnp.array([0.0, jnp.nan])}
    mcmc = mcmc_of(Kernel(model, algorithm, **options), 20, 20, chain_method=chain_method)
    with pytest.raises(ValueError, match="The log density at the start is .*a chain can't leave"):
        mcmc.run(jax.random.key(0), init_params=start)


def no_sites(y):
    numpyro.sample("y", dist.Normal(0, 1).expand([len(y)]).to_event(1), obs=y)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: Kernel(), "either a model or a potential_fn"),
        (lambda: Kernel(conjugate, probbp.mala, potential_fn=jnp.sum), "either a model or a"),
        (lambda: Kernel(conjugate), "an algorithm, such as"),
        (lambda: Kernel(conjugate, blackjax.nuts), "as target_accept_prob to Kernel"),
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


TWO = {"a": jnp.zeros(3), "b": jnp.zeros((3, 2))}
STARTS = {
    "a site is missing": ({"a": TWO["a"]}, r"latent sites \['a', 'b'\], got \['a'\]"),
    "one too many": (TWO | {"c": TWO["a"]}, r"latent sites \['a', 'b'\], got \['a', 'b', 'c'\]"),
    "no dictionary": (TWO["a"], r"latent sites \['a', 'b'\], got [A-Za-z]*Array"),
    "another shape": (TWO | {"b": jnp.zeros((3, 4))}, r"init_params\['b'\] must have the shape"),
    "one start": (TWO | {"b": jnp.zeros((1, 2))}, r"init_params\['b'\] .* \(3, 2\).*got \(1, 2\)"),
}


@members(STARTS)
def test_starts_that_are_not_those_of_the_model_s_sites(name):
    def model():
        numpyro.sample("a", dist.Normal(0, 1))
        numpyro.sample("b", dist.Normal(0, 1).expand([2]).to_event(1))

    start, words = STARTS[name]
    with pytest.raises(ValueError, match=words):
        mcmc_of(Kernel(model, probbp.mala), 5, 5, 3).run(jax.random.key(0), init_params=start)
    if jnp.shape(jax.tree.leaves(start)[-1])[0] == 3:
        one = jax.tree.map(lambda leaf: leaf[0], start)
        with pytest.raises(ValueError, match=words):
            mcmc_of(Kernel(model, probbp.mala), 5, 5, 1).run(jax.random.key(0), init_params=one)


def test_a_potential_needs_a_start_for_each_chain():
    kernel = Kernel(potential_fn=lambda x: sum(map(jnp.sum, x)), algorithm=probbp.mala)
    starts = (jnp.zeros(3), jnp.zeros((1, 3)))
    with pytest.raises(ValueError, match=r"init_params\[1\] .* 3 along the first axis"):
        mcmc_of(kernel, 5, 5, 3).run(jax.random.key(0), init_params=starts)


@pytest.mark.parametrize(
    ("estimator", "words"),
    [
        ("forward", "estimator must be a function, got 'forward'.*such as reverse"),
        (reverse, r"estimator must be an estimator, got reverse\. .*such as reverse\(\)"),
        (averaged, "estimator must be an estimator, got averaged"),
    ],
)
def test_what_is_no_estimator(estimator, words):
    doors = (
        lambda: probbp.mala(jnp.sum, 0.1, estimator=estimator),
        lambda: Optim(optax.sgd(0.1), estimator),
        lambda: subsampled(jax.random.key(0), conjugate, estimator=estimator),
    )
    for door in doors:
        with pytest.raises(TypeError, match=words):
            door()


def test_bad_input_of_optim():
    with pytest.raises(TypeError, match=r"optax\.adam\(1e-2\), got an object of type Adam"):
        Optim(numpyro.optim.Adam(0.1), reverse())
    svi = SVI(conjugate, AutoNormal(conjugate), Optim(optax.sgd(0.1), reverse()), Trace_ELBO())
    with pytest.raises(ValueError, match="leave forward_mode_differentiation out"):
        svi.run(jax.random.key(0), 2, Y, progress_bar=False, forward_mode_differentiation=True)
