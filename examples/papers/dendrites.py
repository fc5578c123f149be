"""Dendrites against their alternatives: five data sets, ten seeds, one budget.

Brenner & Itti, 2025, arXiv:2501.18018, and Brenner et al., 2025, arXiv:2506.00356, grow a dendrite
for every neuron of a trained network and report up to 16 % more accuracy and up to 90 % fewer
parameters. Their comparisons have no arm that spends the same parameters on width, none with random
dendrites, and longer training for the network that grows. Here all arms see the same rows the same
number of times. The authors' code is proprietary; this is our reading of the method.

    python examples/papers/dendrites.py [--fast]

A network with one hidden layer of few tanh units, 50 % of the rows to train, 20 % to validate, 30 %
to test, Adam at 0.01 with a cosine, batches of 32. Growth has three phases of 60 epochs, each back
to its best validation, with a set of dendrites on both layers before the second and the third; what
does not grow has 180 epochs in one. Ten seeds draw split, start and batches, and are shared by the
arms; intervals are 95 % of Student's t over seeds, and differences are paired.

- base: the small network. wide: as many units as the parameters of a full growth pay for.
- gradient: dendrites start at random, small, and are trained with all else.
- perforated: as in the papers: dendrites climb the correlation with their neuron's error, one for
  each neuron, stay as they are, and no error passes through them. perforated, evidence: the same,
  for those neurons that the joint evidence asks for.
- unfrozen: sought in the same way, and then trained with all else.
- partial: dendrites climb the partial correlation, of what their neuron's own weights cannot say;
  frozen and perforated, or unfrozen, for all or for whom the evidence asks. The last of the four is
  the default of `probbp.models.growth`.
- random: frozen dendrites that nobody sought.

Then growth inside SVI, on Friedman's function with 1,000 rows and three seeds: a mean-field
posterior over all weights of a network of three units, no validation rows, dendrites on the hidden
layer where the evidence asks for them, up to three sets; and plain networks for as many steps as
three sets would take. Growth stops where nothing asks: the steps it took are printed.
"""

import argparse
import time
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import scipy.stats
from numpyro.infer import Predictive, Trace_ELBO, log_likelihood
from numpyro.infer.autoguide import AutoNormal
from sklearn import datasets
from tqdm import tqdm

from probbp.models.growth import from_svi, grow, with_dendrites
from probbp.models.growth.acceptance import Search, propose
from probbp.ops import dendrites as ops

NUM_SEEDS, NUM_SETS, EPOCHS, BATCH, RATE = 10, 2, 60, 32, 0.01
WIDTHS = {"digits": 4, "breast cancer": 2, "wine": 2, "diabetes": 2, "Friedman 1": 3}
LARGE = 32
ARMS = (
    "gradient",
    "random",
    "perforated",
    "perforated, evidence",
    "unfrozen",
    "partial",
    "partial, evidence",
    "partial, unfrozen",
    "partial, unfrozen, evidence",
)


class Data(NamedTuple):
    """One data set, with a first axis of seeds; y are classes, or standardised numbers."""

    train: tuple[jax.Array, jax.Array]
    validation: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a smoke test; its figures are rough")
    fast = parser.parse_args().fast
    num_seeds, epochs, num_steps = (2, 3, 10) if fast else (NUM_SEEDS, EPOCHS, 150)
    names = ("wine", "Friedman 1") if fast else tuple(WIDTHS)
    start = time.perf_counter(), time.process_time()
    verdicts = []
    with tqdm(names) as bar:
        for name in bar:
            bar.set_description(name)
            data, num_outputs = load(name, num_seeds)
            scores, sizes, curve = compare(data, num_outputs, WIDTHS[name], epochs, num_steps)
            bar.clear()
            print_table(name, num_outputs > 1, scores, sizes)
            verdicts.append((name, num_outputs > 1, scores, sizes, curve))
    print_verdicts(verdicts)
    print_svi(2 if fast else 3, fast)
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    print(f"\n{wall:.0f} seconds, {cpu:.0f} of CPUs, JAX {jax.__version__}")


# ---------------------------------------------------------------------------------------
# Data.


