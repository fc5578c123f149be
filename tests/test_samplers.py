"""The laws that every sampler satisfies, whatever its options."""

import pickle
from functools import partial

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from blackjax.mcmc.metrics import LowRankInverseMassMatrix
from cheap import equations_of
from invariance import FAIL, PASS, largest_z, largest_z_of
from tables import (
    ALGORITHMS,
    EVERY,
    LEARNING,
    PROGRAMS,
    SAMPLERS,
    VARIANTS,
    build,
    fmala,
    mala,
    members,
)
from targets import TARGETS, gaussian
from wrong_kernels import RIGHT, WRONG

import probbp
from probbp.estimators import forward, through
from probbp.ops import substitute
from probbp.samplers.curvature import gauss_newton, principal_axes

NUM_CHAINS, NUM_STEPS = 20_000, 8
# One of each program whose steps differ in more than where their keys come from.
KINDS = [*SAMPLERS, *(name for name in VARIANTS if "plane" in name or "held" in name)]
KEYED = [*SAMPLERS, "mala, shared", "fmala, refreshed"]
WITH_DERIVATIVE = [name for name in EVERY if "wrong" not in name]
FORWARD = [name for name, member in PROGRAMS.items() if not member.is_reverse]


# ---------------------------------------------------------------------------------------
# Exactness.


# Settings that no other stands for.
UNLIKE = ("mala, wrong, keyed", "fmala, unbiased drift", "pc_line_fmala, as published")


def slow_if(condition):
    return pytest.mark.slow if condition else ()


@pytest.mark.parametrize(
    ("name", "seed", "dtype", "target"),
    [
        pytest.param(name, seed, dtype, target, marks=slow_if(name not in quick))
        for seed, dtype, target, quick in (
            (0, "float64", "g2", ["line_fmala", "pc_line_fmala"]),
            (0, "float64", "f10", [*KINDS, *LEARNING]),
            (1, "float32", "f2", UNLIKE),
            (2, "float64", "mix", ["mala", "line_fmala"]),
        )
        for name in ALGORITHMS
    ],
)
def test_the_target_is_invariant(name, seed, dtype, target):
    """Wrong gradients included: the accept step makes every one of them exact."""
    key = jax.random.fold_in(jax.random.key(seed), list(ALGORITHMS).index(name))
    target = TARGETS[target]
    algorithm = build(name, target.logdensity_fn)
    assert largest_z_of(key, algorithm, target, NUM_CHAINS, NUM_STEPS, dtype) < PASS


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@members(WRONG, quick=["fmala, no hastings", "line, no hastings", "pc-line, no log-det"])
def test_the_invariance_test_rejects_every_planted_bug(name, seed):
    builder, epsilon, target_name = WRONG[name]
    target = TARGETS[target_name]
    step = builder(target.logdensity_fn, epsilon)
    assert largest_z(jax.random.key(seed), step, target, NUM_CHAINS, NUM_STEPS) > FAIL


@members(RIGHT, quick=[])
def test_the_invariance_test_passes_plain_right_kernels(name):
    builder, epsilon = RIGHT[name]
    for index, target in enumerate(TARGETS.values()):
        step = builder(target.logdensity_fn, epsilon)
        key = jax.random.fold_in(jax.random.key(0), index)
        assert largest_z(key, step, target, NUM_CHAINS, NUM_STEPS) < PASS


def test_the_invariance_test_rejects_a_mala_without_its_correction(monkeypatch):
    """The bug planted in our own kernel: the estimates do not enter the ratio."""
    from probbp.samplers import mala as module

    right = module.accept_or_reject

    def broken(rng_key, log_ratio, state, proposal, is_finite):
        log_ratio = proposal.logdensity - state.logdensity
        return right(rng_key, log_ratio, state, proposal, is_finite)

    monkeypatch.setattr(module, "accept_or_reject", broken)
    target = TARGETS["mix"]
    algorithm = mala(target.logdensity_fn, 0.3)
    assert largest_z_of(jax.random.key(0), algorithm, target, NUM_CHAINS, NUM_STEPS) > FAIL


