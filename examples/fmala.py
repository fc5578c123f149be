"""Sample what reverse mode refuses: a likelihood with a loop that runs until it has converged.

The yearly flow of the Nile, 1871 to 1970, as a local linear trend. Its Kalman filter is used in the
steady state, whose covariance solves a Riccati equation: iterated until it stands still, so that
the number of iterations depends on the parameters. `jax.grad` raises an error here; PC-Line-FMALA
(Cobb & Jha, 2025, arXiv:2505.18081) takes Jacobian-vector products only.
"""

import sys

import arviz as az
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC
from statsmodels.datasets import nile

import probbp
from probbp.numpyro import Kernel

table = nile.load_pandas().data
years = table["year"].to_numpy(dtype=int)
flow = jnp.asarray(table["volume"].to_numpy() / 100)  # [10^10 m^3 a year]

transition = jnp.array([[1.0, 1.0], [0.0, 1.0]])  # level and slope


def steady_state(noise, level_noise, slope_noise):
    """Covariance of the prediction, by iterating the filter's recursion to its fixed point."""
    process = jnp.diag(jnp.stack([level_noise, slope_noise]) ** 2)

    def update(covariance):
        gain = covariance[:, 0] / (covariance[0, 0] + noise**2)
        filtered = covariance - jnp.outer(gain, covariance[0])
        return transition @ filtered @ transition.T + process

    def has_moved(pair):
        old, new = pair
        return jnp.max(jnp.abs(new - old)) > 1e-4 * jnp.max(jnp.abs(new))

    start = jnp.eye(2)
    _, covariance = jax.lax.while_loop(
        has_moved, lambda p: (p[1], update(p[1])), (start, update(start))
    )
    return covariance


def kalman_filter(noise, level_noise, slope_noise):
    """Predictions of the flow, their variance, and the filtered level."""
    covariance = steady_state(noise, level_noise, slope_noise)
    variance = covariance[0, 0] + noise**2

    def step(state, y):
        filtered = state + covariance[:, 0] / variance * (y - state[0])
        return transition @ filtered, (state[0], filtered[0])

    _, (predictions, levels) = jax.lax.scan(step, jnp.stack([flow[0], 0.0 * noise]), flow)
    return predictions, variance, levels


def model():
    noise = numpyro.sample("noise", dist.HalfNormal(3.0))
    level_noise = numpyro.sample("level_noise", dist.HalfNormal(1.0))
    slope_noise = numpyro.sample("slope_noise", dist.HalfNormal(0.1))
    predictions, variance, levels = kalman_filter(noise, level_noise, slope_noise)
    numpyro.deterministic("level", levels)
    numpyro.sample("flow", dist.Normal(predictions, jnp.sqrt(variance)).to_event(1), obs=flow)


mcmc = MCMC(
    Kernel(model, probbp.pc_line_fmala, metric="dense"),
    num_warmup=2000,
    num_samples=5000,
    num_chains=4,
    chain_method="vectorized",
)
mcmc.run(jax.random.key(0))
posterior = az.from_numpyro(mcmc)
print(az.summary(posterior, var_names=["~level"], round_to=3).to_string())

low, middle, high = posterior.posterior["level"].quantile([0.05, 0.5, 0.95], ("chain", "draw"))
plt.plot(years, flow, "o", color="0.6", markersize=4, label="flow")
plt.fill_between(years, low, high, alpha=0.3)
plt.plot(years, middle, label="level (median, 90 %)")
plt.ylabel("flow of the Nile [10$^{10}$ m$^3$ a year]")
plt.legend()
plt.savefig(sys.argv[1] if len(sys.argv) > 1 else "nile.png", bbox_inches="tight")
