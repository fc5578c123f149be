"""When random feedback converges, and when it aligns.

Song, Xu & Lafferty, 2021, arXiv:2106.06044, say of a network f(x) = beta psi(W x) / sqrt(p), whose
error is sent back through random weights b in the place of beta, that (1) where it is wide enough
it converges exponentially to zero error; (2) without regularisation the alignment, the cosine
between b and beta, vanishes as the width p grows; (3) with weight decay in the beginning it stays
away from zero at any width.

    python examples/papers/feedback.py [--fast]

1. Linear networks, by an exact reduction to beta and n numbers, to a width of 12,800: without decay
   beside e_0^T (X X^T)^-1 e_0 / 2p, and with a total decay of kappa sqrt(p) beside the closed form.
2. ReLU and tanh networks: error beside the theorem's bound, alignment over the width.

What the rules are worth in practice is in `feedback_rules.py`. Intervals are 95 % of the mean over
seeds, by Student's t. Single precision.
"""

import time
from collections import defaultdict
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _evidence import above, below, over_seeds
from _papers import FEEDBACK
from _parts import run
from _parts import with_interval as shown
from _results import panels, parsed, parser, write

from probbp.ops import feedback
from probbp.optim.feedback import decay_until_aligned


def main() -> None:
    arguments = parsed(parser(__doc__))
    start = time.perf_counter()
    figure, axes = panels(2)
    found = defaultdict(dict)  # what is measured, by width
    parts = {
        "linear networks": partial(linear, axes[1], found),
        "nonlinear networks": partial(nonlinear, axes, found),
    }
    run(parts, arguments.fast)
    print(f"\n{time.perf_counter() - start:.0f} seconds, JAX {jax.__version__}")

    narrow, wide = min(found["ReLU, time"]), max(found["ReLU, time"])
    widest = max(found["linear, no decay"])
    kinds = ("ReLU", "tanh")
    without = [found["linear, no decay"][widest], *(found[f"{k}, no decay"][wide] for k in kinds)]
    aligned = [found["linear, decay"][widest], *(found[f"{k}, decay"][wide] for k in kinds)]
    write(
        arguments,
        paper=FEEDBACK,
        claim="A wide network whose error is sent back through random weights converges "
        "exponentially; its weights align with them only if weight decay makes them, and then at "
        "any width.",
        setting=f"Two layers, Gaussian data: linear to a width of {widest}, ReLU and tanh from "
        f"{narrow} to {wide}; decay 0.5 until its total is the root of the width. 20 seeds, 4 with "
        f"decay and for ReLU and tanh. The figure: ReLU, width {wide}.",
        ours=found["ReLU, time"][wide],
        baseline=found["ReLU, exact"][wide],
        checks=[
            *(
                below(
                    f"converges no later than the theorem says, {kind}",
                    found[f"{kind}, time"][wide],
                    found[f"{kind}, bound"][wide],
                )
                for kind in kinds
            ),
            *(below("without decay alignment vanishes, under 0.05", x, 0.05) for x in without),
            *(above("with decay it stays, over 0.5", x, 0.5) for x in aligned),
        ],
        figure=figure,
        caption="Left: the error of the widest networks, beside the theorem's bound. Right: cosine "
        "between feedback weights and the weights that they stand for, with 95 % intervals; "
        "dashed, our theory of linear networks.",
    )


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


