"""When random feedback converges, when it aligns, and what it is worth.

Song, Xu & Lafferty, 2021, arXiv:2106.06044, say of a network f(x) = beta psi(W x) / sqrt(p), whose
error is sent back through random weights b in the place of beta, that (1) where it is wide enough
it converges exponentially to zero error; (2) without regularisation the alignment, the cosine
between b and beta, vanishes as the width p grows; (3) with weight decay in the beginning it stays
away from zero at any width.

    python examples/papers/feedback.py [--fast] [--picture FILE]

1. Linear networks, by an exact reduction to beta and n numbers, to a width of 12,800: without decay
   beside e_0^T (X X^T)^-1 e_0 / 2p, and with a total decay of kappa sqrt(p) beside the closed form.
2. ReLU and tanh networks: error beside the theorem's bound, alignment over the width.
3. Digits, a multilayer perceptron 64-128-128-10: rules beside backpropagation and beside training
   the last layer alone.
4. A variational autoencoder's encoder trained through feedback weights, model exact.
5. Hamiltonian Monte Carlo of a Bayesian network with the error sent back through feedback weights:
   exact, and how slow.

Intervals are 95 % of the mean over seeds, by Student's t. Single precision, some five minutes on
two cores.
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import HMC, MCMC
from numpyro.infer.util import initialize_model
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from probbp.models import bnn
from probbp.ops import feedback
from probbp.optim.feedback import decay_until_aligned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a smoke test; its figures are rough")
    parser.add_argument("--picture", default="feedback_paper.png", help="where the curves go")
    arguments = parser.parse_args()
    fast, start = arguments.fast, time.perf_counter()
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    with tqdm(total=5) as bar:
        for title, part in {
            "linear networks": partial(linear, axes[0]),
            "nonlinear networks": partial(nonlinear, axes[1:]),
            "digits": digits,
            "autoencoder": autoencoder,
            "Monte Carlo": monte_carlo,
        }.items():
            bar.set_description(title)
            lines = part(fast)
            bar.clear()
            print("\n" + "\n".join(lines), flush=True)
            bar.update()
    figure.savefig(arguments.picture)
    print(f"\n{time.perf_counter() - start:.0f} seconds, JAX {jax.__version__}")


def interval(values):
    """Return mean and half width of the 95 % interval over the first axis."""
    values = np.asarray(values)
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(0, ddof=1) / len(values) ** 0.5
    return values.mean(0), half


def shown(values, digits=3):
    mean, half = interval(values)
    return f"{mean:.{digits}f} +- {half:.{digits}f}"


# ---------------------------------------------------------------------------------------
# 1. Linear networks: W(t) = W_0 + b s(t)^T X / sqrt(p), with s' = -e.


def reduced(key, width, x, y, rate, decay, num_steps):
    """Return cosine and error's norm before each step, and e_0, for a network of W_0 X^T alone.

    The columns of W_0 X^T are Gaussian with covariance X X^T, so that W_0 itself is not needed.
    """
    gram = x @ x.T
    factor = jnp.linalg.cholesky(gram)
    key_a, key_beta, key_b = jax.random.split(key, 3)
    a = jax.random.normal(key_a, (width, len(y))) @ factor.T
    beta, b = jax.random.normal(key_beta, (width,)), jax.random.normal(key_b, (width,))

    def error_of(beta, s):
        hidden = a.T @ beta + (b @ beta) / width**0.5 * (gram @ s)
        return hidden / width**0.5 - y

    def step(carry, i):
        beta, s = carry
        e = error_of(beta, s)
        seen = feedback.alignment(b, beta), jnp.linalg.norm(e)
        slope = (a @ e + b * (s @ (gram @ e)) / width**0.5) / width**0.5
        return (beta - rate * (slope + decay(i) * beta), s - rate * e), seen

    start = beta, jnp.zeros_like(y)
    _, seen = jax.lax.scan(step, start, jnp.arange(num_steps))
    return *seen, error_of(*start)


def closed_form(decay, kappa, gamma=1.0, length=1.0):
    """Return the alignment, and the error beside the targets' length, while the decay is on."""
    roots = np.roots([gamma**2 / 3, 0, decay + gamma, -length * kappa])
    q = roots[np.abs(roots.imag) < 1e-9].real[0]
    return (
        np.sqrt(gamma) * q / np.sqrt(1 + gamma * q**2),
        decay / (decay + gamma + gamma**2 * q**2),
    )


