"""Meta-learning in the basis of the tasks' gradients: what it gains over one step size.

Muthuraman, 2025, arXiv:2505.23369, names spectral meta-learning as an extension of dynamic spectral
backpropagation; `probbp.optim.dsbp.meta` is our form of it. Here:

1. Linear regression with weights on three of twenty directions, where the oracle is known: ridge
   regression with the prior's true covariance.
2. Sea surface temperatures: the rest of a year from its first four months. Tasks are years.
3. Handwritten digits, one against another from five images each, of classes that no training task
   had: a network that learns its start, with one rate, one for each parameter, or one for each
   direction of the basis.

    python examples/papers/dsbp_meta.py [--fast]

Means and standard deviations over seeds.
"""

import time
from functools import partial
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _evidence import above, below, over_seeds
from _papers import DSBP
from _parts import run, shown
from _results import panels, parsed, parser, write
from sklearn.datasets import load_digits
from statsmodels.datasets import elnino
from tqdm import tqdm

from probbp.optim.dsbp import meta

jax.config.update("jax_enable_x64", True)


def main() -> None:
    arguments = parsed(parser(__doc__))
    start = time.perf_counter()
    figure, axes = panels(2)
    found = {}
    parts = {
        "linear tasks": partial(linear_tasks, axes[0], found),
        "sea temperatures": partial(sea_temperatures, found),
        "digits, few shots": partial(few_shots, axes[1], found),
    }
    run(parts, arguments.fast)
    print(f"\n{time.perf_counter() - start:.0f} seconds, JAX {jax.__version__}")

    right, linear, sea = found["digits"], found["linear"], found["sea"]
    curve = sea["mean curve (MAML, ridge)"]
    write(
        arguments,
        paper=DSBP,
        claim="Meta-learning in the basis of the tasks' gradients learns from fewer examples than "
        "MAML, which has one step size for all directions.",
        setting="Linear tasks of rank 3 in 20 dimensions, 5 seeds; sea temperatures of sixty "
        "years, the rest of a year from four months; digits, one against another from 2 x 5, "
        f"{len(right['one step size'])} seeds, which are the figure.",
        ours=over_seeds(
            "accuracy on new classes, rates in the basis", right["rates in the basis"], "%"
        ),
        baseline=over_seeds("ridge regression on pixels", right["ridge on pixels"], "%"),
        checks=[
            below(
                "linear tasks: better than one step size",
                over_seeds(
                    "log error of the weights, rates in the basis less one step size, paired",
                    linear["rates in the basis"] - linear["one step size"],
                ),
            ),
            below(
                "linear tasks: so is the mode with a learnt prior",
                over_seeds(
                    "log error of the weights, mode less one step size, paired",
                    linear["mode, learnt prior"] - linear["one step size"],
                ),
            ),
            below(
                "sea temperatures: better than the mean curve",
                over_seeds(
                    "squared error, mode in a basis of rank 3 less the mean curve, paired by year",
                    sea["mode, basis of rank 3"] - curve,
                    "K^2",
                ),
            ),
            below(
                "sea temperatures: better than to carry the last anomaly on",
                over_seeds(
                    "squared error, mode in a basis of rank 3 less the anomaly, paired by year",
                    sea["mode, basis of rank 3"] - sea["last anomaly carried on"],
                    "K^2",
                ),
            ),
            *(
                above(
                    f"digits: better than {name}",
                    over_seeds(
                        f"accuracy, rates in the basis less {name}, paired",
                        right["rates in the basis"] - right[name],
                        "points",
                    ),
                )
                for name in ("one step size", "a rate a parameter", "ridge on pixels")
            ),
        ],
        figure=figure,
        caption="Left: squared error of the weights of a linear task from ten examples. Right: "
        "accuracy on classes that no training task had. Mean and standard deviation over seeds.",
    )