def linear(ax, found, fast):
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
        run = partial(
            reduced, width=width, x=x, y=y, rate=rate, decay=lambda i: 0.0, num_steps=2_000
        )
        cosine, error, e = jax.jit(partial(jax.lax.map, run))(seeds)
        theory = jnp.mean(jnp.sum(e * jnp.linalg.solve(x @ x.T, e.T).T, -1)) / 2
        gain = width * (cosine[:, -1] - cosine[:, 0])
        found["linear, no decay"][width] = over_seeds("cosine, no decay, linear", cosine[:, -1])
        curves.append((width, theory / width))
        lines.append(
            f"{width:8d}{shown(cosine[:, -1], 4):>20s}{shown(gain, 1):>22s}{theory:9.1f}"
            f"{(error[:, -1] / error[:, 0]).mean():12.1e}"
        )
    points(ax, found["linear, no decay"], fmt="o", color="C0", label="linear, no decay")
    ax.plot(*np.array(curves).T, "C0--", linewidth=1, label="theory")

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
        aligned = {}
        theory = closed_form(decay, kappa, length=4.0)
        for width in widths if kappa in (0.25, 1.0) else (3_200,):
            schedule = decay_until_aligned(kappa, rate, decay, width)
            off = round(kappa * width**0.5 / (rate * decay))
            run = partial(
                reduced, width=width, x=x, y=y, rate=rate, decay=schedule, num_steps=off + 300
            )
            cosine, error, _ = jax.jit(partial(jax.lax.map, run))(seeds)
            aligned[width] = over_seeds(f"cosine, linear, kappa = {kappa}", cosine[:, -1])
            lines.append(
                f"{width:8d}{kappa:7.3f}{shown(cosine[:, off]):>18s}{shown(cosine[:, -1]):>18s}"
                f"{theory[0]:8.3f}{shown(error[:, off] / 4):>18s}{theory[1]:8.3f}"
                f"{(error[:, -1] / 4).mean():12.1e}"
            )
        if kappa == 1.0:
            found["linear, decay"] |= aligned
            points(ax, aligned, fmt="s", color="C0", label="linear, decay")
            ax.axhline(theory[0], color="C0", linestyle="--", linewidth=1)
    kappa, width = 1.0, 50 if fast else 150
    cosine = usual(width, x, y, rate / 2, decay, kappa)
    theory, _ = closed_form(decay, kappa, length=4.0)
    lines += [
        "",
        f"   weights of variance 1 / p, no root in front, at a width of {width}: kappa {kappa} is "
        f"{width} times the dose; cosine {cosine:.3f}, theory {theory:.3f}",
    ]
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


def nonlinear(axes, found, fast):
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
        without, with_decay = found[f"{name}, no decay"], found[f"{name}, decay"]
        for width in widths:
            off = round(kappa * width**0.5 / (rate * decay))
            schedule = decay_until_aligned(kappa, rate, decay, width)
            run = partial(descend, width=width, x=x, y=y, psi=psi, rate=rate)

            def all_seeds(decay, num_steps, exact=False, run=run):
                one = partial(run, decay=decay, num_steps=num_steps, exact=exact)
                return jax.jit(partial(jax.lax.map, one))(seeds)

            cosine, error = all_seeds(lambda i: 0.0, num_steps)
            _, exact = all_seeds(lambda i: 0.0, num_steps, exact=True)
            aligned, left = all_seeds(schedule, off + num_steps)
            # When the error has fallen a thousandfold, in steps times step size.
            times = [rate * (e > e[:, :1] / 1e3).sum(1) for e in (error, exact)]
            without[width] = over_seeds(f"cosine, no decay, {name}", cosine[:, -1])
            with_decay[width] = over_seeds(f"cosine, decay, {name}", aligned[:, -1])
            found[f"{name}, time"][width] = over_seeds(
                f"steps x step size to a thousandth of the error, {name}", times[0]
            )
            found[f"{name}, exact"][width] = over_seeds("by the exact gradient", times[1])
            found[f"{name}, bound"][width] = 4 * np.log(1e3) / gamma
            lines.append(
                f"{name:6s}{width:7d}{shown(cosine[:, -1]):>20s}{shown(aligned[:, -1]):>18s}"
                f"{(left[:, -1] / left[:, 0]).mean():19.1e}{shown(times[0], 1):>16s}"
                f"{shown(times[1], 1):>16s}{4 * np.log(1e3) / gamma:8.0f}"
            )
        steps = rate * np.arange(num_steps)
        for curve, label, style in ((error, "feedback", "-"), (exact, "exact", ":")):
            axes[0].plot(
                steps, (curve / curve[:, :1]).mean(0), f"C{color}{style}", label=f"{name}, {label}"
            )
        axes[0].plot(
            steps, np.exp(-gamma / 4 * steps), f"C{color}--", linewidth=1, label=f"{name}, bound"
        )
        for cosines, style, label in ((without, "o", "no decay"), (with_decay, "s", "decay")):
            points(axes[1], cosines, fmt=style, color=f"C{color + 1}", label=f"{name}, {label}")
    axes[0].set(
        yscale="log",
        ylim=(1e-6, 1.5),
        xlabel="steps x step size",
        ylabel="error, relative",
        title=f"Error at a width of {widths[-1]}",
    )
    axes[1].set(
        xscale="log",
        yscale="log",
        ylim=(1e-3, 1.2),
        xlabel="width",
        ylabel="cos(b, beta)",
        title=f"Alignment, kappa = {kappa}",
    )
    for ax in axes:
        ax.legend(fontsize=7)
    return lines


def points(ax, cosines, **style):
    """Plot figures by width."""
    means = [figure.mean for figure in cosines.values()]
    halves = [figure.high - figure.mean for figure in cosines.values()]
    ax.errorbar(list(cosines), means, halves, capsize=3, **style)


if __name__ == "__main__":
    main()
