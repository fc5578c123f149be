"""What is compiled, and how often; what memory it takes, and who owns it."""

import gc
import re
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from numpyro.infer import MCMC, SVI, BarkerMH, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from tables import PROGRAMS, build, members

import probbp
from probbp.estimators import averaged, forward, reverse
from probbp.numpyro import Kernel, Optim
from probbp.runs import fingerprints
from probbp.samplers import progress
from probbp.samplers.programs import latest

START = {"a": jnp.zeros(3), "b": (jnp.zeros(()),)}


def logdensity_fn(x):
    return -jnp.sum(x["a"] ** 2) / 2 - jnp.sum(jnp.cosh(x["b"][0]))


def quiet(key, algorithm, **options):
    options = {"num_warmup": 0, "num_samples": 20, "num_chains": 3, "metric": None} | options
    return probbp.sample(jax.random.key(key), algorithm, START, progress_bar=False, **options)


def same(ours, theirs, **tolerance):
    assert set(ours.posterior.data_vars) == set(theirs.posterior.data_vars)
    for name, values in ours.posterior.data_vars.items():
        np.testing.assert_allclose(values.values, theirs.posterior[name].values, **tolerance)


@pytest.fixture
def compiled():
    """Events of compilation, as they happen."""
    events = []

    def listen(name, seconds, **kwargs):
        if name.endswith("backend_compile_duration"):
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def model(y):
    mean = numpyro.sample("mean", dist.Normal(0, 3))
    numpyro.sample("y", dist.Normal(mean, 1), obs=y)


# ---------------------------------------------------------------------------------------
# Compilation.


def test_an_equal_call_of_sample_compiles_nothing(compiled):
    """Though every function in it is another object."""

    def run(key):
        algorithm = partial(probbp.fmala, lambda x: logdensity_fn(x))
        half = lambda x: {"half": x["a"] / 2} | x
        return quiet(key, algorithm, num_warmup=20, postprocess_fn=half)

    first = run(0)
    assert compiled
    compiled.clear()
    again, other = run(0), run(1)
    assert not compiled
    same(first, again, rtol=0)
    assert not np.array_equal(first.posterior["a"].values, other.posterior["a"].values)


def test_a_scan_from_python_s_numbers_is_compiled_once(caplog):
    """They are weakly typed, what comes back from the first stretch is not."""
    f = lambda c, _: (c * jnp.float32(0.5), c)
    with jax.log_compiles():
        carry, ys = probbp.checkpointed_scan(f, 1.0, 20, every=10, progress_bar=False)
    assert carry.dtype == ys.dtype == jax.lax.scan(f, 1.0, None, 20)[0].dtype == jnp.float32
    assert len(re.findall(r"Finished XLA compilation of jit\(steps\)", caplog.text)) == 1


def test_what_differs_is_compiled_anew():
    """Nothing is taken for the same that is not: settings, and the precision."""
    algorithm = partial(probbp.mala, logdensity_fn)
    plain = quiet(0, algorithm)
    thinned = quiet(0, algorithm, thinning=2)
    assert not np.array_equal(plain.posterior["a"].values, thinned.posterior["a"].values)
    with jax.enable_x64(False):
        single = probbp.sample(
            jax.random.key(0),
            algorithm,
            jax.tree.map(lambda x: x.astype(jnp.float32), START),
            num_warmup=0,
            num_samples=20,
            num_chains=3,
            metric=None,
            progress_bar=False,
        )
    assert single.posterior["a"].dtype == np.float32


def test_a_second_run_of_mcmc_compiles_no_more_than_numpyro_s_own(compiled):
    """NumPyro compiles its loop anew for each run; ours adds nothing to that."""
    y = jnp.arange(5.0)

    def num_compiled(kernel):
        mcmc = MCMC(kernel, num_warmup=10, num_samples=10, progress_bar=False)
        mcmc.run(jax.random.key(0), y)
        compiled.clear()
        mcmc.run(jax.random.key(1), y)
        return len(compiled)

    assert num_compiled(Kernel(model, probbp.fmala)) <= num_compiled(BarkerMH(model)) <= 2


