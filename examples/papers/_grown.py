"""Networks that grow dendrites in nine ways, and plain ones of all widths, under one budget."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from probbp.models.growth.acceptance import Search, propose
from probbp.ops import dendrites as ops

NUM_SETS, BATCH, RATE = 2, 32, 0.01
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
