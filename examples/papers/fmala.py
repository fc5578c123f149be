"""Compare the forward-mode Langevin samplers with MALA and a random walk, as their paper does.

Cobb & Jha, 2025, arXiv:2505.18081: a funnel, logistic regression with 7 850 parameters, and a
Bayesian neural network with 40 701; settings from the authors' code (SRI-CSL/fojax). Their tables
were not at hand, so each result stands beside what the abstract says in words. Three things differ
from their scripts: a random walk is among the samplers, MALA keeps the gradient of the current
point (theirs computes it again), and the network's posterior is not tempered.

    python examples/papers/fmala.py [picture.png] [--fast]

About a quarter of an hour on two cores; --fast tries three samplers in a minute, with sizes that
say nothing.
"""

import argparse
import sys
import time
from functools import partial
from typing import NamedTuple

import arviz as az
import blackjax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import probbp
from probbp.diagnostics import from_blackjax
from probbp.samplers.curvature import gauss_newton

BEGIN = time.perf_counter()
CLAIM = """   Paper: forward mode is "competitive with the original MALA, while even outperforming
   it depending on the probabilistic model" (abstract; no figure at hand)."""
SETTING = """{chains} chains, each with the wall time of
   {steps} steps of MALA, by times per step measured beforehand. Half of a run is dropped, 100
   thinned draws of the other half predict. Step sizes: dual averaging; PC-Line h = 1.28 as it is;
   PC-FMALA as published takes the shared one's, for its acceptance rate stays low as h goes to 0.
   Starts: the last of {hmc} iterations of HMC, so that no time goes into finding the posterior's
   mass. Moved: squared distance between the ends of the second half; HMC's, which forget their
   start, is 1."""


class Size(NamedTuple):
    leaves: tuple = (10, 100)  # of the funnels
    draws: int = 10_000  # of each of a funnel's five chains
    step_sizes: int = 12
    seeds: int = 6
    steps: int = 8_000  # of MALA, logistic regression; half as many on the network
    hmc: int = 100
    chains: int = 3
    tuning: int = 1_000
    rows: tuple = (200, 10_000)  # of the data on which the cost of a step is measured
    repeats: int = 5
    samplers: tuple = ()  # all, if empty


FAST = Size((10,), 100, 2, 2, 100, 5, 2, 20, (200,), 1, ("MALA", "FMALA, carried", "PC-Line-FMALA"))


def random_walk(logdensity_fn, step_size):
    return blackjax.normal_random_walk(logdensity_fn, jnp.sqrt(2 * step_size))


# Each takes (logdensity_fn, step_size) with BlackJAX's h; the paper's epsilon is sqrt(2 h).
# "Published" is the paper's algorithm where the package has another default.
SAMPLERS = {
    "RWM": random_walk,
    "MALA": blackjax.mala,
    "FMALA, published": partial(probbp.fmala, key_policy="refreshed"),
    "FMALA, carried": probbp.fmala,
    "Line-FMALA": probbp.line_fmala,
    "Line-FMALA, 4 tangents": partial(probbp.line_fmala, num_tangents=4),
    "PC-FMALA, shared": probbp.pc_fmala,
    "PC-FMALA, published": partial(probbp.pc_fmala, key_policy="refreshed", floor=0.0),
    "PC-Line-FMALA": probbp.pc_line_fmala,
}
FUNNEL_SAMPLERS = SAMPLERS | {
    # The priors of the other two models keep the curvature off its floor.
    "PC-Line-FMALA, published": partial(probbp.pc_line_fmala, floor=0.0),
    "MALA, probbp": probbp.mala,
}