def linear(ax, fast):
    widths = (200, 800, 3_200) if fast else (200, 400, 800, 1_600, 3_200, 6_400, 12_800)
    seeds = jax.random.split(jax.random.key(0), 4 if fast else 20)
    n, dim, rate = 50, 150, 0.05
    x = jax.random.normal(jax.random.key(1), (n, dim)) / dim**0.5
    y = x @ jax.random.normal(jax.random.key(2), (dim,))
    lines = [
        f"1. Linear networks, no decay: n = {n}, d = {dim}, teacher, {len(seeds)} seeds",
        f"{'width':>8s}{'cosine':>20s}{'p x gained cosine':>22s}{'theory':>9s}{'error left':>12s}",
    ]
    curves = []
    for width in widths:
        run = partial(reduced, width=width, x=x, y=y, rate=rate, decay=lambda i: 0.0,
                      num_steps=2_000)  # fmt: skip
        cosine, error, e = jax.jit(partial(jax.lax.map, run))(seeds)
        theory = jnp.mean(jnp.sum(e * jnp.linalg.solve(x @ x.T, e.T).T, -1)) / 2
        gain = width * (cosine[:, -1] - cosine[:, 0])
        curves.append((width, *interval(cosine[:, -1]), theory / width))
        lines.append(
            f"{width:8d}{shown(cosine[:, -1], 4):>20s}{shown(gain, 1):>22s}{theory:9.1f}"
            f"{(error[:, -1] / error[:, 0]).mean():12.1e}"
        )
    width, mean, half, theory = np.array(curves).T
    ax.errorbar(width, mean, half, fmt="o", color="C0", label="no decay")
    ax.plot(width, theory, "C0--", linewidth=1, label="theory")

    decay, rate, n = 0.5, 0.1, 10
    x, y = jnp.eye(n), jnp.zeros(n).at[0].set(4.0)
    lines += [
        "",
        f"   with a decay of {decay} until its total is kappa sqrt(p): X X^T = I, |y| = 4",
        f"{'width':>8s}{'kappa':>7s}{'cosine, off':>18s}{'in the end':>18s}{'theory':>8s}"
        f"{'error, off':>18s}{'theory':>8s}{'in the end':>12s}",
    ]
    seeds = seeds[:4]
    for kappa in (0.125, 0.25, 0.5, 1.0, 2.0):
        points = []
        theory = closed_form(decay, kappa, length=4.0)
        for width in widths if kappa in (0.25, 1.0) else (3_200,):
            schedule = decay_until_aligned(kappa, rate, decay, width)
            off = round(kappa * width**0.5 / (rate * decay))
            run = partial(reduced, width=width, x=x, y=y, rate=rate, decay=schedule,
                          num_steps=off + 300)  # fmt: skip
            cosine, error, _ = jax.jit(partial(jax.lax.map, run))(seeds)
            points.append((width, *interval(cosine[:, -1])))
            lines.append(
                f"{width:8d}{kappa:7.3f}{shown(cosine[:, off]):>18s}{shown(cosine[:, -1]):>18s}"
                f"{theory[0]:8.3f}{shown(error[:, off] / 4):>18s}{theory[1]:8.3f}"
                f"{(error[:, -1] / 4).mean():12.1e}"
            )
        if len(points) > 1:
            color = {0.25: "C1", 1.0: "C2"}[kappa]
            width, mean, half = np.array(points).T
            ax.errorbar(width, mean, half, fmt="o", color=color, label=f"decay, kappa = {kappa}")
            ax.axhline(theory[0], color=color, linestyle="--", linewidth=1)
    kappa, width = 1.0, 50 if fast else 150
    cosine = usual(width, x, y, rate / 2, decay, kappa)
    theory, _ = closed_form(decay, kappa, length=4.0)
    lines += [
        "",
        f"   weights of variance 1 / p, no root in front, at a width of {width}: kappa {kappa} is "
        f"{width} times the dose; cosine {cosine:.3f}, theory {theory:.3f}",
    ]
    ax.set(xscale="log", yscale="log", ylim=(1e-3, 1.2), xlabel="width", ylabel="cos(b, beta)",
           title="Linear networks")  # fmt: skip
    ax.legend()
    return lines


