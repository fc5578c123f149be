"""Many chains in one call: dispersed starts, warm-up, sampling, and the result for ArviZ."""

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from tqdm.auto import tqdm

from probbp.checks import check_count, check_function, check_number, check_rng_key
from probbp.runs import checkpoints
from probbp.runs.devices import devices
from probbp.runs.fingerprints import fingerprint
from probbp.samplers import checks, progress, sinks, streams
from probbp.samplers.adaptation import Metric, adaptation
from probbp.samplers.algorithm import check_algorithm, own_warmup
from probbp.samplers.algorithm import target_acceptance_rate as best_acceptance_rate
from probbp.samplers.endings import advice_on_memory, distance, resumable, warn_of_a_run
from probbp.samplers.programs import latest, pooled_programs, programs, step_keys
from probbp.types import Tree, ways_out

NUM_UPDATES = 40
"""How often a phase comes back to the host: for the progress bar, and to free the device."""

DRAWS = "draws.zarr"
"""Where a checkpoint's folder has the draws."""


@ways_out()
def sample(
    rng_key: jax.Array,
    algorithm: Callable,
    position: Tree | Callable[[jax.Array], Tree],
    *,
    num_warmup: int | None = None,
    num_samples: int = 1000,
    num_chains: int = 4,
    thinning: int = 1,
    metric: Metric = "diag",
    target_acceptance_rate: float | None = None,
    initial_step_size: float = 1.0,
    dispersion: float = 1.0,
    postprocess_fn: Callable[[Tree], Tree] | None = None,
    coords: dict[str, Any] | None = None,
    dims: dict[str, Any] | None = None,
    every: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    stream: str | os.PathLike[str] | None = None,
    mesh: Mesh | None = None,
    batch_size: int | None = None,
    progress_bar: bool = True,
) -> Any:
    """Run many chains of an algorithm, vectorised, and return what ArviZ reads.

    Each chain learns its own step size and scale in warm-up; both are frozen for the draws that are
    kept. The same key gives the same draws: bit for bit where a run was interrupted and goes on
    from its checkpoint, and to rounding on another number of devices, since XLA may add in another
    order.

    A call that comes to the very programs of the call before, another key aside, compiles nothing;
    data are compared to the last bit. Until the next call these programs hold what they close over.

    With a checkpoint the state is saved each time the run comes back to the host, and the draws are
    on disk as well. The same call, made again after whatever stopped the run, goes on where it
    stood. A process that is killed at any moment leaves the folder whole; against a power failure
    there is only what the file system does. Ctrl-C while draws are made returns those that are
    there, with a warning that says how many; with a checkpoint or stream it is passed on, and says
    how to go on. A checkpoint belongs to the key, the log density with
    the data that it closes over, the algorithm, the settings, and the version of JAX; with others
    it is refused. It may go on with another mesh.

    Args:
        rng_key: key of the whole run.
        algorithm: `(step_size=..., inverse_mass_matrix=...) -> SamplingAlgorithm`, such as
            `functools.partial(probbp.fmala, logdensity_fn)`; BlackJAX's own work too.
        position: one position around which the chains start, or `rng_key -> position`, which is
            asked for each chain's start.
        num_warmup: steps of warm-up per chain, 1000 by default, 2900 for `probbp.surrogate`;
            rounded up to a multiple of the chunk in which the run comes back to the host (a
            fortieth of the phase, a 29th for `probbp.surrogate`).
        num_samples: draws kept per chain.
        num_chains: number of chains.
        thinning: steps per draw that is kept.
        metric: the scale to learn: "diag", "dense", "low_rank", a `MetricRecipe`, or `None`. This,
            the target rate and the initial step size do not concern `probbp.surrogate`, which
            brings a warm-up of its own, pooled over the chains.
        target_acceptance_rate: by default the algorithm's best, known for ours.
        initial_step_size: where the search for the step size starts.
        dispersion: standard deviation of the starts around `position`; halved for a chain until its
            log density is finite.
        postprocess_fn: applied to each position before it is stored in `posterior`.
        coords: as in ArviZ.
        dims: as in ArviZ.
        every: draws of a chain after which the run comes back to the host, by default a fortieth of
            `num_samples`. Where draws go to disk this is what memory holds of them.
        checkpoint: a folder for this run's state and draws, made where it is not there. Several
            processes need one that they share.
        stream: a folder for the draws alone, a Zarr store, from which the result reads what is used
            of it. It also has a group `moments`: each chain's mean and standard deviation.
        mesh: devices to run on, `jax.make_mesh((8,), ("chains",))` for example: chains are split
            over its first axis. Data of the log density that lie on several devices of the mesh
            (`jax.device_put` with a `NamedSharding`; of a mesh with further axes, and with axes of
            type `Auto`) stay there, and JAX adds up what they contribute. With several processes,
            each makes the same call and gets the whole result.
        batch_size: how many chains run at once, all by default. Where their memory is too much: the
            same draws, to rounding, a batch after the other. Not with a mesh.
        progress_bar: whether to show progress: acceptance rate, step size, R-hat so far, and which
            chains are stuck (hardly any proposal is accepted) or diverge.

    Returns:
        ArviZ's object, with `posterior` (chain, draw, ...) and in `sample_stats` the acceptance
        rate, step size, log density `lp` and `diverging` (NaN or infinity at a proposal). Of
        `probbp.surrogate` also `log_weight`, target over surrogate, and in the attributes of
        `sample_stats` what warm-up learned and how many log densities it evaluated.

    Raises:
        ImportError: for `checkpoint` or `stream` without the packages of the extra `runs`.
        OSError: for a disk that is full, and for a folder to which another run writes at this
            moment, in one sentence.
        TypeError: for integer positions, a log density that is no scalar, and what is no algorithm
            on a log density.
        ValueError: where no finite start is found, for counts that are not positive, chains that
            the mesh can't split evenly, and a checkpoint or stream that is damaged or another
            run's; before the first step for names and labels that ArviZ would refuse or lose.

    Warns:
        UserWarning: where all proposals of a chain diverged, or step sizes or positions left every
            scale, as under an improper density; and after Ctrl-C.

    Example:
        >>> import jax, jax.numpy as jnp, probbp
        >>> from functools import partial
        >>> logdensity_fn = lambda x: -0.5 * jnp.sum(x["a"] ** 2)
        >>> data = probbp.sample(
        ...     jax.random.key(0), partial(probbp.line_fmala, logdensity_fn), {"a": jnp.zeros(2)},
        ...     num_warmup=100, num_samples=50, progress_bar=False)
        >>> data.posterior["a"].shape
        (4, 50, 2)
    """
    # ArviZ is slow to import; a script that only takes kernels is spared it.
    from probbp.diagnostics.arviz import from_blackjax

    check_rng_key("rng_key", rng_key)
    num_samples = check_count("num_samples", num_samples)
    num_chains = check_count("num_chains", num_chains)
    thinning = check_count("thinning", thinning)
    if num_warmup is not None:
        num_warmup = check_count("num_warmup", num_warmup, 0)
    every = None if every is None else check_count("every", every)
    batch_size = None if batch_size is None else check_count("batch_size", batch_size)
    counts = {"num_samples": num_samples, "num_chains": num_chains, "thinning": thinning}
    check_number("dispersion", dispersion, "[0, inf)")
    checks.check_folder("checkpoint", checkpoint)
    checks.check_folder("stream", stream)
    check_algorithm(algorithm, metric, on_density=True)
    if isinstance(coords, Mapping) and "draw" in coords:
        raise ValueError("Draws are numbered: leave 'draw' out of coords, and label the result.")
    if mesh is not None and not isinstance(mesh, Mesh):
        raise TypeError(
            f"mesh must be one of JAX, such as jax.make_mesh((8,), ('chains',)), got {mesh!r}."
        )
    if postprocess_fn is not None:
        check_function("postprocess_fn", postprocess_fn, "Pass one that maps a position to a tree.")
    if mesh is not None and batch_size is not None:
        raise ValueError("A mesh splits the chains over devices: give it no batch_size beside.")
    own_steps = 2900 if num_warmup is None else num_warmup
    own = own_warmup(algorithm, own_steps, batch_size=batch_size)
    if own is None:
        num_warmup = 1000 if num_warmup is None else num_warmup
        warmup_chunk = -(-num_warmup // NUM_UPDATES)
        num_warmup = warmup_chunk * (-(-num_warmup // warmup_chunk)) if num_warmup else 0
    else:
        _refuse_beside_own_warmup(metric, target_acceptance_rate, initial_step_size, mesh)
        warmup_chunk, num_warmup = own.chunk, len(own.schedule)
    chunk = -(-num_samples // NUM_UPDATES)
    # The keys hang on this number, and so not on `every`.
    num_keys = chunk * (-(-num_samples // chunk))
    chunk = min(every or chunk, num_samples)
    checks.check_num_keys(num_chains, max(num_warmup, num_keys))
    if not callable(position):
        checks.check_position(position)
        position = jax.tree.map(jnp.asarray, position)
    start_fn = position if callable(position) else None
    if start_fn is not None:
        position = start_fn(rng_key)
    if own is None:
        adapt = adaptation(
            optax.tree.size(position),
            num_warmup,
            best_acceptance_rate(algorithm)
            if target_acceptance_rate is None
            else target_acceptance_rate,
            metric=metric,
            initial_step_size=initial_step_size,
        )
        program = programs(algorithm, adapt, start_fn, dispersion, thinning, batch_size)
    else:
        adapt = own
        program = pooled_programs(algorithm, own, start_fn, dispersion, thinning, batch_size)
    keys_of = partial(partial, step_keys, num_chains=num_chains)
    init_keys = partial(jax.random.split, num=num_chains)
    warmup_keys = keys_of(num_steps=num_warmup, num=warmup_chunk)
    sample_keys = keys_of(num_steps=num_keys, num=chunk)
    key_init, key_warmup, key_sample = jax.random.split(rng_key, 3)
    on = devices(mesh, num_chains)

    postprocess = lambda positions: positions
    if postprocess_fn is not None:
        # One draw after the other, as in `from_blackjax`, but compiled once.
        postprocess = jax.jit(jax.vmap(partial(jax.lax.map, postprocess_fn)))

    def as_arviz(draws, step_size):
        return labeled(draws._replace(position=postprocess(draws.position)), step_size)

    def labeled(draws, step_size):
        num_draws = len(draws.logdensity[0])
        stats = {
            "lp": draws.logdensity,
            "step_size": np.broadcast_to(step_size[:, None], (num_chains, num_draws)),
        }
        infos = SimpleNamespace(**draws.infos)
        return from_blackjax(draws.position, infos, sample_stats=stats, coords=coords, dims=dims)

    def keys_like(keys_fn):
        return jax.eval_shape(keys_fn, rng_key, np.uint32(0))

    # The shapes of all that follows: what a checkpoint and a store must hold.
    starts = jax.eval_shape(init_keys, key_init)
    carry = jax.eval_shape(program.init, starts, position)
    learnt = jax.eval_shape(program.learn, carry[1])
    draw_args = (carry[0], learnt, keys_like(sample_keys))
    one_draw = partial(
        jax.tree.map, lambda leaf: np.zeros((num_chains, 1, *leaf.shape[2:]), leaf.dtype)
    )
    blank = one_draw(jax.eval_shape(program.draw, *draw_args)[1])
    # The very object that is returned, of one draw: what ArviZ would refuse is refused here.
    named = blank._replace(position=one_draw(jax.eval_shape(postprocess, blank.position)))
    blank_step = np.zeros(num_chains, learnt["step_size"].dtype)
    template = labeled(named, blank_step)
    described = {
        "the program of the start": (program.init, (starts, position)),
        "the program of the draws": (program.draw, draw_args),
        "postprocess_fn": (postprocess, (blank.position,)),
    }
    if num_warmup:
        warmup_args = (carry, keys_like(warmup_keys), adapt.schedule[:warmup_chunk])
        described["the program of the warm-up"] = (program.warm_up, warmup_args)
    if mesh is None:
        program, init_keys, warmup_keys, sample_keys, postprocess = latest(
            (num_chains, num_warmup, warmup_chunk, num_keys, chunk),
            described,
            (program, init_keys, warmup_keys, sample_keys, postprocess),
        )

    with ExitStack() as stack:
        stack.enter_context(resumable(checkpoint, stream))
        stack.enter_context(advice_on_memory())
        found = save = None
        folder = checkpoint if stream is None else stream
        if folder is None:
            sink = sinks.in_memory(as_arviz, carry[0].position)
        else:
            if checkpoint is not None:
                stack.enter_context(checkpoints.only_writer(checkpoint, on))
            if stream is not None:
                stack.enter_context(checkpoints.only_writer(stream, on, is_beside=True))
            prints = fingerprint(
                described,
                (rng_key, adapt.schedule, position),
                counts | {"num_warmup": num_warmup, "every": chunk, "coords": coords, "dims": dims},
            )
            if checkpoint is not None:
                moments = progress.no_draws(streams.moments_like(template))
                like = (carry, moments, np.zeros((), int))
                found = checkpoints.newest(checkpoint, prints, lambda done, note: like, (DRAWS,))
                save = stack.enter_context(checkpoints.saver(checkpoint, prints, found, on))
            num_written = 0 if found is None else max(0, found.done - num_warmup)
            path = Path(folder, DRAWS) if stream is None else Path(folder)
            store = streams.stream(path, template, num_samples, chunk, prints, num_written, on)
            sink = sinks.on_disk(as_arviz, store, template, is_lazy=stream is not None)

        done, moments, divergent = 0, progress.no_draws(sink.like), np.zeros((), int)
        if found is None:
            carry = on.jit(program.init)(on.jit(init_keys)(key_init), position)
            checks.check_start(on.get(carry[0].logdensity))
        else:
            done, (carry, moments, divergent) = found.done, found.state
            carry = on.put(carry)
            if moments.count:
                sink.note(moments)

        total = num_warmup + num_samples
        disable = not (progress_bar and on.writes)
        bar = stack.enter_context(tqdm(total=total, initial=done, disable=disable, desc="warm-up"))
        keys_fn = on.jit(warmup_keys)
        run = on.jit(program.warm_up, donate_argnums=0)
        for i in range(done, num_warmup, warmup_chunk or 1):
            schedule = adapt.schedule[i : i + warmup_chunk]
            carry, acceptance = run(carry, keys_fn(key_warmup, np.uint32(i)), schedule)
            if progress_bar:
                shown = acceptance, carry[1].step_size, getattr(carry[1], "held_out_std", np.nan)
                acceptance, step_size, held_out_std = on.get(shown)
                progress.show(bar, warmup_chunk, acceptance, step_size, held_out_std=held_out_std)
            if save is not None:
                save(i + warmup_chunk, (on.get(carry), moments, divergent))

        bar.set_description("sampling")
        states, adapted = carry
        if own is not None:
            own.check(on.get(adapted))
        learnt = on.jit(program.learn)(adapted)
        step_size = on.get(learnt["step_size"])
        keys_fn = on.jit(sample_keys)
        run = on.jit(program.draw, donate_argnums=0)
        reach = 0.0
        try:
            for i in range(max(0, done - num_warmup), num_samples, chunk):
                states, draws = run(states, learnt, keys_fn(key_sample, np.uint32(i)))
                num = min(chunk, num_samples - i)
                draws = jax.tree.map(lambda leaf, num=num: leaf[:, :num], on.get(draws))
                shown = sink.add(i, draws, step_size)
                if progress_bar or folder is not None:
                    moments = progress.add(moments, shown)
                    divergent = divergent + np.sum(draws.infos.get("is_divergent", 0))
                    sink.note(moments)
                if progress_bar:
                    progress.show(
                        bar,
                        num,
                        draws.infos["acceptance_rate"],
                        step_size,
                        rhat=progress.worst_rhat(moments),
                        divergent=divergent,
                    )
                if save is not None:
                    save(num_warmup + i + num, (on.get((states, adapted)), moments, divergent))
        except KeyboardInterrupt:
            if not sink.count():
                raise
            warnings.warn(
                f"Interrupted after {sink.count()} of {num_samples} draws of each chain: these are "
                "returned.",
                stacklevel=2,
            )
        else:
            reach = distance(on.get(states.position), position, dispersion)
    data = sink.read(step_size)
    if own is not None:
        stats = data["sample_stats"]
        stats.attrs.update(own.report(on.get(adapted), stats["log_weight"].values))
    warn_of_a_run(data["sample_stats"], step_size / initial_step_size, reach)
    return data


def _refuse_beside_own_warmup(metric, target_acceptance_rate, initial_step_size, mesh):
    """Raise for what does not concern an algorithm that brings its own warm-up."""
    given = {
        "metric": not (isinstance(metric, str) and metric == "diag"),
        "target_acceptance_rate": target_acceptance_rate is not None,
        "initial_step_size": initial_step_size != 1.0,
        "mesh": mesh is not None,
    }
    names = [name for name, is_given in given.items() if is_given]
    if names:
        raise ValueError(
            f"This algorithm learns from all chains by a warm-up of its own: leave out "
            f"{', '.join(names)}."
        )
