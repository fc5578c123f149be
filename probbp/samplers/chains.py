"""Many chains in one call: dispersed starts, warm-up, sampling, and the result for ArviZ."""

import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
from jax.sharding import Mesh

from probbp.checks import check_count, check_rng_key
from probbp.runs.devices import devices
from probbp.runs.loop import opened
from probbp.samplers import checks
from probbp.samplers.adaptation import Metric
from probbp.samplers.algorithm import check_algorithm
from probbp.samplers.endings import advice_on_memory, warn_of_a_run
from probbp.samplers.phases import DRAWS, Phases, shapes_of_a_state, sink_of
from probbp.samplers.plan import plan, prints_of, start_of
from probbp.samplers.results import result
from probbp.samplers.streams import check_names
from probbp.samplers.tuning import tuning
from probbp.types import Tree, ways_out


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
            scale, as under an improper density; where the log density is so large that its dtype
            rounds it by a half or more (4e6 in single precision); and after Ctrl-C.

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
    check_rng_key("rng_key", rng_key)
    checks.check_folder("checkpoint", checkpoint)
    checks.check_folder("stream", stream)
    check_algorithm(algorithm, metric, on_density=True)
    batch_size = None if batch_size is None else check_count("batch_size", batch_size)
    start = start_of(rng_key, position, dispersion)
    tuned = tuning(
        algorithm,
        start.position,
        num_warmup,
        metric=metric,
        target_acceptance_rate=target_acceptance_rate,
        initial_step_size=initial_step_size,
        batch_size=batch_size,
        mesh=mesh,
    )
    settled = plan(
        rng_key,
        tuned,
        start,
        result(postprocess_fn, coords, dims),
        num_samples=num_samples,
        num_chains=num_chains,
        thinning=thinning,
        every=every,
        batch_size=batch_size,
        mesh=mesh,
    )
    if checkpoint is not None or stream is not None:
        check_names(settled.template)
    prints = cache(partial(prints_of, settled, rng_key, coords, dims))
    on = devices(mesh, num_chains)
    with (
        advice_on_memory(),
        opened(
            settled.num_warmup + num_samples,
            checkpoint=checkpoint,
            prints=prints,
            like=lambda done, note: shapes_of_a_state(settled),
            stream=stream,
            others=(DRAWS,),
            on=on,
            title="warm-up",
            progress_bar=progress_bar,
        ) as loop,
    ):
        sink = sink_of(settled, loop, prints, checkpoint, stream, on)
        phases = Phases(settled, loop, sink, on, progress_bar)
        key_init, key_warmup, key_sample = jax.random.split(rng_key, 3)
        carry = phases.warm_up(key_warmup, phases.begin(key_init))
        if tuned.own is not None:
            tuned.own.check(on.get(carry[1]))
        step_size, reach = phases.draw(key_sample, carry)
    data = sink.read(step_size)
    stats = data["sample_stats"]
    if tuned.own is not None:
        stats.attrs.update(tuned.own.report(on.get(carry[1]), stats["log_weight"].values))
    warn_of_a_run(stats, step_size / initial_step_size, reach)
    return data
