"""Samplers of diffusion models: the plain sampler's value, the derivative of the kept steps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cheap import compiled, key_of
from cheap import normal as draw
from scipy.stats import chisquare

from probbp.ops import sdo

KEY = key_of(0)
N, B, D = 6, 3, 4

# name -> (keep_step, weights of the steps' networks); `None` where they are drawn
KEEPS = {
    "first": ("first", [1, 0, 0, 0, 0, 0]),
    "one": (2, [0, 0, 1, 0, 0, 0]),
    "from the end": (-1, [0, 0, 0, 0, 0, 1]),
    "last": (sdo.Last(2), [0, 0, 0, 0, 1, 1]),
    "all of the last": (sdo.Last(N), [1] * N),
    "all": ("all", [1] * N),
    "sure subset": (sdo.Subset(1.0), [1] * N),
    "each": ("each", None),
    "random": ("random", None),
    "subset": (sdo.Subset(0.5), None),
}
STRETCHES = ("first", "one", "from the end", "last")
# What is another stretch, or another name for all.
ALIKE = ("from the end", "all of the last", "sure subset")
every_keep = pytest.mark.parametrize(
    "keep",
    [
        pytest.param(keep, id=name, marks=pytest.mark.slow if name in ALIKE else ())
        for name, (keep, _) in KEEPS.items()
    ],
)

COVARIANCE = np.diag([2.0, 1.0, 0.3, 0.0]) + 0.2 * np.ones((D, D))
SURROGATES = {
    "constant": None,
    "isotropic": 0.5,
    "diagonal": np.array([2.0, 1.0, 0.3, 0.0]),
    "full": COVARIANCE,
}


def normal(i, *shape):
    return draw((0, i), *shape)


# Noised halfway: from pure noise x is so large, and the network so flat, that no term shows.
SCHEDULE = sdo.linear(N, start=399)
ARGS = {
    "noise": normal(1, B, D),
    "step_noise": normal(2, N, B, D),
    "controls": normal(3, N, B, D),
    "params": {"into": normal(4, D, D) / 3, "bias": normal(5, D)},
}


def network(params, x, t, u):
    return jnp.tanh(x @ params["into"] + params["bias"] + t[:, None] / 1000 + u)


def run(args, *, schedule=SCHEDULE, eta=1.0, rng_key=KEY, **options):
    denoiser = partial(network, args["params"])
    if eta:
        options["step_noise"] = args["step_noise"]
    return sdo.sample(
        denoiser,
        args["noise"],
        schedule,
        eta=eta,
        controls=args["controls"],
        rng_key=rng_key,
        **options,
    )


def plain(args, *, schedule=SCHEDULE, eta=1.0, prediction="eps"):
    """The sampler as the papers on DDIM and on v write it down."""
    x = args["noise"]
    for n, t in enumerate(schedule.times):
        now, then = float(schedule.signal[n]), float(schedule.signal[n + 1])
        output = network(args["params"], x, jnp.full(len(x), float(t)), args["controls"][n])
        if prediction == "eps":
            eps = output
            clean = (x - (1 - now) ** 0.5 * eps) / now**0.5
        else:
            clean = now**0.5 * x - (1 - now) ** 0.5 * output
            eps = (1 - now) ** 0.5 * x + now**0.5 * output
        sigma = eta * ((1 - then) / (1 - now)) ** 0.5 * (1 - now / then) ** 0.5
        x = then**0.5 * clean + (1 - then - sigma**2) ** 0.5 * eps
        x = x + sigma * args["step_noise"][n]
    return x


def loss(fun, args, **options):
    return jnp.sum(jnp.sin(fun(args, **options)))


def assert_close(a, b, rtol=1e-9, atol=1e-10):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), a, b)


# ---------------------------------------------------------------------------------------
# The value.


@every_keep
def test_the_value_is_the_plain_sampler_s(keep):
    cases = (
        (sdo.linear(N), "eps", 0.0),
        (sdo.cosine(N), "v", 0.5),
        (SCHEDULE, "eps", 1.0),
    )
    cases = [dict(zip(("schedule", "prediction", "eta"), case, strict=True)) for case in cases]

    @compiled
    def both(args):
        ours = [run(args, keep_step=keep, **options) for options in cases]
        return ours, [plain(args, **options) for options in cases]

    assert_close(*both(ARGS), rtol=1e-10)


@pytest.mark.parametrize(
    ("keep", "dtype"),
    [("each", "float32"), (sdo.Subset(0.5), "float32")]
    + [("first", "bfloat16"), ("random", "bfloat16")]
    + [pytest.param(keep, "float32", marks=pytest.mark.slow) for keep in ("first", "random")],
)
def test_other_precisions_stay_what_they_are(keep, dtype):
    args = jax.tree.map(lambda leaf: leaf.astype(dtype), ARGS)
    path = sdo.gaussian_path(COVARIANCE)

    def cast(params, x, t, u):
        assert t.dtype == jnp.float32  # bfloat16 has no 999
        return network(params, x, t, u).astype(x.dtype)

    def of_noise(noise):
        return sdo.sample(
            partial(cast, args["params"]),
            noise,
            SCHEDULE,
            keep_step=keep,
            rng_key=KEY,
            controls=jnp.asarray(args["controls"]),
            surrogate=path,
            prediction="v",
        )

    x, tangent = compiled(lambda z: jax.jvp(of_noise, (z,), (z,)))(args["noise"])
    assert x.dtype == tangent.dtype == dtype
    exact = compiled(partial(plain, eta=0.0, prediction="v"))(ARGS)
    # Each of the steps rounds a few times, and the network's slope may double an error.
    tolerance = 20 * N * float(jnp.finfo(dtype).eps)
    assert np.max(np.abs(x.astype(float) - exact)) < tolerance * np.max(np.abs(exact))


def test_schedules():
    betas = np.linspace(1e-4, 0.02, 1000)
    signal = np.array([np.prod(1 - betas[: t + 1]) for t in range(1000)])
    schedule = sdo.linear(50)
    np.testing.assert_allclose(schedule.train_signal, signal, rtol=1e-12)
    assert list(schedule.times) == list(range(999, 0, -20))
    np.testing.assert_allclose(schedule.signal, [*signal[list(schedule.times)], 1.0], rtol=1e-12)
    assert sdo.linear(5, start=499).times == (499, 399, 299, 199, 99)
    assert sdo.linear(1000).times == tuple(range(999, -1, -1))
    # Nichol & Dhariwal, section 3.2: alpha-bar_t = f(t) / f(0), up to where beta is clipped.
    f = np.cos((np.arange(1, 999) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    f0 = np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(sdo.cosine(10).train_signal[:998], f / f0, rtol=1e-9)
    assert 1e-9 < sdo.cosine(10).train_signal[-1] < 1e-8


def test_with_all_steps_of_training_it_is_ddpm_s_ancestral_sampler():
    schedule = sdo.linear(20, num_train_steps=20, first_beta=0.01, last_beta=0.3)
    betas = np.linspace(0.01, 0.3, 20)
    signal = np.cumprod(1 - betas)
    z, w = normal(1, 2, D), normal(2, 20, 2, D)

    def denoiser(x, t):
        return jnp.cos(x + t[:, None])

    x = z
    for n, t in enumerate(range(19, -1, -1)):
        eps = np.cos(x + t)
        mean = (x - betas[t] / (1 - signal[t]) ** 0.5 * eps) / (1 - betas[t]) ** 0.5
        before = signal[t - 1] if t else 1.0
        x = mean + (betas[t] * (1 - before) / (1 - signal[t])) ** 0.5 * w[n]
    ours = compiled(lambda: sdo.sample(denoiser, z, schedule, eta=1.0, step_noise=w))()
    assert_close(ours, x, rtol=1e-8)


# ---------------------------------------------------------------------------------------
# The derivative.


@pytest.mark.parametrize(("prediction", "checkpoint"), [("eps", False), ("v", True)])
def test_all_steps_have_the_exact_derivative(prediction, checkpoint):
    options = {"prediction": prediction}
    funs = (
        partial(run, keep_step="all", checkpoint=checkpoint, **options),
        partial(plain, **options),
    )

    @compiled
    def derivatives(args):
        return [jax.grad(partial(loss, fun))(args) for fun in funs]

    assert_close(*derivatives(ARGS), rtol=1e-8)

    @compiled
    def hessian_vector(noise):
        grads = [jax.grad(lambda z, f=fun: loss(f, ARGS | {"noise": z})) for fun in funs]
        return [jax.jvp(grad, (noise,), (jnp.ones((B, D)),))[1] for grad in grads]

    if checkpoint:
        assert_close(*hessian_vector(ARGS["noise"]), rtol=1e-7)


def slope_of(surrogate, signal, prediction):
    """Return G (D, D): the derivative of the best prediction for Gaussian data."""
    if surrogate is None:
        return np.zeros((D, D))
    c = np.asarray(surrogate, float)
    c = c if c.ndim == 2 else np.diag(np.broadcast_to(c, D))
    to_eps = (1 - signal) ** 0.5 * np.linalg.inv(signal * c + (1 - signal) * np.eye(D))
    if prediction == "eps":
        return to_eps
    to_clean = (np.eye(D) - (1 - signal) ** 0.5 * to_eps) / signal**0.5
    return signal**0.5 * to_eps - (1 - signal) ** 0.5 * to_clean


def tangent_by_hand(args, dots, weights, surrogate, prediction, eta=1.0, alone=False):
    """Carry a tangent through the plain sampler's steps, whose networks have given weights."""
    schedule, x = SCHEDULE, args["noise"]
    x_dot = path_dot = dots["noise"]
    for n, t in enumerate(schedule.times):
        now, then = float(schedule.signal[n]), float(schedule.signal[n + 1])
        sigma = eta * ((1 - then) / (1 - now) * (1 - now / then)) ** 0.5
        rest = (1 - then - sigma**2) ** 0.5

        def step(x, output, now=now, then=then, rest=rest):
            if prediction == "eps":
                return then**0.5 * (x - (1 - now) ** 0.5 * output) / now**0.5 + rest * output
            clean = now**0.5 * x - (1 - now) ** 0.5 * output
            return then**0.5 * clean + rest * ((1 - now) ** 0.5 * x + now**0.5 * output)

        at = args["params"], x, jnp.full(B, float(t)), args["controls"][n]
        moved = path_dot if alone else x_dot
        dot = dots["params"], moved, jnp.zeros(B), dots["controls"][n]
        output, output_dot = jax.jvp(network, at, dot)
        slope = slope_of(surrogate, now, prediction)
        passed = x_dot @ slope + weights[n] * (output_dot - moved @ slope)
        x = step(x, output) + sigma * args["step_noise"][n]
        x_dot = step(x_dot, passed) + sigma * dots["step_noise"][n]
        path_dot = step(path_dot, path_dot @ slope) + sigma * dots["step_noise"][n]
    return x_dot


