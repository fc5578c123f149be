"""Bayesian low-rank adaptation of a small transformer: honest probabilities from 80 labels.

A transformer learns scikit-learn's digits from transposed images. Then it is adapted to upright
ones, of which 80 are labelled: by maximum likelihood, and by a posterior over the same low-rank
update (BLoB, Wang et al., 2024, arXiv:2406.11675). Its weights are not edited and stay frozen.
"""

import sys

import arviz as az
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

from probbp.diagnostics import (
    expected_calibration_error,
    negative_log_likelihood,
    reliability_diagram,
)
from probbp.models import blob, transformer

digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.images))
images = jnp.asarray(digits.images[order] / 16, jnp.float32)
labels = jnp.asarray(digits.target[order])
transposed = transformer.patches(images.transpose(0, 2, 1))
upright = transformer.patches(images)

# Pretraining, on 900 transposed digits.
params = transformer.init(jax.random.key(0), num_classes=10, max_length=16, num_features=4)
optimiser = optax.adamw(optax.cosine_decay_schedule(2e-3, 300))


@jax.jit
def pretrain(params, key):
    def step(carry, key):
        params, state = carry
        rows = jax.random.choice(key, 900, (64,))

        def loss(params):
            logits = transformer.apply(params, transposed[rows])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

        updates, state = optimiser.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = params, optimiser.init(params)
    return jax.lax.scan(step, carry, jax.random.split(key, 300))[0][0]


base = pretrain(params, jax.random.key(1))

# Any JAX function of its parameters will do; this finds the queries, values and the head in it.
lora = blob.bayesian_lora(
    transformer.apply, base, target=r"(query|value|head)\.kernel", example=(upright[:16],)
)
few, test = slice(900, 980), slice(980, None)


@jax.jit
def fit(kl_weight, base, x, y, num_steps=400):
    """Fit to 80 labels; the weight of the divergence is traced, so both fits are one program."""
    rng_key = jax.random.key(2)
    svi = blob.svi(lora, optax.adam(optax.cosine_decay_schedule(2e-3, num_steps)))

    def step(state, key):
        rows = jax.random.choice(key, 80, (16,), replace=False)
        options = {"num_data": 80, "kl_weight": kl_weight}
        return svi.update(state, base, x[rows], y=y[rows], **options)[0], None

    state = svi.init(rng_key, base, x[:16], y=y[:16])
    return svi.get_params(jax.lax.scan(step, state, jax.random.split(rng_key, num_steps))[0])


# Without the divergence the posterior's noise vanishes where the data ask it to, and its mean is
# about the maximum likelihood's; a tenth of the divergence is a sharp posterior, but no point.
likelihood, posterior = (fit(weight, base, upright[few], labels[few]) for weight in (0.0, 0.1))
draws = blob.predict(lora, jax.random.key(3), posterior, base, upright[test], num_samples=10)
probs = {
    "maximum likelihood": jax.nn.softmax(
        blob.predict(lora, jax.random.key(3), likelihood, base, upright[test], num_samples=0)[0]
    ),
    "posterior, 10 draws": jax.nn.softmax(draws).mean(0),
}

figure, axes = plt.subplots(1, 2, figsize=(10, 5), layout="constrained")
print(f"{'':22s}{'accuracy':>10s}{'NLL':>8s}{'ECE':>8s}")
for ax, (name, p) in zip(axes, probs.items(), strict=True):
    accuracy = jnp.mean(p.argmax(-1) == labels[test])
    nll = negative_log_likelihood(p, labels[test])
    ece = expected_calibration_error(p, labels[test])
    print(f"{name:22s}{accuracy:10.3f}{nll:8.3f}{ece:8.3f}")
    reliability_diagram(p, labels[test], ax=ax)
    ax.set_title(name)
figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "blob.png")

# The draws as an object for ArviZ, here the logits of one image.
data = blob.to_arviz({"logits": draws[:, 0]}, {"y": labels[test][0]})
print("\n", az.summary(data, group="posterior_predictive", kind="stats").to_string(), sep="")
