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
- Bayes: a mean-field posterior over the weights of a dense network of 64-128-10, fitted by SVI with
  gradients by rates, at temperature 1 and at the one of four with which a fit to three quarters of
  the labels predicts the last quarter best. Beside it the point estimate with weight decay, that
  with its logits divided by a number found on the same quarter, and an ensemble of three. With 200
  labels, so that there is something to be uncertain about; predictions average 32 draws. NLL and
  the expected calibration error (ECE, 15 bins) on test images.

    python examples/papers/rate.py [--fast]

About seven minutes on two cores.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _evidence import above, below, exact, over_seeds
from _papers import RATE
from _results import panels, parsed, parser, write
from flax import nnx
from numpyro.infer import SVI, Predictive, TraceMeanField_ELBO
from sklearn.datasets import load_digits
from tqdm import tqdm

from probbp.diagnostics import expected_calibration_error, negative_log_likelihood
from probbp.models import snn
from probbp.ops import rate

BATCH = 128
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
        results = [compare(arms, seed, epochs) for seed in bar(seeds, desc=title)]
        cells = [mean_and_error([accuracies[arm] for accuracies, _ in results]) for arm in arms]
        print(f"{title:32s}" + "".join(f"{cell:>16s}" for cell in cells), flush=True)

    print(f"\n{'Bayes, 200 labels':32s}{'accuracy':>16s}{'NLL':>18s}{'ECE %':>16s}")
    temperatures = (0.1,) if fast else (0.3, 0.1, 0.03, 0.01)
    results = [bayes(seed, epochs, temperatures) for seed in bar(seeds, desc="Bayes")]
    for arm in results[0]:
        rows = np.array([result[arm] for result in results])
        bayes_row(arm, rows)
        if arm != "posterior":
            bayes_row("  posterior - this", np.array([r["posterior"] for r in results]) - rows)
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


def fit_with(run, is_trained=lambda path: True, learning_rate=1e-3, weight_decay=0.0):
    """Return a compiled function that trains a network."""

    @partial(jax.jit, static_argnums=0)
    def fit(graph, params, rest, x, y, batches):
        optimiser = optax.adamw(
            optax.cosine_decay_schedule(learning_rate, len(batches)), weight_decay=weight_decay
        )

        def loss(params, rest, x, y):
            network = nnx.merge(graph, params, rest, copy=True)
            logits = run(network, x)
            *_, rest = nnx.split(network, nnx.Param, ...)
            return cross_entropy(logits, y).mean(), rest

        def step(carry, batch):
            params, state, rest = carry
            grad, rest = jax.grad(loss, has_aux=True)(params, rest, x[batch], y[batch])
            grad = jax.tree_util.tree_map_with_path(lambda path, g: g * is_trained(path), grad)
            updates, state = optimiser.update(grad, state, params)
            return (optax.apply_updates(params, updates), state, rest), None

        (params, _, rest), _ = jax.lax.scan(step, (params, optimiser.init(params), rest), batches)
        return params, rest

    return fit