DOTS = jax.tree.map(np.cos, ARGS)


@pytest.mark.parametrize(
    ("surrogate", "prediction"),
    [("constant", "eps"), ("full", "eps"), ("isotropic", "v")]
    + [pytest.param("diagonal", "v", marks=pytest.mark.slow)],
)
def test_each_rule_is_the_recursion_by_hand(surrogate, prediction):
    surrogate = SURROGATES[surrogate]
    path = None if surrogate is None else sdo.gaussian_path(surrogate)

    @partial(jax.jit, static_argnums=(0, 1))
    def tangents(keep, is_refused, weights):
        # Controls of detached steps refuse to be differentiated.
        moved = {name: ARGS[name] for name in ARGS if not (is_refused and name == "controls")}
        dots = {name: DOTS[name] for name in moved}
        ours = partial(run, keep_step=keep, surrogate=path, prediction=prediction)
        _, tangent = jax.jvp(lambda moved: ours(ARGS | moved), (moved,), (dots,))
        zero = {"controls": jnp.zeros((N, B, D))}
        args = zero | dots, weights, surrogate, prediction
        return tangent, tangent_by_hand(ARGS, *args, alone=keep == "each")

    for name, (keep, weights) in KEEPS.items():
        if (weights is None and keep != "each") or name in ("from the end", "all"):
            continue  # drawn; or what another name runs as well
        weights = np.ones(N) if weights is None else np.array(weights, float)
        assert_close(*tangents(keep, name in STRETCHES, weights), rtol=1e-8, atol=1e-9)


