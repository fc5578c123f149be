"""Mini-batches from NumPyro's plates: unbiased; exact where said so, elsewhere off as said."""

import itertools
from functools import cache, partial
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from invariance import PASS, paired_z
from jax.flatten_util import ravel_pytree
from numpyro.contrib.control_flow import scan
from numpyro.infer import MCMC
from numpyro.infer.util import potential_energy

import probbp
from probbp.estimators import forward
from probbp.numpyro import Kernel, Minibatch, subsampled
from probbp.ops import substitute

N = 5
X = jnp.array([[0.3, -1.0], [1.2, 0.4], [-0.7, 0.9], [0.1, 0.2], [2.0, -0.5]])
Y = jnp.array([1.2, -0.3, 0.8, 2.1, 0.4])
TABLE = jnp.linspace(-1, 2, 15).reshape(N, 3)


# ---------------------------------------------------------------------------------------
# Unbiased, by enumeration: the mean over all single rows is the model without subsampling.


def by_index(n):
    """Constrained sites: the log Jacobians must count once."""
    scale = numpyro.sample("scale", dist.HalfCauchy(1))
    weights = numpyro.sample("weights", dist.Dirichlet(jnp.array([2.0, 3.0])))
    with numpyro.plate("rows", N, subsample_size=n) as index:
        numpyro.sample("y", dist.Normal(X[index] @ weights, scale), obs=Y[index])


def by_subsample(n):
    mean = numpyro.sample("mean", dist.Normal(jnp.zeros(2), 3).to_event(1))
    with numpyro.plate("rows", N, subsample_size=n):
        x = numpyro.subsample(X, event_dim=1)
        numpyro.sample("x", dist.MultivariateNormal(mean, jnp.eye(2) + 0.2), obs=x)


def inside_a_whole_plate(n):
    with numpyro.plate("columns", 3, dim=-1):
        mean = numpyro.sample("mean", dist.Normal(0, 1))
    with (
        numpyro.plate("rows", N, subsample_size=n, dim=-2) as index,
        numpyro.plate("columns", 3, dim=-1),
    ):
        numpyro.sample("y", dist.StudentT(4.0, mean, 1), obs=TABLE[index])


def nested(n):
    mean = numpyro.sample("mean", dist.Normal(0, 1))
    with numpyro.plate("rows", N, subsample_size=n, dim=-2) as i:
        numpyro.sample("margin", dist.Normal(mean, 1), obs=Y[i][:, None])
        with numpyro.plate("columns", 3, subsample_size=n, dim=-1) as j:
            numpyro.sample("y", dist.Normal(mean, 2), obs=TABLE[i][:, j])


def two_tables(n):
    mean = numpyro.sample("mean", dist.Normal(0, 1))
    with numpyro.plate("rows", N, subsample_size=n) as i:
        numpyro.sample("y", dist.Normal(mean, 1), obs=Y[i])
    with numpyro.plate("others", 3, subsample_size=n) as j:
        numpyro.sample("z", dist.Normal(mean**2, 1), obs=TABLE[0][j])


def scaled_factor(n):
    """A factor inside the plate, a tempered likelihood, and a prior that is a factor."""
    rate = numpyro.sample("rate", dist.ImproperUniform(dist.constraints.positive, (), ()))
    numpyro.factor("prior", -rate)
    with numpyro.plate("rows", N, subsample_size=n) as index, numpyro.handlers.scale(scale=0.3):
        numpyro.factor("row", -jnp.cosh(rate * Y[index]))


def groups(n):
    """Latents of a plate that is whole, looked up by the rows."""
    with numpyro.plate("groups", 3):
        level = numpyro.sample("level", dist.Normal(0, 1))
    group = jnp.array([0, 1, 2, 0, 1])
    with numpyro.plate("rows", N, subsample_size=n) as index:
        numpyro.sample("y", dist.Normal(level[group[index]], 1), obs=Y[index])


SIZES = {"rows": N, "columns": 3, "others": 3}


def every_row(plates):
    """Every mini-batch of one row a plate, on a new leading axis."""
    table = list(itertools.product(*(range(SIZES[name]) for name in plates)))
    columns = jnp.asarray(table).T[:, :, None]
    keys = jax.random.split(jax.random.key(1), len(table))
    return Minibatch(dict(zip(plates, columns, strict=True)), keys)


