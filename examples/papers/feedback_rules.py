"""What random feedback weights are worth: on digits, in an encoder, in Monte Carlo.

Song, Xu & Lafferty, 2021, arXiv:2106.06044, study networks whose error is sent back through random
weights (`feedback.py`). Such a rule is of use where it learns about as well as backpropagation does
(Lillicrap et al., 2016), and with it the rules that know more of the weights.

    python examples/papers/feedback_rules.py [--fast]

1. Digits, a multilayer perceptron 64-128-128-10: rules beside backpropagation and beside training
   the last layer alone.
2. A variational autoencoder's encoder trained through feedback weights, model exact.
3. Hamiltonian Monte Carlo of a Bayesian network with the error sent back through feedback weights:
   exact, and how slow.

Intervals are 95 % of the mean over seeds, by Student's t. Single precision.
"""

import time
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
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import HMC, MCMC
from numpyro.infer.util import initialize_model
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from probbp.models import bnn
from probbp.ops import feedback


def main() -> None:
    arguments = parsed(parser(__doc__))
    start = time.perf_counter()
    found = {}
    parts = {"digits": digits, "autoencoder": autoencoder, "Monte Carlo": monte_carlo}
    run({title: partial(part, found) for title, part in parts.items()}, arguments.fast)
    print(f"\n{time.perf_counter() - start:.0f} seconds, JAX {jax.__version__}")

    right, gaps = found["digits"], found["gaps"]
    random, exact = right["random", 0.0], right["backpropagation", 0.0]
    figure, axes = panels(2)
    best = {rule: right[rule, 0.0] - exact for rule, decay in right if decay == 0.0}
    draw(axes[0], {rule: values for rule, values in best.items() if rule != "backpropagation"})
    axes[0].set(xlabel="accuracy less backpropagation's [points]", title="Digits")
    draw(axes[1], gaps)
    axes[1].set(xlabel="divergence from the posterior [nats]", title="An encoder")
    write(
        arguments,
        paper=FEEDBACK,
        claim="Random feedback weights train a network, hidden layers too, about as well as "
        "backpropagation.",
        setting=f"Digits, a perceptron 64-128-128-10, {len(random)} seeds; an encoder 20-64-64-4 "
        f"of a linear Gaussian model, {len(gaps['random'])} seeds; no weight decay.",
        ours=over_seeds("test accuracy, random weights", random, "%"),
        baseline=over_seeds("backpropagation, as many epochs", exact, "%"),
        checks=[
            above(
                "digits: within a point of backpropagation",
                over_seeds("random less backpropagation, paired", random - exact, "points"),
                -1.0,
            ),
            above(
                "digits: hidden layers learn",
                over_seeds(
                    "random less training the last layer alone, paired",
                    random - right["last layer alone", 0.0],
                    "points",
                ),
            ),
            below(
                "encoder: within 0.1 nats of backpropagation",
                over_seeds(
                    "divergence, random less backpropagation, paired",
                    gaps["random"] - gaps["backpropagation"],
                    "nats",
                ),
                0.1,
            ),
            below(
                "encoder: hidden layers learn",
                over_seeds(
                    "divergence, random less the last layer alone, paired",
                    gaps["random"] - gaps["last layer alone"],
                    "nats",
                ),
            ),
        ],
        figure=figure,
        caption="Rules that send the error back, with 95 % intervals: accuracy on digits beside "
        "backpropagation's, and what an encoder's Gaussian lacks after the last step.",
    )


def draw(ax, values):
    figures = [over_seeds("", each) for each in values.values()]
    means = [figure.mean for figure in figures]
    ax.errorbar(means, range(len(means)), xerr=[f.high - f.mean for f in figures], fmt="o")
    ax.set_yticks(range(len(means)), list(values))


# ---------------------------------------------------------------------------------------
# 1. Digits.

SIZES = (64, 128, 128, 10)
RULES = {
    "backpropagation": lambda kernel, b: (kernel, kernel),
    "last layer alone": lambda kernel, b: (kernel, jnp.zeros_like(b)),
    "random": lambda kernel, b: (kernel, b),
    "uniform sign": lambda kernel, b: (kernel, feedback.uniform_sign(kernel)),
    "fixed magnitude": lambda kernel, b: (kernel, feedback.fixed_magnitude(kernel, b)),
    "Kolen-Pollack": lambda kernel, b: (feedback.kolen_pollack(kernel, b), b),
}