@every_keep
def test_both_modes(keep):
    path = sdo.gaussian_path(COVARIANCE)
    is_refused = keep in [KEEPS[name][0] for name in STRETCHES]
    args = {name: ARGS[name] for name in ARGS if not (is_refused and name == "controls")}
    dots = {name: DOTS[name] for name in args}

    @compiled
    def both(args, dots):
        fun = lambda args: loss(partial(run, keep_step=keep, surrogate=path), ARGS | args)
        grad = jax.grad(fun)(args)
        return grad, jax.jvp(fun, (args,), (dots,))[1], optax.tree.vdot(grad, dots)

    grad, *slopes = both(args, dots)
    assert_close(*slopes)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(grad))


@pytest.mark.parametrize("keep", ["first", "each", sdo.Subset(0.5)])
def test_vmap_over_samples_is_the_batch(keep):
    def grad(args):
        fun = lambda z: loss(partial(run, keep_step=keep), args | {"noise": z})
        return jax.grad(fun)(args["noise"])

    def alone(noise, step_noise, controls):
        args = {
            "noise": noise[None],
            "step_noise": step_noise[:, None],
            "controls": controls[:, None],
            "params": ARGS["params"],
        }
        return grad(args)[0]

    arrays = ARGS["noise"], ARGS["step_noise"], ARGS["controls"]
    both = compiled(lambda args, *arrays: (jax.vmap(alone, (0, 1, 1))(*arrays), grad(args)))
    assert_close(*both(ARGS, *arrays))