@pytest.mark.parametrize(
    "model",
    [
        *(by_index, nested),
        *(
            pytest.param(model, marks=pytest.mark.slow)
            for model in (by_subsample, two_tables, inside_a_whole_plate, scaled_factor, groups)
        ),
    ],
)
def test_the_mean_over_all_rows_is_the_model_without_subsampling(model):
    @jax.jit
    def evaluate():
        parts = subsampled(jax.random.key(0), model, model_args=(1,))
        # All at once, and in blocks that don't divide the table.
        blocks = subsampled(jax.random.key(0), model, model_args=(1,), batch_size=2)
        z = parts.position
        rows = every_row(parts.draw(jax.random.key(0)).rows)
        over = partial(jax.vmap, in_axes=(None, 0))
        exact = [jax.value_and_grad(lambda z: -potential_energy(model, (None,), {}, z))(z)]
        keyed = []
        for fun in (parts.logdensity_fn, blocks.logdensity_fn):
            exact.append(jax.value_and_grad(fun)(z))
            keyed.append(jax.value_and_grad(fun)(z, jax.random.key(2)))
        flat = [(value, ravel_pytree(grad)[0]) for value, grad in exact + keyed]
        values = over(parts.minibatch_logdensity_fn)(z, rows)
        grads = over(lambda z, b: ravel_pytree(parts.grad_estimator(z, b))[0])(z, rows)
        return values, grads, flat

    values, grads, ((value, grad), *others) = evaluate()
    np.testing.assert_allclose(values.mean(), value, rtol=1e-12)
    np.testing.assert_allclose(grads.mean(0), grad, rtol=1e-10, atol=1e-12)
    assert np.ptp(values) > 1e-3  # no row is all rows
    for other, _ in others:
        np.testing.assert_allclose(other, value, rtol=1e-12)
    for _, slope in others[:2]:
        np.testing.assert_allclose(slope, grad, rtol=1e-10, atol=1e-12)
    for _, slope in others[2:]:  # with a key: the gradient of one mini-batch
        assert np.abs(grads - slope).max(1).min() < 1e-10


def test_all_rows_are_the_limit():
    parts = conjugate_parts()
    gradient = jax.jit(parts.grad_estimator)
    exact = jax.jit(jax.grad(parts.logdensity_fn))(parts.position)["mean"]
    for minibatch in (parts.all_rows, Minibatch({"rows": jnp.arange(40)}, jax.random.key(0))):
        np.testing.assert_allclose(gradient(parts.position, minibatch)["mean"], exact, rtol=1e-12)


def test_drawn_rows_are_unbiased():
    """z-tests over keys: of the rows that are drawn, and of gradients through an estimator."""
    estimator = forward(num_tangents=2)
    parts = subsampled(jax.random.key(0), nested, model_args=(2,), estimator=estimator)
    exact = jax.jit(jax.grad(parts.logdensity_fn))(parts.position)["mean"]
    minibatches = jax.vmap(parts.draw)(jax.random.split(jax.random.key(1), 20_000))
    grads = jax.jit(jax.vmap(parts.grad_estimator, in_axes=(None, 0)))(parts.position, minibatches)
    grads = np.asarray(grads["mean"])
    assert abs(grads.mean() - exact) < PASS * grads.std() / np.sqrt(len(grads))
    drawn: Any = minibatches.rows
    for name, rows in drawn.items():
        share = np.bincount(np.ravel(rows), minlength=SIZES[name]) / rows.size
        error = np.sqrt(1 / SIZES[name] / rows.size)
        assert np.abs(share - 1 / SIZES[name]).max() < PASS * error


# ---------------------------------------------------------------------------------------
# Exact: chains that start at exact draws keep their law.

DATA = jnp.asarray(np.random.default_rng(0).normal(1.0, 1.5, 40))


def conjugate(y, n=None):
    """The posterior of the mean is N(sum(y) / (N + 1/4), 1 / (N + 1/4))."""
    mean = numpyro.sample("mean", dist.Normal(0, 2))
    with numpyro.plate("rows", len(y), subsample_size=n) as index:
        numpyro.deterministic("residual", y[index] - mean)
        numpyro.sample("y", dist.Normal(mean, 1), obs=y[index])


@cache
def conjugate_parts():
    return subsampled(jax.random.key(0), conjugate, model_args=(DATA, 8))


def controlled():
    """The gradient with BlackJAX's control variates."""
    parts = conjugate_parts()
    centre = {"mean": jnp.array(0.5)}
    return blackjax.sgmcmc.gradients.control_variates(parts.grad_estimator, centre, parts.all_rows)


