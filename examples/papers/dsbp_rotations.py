"""Rotations as steps: orthogonal weights, eigenbases that do not jump, and exact moves on frames.

Muthuraman, 2025, arXiv:2505.23369, names Lie-algebra dynamics as an extension of dynamic spectral
backpropagation; `probbp.optim.dsbp.rotations` and `geodesics` are our form of it. Here:

1. A recurrent network that reads digits pixel by pixel: its recurrent weights unconstrained, kept
   orthogonal by QR after each step, and rotated on the Lie algebra. And what rounding does.
2. The eigenbasis of a covariance that drifts, of the economy: `eigh` and one step a quarter.
3. The principal plane of the irises, sampled: two moves on frames, and NUTS for comparison.

    python examples/papers/dsbp_rotations.py [--fast]

Means and standard deviations over seeds.
"""

import time
from functools import partial

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from _evidence import above, exact, over_seeds
from _papers import DSBP
from _parts import run, shown
from _results import panels, parsed, parser, write
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS
from sklearn.datasets import load_digits, load_iris
from statsmodels.datasets import macrodata
from tqdm import tqdm

from probbp.optim.dsbp.geodesics import geodesic_hmc, random_rotation
from probbp.optim.dsbp.rotations import jacobi_step, on_lie_algebra

jax.config.update("jax_enable_x64", True)


def main() -> None:
    arguments = parsed(parser(__doc__))
    start = time.perf_counter()
    figure, axes = panels(2)
    found = {}
    parts = {
        "recurrent network": partial(recurrent, axes[0], found),
        "eigenbases": partial(eigenbases, axes[1], found),
        "principal plane": partial(principal_plane, found),
    }
    run(parts, arguments.fast)
    print(f"\n{time.perf_counter() - start:.0f} seconds, JAX {jax.__version__}")

    hmc, nuts = "geodesic HMC", "NUTS, polar factor"
    lie, columns = found["on the Lie algebra"], found["columns"]
    write(
        arguments,
        paper=DSBP,
        claim="Steps on the Lie algebra of rotations keep what is orthogonal orthogonal, and "
        "train, track and sample better for it.",
        setting=f"Digits read pixel by pixel by 32 recurrent units, {len(lie)} seeds, which are "
        "the figure; the eigenbasis of quarterly series of the US economy; the principal plane of "
        f"thirty irises, {len(found[hmc])} chains.",
        ours=over_seeds("test accuracy, on the Lie algebra", lie, "%"),
        baseline=over_seeds("unconstrained, as many steps", found["unconstrained"], "%"),
        checks=[
            *(
                above(
                    f"a recurrent network reads better than with weights {words}",
                    over_seeds(
                        "accuracy, on the Lie algebra less that, paired", lie - found[arm], "points"
                    ),
                )
                for arm, words in (
                    ("QR after each step", "kept orthogonal by QR"),
                    ("unconstrained", "unconstrained"),
                )
            ),
            above(
                "an eigenbasis follows a drift without a jump, which that of eigh doesn't",
                exact(
                    "smallest cosine of a column with the one before, one Jacobi step less eigh",
                    columns["jacobi_step"].min() - columns["eigh"].min(),
                ),
            ),
            above(
                "geodesic moves on frames make more effective draws than NUTS on a polar factor",
                over_seeds(
                    "log of effective draws a gradient, geodesic HMC less NUTS, chains",
                    np.log(found[hmc]) - np.log(found[nuts]),
                ),
            ),
        ],
        figure=figure,
        caption="Left: training loss of the recurrent network, mean over seeds. Right: by quarter, "
        "how far the least stable eigenvector has turned.",
    )


def recurrent(ax, found, fast):
    """Read the 64 pixels of a digit one by one, with 32 tanh units."""
    num_steps, seeds = (20, 2) if fast else (600, 5)
    run = reader(num_steps)
    lines = ["1. Digits read pixel by pixel: the recurrent weights' optimiser, Adam inside all"]
    lines += [f"{'':22s}{'test accuracy %':>18s}{'|singular - 1|':>16s}{'ms a step':>12s}"]
    for arm in tqdm(ARMS, "recurrent network", leave=False):
        rates, results, seconds = (1e-3, 3e-3, 1e-2), [], []
        jax.block_until_ready(run(arm, 0, 1e-3))
        for seed in range(seeds):
            begin = time.perf_counter()
            tried = [jax.block_until_ready(run(arm, seed, lr)) for lr in rates]
            seconds.append((time.perf_counter() - begin) / len(rates) / num_steps)
            results.append(max(tried, key=lambda r: r[0]))
        accuracy = 100 * np.array([r[1] for r in results])
        found[arm] = accuracy
        off = max(float(r[2]) for r in results)
        lines += [f"{arm:22s}{shown(accuracy, 1):>18s}{off:16.1e}{1e3 * np.median(seconds):12.2f}"]
        smooth = np.mean([r[3] for r in results], 0).reshape(-1, 10).mean(1)
        ax.plot(10 * np.arange(len(smooth)), smooth, label=arm)
    ax.set(
        yscale="log",
        xlabel="step",
        ylabel="training loss",
        title="recurrent network, digits by pixel",
    )
    ax.legend(fontsize=8)
    return lines + rounding()