def load(name, num_seeds):
    """Return splits of a data set for each seed, standardised by their training rows."""
    if name == "Friedman 1":
        x, y = datasets.make_friedman1(2000, n_features=5, noise=1.0, random_state=0)
    else:
        loader = {"digits": datasets.load_digits, "breast cancer": datasets.load_breast_cancer}
        loader |= {"wine": datasets.load_wine, "diabetes": datasets.load_diabetes}
        x, y = loader[name](return_X_y=True)
    is_classes = np.issubdtype(y.dtype, np.integer)
    num = len(x)
    splits = []
    for seed in range(num_seeds):
        order = np.random.default_rng(seed).permutation(num)
        train, validation, test = np.split(order, [num // 2, num // 2 + num // 5])
        scale = np.maximum(x[train].std(0), 1e-3 * x.std())
        inputs = (x - x[train].mean(0)) / scale
        targets = y if is_classes else (y - y[train].mean()) / y[train].std()
        splits.append([(inputs[rows], targets[rows]) for rows in (train, validation, test)])
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *splits)
    dtype = jnp.int32 if is_classes else jnp.float32
    stacked = [(x.astype(jnp.float32), y.astype(dtype)) for x, y in stacked]
    return Data(*stacked), int(y.max()) + 1 if is_classes else 1


# ---------------------------------------------------------------------------------------
# The network, one seed.


def init(key, num_inputs, width, num_outputs):
    key_hidden, key_out = jax.random.split(key)
    return {
        "w0": jax.random.normal(key_hidden, (num_inputs, width)) / num_inputs**0.5,
        "b0": jnp.zeros(width),
        "w1": jax.random.normal(key_out, (width, num_outputs)) / width**0.5,
        "b1": jnp.zeros(num_outputs),
    }


def network(params, layer, x):
    """Units beyond `params["units"]` say nothing; without that entry all are there."""
    hidden = jnp.tanh(layer("hidden", x, params["w0"], params["b0"]))
    if "units" in params:
        hidden = hidden * jax.lax.stop_gradient(params["units"])
    return layer("out", hidden, params["w1"], params["b1"])


def losses(outputs, y):
    """Return each row's negative log likelihood, of unit variance in regression."""
    if outputs.shape[-1] == 1:
        return (outputs[:, 0] - y) ** 2 / 2
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y)


def test_error(outputs, y):
    """Return the share of wrong classes, or the mean squared error in units of the variance."""
    if outputs.shape[-1] == 1:
        return jnp.mean((outputs[:, 0] - y) ** 2)
    return jnp.mean(outputs.argmax(-1) != y)


def fit(key, params, dendrites, train, validation, *, epochs, frozen):
    """Train, and return the epoch with the best validation loss, the start included."""
    layer_fn = partial(ops.grown, freeze=frozen, perforate=frozen)
    num_batches = len(train[0]) // BATCH
    optimiser = optax.adam(optax.cosine_decay_schedule(RATE, epochs * num_batches))

    def mean_loss(model, rows):
        params, dendrites = model
        return losses(network(params, layer_fn(dendrites), rows[0]), rows[1]).mean()

    def step(carry, rows):
        model, state = carry
        slope = jax.grad(mean_loss)(model, (train[0][rows], train[1][rows]))
        updates, state = optimiser.update(slope, state)
        return (optax.apply_updates(model, updates), state), None

    def epoch(carry, key):
        model, state, best, best_loss = carry
        order = jax.random.permutation(key, len(train[0]))[: num_batches * BATCH]
        (model, state), _ = jax.lax.scan(step, (model, state), order.reshape(-1, BATCH))
        loss = mean_loss(model, validation)
        best = jax.tree.map(lambda new, old: jnp.where(loss < best_loss, new, old), model, best)
        return (model, state, best, jnp.minimum(loss, best_loss)), None

    model = params, dendrites
    carry = model, optimiser.init(model), model, mean_loss(model, validation)
    return jax.lax.scan(epoch, carry, jax.random.split(key, epochs))[0][2]


