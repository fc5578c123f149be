"""Guiding a diffusion model through one step: the paper's claim, on digits.

Dou et al., 2025, arXiv:2505.07477, say that differentiating one step of a sampler is about 90 %
cheaper than backpropagation through all, at as good a metric or a better one. The models here are
small: scikit-learn's digits, a residual perceptron trained to predict their noise, 50 steps of DDIM
on the linear schedule, and as metrics the distance of the upper half to a given digit's
(in-painting) and the negative log probability of a given class under a logistic regression
(guidance). Eight seeds. Posteriors are in `sdo_posteriors.py`.

- latents: Adam on the noise of 16 samples a seed, one learning rate for all, from pure noise (the
  first step of training is 999) or from data noised halfway (499). `time` is that of a step over
  full backpropagation's, and `extra` that of what the gradient adds to the sampler. The metric is
  given after as many steps for all, and after as many as fit into full's time, with the difference
  to full and its standard error over seeds, paired. |z| / sqrt(d) says how far the noise has gone
  from where it was drawn: a prior would hold it at 1.
- with a prior: the log density of noise and observation is climbed instead.
- alignment: Adam on the network's parameters, so that samples are of one class. `denoising` is the
  loss that the network was trained for, afterwards: what alignment cost. "one for all" keeps one
  step for the whole batch.
"gradient-free" moves along one random direction a step, by two more runs of the sampler.

    python examples/papers/sdo.py [--fast]
"""

import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _denoiser import DATA, DIGITS, FULL, NUM_STEPS, PATH, RECOMPUTED, trained
from _evidence import below, median_of, over_seeds
from _papers import SDO
from _results import panels, parsed, parser, write
from flax import nnx
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from probbp.ops import sdo

BATCH, RATE = 16, 0.05
LATENTS = {
    "full": FULL,
    "full, checkpointed": RECOMPUTED,
    "first (the paper)": {},
    "first, Gaussian path": {"surrogate": PATH},
    "random": {"keep_step": "random"},
    "last 12, Gaussian path": {"keep_step": sdo.Last(12), "surrogate": PATH},
    "gradient-free": None,
}
PARAMETERS = {
    "full": FULL,
    "full, checkpointed": RECOMPUTED,
    "random, one for all": {"keep_step": "random"},
    "random": {"keep_step": "random"},
    "random, Gaussian path": {"keep_step": "random", "surrogate": PATH},
    "subset 0.1, Gaussian path": {"keep_step": sdo.Subset(0.1), "surrogate": PATH},
    "first": {},
    "gradient-free": None,
}


def main():
    arguments = parsed(parser(__doc__))
    fast = arguments.fast
    begin = time.perf_counter()
    key_train, key_latents, key_align = jax.random.split(jax.random.key(0), 3)
    network = trained(key_train, fast)
    seeds = jax.random.split(key_latents, 3 if fast else 8)
    num_moves = 2 if fast else 40
    found = {}
    for title, metric, start, has_prior in (
        ("in-painting from pure noise", inpainting, 999, False),
        ("guidance from pure noise", guidance, 999, False),
        ("guidance from halfway", guidance, 499, False),
        ("in-painting from pure noise, with the prior", inpainting, 999, True),
    )[: 1 if fast else 4]:
        found[title] = latents(title, network, metric, start, has_prior, seeds, num_moves, fast)
    seeds = jax.random.split(key_align, len(seeds))
    found["alignment to one class"] = alignment(network, seeds, num_moves, fast)
    print(f"\n{time.perf_counter() - begin:.0f} seconds, JAX {jax.__version__}")

    kept = {title: "first (the paper)" for title in found} | {"alignment to one class": "random"}
    first = next(iter(found))
    figure, axes = panels(2)
    draw(axes[0], found, kept)
    draw_trade(axes[1], first, found[first])
    write(
        arguments,
        paper=SDO,
        claim="Differentiating one step of a diffusion sampler in the place of all is some 90 % "
        "cheaper, at as good a metric or a better one.",
        setting=f"Digits, a small denoiser, {NUM_STEPS} steps of DDIM, Adam on latents or on the "
        f"network's parameters, {num_moves} steps; {len(seeds)} seeds. The figure: {first}.",
        ours=over_seeds("metric, one step", found[first]["timed"][kept[first]]),
        baseline=over_seeds("all steps, in equal time", found[first]["timed"]["full"]),
        checks=[
            check
            for title, each in found.items()
            for check in (
                below(
                    f"the gradient costs a tenth at most: {title}",
                    median_of(
                        "time that it adds to the sampler, over what full backpropagation adds",
                        each["extra"][kept[title]],
                    ),
                    0.1,
                ),
                below(
                    f"in as many steps as good within a tenth, or better: {title}",
                    over_seeds(
                        "log of the metric over that of full backpropagation, paired",
                        np.log(each["final"][kept[title]] / each["final"]["full"]),
                    ),
                    np.log(1.1),
                ),
            )
        ],
        figure=figure,
        caption="Left: the metric after as many steps, one step differentiated over all, with 95 % "
        f"intervals; right of the dotted line it is worse. Right: {first}, metric and time of all "
        "ways to differentiate.",
    )


