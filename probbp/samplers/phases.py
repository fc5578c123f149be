"""The phases of a run, stretch by stretch: start, warm-up, draws."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from probbp.runs.devices import Devices
from probbp.runs.loop import Loop
from probbp.samplers import checks, progress, sinks, streams
from probbp.samplers.endings import distance, warn_of_rounding
from probbp.samplers.plan import Plan
from probbp.types import Tree

DRAWS = "draws.zarr"
"""Where a checkpoint's folder has the draws."""


class Tally(NamedTuple):
    """What is known of the draws so far.

    Attributes:
        moments: of each chain.
        num_divergent: how many draws of all chains diverged.
    """

    moments: progress.Moments
    num_divergent: np.ndarray


def no_draws(like: Tree) -> Tally:
    """Return the tally before the first draw, of shapes (chain, ...)."""
    return Tally(progress.no_draws(like), np.zeros((), int))


def shapes_of_a_state(plan: Plan) -> tuple[Tree, Tally]:
    """Return what `Phases` saves, in shapes."""
    return plan.carry, no_draws(streams.moments_like(plan.template))


def sink_of(
    plan: Plan,
    loop: Loop,
    prints: Callable[[], dict[str, str]],
    checkpoint: str | os.PathLike[str] | None,
    stream: str | os.PathLike[str] | None,
    on: Devices,
) -> sinks.Sink:
    """Open what takes the draws: memory, the checkpoint's folder, or the stream."""
    if checkpoint is None and stream is None:
        return sinks.in_memory(plan.result.as_arviz, plan.carry[0].position)
    path = Path(checkpoint or "", DRAWS) if stream is None else Path(stream)
    num_written = max(0, loop.done - plan.num_warmup)
    sizes = plan.num_samples, plan.chunk
    store = streams.stream(path, plan.template, *sizes, prints(), num_written, on)
    return sinks.on_disk(plan.result.as_arviz, store, plan.template, stream is not None)


class Phases(NamedTuple):
    """What the phases share.

    Attributes:
        plan: of the run.
        loop: on the host.
        sink: takes the draws.
        on: the devices.
        progress_bar: whether it is shown how the run fares.
    """

    plan: Plan
    loop: Loop
    sink: sinks.Sink
    on: Devices
    progress_bar: bool

    def begin(self, rng_key: jax.Array) -> tuple[Any, Any]:
        """Start the chains, or take up where they were."""
        if self.loop.state is not None:
            carry, tally = self.loop.state
            if tally.moments.count:
                self.sink.note(tally.moments)
            return self.on.put(carry)
        keys = self.on.jit(self.plan.keys.start)(rng_key)
        carry = self.on.jit(self.plan.program.init)(keys, self.plan.start.position)
        checks.check_start(self.on.get(carry[0].logdensity))
        return carry

    def warm_up(self, rng_key: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        """Let the chains learn."""
        plan, loop, on = self.plan, self.loop, self.on
        keys, none = on.jit(plan.keys.warm_up), no_draws(self.sink.like)
        run = on.jit(plan.program.warm_up, donate_argnums=0)
        for start, num in loop.stretches(plan.warmup_chunk, plan.num_warmup):
            step, stages = jax.device_put((np.uint32(start), plan.schedule[start : start + num]))
            carry, acceptance = run(carry, keys(rng_key, step), stages)
            if self.progress_bar:
                shown = acceptance, carry[1].step_size, getattr(carry[1], "held_out_std", np.nan)
                acceptance, step_size, held_out_std = on.get(shown)
                progress.show(loop.bar, num, acceptance, step_size, held_out_std=held_out_std)
            loop.keep(start + num, lambda carry=carry: (on.get(carry), none))
        return carry

    def draw(self, rng_key: jax.Array, carry: tuple[Any, Any]) -> tuple[np.ndarray, float]:
        """Make the draws.

        Returns:
            Step sizes (chain,), and how far the chains went, in units of where they started.
        """
        self.loop.bar.set_description("sampling")
        learnt = self.on.jit(self.plan.program.learn)(carry[1])
        step_size = self.on.get(learnt["step_size"])
        try:
            states = self._stretches(rng_key, carry, learnt, step_size)
        except KeyboardInterrupt:
            if not self.sink.count():
                raise
            warnings.warn(
                f"Interrupted after {self.sink.count()} of {self.plan.num_samples} draws of each "
                "chain: these are returned.",
                stacklevel=4,
            )
            return step_size, 0.0
        end, logdensity = self.on.get((states.position, states.logdensity))
        warn_of_rounding(logdensity)
        start = self.plan.start
        return step_size, distance(end, start.position, start.dispersion)

    def _stretches(self, rng_key, carry, learnt, step_size):
        """Make the draws, stretch by stretch, and return the last states."""
        plan, loop, on = self.plan, self.loop, self.on
        (states, adapted), begin = carry, plan.num_warmup
        tally = no_draws(self.sink.like) if loop.state is None else loop.state[1]
        keys, run = on.jit(plan.keys.draw), on.jit(plan.program.draw, donate_argnums=0)
        for start, num in loop.stretches(plan.chunk, begin + plan.num_samples, begin):
            step = jax.device_put(np.uint32(start - begin))
            states, draws = run(states, learnt, keys(rng_key, step))
            draws = jax.tree.map(lambda leaf, num=num: leaf[:, :num], on.get(draws))
            seen = self.sink.add(start - begin, draws, step_size)
            if self.progress_bar or self.sink.is_on_disk:
                tally = _add(tally, seen, draws)
                self.sink.note(tally.moments)
            if self.progress_bar:
                progress.show(
                    loop.bar,
                    num,
                    draws.infos["acceptance_rate"],
                    step_size,
                    rhat=progress.worst_rhat(tally.moments),
                    divergent=tally.num_divergent,
                )
            now = states, adapted
            loop.keep(start + num, lambda now=now, tally=tally: (on.get(now), tally))
        return states


def _add(tally, seen, draws):
    num_divergent = tally.num_divergent + np.sum(draws.infos.get("is_divergent", 0))
    return Tally(progress.add(tally.moments, seen), num_divergent)
