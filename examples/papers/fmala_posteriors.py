"""Compare the forward-mode Langevin samplers with MALA on two larger models, in equal time.

Cobb & Jha, 2025, arXiv:2505.18081: logistic regression with 7 850 parameters, and a Bayesian neural
network with 40 701; settings from the authors' code (SRI-CSL/fojax). Their tables were not at hand,
so each result stands beside what the abstract says in words. Three things differ from their
scripts: a random walk is among the samplers, MALA keeps the gradient of the current point (theirs
computes it again), and the network's posterior is not tempered. Funnels are in `fmala.py`.

    python examples/papers/fmala_posteriors.py [--fast]
"""

import time
from functools import partial
from typing import NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _evidence import below, exact, median_of, over_seeds
from _langevin import (
    CLAIM,
    FORWARD,
    SAMPLERS,
    bars,
    chosen,
    competitive,
    ess,
    listed,
    progress,
    spread,
    table,
    verdict,
)
from _papers import FMALA
from _results import panels, parsed, parser, write
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import probbp
from probbp.samplers.curvature import gauss_newton

SETTING = """{chains} chains, each with the wall time of
   {steps} steps of MALA, by times per step measured beforehand. Half of a run is dropped, 100
   thinned draws of the other half predict. Step sizes: dual averaging; PC-Line h = 1.28 as it is;
   PC-FMALA as published takes the shared one's, for its acceptance rate stays low as h goes to 0.
   Starts: the last of {hmc} iterations of HMC, so that no time goes into finding the posterior's
   mass. Moved: squared distance between the ends of the second half; HMC's, which forget their
   start, is 1."""


class Size(NamedTuple):
    steps: int = 4_000  # of MALA, logistic regression; half as many on the network
    hmc: int = 60
    chains: int = 4
    tuning: int = 1_000
    rows: tuple = (200, 10_000)  # of the data on which the cost of a step is measured
    repeats: int = 5
    is_fast: bool = False


FAST = Size(100, 5, 3, 20, (200,), 2, True)


def main():
    arguments = parsed(parser(__doc__))
    size = FAST if arguments.fast else Size()
    moved = {
        "logistic regression": logistic_regression(size),
        "neural network": neural_network(size),
    }
    seconds, memory = cost(size)
    figure, axes = panels(2)
    for ax, (name, figures) in zip(axes, moved.items(), strict=True):
        bars(ax, figures)
        ax.set(xlabel="log of the squared distance moved over MALA's", title=name.capitalize())
    first = moved["logistic regression"]
    write(
        arguments,
        paper=FMALA,
        claim="Langevin samplers that never backpropagate cost less a step than MALA, are "
        "competitive with it, and outperform it on some models.",
        setting="Logistic regression of digits, 7,850 parameters, and a network with 40,701; "
        f"{size.chains} chains, each with the time of {size.steps} and {size.steps // 2} steps of "
        "MALA. The figure: logistic regression; 1 is a chain that forgets its start.",
        ours=over_seeds(f"squared distance moved, {FORWARD[-1]}", first[FORWARD[-1]]),
        baseline=over_seeds("MALA, in equal time", first["MALA"]),
        checks=[
            *(
                check
                for name, figures in moved.items()
                for check in competitive("squared distance moved", name, figures)
            ),
            *(
                check
                for rows, each in seconds.items()
                for check in (
                    below(
                        f"a step of FMALA takes less time than MALA's, network, {rows} rows",
                        median_of("time over MALA's", each["FMALA, published"] / each["MALA"]),
                        1.0,
                    ),
                    below(
                        f"and less memory, {rows} rows",
                        exact(
                            "memory over MALA's",
                            memory[rows]["FMALA, published"] / memory[rows]["MALA"],
                        ),
                        1.0,
                    ),
                )
            ),
        ],
        figure=figure,
        caption="How far a chain moves in equal time beside MALA, squared, with 95 % intervals "
        "over chains.",
    )