def draw(ax, found, kept):
    figures = [
        over_seeds("", np.log10(each["final"][kept[title]] / each["final"]["full"]))
        for title, each in found.items()
    ]
    means = np.array([figure.mean for figure in figures])
    ax.errorbar(means, range(len(means)), xerr=means - [f.low for f in figures], fmt="o")
    ax.axvline(0.0, color="grey", linestyle=":")
    ax.set_yticks(range(len(means)), [t.replace(" from", "\nfrom") for t in found], fontsize=7)
    ax.set(xlabel="log10 of the metric over full's", title="One step against all")
    ax.invert_yaxis()


def draw_trade(ax, title, found):
    for arm, values in found["final"].items():
        ax.loglog(np.median(found["time"][arm]), values.mean(), "o", label=arm)
    ax.set(xlabel="time of a step, over full", ylabel="metric", title=title)
    ax.legend(fontsize=7)


def classifier():
    """Return log probabilities of classes as a function of digits."""
    fitted = LogisticRegression(C=0.1, max_iter=2000).fit(np.asarray(DIGITS), DATA.target)
    weights, bias = (jnp.asarray(a, jnp.float32) for a in (fitted.coef_.T, fitted.intercept_))
    return lambda x: jax.nn.log_softmax(x @ weights + bias)


LOG_PROBABILITIES = classifier()


def inpainting(x, target):
    return jnp.mean((x - target["digit"])[:, :32] ** 2, axis=1)


def guidance(x, target):
    return -jnp.sum(LOG_PROBABILITIES(x) * target["class"], axis=1)


def one_direction(fun, z, rng_key, *, size=1e-2):
    """Estimate the gradient of each sample's own loss from two values along a random direction."""
    direction = jax.random.normal(rng_key, z.shape)
    rise = fun(z + size * direction) - fun(z - size * direction)
    return (rise / (2 * size)).reshape(-1, *[1] * (z.ndim - 1)) * direction


# ---------------------------------------------------------------------------------------
# Noise and parameters, optimised.