def train(arm, seed, x, y, epochs):
    """Return the trained network."""
    make, _, fit = arm
    graph, params, rest = nnx.split(make(seed), nnx.Param, ...)
    rng = np.random.default_rng(seed)
    size = min(BATCH, len(x) // 2)
    order = np.concatenate(
        [rng.permutation(len(x))[: len(x) // size * size] for _ in range(epochs)]
    )
    params, rest = fit(graph, params, rest, x, y, jnp.asarray(order.reshape(-1, size)))
    return nnx.merge(graph, params, rest, copy=True)


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


def bayes(seed, epochs, temperatures):
    """Return (accuracy, NLL, ECE) on test images for each way to predict."""
    x, y, x_test, y_test = digits(seed)
    x, y = x[:200], y[:200]
    epochs = 5 * epochs
    arm = (*dense_arm(rate.constant, 8, sizes=(64, 128, 10))[:2], POINT_FIT)
    run = arm[1]
    members = [train(arm, 100 * seed + member, x, y, epochs) for member in range(3)]
    log_probs = [jax.nn.log_softmax(run(member, x_test)) for member in members]
    held_out = train(arm, 100 * seed, x[:150], y[:150], epochs)
    held_out_logits = run(held_out, x[150:])
    divisors = jnp.geomspace(0.2, 5, 60)
    losses = jax.vmap(lambda t: cross_entropy(held_out_logits / t, y[150:]).mean())(divisors)
    best = divisors[jnp.argmin(losses)]

    rng_key = jax.random.key(seed)
    quarter = {}
    for temperature in temperatures:
        held_out = posterior(rng_key, x[:150], y[:150], x[150:], temperature, 10 * epochs)
        quarter[temperature] = negative_log_likelihood(jnp.exp(held_out), y[150:])
    coldest = min(quarter, key=quarter.__getitem__)
    predicted = {
        name: posterior(rng_key, x, y, x_test, temperature, 10 * epochs)
        for name, temperature in {"posterior": coldest, "posterior, T = 1": 1.0}.items()
    }
    return {
        **{name: scores(log_probs, y_test) for name, log_probs in predicted.items()},
        "point": scores(log_probs[0], y_test),
        "point, temperature": scores(jax.nn.log_softmax(log_probs[0] / best), y_test),
        "ensemble of 3": scores(
            jax.nn.logsumexp(jnp.stack(log_probs), axis=0) - jnp.log(3), y_test
        ),
    }


def posterior(rng_key, x, y, x_new, temperature, num_steps):
    """Return the log probabilities of new images, by 32 draws of the weights."""
    network = snn.MLP((64, 128, 10), rngs=nnx.Rngs(0))
    model = partial(snn.model, network=network, temperature=temperature)
    guide = snn.guide(model, network)
    optimiser = optax.adam(optax.cosine_decay_schedule(1e-2, num_steps))
    svi = SVI(model, guide, optimiser, TraceMeanField_ELBO())
    result = svi.run(rng_key, num_steps, x, y, progress_bar=False)
    predict = Predictive(model, guide=guide, params=result.params, num_samples=32)
    log_probs = jax.nn.log_softmax(predict(rng_key, x_new)["logits"])
    return jax.nn.logsumexp(log_probs, axis=0) - jnp.log(32)


POINT_FIT = fit_with(
    lambda network, x: rate.simulate(network, rate.constant(x), 8), weight_decay=1e-2
)


def digits(seed):
    """Return half of the images, their labels, and the other half; pixels between 0 and 2."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    images, labels = jnp.asarray(images[order] / 8, jnp.float32), jnp.asarray(labels[order])
    half = len(labels) // 2
    return images[:half], labels[:half], images[half:], labels[half:]


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def scores(log_probs, y):
    accuracy = 100 * jnp.mean(jnp.argmax(log_probs, -1) == y)
    probs = jnp.exp(log_probs)
    return (
        float(accuracy),
        float(negative_log_likelihood(probs, y)),
        100 * float(expected_calibration_error(probs, y)),
    )


def mean_and_error(values, digits=2):
    values = np.asarray(values)
    error = values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():.{digits}f} ± {error:.{digits}f}"


def bayes_row(title, rows):
    cells = [mean_and_error(rows[:, i], digits) for i, digits in enumerate((2, 3, 2))]
    print(f"{title:32s}{cells[0]:>16s}{cells[1]:>18s}{cells[2]:>16s}", flush=True)


def report(title, results):
    through_time, by_rates = (
        np.array([accuracies[arm] for accuracies, _ in results]) for arm in ("bptt", "rate")
    )
    cells = [mean_and_error(x) for x in (through_time, by_rates, by_rates - through_time)]
    cosine = min(cosine for _, cosine in results)
    print(f"{title:32s}" + "".join(f"{cell:>16s}" for cell in cells) + f"{cosine:9.4f}", flush=True)


if __name__ == "__main__":
    main()