def perceptron(rng_key, sizes):
    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    keys = jax.random.split(rng_key, len(sizes) - 1)
    return [
        {"kernel": jax.random.normal(key, (n, m)) / n**0.5, "bias": jnp.zeros(m)}
        for key, (n, m) in zip(keys, pairs, strict=True)
    ]


def apply(layers, weights, rule, x):
    for i, (layer, b) in enumerate(zip(layers, weights, strict=True)):
        kernel, back = RULES[rule](layer["kernel"], b)
        x = feedback.dense(jnp.tanh(x) if i else x, kernel, back) + layer["bias"]
    return x


def layer_functions(layers):
    *hidden, last = layers
    functions = [lambda h, p=p: jnp.tanh(h @ p["kernel"] + p["bias"]) for p in hidden]
    return [*functions, lambda h: h @ last["kernel"] + last["bias"]]


DIGITS = (  # rule, weight decay
    ("last layer alone", 0.0),
    ("backpropagation", 0.0),
    ("backpropagation", 1e-3),
    ("random", 0.0),
    ("random", 1e-3),
    ("random", 1e-2),
    ("direct", 0.0),
    ("uniform sign", 0.0),
    ("fixed magnitude", 0.0),
    ("Kolen-Pollack", 0.0),
    ("Kolen-Pollack", 1e-3),
)


