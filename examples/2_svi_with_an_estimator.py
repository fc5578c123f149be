"""Journey 2: NumPyro's own SVI, differentiated by an estimate of the gradient.

Where do American voters place themselves between left and right? The national election study of
1996, 944 people: party, age, income, news and the size of their town, and a level for each degree
of education. The guide has 30 parameters. What are four directional derivatives worth, in place of
the gradient?
"""

import sys

import arviz as az
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from sklearn.preprocessing import StandardScaler
from statsmodels.datasets import anes96

from probbp.diagnostics import from_blackjax, gradient_quality
from probbp.estimators import forward, reverse
from probbp.models import hierarchical
from probbp.numpyro import Optim

table = anes96.load_pandas().data
features = ["PID", "age", "income", "TVnews", "logpopul"]
columns = StandardScaler().fit_transform(table[[*features, "selfLR"]])
levels, education = np.unique(table["educ"], return_inverse=True)
data = {
    "x": jnp.asarray(columns[:, :-1]),
    "group": jnp.asarray(education),
    "y": jnp.asarray(columns[:, -1]),
    "num_groups": len(levels),
}
model, guide = hierarchical.model, AutoNormal(hierarchical.model)
four = forward(num_tangents=4, tangents="orthogonal")


def fit(estimator, num_steps):
    optim = Optim(optax.adam(optax.cosine_decay_schedule(0.01, num_steps)), estimator)
    svi = SVI(model, guide, optim, Trace_ELBO())
    return svi.run(jax.random.key(0), num_steps, **data, progress_bar=False)


@jax.jit
def elbo(params, num=4000):
    """Return the evidence lower bound and its Monte Carlo error, from the same draws for all."""

    def one(key):
        return -Trace_ELBO().loss(key, params, model, guide, **data)

    values = jax.vmap(one)(jax.random.split(jax.random.key(1), num))
    return values.mean(), values.std() / num**0.5


# Four directional derivatives cost as much as two or three gradients, and tell less than one. They
# are no bargain here: forward mode is for models that reverse mode can't take or hold.
runs = {
    "reverse mode, 4,000 steps": (reverse(), 4_000, 1),
    "forward, 4 tangents, 4,000 steps": (four, 4_000, 4),
    "forward, 4 tangents, 16,000 steps": (four, 16_000, 4),
}
results, bounds = {}, {}
print(f"{'':36s}{'ELBO':>18s}{'short of the first':>20s}{'derivatives':>13s}")
for name, (estimator, num_steps, derivatives) in runs.items():
    results[name] = fit(estimator, num_steps)
    bounds[name], error = elbo(results[name].params)
    best = bounds["reverse mode, 4,000 steps"]
    short = (best - bounds[name]) / abs(best)
    cost = num_steps * derivatives
    print(f"{name:36s}{bounds[name]:10.2f} +- {error:.2f}{short:19.2%}{cost:14,d}")

# What the estimate is worth near the start of the fit: unbiased, relative variance d / k - 1.
first = fit(reverse(), num_steps=10).params


def loss(params):
    return Trace_ELBO().loss(jax.random.key(3), params, model, guide, **data)


print("\n", gradient_quality(jax.random.key(2), four, loss, first), "\n", sep="")

# The fit as an object for ArviZ: one chain of independent draws from the guide.
last = results["forward, 4 tangents, 16,000 steps"].params
draws = guide.sample_posterior(jax.random.key(4), last, sample_shape=(1, 4000))
posterior = from_blackjax(draws, dims={"beta": ["feature"]}, coords={"feature": features})
print(
    "\n", az.summary(posterior, var_names=["mu", "tau", "beta"], kind="stats", round_to=3), sep=""
)

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for name, result in results.items():
    losses = -np.asarray(result.losses).reshape(-1, 50).mean(axis=1)
    axes.plot(50 * np.arange(1, len(losses) + 1), losses, label=name, linewidth=1)
axes.set(xscale="log", xlabel="step", ylabel="ELBO, mean of 50 steps", ylim=(-1300, -1100))
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False)
figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "svi.png")
