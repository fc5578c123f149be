"""Complete digits whose lower half is hidden, and ask for classes, with a diffusion prior.

A small network learns to denoise scikit-learn's digits. Sampled from, it is a prior: noise
x_T ~ N(0, I) becomes a digit x_0. Given is its upper half, or the class that a logistic regression
sees in it; the network was told of neither. NumPyro's SVI finds the noise, with derivatives through
one, some and all of the 25 steps of the sampler (Shortcut Diffusion Optimization, Dou et al., 2025,
arXiv:2505.07477); detached steps pass them on as for Gaussian data. The ELBO is the same function.
"""

import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from probbp.models import diffusion
from probbp.ops import sdo

data = load_digits()
digits = jnp.asarray(data.data / 8 - 1, jnp.float32)
schedule = sdo.cosine(25)
network = diffusion.train(
    jax.random.key(0),
    diffusion.Denoiser((64,), width=192, num_blocks=2, rngs=nnx.Rngs(0)),
    digits[100:],
    schedule,
    num_steps=800,
    progress_bar=sys.stderr.isatty(),
).network
path = sdo.gaussian_path(np.cov(np.asarray(digits).T))
sampler = partial(sdo.sample, network, schedule=schedule, prediction="v", surrogate=path)

# What is seen of digits that were kept from the network, and who tells classes.
truth, seen, hidden = digits[jnp.array([10, 13, 15, 28])], slice(0, 32), slice(32, 64)
fitted = LogisticRegression(C=0.1, max_iter=2000).fit(np.asarray(digits[100:]), data.target[100:])
weights, bias = (jnp.asarray(a, jnp.float32) for a in (fitted.coef_.T, fitted.intercept_))


def model(half, label, keep_step):
    options = {"prediction": "v", "surrogate": path, "keep_step": keep_step}
    with numpyro.plate("digits", len(half if label is None else label)):
        x = diffusion.prior("x", network, (64,), schedule, **options)
        if half is not None:
            numpyro.sample("half", dist.Normal(x[:, seen], 0.2).to_event(1), obs=half)
        if label is not None:  # asked for five times, so to say
            logits = 5 * (x @ weights + bias)
            numpyro.sample("label", dist.Categorical(logits=logits), obs=label)


def fit(keep_step, half=None, label=None):
    """Return draws of the digits, the ELBO over steps and the milliseconds of one."""
    fixed = partial(model, half, label, keep_step)
    guide = AutoNormal(fixed, init_scale=0.3)
    svi = SVI(fixed, guide, optax.adam(0.05), Trace_ELBO(num_particles=4))
    state = svi.init(jax.random.key(1))
    update = jax.jit(svi.update).lower(state).compile()
    begin, losses = time.perf_counter(), []
    for _ in range(140):
        state, loss = update(state)
        losses.append(float(loss))
    ms = 1e3 * (time.perf_counter() - begin) / len(losses)
    params = svi.get_params(state)
    noise = guide.sample_posterior(jax.random.key(2), params, sample_shape=(200,))["x_noise"]
    return sampler(noise.reshape(-1, 64)).reshape(noise.shape), -np.array(losses), ms


keeps = {"first step": "first", "all steps": "all"}
fits = {name: fit(keep, half=truth[:, seen]) for name, keep in keeps.items()}
print(
    f"ELBO over the last 50 steps, milliseconds a step; of the hidden half the error of the mean\n"
    f"and the share of pixels within 90 % intervals\n{'':12s}{'mean':>9s}{'sd':>7s}{'ms':>7s}"
    f"{'rmse':>7s}{'cover':>7s}"
)
for name, (x, elbo, ms) in fits.items():
    rmse = jnp.sqrt(jnp.mean((x.mean(0) - truth)[:, hidden] ** 2))
    low, high = jnp.quantile(x[..., hidden], jnp.array([0.05, 0.95]), axis=0)
    cover = jnp.mean((truth[:, hidden] >= low - 0.1) & (truth[:, hidden] <= high + 0.1))
    print(
        f"{name:12s}{elbo[-50:].mean():9.1f}{elbo[-50:].std():7.1f}{ms:7.1f}{rmse:7.2f}{cover:7.2f}"
    )

guided, _, _ = fit("first", label=jnp.arange(10))
told = jnp.mean(jnp.argmax(guided @ weights + bias, axis=-1) == jnp.arange(10))
print(f"\nguided through the first step, {told:.0%} of the draws are of the class asked for")

x = fits["first step"][0]
columns = [truth, truth.at[:, hidden].set(jnp.nan), x.mean(0), x.std(0), *x[:4]]
names = ["truth", "seen", "mean", "sd", *["draw"] * 4]
figure = plt.figure(figsize=(11, 4), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=[8, 10])
for (i, j), ax in np.ndenumerate(left.subplots(4, 8)):
    image = columns[j][i].reshape(8, 8)
    ax.imshow(image, "gray", vmin=0 if names[j] == "sd" else -1, vmax=1)
    ax.set(title=names[j] if i == 0 else "", xticks=[], yticks=[])
left.suptitle("the upper half given")
for (i, j), ax in np.ndenumerate(right.subplots(4, 10)):
    ax.imshow(guided[i, j].reshape(8, 8), "gray", vmin=-1, vmax=1)
    ax.set(title=j if i == 0 else "", xticks=[], yticks=[])
right.suptitle("the class given: four draws of each")
figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "sdo.png")