def reader(num_steps):
    """Return a function that trains the recurrent weights by an arm, and scores them."""
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
    names = {"recurrent": "rotate", "in": "add", "out": "add", "bias": "add"}

    def logits(params, x):
        def unit(h, pixel):
            return jnp.tanh(h @ params["recurrent"].T + pixel[:, None] * params["in"]), None

        start = jnp.zeros((len(x), 32), x.dtype)
        h, _ = jax.lax.scan(unit, start, x.T)
        return h @ params["out"] + params["bias"]

    def loss(params, rows):
        return jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(
                logits(params, images[rows]), labels[rows]
            )
        )

    @partial(jax.jit, static_argnums=0)
    def run(arm, seed, learning_rate):
        key_order, key_start, key_train = jax.random.split(jax.random.key(seed), 3)
        order = jax.random.permutation(key_order, len(images))
        train, val, test = order[:900], order[900:1200], order[1200:]
        keys = jax.random.split(key_start, 3)
        params = {
            "recurrent": jax.nn.initializers.orthogonal()(keys[0], (32, 32), jnp.float32),
            "in": jax.random.normal(keys[1], (32,), jnp.float32) / 4,
            "out": jax.random.normal(keys[2], (32, 10), jnp.float32) / 6,
            "bias": jnp.zeros(10, jnp.float32),
        }
        rules = {"rotate": ARMS[arm](learning_rate), "add": optax.adam(3e-3)}
        optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.partition(rules, names))

        def step(carry, key):
            params, state = carry
            rows = jax.random.choice(key, train, (100,))
            value, grads = jax.value_and_grad(loss)(params, rows)
            updates, state = optimiser.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        carry = params, optimiser.init(params)
        (params, _), losses = jax.lax.scan(step, carry, jax.random.split(key_train, num_steps))
        accuracy = [
            jnp.mean(jnp.argmax(logits(params, images[r]), 1) == labels[r]) for r in (val, test)
        ]
        singular = jnp.linalg.svd(params["recurrent"], compute_uv=False)
        return *accuracy, jnp.max(jnp.abs(singular - 1)), losses

    return run


def by_qr(learning_rate):
    """Adam in the entries, then back to the nearest factor Q, as is often done."""
    adam = optax.adam(learning_rate)

    def update(grads, state, params):
        updates, state = adam.update(grads, state)

        def moved(w, u):
            q, r = jnp.linalg.qr(w + u)
            return q * jnp.sign(jnp.diagonal(r)) - w

        return jax.tree.map(moved, params, updates), state

    return optax.GradientTransformation(adam.init, update)


ARMS = {
    "unconstrained": optax.adam,
    "QR after each step": by_qr,
    "on the Lie algebra": lambda lr: on_lie_algebra(optax.adam(lr)),
}


def rounding():
    """Rotate ten thousand times in single precision."""
    lines = []
    optimiser = on_lie_algebra(optax.adam(1e-2))

    def wander(carry, key):
        w, state = carry
        updates, state = optimiser.update(jax.random.normal(key, w.shape, w.dtype), state, w)
        return (w + updates, state), None

    for steps in (100, 10_000):
        w = jnp.eye(32, dtype=jnp.float32)
        keys = jax.random.split(jax.random.key(0), steps)
        (w, _), _ = jax.jit(partial(jax.lax.scan, wander))((w, optimiser.init(w)), keys)
        singular = jnp.linalg.svd(w.astype(float), compute_uv=False)
        off = float(jnp.max(jnp.abs(singular - 1)))
        lines += [f"singular values after {steps} steps in single precision: off by {off:.1e}"]
    return lines