PRECISION = len(DATA) + 0.25
CENTRE = float(DATA.sum()) / PRECISION
STATISTICS = {
    "x": lambda z: z,
    "x^2": lambda z: z**2,
    "low": lambda z: z < -0.5,
    "far": lambda z: abs(z) > 1.5,
}


def drift(name, parts):
    """A log density with all rows' value and the gradient that is named."""
    return {
        "mini-batch": parts.logdensity_fn,
        "control variates": parts.with_gradient(controlled()),
        "wrong": parts.with_gradient(
            lambda z, b: jax.tree.map(lambda g: 3 - 0.5 * g, parts.grad_estimator(z, b))
        ),
    }[name]


def kept(logdensity_fn, num_chains=20_000, num_steps=8, step_size=0.02, **options):
    """The largest z of chains from exact draws, and their rate of acceptance."""
    algorithm = probbp.mala(logdensity_fn, step_size, **options)
    key_start, key_init, key_steps = jax.random.split(jax.random.key(0), 3)
    first = CENTRE + jax.random.normal(key_start, (num_chains,)) / PRECISION**0.5

    def chain(position, key_init, key_steps):
        state = algorithm.init({"mean": position}, key_init)
        keys = jax.random.split(key_steps, num_steps)
        state, infos = jax.lax.scan(lambda s, k: algorithm.step(k, s), state, keys)
        return state.position["mean"], infos.acceptance_rate.mean()

    split = partial(jax.random.split, num=num_chains)
    last, rate = jax.jit(jax.vmap(chain))(first, split(key_init), split(key_steps))
    white = [(z - CENTRE) * PRECISION**0.5 for z in (first, last)]
    return max(map(abs, paired_z(STATISTICS, *white).values())), float(rate.mean())


@pytest.mark.parametrize(
    ("name", "key_policy"),
    [
        ("mini-batch", "carried"),
        pytest.param("mini-batch", "shared", marks=pytest.mark.slow),
        ("control variates", "carried"),
        pytest.param("wrong", "carried", marks=pytest.mark.slow),
    ],
)
def test_mala_keeps_the_posterior(name, key_policy):
    parts = conjugate_parts()
    z, rate = kept(drift(name, parts), key_policy=key_policy)
    assert z < PASS
    assert 0.1 < rate < 0.99


def test_the_test_of_exactness_sees_a_mini_batch_in_the_accept_ratio():
    parts = conjugate_parts()

    def noisy(position, rng_key):
        return parts.minibatch_logdensity_fn(position, parts.draw(rng_key))

    def init_unchecked(position, rng_key):  # mala.init refuses it
        value, grad = jax.value_and_grad(noisy)(position, rng_key)
        return blackjax.mcmc.mala.MALAState(position, value, grad)

    with pytest.raises(ValueError, match="depends on its random key"):
        probbp.mala(noisy, 0.02).init(parts.position)
    kernel = probbp.mala.build_kernel()
    step = lambda key, state: kernel(key, state, noisy, 0.02)
    first = CENTRE + jax.random.normal(jax.random.key(0), (5_000,)) / PRECISION**0.5

    def chain(position, rng_key):
        state = init_unchecked({"mean": position}, rng_key)
        keys = jax.random.split(rng_key, 8)
        return jax.lax.scan(lambda s, k: (step(k, s)[0], None), state, keys)[0].position["mean"]

    last = jax.jit(jax.vmap(chain))(first, jax.random.split(jax.random.key(1), 5_000))
    white = [(z - CENTRE) * PRECISION**0.5 for z in (first, last)]
    assert max(map(abs, paired_z(STATISTICS, *white).values())) > 6


def test_control_variates_take_the_variance():
    """Here all rows have one curvature: with control variates nothing is left of it."""
    parts = conjugate_parts()
    minibatches = jax.vmap(parts.draw)(jax.random.split(jax.random.key(1), 200))
    over = lambda fun: jax.jit(jax.vmap(fun, in_axes=(None, 0)))
    grads = over(parts.grad_estimator)(parts.position, minibatches)["mean"]
    rest = over(controlled())(parts.position, minibatches)["mean"]
    exact = jax.grad(parts.logdensity_fn)(parts.position)["mean"]
    np.testing.assert_allclose(rest, exact, rtol=1e-12)
    assert np.std(grads) > 1