def with_a_random_derivative(logdensity_fn):
    """Return a log density of the same value whose derivative is scaled at random, by its key."""

    def keyed_logdensity_fn(x, rng_key=None):
        rng_key = jax.random.key(0) if rng_key is None else rng_key
        factor = 3 * jax.random.normal(rng_key, x.shape, x.dtype)
        return logdensity_fn(substitute(x, factor * x))

    return keyed_logdensity_fn


@members(WITH_DERIVATIVE, quick=KEYED[::2])
def test_the_target_is_invariant_under_random_derivatives(name):
    key = jax.random.fold_in(jax.random.key(3), list(EVERY).index(name))
    target = TARGETS["mix"]
    algorithm = build(name, with_a_random_derivative(target.logdensity_fn))
    assert largest_z_of(key, algorithm, target, NUM_CHAINS, NUM_STEPS) < PASS


@members(WITH_DERIVATIVE, quick=KEYED)
def test_random_derivatives_follow_the_sampler_s_key(name):
    """And not a fixed one: another key of the step is another move, the same key the same."""
    start = jnp.array([0.4, -0.7])
    logdensity_fn = TARGETS["f2"].logdensity_fn
    seen = []

    def spied(x, rng_key=None):
        if rng_key is not None:
            jax.debug.callback(lambda k: seen.append(k.tolist()), jax.random.key_data(rng_key))
        return logdensity_fn(x)

    algorithm = build(name, spied)
    state = algorithm.init(start, jax.random.key(0))
    jax.effects_barrier()
    seen.clear()
    for seed in (1, 1, 2, 3):
        algorithm.step(jax.random.key(seed), state)
    jax.effects_barrier()
    assert len(seen) == 4 * len(seen[: len(seen) // 4])
    assert len(set(map(tuple, seen))) in (3, 6)


def test_the_invariance_test_rejects_a_far_end_that_forgets_its_key(monkeypatch):
    """The bug planted in our own kernel: of the two ends of a move one has a key of its own."""
    from probbp.samplers import mala as module

    right = module.white_value_and_grad

    def broken(*args):
        value_and_grad, keys = right(*args), []

        def forgetful(rng_key, position):
            keys.append(rng_key)
            is_far = len(keys) == 2
            return value_and_grad(jax.random.key(5) if is_far else rng_key, position)

        return forgetful

    target = TARGETS["mix"]
    algorithm = mala(with_a_random_derivative(target.logdensity_fn), 0.3, key_policy="shared")
    assert largest_z_of(jax.random.key(0), algorithm, target, NUM_CHAINS, NUM_STEPS) < PASS
    monkeypatch.setattr(module, "white_value_and_grad", broken)
    assert largest_z_of(jax.random.key(0), algorithm, target, NUM_CHAINS, NUM_STEPS) > FAIL


@members(ALGORITHMS, quick=[*SAMPLERS, *LEARNING])
def test_a_value_that_depends_on_the_key_is_refused(name):
    def dropout(x, rng_key=None):
        rng_key = jax.random.key(0) if rng_key is None else rng_key
        return -jnp.sum(jnp.where(jax.random.bernoulli(rng_key, 0.5, x.shape), x, 0.0) ** 2)

    with pytest.raises(ValueError, match="depends on its random key"):
        build(name, dropout).init(jnp.ones(20), jax.random.key(0))
    held = partial(dropout, rng_key=jax.random.key(1))
    build(name, held).init(jnp.ones(20), jax.random.key(0))


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        *(
            pytest.param(name, "dense", marks=slow_if(name not in SAMPLERS))
            for name in EVERY
            # A field of the position itself has no coordinates to change.
            if "wrong" not in name and "controlled" not in name
        ),
        ("mala", "diag"),
        ("mala", "low_rank"),
        *(
            pytest.param(name, scale, marks=pytest.mark.slow)
            for name in ("fmala", "pc_line_fmala")
            for scale in ("diag", "low_rank")
        ),
    ],
)
def test_a_scale_is_a_change_of_coordinates(name, scale):
    """On f(L^-1 x) with inverse mass matrix L L^T the chain is L times that on f without one."""
    target = TARGETS["f2"]
    root = {
        "diag": jnp.diag(jnp.array([0.5, 3.0])),
        "dense": jnp.array([[0.5, 0.0], [1.0, 3.0]]),
        "low_rank": jnp.diag(jnp.array([0.5, 3.0])) @ jnp.array([[1.5, 0.5], [0.5, 1.5]]),
    }[scale]
    matrix = {
        "diag": jnp.array([0.25, 9.0]),
        "dense": root @ root.T,
        "low_rank": LowRankInverseMassMatrix(
            jnp.array([0.5, 3.0]), jnp.ones((2, 1)) / jnp.sqrt(2.0), jnp.array([4.0])
        ),
    }[scale]

    def run(logdensity_fn, inverse_mass_matrix, start):
        algorithm = build(name, logdensity_fn, inverse_mass_matrix=inverse_mass_matrix)
        state = algorithm.init(start, jax.random.key(1))
        keys = jax.random.split(jax.random.key(2), 50)
        return jax.lax.scan(lambda s, k: (algorithm.step(k, s)[0],) * 2, state, keys)[1].position

    start = jnp.array([0.3, -0.2])
    white = run(target.logdensity_fn, None, start)
    scaled = run(lambda x: target.logdensity_fn(jnp.linalg.solve(root, x)), matrix, root @ start)
    np.testing.assert_allclose(scaled, white @ root.T, rtol=1e-6, atol=1e-8)