def seek(key, params, dendrites, train, validation, *, num_steps, acceptance, partial_out):
    """Return a set of dendrites, and who gets one."""
    search = Search(optax.adam(0.02), ops.correlation, 4, num_steps, 1.0, jnp.tanh, partial_out)
    half = len(validation[0]) // 2
    halves = [tuple(leaf[rows] for leaf in validation) for rows in np.split(np.r_[: 2 * half], 2)]
    plain = ops.grown(dendrites)
    # In regression the noise is what the network leaves on validation rows: a likelihood.
    left = losses(network(params, plain, validation[0]), validation[1])
    scale = 1 / (2 * left.mean()) if params["w1"].shape[1] == 1 else 1.0

    def observed(rows):
        return ops.observe(
            lambda layer: jnp.sum(scale * losses(network(params, layer, rows[0]), rows[1])), plain
        )[1]

    options = {"acceptance": acceptance, "prior_scale": 1.0, "level": 0.05}
    proposal = propose(key, *map(observed, (train, *halves)), dendrites, search, **options)
    return proposal.candidates, proposal.masks


def drawn(key, params, dendrites, *, scale):
    """Return a set of random dendrites, for all."""
    candidates = {}
    names = {"hidden": params["w0"], "out": params["w1"]}
    for k, (name, kernel) in zip(jax.random.split(key), names.items(), strict=True):
        key_kernel, key_bias = jax.random.split(k)
        slots, n = dendrites[name].bias.shape
        candidates[name] = ops.Candidate(
            scale * jax.random.normal(key_kernel, kernel.shape) / kernel.shape[0] ** 0.5,
            scale * jax.random.normal(key_bias, (n,)) / 2,
            jnp.zeros((slots, n)),
        )
    return candidates, {name: jnp.ones(kernel.shape[1]) for name, kernel in names.items()}


def add(dendrites, found, *, slot):
    candidates, masks = found
    return {
        name: ops.grow(there, candidates[name], masks[name], slot=slot)
        for name, there in dendrites.items()
    }


# ---------------------------------------------------------------------------------------
# All arms, all seeds.


def compare(data, num_outputs, width, epochs, num_steps):
    """Return errors (seeds,) and parameters (seeds,) of each arm, and those of plain widths."""
    num_seeds, _, num_inputs = data.train[0].shape
    keys = jax.random.split(jax.random.key(1), (2 + 2 * NUM_SETS, num_seeds))
    rows = data.train, data.validation

    def programs(frozen):
        return jax.jit(jax.vmap(partial(fit, epochs=epochs, frozen=frozen)))

    fits = {frozen: programs(frozen) for frozen in (False, True)}

    @cache
    def seeks(acceptance, partial_out):
        options = {"acceptance": acceptance, "partial_out": partial_out}
        return jax.jit(jax.vmap(partial(seek, num_steps=num_steps, **options)))

    @jax.jit
    @jax.vmap
    def tested(params, dendrites, x, y):
        error = test_error(network(params, ops.grown(dendrites), x), y)
        return error, sum(ops.num_params(there) for there in dendrites.values())

    start = jax.vmap(partial(init, num_inputs=num_inputs, width=width, num_outputs=num_outputs))
    params = start(keys[0])
    waiting = jax.vmap(
        lambda params: {
            "hidden": ops.empty(params["w0"], NUM_SETS),
            "out": ops.empty(params["w1"], NUM_SETS),
        }
    )(params)
    first = fits[False](keys[1], params, waiting, *rows)
    num_base = sum(leaf[0].size for leaf in jax.tree.leaves(params))

    scores, sizes = {}, {}
    for arm in ARMS:
        params, dendrites = first
        is_frozen = arm != "gradient" and "unfrozen" not in arm
        for slot in range(NUM_SETS):
            key_seek, key_fit = keys[2 + 2 * slot], keys[3 + 2 * slot]
            if arm in ("gradient", "random"):
                scale = 0.01 if arm == "gradient" else 1.0
                found = jax.vmap(partial(drawn, scale=scale))(key_seek, params, dendrites)
            else:
                acceptance = "evidence" if "evidence" in arm else "all"
                found = seeks(acceptance, "partial" in arm)(key_seek, params, dendrites, *rows)
            dendrites = jax.vmap(partial(add, slot=slot))(dendrites, found)
            params, dendrites = fits[is_frozen](key_fit, params, dendrites, *rows)
        scores[arm], added = tested(params, dendrites, *data.test)
        sizes[arm] = num_base + np.asarray(added)

    # Plain networks: widths are masks of one, so that all are one program.
    per_unit = num_inputs + 1 + num_outputs
    wide = width + round(int(sizes["perforated"][0] - num_base) / per_unit)
    widths = sorted({width, wide, *(2**i for i in range(1, 6)), LARGE})
    long = partial(fit, dendrites={}, epochs=(1 + NUM_SETS) * epochs, frozen=False)

    def plain(key_init, key_fit, units, train, validation):
        params = init(key_init, num_inputs, widths[-1], num_outputs)
        # Units beyond are not there, so that the start's scale is that of those that are.
        scale = (widths[-1] / units.sum()) ** 0.5
        params = params | {"w1": scale * params["w1"], "units": units}
        return long(key_fit, params, train=train, validation=validation)[0]

    train_plain = jax.jit(jax.vmap(plain, (0, 0, None, 0, 0)))
    curve = {}
    for count in widths:
        units = (jnp.arange(widths[-1]) < count).astype(jnp.float32)
        params = train_plain(keys[0], keys[1], units, *rows)
        error = tested(params, {}, *data.test)[0]
        curve[num_outputs + count * per_unit] = np.asarray(error)
    base, equal = (num_outputs + count * per_unit for count in (width, wide))
    scores = {"base": curve[base], "wide": curve[equal]} | scores
    sizes = {"base": np.full(num_seeds, base), "wide": np.full(num_seeds, equal)} | sizes
    return {arm: np.asarray(score) for arm, score in scores.items()}, sizes, curve