def usual(width, x, y, rate, decay, kappa):
    """Return the cosine after a decay in the usual parametrisation, one learning rate for all."""
    key_w, key_a, key_b = jax.random.split(jax.random.key(15), 3)
    params = {
        "w": jax.random.normal(key_w, (x.shape[1], width)),
        "a": jax.random.normal(key_a, (width, 1)) / width**0.5,
    }
    b = jax.random.normal(key_b, (width, 1)) / width**0.5
    learning_rate, weight_decay = rate / width, decay * width
    schedule = decay_until_aligned(kappa * width, learning_rate, weight_decay, width)

    def loss(params):
        return jnp.sum((feedback.dense(x @ params["w"], params["a"], b)[:, 0] - y) ** 2) / 2

    optimiser = optax.chain(
        optax.add_decayed_weights(schedule, {"w": False, "a": True}), optax.sgd(learning_rate)
    )

    def step(carry, _):
        params, state = carry
        updates, state = optimiser.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = params, optimiser.init(params)
    length = round(kappa * width**1.5 / (rate * decay))
    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=length))(carry)
    return float(feedback.alignment(params["a"], b))


# ---------------------------------------------------------------------------------------
# 2. ReLU and tanh networks, as they are.


def descend(key, width, x, y, psi, rate, decay, num_steps, exact=False):
    """Return cosine and error's norm before each step of gradient descent."""
    key_w, key_beta, key_b = jax.random.split(key, 3)
    params = {
        "w": jax.random.normal(key_w, (x.shape[1], width)),
        "beta": jax.random.normal(key_beta, (width, 1)),
    }
    b = jax.random.normal(key_b, (width, 1))

    def loss(params):
        hidden = psi(x @ params["w"])
        back = params["beta"] if exact else b
        e = feedback.dense(hidden, params["beta"], back)[:, 0] / width**0.5 - y
        return jnp.sum(e**2) / 2, e

    def step(params, i):
        grad, e = jax.grad(loss, has_aux=True)(params)
        grad["beta"] += decay(i) * params["beta"]
        seen = feedback.alignment(b, params["beta"]), jnp.linalg.norm(e)
        return jax.tree.map(lambda p, g: p - rate * g, params, grad), seen

    return jax.lax.scan(step, params, jnp.arange(num_steps))[1]