def test_with_the_exact_gradient_it_is_blackjax_draw_for_draw():
    target = TARGETS["g2"]
    histories = []
    for algorithm in (mala(target.logdensity_fn, 0.2), blackjax.mala(target.logdensity_fn, 0.2)):
        _, (states, infos) = blackjax.util.run_inference_algorithm(
            jax.random.key(0), algorithm, 500, initial_position=jnp.ones(2)
        )
        histories.append((states.position, infos.acceptance_rate))
    np.testing.assert_allclose(histories[0][0], histories[1][0], rtol=1e-9)
    np.testing.assert_allclose(histories[0][1], histories[1][1], rtol=1e-7)


@pytest.mark.parametrize("size", [2, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 8))])
def test_principal_axes(size):
    """Those of LAPACK, for matrices at random, diagonal, degenerate, and far from one in scale."""
    root = jax.random.normal(jax.random.key(size), (20, size, size))
    matrices = jnp.concatenate(
        [
            root + root.mT,
            1e-12 * (root @ root.mT),
            1e12 * root[:1] @ root[:1].mT,
            jnp.stack([jnp.eye(size), jnp.diag(jnp.arange(size) - 1.0), jnp.ones((size, size))]),
            jnp.zeros((1, size, size)),
        ]
    )
    eigenvalues, axes = jax.jit(jax.vmap(principal_axes))(matrices)
    exact = np.linalg.eigvalsh(matrices)
    scale = np.abs(exact).max(axis=1, keepdims=True) + 1e-300
    np.testing.assert_allclose(np.sort(eigenvalues) / scale, exact / scale, atol=1e-12)
    np.testing.assert_allclose(
        axes.mT @ axes, jnp.broadcast_to(jnp.eye(size), axes.shape), atol=1e-13
    )
    np.testing.assert_allclose(
        (matrices @ axes) / scale[..., None],
        (axes * eigenvalues[:, None]) / scale[..., None],
        atol=1e-7,
    )


def test_fmala_is_mala_on_one_forward_tangent():
    target = TARGETS["f10"]
    estimator = through(optax.scale(1 / 10), forward(tangents="unit"))
    acceptances = []
    for algorithm in (
        fmala(target.logdensity_fn, 0.2),
        mala(target.logdensity_fn, 0.2, estimator=estimator),
    ):
        rates = stationary_rates(algorithm, target, 20_000)
        acceptances.append((jnp.mean(rates), jnp.var(rates) / rates.size))
    (a, var_a), (b, var_b) = acceptances
    assert abs(a - b) < 4 * jnp.sqrt(var_a + var_b)