def test_one_step_is_exact_whatever_is_kept():
    schedule = sdo.linear(1, start=399)
    args = ARGS | {"controls": ARGS["controls"][:1], "step_noise": ARGS["step_noise"][:1]}

    def grad(keep):
        ours = partial(run, keep_step=keep, surrogate=sdo.gaussian_path(0.5))
        fun = plain if keep is None else ours
        return jax.grad(lambda args: loss(partial(fun, schedule=schedule), args))(args)

    keeps = (None, "first", "random", "each", sdo.Last(1), sdo.Subset(1.0))
    exact, *others = compiled(lambda: [grad(keep) for keep in keeps])()
    for other in others:
        assert_close(other, exact, rtol=1e-8)


def test_the_steps_one_by_one_sum_to_each():
    path = sdo.gaussian_path(COVARIANCE)
    args = {k: v for k, v in ARGS.items() if k != "controls"}

    def grad(keep):
        fun = partial(run, keep_step=keep, surrogate=path)
        return jax.grad(lambda args: loss(fun, ARGS | args))(args)

    @compiled
    def everything():
        # Of the noise each has the whole path, which is there N times instead of once.
        _, pullback = jax.vjp(lambda a: path_only(a, path), args)
        return [grad(n) for n in range(N)], pullback(jnp.cos(run(ARGS)))[0], grad("each")

    ones, walk, each = everything()
    total = jax.tree.map(lambda p, *terms: p + sum(t - p for t in terms), walk, *ones)
    assert_close(total, each, rtol=1e-8)


def path_only(args, path):
    """The sampler with a network that is everywhere detached: constants plus G x."""
    signal = jnp.asarray(SCHEDULE.train_signal)

    def denoiser(x, t):
        level = signal[t[0].astype(int)]
        eigen = jnp.sqrt(1 - level) / (level * path.variances + 1 - level)
        return (x @ path.basis * eigen) @ path.basis.T + 0 * args["params"]["bias"]

    options = {"eta": 1.0, "step_noise": args["step_noise"], "keep_step": "all"}
    return sdo.sample(denoiser, args["noise"], SCHEDULE, **options)


def test_a_random_step_of_each_sample_is_uniform_and_weighted():
    """A sample's term is N times that of one step, its own; the steps are drawn evenly."""
    num = 1200
    path = sdo.gaussian_path(0.5)
    args = {
        "noise": np.broadcast_to(ARGS["noise"][:1], (num, D)),
        "step_noise": np.broadcast_to(ARGS["step_noise"][:, :1], (N, num, D)),
        "controls": np.broadcast_to(ARGS["controls"][:, :1], (N, num, D)),
        "params": ARGS["params"],
    }
    first = {k: args[k][:, :1] for k in ("step_noise", "controls")}
    one = args | first | {"noise": args["noise"][:1]}

    def grad(keep, args):
        fun = partial(run, keep_step=keep, surrogate=path)
        return jax.grad(lambda z: loss(fun, args | {"noise": z}))(args["noise"])

    @compiled
    def everything(one, args):
        ones = jnp.concatenate([grad(n, one) for n in range(N)])
        return ones, grad("each", one), grad("random", args)

    ones, each, random = everything(one, args)
    walk = (np.sum(ones, axis=0) - each) / (N - 1)
    candidates = walk + N * (ones - walk)
    distance = np.linalg.norm(random[:, None] - candidates, axis=-1)
    assert np.max(np.min(distance, axis=1)) < 1e-9 * np.max(np.abs(candidates))
    drawn = np.bincount(np.argmin(distance, axis=1), minlength=N)
    assert chisquare(drawn).pvalue > 1e-5