def test_an_update_of_svi_compiles_once(compiled):
    y, other = jnp.arange(5.0), jnp.ones(5)
    optim = Optim(optax.adam(1e-2), forward())
    svi = SVI(model, AutoNormal(model), optim, Trace_ELBO())
    update = jax.jit(svi.update)
    state, _ = update(svi.init(jax.random.key(0), y), y)
    compiled.clear()
    update(state, other)
    assert not compiled


@pytest.mark.parametrize("estimator", [reverse(), averaged(forward(2), 2, batch_size=1)])
def test_an_estimator_compiles_once(estimator, compiled):
    value_and_grad = jax.jit(estimator(logdensity_fn))
    value_and_grad(jax.random.key(0), START)
    key, other = jax.random.key(1), jax.tree.map(lambda x: x + 1, START)
    compiled.clear()
    value_and_grad(key, other)
    assert not compiled


def test_an_equal_loop_compiles_nothing(compiled):
    """Though `f` is another object each time; with other data it is another loop."""

    def run(data):
        options = {"length": 6, "every": 3, "progress_bar": False}
        return probbp.checkpointed_scan(lambda x, _: (x + data, x), jnp.zeros(2), **options)[0]

    one, two = jnp.ones(2), 2 * jnp.ones(2)
    run(one)
    compiled.clear()
    np.testing.assert_array_equal(run(one), 6)
    assert not compiled
    np.testing.assert_array_equal(run(two), 12)


@members(PROGRAMS)
def test_a_log_density_is_traced_as_often_as_it_is_evaluated(name):
    """Once at the start, as by `blackjax.nuts.init`, and in the step as the table says."""
    traced = []

    def counted_fn(x):
        traced.append(x)
        return logdensity_fn(x)

    algorithm = build(name, counted_fn)
    state = jax.eval_shape(algorithm.init, START, jax.random.key(0))
    assert len(traced) == 1
    traced.clear()
    jax.eval_shape(algorithm.step, jax.random.key(1), state)
    assert len(traced) == PROGRAMS[name].evaluations


def test_a_start_evaluates_once_and_a_compiled_step_is_traced_once():
    traced = []

    def counted_fn(x):
        traced.append(x)
        return logdensity_fn(x)

    algorithm = build("mala", counted_fn)
    state = algorithm.init(START)
    assert len(traced) == 1
    step = jax.jit(algorithm.step)
    for key in jax.random.split(jax.random.key(0), 3):
        state, _ = step(key, state)
    assert len(traced) == 2


def test_threads_keep_their_own_programs():
    """A thread that comes between the comparison and the answer changes nothing for the first."""

    class Interrupted:
        def __eq__(self, other):
            if not isinstance(other, Interrupted):
                return False
            thread = threading.Thread(target=latest, args=(("another",), {}, "another's"))
            thread.start()
            thread.join(timeout=10)
            return not thread.is_alive()

        __hash__ = None

    assert latest((Interrupted(),), {}, "ours") == "ours"
    assert latest((Interrupted(),), {}, "the same") == "ours"
    # By now the latest call is the other thread's.
    assert latest((Interrupted(),), {}, "once more") == "once more"


def test_threads_sample_their_own_densities():
    """At once, and as one after the other."""
    centres = [jnp.full(3, 1.0), jnp.full(3, -100.0)] * 2

    def run(centre):
        around = lambda x: logdensity_fn({"a": x["a"] - centre, "b": x["b"]})
        start = {"a": centre, "b": START["b"]}
        options = {"num_warmup": 0, "num_samples": 5, "num_chains": 1, "metric": None}
        return probbp.sample(
            jax.random.key(0), partial(probbp.mala, around), start, progress_bar=False, **options
        )

    alone = [run(centre) for centre in centres[:2]] * 2
    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(run, centres), alone, strict=True):
            same(ours, theirs, rtol=0)