def test_the_plane_of_all_directions_is_mala():
    """In law: the acceptance rate from exact draws agrees, on a target that is not Gaussian."""
    target = TARGETS["f2"]
    plane = stationary_rates(
        probbp.line_fmala(target.logdensity_fn, 0.4, num_tangents=2), target, 50_000
    )
    full = stationary_rates(mala(target.logdensity_fn, 0.4), target, 50_000)
    error = jnp.sqrt((jnp.var(plane) + jnp.var(full)) / plane.size)
    assert abs(jnp.mean(plane) - jnp.mean(full)) < 4 * error


def test_in_one_dimension_the_line_is_all_there_is():
    logdensity_fn = lambda x: -jnp.sum(x**4) / 4
    target = gaussian(1)._replace(logdensity_fn=logdensity_fn)
    rates = [
        stationary_rates(algorithm, target, 50_000)
        for algorithm in (
            mala(logdensity_fn, 0.3),
            fmala(logdensity_fn, 0.3, key_policy="shared"),
            probbp.line_fmala(logdensity_fn, 0.3),
        )
    ]
    for other in rates[1:]:
        error = jnp.sqrt((jnp.var(rates[0]) + jnp.var(other)) / other.size)
        assert abs(jnp.mean(rates[0]) - jnp.mean(other)) < 4 * error


def stationary_rates(algorithm, target, num):
    """Acceptance probabilities of one step from each of `num` draws of the target."""
    key_draw, key_init, key_step = jax.random.split(jax.random.key(7), 3)

    @jax.jit
    @jax.vmap
    def one(position, key_init, key_step):
        return algorithm.step(key_step, algorithm.init(position, key_init))[1].acceptance_rate

    keys = [jax.random.split(key, num) for key in (key_init, key_step)]
    return one(target.draw(key_draw, num), *keys)