def digits(found, fast):
    parts = train_test_split(*load_digits(return_X_y=True), test_size=0.3, random_state=0)
    train_x, test_x = (jnp.asarray(part / 16, jnp.float32) for part in parts[:2])
    train_y, test_y = (jnp.asarray(part) for part in parts[2:])
    seeds = jax.random.split(jax.random.key(7), 3 if fast else 10)
    num_epochs, batch = 4 if fast else 40, 100
    rows_used = len(train_x) // batch * batch

    def cross_entropy(y, logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def loss(rule, layers, weights, x, y):
        if rule == "direct":
            return feedback.direct(partial(cross_entropy, y), layer_functions(layers), x, weights)
        return cross_entropy(y, apply(layers, weights, rule, x))

    def fit(rule, weight_decay, key):
        key_layers, key_weights, key_batches = jax.random.split(key, 3)
        layers = perceptron(key_layers, SIZES)
        if rule == "direct":
            weights = feedback.direct_weights(key_weights, layer_functions(layers), train_x)
        else:
            weights = feedback.normal(key_weights, [layer["kernel"] for layer in layers])
        # Kernels decay, and with Kolen & Pollack's rule the feedback weights with them.
        argnums = (0, 1) if rule == "Kolen-Pollack" else (0,)
        grad_of = jax.grad(partial(loss, rule), argnums)
        params = (layers, weights)[: len(argnums)]
        mask = jax.tree.map(lambda leaf: leaf.ndim == 2, params)
        optimiser = optax.chain(
            optax.add_decayed_weights(weight_decay, mask), optax.sgd(0.1, momentum=0.9)
        )

        def step(carry, rows):
            params, state = carry
            layers, b = (*params, weights)[:2]
            updates, state = optimiser.update(
                grad_of(layers, b, train_x[rows], train_y[rows]), state, params
            )
            return (optax.apply_updates(params, updates), state), None

        def epoch(carry, key):
            rows = jax.random.permutation(key, len(train_x))[:rows_used].reshape(-1, batch)
            return jax.lax.scan(step, carry, rows)[0], None

        carry = params, optimiser.init(params)
        (params, _), _ = jax.lax.scan(epoch, carry, jax.random.split(key_batches, num_epochs))
        layers, b = (*params, weights)[:2]
        logits = layer_functions(layers)
        h = test_x
        for layer in logits:
            h = layer(h)
        accuracy = (h.argmax(-1) == test_y).mean()
        ours = grad_of(layers, b, train_x, train_y)[0]
        theirs = jax.grad(partial(loss, "backpropagation"))(
            layers, [p["kernel"] for p in layers], train_x, train_y
        )
        cosines = [feedback.alignment(ours, theirs)[i]["kernel"] for i in (0, 1)]
        if rule == "direct":
            aligned = [jnp.nan, jnp.nan]
        else:
            backs = [RULES[rule](p["kernel"], w)[1] for p, w in zip(layers, b, strict=True)]
            aligned = [feedback.alignment(layers[i]["kernel"], backs[i]) for i in (1, 2)]
        return jnp.stack([100 * accuracy, *cosines, *aligned])

    results = {
        setting: np.asarray(jax.jit(jax.vmap(partial(fit, *setting)))(seeds)) for setting in DIGITS
    }
    found["digits"] = {setting: scores[:, 0] for setting, scores in results.items()}
    title = f"1. Digits, {'-'.join(map(str, SIZES))}, {num_epochs} epochs, {len(seeds)} seeds"
    return [title, *digits_table(results)]


def digits_table(results):
    lines = [
        f"{'':18s}{'decay':>7s}{'test accuracy [%]':>20s}{'beyond the last layer':>23s}"
        f"{'beside backpropagation':>24s}"
        f"{'gradient, layer 1':>19s}{'layer 2':>17s}{'weights, layer 2':>18s}{'layer 3':>17s}",
    ]
    least, most = (results[setting][:, 0] for setting in DIGITS[:2])
    for (rule, weight_decay), scores in results.items():
        cells = [shown(scores[:, i], 2) if np.isfinite(scores[0, i]) else "-" for i in range(1, 5)]
        lines.append(
            f"{rule:18s}{weight_decay:7g}{shown(scores[:, 0], 2):>20s}"
            f"{shown(scores[:, 0] - least, 2):>23s}{shown(scores[:, 0] - most, 2):>24s}"
            f"{cells[0]:>19s}{cells[1]:>17s}{cells[2]:>18s}{cells[3]:>17s}"
        )
    return lines


# ---------------------------------------------------------------------------------------
# 2. An encoder. The model is linear and Gaussian, so that the gap of the ELBO is known.


def autoencoder(found, fast):
    steps = (20, 50) if fast else (100, 300, 800)
    seeds = jax.random.split(jax.random.key(8), 3 if fast else 10)
    noise = 0.5
    loading = jax.random.normal(jax.random.key(9), (2, 20))
    precision = jnp.eye(2) + loading @ loading.T / noise**2
    covariance = jnp.linalg.inv(precision)

    def simulate(key, num):
        key_z, key_x = jax.random.split(key)
        z = jax.random.normal(key_z, (num, 2))
        return z @ loading + noise * jax.random.normal(key_x, (num, 20))

    def gap(out, x):
        """The divergence of the encoder's Gaussian from the posterior, nats a record."""
        mean, scale = out[:, :2], jnp.exp(out[:, 2:])
        shift = mean - x @ loading.T @ covariance / noise**2
        quadratic = jnp.einsum("ni,ij,nj->n", shift, precision, shift)
        trace = jnp.sum(jnp.diag(precision) * scale**2, -1)
        volume = -jnp.linalg.slogdet(precision)[1] - 2 * jnp.sum(out[:, 2:], -1)
        return jnp.mean(quadratic + trace - 2 + volume) / 2

    def negative_elbo(layers, weights, rule, x, key):
        out = apply(layers, weights, rule, x)
        mean, log_scale = out[:, :2], out[:, 2:]
        z = mean + jnp.exp(log_scale) * jax.random.normal(key, mean.shape)
        likelihood = jnp.sum((x - z @ loading) ** 2, -1) / (2 * noise**2)
        return jnp.mean(likelihood + jnp.sum(z**2 / 2 - log_scale, -1))

    test = simulate(jax.random.key(10), 2_000)

    def fit(rule, key):
        key_layers, key_weights, key_steps = jax.random.split(key, 3)
        layers = perceptron(key_layers, (20, 64, 64, 4))
        weights = feedback.normal(key_weights, [layer["kernel"] for layer in layers])
        optimiser = optax.adam(3e-3)

        def step(carry, key):
            (layers, b), state = carry
            key_x, key_z = jax.random.split(key)
            x = simulate(key_x, 256)
            grads = jax.grad(negative_elbo, (0, 1))(layers, b, rule, x, key_z)
            updates, state = optimiser.update(grads, state)
            layers, b = optax.apply_updates((layers, b), updates)
            out = apply(layers, b, rule, test)
            return ((layers, b), state), gap(out, test)

        carry = (layers, weights), optimiser.init((layers, weights))
        _, gaps = jax.lax.scan(step, carry, jax.random.split(key_steps, steps[-1]))
        return gaps[jnp.array(steps) - 1]

    lines = [
        "2. An encoder 20-64-64-4 of a linear Gaussian model: divergence from the posterior, nats "
        f"a record, {len(seeds)} seeds",
        f"{'':18s}" + "".join(f"{f'{num} steps':>20s}" for num in steps),
    ]
    for rule in RULES:
        gaps = jax.jit(jax.vmap(partial(fit, rule)))(seeds)
        found.setdefault("gaps", {})[rule] = np.asarray(gaps[:, -1])
        lines.append(f"{rule:18s}" + "".join(f"{shown(column, 2):>20s}" for column in gaps.T))
    return lines


# ---------------------------------------------------------------------------------------
# 3. A Bayesian network, 49 weights, in NumPyro's own HMC.


def monte_carlo(found, fast):
    num_chains, num_samples = (2, 100) if fast else (8, 1_000)
    key_x, key_y, key_start, key_weights = jax.random.split(jax.random.key(11), 4)
    x = jax.random.normal(key_x, (50, 2))
    y = jnp.sin(x[:, 0]) * x[:, 1] + 0.1 * jax.random.normal(key_y, (50,))
    network = partial(bnn.model, widths=(12,), noise_scale=0.3)
    info = initialize_model(key_start, network, model_args=(x, y))
    mode = descent(info.potential_fn, info.param_info.z)
    at_mode = [mode["weight_0"], mode["weight_1"]]
    random = feedback.normal(key_weights, at_mode)
    rules = {
        "exact": jnp.matmul,
        "uniform sign": lambda x, w: feedback.dense(x, w, feedback.uniform_sign(w)),
        "the mode's weights": [partial(feedback.dense, feedback=b) for b in at_mode],
        "random": [partial(feedback.dense, feedback=b) for b in random],
    }
    probe = jax.random.normal(jax.random.key(12), (5, 2))
    lines = [
        f"3. HMC, ten leapfrog steps, {sum(leaf.size for leaf in mode.values())} parameters, "
        f"{num_chains} chains of {num_samples} from the mode",
        f"{'':20s}{'step size':>10s}{'acceptance':>12s}{'ESS/1000':>10s}{'R-hat':>8s}"
        f"{'prediction':>20s}{'of its square':>16s}",
    ]
    for name, dense in rules.items():
        for step_size in (0.04, 0.02, 0.01, 0.0025, None):
            kernel = HMC(
                partial(network, dense=dense),
                step_size=step_size or 0.01,
                num_steps=10,
                trajectory_length=None,
                adapt_step_size=step_size is None,
                adapt_mass_matrix=False,
            )
            mcmc = MCMC(
                kernel,
                num_warmup=500 if step_size is None and not fast else 100,
                num_samples=num_samples,
                num_chains=num_chains,
                chain_method="vectorized",
                progress_bar=False,
            )
            start = jax.tree.map(lambda leaf: jnp.stack([leaf] * num_chains), mode)
            mcmc.run(
                jax.random.key(13),
                x,
                y,
                init_params=start,
                extra_fields=("accept_prob", "adapt_state.step_size"),
            )
            fields = mcmc.get_extra_fields()
            draws = mcmc.get_samples(group_by_chain=True)
            outputs = np.asarray(predicted(draws, probe))
            acceptance = float(fields["accept_prob"].mean())
            lines.append(
                f"{name:20s}{float(np.mean(fields['adapt_state.step_size'])):10.4f}"
                f"{'  tuned' if step_size is None else '':7s}"
                f"{acceptance:5.2f}" + summary(outputs, acceptance, num_samples)
            )
    return lines


def descent(potential_fn, start, num_steps=3_000):
    optimiser = optax.adam(0.01)

    def step(carry, _):
        z, state = carry
        updates, state = optimiser.update(jax.grad(potential_fn)(z), state)
        return (optax.apply_updates(z, updates), state), None

    return jax.jit(lambda z: jax.lax.scan(step, (z, optimiser.init(z)), length=num_steps)[0][0])(
        start
    )


def predicted(draws, x):
    hidden = jnp.tanh(x @ draws["weight_0"] + draws["bias_0"][..., None, :])
    return (hidden @ draws["weight_1"] + draws["bias_1"][..., None, :])[..., 0]


def summary(outputs, acceptance, num_samples):
    """Effective draws of the predictions, for a thousand iterations of a chain."""
    if acceptance < 0.005:
        return f"{'stuck':>10s}"
    chains = outputs.shape[0]
    size = effective_sample_size(outputs).min()
    means = outputs.mean(1)
    within = outputs.var(1, ddof=1).mean(0)
    rhat = np.sqrt((within + means.var(0, ddof=1)) / within).max()
    first, second = outputs[..., 0].mean(1), (outputs[..., 0] ** 2).mean(1)
    return (
        f"{1e3 * size / (chains * num_samples):10.1f}{rhat:8.3f}"
        f"{shown(first):>20s}{shown(second):>16s}"
    )


if __name__ == "__main__":
    main()
