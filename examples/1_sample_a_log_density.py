"""Journey 1: from a log density to ArviZ, in a script, without backpropagation.

Logistic regression on scikit-learn's breast-cancer data: which cell measurements tell a malignant
tumour? The log density is a plain JAX function; PC-Line-FMALA needs two directional derivatives of
it a step, and no gradient.
"""

import sys
from functools import partial

import arviz as az
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler

import probbp

# The ten mean measurements, standardised, and whether the tumour is malignant.
data = load_breast_cancer()
features = [str(name) for name in data.feature_names[:10]]
x = jnp.asarray(StandardScaler().fit_transform(data.data[:, :10]))
malignant = jnp.asarray(data.target == 0, dtype=x.dtype)


def logdensity_fn(position):
    logits = x @ position["beta"] + position["intercept"]
    loglikelihood = jnp.sum(malignant * logits - jax.nn.softplus(logits))
    logprior = -0.5 * (jnp.sum(position["beta"] ** 2) + position["intercept"] ** 2 / 25)
    return loglikelihood + logprior


# Four chains in one call: dispersed starts, warm-up, draws. A step moves along one random line, so
# that draws are cheap and many: every 20th is kept.
posterior = probbp.sample(
    jax.random.key(0),
    partial(probbp.pc_line_fmala, logdensity_fn),
    {"intercept": jnp.zeros(()), "beta": jnp.zeros(len(features))},
    num_warmup=4000,
    num_samples=1000,
    thinning=20,
    metric="dense",
    coords={"feature": features},
    dims={"beta": ["feature"]},
)
print(az.summary(posterior, round_to=2).to_string())

# Which coefficients are surely not zero?
az.plot_forest(posterior, var_names=["beta"], combined=True)
plt.axvline(0, color="0.7", linewidth=1)
plt.gcf().suptitle("Log odds of malignancy per standard deviation")
plt.savefig(sys.argv[1] if len(sys.argv) > 1 else "breast_cancer.png", bbox_inches="tight")
