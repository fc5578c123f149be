"""Whether the physical parameters' posteriors are to be believed, by the encoder and refined.

Koune & Cicirello, 2025, arXiv:2506.13658, read the physical latents of an autoencoder as posteriors
of physical parameters. Here for the beam whose confounder is known (`physics_vae.py`), one fit each
of the plain autoencoder and of two settings of `physics_vae_labels.py`:

- coverage of 90 % intervals of records whose parameters are known, by the encoder, and by MALA from
  there (`physics_vae.refinement`) on the model that was learnt;
- ranks of parameters drawn from the learnt model among draws of its posterior (SBC, its p-value):
  they are uniform where the inference is right, whatever the model;
- the share of records with a Pareto k over 0.7, which says from the records alone that the encoder
  is off.

    python examples/papers/physics_vae_posteriors.py [--fast]

Intervals are over records.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from _evidence import above, exact, over_seeds
from _papers import PHYSICS_VAE
from _results import panels, parsed, parser, write
from _structures import NUM_TRAIN, STUDIES, compare
from tqdm import tqdm

import probbp
from probbp.diagnostics.sbc import numpyro_simulator, simulation_based_calibration, uniformity
from probbp.models import physics, physics_vae

PLAIN, PAPER, BOTH = "plain", "the paper's, labels x 10", "reference and adversary"
HOW = ("encoder", "refined")


def main():
    arguments = parsed(parser(__doc__))
    fast = arguments.fast
    fit_steps, num_records, num_steps = (50, 6, 200) if fast else (8000, 100, 10_000)
    start = time.perf_counter()
    study = STUDIES["beam, known confounder"]
    fits = compare(study, {PLAIN: (-1.0, 1.0), PAPER: (study.strength, 10.0)}, 1, fit_steps)
    adversary = {"anchored": True, "invariance": lambda step: study.invariance}
    if not fast:
        fits |= compare(study, {BOTH: (study.strength, 10.0)}, 1, fit_steps, **adversary)
    names = list(study.case.priors)
    print(
        f"Posteriors of {num_records} records, of {' and '.join(names)}: coverage of 90 % intervals"
        f"\n{'':26s}{'encoder':>16s}{'refined':>16s}{'k > 0.7':>9s}{'SBC p, encoder':>16s}"
        f"{'SBC p, refined':>16s}"
    )
    found = {}
    for name, fitted in (bar := tqdm(fits.items())):
        found[name] = row = calibrate(study, fitted, num_records, num_steps)
        cells = ["/".join(f"{value:.2f}" for value in row[how].mean(0)) for how in HOW]
        bar.clear()
        print(
            f"{name:26s}{cells[0]:>16s}{cells[1]:>16s}{row['k']:9.2f}"
            + "".join(f"{row['p', how]:16.2g}" for how in HOW),
            flush=True,
        )
    print(f"\n{time.perf_counter() - start:.0f} seconds, JAX {jax.__version__}")

    def coverage(name, how, i):
        return over_seeds(
            f"coverage of 90 % intervals of {names[i]}, {name}, {how}",
            100 * found[name][how][:, i],
            "%",
        )

    figure, axes = panels(len(names))
    for i, ax in enumerate(axes):
        draw(ax, {how: [coverage(name, how, i) for name in found] for how in HOW})
        ax.set_yticks(range(len(found)), list(found), fontsize=7)
        ax.set(xlabel="coverage of 90 % intervals [%]", title=names[i], xlim=(0, 100))
        ax.invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    write(
        arguments,
        paper=PHYSICS_VAE,
        claim="The latents that parametrise the physics are posteriors of physical parameters, and "
        "can be read as such.",
        setting=f"A beam on springs with a known confounder, {NUM_TRAIN} records to fit, "
        f"{num_records} to test, one seed; MALA with {num_steps} steps. The figure: E.",
        ours=coverage(PAPER, "encoder", 0),
        baseline=coverage(PLAIN, "encoder", 0),
        checks=[
            *(
                above(
                    f"90 % intervals hold {names[i]} in at least 80 %, {how}, {name}",
                    coverage(name, how, i),
                    80.0,
                )
                for name in list(found)[1:]
                for how in HOW
                for i in range(len(names))
            ),
            *(
                above(
                    f"right for the model that was learnt, {how}, {name}",
                    exact("p-value of uniform ranks", found[name]["p", how]),
                    0.01,
                )
                for name in list(found)[1:]
                for how in HOW
            ),
        ],
        figure=figure,
        caption="Share of held-out records whose physical parameter lies within the 90 % interval, "
        "by the encoder and by a sampler on the model that was learnt; 95 % intervals over "
        "records.",
    )


def draw(ax, coverages):
    for j, (how, figures) in enumerate(coverages.items()):
        means = np.array([f.mean for f in figures])
        where = np.arange(len(figures)) + 0.1 * (2 * j - 1)
        ends = means - [f.low for f in figures]
        ax.errorbar(means, where, xerr=ends, fmt="o", capsize=3, label=how)
    ax.axvline(90.0, color="grey", linestyle=":")


def refine(vae, params, key, x, c, y, num_steps, num_draws=100):
    """Return draws of MALA from the posterior of one record, in the encoder's coordinates."""
    refined = physics_vae.refinement(vae, params, x, c, y)
    _, factor = vae.encode(params, x[None])

    # In the encoder's white coordinates; what scale is left is learnt.
    def logdensity_fn(white):
        return refined.logdensity_fn(refined.position + factor[0] @ white)

    key_warmup, key_steps = jax.random.split(key)
    algorithm = partial(probbp.mala, logdensity_fn)
    start = jnp.zeros_like(refined.position)
    state, learnt = probbp.warmup(key_warmup, algorithm, start, num_steps // 2, metric="dense")
    step = algorithm(**learnt).step

    def thinned(state, key):
        keys = jax.random.split(key, num_steps // num_draws)
        return jax.lax.scan(lambda s, k: (step(k, s)[0], None), state, keys)[0], state.position

    _, white = jax.lax.scan(thinned, state, jax.random.split(key_steps, num_draws))
    return refined.position + white @ factor[0].T


def calibrate(study, fitted, num_records, num_steps):
    """Return whether intervals hold the truth, shares of Pareto's k, and p-values of ranks."""
    vae, params = fitted.vae, jax.tree.map(lambda leaf: leaf[0], fitted.params)
    test = physics.simulate(jax.random.key(5), study.case, num_records)
    names = list(study.case.priors)
    truth = jnp.stack([test.factors[name] for name in names], -1)
    keys = jax.random.split(jax.random.key(6), num_records)

    def physical(draws):
        latents = [vae.latents[name] for name in names]
        return jnp.stack([latent.transform(draws[..., latent.start]) for latent in latents], -1)

    # One after the other: so many small factorisations at once do no good on a CPU.
    def both(record):
        key, x, c, y = record
        mean, factor = vae.encode(params, x[None])
        noise = jax.random.normal(key, (1000, mean.shape[-1]))
        amortised = mean + noise @ factor[0].T
        return physical(amortised), physical(refine(vae, params, key, x, c, y, num_steps))

    k = physics_vae.pareto_k(vae, jax.random.key(7), params, test.x, test.c, test.y)
    row = {"k": np.mean(k > 0.7)}
    draws = jax.jit(partial(jax.lax.map, both))((keys, test.x, test.c, test.y))
    for how, values in zip(HOW, draws, strict=True):
        low, high = np.quantile(values, [0.05, 0.95], axis=1)
        row[how] = np.asarray((low < truth) & (truth < high))
        ranked = ranks(vae, params, test, names, how, num_records, num_steps)
        row["p", how] = uniformity(ranked)[1]
    return row


def ranks(vae, params, test, names, how, num_simulations, num_steps):
    """Return ranks of true parameters, drawn from the learnt model, among the posterior's draws."""

    def simulate(key):
        key_row, key_draw = jax.random.split(key)
        row = jax.random.randint(key_row, (), 0, len(test.x))
        c, y = test.c[row], test.y[row]

        def model():
            with numpyro.handlers.substitute(data=params):
                vae.model(None, c[None], y[None], num_records=1, heads=False)

        values, data = numpyro_simulator(model, data="x")(key_draw)
        return {name: values[name][0] for name in names}, (data["x"][0], c, y)

    def infer(key, data):
        x, c, y = data
        if how == "refined":
            draws = refine(vae, params, key, x, c, y, num_steps)
        else:
            mean, factor = vae.encode(params, x[None])
            draws = mean + jax.random.normal(key, (100, mean.shape[-1])) @ factor[0].T
        return {
            name: vae.latents[name].transform(draws[:, vae.latents[name].start]) for name in names
        }

    return simulation_based_calibration(
        jax.random.key(8),
        simulate,
        infer,
        num_simulations=num_simulations,
        batch_size=1,
        progress_bar=False,
    )


if __name__ == "__main__":
    main()