def test_gauss_newton_is_the_hessian_of_a_linear_gaussian_model():
    x = jnp.linspace(-1, 1, 12).reshape(6, 2)

    def logprior_fn(w):
        return -0.5 * jnp.sum(w**2)

    def loglikelihood_fn(mean):
        return -2.0 * jnp.sum((mean - 1) ** 2)

    def logdensity_fn(w):
        return loglikelihood_fn(x @ w) + logprior_fn(w)

    curvature = gauss_newton(lambda w: x @ w, loglikelihood_fn, logprior_fn)
    for num_tangents in (1, 2):
        positions = []
        for options in ({}, {"curvature": curvature}):
            algorithm = probbp.pc_line_fmala(
                logdensity_fn, 1.0, num_tangents=num_tangents, **options
            )
            _, (states, _) = blackjax.util.run_inference_algorithm(
                jax.random.key(0), algorithm, 50, initial_position=jnp.zeros(2)
            )
            positions.append(states.position)
        np.testing.assert_allclose(*positions, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_gauss_newton_keeps_the_target():
    """On a model that is not linear, where it differs from the Hessian."""
    target = TARGETS["mix"]
    curvature = gauss_newton(jnp.tanh, lambda p: -0.5 * jnp.sum(p**2), lambda x: -jnp.sum(x**2) / 4)

    def logdensity_fn(x):
        return -0.5 * jnp.sum(jnp.tanh(x) ** 2) - jnp.sum(x**2) / 4

    # Exact draws by rejection from N(0, 2 I), whose density dominates.
    def draw(rng_key, num):
        key_draw, key_accept = jax.random.split(rng_key)
        candidates = jnp.sqrt(2.0) * jax.random.normal(key_draw, (4 * num, 2))
        accepted = jnp.log(jax.random.uniform(key_accept, (4 * num,))) < -0.5 * jnp.sum(
            jnp.tanh(candidates) ** 2, axis=1
        )
        return candidates[accepted][:num]

    target = target._replace(logdensity_fn=logdensity_fn, draw=draw)
    for options in ({}, {"num_tangents": 2}):
        algorithm = probbp.pc_line_fmala(logdensity_fn, 1.0, curvature=curvature, **options)
        assert largest_z_of(jax.random.key(3), algorithm, target, NUM_CHAINS, NUM_STEPS) < PASS


# ---------------------------------------------------------------------------------------
# Forward mode only.


def converged_square_root(x):
    """Newton's iteration until it stands still: the number of steps depends on x."""

    def moved(pair):
        return jnp.abs(pair[1] - pair[0]) > 1e-10

    def newton(pair):
        return pair[1], 0.5 * (pair[1] + x / pair[1])

    return jax.lax.while_loop(moved, newton, (x, 0.5 * (x + 1)))[1]


def dynamic_logdensity(x):
    return -0.5 * converged_square_root(1 + jnp.sum(x**2)) ** 2


@members(FORWARD, quick=["fmala", "line_fmala, plane", "pc_line_fmala"])
def test_loops_of_dynamic_length_are_sampled(name):
    """The density is a Gaussian in disguise; reverse mode refuses it."""
    with pytest.raises(ValueError, match="[Rr]everse-mode"):
        jax.grad(dynamic_logdensity)(jnp.ones(2))
    target = gaussian(2)
    algorithm = build(name, dynamic_logdensity)
    assert largest_z_of(jax.random.key(5), algorithm, target, 5_000, NUM_STEPS) < PASS


@members(FORWARD)
def test_no_reverse_pass_is_in_the_program(name):
    """A primitive that can be pushed forward but not transposed goes through every kernel."""

    @jax.custom_jvp
    def forward_only(x):
        return -0.5 * jnp.sum(x**2)

    @forward_only.defjvp
    def _(primals, tangents):
        (x,), (v,) = primals, tangents
        # A dynamic loop in the tangent computation has no transpose.
        slope = jax.lax.while_loop(
            lambda c: c[0] < jnp.where(jnp.sum(x) > 1e9, 2, 1),
            lambda c: (c[0] + 1, -jnp.vdot(x, v)),
            (0, jnp.zeros_like(x[0])),
        )[1]
        return forward_only(x), slope

    with pytest.raises(ValueError, match="[Rr]everse-mode"):
        jax.grad(forward_only)(jnp.ones(3))
    algorithm = build(name, forward_only)
    state, info = algorithm.step(jax.random.key(0), algorithm.init(jnp.ones(3), jax.random.key(1)))
    assert jnp.isfinite(state.logdensity)
    assert not info.is_divergent


@members(ALGORITHMS)
def test_evaluations_a_step(name):
    """How often the log density stands in the program of a step, by a marker in its jaxpr."""

    def logdensity_fn(x):
        return -jnp.sum(jax.lax.erf_inv(x))

    algorithm = build(name, logdensity_fn)
    state = algorithm.init(jnp.zeros(3), jax.random.key(0))
    program = str(jax.make_jaxpr(algorithm.step)(jax.random.key(0), state))
    plain = str(jax.make_jaxpr(jax.random.normal, static_argnums=1)(jax.random.key(0), (3,)))
    noise = 0 if "erf_inv" not in plain else program.count("random_bits") and _noises(program)
    assert program.count("erf_inv") - noise == ALGORITHMS[name].evaluations


def _noises(program):
    """How many normal draws a program makes, each of which holds one `erf_inv`."""
    return program.count("name=_normal_real") or program.count("_normal_real[")


# ---------------------------------------------------------------------------------------
# Hosts and transformations.


# With others the tangents are drawn leaf by leaf: the same law, other numbers.
@members(
    [name for name in PROGRAMS if name == "mala" or "mala, " not in name.replace("fmala", "")],
    quick=["mala", "fmala", "pc_line_fmala"],
)
def test_pytrees_and_flat_vectors_are_the_same_chain(name):
    target = TARGETS["f10"]

    def tree_logdensity(position):
        return target.logdensity_fn(jnp.concatenate([position["a"], position["b"].ravel()]))

    flat = jnp.linspace(-0.5, 0.5, 10)
    tree = {"a": flat[:4], "b": flat[4:].reshape(3, 2)}
    states = []
    for logdensity_fn, start in ((target.logdensity_fn, flat), (tree_logdensity, tree)):
        algorithm = build(name, logdensity_fn, inverse_mass_matrix=jnp.linspace(0.5, 2, 10))
        _, (history, _) = blackjax.util.run_inference_algorithm(
            jax.random.key(3), algorithm, 20, initial_position=start
        )
        states.append(history.position)
    joined = jnp.concatenate([states[1]["a"], states[1]["b"].reshape(20, 6)], axis=1)
    np.testing.assert_allclose(states[0], joined, rtol=1e-8)


@members(PROGRAMS, quick=["mala", "fmala", "pc_line_fmala", "line_fmala, plane"])
def test_jit_vmap_and_no_recompilation(name):
    """Chains and step sizes side by side are each the chain by itself."""
    algorithm, step_size, *_ = EVERY[name]
    traces = []

    @jax.jit
    def run(key, position, step_size):
        traces.append(name)
        one = algorithm(TARGETS["g2"].logdensity_fn, step_size)
        key_init, key_step = jax.random.split(key)
        return one.step(key_step, one.init(position, key_init))

    keys = jax.random.split(jax.random.key(4))
    starts = jnp.stack([jnp.ones(2), jnp.zeros(2)])
    sizes = jnp.array([step_size, step_size / 2])
    singles = [run(*args) for args in zip(keys, starts, sizes, strict=True)]
    assert len(traces) == 1
    batch = jax.jit(jax.vmap(run))(keys, starts, sizes)
    for index, single in enumerate(singles):
        one_of_batch = jax.tree.map(lambda leaf, index=index: leaf[index], batch)
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-12), one_of_batch, single
        )