def latents(title, network, metric, start, has_prior, seeds, num_moves, fast):
    schedule = sdo.linear(NUM_STEPS, start=start)
    graph, params = nnx.split(network)

    def setting(rng_key):
        """Return the noise to start from, and targets."""
        key_rows, key_noise, key_class = jax.random.split(rng_key, 3)
        rows = jax.random.randint(key_rows, (2, BATCH), 0, len(DIGITS))
        signal = schedule.signal[0] if start < 999 else 0.0
        noise = jax.random.normal(key_noise, (BATCH, 64))
        classes = jax.nn.one_hot(jax.random.randint(key_class, (BATCH,), 0, 10), 10)
        target = {"digit": DIGITS[rows[1]], "class": classes}
        return signal**0.5 * DIGITS[rows[0]] + (1 - signal) ** 0.5 * noise, target

    def objective(z, target, params, rng_key, options):
        x = sdo.sample(nnx.merge(graph, params), z, schedule, rng_key=rng_key, **options)
        value = metric(x, target)
        if has_prior:  # minus the log density, for observations with noise of scale 0.2
            return 32 * value / (2 * 0.2**2) + jnp.sum(z**2, axis=1) / 2
        return value

    def moves(arm):
        options = LATENTS[arm]

        @jax.jit
        def run(rng_key, num, params):
            key_setting, key_moves = jax.random.split(rng_key)
            z, target = setting(key_setting)
            optimiser = optax.adam(RATE)

            def move(i, carry):
                z, state, _ = carry
                key = jax.random.fold_in(key_moves, i)
                fun = partial(objective, target=target, params=params, rng_key=key)
                if options is None:
                    fun = partial(fun, options=FULL)
                    value, grad = fun(z), one_direction(fun, z, key)
                else:
                    value, pull = jax.vjp(partial(fun, options=options), z)
                    (grad,) = pull(jnp.ones(BATCH))
                updates, state = optimiser.update(grad, state)
                return optax.apply_updates(z, updates), state, value

            carry = z, optimiser.init(z), jnp.zeros(BATCH)
            z, _, _ = jax.lax.fori_loop(0, num, move, carry)
            value = objective(z, target, params, rng_key, FULL).mean()
            return value, jnp.mean(jnp.linalg.norm(z, axis=1)) / 8

        return run

    @jax.jit
    def sampler(rng_key, num, params):
        z, target = setting(rng_key)
        move = lambda i, z: z + 1e-9 * objective(z, target, params, rng_key, FULL)[:, None]
        return jax.lax.fori_loop(0, num, move, z)

    arms = list(LATENTS)[: 3 if fast else None]
    return compare(title, arms, moves, sampler, params, seeds, num_moves, "|z|/sqrt d")


def alignment(network, seeds, num_moves, fast):
    schedule = sdo.linear(NUM_STEPS)
    graph, start = nnx.split(network)
    target = {"class": jax.nn.one_hot(jnp.full(BATCH, 3), 10)}

    def objective(params, rng_key, options, is_shared=False):
        key_noise, key_keep = jax.random.split(rng_key)
        noise = jax.random.normal(key_noise, (BATCH, 64))
        sample = partial(
            sdo.sample, nnx.merge(graph, params), schedule=schedule, rng_key=key_keep, **options
        )
        if is_shared:  # samples that are batches of their own draw the same step from one key
            x = jax.vmap(lambda z: sample(z[None])[0])(noise)
        else:
            x = sample(noise)
        return guidance(x, target).mean()

    def denoising(params):
        key_time, key_noise = jax.random.split(jax.random.key(5))
        t = jax.random.randint(key_time, (len(DIGITS),), 0, 1000)
        noise = jax.random.normal(key_noise, DIGITS.shape)
        signal = jnp.asarray(schedule.train_signal, jnp.float32)[t][:, None]
        noisy = jnp.sqrt(signal) * DIGITS + jnp.sqrt(1 - signal) * noise
        return jnp.mean((nnx.merge(graph, params)(noisy, t.astype(jnp.float32)) - noise) ** 2)

    def moves(arm):
        options = PARAMETERS[arm]
        loss = partial(
            objective, options=FULL if options is None else options, is_shared="for all" in arm
        )

        @jax.jit
        def run(rng_key, num, params):
            optimiser = optax.adam(3e-5)

            def move(i, carry):
                params, state, _ = carry
                key = jax.random.fold_in(rng_key, i)
                if options is None:
                    flat, unravel = jax.flatten_util.ravel_pytree(params)
                    fun = lambda p: loss(unravel(p[0]), key)[None]
                    value = loss(params, key)
                    grad = unravel(one_direction(fun, flat[None], key)[0])
                else:
                    value, grad = jax.value_and_grad(loss)(params, key)
                updates, state = optimiser.update(grad, state)
                return optax.apply_updates(params, updates), state, value

            carry = params, optimiser.init(params), jnp.zeros(())
            params, _, _ = jax.lax.fori_loop(0, num, move, carry)
            # Of fresh samples, the same for all arms.
            value = objective(params, jax.random.fold_in(rng_key, 2**31), FULL)
            return value, denoising(params)

        return run

    @jax.jit
    def sampler(rng_key, num, params):
        def move(i, total):
            return total + objective(params, jax.random.fold_in(rng_key, i), FULL)

        return jax.lax.fori_loop(0, num, move, jnp.zeros(()))

    print(f"\ndenoising loss before alignment {denoising(start):.3f}")
    title = "alignment to one class"
    arms = ("full", "random") if fast else tuple(PARAMETERS)
    return compare(title, arms, moves, sampler, start, seeds, num_moves, "denoising")