# ---------------------------------------------------------------------------------------
# SVI.


def bayesian(x, y=None, *, layer, width):
    shapes = {"w0": (x.shape[1], width), "b0": (width,), "w1": (width, 1), "b1": (1,)}
    values = {}
    for name, shape in shapes.items():
        prior = dist.Normal(0, 1 if name == "w0" else 2).expand(shape).to_event(len(shape))
        values[name] = numpyro.sample(name, prior)
    sigma = numpyro.sample("sigma", dist.HalfNormal(1))
    hidden = jnp.tanh(layer("hidden", x, values["w0"], values["b0"]))
    mean = layer("out", hidden, values["w1"], values["b1"])[:, 0]
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(mean, sigma), obs=y)


def svi_growth(seed, width, num_sets, num_epochs, epoch_steps, data):
    """Return ELBO, test error, test negative log likelihood, dendrites and epochs."""
    (x, y), (x_test, y_test) = data
    model = partial(bayesian, width=width)
    host = from_svi(
        jax.random.key(seed),
        model,
        optax.adam(0.01),
        x,
        y,
        layers=("hidden",),
        prior_scale=1.0,
        epoch_steps=epoch_steps,
    )
    result = grow(
        jax.random.key(seed),
        host,
        max_sets=num_sets,
        patience=num_epochs,
        max_epochs=num_epochs,
        progress_bar=False,
    )
    grown = with_dendrites(model, result.dendrites)
    guide = AutoNormal(grown)
    key_draws, key_mean, key_score = jax.random.split(jax.random.key(seed), 3)
    latents = Predictive(guide, params=result.params, num_samples=500)(key_draws, x, y)
    draws = Predictive(grown, posterior_samples=latents)(key_mean, x_test)
    each = log_likelihood(grown, latents, x_test, y_test)["y"]
    nll = -(jax.scipy.special.logsumexp(each, 0) - jnp.log(len(each))).mean()
    error = jnp.mean((draws["y"].mean(0) - y_test) ** 2)
    elbo = -Trace_ELBO(num_particles=1000).loss(key_score, result.params, grown, guide, x, y)
    last = result.history[-1]
    return float(elbo), float(error), float(nll), last.num_dendrites, last.epoch


def print_svi(num_seeds, fast):
    width, num_sets, num_epochs, epoch_steps = 3, 3, *((1, 20) if fast else (5, 400))
    x, y = datasets.make_friedman1(2000, n_features=5, noise=1.0, random_state=0)
    x, y = jnp.asarray((x - 0.5) * 12**0.5, jnp.float32), jnp.asarray((y - 14.4) / 4.9, jnp.float32)
    rows = {}
    for seed in tqdm(range(num_seeds), desc="SVI"):
        order = np.random.default_rng(seed).permutation(len(x))
        data = [(x[part], y[part]) for part in np.split(order, 2)]
        arms = {"base": (width, 0), "grown": (width, num_sets), "wide": (4 * width, 0)}
        for arm, (units, sets) in arms.items():
            epochs = num_epochs * (1 if sets else num_sets + 1)
            result = svi_growth(seed, units, sets, epochs, epoch_steps, data)
            rows.setdefault(arm, []).append(result)
    print(f"\nSVI, Friedman 1, {num_seeds} seeds, mean ± standard deviation")
    print(f"{'':8s}{'ELBO':>16s}{'test MSE':>18s}{'test NLL':>18s}{'dendrites':>11s}{'steps':>8s}")
    for arm, results in rows.items():
        results = np.array(results)
        mean, sd = results.mean(0), results.std(0, ddof=1)
        texts = [f"{mean[0]:.0f} ± {sd[0]:.0f}", *(f"{mean[i]:.3f} ± {sd[i]:.3f}" for i in (1, 2))]
        steps = mean[4] * epoch_steps
        print(f"{arm:8s}{texts[0]:>16s}{texts[1]:>18s}{texts[2]:>18s}{mean[3]:11.1f}{steps:8.0f}")