@pytest.mark.parametrize("surrogate", [None, 0.5], ids=["constant", "gaussian"])
def test_a_subset_is_unbiased(surrogate):
    path = None if surrogate is None else sdo.gaussian_path(surrogate)

    def grad(keep, rng_key):
        fun = partial(run, keep_step=keep, surrogate=path, rng_key=rng_key, prediction="v")
        return jax.grad(partial(loss, fun))(ARGS)

    num = 2000

    @compiled
    def everything(rng_key):
        draws = jax.vmap(partial(grad, sdo.Subset(0.6)))(jax.random.split(rng_key, num))
        return draws, jax.grad(partial(loss, partial(plain, prediction="v")))(ARGS)

    draws, exact = everything(key_of(1))

    def largest_z(draws, exact):
        error = draws - exact
        spread = np.std(error, axis=0) / num**0.5
        # What is the same in each draw must be right.
        z = np.where(spread > 1e-9, np.mean(error, axis=0) / np.maximum(spread, 1e-12), 0)
        assert np.all((spread > 1e-9) | (np.abs(error).max(0) < 1e-9))
        return float(np.max(np.abs(z)))

    z = jax.tree.leaves(jax.tree.map(largest_z, draws, exact))
    # 132 numbers: a right estimator fails with probability below 132 * 6.8e-6.
    assert max(z) < 4.5
    # And has power: a gradient that is wrong by a tenth is seen.
    wrong = jax.tree.map(lambda leaf: 0.9 * leaf, exact)
    assert max(jax.tree.leaves(jax.tree.map(largest_z, draws, wrong))) > 6


# ---------------------------------------------------------------------------------------
# Gaussian data: closed forms.


def gaussian_denoiser(schedule, covariance, mean):
    signal = jnp.asarray(schedule.train_signal)

    def denoiser(x, t):
        level = signal[t.astype(int)][:, None, None]
        total = level * covariance + (1 - level) * jnp.eye(D)
        centred = x[..., None] - jnp.sqrt(level) * mean[:, None]
        return (jnp.sqrt(1 - level) * jnp.linalg.solve(total, centred))[..., 0]

    return denoiser


def test_for_gaussian_data_path_and_shortcut_are_what_they_are_on_paper():
    schedule = sdo.linear(20)
    mean = np.arange(1.0, D + 1)
    denoiser = gaussian_denoiser(schedule, COVARIANCE, mean)
    path = sdo.gaussian_path(COVARIANCE)
    variances, basis = np.linalg.eigh(COVARIANCE)

    @compiled
    def jacobians(z):
        def jacobian(keep, surrogate=None):
            options = {"keep_step": keep, "surrogate": surrogate, "rng_key": KEY}
            # Row i of a batch is moved along coordinate i.
            fun = partial(sdo.sample, denoiser, schedule=schedule, **options)
            return jax.jvp(lambda z: fun(noise=z), (z,), (jnp.eye(D),))[1]

        keeps = ("first", "random", "each", sdo.Last(3), sdo.Subset(0.3))
        return jacobian("all"), jacobian("first"), [jacobian(keep, path) for keep in keeps]

    full, raw, paths = jacobians(np.ones((D, D)))
    signal = np.array(schedule.signal)[:, None]
    now, then = signal[:-1], signal[1:]
    a = np.sqrt(then / now)
    b = np.sqrt(1 - then) - a * np.sqrt(1 - now)
    slope = np.sqrt(1 - now) / (now * np.maximum(variances, 0) + 1 - now)
    exact = np.prod(a + b * slope, axis=0)
    first = np.prod(a) + b[0] * np.prod(a[1:]) * slope[0]
    assert_close(full, (basis * exact) @ basis.T, rtol=1e-7, atol=1e-9)
    assert_close(raw, (basis * first) @ basis.T, rtol=1e-7, atol=1e-7)
    # The weighted difference of "random", which is zero here, is one of numbers 20 x 157 as large.
    for ours in paths:
        assert_close(ours, full, rtol=1e-7, atol=1e-7)
    # The paper's path is too long by the signal that was lost.
    np.testing.assert_allclose(np.prod(a), schedule.signal[0] ** -0.5, rtol=1e-9)
    assert np.prod(a) > 150


