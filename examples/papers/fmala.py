"""Compare the forward-mode Langevin samplers with MALA and a random walk on funnels.

Cobb & Jha, 2025, arXiv:2505.18081; settings from the authors' code (SRI-CSL/fojax). Their tables
were not at hand, so each result stands beside what the abstract says in words. Two things differ
from their scripts: a random walk is among the samplers, and MALA keeps the gradient of the current
point (theirs computes it again). Larger models are in `fmala_posteriors.py`.

    python examples/papers/fmala.py [--fast]
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _evidence import over_seeds
from _langevin import (
    CLAIM,
    FORWARD,
    SAMPLERS,
    bars,
    chosen,
    competitive,
    ess,
    progress,
    spread,
    table,
    verdict,
)
from _papers import FMALA
from _results import panels, parsed, parser, write

import probbp


class Size(NamedTuple):
    leaves: tuple = (10, 100)  # of the funnels
    draws: int = 10_000  # of each of a funnel's five chains
    step_sizes: int = 12
    seeds: int = 6


FAST = Size((10,), 100, 2, 3)
FUNNEL_SAMPLERS = SAMPLERS | {
    # The priors of other models keep the curvature off its floor.
    "PC-Line-FMALA, published": partial(probbp.pc_line_fmala, floor=0.0),
    "MALA, probbp": probbp.mala,
}


def main():
    arguments = parsed(parser(__doc__))
    fast = arguments.fast
    size = FAST if fast else Size()
    found = {leaves: funnel(size, leaves, fast) for leaves in size.leaves}
    figure, axes = panels(len(found))
    for ax, (leaves, figures) in zip(axes, found.items(), strict=True):
        bars(ax, {name: np.maximum(values, 10) for name, values in figures.items()})
        ax.set(xlabel="log of ESS over MALA's", title=f"Funnel, {leaves + 1} dimensions")
    first = found[size.leaves[0]]
    write(
        arguments,
        paper=FMALA,
        claim="Langevin samplers that never backpropagate are competitive with MALA, and "
        "outperform it on some models.",
        setting=f"Funnels of {' and '.join(str(n + 1) for n in size.leaves)} dimensions, five "
        f"chains of {size.draws} draws, each sampler at the best of {size.step_sizes} step sizes, "
        f"{size.seeds} seeds. The figure: {size.leaves[0] + 1} dimensions.",
        ours=over_seeds(f"effective draws, {FORWARD[-1]}", first[FORWARD[-1]]),
        baseline=over_seeds("MALA, as many draws", first["MALA"]),
        checks=[
            check
            for leaves, figures in found.items()
            for check in competitive("ESS", f"funnel, {leaves + 1} dimensions", figures)
        ],
        figure=figure,
        caption="Effective sample size of the funnel's neck beside MALA's, each at its best step "
        "size, with 95 % intervals over seeds.",
    )


def funnel(size, num_leaves, fast):
    """Run every sampler over a grid of step sizes; return the ESS at the best, over the seeds."""
    epsilons = jnp.geomspace(0.02, 2, size.step_sizes)
    print(f"""
Funnel, {num_leaves + 1} dimensions: w ~ N(0, 3^2), x_i ~ N(0, exp(-w)).
   Setting: 5 chains of {size.draws} draws from 0.1 N(0, I), none removed; {size.seeds} seeds;
   {size.step_sizes} epsilon from 0.02 to 2. KL(N(0, 3^2) || moments of w) and ESS of w, both of all
   five chains, each at its best epsilon: median [range] over the seeds.""")

    def logdensity_fn(x):
        w, leaves = x[0], x[1:]
        return -(w**2) / 18 + num_leaves * w / 2 - jnp.exp(w) * jnp.sum(leaves**2) / 2

    def chain(algorithm, key, epsilon):
        key_start, key_init, key_steps = jax.random.split(key, 3)
        sampler = algorithm(logdensity_fn, epsilon**2 / 2)

        def step(state, key):
            state, info = sampler.step(key, state)
            return state, (state.position[0], info.is_accepted)

        start = 0.1 * jax.random.normal(key_start, (num_leaves + 1,))
        keys = jax.random.split(key_steps, size.draws)
        return jax.lax.scan(step, sampler.init(start, key_init), keys)[1]

    keys = jax.random.split(jax.random.key(num_leaves), (5, size.seeds))
    ess_w, best_ess, best_kl, rows = {}, {}, {}, []
    for name, algorithm in chosen(FUNNEL_SAMPLERS, fast).items():
        run_all = jax.vmap(jax.vmap(partial(chain, algorithm), (None, 0)), (0, None))
        run_all = jax.jit(jax.vmap(run_all, (0, None)))
        w, accepted = jax.device_get(run_all(keys, epsilons))  # (chain, seed, epsilon, draw)
        mean, sd, acceptance = w.mean((0, 3)), w.std((0, 3)), accepted.mean((0, 1, 3))
        kl = np.log(sd / 3) + (9 + mean**2) / (2 * sd**2) - 0.5
        ess_w[name] = ess(np.moveaxis(w, 3, 1))
        i, j = np.median(kl, 0).argmin(), np.median(ess_w[name], 0).argmax()
        best_kl[name], best_ess[name] = -kl[:, i], ess_w[name][:, j]
        rows.append(
            f"{name}|{epsilons[i]:.2f}|{spread(kl[:, i], '.2f')}|{acceptance[i]:.2f}"
            f"|{np.median(ess_w[name][:, i]):.0f}|{epsilons[j]:.2f}"
            f"|{spread(best_ess[name], '.0f')}|{acceptance[j]:.2f}|{np.median(kl[:, j]):.2f}"
        )
        progress(name)
    table("sampler|epsilon|best KL|acc.|its ESS|epsilon|best ESS|acc.|its KL", *rows)
    print(f"""   Caution: at a small ESS (of {5 * size.draws} draws) a small KL can be luck, and
   beside a large KL an ESS says only how well the chains explore a part of the funnel.
{CLAIM}""")
    verdict("ESS of w", best_ess)
    verdict("KL of w", best_kl)
    return best_ess


if __name__ == "__main__":
    main()