def test_nothing_is_kept_of_a_call_that_is_being_traced():
    """A tracer would outlive its trace, and meet the data of the next call."""
    loop = partial(probbp.checkpointed_scan, length=2, progress_bar=False)
    start, data = jnp.zeros(2), jnp.ones(2)
    run = lambda data: loop(lambda x, _: (x + data, x), start)[0]
    words = "can't be inside jax.jit, jax.vmap or jax.grad. Call it outside"
    with pytest.raises(TypeError, match=words):
        jax.jit(run)(data)
    with pytest.raises(TypeError, match=words):
        jax.vmap(lambda x: loop(lambda x, _: (x + 1, x), x))(jnp.ones(2))
    np.testing.assert_array_equal(run(data), 2)


def test_data_of_jax_are_known_by_identity(compiled, monkeypatch):
    """Nothing reads them to find out that they are the same; equal ones elsewhere are read."""
    read, contiguous = [], np.ascontiguousarray

    def noted(value):
        read.append(np.size(value))
        return contiguous(value)

    monkeypatch.setattr(fingerprints.np, "ascontiguousarray", noted)
    data = jnp.arange(1000.0)
    copy, changed = jnp.array(data), jnp.nextafter(data, jnp.inf)
    around = lambda data: partial(probbp.mala, lambda x: logdensity_fn(x) - jnp.sum(data) / 1e9)
    first = quiet(0, around(data), num_samples=2)
    compiled.clear()
    read.clear()  # compiling reads them
    quiet(0, around(data), num_samples=2)
    assert not compiled
    assert max(read, default=0) < data.size
    copied = quiet(0, around(copy), num_samples=2)
    assert not compiled
    assert max(read) == data.size
    same(first, copied, rtol=0)
    quiet(0, around(changed), num_samples=2)
    assert compiled


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.array([0.0]), np.array([-0.0])),
        (np.array([1, 2]), np.array([[1, 2]])),
        (np.array([1.0]), np.array([1])),
        (jax.random.key_data, lambda key: key),
        (lambda key: key, lambda key: jax.random.wrap_key_data(1 + jax.random.key_data(key))),
    ],
    ids=["signs", "shapes", "dtypes", "keys and their data", "keys"],
)
def test_constants_are_compared_to_the_last_bit(one, other):
    one, other = (f(jax.random.key(0)) if callable(f) else f for f in (one, other))
    assert not fingerprints.same_bits(one, other)
    assert fingerprints.same_bits(one, jax.tree.map(lambda x: x.copy(), one))


def test_a_nan_is_the_same_nan():
    assert fingerprints.same_bits(jnp.full(3, jnp.nan), np.full(3, np.nan))


def test_data_that_have_changed_are_seen():
    """A log density may read what is no argument of its own, and JAX knows a function by name."""
    centre = np.array([0.0])
    shift = {"by": 0.0}

    def around(x):
        return -jnp.sum((x - centre - shift["by"]) ** 2) / 2

    algorithm = partial(probbp.mala, around)

    def draws():
        options = {"num_warmup": 0, "num_samples": 400, "initial_step_size": 0.5, "metric": None}
        start = lambda key: jnp.asarray(centre + shift["by"])
        return probbp.sample(
            jax.random.key(0), algorithm, start, progress_bar=False, **options
        ).posterior["x"]

    # One standard deviation of the mean of 1600 draws is below a tenth.
    assert abs(draws().mean()) < 0.5
    shift["by"] = 10.0
    assert abs(draws().mean() - 10) < 0.5
    centre += 10
    assert abs(draws().mean() - 20) < 0.5


def test_what_is_called_back_is_called_anew():
    """Two functions that are called back look the same in a program, and are not."""

    def num_calls():
        calls = []

        def called_back(x):
            calls.append(x)
            return np.zeros(())

        def around(x):
            shape, at = jax.ShapeDtypeStruct((), float), jax.lax.stop_gradient(x["a"])
            zero = jax.pure_callback(called_back, shape, at, vmap_method="sequential")
            return logdensity_fn(x) + zero

        quiet(0, partial(probbp.mala, around))
        return len(calls)

    assert num_calls() == num_calls() > 0