def test_to_detach_v_is_the_path_of_unit_variance():
    unit = sdo.gaussian_path(1.0)

    def tangent(prediction, surrogate):
        def no_matter(x, t):
            return jax.lax.stop_gradient(jnp.sin(x))

        options = {"prediction": prediction, "surrogate": surrogate, "keep_step": -1}
        fun = lambda z: sdo.sample(no_matter, z, SCHEDULE, **options)
        return jax.jvp(fun, (jnp.ones((1, D)),), (jnp.ones((1, D)),))[1]

    # The last step is kept, and its network is constant: what is left of it is its `a`.
    signal = SCHEDULE.signal
    a_of_eps, a_of_v = signal[-2] ** -0.5, signal[-2] ** 0.5
    cases = [("eps", unit), ("v", None), ("v", unit), ("eps", None)]
    ours, detached, both, raw = compiled(lambda: [tangent(*case) for case in cases])()
    assert_close(ours / a_of_eps, detached / a_of_v)
    assert_close(ours / a_of_eps, both / a_of_v)
    assert not np.allclose(ours, raw)


def descend(distance, optimiser, options):
    def step(carry, _):
        z, state = carry
        updates, state = optimiser.update(jax.grad(partial(distance, **options))(z), state)
        return (optax.apply_updates(z, updates), state), None

    z = jnp.zeros((1, D))
    (z, _), _ = jax.lax.scan(step, (z, optimiser.init(z)), length=150)
    return distance(z)


def test_the_raw_shortcut_is_too_long_for_gradient_descent_and_of_use_once_normalised():
    """Find the noise of a sample: with the exact gradient, the paper's, and that of unit length."""
    schedule = sdo.linear(20)
    denoiser = gaussian_denoiser(schedule, 0.3 * np.eye(D), np.zeros(D))
    sgd, decay = optax.sgd(0.5), optax.exponential_decay(-0.3, 1, 0.95)
    unit = optax.chain(optax.normalize_by_update_norm(), optax.scale_by_schedule(decay))

    @compiled
    def everything():
        target = sdo.sample(denoiser, normal(7, 1, D), schedule)

        def distance(z, **options):
            return jnp.sum((sdo.sample(denoiser, z, schedule, **options) - target) ** 2)

        return (
            distance(jnp.zeros((1, D))),
            descend(distance, sgd, {"keep_step": "all"}),
            descend(distance, sgd, {}),
            descend(distance, unit, {}),
            descend(distance, sgd, {"surrogate": sdo.gaussian_path(0.3)}),
        )

    start, exact, raw, normalised, path = everything()
    assert exact < 1e-6 * start
    assert not raw < start
    assert normalised < 1e-4 * start
    assert path < 1e-6 * start


# ---------------------------------------------------------------------------------------
# What it costs.


def program(fun, num_steps, **options):
    width, batch = 64, 16
    params = normal(8, width, width) / 8, normal(9, width, width) / 8
    z = normal(10, batch, width)

    def value(params, z):
        def denoiser(x, t):
            return jnp.tanh(jnp.tanh(x @ params[0]) @ params[1]) + t[:, None] / 1000

        x = sdo.sample(denoiser, z, sdo.linear(num_steps), rng_key=KEY, **options)
        return jnp.mean(x**2)

    return jax.jit(fun(value)).lower(params, z).compile()


