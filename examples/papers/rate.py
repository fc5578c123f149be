"""Rate-based backpropagation against backpropagation through time, on handwritten digits.

Yu et al., 2024, arXiv:2410.11488, say that spiking networks trained by rates are as accurate as
those trained through time, at a backward cost that does not grow with the number of steps. The
networks here are small: 64-256-256-10 dense, and a residual convolutional one, of scikit-learn's
digits, half of them for training; Adam with a cosine decay, batches of 128.

- accuracy: on test images in percent, mean and standard error over seeds (split, weights, batches),
  and the difference of training by rates to training through time, paired by seed.
- cosine: between the two gradients at the start, the least of all weight matrices and seeds.
- latency code: every pixel fires once in 16 steps, the sooner the brighter. So all inputs have one
  rate, and by rates the first layer learns nothing of its inputs. "readout" trains the last layer
  alone.

Posteriors are in `rate_posteriors.py`.

    python examples/papers/rate.py [--fast]
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from _evidence import above, below, exact, over_seeds
from _papers import RATE
from _results import panels, parsed, parser, write
from _spiking import BATCH, cross_entropy, digits, fit_with, mean_and_error, train
from flax import nnx
from tqdm import tqdm

from probbp.models import snn
from probbp.ops import rate

LATENCY_STEPS = 16


def main():
    arguments = parsed(parser(__doc__))
    fast = arguments.fast
    start = time.perf_counter()
    seeds = range(2 if fast else 5)
    epochs = 2 if fast else 30
    bar = partial(tqdm, leave=False)

    print(f"{'':32s}{'through time':>16s}{'by rates':>16s}{'difference':>16s}{'cosine':>9s}")
    compared = {}
    for num_steps in (8,) if fast else (8, 32):
        for name, encode in {"constant": rate.constant, "Bernoulli": bernoulli}.items():
            arms = {
                gradient: dense_arm(encode, num_steps, gradient=gradient)
                for gradient in ("bptt", "rate")
            }
            title = f"dense, {name}, T = {num_steps}"
            compared[title] = [compare(arms, seed, epochs) for seed in bar(seeds, desc=title)]
            report(title, compared[title])
    arms = {gradient: conv_arm(8, gradient=gradient) for gradient in ("bptt", "rate")}
    title = "convolutional, constant, T = 8"
    compared[title] = [compare(arms, seed, epochs * 2 // 3) for seed in bar(seeds, desc=title)]
    report(title, compared[title])

    print_latency_codes(seeds, epochs, fast)
    print(f"\n{time.perf_counter() - start:.0f} s")

    def accuracy(title, arm):
        return np.array([accuracies[arm] for accuracies, _ in compared[title]])

    longest = [title for title in compared if "constant" in title and "dense" in title][-1]
    lengths = (2, 8) if fast else (8, 32, 128)
    memory = {gradient: [memory_of(gradient, n) for n in lengths] for gradient in ("bptt", "rate")}
    figure, axes = panels(2)
    draw_differences(axes[0], {t: accuracy(t, "rate") - accuracy(t, "bptt") for t in compared})
    draw_memory(axes[1], lengths, memory)
    write(
        arguments,
        paper=RATE,
        claim="Spiking networks trained by rates are as accurate as those trained through time, at "
        "a backward cost that does not grow with the number of steps.",
        setting=f"Digits, half of 1,797 to train on, {epochs} epochs, networks 64-256-256-10 and a "
        f"residual convolutional one; {len(seeds)} seeds; the figure: {longest}.",
        ours=over_seeds("test accuracy, by rates", accuracy(longest, "rate"), "%"),
        baseline=over_seeds("through time, as many steps", accuracy(longest, "bptt"), "%"),
        checks=[
            *(
                above(
                    f"as accurate, within half a point: {title}",
                    over_seeds(
                        "by rates less through time, paired",
                        accuracy(title, "rate") - accuracy(title, "bptt"),
                        "points",
                    ),
                    -0.5,
                )
                for title in compared
            ),
            below(
                "the backward pass does not grow with the steps",
                exact(
                    f"memory of a gradient, {lengths[-1]} steps over {lengths[0]}",
                    memory["rate"][-1] / memory["rate"][0],
                ),
                1.1,
            ),
        ],
        figure=figure,
        caption="Left: test accuracy, paired by seed, with 95 % intervals; the dotted line is half "
        "a point. Right: temporary memory of a gradient by the number of steps.",
    )


def print_latency_codes(seeds, epochs, fast):
    print(f"\n{'latency code, leak 0.9':32s}{'through time':>16s}{'by rates':>16s}{'readout':>16s}")
    for sizes in ((64, 128, 10), (64, 128, 128, 10))[: 1 if fast else 2]:
        neuron = rate.lif(leak=0.9)
        arms = {
            name: dense_arm(
                latency, LATENCY_STEPS, sizes=sizes, neuron=neuron, learning_rate=1e-2, **options
            )
            for name, options in {
                "bptt": {"gradient": "bptt"},
                "rate": {},
                "readout": {"gradient": "bptt", "readout_only": True},
            }.items()
        }
        title = "-".join(map(str, sizes))
        results = [compare(arms, seed, epochs) for seed in tqdm(seeds, desc=title, leave=False)]
        cells = [mean_and_error([accuracies[arm] for accuracies, _ in results]) for arm in arms]
        print(f"{title:32s}" + "".join(f"{cell:>16s}" for cell in cells), flush=True)


def draw_differences(ax, differences):
    figures = [over_seeds("", values) for values in differences.values()]
    means = np.array([figure.mean for figure in figures])
    ax.errorbar(means, range(len(means)), xerr=means - [f.low for f in figures], fmt="o", capsize=3)
    ax.axvline(-0.5, color="grey", linestyle=":")
    ax.set_yticks(range(len(means)), [t.replace(", ", "\n", 1) for t in differences], fontsize=8)
    ax.set(xlabel="difference of accuracies [points]", ylim=(len(means) - 0.5, -0.5))
    ax.set_title("By rates less through time")


def draw_memory(ax, lengths, memory):
    for gradient, label in {"bptt": "through time", "rate": "by rates"}.items():
        ax.loglog(lengths, memory[gradient], "o-", label=label)
    ax.set(xlabel="steps", ylabel="memory of a gradient [MB]", title="64-256-256-10")
    ax.set_xticks(lengths, [str(length) for length in lengths])
    ax.minorticks_off()
    ax.legend()


# ---------------------------------------------------------------------------------------
# What is compared: an arm makes a network, and runs it.


def dense_arm(
    encode,
    num_steps,
    *,
    sizes=(64, 256, 256, 10),
    readout_only=False,
    learning_rate=1e-3,
    **options,
):
    def run(network, x):
        return rate.simulate(network, encode(x), num_steps, **options)

    def is_trained(path):
        return not readout_only or path[0].key == "readout"

    return (
        lambda seed: snn.MLP(sizes, rngs=nnx.Rngs(seed)),
        run,
        fit_with(run, is_trained, learning_rate),
    )


def conv_arm(num_steps, *, learning_rate=2e-2, **options):
    def run(network, x):
        images = x.reshape(-1, 8, 8, 1)
        return rate.simulate(network, rate.constant(images), num_steps, order="layer", **options)

    def make(seed):
        return snn.ConvNet(1, 10, widths=(8, 16), rngs=nnx.Rngs(seed))

    return make, run, fit_with(run, learning_rate=learning_rate)


def bernoulli(x):
    """Return random spikes, others for every batch."""
    key = jax.random.key(jnp.sum(x * 1000).astype(int))
    return rate.bernoulli(key, x / 2)


def latency(x):
    """Return one spike for each pixel, the sooner the brighter."""
    when = jnp.round((1 - x / 2) * (LATENCY_STEPS - 1)).astype(int)
    return rate.events((jnp.arange(LATENCY_STEPS)[:, None, None] == when).astype(x.dtype))


# ---------------------------------------------------------------------------------------
# Training and testing.


def compare(arms, seed, epochs):
    """Return the test accuracy of each arm, and the least cosine of the first two at the start."""
    x, y, x_test, y_test = digits(seed)
    accuracies = {}
    for name, arm in arms.items():
        network = train(arm, seed, x, y, epochs)
        network.eval()
        logits = jax.jit(arm[1])(network, x_test)
        accuracies[name] = 100 * float(jnp.mean(jnp.argmax(logits, -1) == y_test))
    grads = []
    for make, run, _ in list(arms.values())[:2]:
        grad = slope(run, *nnx.split(make(seed), nnx.Param, ...), x[:BATCH], y[:BATCH])
        grads.append([leaf for leaf in jax.tree.leaves(grad) if leaf.ndim > 1])
    cosines = [
        jnp.vdot(a, b) / jnp.linalg.norm(jnp.ravel(a)) / jnp.linalg.norm(jnp.ravel(b))
        for a, b in zip(*grads, strict=True)
    ]
    return accuracies, float(min(cosines))


@partial(jax.jit, static_argnums=(0, 1))
def slope(run, graph, params, rest, x, y):
    """Return the gradient at the start."""

    def loss(params):
        return cross_entropy(run(nnx.merge(graph, params, rest, copy=True), x), y).mean()

    return jax.grad(loss)(params)


def memory_of(gradient, num_steps):
    """Return what XLA sets aside for a gradient of the dense network, in MB."""
    make, run, _ = dense_arm(rate.constant, num_steps, gradient=gradient)
    x, y, *_ = digits(0)
    parts = nnx.split(make(0), nnx.Param, ...)
    compiled = slope.lower(run, *parts, x[:BATCH], y[:BATCH]).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


def report(title, results):
    through_time, by_rates = (
        np.array([accuracies[arm] for accuracies, _ in results]) for arm in ("bptt", "rate")
    )
    cells = [mean_and_error(x) for x in (through_time, by_rates, by_rates - through_time)]
    cosine = min(cosine for _, cosine in results)
    print(f"{title:32s}" + "".join(f"{cell:>16s}" for cell in cells) + f"{cosine:9.4f}", flush=True)


if __name__ == "__main__":
    main()