@members(EVERY)
def test_single_precision_stays_single(name):
    """From the types alone, whatever those of the step size and the scale."""
    target = TARGETS["f10"]
    algorithm = build(
        name, target.logdensity_fn, jnp.asarray(0.1), jnp.linspace(0.5, 2, 10, dtype="float64")
    )
    key, start = jax.random.key(0), jax.ShapeDtypeStruct((10,), "float32")
    state = jax.eval_shape(algorithm.init, start, key)
    new, _ = jax.eval_shape(algorithm.step, key, state)
    for field in ("position", "logdensity_grad"):
        assert getattr(state, field).dtype == "float32"
        assert getattr(new, field).dtype == "float32"


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        (probbp.mala, {}),
        (probbp.fmala, {"key_policy": "shared"}),
        (probbp.pc_fmala, {}),
        (probbp.line_fmala, {"num_tangents": 2}),
        (probbp.pc_line_fmala, {"num_inner_steps": 2}),
    ],
)
def test_blackjax_window_adaptation_takes_them(algorithm, options):
    target = TARGETS["g2"]
    rate = algorithm.target_acceptance_rate(**options)
    warmup = blackjax.window_adaptation(
        algorithm, target.logdensity_fn, target_acceptance_rate=rate, **options
    )
    (state, parameters), info = warmup.run(jax.random.key(0), jnp.ones(2), num_steps=600)
    assert jnp.all(jnp.isfinite(state.position))
    assert abs(jnp.mean(info.info.acceptance_rate[300:]) - rate) < 0.1
    algorithm(target.logdensity_fn, **parameters).step(jax.random.key(1), state)


@pytest.mark.parametrize("algorithm", [probbp.mala, probbp.fmala, probbp.pc_line_fmala])
def test_blackjax_smc_takes_them(algorithm):
    """Tempering from N(0, 9 I) to N(1, I): the posterior mean is known."""
    num_particles = 2_000
    smc = blackjax.adaptive_tempered_smc(
        lambda x: -0.5 * jnp.sum(x**2) / 9,
        lambda x: -0.5 * jnp.sum((x - 1) ** 2),
        algorithm.build_kernel(),
        algorithm.init,
        mcmc_parameters={"step_size": jnp.array([0.3])},
        resampling_fn=blackjax.smc.resampling.systematic,
        target_ess=0.7,
        num_mcmc_steps=5,
    )
    particles = 3 * jax.random.normal(jax.random.key(0), (num_particles, 2))
    state, step = smc.init(particles), jax.jit(smc.step)
    for i in range(50):
        state, _ = step(jax.random.key(i), state)
        if state.tempering_param >= 1:
            break
    mean, variance = 0.9, 0.9
    error = jnp.sqrt(variance / num_particles)
    np.testing.assert_allclose(jnp.mean(state.particles, axis=0), mean, atol=6 * error)