def test_memory_does_not_grow_with_the_steps_and_is_paid_for_derivatives_alone():
    both = partial(jax.value_and_grad, argnums=(0, 1))

    def growth(**options):
        """Return how many bytes a step takes."""
        long, short = (
            program(both, n, **options).memory_analysis().temp_size_in_bytes for n in (80, 20)
        )
        return (long - short) / 60

    state = 16 * 64 * 8
    # A few numbers a step: its coefficients, and those of the path.
    assert growth(keep_step="random") < 100
    assert growth(surrogate=sdo.gaussian_path(np.eye(64))) < 10 * 64 * 8 < state
    assert growth(keep_step="all") > 3 * state
    assert growth(keep_step="all", checkpoint=True) < 1.2 * state

    def calls(keep):
        """Return how many networks a value takes; XLA counts the body of a loop once."""
        params = normal(8, 64, 64)
        flops = program(lambda f: f, 20, keep_step=keep).cost_analysis()["flops"]
        return round(flops / (2 * 2 * 16 * params.size))

    assert [calls(keep) for keep in ("all", "random")] == [1, 1]


def test_loops_of_detached_steps_carry_no_derivative():
    def carries(fun, *args):
        """Return how many arrays each loop of a program carries."""
        found, programs = [], [jax.make_jaxpr(fun)(*args).jaxpr]
        while programs:
            for eqn in programs.pop().eqns:
                if eqn.primitive.name == "scan":
                    found.append(len(eqn.outvars))  # nothing is stacked
                inner = [getattr(p, "jaxpr", p) for p in eqn.params.values()]
                programs += [getattr(p, "jaxpr", p) for p in inner if hasattr(p, "eqns")]
        return sorted(found)

    def of(keep):
        def fun(z, scale):
            denoiser = lambda x, t: jnp.tanh(scale * x)
            return sdo.sample(denoiser, z, SCHEDULE, keep_step=keep, rng_key=KEY)

        return fun

    args = np.ones((1, 2)), 0.3
    # A loop of kept steps carries x and its derivative, one of detached steps x alone; "random"
    # carries the x that it looks for as well.
    for keep, plain, differentiated in (("random", [2], [2]), (2, [1, 1, 1], [1, 1, 2])):
        fun = of(keep)
        assert carries(fun, *args) == plain
        assert carries(lambda *a, fun=fun: jax.jvp(fun, a, args)[1], *args) == differentiated


# ---------------------------------------------------------------------------------------
# What can't be done says so.


def denoise(x, t):
    return jnp.sin(x)


Z, S = np.ones((2, 3)), sdo.linear(4)
ERRORS = {
    "no batch": (lambda: sdo.sample(denoise, Z[0], S), ValueError, "noise\\[None\\]"),
    "integers": (lambda: sdo.sample(denoise, Z.astype(int), S), TypeError, "floating-point"),
    "unknown": (lambda: sdo.sample(denoise, Z, S, keep_step="second"), ValueError, "'second'"),
    "no such step": (lambda: sdo.sample(denoise, Z, S, keep_step=4), ValueError, "from -4 to 3"),
    "too many": (
        lambda: sdo.sample(denoise, Z, S, keep_step=sdo.Last(5)),
        ValueError,
        "from 1 to 4",
    ),
    "never": (lambda: sdo.sample(denoise, Z, S, keep_step=sdo.Subset(0)), ValueError, "Subset"),
    "a truth": (lambda: sdo.sample(denoise, Z, S, keep_step=True), TypeError, "True"),
    "no key": (lambda: sdo.sample(denoise, Z, S, keep_step="random"), ValueError, "rng_key"),
    "no key either": (
        lambda: sdo.sample(denoise, Z, S, keep_step=sdo.Subset(0.5)),
        ValueError,
        "rng_key",
    ),
    "no noise": (lambda: sdo.sample(denoise, Z, S, eta=1.0), ValueError, "step_noise"),
    "needless noise": (
        lambda: sdo.sample(denoise, Z, S, step_noise=np.ones((4, 2, 3))),
        ValueError,
        "eta=0.0 and some",
    ),
    "noise of another shape": (
        lambda: sdo.sample(denoise, Z, S, eta=1.0, step_noise=np.ones((3, 2, 3))),
        ValueError,
        "step_noise must be",
    ),
    "controls of another shape": (
        lambda: sdo.sample(lambda x, t, u: x, Z, S, controls=np.ones((4, 3))),
        ValueError,
        "controls must be",
    ),
    "output of another shape": (
        lambda: sdo.sample(lambda x, t: x[0], Z, S),
        ValueError,
        "like x",
    ),
    "prediction": (lambda: sdo.sample(denoise, Z, S, prediction="x"), ValueError, "'x'"),
    "eta": (
        lambda: sdo.sample(denoise, Z, S, eta=2.0, step_noise=np.ones((4, 2, 3))),
        ValueError,
        "DDPM",
    ),
    "path of another size": (
        lambda: sdo.sample(denoise, Z, S, surrogate=sdo.gaussian_path(np.ones(4))),
        ValueError,
        "4 dimensions, and a sample has 3",
    ),
    "covariance": (lambda: sdo.gaussian_path(np.ones((3, 2))), ValueError, "flatten"),
    "too many steps": (lambda: sdo.linear(1001), ValueError, "num_train_steps"),
    "a late start": (lambda: sdo.cosine(10, start=1000), ValueError, "num_train_steps"),
    "variances": (lambda: sdo.linear(10, last_beta=1.5), ValueError, "last_beta"),
    "no signal": (
        lambda: sdo.sample(denoise, Z, S._replace(signal=(0.0, 0.2, 0.5, 0.8, 1.0))),
        ValueError,
        "prediction='v'",
    ),
}


