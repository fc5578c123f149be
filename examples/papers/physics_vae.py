"""Physics and confounders apart: the claims about a reversed gradient, on simulated structures.

Koune & Cicirello, 2025, arXiv:2506.13658, say that reversing the response's gradient before the
residual keeps it from explaining what the physics can. Here their case studies, simulated from
equations (the finite elements are ours, not their surrogates): a beam on springs, an oscillator, a
population of bridges; and two beams of which it is known what can be identified.

    python examples/papers/physics_vae.py [--fast]

- Settings: lambda = -1 is the plain autoencoder, 0 cuts the gradient, then the paper's value (1/256
  for beams, 1/128 for the oscillator) and one that is too large. "labels x 10": the likelihood of
  the labels weighs ten times; with it a reference at which the residual is zero, and an adversary
  that reads domain and class off z_x. "deeper": the default encoder, with two hidden layers; the
  paper's, in all others, has one.
- R2: of a least-squares line from one posterior draw of a group of latents to a factor of the
  simulator, on held-out records; in brackets from the posterior's mean.
- Error: of the posterior mean of a physical parameter, as it is, no line fitted. Of the
  oscillator's mass against m / k, where the damping is below 0.1: raw mass is not identified, mass
  and temperature enter by their quotient alone, and damping multiplies the physics.
- Leakage: the share of the response's variation that the residual takes where only physical
  parameters vary, and that the physics takes where only domain and class vary.
- Energy: variance of the residual over that of the response.

Figures are mean and standard deviation over seeds of network and fit; "p" is the two-sided p-value
of a paired t-test against the plain autoencoder.
"""

import argparse
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
from flax import nnx
from numpyro.infer import Trace_ELBO
from scipy import stats
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, WhiteKernel
from sklearn.linear_model import LinearRegression
from sklearn.multioutput import MultiOutputRegressor
from sklearn.neural_network import MLPRegressor
from tqdm import tqdm

import probbp
from probbp.diagnostics.sbc import numpyro_simulator, simulation_based_calibration, uniformity
from probbp.models import physics, physics_vae

NUM_SEEDS, NUM_TRAIN, NUM_TEST, BATCH = 6, 1024, 2048, 256
PLAIN, PAPER = "lambda = -1 (plain)", "lambda of the paper"


class Study(NamedTuple):
    case: physics.Case
    strengths: dict[str, float]
    latent_dim: int
    invariance: float
    has_deeper: bool = True


