"""DSBP's theory, computed: the equation that its descent follows, and a certificate of its error.

Muthuraman, 2025, arXiv:2505.23369, argues for dynamic spectral backpropagation by a stochastic
differential equation and by a PAC-Bayes bound. `probbp.optim.dsbp.modified_equation` and
`pac_bayes` are what can be said soundly. Here:

1. The equation's distance from the descent, by its order; logistic regression of breast cancer,
   projected on five of ten directions. With noise, the second moment of both, exactly.
2. The bound on the error of softmax regression in a subspace: drawn, or learnt from other rows.

    python examples/papers/dsbp_theory.py [--fast]

Means and standard deviations over five splits.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _evidence import above, below, exact, over_seeds
from _papers import DSBP
from _parts import run, shown
from _results import panels, parsed, parser, write
from sklearn.datasets import load_breast_cancer, load_digits
from tqdm import tqdm

from probbp.optim.dsbp import pac_bayes
from probbp.optim.dsbp.modified_equation import modified_equation, simulate

jax.config.update("jax_enable_x64", True)


def main() -> None:
    arguments = parsed(parser(__doc__))
    start = time.perf_counter()
    figure, axes = panels(2)
    found = {}
    parts = {
        "modified equation": partial(equation_orders, axes[0], found),
        "breast cancer": partial(certificates, None, found, "breast cancer", load_breast_cancer),
        "digits": partial(certificates, axes[1], found, "digits", load_digits),
    }
    run(parts, arguments.fast)
    print(f"\n{time.perf_counter() - start:.0f} seconds, JAX {jax.__version__}")

    sets = ("breast cancer", "digits")
    dim = max(dim for _, dim in found["digits"] if dim <= 10)
    bounds = {
        (name, arm): 100 * found[name][arm, dim][:, 0]
        for name in sets
        for arm in ("drawn", "learnt", "learnt, centered")
    }
    write(
        arguments,
        paper=DSBP,
        claim="A stochastic differential equation describes the projected descent to a higher "
        "order, and in a subspace of spectral directions a PAC-Bayes bound is small.",
        setting="Logistic regression of breast cancer projected on five of ten directions; softmax "
        f"regression of breast cancer and digits in {dim} directions, "
        f"{len(bounds['digits', 'drawn'])} splits. The figure: digits.",
        ours=over_seeds("bound on the error, learnt basis", bounds["digits", "learnt"], "%"),
        baseline=over_seeds("directions drawn at random, as many", bounds["digits", "drawn"], "%"),
        checks=[
            *(
                above(
                    f"the equation of order {order + 1} is of that order, {words}",
                    exact(
                        "log2 of the ratio of distances, the step size halved", found[key][order]
                    ),
                    order + 0.8,
                )
                for key, words in (("orders", "descent"), ("orders, noisy", "with noise"))
                for order in (0, 1)
            ),
            *(
                check
                for name in sets
                for check in (
                    below(
                        f"{name}: a bound that says something, under 50 %",
                        over_seeds("bound on the error, learnt basis", bounds[name, "learnt"], "%"),
                        50.0,
                    ),
                    below(
                        f"{name}: it is the spectral basis that makes it small",
                        over_seeds(
                            "bound, learnt basis less a basis drawn at random, paired",
                            bounds[name, "learnt"] - bounds[name, "drawn"],
                            "points",
                        ),
                    ),
                    below(
                        f"{name}: and not the centre",
                        over_seeds(
                            "bound, learnt basis around zero less around a learnt centre, paired",
                            bounds[name, "learnt"] - bounds[name, "learnt, centered"],
                            "points",
                        ),
                    ),
                )
            ),
        ],
        figure=figure,
        caption="Left: distance between descent and its equation of either order. Right: bounds on "
        "the error at a confidence of 96.5 %, mean and standard deviation over splits.",
    )


def equation_orders(ax, found, _):
    """Logistic regression of breast cancer on ten features, projected on five directions."""
    x, y = load_breast_cancer(return_X_y=True)
    x = x[:, :10]
    x, y = jnp.asarray((x - x.mean(0)) / x.std(0))[:200], jnp.asarray(2.0 * y - 1)[:200]
    span = 8.0
    _, axes = jnp.linalg.eigh(x.T @ x)
    projector = axes[:, -5:] @ axes[:, -5:].T

    def loss(w):
        return jnp.mean(jax.nn.softplus(-y * (x @ w))) + 0.01 * jnp.sum(w**2)

    start = -jnp.ones(10)
    lines = [
        "1a. Descent against its equation at t = 8: distance, and its ratio when eta is halved"
    ]
    lines += [f"{'eta':>8s}{'order 1':>12s}{'':>8s}{'order 2':>12s}{'':>8s}"]
    errors = []
    etas = (0.8, 0.4, 0.2, 0.1)
    for eta in etas:
        steps = round(span / eta)
        end = jax.lax.fori_loop(
            0, steps, lambda _, w, eta=eta: w - eta * projector @ jax.grad(loss)(w), start
        )
        make = partial(modified_equation, loss, eta, project=lambda g: projector @ g)
        errors.append(
            [
                jnp.linalg.norm(
                    end - simulate(jax.random.key(0), make(order=k), start, span, 2_000)
                )
                for k in (1, 2)
            ]
        )
        ratios = (
            [f"{a / b:8.2f}" for a, b in zip(*errors[-2:], strict=True)] if errors[1:] else [""] * 2
        )
        cells = "".join(f"{e:12.2e}{r:>8s}" for e, r in zip(errors[-1], ratios, strict=True))
        lines += [f"{eta:8.2f}{cells}"]
    found["orders"] = np.log2(np.array(errors)[-2] / np.array(errors)[-1])
    for order, values in enumerate(np.array(errors).T, 1):
        ax.loglog(etas, values, "o-", label=f"order {order}")
    ax.set(
        xlabel="step size", ylabel="distance at t = 8", title="descent and its modified equation"
    )
    ax.set_xticks(etas, [str(eta) for eta in etas])
    ax.minorticks_off()
    ax.legend(fontsize=8)

    # With noise that depends on where one is, f = 3 w^2 / 4: both have moments in closed form.
    lines += ["1b. Noisy descent of a quadratic against its equation at t = 1: E w^2, exactly"]
    lines += [f"{'eta':>8s}{'order 1':>12s}{'':>8s}{'order 2':>12s}{'':>8s}"]
    errors = []
    for eta in (0.1, 0.05, 0.025, 0.0125):
        true = 4.0
        for _ in range(round(1 / eta)):
            true = (1 - 1.5 * eta) ** 2 * true + eta**2 * (0.8 + 0.6 * true)
        errors.append([])
        for k in (1, 2):
            equation = modified_equation(
                lambda w: 0.75 * w**2,
                eta,
                noise_root=lambda w, z: (0.8 + 0.6 * w**2) ** 0.5 * z,
                order=k,
            )
            still, grown = (float(equation.diffusion(w, 1.0)) ** 2 for w in (0.0, 1.0))
            pace = 2 * float(equation.drift(1.0)) + grown - still  # dE/dt = pace E + still
            value = (4 + still / pace) * np.exp(pace) - still / pace
            errors[-1].append(abs(true - value))
        ratios = (
            [f"{a / b:8.2f}" for a, b in zip(*errors[-2:], strict=True)] if errors[1:] else [""] * 2
        )
        cells = "".join(f"{e:12.2e}{r:>8s}" for e, r in zip(errors[-1], ratios, strict=True))
        lines += [f"{eta:8.4f}{cells}"]
    found["orders, noisy"] = np.log2(np.array(errors)[-2] / np.array(errors)[-1])
    return lines


SCALES = (0.3, 1.0, 3.0)  # of the prior


def certificates(ax, found, title, load, fast):
    """A third of the rows for the prior, half for the bound, the others only to look."""
    raw, labels = load(return_X_y=True)
    num_seeds = 2 if fast else 5
    dims = (2, 10) if fast else (1, 2, 5, 10, 20, 40)
    first, last = len(raw) // 3, 5 * len(raw) // 6
    learnt, certified = certifier(first, last, (raw.shape[1] + 1, labels.max() + 1))
    table = {}
    for seed in tqdm(range(num_seeds), title, leave=False):
        rng = np.random.default_rng(seed)
        data = shuffled(rng, raw, labels, slice(0, first))
        center, at_zero, at_center = learnt(data)
        drawn = jnp.asarray(np.linalg.qr(rng.normal(size=(center.size, max(dims))))[0])
        for dim in dims:
            arms = {
                "drawn": (0 * center, drawn),
                "learnt": (0 * center, at_zero),
                "learnt, centered": (center, at_center),
            }
            for arm, (start, vectors) in arms.items():
                # The bound chooses among three scales, and pays for it.
                tried = [
                    certified(jax.random.key(seed), data, start, vectors[:, :dim], scale)
                    for scale in SCALES
                ]
                table.setdefault((arm, dim), []).append(min(tried, key=lambda r: r[0]))
    lines = [f"2. {title}: bounds in % at a confidence of 96.5 %, from {last - first} rows"]
    names = ("bound", "mean of draws", "KL [nats]", "held-out error")
    lines += [f"{'':18s}{'dim':>4s}" + "".join(f"{name:>16s}" for name in names)]
    for arm, dim in sorted(table):
        values = np.array(table[arm, dim]) * [100, 100, 1, 100]
        lines += [f"{arm:18s}{dim:4d}" + "".join(f"{shown(v, 1):>16s}" for v in values.T)]
    found[title] = {key: np.array(rows) for key, rows in table.items()}
    if ax is not None:
        draw_bounds(ax, title, table, arms, dims)
    return lines


def shuffled(rng, raw, labels, seen):
    """Return features, scaled and with a constant, and labels in another order."""
    order = rng.permutation(len(raw))
    x, y = raw[order], jnp.asarray(labels[order])
    spread = x[seen].std(0)  # the scaler is a part of the prior, and of its rows
    x = np.clip((x - x[seen].mean(0)) / np.where(spread > 0, spread, 1), -5, 5)
    return jnp.asarray(np.c_[x, np.ones(len(x))]), y


def certifier(first, last, shape):
    """Return what learns a prior from the first rows, and what certifies by those up to `last`."""
    seen, rows, held = slice(0, first), slice(first, last), slice(last, None)
    num_rows = last - first

    def loss(w, data, rows):
        logits = data[0][rows] @ w.reshape(shape)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, data[1][rows]))

    def wrong(w, data):
        return (jnp.argmax(data[0] @ w.reshape(shape), 1) != data[1]).astype(float)

    @jax.jit
    def learnt(data):
        """Return a center, and the Hessian's eigenvectors at zero and there."""
        zero = jnp.zeros(shape[0] * shape[1])
        center = minimise(lambda w: loss(w, data, seen) + 5e-3 * jnp.sum(w**2), zero)
        hessian = jax.hessian(partial(loss, data=data, rows=seen))
        return center, *[jnp.linalg.eigh(hessian(w))[1][:, ::-1] for w in (zero, center)]

    @jax.jit
    def certified(rng_key, data, center, vectors, scale):
        line = pac_bayes.prior(
            center, vectors, 1.0, rows=range(first), num_candidates=len(SCALES)
        )._replace(scale=scale)

        def objective(z):
            penalty = jnp.sum(z**2) / (2 * scale**2 * num_rows)
            return loss(pac_bayes.embed(line, z), data, rows) + penalty

        mean = minimise(objective, jnp.zeros(vectors.shape[1]))
        posterior = pac_bayes.laplace(partial(loss, data=data, rows=rows), line, mean, num_rows)
        result = pac_bayes.certificate(
            rng_key, wrong, line, posterior, data, range(first, last), num_draws=500
        )
        others = jax.tree.map(lambda leaf: leaf[held], data)
        error = jnp.mean(wrong(pac_bayes.embed(line, mean), others))
        return jnp.stack([result.bound, result.empirical, result.kl, error])

    return learnt, certified


def minimise(objective, z, num_steps=40):
    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(_, carry):
        z, state = carry
        value, grad = value_and_grad(z, state=state)
        updates, state = solver.update(grad, state, z, value=value, grad=grad, value_fn=objective)
        return optax.apply_updates(z, updates), state

    return jax.lax.fori_loop(0, num_steps, step, (z, solver.init(z)))[0]


def draw_bounds(ax, title, table, arms, dims):
    for arm in arms:
        values = np.array([[100 * r[0] for r in table[arm, dim]] for dim in dims])
        ax.errorbar(dims, values.mean(1), values.std(1, ddof=1), fmt="o-", label=arm)
    ax.set(xscale="log", xlabel="dimensions of the subspace", ylabel="bound on the error [%]")
    ax.set_xticks(dims, [str(dim) for dim in dims])
    ax.minorticks_off()
    ax.set_title(f"certificates, {title}")
    ax.legend()


if __name__ == "__main__":
    main()
