"""Journey 3: a NumPyro model, NumPyro's own MCMC, a sampler that never backpropagates, ArviZ.

Grunfeld's data: the yearly investment of eleven American firms, 1935 to 1954, explained by the
value of the firm and its stock of capital, with a level for each firm.
"""

import sys
from functools import partial

import arviz as az
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from numpyro.infer import MCMC
from sklearn.preprocessing import StandardScaler
from statsmodels.datasets import grunfeld

import probbp
from probbp.models import hierarchical
from probbp.numpyro import Kernel

table = grunfeld.load_pandas().data
firms, firm = np.unique(table["firm"], return_inverse=True)
columns = StandardScaler().fit_transform(np.log(table[["value", "capital", "invest"]]))
data = {
    "x": jnp.asarray(columns[:, :2]),
    "group": jnp.asarray(firm),
    "y": jnp.asarray(columns[:, 2]),
    "num_groups": len(firms),
}

# Only this line differs from a run of NUTS. A step moves on a random plane of eight directions and
# takes the derivatives along these alone; the scale of all sixteen parameters is learnt in warm-up.
kernel = Kernel(hierarchical.model, partial(probbp.line_fmala, num_tangents=8), metric="dense")
mcmc = MCMC(
    kernel,
    num_warmup=4000,
    num_samples=10_000,
    thinning=5,
    num_chains=4,
    chain_method="vectorized",
)
mcmc.run(jax.random.key(0), **data, extra_fields=("potential_energy", "accept_prob"))

posterior = az.from_numpyro(
    mcmc,
    coords={"group": [str(name) for name in firms], "feature": ["value", "capital"]},
    dims={"beta": ["feature"]},
)
print(az.summary(posterior, round_to=3).to_string())
print("mean acceptance rate:", round(float(posterior.sample_stats["acceptance_rate"].mean()), 3))

plt.rcParams["figure.constrained_layout.use"] = True
az.plot_trace(posterior, var_names=["mu", "tau", "beta", "sigma"])
plt.gcf().savefig(sys.argv[1] if len(sys.argv) > 1 else "grunfeld.png", bbox_inches="tight")
