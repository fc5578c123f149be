"""Three centuries of sunspots as a damped cycle: a Kalman filter whose gradient runs forward.

Backpropagation through time stores every state of a filter. `rtrl.scan` carries the derivatives
along instead (Bird & Polivoda, 2021, arXiv:2103.15589): the same gradient, in memory that does not
grow with the series. The cycle has a period and a damping, which the data should tell.
"""

import sys

import arviz as az
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import MCMC, NUTS
from statsmodels.datasets import sunspots

from probbp.models.state_space import LinearGaussian, kalman
from probbp.ops import rtrl

jax.config.update("jax_enable_x64", True)

# Square roots have an even spread; a series of unit variance fits the priors.
data = sunspots.load_pandas().data
root = np.sqrt(data["SUNACTIVITY"].to_numpy())
mean, spread = root.mean(), root.std()
y = jnp.asarray((root - mean) / spread)


def cycle(y, scan=rtrl.scan):
    """A point on a circle that turns and shrinks, pushed by noise, and seen from one side."""
    period = numpyro.sample("period [years]", dist.Uniform(5.0, 20.0))
    damping = numpyro.sample("damping", dist.Beta(20.0, 1.0))
    push = numpyro.sample("push", dist.HalfNormal(0.5))
    noise = numpyro.sample("noise", dist.HalfNormal(0.5))

    # Called inside the loop, so that it has four numbers to differentiate, not two matrices.
    def system():
        c, s = jnp.cos(2 * jnp.pi / period), jnp.sin(2 * jnp.pi / period)
        return LinearGaussian(
            transition=damping * jnp.array([[c, s], [-s, c]]),
            loading=jnp.array([1.0, 0.0]),
            state_noise=push**2 * jnp.eye(2),
            observation_noise=noise**2,
        )

    numpyro.factor("y", kalman(y, system, jnp.zeros(2), jnp.eye(2), scan=scan))


mcmc = MCMC(
    NUTS(cycle),
    num_warmup=200,
    num_samples=300,
    num_chains=2,
    chain_method="vectorized",
    progress_bar=False,
)
mcmc.run(jax.random.key(0), y)


def grad_of(scan):
    """Return the gradient of the log density, a function of parameters and series."""

    def log_density(params, series):
        model = numpyro.handlers.substitute(cycle, params)
        return numpyro.infer.util.log_density(model, (series, scan), {}, {})[0]

    return jax.jit(jax.grad(log_density))


grads = {"rtrl.scan": grad_of(rtrl.scan), "lax.scan": grad_of(jax.lax.scan)}
draws = mcmc.get_samples()
forward, backward = (jax.vmap(grad, (0, None))(draws, y) for grad in grads.values())
norm = optax.tree.norm
difference = norm(optax.tree.sub(forward, backward)) / norm(backward)
print(f"relative difference of the two gradients, over all draws: {difference:.0e}")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
left.hist(np.asarray(draws["period [years]"]), bins=40, histtype="step", density=True)
left.set(xlabel="period [years]", ylabel="posterior density", title="How long is a cycle?")
repeats = [1, 10, 100, 1000]
for name, grad in grads.items():
    series = [jnp.tile(y, times) for times in repeats]
    programs = [grad.lower({k: v[0] for k, v in draws.items()}, long).compile() for long in series]
    memory = [program.memory_analysis().temp_size_in_bytes / 1e3 for program in programs]
    right.loglog([len(long) for long in series], memory, "o-", label=name)
right.set(xlabel="length of the series", ylabel="memory of a gradient [kB]", title="Less memory")
right.legend()
figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "rtrl.png")

print(az.summary(az.from_numpyro(mcmc)).to_string())
