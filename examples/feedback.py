"""A network learns although its error comes back through random weights.

Backpropagation sends the error of a layer back through the transpose of the weights that sent the
signal forward. Random ones do too (feedback alignment, Lillicrap et al., 2014, arXiv:1411.0247),
and weights that know the signs, or learn beside the forward ones, do better. Here on handwritten
digits, with a network of Flax's that knows nothing of it. The last layer alone gets 93 % right:
what a rule is worth is what it adds to that.
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from probbp.models.feedback import LearntFeedback, stored, with_feedback
from probbp.ops import feedback

digits = load_digits(return_X_y=True)
train_x, test_x, train_y, test_y = train_test_split(*digits, test_size=0.3, random_state=0)
train_x, test_x = jnp.asarray(train_x / 16), jnp.asarray(test_x / 16)
train_y, test_y = jnp.asarray(train_y), jnp.asarray(test_y)
num_epochs, batch_size = 20, 128


def network(rng_key):
    rngs = nnx.Rngs(rng_key)
    sizes = zip((64, 128, 128), (128, 128, 10), strict=True)
    first, second, last = (nnx.Linear(n, m, rngs=rngs) for n, m in sizes)
    return nnx.Sequential(first, jnp.tanh, second, jnp.tanh, last)


# A rule makes feedback weights from the kernel and from weights that are drawn once and stored.
rules = {
    "backpropagation": lambda kernel, b: kernel,
    "Kolen-Pollack": stored,
    "signs, one magnitude": lambda kernel, b: feedback.uniform_sign(kernel),
    "signs, random magnitudes": feedback.fixed_magnitude,
    "random": stored,
    "none: the last layer alone": lambda kernel, b: jnp.zeros_like(kernel),
}


def loss(net, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(net(x), y).mean()


@partial(jax.jit, static_argnums=(0, 1))
@partial(jax.vmap, in_axes=(None, None, 0))
def fit(rule, learns, rng_key):
    """Return test accuracy and the cosine of the first kernel's gradient to the true one."""
    key_network, key_feedback, key_batches = jax.random.split(rng_key, 3)
    net = with_feedback(network(key_network), key_feedback, rule=rule, learns=learns)
    # Only what is an nnx.Param is trained, which stored feedback weights are not.
    graph, params, kept = nnx.split(net, nnx.Param, ...)
    optimiser = optax.sgd(0.1, momentum=0.9)

    def grad_of(params, x, y):
        return jax.grad(lambda params: loss(nnx.merge(graph, params, kept), x, y))(params)

    def exact_grad(params, x, y):
        """The same forward pass, differentiated as it is."""
        plain = network(key_network)
        nnx.update(plain, nnx.filter_state(params, nnx.Not(LearntFeedback)))
        return nnx.grad(loss)(plain, x, y)

    def step(carry, rows):
        params, state = carry
        grads = grad_of(params, train_x[rows], train_y[rows])
        updates, state = optimiser.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry, key):
        rows = jax.random.permutation(key, len(train_x))
        rows = rows[: len(rows) // batch_size * batch_size].reshape(-1, batch_size)
        carry, _ = jax.lax.scan(step, carry, rows)
        params = carry[0]
        right = nnx.merge(graph, params, kept)(test_x).argmax(-1) == test_y
        ours, theirs = (
            grad(params, train_x, train_y)["layers"][0]["kernel"][...]
            for grad in (grad_of, exact_grad)
        )
        return carry, (right.mean(), feedback.alignment(ours, theirs))

    keys = jax.random.split(key_batches, num_epochs)
    return jax.lax.scan(epoch, (params, optimiser.init(params)), keys)[1]


figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
keys = jax.random.split(jax.random.key(0), 5)
lines = []
for name, rule in rules.items():
    accuracy, cosine = fit(rule, name == "Kolen-Pollack", keys)
    line = left.plot(np.arange(1, num_epochs + 1), 100 * accuracy.mean(0), label=name)
    low, high = 100 * accuracy.min(0), 100 * accuracy.max(0)
    left.fill_between(np.arange(1, num_epochs + 1), low, high, alpha=0.15)
    right.plot(np.arange(1, num_epochs + 1), cosine.mean(0), color=line[0].get_color())
    last = 100 * accuracy[:, -1]
    lines.append(f"{name:28s}{last.mean():8.2f}{last.std(ddof=1):8.2f}{cosine[:, -1].mean():8.2f}")
left.set(xlabel="epoch", ylabel="test accuracy [%], five seeds", ylim=(90, 99))
right.set(xlabel="epoch", ylabel="cosine to the gradient, first layer", ylim=(-0.05, 1.05))
left.legend(loc="lower right")
figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "feedback.png")

print("test accuracy [%] over five seeds, and the first layer's cosine to its gradient")
print(f"{'':28s}{'mean':>8s}{'sd':>8s}{'cosine':>8s}")
print("\n".join(lines))