def nonlinear(axes, fast):
    widths = (100, 400) if fast else (100, 400, 1_600, 6_400)
    seeds = jax.random.split(jax.random.key(3), 2 if fast else 4)
    n, dim, rate, decay, kappa = 20, 60, 0.1, 0.5, 1.0
    x = jax.random.normal(jax.random.key(4), (n, dim)) / dim**0.5
    y = jax.random.normal(jax.random.key(5), (n,))
    w = jax.random.normal(jax.random.key(6), (dim, 200_000))
    num_steps = 400 if fast else 1_000
    lines = [
        f"2. Nonlinear networks: n = {n}, d = {dim}, Gaussian targets, {len(seeds)} seeds; decay "
        f"{decay} until kappa = {kappa}",
        f"{'':6s}{'width':>7s}{'cosine, no decay':>20s}{'cosine, decay':>18s}"
        f"{'error left, decay':>19s}{'time, feedback':>16s}{'time, exact':>16s}{'bound':>8s}",
    ]
    for color, (name, psi) in enumerate({"ReLU": jax.nn.relu, "tanh": jnp.tanh}.items()):
        hidden = psi(x @ w)
        gamma = float(jnp.linalg.eigvalsh(hidden @ hidden.T / w.shape[1])[0])
        without, with_decay = [], []
        for width in widths:
            off = round(kappa * width**0.5 / (rate * decay))
            schedule = decay_until_aligned(kappa, rate, decay, width)
            run = partial(descend, width=width, x=x, y=y, psi=psi, rate=rate)

            def over_seeds(decay, num_steps, exact=False, run=run):
                one = partial(run, decay=decay, num_steps=num_steps, exact=exact)
                return jax.jit(partial(jax.lax.map, one))(seeds)

            cosine, error = over_seeds(lambda i: 0.0, num_steps)
            _, exact = over_seeds(lambda i: 0.0, num_steps, exact=True)
            aligned, left = over_seeds(schedule, off + num_steps)
            # When the error has fallen a thousandfold, in steps times step size.
            times = [rate * (e > e[:, :1] / 1e3).sum(1) for e in (error, exact)]
            without.append((width, *interval(cosine[:, -1])))
            with_decay.append((width, *interval(aligned[:, -1])))
            lines.append(
                f"{name:6s}{width:7d}{shown(cosine[:, -1]):>20s}{shown(aligned[:, -1]):>18s}"
                f"{(left[:, -1] / left[:, 0]).mean():19.1e}{shown(times[0], 1):>16s}"
                f"{shown(times[1], 1):>16s}{4 * np.log(1e3) / gamma:8.0f}"
            )
        steps = rate * np.arange(num_steps)
        for curve, label, style in ((error, "feedback", "-"), (exact, "exact", ":")):
            axes[0].plot(steps, (curve / curve[:, :1]).mean(0), f"C{color}{style}",
                         label=f"{name}, {label}")  # fmt: skip
        axes[0].plot(steps, np.exp(-gamma / 4 * steps), f"C{color}--", linewidth=1,
                     label=f"{name}, bound")  # fmt: skip
        for points, style, label in ((without, "o-", "no decay"), (with_decay, "s-", "decay")):
            width, mean, half = np.array(points).T
            axes[1].errorbar(width, mean, half, fmt=style, color=f"C{color}",
                             label=f"{name}, {label}")  # fmt: skip
    axes[0].set(yscale="log", ylim=(1e-6, 1.5), xlabel="steps x step size",
                ylabel="error, relative", title=f"Error at a width of {widths[-1]}")  # fmt: skip
    axes[1].set(xscale="log", ylim=(-0.05, 1), xlabel="width", ylabel="cos(b, beta)",
                title=f"Alignment, kappa = {kappa}")  # fmt: skip
    for ax in axes:
        ax.legend()
    return lines


# ---------------------------------------------------------------------------------------
# 3. Digits.

SIZES = (64, 128, 128, 10)
RULES = {
    "backpropagation": lambda kernel, b: (kernel, kernel),
    "last layer alone": lambda kernel, b: (kernel, jnp.zeros_like(b)),
    "random": lambda kernel, b: (kernel, b),
    "uniform sign": lambda kernel, b: (kernel, feedback.uniform_sign(kernel)),
    "fixed magnitude": lambda kernel, b: (kernel, feedback.fixed_magnitude(kernel, b)),
    "Kolen-Pollack": lambda kernel, b: (feedback.kolen_pollack(kernel, b), b),
}


def perceptron(rng_key, sizes):
    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    keys = jax.random.split(rng_key, len(sizes) - 1)
    return [
        {"kernel": jax.random.normal(key, (n, m)) / n**0.5, "bias": jnp.zeros(m)}
        for key, (n, m) in zip(keys, pairs, strict=True)
    ]


def apply(layers, weights, rule, x):
    for i, (layer, b) in enumerate(zip(layers, weights, strict=True)):
        kernel, back = RULES[rule](layer["kernel"], b)
        x = feedback.dense(jnp.tanh(x) if i else x, kernel, back) + layer["bias"]
    return x


def layer_functions(layers):
    *hidden, last = layers
    functions = [lambda h, p=p: jnp.tanh(h @ p["kernel"] + p["bias"]) for p in hidden]
    return [*functions, lambda h: h @ last["kernel"] + last["bias"]]


