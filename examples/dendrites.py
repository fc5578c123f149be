"""Where a small network grows dendrites: five hidden units that read scikit-learn's digits.

A Flax model, unedited, learns until its validation loss stops falling. Then a dendrite is sought
for each of its neurons, and those are added that the evidence asks for; they start without weight,
so that nothing changes, and are trained with all else (after Brenner & Itti, 2025,
arXiv:2501.18018, whose dendrites are frozen, and one for every neuron).
"""

import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from probbp.models.growth import from_loss, from_nnx, grow

digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.images))
images = jnp.asarray(digits.data[order] / 8 - 1, jnp.float32)
labels = jnp.asarray(digits.target[order])
train, validation, test = (
    (images[rows], labels[rows]) for rows in (slice(900), slice(900, 1300), slice(1300, None))
)

model = nnx.Sequential(
    nnx.Linear(64, 5, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(5, 10, rngs=nnx.Rngs(1))
)
apply, params = from_nnx(model)


def losses(params, layer, batch):
    logits = apply(params, layer, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])


def loss(params, layer, batch, rng_key):
    return losses(params, layer, batch).mean()


# The slots are laid out at once, so that nothing is compiled twice.
host = from_loss(loss, params, optax.adam(5e-3), train, validation, slots=2)
options = {"patience": 12, "max_epochs": 100}
grown = grow(jax.random.key(0), host, max_sets=2, **options)
# The same network without dendrites, for as many epochs.
num_epochs = grown.history[-1].epoch
base = grow(jax.random.key(0), host, max_sets=0, patience=num_epochs, max_epochs=num_epochs)

print("\nNegative log likelihood of a test image, wrong test images, parameters")
print(f"{'':8s}{'mean':>8s}{'sd':>8s}{'wrong':>8s}{'parameters':>12s}")
num_base = sum(leaf.size for leaf in jax.tree.leaves(params))
for name, result in {"base": base, "grown": grown}.items():
    layer = host.layer(result.dendrites)
    nll = losses(result.params, layer, test)
    wrong = jnp.mean(apply(result.params, layer, test[0]).argmax(-1) != test[1])
    num_params = num_base + result.history[-1].num_params
    print(f"{name:8s}{nll.mean():8.3f}{nll.std():8.3f}{wrong:8.3f}{num_params:12d}")

# A row for each hidden unit: what it reads, and what its dendrites read where it has some, weights
# times the spread of their pixels. The bars count the dendrites of each class's output neuron.
layers = sorted(grown.dendrites)
hidden, out = (grown.dendrites[name] for name in layers)
figure = plt.figure(figsize=(11, 6), layout="constrained")
left, right = figure.subfigures(1, 2)
axes = right.subplots(5, 3)
kernel = nnx.to_pure_dict(grown.params)["layers"][0]["kernel"]
for unit, row in enumerate(axes):
    pictures = [kernel[:, unit], *hidden.kernel[:, :, unit]]
    for ax, picture, there in zip(row, pictures, [1, *hidden.mask[:, unit]], strict=True):
        ax.axis("off")
        if there:
            picture = picture * train[0].std(0)
            limit = jnp.abs(picture).max()
            ax.imshow(picture.reshape(8, 8), cmap="RdBu", vmin=-limit, vmax=limit)
for ax, title in zip(axes[0], ("hidden unit", "first dendrite", "second dendrite"), strict=True):
    ax.set_title(title)
top, bottom = left.subplots(2, 1)
epochs = [(event.epoch, -event.score) for event in grown.history if event.kind == "neurons"]
top.semilogy(*zip(*epochs, strict=True), label="grown")
epochs = [(event.epoch, -event.score) for event in base.history if event.kind == "neurons"]
top.semilogy(*zip(*epochs, strict=True), label="base", alpha=0.6)
for event in grown.history:
    if event.kind == "grown":
        top.axvline(event.epoch, color="grey", linestyle=":")
        top.text(event.epoch, 2, f"{event.num_dendrites} dendrites", rotation=90, va="top")
top.set(xlabel="epoch", ylabel="validation loss")
top.legend()
bottom.bar(range(10), out.mask.sum(0))
bottom.set(xlabel="class", ylabel="dendrites of its output", xticks=range(10), ylim=(0, 2.2))
figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "dendrites.png", dpi=100)