def eigenbases(ax, found, fast):
    """Follow the covariance of quarterly series of the US economy, with a memory of a decade."""
    table = macrodata.load_pandas().data.drop(columns=["year", "quarter"])
    x = np.diff(table.to_numpy(), axis=0)
    x = (x - x.mean(0)) / x.std(0)
    matrix = x[:40].T @ x[:40] / 40
    by_eigh = np.linalg.eigh(matrix)[1]
    by_step, records = jnp.asarray(by_eigh), []
    step = jax.jit(jacobi_step)
    for row in x[40:]:
        matrix = 0.975 * matrix + 0.025 * np.outer(row, row)
        new = np.linalg.eigh(matrix)[1]
        turned = step(by_step, matrix)
        rotated = np.asarray(turned.T @ matrix @ turned)
        off = np.linalg.norm(rotated - np.diag(np.diag(rotated))) / np.linalg.norm(matrix)
        new = new * np.where(np.sum(new * by_eigh, 0) < 0, -1, 1)  # the sign is easily mended
        records.append(
            [np.sum(new * by_eigh, 0).min(), np.sum(np.asarray(turned * by_step), 0).min(), off]
        )
        by_eigh, by_step = new, turned
    ours, theirs = np.array(records)[:, 1], np.array(records)[:, 0]
    found["columns"] = {"jacobi_step": ours, "eigh": theirs}
    off = np.array(records)[:, 2]
    for values, name in ((theirs, "eigh, signs mended"), (ours, "jacobi_step")):
        ax.plot(values, label=name)
    ax.set(xlabel="quarter", ylabel="smallest cosine of a column with the one before")
    ax.set_title("eigenbasis of a drifting covariance")
    ax.legend(fontsize=8)
    lines = [f"2. Eigenbasis of a drifting covariance, {len(ours)} quarters: a column's cosine"]
    lines += [f"{'with the one before':22s}{'smallest':>10s}{'below 0.7 in':>14s}"]
    for name, values in (("eigh, signs mended", theirs), ("one jacobi_step", ours)):
        lines += [f"{name:22s}{values.min():10.3f}{np.sum(values < 0.7):14d}"]
    return [
        *lines,
        f"jacobi_step leaves off the diagonal {np.median(off):.1e} of the matrix, {off.max():.1e} "
        "at most (median and maximum of the norms' ratio)",
    ]


def principal_plane(found, fast):
    """Sample the two leading directions of thirty irises, of known variances; chains agree."""
    x = load_iris().data[::5]
    x = x - x.mean(0)
    values = np.linalg.eigvalsh(x.T @ x / len(x))[::-1]
    noise = values[2:].mean()
    weights = jnp.asarray(1 / noise - 1 / values[:2])
    moment = jnp.asarray(x.T @ x) / 2
    first = jnp.asarray(np.linalg.eigh(x.T @ x)[1][:, ::-1][:, :2])
    num, chains = (200, 4) if fast else (4_000, 4)

    def logdensity(frame):
        return jnp.trace(moment @ (frame * weights) @ frame.T)

    def seen(frame):
        """Squared cosines with the sample's directions: blind to the signs."""
        return jnp.array([(frame[:, 0] @ first[:, 0]) ** 2, (frame[:, 1] @ first[:, 1]) ** 2])

    def of(algorithm, key):
        def chain(key):
            keys = jax.random.split(key, num)
            state = algorithm.init(first)

            def body(state, key):
                state, info = algorithm.step(key, state)
                return state, (seen(state.position), info.acceptance_rate)

            return jax.lax.scan(body, state, keys)[1]

        return jax.jit(jax.vmap(chain))(jax.random.split(key, chains))

    arms = {
        "random rotation": (blackjax.rmh(logdensity, random_rotation(0.03)), 1),
        "geodesic HMC": (blackjax.SamplingAlgorithm(*geodesic_hmc(logdensity, 0.02, 8)), 8),
    }
    lines = [
        "3. Principal plane of thirty irises: two squared cosines with the sample's, four chains"
    ]
    lines += [
        f"{'':22s}{'mean':>8s}{'sd':>8s}{'mean':>8s}{'sd':>8s}{'ESS per 1000 gradients':>26s}"
    ]

    def row(name, draws, per_draw):
        ess = min(effective_sample_size(np.asarray(draws[..., i])) for i in range(2))
        found[name] = np.array(
            [
                1e3 * min(effective_sample_size(np.asarray(each[None, :, i])) for i in range(2))
                for each in draws
            ]
        ) / (num * per_draw)
        flat = np.asarray(draws).reshape(-1, 2)
        cells = "".join(f"{m:8.4f}{s:8.4f}" for m, s in zip(flat.mean(0), flat.std(0), strict=True))
        return f"{name:22s}{cells}{1e3 * ess / (num * chains * per_draw):26.1f}"

    for name, (algorithm, gradients) in arms.items():
        draws, rates = of(algorithm, jax.random.key(0))
        lines += [row(name, draws, gradients) + f"   acceptance {rates.mean():.2f}"]

    def model():
        """The polar factor of a Gaussian matrix is uniform on frames (Jauch et al., 2021)."""
        z = numpyro.sample("z", dist.Normal().expand([4, 2]).to_event(2))
        values, vectors = jnp.linalg.eigh(z.T @ z)
        frame = z @ (vectors * values**-0.5) @ vectors.T
        numpyro.factor("density", logdensity(frame))
        numpyro.deterministic("seen", seen(frame))

    mcmc = MCMC(
        NUTS(model),
        num_warmup=num // 4,
        num_samples=num,
        num_chains=chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(
        jax.random.key(1),
        init_params={"z": jnp.tile(first, (chains, 1, 1))},
        extra_fields=("num_steps",),
    )
    per_draw = float(mcmc.get_extra_fields()["num_steps"].mean())
    draws = mcmc.get_samples(group_by_chain=True)["seen"]
    return [*lines, row("NUTS, polar factor", draws, per_draw)]


if __name__ == "__main__":
    main()
