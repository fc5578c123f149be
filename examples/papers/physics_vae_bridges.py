"""Damage of bridges from responses, inside and outside of what was seen.

Koune & Cicirello, 2025, arXiv:2506.13658, say that a data-driven model generalises poorly where
data are few, and that the known physics helps. Here their population of bridges, simulated from
equations (the finite elements are ours, not their surrogates): two damages are read off strains,
by autoencoders and by regressions that see the domain too.

    python examples/papers/physics_vae_bridges.py [--fast]

The square of the two supports' stiffness has four quarters. Interpolation: three to train on, one
to test; extrapolation: one to train on, three to test. Autoencoders: plain (a partitioned encoder,
a strength of -1), the paper's (joint, 1/1024), and with the gradient cut (joint, 0). Figures are R2
and mean squared error on what was not seen, averaged over both damages, mean and standard deviation
over folds and seeds; in checks over folds, by seed.
"""

import time
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from _evidence import above, over_seeds
from _papers import PHYSICS_VAE
from _results import panels, parsed, parser, write
from _structures import Study, build, fit
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, WhiteKernel
from sklearn.linear_model import LinearRegression
from sklearn.multioutput import MultiOutputRegressor
from sklearn.neural_network import MLPRegressor
from tqdm import tqdm

from probbp.models import physics

NUM_FOLDS = 4
SPLITS = ("interpolation", "extrapolation")
PLAIN, PAPER, LINEAR = "plain", "the paper's", "linear"
REGRESSIONS = (LINEAR, "Gaussian process", "multilayer perceptron")


def main():
    arguments = parsed(parser(__doc__))
    fast = arguments.fast
    num_records, num_seeds, num_steps = (256, 2, 20) if fast else (1024, 4, 2200)
    start = time.perf_counter()
    with tqdm(total=4) as bar:
        scores = bridges(num_records, num_seeds, num_steps, bar)
    print_bridges(scores)
    print(f"\n{time.perf_counter() - start:.0f} seconds, JAX {jax.__version__}")

    def r2(split, method):
        """Return R2 by seed; regressions without a seed have the same for all."""
        values = np.array(scores[split, method])[:, 0].reshape(NUM_FOLDS, -1).mean(0)
        return np.broadcast_to(values, num_seeds)

    lowest = min(value for values in scores.values() for value, _ in values)
    figure, axes = panels(2)
    for ax, split in zip(axes, SPLITS, strict=True):
        methods = [method for name, method in scores if name == split]
        for i, method in enumerate(methods):
            values = np.array(scores[split, method])[:, 0]
            ax.plot(values, np.full(len(values), i), ".", color="C0", alpha=0.5)
            ax.plot(values.mean(), i, "|", color="C1", markersize=16)
        ax.axvline(0.0, color="grey", linestyle=":")
        ax.set_yticks(range(len(methods)), methods, fontsize=7)
        ax.set(xlabel="R2 of damage", title=split)
        ax.set_xscale("symlog")
        ax.set_xlim(1.2 * min(lowest, -1.0), 1.2)  # the same for both
        ax.invert_yaxis()
    write(
        arguments,
        paper=PHYSICS_VAE,
        claim="Kept to what the physics leaves over, an autoencoder generalises to structures "
        "unlike those it has seen better than a plain one and than regressions do.",
        setting=f"Bridges, {num_records} simulated records, four quarters of the supports' "
        f"stiffness left out, or all others, {num_steps} steps, {num_seeds} seeds. The figure: "
        "interpolation.",
        ours=over_seeds("R2 of damage, the paper's", r2(SPLITS[0], PAPER)),
        baseline=over_seeds("linear regression", r2(SPLITS[0], LINEAR)),
        checks=[
            above(
                f"damage is read off better than by {method}, {split}",
                over_seeds(
                    f"R2 less that of {method}, by seed", r2(split, PAPER) - r2(split, method)
                ),
            )
            for split in SPLITS
            for method in (PLAIN, *REGRESSIONS)
        ],
        figure=figure,
        caption="R2 of damage on structures that were not seen, a dot for each fold and seed and a "
        "line at their mean; beyond 1 in absolute value the axis is logarithmic.",
    )


