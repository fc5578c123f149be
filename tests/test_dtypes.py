"""Half, single and double precision, alone and side by side in one position."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cheap import equations_of
from invariance import PASS, largest_z_of
from tables import ALGORITHMS, ESTIMATORS, EVERY, build, members
from targets import TARGETS
from test_optimizer_hosts import PARAMS, TRANSFORMS

import probbp
from probbp.estimators import forward
from probbp.ops import feedback, gradient_reversal, rtrl, substitute, sus

HALVES = ("float16", "bfloat16")
POSITIONS = {
    "half": {"a": jnp.full(2, 0.5, "float16")},
    "brain": {"a": jnp.full(2, 0.5, "bfloat16")},
    "all": [jnp.full((i, 2), 0.5, dtype) for i, dtype in enumerate((*HALVES, "float32"), 1)]
    + [{"double": jnp.array(0.5)}],
}


def logdensity_fn(position):
    return -sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(position)) / 2


def dtypes(tree):
    return jax.tree.map(lambda leaf: leaf.dtype, tree)


@pytest.mark.parametrize(
    ("name", "position"),
    [
        *(
            pytest.param(
                name, "all", marks=() if name in ("mala", "pc_line_fmala") else pytest.mark.slow
            )
            for name in EVERY
            if "wrong" not in name
        ),
        ("mala", "half"),
        pytest.param("pc_line_fmala, plane", "half", marks=pytest.mark.slow),
        ("line_fmala, plane", "brain"),
    ],
)
def test_each_leaf_keeps_its_dtype(name, position):
    start = POSITIONS[position]
    algorithm, step_size, *_ = EVERY[name]
    # Warm-up hands over arrays in double precision.
    scale = jnp.linspace(0.5, 2, sum(leaf.size for leaf in jax.tree.leaves(start)))
    algorithm = algorithm(logdensity_fn, jnp.asarray(step_size / len(scale)), scale)
    state = algorithm.init(start, jax.random.key(0))
    assert dtypes(state.position) == dtypes(state.logdensity_grad) == dtypes(start)
    # A scan refuses a state that changes its type.
    last, infos = jax.jit(
        lambda state, keys: jax.lax.scan(lambda s, k: algorithm.step(k, s), state, keys)
    )(state, jax.random.split(jax.random.key(1), 20))
    assert jnp.any(infos.is_accepted)
    assert not jnp.any(infos.is_divergent)
    for before, after in zip(jax.tree.leaves(start), jax.tree.leaves(last.position), strict=True):
        assert jnp.all(jnp.isfinite(after))
        assert jnp.any(before != after)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("mala", "float16"),
        ("fmala", "bfloat16"),
        ("pc_line_fmala", "float16"),
        ("line_fmala, plane", "bfloat16"),
    ],
)
def test_half_precision_is_exact_as_far_as_it_is_precise(name, dtype):
    """Rounding of a position moves it by a thousandth, far less than the Monte Carlo error."""
    target = TARGETS["mix"]
    algorithm = build(name, target.logdensity_fn)
    assert largest_z_of(jax.random.key(0), algorithm, target, 20_000, 8, dtype) < PASS


def rates(position, step_size):
    """Return MALA's acceptance rates of a first move from each of several positions."""
    wide = lambda x: logdensity_fn(x.astype(jnp.float32))
    mala = probbp.mala(wide, step_size)

    def rate(position, key):
        return mala.step(key, mala.init(position, key))[1].acceptance_rate

    keys = jax.random.split(jax.random.key(1), len(position))
    return jax.jit(jax.vmap(rate))(position, keys)


def test_half_precision_of_many_parameters_is_added_up_in_single():
    """Sums of squares are about 5000, where bfloat16 has steps of 32: a log ratio is lost in it."""
    position = jax.random.normal(jax.random.key(0), (64, 5000), jnp.float32)
    expected, found = (rates(position.astype(d), 1e-3) for d in ("float32", "bfloat16"))
    assert expected.mean() > 0.9
    assert abs(found.mean() - expected.mean()) < 0.1


@pytest.mark.parametrize("dtype", HALVES)
def test_the_surrogate_wants_single_precision(dtype):
    position = {"a": jnp.zeros(2, dtype), "b": jnp.zeros(3, dtype)}
    with pytest.raises(TypeError, match=f"{dtype} is too coarse: cast the position"):
        probbp.surrogate(logdensity_fn).init(position)
    probbp.surrogate(logdensity_fn).init(position | {"b": jnp.zeros(3, "float32")})


@members(name for name in ALGORITHMS if "wrong" not in name)
def test_single_stays_single_and_double_is_never_shortened(name):
    scale = None if name == "surrogate" else jnp.ones(3)
    algorithm = build(name, logdensity_fn, inverse_mass_matrix=scale)
    init = (lambda x, key: algorithm.init(x)) if name == "surrogate" else algorithm.init

    def run(position, key):
        state = init(position, key)
        return state, algorithm.step(key, state)

    single, double = jnp.zeros(3, "float32"), jnp.zeros(3)
    outputs = jax.tree.leaves(jax.eval_shape(run, single, jax.random.key(0)))
    assert {o.dtype for o in outputs if jnp.issubdtype(o.dtype, jnp.floating)} == {single.dtype}
    shortened = [
        eqn
        for eqn in equations_of(run, double, jax.random.key(0))
        if eqn.primitive.name == "convert_element_type"
        and eqn.invars[0].aval.dtype == double.dtype
        and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
        and eqn.outvars[0].aval.dtype != double.dtype
    ]
    assert not shortened