# ---------------------------------------------------------------------------------------
# Bad input.


@members(PROGRAMS, quick=SAMPLERS)
def test_a_proposal_that_is_no_number_is_rejected_and_told(name):
    """Half of space is NaN, the other half +inf: nothing is accepted, and the state stays sound."""

    def logdensity_fn(x):
        return jnp.where(
            jnp.all(x == 0.5), -jnp.sum(x**2), jnp.where(jnp.sum(x) > 1, jnp.nan, jnp.inf)
        )

    algorithm = build(name, logdensity_fn)

    @jax.jit
    def run(keys):
        state = algorithm.init(jnp.full(2, 0.5), jax.random.key(0))
        return jax.lax.scan(lambda s, k: algorithm.step(k, s), state, keys)

    last, infos = run(jax.random.split(jax.random.key(1), 50))
    assert jnp.all(last.position == 0.5)
    assert jnp.all(infos.is_divergent)
    assert not jnp.any(infos.is_accepted)
    assert jnp.all(infos.acceptance_rate == 0)


OURS = [member.algorithm for member in SAMPLERS.values()]


def normal(x):
    return -0.5 * jnp.sum(x**2)


@pytest.mark.parametrize("algorithm", OURS, ids=SAMPLERS)
@pytest.mark.parametrize("step_size", [0.0, -1.0, jnp.nan, jnp.inf])
def test_step_sizes_must_be_positive(algorithm, step_size):
    with pytest.raises(ValueError, match="step_size must be positive"):
        algorithm(normal, step_size)


@pytest.mark.parametrize("algorithm", OURS, ids=SAMPLERS)
@pytest.mark.parametrize(
    ("logdensity_fn", "start", "error", "words"),
    [
        (normal, jnp.arange(3), TypeError, "floating-point positions.*Cast it"),
        (normal, {}, ValueError, "no parameter"),
        (lambda x: -(x**2), jnp.ones(3), TypeError, r"shape \(3,\).*Sum the terms"),
        (lambda x: (normal(x), 1), jnp.ones(3), TypeError, "one scalar, not tuple"),
        (lambda x: jnp.log(-jnp.sum(x**2)), jnp.ones(3), ValueError, "log density at the start"),
        (lambda x: normal(x) - jnp.inf, jnp.ones(3), ValueError, "log density at the start"),
    ],
)
def test_starts_are_checked(algorithm, logdensity_fn, start, error, words):
    with pytest.raises(error, match=words):
        algorithm(logdensity_fn, 0.1).init(start)


@pytest.mark.parametrize(
    ("build_it", "words"),
    [
        (
            lambda: probbp.mala(normal, 0.1, key_policy="fresh"),
            "choose 'carried'.*'shared'",
        ),
        (
            lambda: probbp.fmala(normal, 0.1, key_policy="fresh"),
            "choose 'carried'.*'shared'",
        ),
        (
            lambda: probbp.pc_fmala(normal, 0.1, key_policy="carried"),
            "choose 'refreshed'.*'shared'",
        ),
        (lambda: probbp.line_fmala(normal, 0.1, num_tangents=0), "positive integer"),
        (lambda: probbp.line_fmala(normal, 0.1, num_inner_steps=0), "positive integer"),
        (
            lambda: probbp.pc_line_fmala(normal, 0.1, floor=-1.0),
            "floor must be .*not negative",
        ),
        (
            lambda: probbp.warmup(
                jax.random.key(0), partial(probbp.mala, normal), jnp.ones(3), num_steps=-1
            ),
            "num_steps must be an integer of at least 0, got -1",
        ),
    ],
)
def test_options_are_checked(build_it, words):
    with pytest.raises(ValueError, match=words):
        build_it()