def test_the_path_is_too_short_for_a_weak_denoiser():
    """Exact for the best denoiser of N(0, 1); for one that predicts half of the noise it is not."""
    schedule = sdo.linear(50)
    levels = np.asarray(schedule.train_signal)

    def slope(strength, **options):
        def denoiser(x, t):
            return strength * jnp.sqrt(1 - jnp.asarray(levels)[t.astype(int)])[:, None] * x

        sampled = lambda z: sdo.sample(denoiser, z, schedule, **options).sum()
        return compiled(jax.grad(sampled))(np.ones((1, 1)))[0, 0]

    path = {"surrogate": sdo.gaussian_path(1.0)}
    exact, approximate = slope(1.0, keep_step="all"), slope(1.0, **path)
    np.testing.assert_allclose(approximate, exact, rtol=1e-6)
    assert 10 < slope(0.5, keep_step="all") / slope(0.5, **path) < 15


DENOISERS = {
    "no function": (3, {}, "x and t, got int"),
    "one argument": (lambda x: x, {}, r"x and t, got one of \(x\)"),
    "no control": (denoise, {"controls": np.ones((4, 2, 1))}, "x and t and control, got"),
    "control": (lambda x, t, control: x, {}, "x and t, got one of .*as controls"),
}


@pytest.mark.parametrize("name", DENOISERS)
def test_denoisers_of_another_arity(name):
    denoiser, options, words = DENOISERS[name]
    with pytest.raises(TypeError, match=f"denoiser must be a function of {words}"):
        sdo.sample(denoiser, Z, S, **options)


COVARIANCES = {
    "negative": ([-1.0, 1.0], "covariance must be finite and not negative, got -1"),
    "nan": ([1.0, np.nan], "covariance must be finite, got nan"),
    "no symmetry": ([[1.0, 2.0], [0.0, 1.0]], "must be symmetric"),
    "indefinite": ([[1.0, 2.0], [2.0, 1.0]], "no negative eigenvalue, got -1"),
}


@pytest.mark.parametrize("name", COVARIANCES)
def test_what_is_no_covariance(name):
    covariance, words = COVARIANCES[name]
    with pytest.raises(ValueError, match=words):
        sdo.gaussian_path(np.array(covariance))


@pytest.mark.parametrize("name", ERRORS)
def test_what_does_not_fit_says_so(name):
    call, error, match = ERRORS[name]
    with pytest.raises(error, match=match):
        call()


def test_controls_of_detached_steps_refuse_a_derivative():
    def of_controls(u, keep):
        return loss(partial(run, keep_step=keep), ARGS | {"controls": u})

    for derivative, keep in ((jax.grad, "first"), (jax.jacfwd, sdo.Last(2))):
        with pytest.raises(TypeError, match="keep_step='each'"):
            jax.eval_shape(derivative(partial(of_controls, keep=keep)), ARGS["controls"])
    # What the message says works.
    cut_off = lambda u: of_controls(jax.lax.stop_gradient(u), "first")
    assert np.all(compiled(jax.grad(cut_off))(ARGS["controls"]) == 0)