def linear_tasks(ax, found, fast):
    """Weights on three of twenty directions, ten examples a task, noise 0.3."""
    dim, rank, shots, noise = 20, 3, 10, 0.3
    variances = jnp.array([2.0, 1.0, 0.5])
    counts = (10, 100) if fast else (10, 30, 100, 300, 1_000, 3_000)

    def nll(w, batch):
        return jnp.sum((batch[0] @ w - batch[1]) ** 2) / (2 * noise**2)

    def draw(key, true, num):
        keys = jax.random.split(key, 3)
        w = jax.random.normal(keys[0], (num, rank)) * variances**0.5 @ true.T
        x = jax.random.normal(keys[1], (num, 2 * shots, dim))
        y = jnp.einsum("tnd,td->tn", x, w)
        y = y + noise * jax.random.normal(keys[2], y.shape)
        return (x[:, :shots], y[:, :shots]), (x[:, shots:], y[:, shots:]), w

    def ridge(batch, covariance):
        x, y = batch
        return (
            covariance @ x.T @ jnp.linalg.solve(x @ covariance @ x.T + noise**2 * jnp.eye(shots), y)
        )

    @partial(jax.jit, static_argnums=1)
    def errors(key, num):
        key_true, key_train, key_new = jax.random.split(key, 3)
        true = jnp.linalg.qr(jax.random.normal(key_true, (dim, rank)))[0]
        support, query, _ = draw(key_train, true, num)
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), support, query)
        grads = jax.vmap(jax.grad(squares), (None, 0))(jnp.zeros(dim), both)
        basis = meta.task_basis(grads, rank)
        # E g g^T = (1 + 1/n) Sigma + c I, with n = 2 shots here.
        along = jnp.maximum(basis.values - basis.rest, 1e-4) * 2 * shots / (2 * shots + 1)
        prior = meta.Rates(along, jnp.array(1e-6))
        arms = {
            "one step size": learnt(jnp.zeros((1, dim)), support, query),
            "rates in the basis": learnt(basis.vectors, support, query),
            "mode, learnt prior": lambda batch: meta.posterior_mode(
                nll, jnp.zeros(dim), batch, basis.vectors, prior
            ),
            "ridge": lambda batch: ridge(batch, jnp.sum(variances) / dim * jnp.eye(dim)),
            "oracle ridge": lambda batch: ridge(batch, true * variances @ true.T),
        }
        batch, _, w = draw(key_new, true, 200)
        result = {k: jnp.mean(jnp.sum((jax.vmap(f)(batch) - w) ** 2, 1)) for k, f in arms.items()}
        return result | {
            "angle": jnp.linalg.norm(true - basis.vectors.T @ (basis.vectors @ true), 2)
        }

    keys = jax.random.split(jax.random.key(0), 5)
    lines = ["1. Linear tasks: squared error of the weights from ten examples, by training tasks"]
    table = {num: [errors(key, num) for key in keys] for num in counts}
    lines += [f"{'':22s}" + "".join(f"{num:>18d}" for num in counts)]
    for name in table[counts[0]][0]:
        values = [[run[name] for run in table[num]] for num in counts]
        lines += [f"{name:22s}" + "".join(f"{shown(v):>18s}" for v in values)]
        if name != "angle":
            ax.errorbar(counts, np.mean(values, 1), np.std(values, 1, ddof=1), label=name)
    found["linear"] = {
        name: np.log([run[name] for run in table[counts[-1]]]) for name in table[counts[0]][0]
    }
    ax.set(xscale="log", yscale="log", xlabel="training tasks", ylabel="error of the weights")
    ax.set_title("few-shot linear regression")
    ax.legend(fontsize=8)
    return lines


def squares(w, batch):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2) / 2


def learnt(vectors, support, query, steps=300):
    """Learn start and log rates by Adam on the outer loss, with three inner steps."""
    inner = partial(meta.adapt, num_steps=3)

    def outer(params):
        rates = jax.tree.map(jnp.exp, params[1])
        return meta.outer_loss(squares, params[0], rates, vectors, support, query, inner)

    optimiser = optax.adam(0.03)

    def step(_, carry):
        params, state = carry
        updates, state = optimiser.update(jax.grad(outer)(params), state)
        return optax.apply_updates(params, updates), state

    rates = meta.Rates(jnp.full(len(vectors), -2.0), jnp.array(-2.0))
    params = jnp.zeros(vectors.shape[1]), rates
    params, _ = jax.lax.fori_loop(0, steps, step, (params, optimiser.init(params)))
    start, rates = params[0], jax.tree.map(jnp.exp, params[1])
    return lambda batch: meta.adapt(squares, start, batch, vectors, rates, num_steps=3)