def bridges(num_records, num_seeds, num_steps, bar):
    """Return (split, method) to (R2, MSE), each (folds, seeds), averaged over both damages."""
    case = physics.bridges()
    study = Study(case, 1 / 1024, 4, 0.0)
    records = physics.simulate(jax.random.key(0), case, num_records)
    upper = [np.asarray(records.factors[name]) > 8.0 for name in ("log_k1", "log_k2")]
    quadrant = 2 * upper[0].astype(int) + upper[1]
    x, c, y = (np.asarray(a) for a in (records.x, records.c, records.y))
    inputs = np.concatenate([(x - x.mean(0)) / x.std(), (c - c.mean(0)) / c.std(0)], -1)
    splits = dict(zip(SPLITS, (lambda q: quadrant != q, lambda q: quadrant == q), strict=True))
    folds = [(split, q) for split in SPLITS for q in range(NUM_FOLDS)]
    scores = {}

    def score(split, method, predicted, rows):
        errors = np.mean((predicted - y[rows]) ** 2, 0)
        r2 = np.mean(1 - errors / y[rows].var(0))
        scores.setdefault((split, method), []).append((r2, np.mean(errors)))

    bar.set_description("regressions")
    for split, q in folds:
        train = splits[split](q)
        for method, regressor in regressors(num_seeds).items():
            for model in regressor:
                model.fit(inputs[train], y[train])
                score(split, method, model.predict(inputs[~train]), ~train)

    # Splits differ in size; rows are drawn from an index of one length for all.
    masks = np.stack([splits[split](q) for split, q in folds])
    random = np.random.default_rng(0)
    rows = jnp.asarray(np.stack([random.choice(np.flatnonzero(m), num_records) for m in masks]))
    keys = jax.random.split(jax.random.key(2), num_seeds)
    methods = {
        PLAIN: ("partitioned", -1.0),
        PAPER: ("joint", study.strength),
        "gradient cut": ("joint", 0.0),
    }

    @cache
    def fitted(guide):
        run = partial(fit, study, records, num_steps=num_steps, guide=guide)
        each_seed = jax.vmap(lambda r, k, s: run(k, s, 1.0, rows=r), (None, 0, None))
        return jax.jit(jax.vmap(each_seed, (0, None, None)))

    for method, (guide, strength) in methods.items():
        bar.update()
        bar.set_description(method)
        params = fitted(guide)(rows, keys, strength)
        vae = build(study, records, keys[0], guide=guide)

        @jax.jit
        def predicted(params, vae=vae):
            mean, _ = vae.encode(params, records.x)
            z_y = mean[:, vae.latents["z_y"].coordinates]
            return vae.predict_label(params, "y", z_y).mean

        for i, (split, _) in enumerate(folds):
            for s in range(num_seeds):
                one = jax.tree.map(lambda leaf, i=i, s=s: leaf[i, s], params)
                score(split, method, np.asarray(predicted(one))[~masks[i]], ~masks[i])
    bar.update()
    return scores


def regressors(num_seeds):
    """Return method to models; those that draw nothing are fitted once."""
    kernel = RBF(5.0, (0.1, 1e3)) + WhiteKernel(1e-2, (1e-6, 1.0))
    return {
        LINEAR: [LinearRegression()],
        "Gaussian process": [
            MultiOutputRegressor(GaussianProcessRegressor(kernel, normalize_y=True))
        ],
        "multilayer perceptron": [
            MLPRegressor(hidden_layer_sizes=(64, 64), max_iter=300, random_state=seed)
            for seed in range(num_seeds)
        ],
    }


def print_bridges(scores):
    print("\n=== bridges: damage, four folds of the supports' stiffness, mean (sd)")
    print(f"{'':52s}{'R2':>18s}{'MSE':>20s}")
    for (split, method), values in scores.items():
        r2, mse = np.array(values).T
        print(
            f"{split:15s}{method:37s}{r2.mean():10.3f} ({r2.std(ddof=1):.3f})"
            f"{mse.mean():12.4f} ({mse.std(ddof=1):.4f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