@pytest.fixture
def kept(tmp_path):
    """A folder of its own for compiled programs, the quick ones too."""
    ours = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in ours}

    def use(values):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    use(ours)
    yield tmp_path
    use(before)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_kept_program_that_is_damaged_costs_time_alone(damage, kept):
    """What the tests keep between runs: another run may be writing it, or was killed."""

    def compute():
        jax.clear_caches()
        return jax.jit(lambda x: jnp.sum(jnp.sin(x) ** 2))(jnp.arange(5.0))

    right = compute()
    (program,) = kept.glob("jit__lambda*-cache")
    content = program.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    broken = {"truncated": content[:middle], "flipped": flipped, "empty": b""}[damage]
    program.write_bytes(broken)
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
        assert compute() == right


@members(PROGRAMS)
def test_no_tracer_leaks(name):
    algorithm = build(name, logdensity_fn, 0.1)
    with jax.checking_leaks():
        state = jax.eval_shape(algorithm.init, START, jax.random.key(0))
        jax.eval_shape(algorithm.step, jax.random.key(1), state)


@pytest.mark.slow
def test_no_tracer_leaks_from_whole_runs():
    y = jnp.arange(5.0)
    with jax.checking_leaks():
        quiet(0, partial(probbp.mala, logdensity_fn))
        mcmc = MCMC(Kernel(model, probbp.fmala), num_warmup=5, num_samples=5, progress_bar=False)
        mcmc.run(jax.random.key(0), y)
        optim = Optim(optax.adam(1e-2), averaged(forward(), 2))
        svi = SVI(model, AutoNormal(model), optim, Trace_ELBO())
        probbp.checkpointed_scan(
            lambda state, _: svi.update(state, y),
            svi.init(jax.random.key(0), y),
            length=4,
            every=2,
            progress_bar=False,
        )


@pytest.mark.slow
def test_nothing_warns_on_import():
    """In a process of its own, where nothing is loaded yet."""
    code = """
import warnings, importlib, pkgutil
# ArviZ 0.23 announces ArviZ 1 on the first import of a day.
warnings.filterwarnings("ignore", message=r"\\s*ArviZ is undergoing", category=FutureWarning)
import probbp
for found in pkgutil.walk_packages(probbp.__path__, "probbp."):
    importlib.import_module(found.name)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


# ---------------------------------------------------------------------------------------
# Memory.


@pytest.mark.parametrize("name", ["mala", "line_fmala", "pc_fmala"])
def test_a_state_may_be_donated(name):
    """Step after step in the same memory, with the draws of steps in memory of their own."""
    algorithm = build(name, logdensity_fn, 0.1)
    donated, kept = jax.jit(algorithm.step, donate_argnums=1), jax.jit(algorithm.step)
    ours = theirs = algorithm.init(jax.tree.map(jnp.copy, START), jax.random.key(0))
    ours = jax.tree.map(jnp.copy, ours)
    for key in jax.random.split(jax.random.key(1), 20):
        before = ours
        ours, _ = donated(key, ours)
        theirs, _ = kept(key, theirs)
    assert any(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_run_leaves_the_caller_s_arrays_alone():
    quiet(0, partial(probbp.mala, logdensity_fn))
    start = jnp.ones(3)
    carry, _ = probbp.checkpointed_scan(
        lambda x, _: (x + 1, x[0]), start, length=4, progress_bar=False
    )
    assert not any(leaf.is_deleted() for leaf in [start, *jax.tree.leaves(START)])
    np.testing.assert_array_equal(start, 1)
    np.testing.assert_array_equal(carry, 5)


def test_a_long_run_keeps_no_array_of_its_past():
    """Arrays alive on the device while a loop runs: as many at its end as at its beginning."""
    alive = []

    def count(x):
        alive.append(len(jax.live_arrays()))
        return x

    def body(x, _):
        jax.debug.callback(count, x[0])
        return x + 1, x[0]

    probbp.checkpointed_scan(body, jnp.ones(3), length=60, every=3, progress_bar=False)
    assert len(alive) == 60
    assert max(alive[-30:]) <= max(alive[:30])


def test_a_streamed_run_keeps_no_draws_on_the_device(tmp_path, monkeypatch):
    sizes, add = [], progress.add

    def weighed(*args):
        sizes.append(sum(array.nbytes for array in jax.live_arrays()))
        return add(*args)

    monkeypatch.setattr(progress, "add", weighed)
    quiet(0, partial(probbp.mala, logdensity_fn), stream=tmp_path / "draws", every=2)
    assert len(sizes) == 10
    assert max(sizes[2:]) <= sizes[1]


def test_data_of_former_runs_are_freed():
    """Of two runs the last one's data are held, for the same call with another key."""

    def around(centre):
        return lambda x: -jnp.sum((x["a"] - centre) ** 2) / 2 - x["b"][0] ** 2

    centres = [jnp.zeros(3), jnp.ones(3)]
    held = [weakref.ref(centre) for centre in centres]
    while centres:
        quiet(0, partial(probbp.mala, around(centres.pop(0))), num_samples=2)
    gc.collect()
    assert held[0]() is None