BEAM_STRENGTHS = {PLAIN: -1.0, "lambda = 0": 0.0, PAPER: 1 / 256, "lambda = 1/16": 1 / 16}
STUDIES = {
    "beam on springs": Study(physics.beam(), BEAM_STRENGTHS, 2, 100.0),
    "beam, known confounder": Study(physics.beam("offset"), BEAM_STRENGTHS, 2, 100.0),
    "oscillator": Study(
        physics.oscillator(),
        {PLAIN: -1.0, "lambda = 0": 0.0, PAPER: 1 / 128, "lambda = 1/8": 1 / 8},
        4,
        30.0,
    ),
    "beam, confounder in the physics' span": Study(
        physics.beam("bow"), {PLAIN: -1.0, PAPER: 1 / 256}, 2, 100.0, has_deeper=False
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a smoke test; its figures are rough")
    fast = parser.parse_args().fast
    num_seeds, num_steps = (2, 300) if fast else (NUM_SEEDS, 8000)
    start = time.perf_counter()
    with tqdm(total=len(STUDIES) + 2) as bar:
        for name, study in STUDIES.items():
            bar.set_description(name)
            fits = compare(study, num_seeds, num_steps)
            bar.clear()
            print_study(name, study, fits)
            if name == "beam, known confounder":
                bar.update()
                bar.set_description("calibration")
                table = calibrate(study, fits, 16 if fast else 128, 400 if fast else 20_000)
                bar.clear()
                print(table, flush=True)
            bar.update()
        bar.set_description("bridges")
        scores = bridges(num_seeds, 200 if fast else 3000, bar)
        bar.clear()
        print_bridges(scores)
        bar.update()
    print(f"\n{time.perf_counter() - start:.0f} seconds, JAX {jax.__version__}")


# ---------------------------------------------------------------------------------------
# Fits, all seeds and strengths in one compiled program.


def build(study, records, key, anchored=False, guide="joint", encoder="paper"):
    """Return the model; the paper's encoder has one hidden layer, the default two."""
    case, rngs = study.case, nnx.Rngs(key)
    num_latent = len(case.priors) + 2 * study.latent_dim
    sizes = (records.x.shape[1], 128, num_latent * (num_latent + 3) // 2)
    networks = {}
    if encoder == "paper" and guide == "joint":
        networks["encoder"] = physics_vae.MLP(sizes, rngs, activation=jax.nn.relu)
    reference = {
        "c": jnp.array([case.reference[name] for name in case.domain]),
        "y": jnp.array([case.reference[name] for name in case.classes]),
    }
    return physics_vae.physics_vae(
        case.physics,
        case.priors,
        records.x,
        domain=physics_vae.continuous(records.c),
        classes=physics_vae.continuous(records.y),
        known=records.known,
        domain_dim=study.latent_dim,
        class_dim=study.latent_dim,
        reference=reference if anchored else None,
        guide=guide,
        networks=networks,
        rngs=rngs,
    )


def fit(
    study, records, key, strength, label_weight, num_steps, rows=None, invariance=None, **options
):
    """Return the parameters of one fit, on some rows of the records."""
    key_net, key_init, key_steps = jax.random.split(key, 3)
    rows = jnp.arange(len(records.x)) if rows is None else rows
    vae = build(study, records, key_net, **options)
    rate = optax.cosine_decay_schedule(2e-3, num_steps, alpha=0.05)
    schedule, loss = (lambda step: strength), Trace_ELBO()
    svi = physics_vae.svi(
        vae, optax.adam(rate), strength=schedule, invariance=invariance, loss=loss
    )

    def batch(rows):
        known = None if records.known is None else records.known[rows]
        keywords = {"known": known, "label_weight": label_weight}
        return (records.x[rows], records.c[rows], records.y[rows]), keywords

    arguments, keywords = batch(rows[:BATCH])
    state = svi.init(key_init, *arguments, **keywords)

    def step(state, key):
        arguments, keywords = batch(jax.random.choice(key, rows, (BATCH,)))
        return svi.update(state, *arguments, **keywords)[0], None

    state, _ = jax.lax.scan(step, state, jax.random.split(key_steps, num_steps))
    return svi.get_params(state)


def compare(study, num_seeds, num_steps):
    """Return setting to (parameters, scores), with a first axis of seeds."""
    train = physics.simulate(jax.random.key(0), study.case, NUM_TRAIN)
    test = physics.simulate(jax.random.key(1), study.case, NUM_TEST)
    keys = jax.random.split(jax.random.key(2), num_seeds)
    paper = study.strengths[PAPER]

    def all_fits(settings, **options):
        """Settings are name to (strength, weight of labels), with the same network and model."""
        run = partial(fit, study, train, num_steps=num_steps, **options)
        each = jnp.repeat(jnp.array(list(settings.values())), num_seeds, axis=0)
        params = jax.jit(jax.vmap(run))(jnp.tile(keys, len(settings)), each[:, 0], each[:, 1])
        options.pop("invariance", None)
        vae = build(study, train, keys[0], **options)
        for i, name in enumerate(settings):
            part = slice(i * num_seeds, (i + 1) * num_seeds)
            fitted = jax.tree.map(lambda leaf, part=part: leaf[part], params)
            yield name, (vae, fitted, evaluate(study, vae, fitted, test))

    fits = dict(
        all_fits(
            {name: (strength, 1.0) for name, strength in study.strengths.items()}
            | {"plain, labels x 10": (-1.0, 10.0), "paper's, labels x 10": (paper, 10.0)}
        )
    )
    adversary = {"anchored": True, "invariance": lambda step: study.invariance}
    fits |= all_fits({"... with reference": (paper, 10.0)}, anchored=True)
    fits |= all_fits({"... with reference, adversary": (paper, 10.0)}, **adversary)
    if study.has_deeper:
        fits |= all_fits(
            {
                "plain, labels x 10, deeper": (-1.0, 10.0),
                "paper's, labels x 10, deeper": (paper, 10.0),
            },
            encoder="deeper",
        )
    return fits


def evaluate(study, vae, params, test, num_draws=64):
    """Return scores of each seed."""
    case = study.case
    groups = {
        "residual": varied(case, case.priors),
        "physics": varied(case, (*case.domain, *case.classes)),
    }

    @jax.jit
    @jax.vmap
    def run(params, key):
        mean, factor = vae.encode(params, test.x)
        noise = jax.random.normal(key, (num_draws, *mean.shape))
        draws = mean + jnp.einsum("nij,snj->sni", factor, noise)
        sites = physics_vae.decode(vae, params, draws[0], test.known)
        parameters = {
            name: latent.transform(draws[..., latent.start])
            for name, latent in vae.latents.items()
            if name in case.priors
        }
        leaked = {
            part: physics_vae.leakage(vae, params, x, known)[part]
            for part, (x, known) in groups.items()
        }
        means = {name: draws[:, :, vae.latents[name].coordinates].mean(0) for name in vae.latents}
        return sites, parameters, leaked, means

    seeds = jax.random.split(jax.random.key(3), len(params["sigma_x"]))
    sites, parameters, leaked, means = jax.tree.map(np.asarray, run(params, seeds))
    truth, chosen = identified(case, test.factors)
    scores = {}
    for name, draws in parameters.items():
        draws, true = draws[:, :, chosen], truth[name][chosen]
        low, high = np.quantile(draws, [0.05, 0.95], axis=1)
        scores[f"error {name}"] = np.sqrt(np.mean((draws.mean(1) - true) ** 2, -1))
        scores[f"R2 {name}"] = 1 - scores[f"error {name}"] ** 2 / true.var()
        scores[f"cover {name}"] = np.mean((low < true) & (true < high), -1)
    scores["leaks to residual"], scores["leaks to physics"] = leaked["residual"], leaked["physics"]
    scores["energy"] = sites["residual"].var(1).mean(-1) / np.asarray(test.x).var(0).mean()
    scores["reconstruction"] = np.sqrt(np.mean((sites["prediction"] - test.x) ** 2, (1, 2)))
    scores["sigma_x"] = np.asarray(params["sigma_x"])

    def matrix(latents):
        z = {"z_x": [latents[n].reshape(len(test.x), -1) for n in case.priors]}
        z |= {"z_c": [latents["z_c"]], "z_y": [latents["z_y"]]}
        z["z_c, z_y"] = z["z_c"] + z["z_y"]
        z = {group: np.concatenate(parts, -1) for group, parts in z.items()}
        return physics_vae.disentanglement(z, test.factors)

    num_seeds = len(seeds)
    one = [matrix({name: sites[name][s] for name in vae.latents}) for s in range(num_seeds)]
    mean = [matrix({name: means[name][s] for name in vae.latents}) for s in range(num_seeds)]
    return scores | {"one draw": one, "mean": mean}


def identified(case, factors):
    """Return what the physics' parameters ought to be, and of which records that can be said."""
    truth = {name: np.asarray(factors[name]) for name in case.priors}
    chosen = np.ones(len(next(iter(truth.values()))), bool)
    if "damping" in factors:
        spring = 1 + 0.01 * (20 - np.asarray(factors["temperature"]))
        truth = {"m": truth["m"] / spring}
        chosen = np.asarray(factors["damping"]) < 0.1
    return truth, chosen


def varied(case, names, num_groups=24, num_members=24):
    """Return clean responses in groups within which only the factors of these names vary."""
    shape = num_groups, num_members
    drawn = physics.simulate(jax.random.key(4), case, num_groups * num_members).factors
    drawn = {name: value.reshape(shape) for name, value in drawn.items()}
    values = {
        name: value if name in names else jnp.broadcast_to(value[:, :1], shape)
        for name, value in drawn.items()
    }
    x = jax.vmap(jax.vmap(case.response))(values)
    known = jnp.stack([values[name] for name in case.known], -1) if case.known else None
    return x, known


def print_study(title, study, fits):
    case, num_seeds = study.case, len(next(iter(fits.values()))[2]["energy"])
    print(f"\n=== {title}: {NUM_TRAIN} records, {num_seeds} seeds")
    columns = [name for name in fits[next(iter(fits))][2] if name not in ("one draw", "mean")]
    for column in columns:
        print(f"\n{column:32s}{'mean':>10s}{'sd':>9s}{'median':>9s}{'ratio':>8s}{'p':>9s}")
        plain = fits[PLAIN][2][column]
        for name, (_, _, scores) in fits.items():
            values = scores[column]
            line = f"  {name:30s}{values.mean():10.4f}{values.std(ddof=1):9.4f}"
            line += f"{np.median(values):9.4f}"
            if name != PLAIN:
                p = stats.ttest_rel(values, plain).pvalue
                line += f"{values.mean() / plain.mean():8.2f}{p:9.2g}"
            print(line)
    leaks = {name: scores["leaks to physics"].mean() for name, (_, _, scores) in fits.items()}
    print(
        "\nNot identified: of what domain and class cause, the physics takes more than a tenth in"
    )
    print("  " + "; ".join(f"{n} ({leak:.0%})" for n, leak in leaks.items() if leak > 0.1))
    factors = list(case.factors)
    print(f"\n{'R2: one draw (mean)':44s}" + "".join(f"{name:>15s}" for name in factors))
    for name, (_, _, scores) in fits.items():
        for group in scores["one draw"][0]:
            cells = [
                f"{np.mean([table[group][factor] for table in scores['one draw']]):7.2f} "
                f"({np.mean([table[group][factor] for table in scores['mean']]):5.2f})"
                for factor in factors
            ]
            print(f"  {name:32s}{group:10s}" + "".join(f"{cell:>15s}" for cell in cells))
    print(flush=True)


# ---------------------------------------------------------------------------------------
# How far the posterior can be trusted, for one seed.


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


def calibrate(study, fits, num_records, num_steps):
    """Return a table: coverage on the simulator's records, and calibration on the model's own."""
    case, lines = study.case, []
    test = physics.simulate(jax.random.key(5), case, num_records)
    names = list(case.priors)
    truth = jnp.stack([test.factors[name] for name in names], -1)
    lines.append(
        f"Posteriors of {num_records} records, one seed: coverage of 90 % intervals\n"
        f"{'':32s}{'encoder':>16s}{'refined':>16s}{'k > 0.7':>9s}"
        f"{'SBC p, refined':>16s}{'SBC p, encoder':>16s}"
    )
    for name in (PLAIN, "paper's, labels x 10", "... with reference, adversary"):
        vae, params = fits[name][0], jax.tree.map(lambda leaf: leaf[0], fits[name][1])
        keys = jax.random.split(jax.random.key(6), num_records)

        def physical(draws, vae=vae):
            return jnp.stack(
                [vae.latents[n].transform(draws[..., vae.latents[n].start]) for n in names], -1
            )

        # One after the other: so many small factorisations at once do no good on a CPU.
        def both(record, vae=vae, params=params, physical=physical):
            key, x, c, y = record
            mean, factor = vae.encode(params, x[None])
            noise = jax.random.normal(key, (1000, mean.shape[-1]))
            amortised = mean + noise @ factor[0].T
            refined = refine(vae, params, key, x, c, y, num_steps)
            return physical(amortised), physical(refined)

        cells = []
        for draws in jax.jit(partial(jax.lax.map, both))((keys, test.x, test.c, test.y)):
            low, high = np.quantile(draws, [0.05, 0.95], axis=1)
            cells.append(np.mean((low < truth) & (truth < high), 0))
        k = physics_vae.pareto_k(vae, jax.random.key(7), params, test.x, test.c, test.y)
        refined, amortised = (
            uniformity(ranks(vae, params, test, names, how, num_records, num_steps))[1]
            for how in ("refined", "encoder")
        )
        shown = ["/".join(f"{value:.2f}" for value in cell) for cell in cells]
        lines.append(
            f"{name:32s}{shown[0]:>16s}{shown[1]:>16s}{np.mean(k > 0.7):9.2f}"
            f"{refined:16.2g}{amortised:16.2g}"
        )
    return "\n".join(lines)


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
        return {name: vae.latents[name].transform(draws[:, vae.latents[name].start])
                for name in names}  # fmt: skip

    return simulation_based_calibration(
        jax.random.key(8),
        simulate,
        infer,
        num_simulations=num_simulations,
        batch_size=1,
        progress_bar=False,
    )


# ---------------------------------------------------------------------------------------
# Bridges: damage from responses, inside and outside of what was seen.


def bridges(num_seeds, num_steps, bar):
    """Return (split, method) to (R2, MSE), each (folds, seeds), averaged over both damages."""
    case = physics.bridges()
    study = Study(case, {}, 4, 0.0)
    num_records = 1024
    records = physics.simulate(jax.random.key(0), case, num_records)
    upper = [np.asarray(records.factors[name]) > 8.0 for name in ("log_k1", "log_k2")]
    quadrant = 2 * upper[0].astype(int) + upper[1]
    x, c, y = (np.asarray(a) for a in (records.x, records.c, records.y))
    inputs = np.concatenate([(x - x.mean(0)) / x.std(), (c - c.mean(0)) / c.std(0)], -1)
    splits = {"interpolation": lambda q: quadrant != q, "extrapolation": lambda q: quadrant == q}
    folds = [(split, q) for split in splits for q in range(4)]
    scores = {}

    def score(split, method, predicted, rows):
        errors = np.mean((predicted - y[rows]) ** 2, 0)
        r2 = np.mean(1 - errors / y[rows].var(0))
        scores.setdefault((split, method), []).append((r2, np.mean(errors)))

    for split, q in folds:
        train = splits[split](q)
        for method, regressor in regressors(num_seeds).items():
            for model in regressor:
                model.fit(inputs[train], y[train])
                score(split, method, model.predict(inputs[~train]), ~train)

    # Splits differ in size; rows are drawn from an index of one length for all.
    masks = np.stack([splits[split](q) for split, q in folds])
    random = np.random.default_rng(0)
    rows = jnp.asarray(np.stack([random.choice(np.flatnonzero(m), 1024) for m in masks]))
    keys = jax.random.split(jax.random.key(2), num_seeds)
    methods = {
        "plain: partitioned, lambda = -1": ("partitioned", -1.0),
        "paper's: joint, lambda = 1/1024": ("joint", 1 / 1024),
        "joint, lambda = 0": ("joint", 0.0),
    }
    for method, (guide, strength) in methods.items():
        bar.set_description(f"bridges, {method}")
        run = partial(fit, study, records, num_steps=num_steps, guide=guide)
        over_seeds = jax.vmap(lambda r, k, run=run, s=strength: run(k, s, 1.0, rows=r), (None, 0))
        params = jax.jit(jax.vmap(over_seeds, (0, None)))(rows, keys)
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
    return scores


def regressors(num_seeds):
    """Return method to models; those that draw nothing are fitted once."""
    kernel = RBF(5.0, (0.1, 1e3)) + WhiteKernel(1e-2, (1e-6, 1.0))
    return {
        "linear": [LinearRegression()],
        "Gaussian process": [
            MultiOutputRegressor(GaussianProcessRegressor(kernel, normalize_y=True))
        ],
        "multilayer perceptron": [
            MLPRegressor(hidden_layer_sizes=(64, 64), max_iter=300, random_state=seed)
            for seed in range(num_seeds)
        ],
    }


def print_bridges(scores: dict[Any, Any]):
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
