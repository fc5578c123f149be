"""A Bayesian spiking network of handwritten digits, trained by rates.

python examples/rate.py [picture.png]
"""

import sys
from functools import partial

import arviz as az
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from numpyro.infer import SVI, Predictive, TraceMeanField_ELBO
from sklearn.datasets import load_digits

from probbp.diagnostics import (
    expected_calibration_error,
    from_blackjax,
    negative_log_likelihood,
)
from probbp.models import snn
from probbp.ops import rate

num_steps = 16
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
x, y = jnp.asarray(images[order] / 8), jnp.asarray(labels[order])
train, test = slice(0, 300), slice(900, None)

# The network is one step of time: Flax's layers, and neurons where it calls `spike`. The pixels are
# currents, the same in every step; the readout's mean over time are the logits.
network = snn.MLP((64, 128, 128, 10), rngs=nnx.Rngs(0))


# Are rates enough to train it? The cosines of the two gradients, for every array of weights.
def loss(params, gradient):
    net = nnx.merge(nnx.graphdef(network), params)
    logits = rate.simulate(net, rate.constant(x[train]), num_steps, gradient=gradient)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y[train]).mean()


cosines = rate.agreement(loss, nnx.state(network))
print(f"smallest cosine to the gradient through time: {min(jax.tree.leaves(cosines)):.4f}\n")

# A posterior over the weights, by NumPyro's SVI: the ELBO is that of the simulated network, its
# gradient goes back through rates, in memory that does not grow with the number of steps. There are
# 26,000 weights and 300 labels: a posterior at temperature 1 would be little more than its prior.
model = partial(snn.model, network=network, num_steps=num_steps, temperature=0.03)
guide = snn.guide(model, network)
svi = SVI(model, guide, optax.adam(optax.cosine_decay_schedule(1e-2, 300)), TraceMeanField_ELBO())
result = svi.run(jax.random.key(1), 300, x[train], y[train], progress_bar=False)

draws = Predictive(model, guide=guide, params=result.params, num_samples=32)(
    jax.random.key(2), x[test]
)
each = jax.nn.softmax(draws["logits"])
print(f"{'':18s}{'accuracy':>10s}{'NLL':>8s}{'ECE':>8s}")
for name, probs in {"one draw": each[0], "mean of 32 draws": each.mean(0)}.items():
    accuracy = jnp.mean(probs.argmax(-1) == y[test])
    nll = negative_log_likelihood(probs, y[test])
    ece = expected_calibration_error(probs, y[test])
    print(f"{name:18s}{accuracy:10.3f}{nll:8.3f}{ece:8.3f}")

# The image of which the posterior is least sure.
probs = each.mean(0)
unsure = int(jnp.argmax(-jnp.sum(probs * jnp.log(probs), axis=-1)))
data = from_blackjax(
    {"probability": each[None, :, unsure]},
    dims={"probability": ["digit"]},
    coords={"digit": np.arange(10)},
)
print("\n", az.summary(data, kind="stats", round_to=3).to_string(), sep="")

for i, layer in enumerate(network.hidden):  # the neurons in the middle of the posterior
    layer.kernel[...] = guide.median(result.params)[f"network/hidden.{i}.kernel"]
    layer.bias[...] = guide.median(result.params)[f"network/hidden.{i}.bias"]
image = x[test][unsure]
trains, _ = rate.spike_trains(network, rate.constant(image), num_steps)
figure, (left, middle, right) = plt.subplots(
    1, 3, figsize=(11, 4), width_ratios=[1, 2, 1.5], layout="constrained"
)
left.imshow(image.reshape(8, 8), cmap="gray_r")
left.set(title=f"a {y[test][unsure]}", xticks=[], yticks=[])
offset = 0
for layer, train_of in enumerate(trains):
    train_of = train_of[:, np.argsort(train_of.mean(0))]
    steps, neurons = np.nonzero(train_of)
    middle.scatter(steps + 1, neurons + offset, marker="|", s=12, label=f"layer {layer + 1}")
    offset += train_of.shape[1]
middle.set(xlabel="step", ylabel="neuron, by rate in its layer", title="its spikes")
middle.legend(loc="lower right")
right.boxplot(np.asarray(each[:, unsure]), tick_labels=np.arange(10))
right.set(xlabel="digit", ylabel="probability", title="32 draws of the posterior")
for ax in (middle, right):
    ax.spines[["top", "right"]].set_visible(False)
figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "rate.png")