# ---------------------------------------------------------------------------------------
# Tables.


def interval(x):
    """Return mean and half width of a 95 % interval over seeds."""
    half = scipy.stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
    return x.mean(), half


def print_table(name, is_classes, scores, sizes):
    unit, factor = ("test error, %", 100) if is_classes else ("test MSE / variance", 1)
    digits = 2 if is_classes else 3
    print(f"\n{name}, {unit}; differences paired by seed")
    print(f"{'':28s}{'parameters':>12s}{'error':>18s}{'minus base':>20s}{'minus wide':>20s}")
    for arm, score in scores.items():
        cells = [interval(factor * score)]
        cells += [interval(factor * (score - scores[other])) for other in ("base", "wide")]
        texts = [f"{mean:.{digits}f} ± {half:.{digits}f}" for mean, half in cells]
        print(f"{arm:28s}{sizes[arm].mean():12.0f}{texts[0]:>18s}{texts[1]:>20s}{texts[2]:>20s}")


def print_verdicts(verdicts):
    print(
        "\nEvidence masks against a dendrite for every neuron: added parameters, error difference"
    )
    for name, is_classes, scores, sizes, _ in verdicts:
        factor, digits = (100, 2) if is_classes else (1, 3)
        for kind in ("perforated", "partial", "partial, unfrozen"):
            masked = f"{kind}, evidence"
            added = [(sizes[arm] - sizes["base"]).mean() for arm in (masked, kind)]
            mean, half = interval(factor * (scores[masked] - scores[kind]))
            noise = "within noise" if abs(mean) <= half else "better" if mean < 0 else "worse"
            print(
                f"{name:16s}{kind:18s}{added[0]:6.0f} of {added[1]:5.0f}"
                f" ({added[0] / added[1]:4.0%})"
                f"   {mean:+.{digits}f} ± {half:.{digits}f}  {noise}"
            )

    print("\nCompression: what grew, and the smallest plain network that is as good")
    print(f"{'':16s}{'grown by':28s}{'parameters':>11s}{'error':>9s}   plain")
    for name, is_classes, scores, sizes, curve in verdicts:
        factor, digits = (100, 2) if is_classes else (1, 3)
        for arm in ("perforated", "partial, unfrozen, evidence"):
            error = scores[arm].mean()
            as_good = [size for size, plain in sorted(curve.items()) if plain.mean() <= error]
            text = f"{as_good[0]} parameters" if as_good else f"none up to {max(curve)}"
            print(
                f"{name:16s}{arm:28s}{sizes[arm].mean():11.0f}{factor * error:9.{digits}f}   {text}"
            )

    print("\nThe papers' claims: accuracy gained over the base, in % of the base's accuracy")
    print("('up to 16 %'), and parameters saved against a plain network of the same error")
    for name, is_classes, scores, sizes, curve in verdicts:
        arm = "perforated"
        gain = ""
        if is_classes:
            accuracy = 1 - scores["base"].mean(), 1 - scores[arm].mean()
            gain = f"accuracy {100 * (accuracy[1] / accuracy[0] - 1):+.1f} %, "
        as_good = [s for s, plain in sorted(curve.items()) if plain.mean() <= scores[arm].mean()]
        size = sizes[arm].mean()
        saved = f"{1 - size / as_good[0]:+.0%}" if as_good else "all plain ones are worse"
        print(f"{name:16s}{gain}parameters saved {saved}")


if __name__ == "__main__":
    main()