def logistic_regression(size):
    """Classify digits of 28 x 28 pixels, full batch."""
    digits = load_digits()
    images = jax.image.resize(digits.images / 16, (len(digits.images), 28, 28), "bilinear")
    images = np.asarray(images.reshape(-1, 784), dtype=np.float32)
    split = train_test_split(images, digits.target, test_size=0.2, random_state=0)
    x, x_test, y, y_test = map(jnp.asarray, split)
    print(f"""
1. Logistic regression, 784 -> 10, 7 850 parameters, prior N(0, 1), full batch.
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
    return compare(jax.random.key(2), loglikelihood_fn, 1.0, zeros, SAMPLERS, size, score)


def neural_network(size):
    """Regress on one input with a ReLU network."""
    size, noise = size._replace(steps=size.steps // 2, hmc=size.hmc // 2), 0.025

    def data(key):
        key_cluster, key_x, key_y = jax.random.split(key, 3)
        centres = jax.random.choice(key_cluster, jnp.array([-1.2, 0.0, 1.2]), (200, 1))
        x = centres + 0.3 * jax.random.uniform(key_x, (200, 1), minval=-1)
        return x, jnp.sin(3 * x[:, 0]) + noise * jax.random.normal(key_y, (200,))

    (x, y), (x_test, y_test) = data(jax.random.key(3)), data(jax.random.key(4))
    print(f"""
2. Neural network 1-100-100-100-100-100-1, ReLU, 40 701 parameters, likelihood sd 0.025, prior sd
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
    return compare(jax.random.key(5), composed, 0.1, layers(), samplers, size, score)


def cost(size):
    """Measure time and memory of a step of the network's samplers, in units of MALA's."""
    print(f"""
3. Cost of a step of the network's samplers, in units of MALA's, which keeps the gradient of the
   current point; "nothing kept" computes it again, as the authors' baseline does.
   Setting: as 2, also with many rows, where activations outweigh parameters. Time: the least of
   {size.repeats} rounds. Memory: what XLA sets aside beside inputs and outputs.""")
    columns, all_seconds, all_memory = {}, {}, {}
    for rows in size.rows:
        all_seconds[rows], memory = costs(size, rows)
        seconds = {name: times.min() for name, times in all_seconds[rows].items()}
        all_memory[rows] = memory
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
    return all_seconds, all_memory


def costs(size, rows):
    """Return the seconds, by rounds, and the bytes of one step of each sampler."""
    predict_fn = partial(network, jnp.linspace(-1, 1, rows)[:, None])
    position = optax.tree.scale(0.1, optax.tree.random_like(jax.random.key(6), layers()))

    def loglikelihood_fn(predictions):
        return -jnp.sum(predictions**2) / (2 * 0.025**2)

    def logdensity_fn(position):
        return loglikelihood_fn(predict_fn(position)) + logprior(0.1)(position)

    samplers = chosen(with_gauss_newton(predict_fn, loglikelihood_fn), size.is_fast)
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
    """Tune, time and run the samplers on a posterior; print a row for each, and the verdict.

    Returns how far each chain of each moved, squared, in units of HMC's.
    """

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
    for name, algorithm in chosen(samplers, size.is_fast).items():
        if name == "PC-FMALA, published":
            step_sizes[name] = step_sizes["PC-FMALA, shared"]
        else:
            step_sizes[name] = 1.28 if name.startswith("PC-Line") else tune(name, algorithm)
        tuned[name] = algorithm(logdensity_fn, step_sizes[name])
        chunks[name] = jax.jit(partial(steps, tuned[name], 10))
        calls[name] = partial(chunks[name], key_tune, tuned[name].init(starts[0], key_tune))
    seconds = seconds_of(calls, size.repeats, 4)
    for name, sampler in tuned.items():
        ratio = seconds[name].min() / seconds["MALA"].min()
        num = round(size.steps / 10 / ratio)
        chunk = partial(run, chunks[name], num_chunks=num)
        runs = [chunk(sampler.init(x, key_tune), k) for x, k in zip(starts, keys_run, strict=True)]
        record(name, f"{10 * num}", f"{ratio:.2f}", runs)
    table(*rows)
    print(f"   An ESS below 100 is no more than a hint.\n{CLAIM}")
    for what, figures in {"Moved": squared, "ESS of the log density": ess_lp, "NLL": nll}.items():
        verdict(f"{what} in equal time", {k: v for k, v in figures.items() if k != "HMC"})
    far = squared.pop("HMC").mean()
    return {name: values / far for name, values in squared.items()}


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


def seconds_of(calls, repeats, num):
    """Return the seconds of a call in each of the rounds, in which all take their turn."""
    seconds = {name: [] for name in calls}
    for num_calls in [1] + repeats * [num]:  # the first round compiles
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(num_calls):
                jax.block_until_ready(call())
            seconds[name].append((time.perf_counter() - start) / num_calls)
    return {name: np.array(rounds[1:]) for name, rounds in seconds.items()}


if __name__ == "__main__":
    main()