def funnel(size, num_leaves):
    """Run every sampler over a grid of step sizes; return the grid and the ESS."""
    epsilons = jnp.geomspace(0.02, 2, size.step_sizes)
    print(f"""
1. Funnel, {num_leaves + 1} dimensions: w ~ N(0, 3^2), x_i ~ N(0, exp(-w)).
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
    for name, algorithm in chosen(FUNNEL_SAMPLERS, size).items():
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
    return epsilons, ess_w


def logistic_regression(size):
    """Classify digits of 28 x 28 pixels, full batch."""
    digits = load_digits()
    images = jax.image.resize(digits.images / 16, (len(digits.images), 28, 28), "bilinear")
    images = np.asarray(images.reshape(-1, 784), dtype=np.float32)
    split = train_test_split(images, digits.target, test_size=0.2, random_state=0)
    x, x_test, y, y_test = map(jnp.asarray, split)
    print(f"""
2. Logistic regression, 784 -> 10, 7 850 parameters, prior N(0, 1), full batch.
   Setting: scikit-learn's digits enlarged to 28 x 28 in place of MNIST, {len(x)} to learn from and
   {len(x_test)} to test on; {SETTING.format(**size._asdict())}""")

    def loglikelihood_fn(position):
        logp = jax.nn.log_softmax(x @ position["weights"] + position["bias"])
        return jnp.sum(jnp.take_along_axis(logp, y[:, None], axis=1))

    def score(positions):
        logits = jnp.einsum("rp,spc->src", x_test, positions["weights"])
        p = jnp.mean(jax.nn.softmax(logits + positions["bias"][:, None]), axis=0)
        is_right = p.argmax(1) == y_test
        bins = jnp.minimum((p.max(1) * 15).astype(int), 14)
        gaps = jnp.abs(jax.ops.segment_sum(is_right - p.max(1), bins, 15))
        nll = -jnp.mean(jnp.log(jnp.take_along_axis(p, y_test[:, None], axis=1)))
        return {"NLL": nll, "accuracy": is_right.mean(), "ECE, 15 bins": gaps.sum() / len(p)}

    zeros = {"weights": jnp.zeros((784, 10)), "bias": jnp.zeros(10)}
    compare(jax.random.key(2), loglikelihood_fn, 1.0, zeros, SAMPLERS, size, score)


def neural_network(size):
    """Regress on one input with a ReLU network."""
    size, noise = size._replace(steps=size.steps // 2), 0.025

    def data(key):
        key_cluster, key_x, key_y = jax.random.split(key, 3)
        centres = jax.random.choice(key_cluster, jnp.array([-1.2, 0.0, 1.2]), (200, 1))
        x = centres + 0.3 * jax.random.uniform(key_x, (200, 1), minval=-1)
        return x, jnp.sin(3 * x[:, 0]) + noise * jax.random.normal(key_y, (200,))

    (x, y), (x_test, y_test) = data(jax.random.key(3)), data(jax.random.key(4))
    print(f"""
3. Neural network 1-100-100-100-100-100-1, ReLU, 40 701 parameters, likelihood sd 0.025, prior sd
   0.1, the full posterior (the authors' script divides its logarithm by the number of rows).
   Setting: 200 simulated rows, 200 held out; {SETTING.format(**size._asdict())}""")

    def loglikelihood_fn(predictions):
        return -jnp.sum((y - predictions) ** 2) / (2 * noise**2)

    def score(positions):
        predictions = jax.vmap(partial(network, x_test))(positions)
        logp = -0.5 * ((y_test - predictions) / noise) ** 2 - np.log(noise * np.sqrt(2 * np.pi))
        rmse = jnp.sqrt(jnp.mean((predictions.mean(0) - y_test) ** 2))
        return {"NLL": -jnp.mean(jax.nn.logsumexp(logp, 0) - jnp.log(len(logp))), "RMSE": rmse}

    def composed(position):
        return loglikelihood_fn(network(x, position))

    samplers = with_gauss_newton(partial(network, x), loglikelihood_fn)
    compare(jax.random.key(5), composed, 0.1, layers(), samplers, size, score)


def cost(size):
    """Measure time and memory of a step of the network's samplers, in units of MALA's."""
    print(f"""
4. Cost of a step of the network's samplers, in units of MALA's, which keeps the gradient of the
   current point; "nothing kept" computes it again, as the authors' baseline does.
   Setting: as 3, also with many rows, where activations outweigh parameters. Time: the least of
   {size.repeats} rounds. Memory: what XLA sets aside beside inputs and outputs.""")
    columns = {}
    for rows in size.rows:
        seconds, memory = costs(size, rows)
        columns |= {f"time, {rows} rows": seconds, f"memory, {rows} rows": memory}
        ms, mib = 1e3 * seconds["MALA"], memory["MALA"] / 2**20
        print(f"   MALA with {rows} rows takes {ms:.1f} ms and {mib:.1f} MiB.")
    ratios = {name: [c[name] / c["MALA"] for c in columns.values()] for name in seconds}
    rows = ["|".join([name, *(f"{ratio:.2f}" for ratio in r)]) for name, r in ratios.items()]
    table("|".join(["sampler", *columns]), *rows)
    print("   Paper: the computational cost of the forward-mode samplers is reduced (abstract).")
    for what, column in columns.items():
        for baseline in ("MALA", "MALA, nothing kept"):
            low = [n for n in column if "FMALA" in n and column[n] < 0.95 * column[baseline]]
            print(f"   Ours, {what}: agree with the paper, below {baseline}: {listed(low)}")


def costs(size, rows):
    """Return the seconds and the bytes of one step of each sampler."""
    predict_fn = partial(network, jnp.linspace(-1, 1, rows)[:, None])
    position = optax.tree.scale(0.1, optax.tree.random_like(jax.random.key(6), layers()))

    def loglikelihood_fn(predictions):
        return -jnp.sum(predictions**2) / (2 * 0.025**2)

    def logdensity_fn(position):
        return loglikelihood_fn(predict_fn(position)) + logprior(0.1)(position)

    samplers = chosen(with_gauss_newton(predict_fn, loglikelihood_fn), size)
    samplers["MALA, nothing kept"] = partial(probbp.mala, key_policy="refreshed")
    calls, memory = {}, {}
    for name, algorithm in samplers.items():
        sampler = algorithm(logdensity_fn, 1e-8)
        arguments = jax.random.key(8), sampler.init(position, jax.random.key(7))
        compiled = jax.jit(sampler.step).lower(*arguments).compile()
        calls[name] = partial(compiled, *arguments)
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
    progress(f"{rows} rows compiled")
    return seconds_of(calls, size.repeats, 4), memory


def network(x, position):
    for layer in position[:-1]:
        x = jax.nn.relu(x @ layer["weights"] + layer["bias"])
    return (x @ position[-1]["weights"] + position[-1]["bias"])[:, 0]


def layers():
    widths = zip([1] + 5 * [100], 5 * [100] + [1], strict=True)
    return [{"weights": jnp.zeros(pair), "bias": jnp.zeros(pair[1])} for pair in widths]


def logprior(scale):
    return lambda position: -optax.tree.norm(position, squared=True) / (2 * scale**2)


def with_gauss_newton(predict_fn, loglikelihood_fn):
    curvature = gauss_newton(predict_fn, loglikelihood_fn, logprior(0.1))
    return SAMPLERS | {
        "PC-Line-FMALA, Gauss-Newton": partial(probbp.pc_line_fmala, curvature=curvature)
    }


def near_posterior(key, loglikelihood_fn, scale, zeros, num_steps=2000):
    """Pull a draw of the prior to the data; for a linear Gaussian model nearly a posterior draw."""
    anchor = optax.tree.scale(scale, optax.tree.random_like(key, zeros))
    optimizer = optax.adam(optax.cosine_decay_schedule(scale / 50, num_steps))

    def loss_fn(position):
        return -loglikelihood_fn(position) - logprior(scale)(optax.tree.sub(position, anchor))

    def step(carry, _):
        position, state = carry
        updates, state = optimizer.update(jax.grad(loss_fn)(position), state)
        return (optax.apply_updates(position, updates), state), None

    return jax.lax.scan(step, (anchor, optimizer.init(anchor)), length=num_steps)[0][0]


def compare(key, loglikelihood_fn, scale, zeros, samplers, size, score):
    """Tune, time and run the samplers on a posterior; print a row for each, and the verdict."""

    def logdensity_fn(position):
        return loglikelihood_fn(position) + logprior(scale)(position)

    def tune(name, algorithm):
        target = {"RWM": 0.234, "MALA": 0.574}.get(name)
        options = {"metric": None, "target_acceptance_rate": target}
        options |= {"num_steps": size.tuning, "initial_step_size": 1e-3 * scale**2}
        bound = partial(algorithm, logdensity_fn)
        _, learnt = probbp.warmup(key_tune, bound, starts[0], **options)
        progress(f"{name} tuned, epsilon {np.sqrt(2 * learnt['step_size']):.2g}")
        return learnt["step_size"]

    def record(name, num_steps, cost, runs):
        lp, accepted, positions = zip(*runs, strict=True)
        ends = [optax.tree.sub(kept[-1], kept[0]) for kept in positions]
        squared[name] = np.array([optax.tree.norm(end, squared=True) for end in ends])
        ess_lp[name] = np.array([ess(chain[None]) for chain in lp])
        stacked = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept) for kept in positions]
        figures = jax.tree.map(lambda *values: np.stack(values), *map(score, stacked))
        nll[name] = -figures["NLL"]
        columns = {"ESS of lp": spread(ess_lp[name], ".0f")}
        columns["ESS/1000"] = f"{1000 * np.median(ess_lp[name]) / len(lp[0]):.1f}"
        columns["moved"] = spread(squared[name] / squared["HMC"].mean(), ".4f")
        columns["mean lp"] = f"{np.mean(lp):.0f}"
        columns |= {what: spread(values, ".3f") for what, values in figures.items()}
        rows[0] = "|".join(["sampler", "steps", "time/step", "acc.", *columns])
        cells = [name, num_steps, cost, f"{np.mean(accepted):.2f}", *columns.values()]
        rows.append("|".join(cells))
        progress(f"{name} has run")

    squared, ess_lp, nll, rows = {}, {}, {}, [""]
    # A tangent must not depend on the point where it is used: starts and runs share no key.
    keys_start, keys_hmc, keys_run, (key_tune, *_) = jax.random.split(key, (4, size.chains))
    begin = jax.jit(lambda key: near_posterior(key, loglikelihood_fn, scale, zeros))
    starts = [begin(key) for key in keys_start]
    epsilon = 0.7 * np.sqrt(2 * tune("MALA", blackjax.mala))
    num_leapfrog = int(1.5 * scale / epsilon)
    hmc = blackjax.hmc(logdensity_fn, epsilon, jnp.ones(optax.tree.size(zeros)), num_leapfrog)
    chunk = jax.jit(partial(steps, hmc, 1))
    runs = [run(chunk, hmc.init(x), k, size.hmc) for x, k in zip(starts, keys_hmc, strict=True)]
    record("HMC", f"{size.hmc} x {num_leapfrog}", "", runs)
    starts = [positions[-1] for _, _, positions in runs]

    step_sizes, tuned, chunks, calls = {}, {}, {}, {}
    for name, algorithm in chosen(samplers, size).items():
        if name == "PC-FMALA, published":
            step_sizes[name] = step_sizes["PC-FMALA, shared"]
        else:
            step_sizes[name] = 1.28 if name.startswith("PC-Line") else tune(name, algorithm)
        tuned[name] = algorithm(logdensity_fn, step_sizes[name])
        chunks[name] = jax.jit(partial(steps, tuned[name], 10))
        calls[name] = partial(chunks[name], key_tune, tuned[name].init(starts[0], key_tune))
    seconds = seconds_of(calls, size.repeats, 4)
    for name, sampler in tuned.items():
        ratio = seconds[name] / seconds["MALA"]
        num = round(size.steps / 10 / ratio)
        chunk = partial(run, chunks[name], num_chunks=num)
        runs = [chunk(sampler.init(x, key_tune), k) for x, k in zip(starts, keys_run, strict=True)]
        record(name, f"{10 * num}", f"{ratio:.2f}", runs)
    table(*rows)
    print(f"   An ESS below 100 is no more than a hint.\n{CLAIM}")
    for what, figures in {"Moved": squared, "ESS of the log density": ess_lp, "NLL": nll}.items():
        verdict(f"{what} in equal time", {k: v for k, v in figures.items() if k != "HMC"})


def steps(sampler, num, key, state):
    def step(state, key):
        state, info = sampler.step(key, state)
        return state, (state.logdensity, info.is_accepted)

    return jax.lax.scan(step, state, jax.random.split(key, num))


def run(chunk, state, key, num_chunks):
    """Return the log densities and acceptances of the second half, and 100 of its positions."""
    history = []
    for key_chunk in jax.random.split(key, num_chunks):
        state, (lp, accepted) = chunk(key_chunk, state)
        history.append((np.asarray(lp), np.asarray(accepted), state.position))
    lp, accepted, positions = zip(*history[num_chunks // 2 :], strict=True)
    kept = np.linspace(0, len(positions) - 1, 100).astype(int)
    return np.concatenate(lp), np.concatenate(accepted), [positions[i] for i in kept]


def ess(draws):
    """Bulk ESS by ArviZ of draws (chain, draw, ...); 0 where nothing ever moved."""
    values = np.asarray(az.ess(from_blackjax({"x": draws}))["x"])
    return np.where(np.ptp(draws, axis=1).max(0) > 0, np.nan_to_num(values), 0.0)


def seconds_of(calls, repeats, num):
    """Return the seconds of a call: the least over rounds in which all take their turn."""
    seconds = dict.fromkeys(calls, np.inf)
    for num_calls in [1] + repeats * [num]:  # the first round compiles
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(num_calls):
                jax.block_until_ready(call())
            seconds[name] = min(seconds[name], (time.perf_counter() - start) / num_calls)
    return seconds


def verdict(what, figures):
    """Say which samplers agree with the paper; a larger figure is better."""
    if what.startswith("ESS"):  # below 10 it tells nothing apart
        figures = {name: np.maximum(values, 10) for name, values in figures.items()}
    mala = figures["MALA"]
    better = [name for name in figures if figures[name].min() > mala.max()]
    worse = [name for name in figures if figures[name].max() < mala.min()]
    near = [name for name in figures if name not in better + worse + ["MALA"]]
    print(f"""   Ours, {what}, every run against every run of MALA:
     better than MALA (agrees: outperforms): {listed(better)}
     not told apart (agrees: competitive): {listed(near)}
     worse than MALA (doesn't agree): {listed(worse)}""")


def chosen(samplers, size):
    return {k: v for k, v in samplers.items() if not size.samplers or k in size.samplers}


def listed(names):
    return "; ".join(names) or "none"


def spread(values, spec):
    return f"{np.median(values):{spec}} [{np.min(values):{spec}}, {np.max(values):{spec}}]"


def table(*rows):
    rows = [row.split("|") for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print("   " + "  ".join([name.ljust(widths[0]), *cells]))


def progress(text):
    print(f"   ... {time.perf_counter() - BEGIN:4.0f} s {text}", file=sys.stderr, flush=True)


def picture(path, funnels):
    figure, axes = plt.subplots(
        1, len(funnels), figsize=(11, 5), layout="constrained", squeeze=False
    )
    for (num_leaves, (epsilons, ess_w)), axis in zip(funnels.items(), axes[0], strict=True):
        for i, (name, values) in enumerate(ess_w.items()):
            style = {"color": f"C{i}" if i < 10 else "black", "linestyle": ["-", "--"][i % 2]}
            axis.loglog(epsilons, np.median(values, 0), label=name, **style)
        axis.set(title=f"Funnel, {num_leaves + 1} dimensions", xlabel="step size epsilon")
        axis.set(ylabel="ESS of w, five chains")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)
    print(f"\nSaved {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", nargs="?", default="fmala_paper.png")
    parser.add_argument("--fast", action="store_true", help="tiny sizes, to see that it runs")
    arguments = parser.parse_args()
    size = FAST if arguments.fast else Size()
    funnels = {num_leaves: funnel(size, num_leaves) for num_leaves in size.leaves}
    logistic_regression(size)
    neural_network(size)
    cost(size)
    picture(arguments.picture, funnels)