def sea_temperatures(found, fast):
    """Fold by fold: the months from May, given those to April, squared error in K^2."""
    months = jnp.asarray(elnino.load_pandas().data.to_numpy()[:60, 1:])
    seen, noise = jnp.eye(12)[:4], 0.3

    def nll(w, batch):
        return jnp.sum((batch[0] @ w - batch[1]) ** 2) / (2 * noise**2)

    errors = {}
    for fold in range(5):
        turned = jnp.roll(months, -12 * fold, axis=0)
        train, answers = turned[12:] - turned[12:].mean(0), turned[:12] - turned[12:].mean(0)
        curves = {"mean curve (MAML, ridge)": 0 * answers}
        curves["last anomaly carried on"] = jnp.tile(answers[:, 3:4], 12)
        for rank in (1, 3, 5):
            basis = meta.task_basis(train, rank)
            rates = meta.Rates(basis.values, basis.rest)
            solve = partial(
                meta.posterior_mode, nll, jnp.zeros(12), vectors=basis.vectors, rates=rates
            )
            fitted = jax.vmap(lambda y, solve=solve: solve(batch=(seen, y)))(answers[:, :4])
            curves[f"mode, basis of rank {rank}"] = fitted
        for name, curve in curves.items():
            errors.setdefault(name, []).extend(jnp.mean((curve - answers)[:, 4:] ** 2, 1))
    first = np.array(errors["mean curve (MAML, ridge)"])
    found["sea"] = {name: np.array(values, float) for name, values in errors.items()}
    lines = ["2. Sea temperatures, sixty years, each left out once: mean squared error [K^2]"]
    lines += [f"{'':26s}{'mean ± sd over years':>24s}{'gain ± its standard error':>28s}"]
    for name, values in errors.items():
        gain = first - np.array(values)
        error = f"{gain.mean():.2f} ± {gain.std(ddof=1) / len(gain) ** 0.5:.2f}"
        lines += [f"{name:26s}{shown(values, 2):>24s}{error:>28s}"]
    return lines


def few_shots(ax, found, fast):
    """One digit against another; a network 64-32-1, three inner steps, five images a class."""
    num_steps, num_tasks, rank = (20, 4, 4) if fast else (400, 8, 8)
    episodes = of_digits()
    run = learner(episodes, num_steps, num_tasks, rank)
    ridge = on_pixels(episodes)
    arms = ("one step size", "a rate a parameter", "rates in the basis")
    accuracies = {arm: [] for arm in (*arms, "ridge on pixels")}
    for seed in tqdm(range(2 if fast else 6), "digits, few shots", leave=False):
        classes = np.random.default_rng(seed).permutation(10)
        pairs = jnp.array([p for p in combinations(classes[:7], 2)])
        pairs = jnp.concatenate([pairs, pairs[:, ::-1]])
        new_pairs = jnp.array([p for p in combinations(classes[7:], 2)])
        key = jax.random.key(seed)
        for arm in arms:
            tried = [run(arm, key, jnp.float32(lr), pairs, new_pairs) for lr in (1e-3, 3e-3, 1e-2)]
            accuracies[arm].append(min(tried)[1])  # of the lowest loss on the training classes
        accuracies["ridge on pixels"].append(ridge(key, pairs, new_pairs))
    lines = [
        "3. Digits, one against another from 2 x 5 images, three classes that are new: accuracy %"
    ]
    lines += [f"{name:22s}{shown(100 * np.array(v), 2):>18s}" for name, v in accuracies.items()]
    found["digits"] = {name: 100 * np.array(v, float) for name, v in accuracies.items()}
    first = np.array(accuracies["one step size"], float)
    gain = 100 * (np.array(accuracies["rates in the basis"], float) - first)
    error = gain.std(ddof=1) / len(gain) ** 0.5
    lines += [f"basis against one step size, paired: {gain.mean():+.2f} ± {error:.2f} (its error)"]
    values = 100 * np.array(list(accuracies.values()))
    ax.errorbar(values.mean(1), range(len(values)), xerr=values.std(1, ddof=1), fmt="o")
    ax.set_yticks(range(len(values)), accuracies, fontsize=8)
    ax.set(xlabel="accuracy on new classes [%]", title="digits, five images a class")
    return lines


def of_digits():
    """Return a function that draws tasks: one digit against another."""
    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray(images / 16 - 0.3, jnp.float32)
    by_class = jnp.stack([jnp.asarray(np.flatnonzero(labels == c)[:174]) for c in range(10)])

    def episode(key, pair):
        """Return five images of each class to adapt to, and fifteen to be judged by."""
        keys = jax.random.split(key)
        rows = jnp.stack(
            [
                jax.random.choice(k, by_class[c], (20,), replace=False)
                for k, c in zip(keys, pair, strict=True)
            ]
        )
        y = jnp.tile(jnp.array([[0.0], [1.0]], jnp.float32), 20)
        parts = slice(0, 5), slice(5, 20)
        return [(images[rows[:, p]].reshape(-1, 64), y[:, p].ravel()) for p in parts]

    def episodes(key, pairs, num):
        key_pair, key_rows = jax.random.split(key)
        chosen = pairs[jax.random.randint(key_pair, (num,), 0, len(pairs))]
        return jax.vmap(episode)(jax.random.split(key_rows, num), chosen)

    return episodes