def test_with_gradient_has_that_gradient_and_no_other():
    parts = conjugate_parts()
    other = parts.with_gradient(lambda z, minibatch: jax.tree.map(lambda x: x + 7, z))
    value_and_grad = jax.jit(jax.value_and_grad(other))
    (exact, slope), (value, grad) = (
        value_and_grad(parts.position, *key) for key in ((), (jax.random.key(1),))
    )
    np.testing.assert_allclose(value, exact, rtol=1e-14)
    np.testing.assert_allclose(exact, parts.logdensity_fn(parts.position), rtol=1e-12)
    np.testing.assert_allclose(grad["mean"], parts.position["mean"] + 7, rtol=1e-14)
    mean = parts.position["mean"]
    np.testing.assert_allclose(slope["mean"], -PRECISION * (mean - CENTRE), rtol=1e-12)


def moments_within_error(draws):
    """Chains (chains, draws) have the posterior's moments, by the error between chains."""
    white = (np.asarray(draws) - CENTRE) * PRECISION**0.5
    for values, truth in ((white, 0.0), (white**2, 1.0)):
        means = values.mean(1)
        assert abs(means.mean() - truth) < PASS * means.std(ddof=1) / np.sqrt(len(means))


def run_mcmc(kernel, *args, num_chains=40, num_samples=400, num_warmup=300, **run):
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), *args, **run)
    return mcmc.get_samples(group_by_chain=True)


def test_kernel_takes_plates_that_subsample():
    kernel = Kernel(conjugate, probbp.mala, batch_size=7, metric=None)
    samples = run_mcmc(kernel, DATA, 8)
    moments_within_error(samples["mean"])
    # Deterministic sites are those of all rows.
    expected = DATA - samples["mean"][..., None]
    np.testing.assert_allclose(samples["residual"], expected, atol=1e-12)


def test_an_algorithm_without_keys_has_the_gradient_of_all_rows():
    kernel = Kernel(conjugate, blackjax.mala, target_accept_prob=0.57, metric=None)
    some, every = (
        run_mcmc(kernel, DATA, n, num_chains=1, num_samples=20, num_warmup=20) for n in (8, None)
    )
    np.testing.assert_allclose(some["mean"], every["mean"], rtol=1e-9)


def test_kernel_draws_a_mini_batch_each_step():
    """At one position, the gradients in the chain's state are those of many mini-batches."""
    kernel = Kernel(conjugate, partial(probbp.mala, key_policy="refreshed"), step_size=0.02)
    mcmc = MCMC(kernel, num_warmup=0, num_samples=200, progress_bar=False)
    field = "algorithm_state.logdensity_grad"
    mcmc.run(jax.random.key(0), DATA, 4, extra_fields=(field,))
    mean = np.asarray(mcmc.get_samples()["mean"])
    noise = np.asarray(mcmc.get_extra_fields()[field]["mean"]) + PRECISION * (mean - CENTRE)
    sd = len(DATA) * float(DATA.std()) / 2  # of N / n times a sum of n = 4 rows
    assert len(np.unique(noise.round(6))) > 20
    assert 0.5 < noise.std() / sd < 1.5


@pytest.mark.slow
def test_probbp_sample():
    parts = conjugate_parts()
    data = probbp.sample(
        jax.random.key(0),
        partial(probbp.mala, parts.logdensity_fn),
        parts.position,
        num_warmup=320,
        num_samples=400,
        num_chains=40,
        metric=None,
        postprocess_fn=parts.constrain_fn,
        progress_bar=False,
    )
    moments_within_error(data["posterior"]["mean"].values)
    assert data["posterior"]["residual"].shape == (40, 400, len(DATA))


# ---------------------------------------------------------------------------------------
# Not exact: BlackJAX's stochastic-gradient samplers.