def test_a_run_in_half_precision():
    """The warm-up is in full; NumPy and ArviZ know no `bfloat16`, and get it in single."""
    start = {"a": jnp.zeros(2, "float16"), "b": jnp.zeros((), "bfloat16")}
    data = probbp.sample(
        jax.random.key(0),
        partial(probbp.mala, logdensity_fn),
        start,
        num_warmup=300,
        num_samples=1000,
        progress_bar=False,
    )
    assert {k: str(v.dtype) for k, v in data.posterior.data_vars.items()} == {
        "a": "float16",
        "b": "float32",
    }
    for name, draws in data.posterior.data_vars.items():
        values = draws.values.astype(float)
        assert abs(values.mean()) < 0.25, name
        assert abs(values.std() - 1) < 0.2, name
    assert np.all(np.isfinite(data.sample_stats["lp"].values.astype(float)))


def driven(x, scan):
    def leaky(carry, u):
        carry = jnp.tanh(x[0, 0, 0] * carry + u)
        return carry, carry

    return scan(leaky, x[0, 1, 0], jnp.linspace(0, 1, 12, dtype=x.dtype).reshape(4, 3))[0]


# Operations of (batch, length, heads, features) and a key, with JAX's own function of them.
IN_HALF = {
    "substitute": (lambda x, key: substitute(jnp.round(x), x), jnp.round),
    "gradient_reversal": (lambda x, key: gradient_reversal(x, 0.5), lambda x: x),
    "sus": (
        lambda x, key: sus.dot_product_attention(x, x, x, keep=2, rng_key=key),
        lambda x: jax.nn.dot_product_attention(x, x, x),
    ),
    "rtrl.scan": (lambda x, key: driven(x, rtrl.scan), lambda x: driven(x, jax.lax.scan)),
    "feedback.dense": (
        lambda x, key: feedback.dense(x, jnp.eye(3, dtype=x.dtype), jnp.ones((3, 3), x.dtype)),
        lambda x: x @ jnp.eye(3, dtype=x.dtype),
    ),
}


@pytest.mark.parametrize("dtype", HALVES)
@members(IN_HALF, quick=["sus", "feedback.dense"])
def test_an_operation_in_half_precision_has_jax_s_value_and_its_own_derivative(name, dtype):
    op, own = IN_HALF[name]
    x = jax.random.normal(jax.random.key(0), (1, 4, 1, 3)).astype(dtype)
    key = jax.random.key(1)
    value, expected = op(x, key), own(x)
    assert value.dtype == expected.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(value.astype(float), expected.astype(float), atol=4 * eps)

    def loss(x):
        return jnp.sum(op(x, key).astype("float32") ** 2)

    grad, single = jax.grad(loss)(x), jax.grad(loss)(x.astype("float32"))
    assert grad.dtype == dtype
    difference = jnp.linalg.norm(grad.astype("float32") - single) / jnp.linalg.norm(single)
    assert difference < 10 * eps


@pytest.mark.parametrize("dtype", HALVES)
@members(ESTIMATORS, quick=["reverse", "gaussian", "controlled"])
def test_an_estimator_in_half_precision_has_the_value_and_on_average_the_gradient(name, dtype):
    params = {"a": jnp.linspace(-1, 1, 6).astype(dtype), "b": jnp.ones((), dtype)}
    value_and_grad = ESTIMATORS[name].estimator(logdensity_fn)
    keys = jax.random.split(jax.random.key(0), 4000)
    values, grads = jax.jit(jax.vmap(value_and_grad, (0, None)))(keys, params)
    np.testing.assert_array_equal(values, logdensity_fn(params))
    assert dtypes(grads) == dtypes(params)
    exact = jax.grad(logdensity_fn)(params)
    for name, expected in exact.items():
        leaf = grads[name].astype(float)
        # One coordinate of one estimate is rounded, which moves the mean by less than that.
        rounding = float(jnp.finfo(dtype).eps) * jnp.max(jnp.abs(leaf))
        error = leaf.std(axis=0) / len(keys) ** 0.5
        assert jnp.all(jnp.abs(leaf.mean(axis=0) - expected.astype(float)) < 4.5 * error + rounding)


@pytest.mark.parametrize("dtype", HALVES)
@members(TRANSFORMS)
def test_an_optimizer_keeps_half_precision(name, dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    transform = TRANSFORMS[name](params)
    state = transform.init(params)
    update = jax.jit(transform.update)
    for _ in range(3):
        updates, new = update(jax.grad(logdensity_fn)(params), state, params)
        assert dtypes(updates) == dtypes(params)
        assert dtypes(new) == dtypes(state)
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(updates))
        params, state = optax.apply_updates(params, updates), new


@pytest.mark.parametrize(
    "leaf", [jnp.arange(2), jnp.array([True]), jnp.ones(2, complex), 3, np.int8(1)], ids=repr
)
@pytest.mark.parametrize(
    "run",
    [
        lambda position: probbp.mala(logdensity_fn, 0.1).init(position),
        lambda position: probbp.pc_line_fmala(logdensity_fn, 0.1).init(position),
        lambda position: probbp.warmup(
            jax.random.key(0), partial(probbp.fmala, logdensity_fn), position, 5
        ),
        lambda position: probbp.sample(
            jax.random.key(0), partial(probbp.fmala, logdensity_fn), position, progress_bar=False
        ),
        lambda position: forward()(logdensity_fn)(jax.random.key(0), position),
    ],
    ids=["mala", "pc_line_fmala", "warmup", "sample", "forward"],
)
def test_a_leaf_that_is_no_real_number_is_named(run, leaf):
    with pytest.raises(TypeError, match=r"\['site'\]\[0\] has dtype (int|bool|complex)"):
        run({"site": (leaf,), "x": jnp.ones(2)})