def network(params, x):
    return (jnp.tanh(x @ params["w"] + params["b"]) @ params["v"])[:, 0] + params["c"]


def loss(params, batch):
    return jnp.mean(optax.sigmoid_binary_cross_entropy(network(params, batch[0]), batch[1]))


def scaled(arm, rates, vectors):
    """Return what takes the place of `adapt` where every parameter has its own rate."""
    if arm != "a rate a parameter":
        return partial(meta.adapt, num_steps=3, vectors=vectors, rates=jax.tree.map(jnp.exp, rates))

    def adapt(loss, params, batch):
        for _ in range(3):
            grad = jax.grad(loss)(params, batch)
            params = jax.tree.map(lambda w, r, g: w - jnp.exp(r) * g, params, rates, grad)
        return params

    return adapt


def outer(params, arm, vectors, tasks):
    adapt_fn = scaled(arm, params[1], vectors)
    return jnp.mean(jax.vmap(lambda s, q: loss(adapt_fn(loss, params[0], s), q))(*tasks))


def learner(episodes, num_steps, num_tasks, rank):
    """Return a function that learns start and rates, and is judged on tasks of new classes."""

    @partial(jax.jit, static_argnums=0)
    def run(arm, key, learning_rate, pairs, new_pairs):
        key_start, key_train, key_basis, key_test = jax.random.split(key, 4)
        keys = jax.random.split(key_start)
        start = {
            "w": jax.random.normal(keys[0], (64, 32), jnp.float32) / 8,
            "b": jnp.zeros(32, jnp.float32),
            "v": jax.random.normal(keys[1], (32, 1), jnp.float32) / 6,
            "c": jnp.zeros((), jnp.float32),
        }
        size = rank if arm == "rates in the basis" else 1
        vectors = jax.tree.map(lambda w: jnp.zeros((size, *w.shape), w.dtype), start)
        rates = meta.Rates(jnp.full(size, -1.0, jnp.float32), jnp.array(-1.0, jnp.float32))
        if arm == "a rate a parameter":
            rates = jax.tree.map(lambda w: jnp.full_like(w, -1.0), start)
        optimiser = optax.adam(learning_rate)

        def step(carry, inputs):
            params, state, vectors = carry
            key, index = inputs
            if arm == "rates in the basis":

                def refreshed():
                    tasks = episodes(jax.random.fold_in(key_basis, index), pairs, 32)[0]
                    grads = jax.vmap(jax.grad(loss), (None, 0))(params[0], tasks)
                    return meta.task_basis(grads, rank).vectors

                vectors = jax.lax.cond(index % 50 == 0, refreshed, lambda: vectors)
            tasks = episodes(key, pairs, num_tasks)
            value, grads = jax.value_and_grad(outer)(params, arm, vectors, tasks)
            updates, state = optimiser.update(grads, state)
            return (optax.apply_updates(params, updates), state, vectors), value

        params = start, rates
        inputs = jax.random.split(key_train, num_steps), jnp.arange(num_steps)
        carry, losses = jax.lax.scan(step, (params, optimiser.init(params), vectors), inputs)
        adapt_fn = scaled(arm, carry[0][1], carry[2])
        tasks = episodes(key_test, new_pairs, 200)

        def accuracy(support, query):
            adapted = adapt_fn(loss, carry[0][0], support)
            return jnp.mean((network(adapted, query[0]) > 0) == query[1])

        return jnp.mean(losses[-num_steps // 5 :]), jnp.mean(jax.vmap(accuracy)(*tasks))

    return run


def on_pixels(episodes):
    """Return logistic regression on pixels, its prior's variance chosen on the training tasks."""

    @jax.jit
    def ridge(key, pairs, new_pairs):
        def accuracy(variance, support, query):
            nothing = meta.Rates(jnp.zeros(1), variance)
            nll = lambda w, b: jnp.sum(optax.sigmoid_binary_cross_entropy(b[0] @ w, b[1]))
            w = meta.posterior_mode(
                nll, jnp.zeros(64), support, jnp.zeros((1, 64)), nothing, num_steps=8
            )
            return jnp.mean((query[0] @ w > 0) == query[1])

        key_train, key_test = jax.random.split(key)
        train, test = episodes(key_train, pairs, 100), episodes(key_test, new_pairs, 200)
        of = lambda tasks: jax.lax.map(
            lambda v: jnp.mean(jax.vmap(partial(accuracy, v))(*tasks)), jnp.logspace(-3, 1, 9)
        )
        return of(test)[jnp.argmax(of(train))]

    return ridge


if __name__ == "__main__":
    main()