@pytest.mark.parametrize(
    ("algorithm", "policy"), [(probbp.pc_fmala, "carried"), (probbp.mala, "x"), (probbp.fmala, "x")]
)
def test_kernels_check_the_policy_too(algorithm, policy):
    state = algorithm.init(jnp.ones(2), normal)
    with pytest.raises(ValueError, match="Unknown key_policy"):
        algorithm.build_kernel()(jax.random.key(0), state, normal, 0.1, key_policy=policy)


def test_a_plane_must_fit():
    algorithm = probbp.line_fmala(normal, 0.1, num_tangents=4)
    state = algorithm.init(jnp.ones(3))
    with pytest.raises(ValueError, match="does not fit a position of 3 parameters"):
        algorithm.step(jax.random.key(0), state)


def test_every_algorithm_can_be_pickled():
    """For a pool of processes, and for NumPyro's `MCMC`, which is pickled with its kernel."""
    for algorithm in (mala, fmala, probbp.line_fmala, probbp.pc_fmala, probbp.surrogate):
        copy = pickle.loads(pickle.dumps(partial(algorithm, jnp.sum)))
        assert copy.func.differentiable is algorithm.differentiable
        assert copy.func.target_acceptance_rate() == algorithm.target_acceptance_rate()


# ---------------------------------------------------------------------------------------
# Many parameters, large constants.


@members([name for name in EVERY if "wrong" not in name])
def test_memory_is_linear_in_the_number_of_parameters(name):
    """Nothing in start, warm-up and step has the size of a matrix of them."""
    num_params = 5000

    def run(key):
        algorithm = lambda **learnt: EVERY[name].algorithm(standard_normal, **learnt)
        options = {"target_acceptance_rate": 0.5}
        return probbp.warmup(key, algorithm, jnp.zeros(num_params), 20, **options)

    equations = equations_of(run, jax.random.key(0))
    sizes = [out.aval.size for eqn in equations for out in eqn.outvars if hasattr(out.aval, "size")]
    assert num_params <= max(sizes) <= 4 * num_params


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_of_5000_parameters(name):
    data = probbp.sample(
        jax.random.key(0),
        partial(SAMPLERS[name].algorithm, standard_normal),
        jnp.zeros(5000, "float32"),
        num_warmup=200,
        num_samples=200,
        num_chains=2,
        progress_bar=False,
    )
    assert np.all(np.isfinite(data.posterior["x"].values))
    assert data.sample_stats["acceptance_rate"].values.mean() > 0.1


def test_the_surrogate_refuses_5000_parameters_before_the_run():
    algorithm = partial(probbp.surrogate, standard_normal)
    with pytest.raises(ValueError, match="5000 are too many .at most 1000.: take probbp.mala"):
        probbp.sample(jax.random.key(0), algorithm, jnp.zeros(5000), progress_bar=False)


def standard_normal(x):
    return -jnp.sum(x**2) / 2


@members(ALGORITHMS, quick=["mala", "pc_line_fmala", *LEARNING])
def test_a_constant_in_the_log_density_changes_no_draw(name):
    """In double precision, where 1e8 leaves eight digits behind the point."""

    def run(offset):
        algorithm = build(name, lambda x: standard_normal(x) + offset)
        key_init, key_steps = jax.random.split(jax.random.key(0))
        start = jnp.linspace(-1.0, 1.0, 3)
        state = algorithm.init(start, *([] if name in LEARNING else [key_init]))
        keys = jax.random.split(key_steps, 100)
        return jax.lax.scan(lambda s, k: (algorithm.step(k, s)[0], s.position), state, keys)[1]

    plain, *shifted = jax.jit(jax.vmap(run))(jnp.array([0.0, 1e6, -1e8]))
    assert len(np.unique(plain[:, 0])) > 10
    for draws in shifted:
        np.testing.assert_allclose(draws, plain, rtol=1e-6, atol=1e-6)