def test_chains_in_batches_are_the_same_chains():
    """Also where the last batch is not full."""
    algorithm = partial(probbp.mala, logdensity_fn)
    same(quiet(0, algorithm), quiet(0, algorithm, batch_size=2), rtol=1e-9)


def test_batches_take_less_memory():
    from probbp.samplers.adaptation import adaptation
    from probbp.samplers.programs import programs

    def bytes_of(batch_size):
        wide = lambda x: -jnp.sum(jnp.tanh(jnp.outer(x, jnp.arange(2000.0))) ** 2)
        adapt = adaptation(50, 0, 0.5, metric=None)
        algorithm = partial(probbp.fmala, wide)
        parts = programs(algorithm, adapt, None, 1.0, 1, batch_size)
        position = jnp.zeros(50)
        keys = jax.random.split(jax.random.key(0), 16)
        carry = jax.eval_shape(parts.init, keys, position)
        learnt = jax.eval_shape(parts.learn, carry[1])
        draw_keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (16, 10)))
        lowered = jax.jit(parts.draw).lower(carry[0], learnt, draw_keys)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(2) < 0.3 * bytes_of(None)


def test_memory_that_is_not_there_is_told_with_the_way_out():
    def too_large(x):
        wide = x["a"][0] * jnp.ones(2**21, x["a"].dtype)
        return logdensity_fn(x) - jnp.sum(jnp.exp(-jnp.outer(wide, wide)) @ wide)

    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as caught:
        quiet(0, partial(probbp.fmala, too_large))
    assert any("batch_size" in note for note in caught.value.__notes__)


def test_batches_and_a_mesh_exclude_each_other():
    mesh = jax.make_mesh((1,), ("chains",))
    with pytest.raises(ValueError, match="batch_size"):
        quiet(0, partial(probbp.mala, logdensity_fn), mesh=mesh, batch_size=2)
    with pytest.raises(ValueError, match="batch_size must be a positive integer"):
        quiet(0, partial(probbp.mala, logdensity_fn), batch_size=0)


def test_estimators_in_batches_take_less_memory():
    """The knob that the message names: tangents that run one after the other."""

    def loss(x):
        return jnp.sum(jnp.tanh(jnp.outer(x, jnp.arange(2000.0))) ** 2)

    def bytes_of(estimator):
        lowered = jax.jit(estimator(loss)).lower(jax.random.key(0), jnp.zeros(50))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(forward(16, batch_size=2)) < 0.3 * bytes_of(forward(16))
    assert bytes_of(reverse()) > 0