def sg_variances(algorithm, init, step_sizes, num_chains=1_500, num_steps=60):
    """Yield the mean square about the posterior's centre over its variance, and its error."""
    parts = conjugate_parts()

    def chain(rng_key, step_size):
        key_init, key_steps = jax.random.split(rng_key)

        def body(state, rng_key):
            key_draw, key_step = jax.random.split(rng_key)
            state = algorithm.step(key_step, state, parts.draw(key_draw), step_size)
            return state, getattr(state, "position", state)["mean"]

        keys = jax.random.split(key_steps, num_steps)
        draws = jax.lax.scan(body, init({"mean": jnp.array(CENTRE)}, key_init), keys)[1]
        return draws[num_steps // 2 :]

    run = jax.jit(jax.vmap(chain, in_axes=(0, None)))
    for step_size in step_sizes:
        draws = run(jax.random.split(jax.random.key(0), num_chains), step_size)
        white = (np.asarray(draws) - CENTRE) * PRECISION**0.5
        squares, means = (white**2).mean(1), white.mean(1)
        # A gradient that is linear in the rows has no bias in the mean.
        assert abs(means.mean()) < PASS * means.std() / np.sqrt(num_chains)
        yield squares.mean(), squares.std(ddof=1) / np.sqrt(num_chains)


def plain_init(position, rng_key):
    return position


@pytest.mark.slow
def test_sgld_is_off_by_its_step_size():
    """The variance of x' = x + h g + sqrt(2 h) z is off by h (V + P) / 2 to first order.

    With a gradient of slope -P and variance V it is (2 + h V) / (P (2 - h P)).
    """
    parts = conjugate_parts()
    noise = len(DATA) ** 2 * float(DATA.var()) / 8
    step_sizes = (0.003, 0.006, 0.012)
    found = {}
    for gradient, v in ((parts.grad_estimator, noise), (controlled(), 0.0)):
        values = sg_variances(blackjax.sgld(gradient), plain_init, step_sizes)
        for h, (value, error) in zip(step_sizes, values, strict=True):
            expected = (2 + h * v) / (2 - h * PRECISION)
            assert abs(value - expected) < PASS * error, (h, v)
            found[h, v] = value
    assert 1.4 < found[0.003, noise] < found[0.006, noise] < found[0.012, noise]
    assert found[0.003, 0.0] < 1.2


def sghmc(gradient, density):
    return blackjax.sghmc(gradient, num_integration_steps=3, alpha=1.0)


def sgnht(gradient, density):
    algorithm = blackjax.sgnht(gradient, alpha=5.0)
    return algorithm._replace(init=lambda x: algorithm.init(x, jax.random.key(0)))


def csgld(gradient, density):
    algorithm = blackjax.csgld(density, gradient)
    return algorithm._replace(
        init=lambda x: algorithm.init(x)._replace(energy_idx=jnp.array(511, jnp.int32)),
        step=partial(algorithm.step, step_size_stoch=1e-3),
    )


@pytest.mark.parametrize(
    "build", [sghmc, *(pytest.param(other, marks=pytest.mark.slow) for other in (sgnht, csgld))]
)
def test_the_other_samplers_take_the_gradient(build):
    """With these control variates it is the exact one, and so are the draws."""
    parts = conjugate_parts()

    def true_gradient(z, minibatch):
        return jax.tree.map(lambda x: -PRECISION * (x - CENTRE), z)

    def draws(gradient):
        algorithm = build(gradient, parts.minibatch_logdensity_fn)

        def body(state, rng_key):
            key_draw, key_step = jax.random.split(rng_key)
            state = algorithm.step(key_step, state, parts.draw(key_draw), 0.01)
            return state, getattr(state, "position", state)["mean"]

        keys = jax.random.split(jax.random.key(1), 30)
        return jax.jit(lambda x: jax.lax.scan(body, algorithm.init(x), keys)[1])(parts.position)

    ours = draws(controlled())
    np.testing.assert_allclose(ours, draws(true_gradient), rtol=1e-9)
    assert np.std(ours) > 0.02


# ---------------------------------------------------------------------------------------
# Hosts: precision, keys, programs, memory.


def test_single_precision_and_keys_of_the_old_style():
    with jax.enable_x64(False):
        data, key = jnp.asarray(DATA, jnp.float32), jax.random.PRNGKey(0)

        @jax.jit
        def evaluate(data):
            parts = subsampled(key, conjugate, model_args=(data, 8), batch_size=16)
            noisy = parts.grad_estimator(parts.position, parts.draw(key))
            return (
                parts.position,
                jax.value_and_grad(parts.logdensity_fn)(parts.position, key),
                noisy,
            )

        position, (value, grad), noisy = evaluate(data)
        assert value.dtype == grad["mean"].dtype == noisy["mean"].dtype == jnp.float32
        mean = float(position["mean"])
        exact = -np.sum((np.asarray(DATA) - mean) ** 2) / 2 - len(DATA) / 2 * np.log(2 * np.pi)
        exact += -(mean**2) / 8 - np.log(8 * np.pi) / 2
        np.testing.assert_allclose(value, exact, rtol=1e-5)


def test_the_value_does_not_hang_on_the_key():
    """To the bit, and where a mini-batch alone is not finite."""
    parts = conjugate_parts()
    keys = jax.random.split(jax.random.key(1), 50)
    values = jax.jit(jax.vmap(parts.logdensity_fn, in_axes=(None, 0)))(parts.position, keys)
    assert len(np.unique(values)) == 1

    def one_bad_row(n):
        mean = numpyro.sample("mean", dist.Normal(0, 1))
        with numpyro.plate("rows", N, subsample_size=n) as index:
            numpyro.factor("row", jnp.where((index == 3) & (mean > 5), -jnp.inf, -(mean**2)))

    parts = subsampled(jax.random.key(0), one_bad_row, model_args=(2,))
    values = jax.jit(jax.vmap(parts.logdensity_fn, in_axes=(None, 0)))(
        {"mean": jnp.array(6.0)}, keys
    )
    assert np.all(values == -np.inf)


@pytest.mark.slow
def test_data_may_be_an_argument():
    """Inside a compiled function the data are its argument, and no constant of the program."""
    data = jnp.asarray(np.random.default_rng(1).normal(size=50_000))

    def step(data):
        parts = subsampled(jax.random.key(0), conjugate, model_args=(data, 8))
        mala = probbp.mala(parts.logdensity_fn, 1e-3)
        position = {"mean": jnp.array(0.1)}
        sgld = blackjax.sgld(parts.grad_estimator)
        batch = parts.draw(jax.random.key(3))
        return (
            mala.step(jax.random.key(1), mala.init(position, jax.random.key(2)))[0].position,
            sgld.step(jax.random.key(4), position, batch, 1e-6),
        )

    compiled = jax.jit(step)
    assert len(compiled.lower(data).as_text()) < 200_000
    for inside, outside in zip(compiled(data), step(data), strict=True):
        np.testing.assert_allclose(inside["mean"], outside["mean"], rtol=1e-9)


def test_a_batch_size_bounds_the_memory():
    x = jnp.linspace(-1, 1, 4_000)

    def wide(x, n):
        weights = numpyro.sample("weights", dist.Normal(0, 1).expand([200]).to_event(1))
        with numpyro.plate("rows", len(x), subsample_size=n) as index:
            hidden = jnp.tanh(x[index][:, None] * weights)
            numpyro.sample("y", dist.Normal(hidden @ weights, 1), obs=x[index])

    every, blocks = (
        subsampled(jax.random.key(0), wide, model_args=(x, 40), batch_size=size)
        for size in (None, 50)
    )

    def buffers(parts, *key):
        compiled = jax.jit(jax.value_and_grad(parts.logdensity_fn)).lower(parts.position, *key)
        analysis: Any = compiled.compile().memory_analysis()
        return analysis.temp_size_in_bytes

    for key in ((), (jax.random.key(0),)):
        assert buffers(blocks, *key) < 0.2 * buffers(every, *key)


def random_backward(n):
    """An operation of the model draws its derivative, besides the rows."""
    mean = numpyro.sample("mean", dist.Normal(0, 2))
    scale = jax.random.uniform(numpyro.prng_key(), minval=-0.5, maxval=2.0)
    seen = substitute(mean, scale * mean)
    with numpyro.plate("rows", N, subsample_size=n) as index:
        numpyro.sample("y", dist.Normal(seen, 1), obs=Y[index])


def test_keys_of_the_model_hang_on_the_mini_batch_s():
    parts = subsampled(jax.random.key(0), random_backward, model_args=(2,))
    rows = {"rows": jnp.array([0, 3])}
    keys = jax.random.split(jax.random.key(1), 20)
    one = lambda key: parts.grad_estimator(parts.position, Minibatch(rows, key))
    grads = jax.jit(jax.vmap(one))(keys)
    values = jax.jit(jax.vmap(parts.logdensity_fn, in_axes=(None, 0)))(parts.position, keys)
    assert len(np.unique(grads["mean"])) == 20
    assert len(np.unique(values)) == 1


# ---------------------------------------------------------------------------------------
# What is refused, and the way out.


def no_plate(n):
    mean = numpyro.sample("mean", dist.Normal(0, 1))
    with numpyro.plate("rows", N):
        numpyro.sample("y", dist.Normal(mean, 1), obs=Y)


def plate_in_a_loop(n):
    mean = numpyro.sample("mean", dist.Normal(0, 1))

    def body(carry, y):
        with numpyro.plate("rows", N, subsample_size=n) as index:
            numpyro.sample("y", dist.Normal(mean, 1), obs=y[index])
        return carry, None

    scan(body, None, TABLE.T)


def local_latent(n):
    with numpyro.plate("rows", N, subsample_size=n) as index:
        level = numpyro.sample("level", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(level, 1), obs=Y[index])


def discrete_latent(n):
    k = numpyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
    mean = numpyro.sample("mean", dist.Normal(0, 1))
    with numpyro.plate("rows", N, subsample_size=n) as index:
        numpyro.sample("y", dist.Normal(mean + k, 1), obs=Y[index])


def no_latent(n):
    with numpyro.plate("rows", N, subsample_size=n) as index:
        numpyro.sample("y", dist.Normal(0, 1), obs=Y[index])


def scaled_by_hand(n):
    mean = numpyro.sample("mean", dist.Normal(0, 1))
    with numpyro.plate("rows", N, subsample_size=n) as index:
        rows = dist.Normal(mean, 1).log_prob(Y[index])
    numpyro.factor("y", N / n * jnp.sum(rows))


def normalised_by_the_batch(n):
    mean = numpyro.sample("mean", dist.Normal(0, 1))
    with numpyro.plate("rows", N, subsample_size=n) as index:
        y = Y[index] - Y[index].mean()
        numpyro.sample("y", dist.Normal(mean, 1), obs=y)


def value_by_key(n):
    mean = numpyro.sample("mean", dist.Normal(0, 1))
    noise = jax.random.normal(numpyro.prng_key())
    with numpyro.plate("rows", N, subsample_size=n) as index:
        numpyro.sample("y", dist.Normal(mean + noise, 1), obs=Y[index])


def two_of_a_name(n):
    by_subsample(n)
    with numpyro.plate("rows", 3, subsample_size=n) as index:
        numpyro.sample("z", dist.Normal(0, 1), obs=Y[index])


REFUSALS = [
    (no_plate, 2, "no plate that subsamples.*subsample_size=n"),
    (plate_in_a_loop, 2, "inside numpyro.contrib.control_flow"),
    (local_latent, 2, "'level' lies inside the plate 'rows'.*draw all its values outside"),
    (discrete_latent, 2, "'k'.*are discrete.*Sum"),
    (no_latent, 2, "no latent site"),
    (scaled_by_hand, 2, "belongs inside the plate"),
    (normalised_by_the_batch, 2, "average to.*biased"),
    (value_by_key, 2, "depends on its random key"),
    (two_of_a_name, 2, "two plates of the name 'rows'"),
    (by_subsample, 9, "subsample_size=9 of its 5 rows"),
    (by_subsample, 0, "subsample_size=0 of its 5 rows"),
]


@pytest.mark.parametrize(("model", "n", "message"), REFUSALS)
def test_refused_with_the_way_out(model, n, message):
    with pytest.raises(ValueError, match=message):
        subsampled(jax.random.key(0), model, model_args=(n,))


def test_kernel_refuses_what_does_not_average():
    kernel = Kernel(scaled_by_hand, probbp.mala)
    mcmc = MCMC(kernel, num_warmup=1, num_samples=1, progress_bar=False)
    with pytest.raises(ValueError, match="belongs inside the plate"):
        mcmc.run(jax.random.key(0), 2)


def test_the_way_out_of_local_latents():
    def drawn_outside(n):
        level = numpyro.sample("level", dist.Normal(0, 1).expand([N]).to_event(1))
        with numpyro.plate("rows", N, subsample_size=n) as index:
            numpyro.sample("y", dist.Normal(level[index], 1), obs=Y[index])

    parts = subsampled(jax.random.key(0), drawn_outside, model_args=(2,))
    grad = jax.grad(parts.logdensity_fn)(parts.position)["level"]
    np.testing.assert_allclose(grad, Y - 2 * parts.position["level"], rtol=1e-12)


def test_rows_given_by_a_handler_stay():
    """A plate whose rows are substituted is the user's own, and not ours to draw."""
    fixed = numpyro.handlers.substitute(two_tables, data={"others": jnp.array([0, 2])})
    parts = subsampled(jax.random.key(0), fixed, model_args=(2,))
    drawn: Any = parts.draw(jax.random.key(0)).rows
    assert list(drawn) == ["rows"]