def digits(fast):
    parts = train_test_split(*load_digits(return_X_y=True), test_size=0.3, random_state=0)
    train_x, test_x = (jnp.asarray(part / 16, jnp.float32) for part in parts[:2])
    train_y, test_y = (jnp.asarray(part) for part in parts[2:])
    seeds = jax.random.split(jax.random.key(7), 3 if fast else 10)
    num_epochs, batch = 4 if fast else 40, 100
    rows_used = len(train_x) // batch * batch

    def cross_entropy(y, logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def loss(rule, layers, weights, x, y):
        if rule == "direct":
            return feedback.direct(partial(cross_entropy, y), layer_functions(layers), x, weights)
        return cross_entropy(y, apply(layers, weights, rule, x))

    def fit(rule, weight_decay, key):
        key_layers, key_weights, key_batches = jax.random.split(key, 3)
        layers = perceptron(key_layers, SIZES)
        if rule == "direct":
            weights = feedback.direct_weights(key_weights, layer_functions(layers), train_x)
        else:
            weights = feedback.normal(key_weights, [layer["kernel"] for layer in layers])
        # Kernels decay, and with Kolen & Pollack's rule the feedback weights with them.
        argnums = (0, 1) if rule == "Kolen-Pollack" else (0,)
        grad_of = jax.grad(partial(loss, rule), argnums)
        params = (layers, weights)[: len(argnums)]
        mask = jax.tree.map(lambda leaf: leaf.ndim == 2, params)
        optimiser = optax.chain(
            optax.add_decayed_weights(weight_decay, mask), optax.sgd(0.1, momentum=0.9)
        )

        def step(carry, rows):
            params, state = carry
            layers, b = (*params, weights)[:2]
            updates, state = optimiser.update(
                grad_of(layers, b, train_x[rows], train_y[rows]), state, params
            )
            return (optax.apply_updates(params, updates), state), None

        def epoch(carry, key):
            rows = jax.random.permutation(key, len(train_x))[:rows_used].reshape(-1, batch)
            return jax.lax.scan(step, carry, rows)[0], None

        carry = params, optimiser.init(params)
        (params, _), _ = jax.lax.scan(epoch, carry, jax.random.split(key_batches, num_epochs))
        layers, b = (*params, weights)[:2]
        logits = layer_functions(layers)
        h = test_x
        for layer in logits:
            h = layer(h)
        accuracy = (h.argmax(-1) == test_y).mean()
        ours = grad_of(layers, b, train_x, train_y)[0]
        theirs = jax.grad(partial(loss, "backpropagation"))(layers, [p["kernel"] for p in layers],
                                                            train_x, train_y)  # fmt: skip
        cosines = [feedback.alignment(ours, theirs)[i]["kernel"] for i in (0, 1)]
        if rule == "direct":
            aligned = [jnp.nan, jnp.nan]
        else:
            backs = [RULES[rule](p["kernel"], w)[1] for p, w in zip(layers, b, strict=True)]
            aligned = [feedback.alignment(layers[i]["kernel"], backs[i]) for i in (1, 2)]
        return jnp.stack([100 * accuracy, *cosines, *aligned])

    lines = [
        f"3. Digits, {'-'.join(map(str, SIZES))}, {num_epochs} epochs, {len(seeds)} seeds",
        f"{'':18s}{'decay':>7s}{'test accuracy [%]':>20s}{'beyond the last layer':>23s}"
        f"{'beside backpropagation':>24s}"
        f"{'gradient, layer 1':>19s}{'layer 2':>17s}{'weights, layer 2':>18s}{'layer 3':>17s}",
    ]
    settings = [("last layer alone", 0.0), ("backpropagation", 0.0), ("backpropagation", 1e-3)]
    settings += [("random", 0.0), ("random", 1e-3), ("random", 1e-2), ("direct", 0.0)]
    settings += [("uniform sign", 0.0), ("fixed magnitude", 0.0)]
    settings += [("Kolen-Pollack", 0.0), ("Kolen-Pollack", 1e-3)]
    results = {
        setting: np.asarray(jax.jit(jax.vmap(partial(fit, *setting)))(seeds))
        for setting in settings
    }
    least, most = (results[setting][:, 0] for setting in settings[:2])
    for (rule, weight_decay), scores in results.items():
        cells = [shown(scores[:, i], 2) if np.isfinite(scores[0, i]) else "-" for i in range(1, 5)]
        lines.append(
            f"{rule:18s}{weight_decay:7g}{shown(scores[:, 0], 2):>20s}"
            f"{shown(scores[:, 0] - least, 2):>23s}{shown(scores[:, 0] - most, 2):>24s}"
            f"{cells[0]:>19s}{cells[1]:>17s}{cells[2]:>18s}{cells[3]:>17s}"
        )
    return lines


# ---------------------------------------------------------------------------------------
# 4. An encoder. The model is linear and Gaussian, so that the gap of the ELBO is known.


def autoencoder(fast):
    steps = (20, 50) if fast else (100, 300, 800)
    seeds = jax.random.split(jax.random.key(8), 3 if fast else 10)
    noise = 0.5
    loading = jax.random.normal(jax.random.key(9), (2, 20))
    precision = jnp.eye(2) + loading @ loading.T / noise**2
    covariance = jnp.linalg.inv(precision)

    def simulate(key, num):
        key_z, key_x = jax.random.split(key)
        z = jax.random.normal(key_z, (num, 2))
        return z @ loading + noise * jax.random.normal(key_x, (num, 20))

    def gap(out, x):
        """The divergence of the encoder's Gaussian from the posterior, nats a record."""
        mean, scale = out[:, :2], jnp.exp(out[:, 2:])
        shift = mean - x @ loading.T @ covariance / noise**2
        quadratic = jnp.einsum("ni,ij,nj->n", shift, precision, shift)
        trace = jnp.sum(jnp.diag(precision) * scale**2, -1)
        volume = -jnp.linalg.slogdet(precision)[1] - 2 * jnp.sum(out[:, 2:], -1)
        return jnp.mean(quadratic + trace - 2 + volume) / 2

    def negative_elbo(layers, weights, rule, x, key):
        out = apply(layers, weights, rule, x)
        mean, log_scale = out[:, :2], out[:, 2:]
        z = mean + jnp.exp(log_scale) * jax.random.normal(key, mean.shape)
        likelihood = jnp.sum((x - z @ loading) ** 2, -1) / (2 * noise**2)
        return jnp.mean(likelihood + jnp.sum(z**2 / 2 - log_scale, -1))

    test = simulate(jax.random.key(10), 2_000)

    def fit(rule, key):
        key_layers, key_weights, key_steps = jax.random.split(key, 3)
        layers = perceptron(key_layers, (20, 64, 64, 4))
        weights = feedback.normal(key_weights, [layer["kernel"] for layer in layers])
        optimiser = optax.adam(3e-3)

        def step(carry, key):
            (layers, b), state = carry
            key_x, key_z = jax.random.split(key)
            x = simulate(key_x, 256)
            grads = jax.grad(negative_elbo, (0, 1))(layers, b, rule, x, key_z)
            updates, state = optimiser.update(grads, state)
            layers, b = optax.apply_updates((layers, b), updates)
            out = apply(layers, b, rule, test)
            return ((layers, b), state), gap(out, test)

        carry = (layers, weights), optimiser.init((layers, weights))
        _, gaps = jax.lax.scan(step, carry, jax.random.split(key_steps, steps[-1]))
        return gaps[jnp.array(steps) - 1]

    lines = [
        "4. An encoder 20-64-64-4 of a linear Gaussian model: divergence from the posterior, nats "
        f"a record, {len(seeds)} seeds",
        f"{'':18s}" + "".join(f"{f'{num} steps':>20s}" for num in steps),
    ]
    for rule in RULES:
        gaps = jax.jit(jax.vmap(partial(fit, rule)))(seeds)
        lines.append(f"{rule:18s}" + "".join(f"{shown(column, 2):>20s}" for column in gaps.T))
    return lines


# ---------------------------------------------------------------------------------------
# 5. A Bayesian network, 49 weights, in NumPyro's own HMC.


def monte_carlo(fast):
    num_chains, num_samples = (2, 100) if fast else (8, 1_000)
    key_x, key_y, key_start, key_weights = jax.random.split(jax.random.key(11), 4)
    x = jax.random.normal(key_x, (50, 2))
    y = jnp.sin(x[:, 0]) * x[:, 1] + 0.1 * jax.random.normal(key_y, (50,))
    network = partial(bnn.model, widths=(12,), noise_scale=0.3)
    info = initialize_model(key_start, network, model_args=(x, y))
    mode = descent(info.potential_fn, info.param_info.z)
    at_mode = [mode["weight_0"], mode["weight_1"]]
    random = feedback.normal(key_weights, at_mode)
    rules = {
        "exact": jnp.matmul,
        "uniform sign": lambda x, w: feedback.dense(x, w, feedback.uniform_sign(w)),
        "the mode's weights": [partial(feedback.dense, feedback=b) for b in at_mode],
        "random": [partial(feedback.dense, feedback=b) for b in random],
    }
    probe = jax.random.normal(jax.random.key(12), (5, 2))
    lines = [
        f"5. HMC, ten leapfrog steps, {sum(leaf.size for leaf in mode.values())} parameters, "
        f"{num_chains} chains of {num_samples} from the mode",
        f"{'':20s}{'step size':>10s}{'acceptance':>12s}{'ESS/1000':>10s}{'R-hat':>8s}"
        f"{'prediction':>20s}{'of its square':>16s}",
    ]
    for name, dense in rules.items():
        for step_size in (0.04, 0.02, 0.01, 0.0025, None):
            kernel = HMC(
                partial(network, dense=dense),
                step_size=step_size or 0.01,
                num_steps=10,
                trajectory_length=None,
                adapt_step_size=step_size is None,
                adapt_mass_matrix=False,
            )
            mcmc = MCMC(
                kernel,
                num_warmup=500 if step_size is None and not fast else 100,
                num_samples=num_samples,
                num_chains=num_chains,
                chain_method="vectorized",
                progress_bar=False,
            )
            start = jax.tree.map(lambda leaf: jnp.stack([leaf] * num_chains), mode)
            mcmc.run(jax.random.key(13), x, y, init_params=start,
                     extra_fields=("accept_prob", "adapt_state.step_size"))  # fmt: skip
            fields = mcmc.get_extra_fields()
            draws = mcmc.get_samples(group_by_chain=True)
            outputs = np.asarray(predicted(draws, probe))
            acceptance = float(fields["accept_prob"].mean())
            lines.append(
                f"{name:20s}{float(np.mean(fields['adapt_state.step_size'])):10.4f}"
                f"{'  tuned' if step_size is None else '':7s}"
                f"{acceptance:5.2f}" + summary(outputs, acceptance, num_samples)
            )
    return lines


def descent(potential_fn, start, num_steps=3_000):
    optimiser = optax.adam(0.01)

    def step(carry, _):
        z, state = carry
        updates, state = optimiser.update(jax.grad(potential_fn)(z), state)
        return (optax.apply_updates(z, updates), state), None

    return jax.jit(lambda z: jax.lax.scan(step, (z, optimiser.init(z)), length=num_steps)[0][0])(
        start
    )


def predicted(draws, x):
    hidden = jnp.tanh(x @ draws["weight_0"] + draws["bias_0"][..., None, :])
    return (hidden @ draws["weight_1"] + draws["bias_1"][..., None, :])[..., 0]


def summary(outputs, acceptance, num_samples):
    """Effective draws of the predictions, for a thousand iterations of a chain."""
    if acceptance < 0.005:
        return f"{'stuck':>10s}"
    chains = outputs.shape[0]
    size = effective_sample_size(outputs).min()
    means = outputs.mean(1)
    within = outputs.var(1, ddof=1).mean(0)
    rhat = np.sqrt((within + means.var(0, ddof=1)) / within).max()
    first, second = outputs[..., 0].mean(1), (outputs[..., 0] ** 2).mean(1)
    return (
        f"{1e3 * size / (chains * num_samples):10.1f}{rhat:8.3f}"
        f"{shown(first):>20s}{shown(second):>16s}"
    )


if __name__ == "__main__":
    main()
