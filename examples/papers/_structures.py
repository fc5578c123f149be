"""Simulated structures, fits of autoencoders to them, and what these take apart.

The finite elements are ours, not the paper's surrogates. Studies: a beam on springs, an oscillator,
and two beams of which it is known what can be identified.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _evidence import over_seeds
from flax import nnx
from numpyro.infer import Trace_ELBO
from scipy import stats

from probbp.models import physics, physics_vae

NUM_TRAIN, NUM_TEST, BATCH = 1024, 2048, 256


class Study(NamedTuple):
    case: physics.Case
    strength: float  # the paper's
    latent_dim: int
    invariance: float


STUDIES = {
    "beam on springs": Study(physics.beam(), 1 / 256, 2, 100.0),
    "beam, known confounder": Study(physics.beam("offset"), 1 / 256, 2, 100.0),
    "oscillator": Study(physics.oscillator(), 1 / 128, 4, 30.0),
    "beam, confounder in the physics' span": Study(physics.beam("bow"), 1 / 256, 2, 100.0),
}


class Fitted(NamedTuple):
    vae: physics_vae.PhysicsVAE
    params: dict  # with a first axis of seeds
    scores: dict


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


def compare(study, settings, num_seeds, num_steps, **options):
    """Fit settings, name to (strength, weight of labels), of one network and model, and score them.

    All seeds and settings are one compiled program.
    """
    train = physics.simulate(jax.random.key(0), study.case, NUM_TRAIN)
    test = physics.simulate(jax.random.key(1), study.case, NUM_TEST)
    keys = jax.random.split(jax.random.key(2), num_seeds)
    run = partial(fit, study, train, num_steps=num_steps, **options)
    each = jnp.repeat(jnp.array(list(settings.values())), num_seeds, axis=0)
    params = jax.jit(jax.vmap(run))(jnp.tile(keys, (len(settings),)), each[:, 0], each[:, 1])
    options.pop("invariance", None)
    vae = build(study, train, keys[0], **options)
    found = {}
    for i, name in enumerate(settings):
        part = slice(i * num_seeds, (i + 1) * num_seeds)
        fitted = jax.tree.map(lambda leaf, part=part: leaf[part], params)
        found[name] = Fitted(vae, fitted, evaluate(study, vae, fitted, test))
    return found


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


def print_study(title, study, fits, plain):
    """Print all scores; ratio and p-value are to one setting, paired by seed."""
    case, num_seeds = study.case, len(fits[plain].scores["energy"])
    print(f"\n=== {title}: {NUM_TRAIN} records, {num_seeds} seeds")
    columns = [name for name in fits[plain].scores if name not in ("one draw", "mean")]
    for column in columns:
        print(f"\n{column:32s}{'mean':>10s}{'sd':>9s}{'median':>9s}{'ratio':>8s}{'p':>9s}")
        base = fits[plain].scores[column]
        for name, (_, _, scores) in fits.items():
            values = scores[column]
            line = f"  {name:30s}{values.mean():10.4f}{values.std(ddof=1):9.4f}"
            line += f"{np.median(values):9.4f}"
            if name != plain:
                p = stats.ttest_rel(values, base).pvalue
                line += f"{values.mean() / base.mean():8.2f}{p:9.2g}"
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


def target(study):
    """Return the parameter by which a study is judged."""
    return next(iter(study.case.priors))


def difference(fits, name, other, column):
    """Return a figure: a score of one setting less that of another, paired by seed."""
    values = fits[name].scores[column] - fits[other].scores[column]
    return over_seeds(f"{column}, {name} less {other}, paired", values)


def readable(fits, name, factor):
    """Return a figure: how much of a factor can be read off what domain and class are told by."""
    tables = fits[name].scores["one draw"]
    what = f"R2 of {factor} from the residual's latents, {name}"
    return over_seeds(what, [table["z_c, z_y"][factor] for table in tables])


def draw_errors(axes, found):
    """Draw the error of each study's parameter, by setting; a dot for each seed."""
    for ax, (title, (study, fits)) in zip(axes, found.items(), strict=True):
        column = f"error {target(study)}"
        for i, fitted in enumerate(fits.values()):
            values = fitted.scores[column]
            ax.plot(values, np.full(len(values), i), ".", color="C0", alpha=0.5)
            ax.plot(values.mean(), i, "|", color="C1", markersize=18)
        ax.set_yticks(range(len(fits)), list(fits), fontsize=7)
        ax.set(xlabel=column, title=title, xlim=(0, None), ylim=(len(fits) - 0.5, -0.5))