def compare(title, arms, moves, sampler, params, seeds, num_moves, last_column):
    """Run all arms over the seeds, at equal steps and at equal time, and print a table."""
    bar = partial(tqdm, leave=False, disable=not sys.stderr.isatty())
    num = jnp.int32(num_moves)
    runs = {arm: moves(arm) for arm in arms}
    jax.block_until_ready([run(seeds[0], jnp.int32(1), params) for run in runs.values()])
    sampler(seeds[0], jnp.int32(1), params)
    results = {arm: [] for arm in arms}
    seconds = np.zeros((len(seeds), 1 + len(arms)))
    for s, seed in enumerate(bar(seeds, title)):
        calls = {"sampler": sampler} | runs
        for a, (arm, call) in enumerate(calls.items()):  # in turn: ratios of times mean something
            begin = time.perf_counter()
            result = jax.block_until_ready(call(seed, num, params))
            seconds[s, a] = time.perf_counter() - begin
            if arm in results:
                results[arm].append(result)
    full_time = seconds[:, 1:2]
    ratios = np.median(seconds / full_time, axis=0)
    each_extra = (seconds - seconds[:, :1]) / (full_time - seconds[:, :1])
    extra = np.median(each_extra, axis=0)
    found = {"final": {}, "timed": {}, "extra": {}, "time": {}}
    print(
        f"\n{title}; a step of full {1e3 * np.median(full_time) / num_moves:.1f} ms\n{'':26s}"
        f"{'time':>7s}{'extra':>7s}{'equal steps':>13s}{'- full':>20s}{'equal time':>13s}"
        f"{'- full':>20s}{last_column:>12s}",
        flush=True,
    )
    full = np.array([value for value, _ in results["full"]])
    for a, (arm, run) in enumerate(bar(runs.items(), "equal time"), start=1):
        final = np.array([value for value, _ in results[arm]])
        last = np.mean([last for _, last in results[arm]])
        timed = final
        if a > 1:
            in_time = jnp.int32(max(num_moves / ratios[a], 1))
            timed = np.array([run(seed, in_time, params)[0] for seed in seeds])
        found["final"][arm], found["timed"][arm] = final, timed
        found["extra"][arm], found["time"][arm] = each_extra[:, a], (seconds / full_time)[:, a]
        cells = "".join(
            f"{x.mean():13.4g}{f'{(x - full).mean():.2g} +- {error(x - full):.1g}':>20s}"
            for x in (final, timed)
        )
        tqdm.write(f"{arm:26s}{ratios[a]:7.2f}{extra[a]:7.2f}{cells}{last:12.3g}")
    return found


def error(x):
    return x.std(ddof=1) / len(x) ** 0.5


if __name__ == "__main__":
    main()
