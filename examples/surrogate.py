"""Hares and lynxes by a simulator without gradients: SciPy's solver, in a pool of processes.

The pelts that the Hudson's Bay Company bought from 1900 to 1920, and predator-prey equations solved
by LSODA, a Fortran program that JAX can't differentiate. The surrogate transition learns the log
density from its values and then needs one of them per draw. Beside it what one would take
otherwise: a random walk with an adapted covariance, for as many simulations.
"""

import sys
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import arviz as az
import blackjax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.integrate import odeint
from scipy.stats import norm

import probbp

# Thousands of pelts in each of 21 years.
HARES = """30.0 47.2 70.2 77.4 36.3 20.6 18.1 21.4 22.0 25.4 27.1 40.3 57.0 76.6 52.3 19.5 11.2 7.6
14.6 16.2 24.7"""
LYNXES = """4.0 6.1 9.8 35.2 59.4 41.7 19.0 13.0 8.3 9.1 7.4 8.0 12.3 19.5 45.7 51.1 29.7 15.8 9.7
10.1 8.6"""
PELTS = np.array([HARES.split(), LYNXES.split()], float).T
YEARS = np.arange(1900, 1921)

# Growth and loss of each species, the first year's numbers, and the spreads: medians, and standard
# deviations of their logs.
NAMES = ["growth", "predation", "loss", "gain", "hares", "lynxes", "spread_h", "spread_l"]
MEDIANS = np.array([1.0, 0.05, 1.0, 0.05, 10.0, 10.0, 0.4, 0.4])
SPREADS = np.array([0.5, 0.7, 0.5, 0.7, 1.0, 1.0, 1.0, 1.0])

# Where to start, read off the data: cycles of ten years, and the means, at which both species rest.
TURN = 2 * np.pi / 10
START = np.log(
    [TURN, TURN / PELTS[:, 1].mean(), TURN, TURN / PELTS[:, 0].mean(), *PELTS[0], 0.4, 0.4]
)


def simulate(parameters):
    growth, predation, loss, gain, *start = parameters[:6]

    def field(numbers, _):
        hares, lynxes = numbers
        return [(growth - predation * lynxes) * hares, (gain * hares - loss) * lynxes]

    return odeint(field, start, YEARS, rtol=1e-6, atol=1e-6, mxstep=2000)


def log_posterior(theta):
    """Return the log density of the logs of the parameters, by NumPy and SciPy alone."""
    if np.any(np.abs(theta - np.log(MEDIANS)) > 8 * SPREADS):  # the solver would never end
        return -np.inf
    parameters = np.exp(theta)
    numbers = simulate(parameters)
    if not np.all(numbers > 0):
        return -np.inf
    prior = norm.logpdf(theta, np.log(MEDIANS), SPREADS).sum()
    return prior + norm.logpdf(np.log(PELTS), np.log(numbers), parameters[6:]).sum()


class Simulator:
    """The log density for JAX; the chains of a step are simulated side by side.

    num_simulations: how many were asked for.
    """

    def __init__(self, pool: Executor):
        self.pool = pool
        self.num_simulations = 0

    def __call__(self, theta):
        """Return the log density, of one position or under `vmap` of many."""
        out = jax.ShapeDtypeStruct((), theta.dtype)
        return jax.pure_callback(self.on_host, out, theta, vmap_method="expand_dims")

    def on_host(self, theta):
        rows = np.asarray(theta, float).reshape(-1, len(NAMES))
        self.num_simulations += len(rows)
        values = list(self.pool.map(log_posterior, rows))
        return np.asarray(values, theta.dtype).reshape(theta.shape[:-1])


def random_walk(logdensity_fn, step_size, inverse_mass_matrix):
    """Return BlackJAX's random walk, with a step size and a covariance to adapt."""
    factor = jnp.linalg.cholesky(inverse_mass_matrix)
    sigma = jnp.sqrt(2 * step_size) * factor
    return blackjax.normal_random_walk(logdensity_fn, sigma)


def main():
    start = jnp.asarray(START)
    found = {}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for name, algorithm, options in (
            ("surrogate", probbp.surrogate, {"num_warmup": 1450, "num_samples": 400}),
            (
                "random walk",
                random_walk,
                {
                    "num_warmup": 1000,
                    "num_samples": 850,
                    "metric": "dense",
                    "target_acceptance_rate": 0.234,
                    "initial_step_size": 0.01,
                },
            ),
        ):
            simulator = Simulator(pool)
            data = probbp.sample(
                jax.random.key(0),
                partial(algorithm, simulator),
                start,
                dispersion=0.1,
                progress_bar=False,
                coords={"parameter": NAMES},
                dims={"x": ["parameter"]},
                **options,
            )
            found[name] = data
            ess = float(az.ess(data, method="bulk")["x"].min())
            print(f"{name}: {ess:.0f} effective draws of {simulator.num_simulations} simulations")
    data = found["surrogate"]
    print(az.summary(data, round_to=2).to_string())
    draw(data)


def draw(data):
    """Show the pelts, and what the model says of them."""
    draws = np.exp(data.posterior["x"].values.reshape(-1, len(NAMES)))
    fits = np.array([simulate(row) for row in draws[:: len(draws) // 200]])
    low, middle, high = np.quantile(fits, [0.05, 0.5, 0.95], axis=0)
    figure, axis = plt.subplots(figsize=(7, 3.5))
    for i, (name, color) in enumerate((("hares", "C0"), ("lynxes", "C1"))):
        axis.fill_between(YEARS, low[:, i], high[:, i], color=color, alpha=0.25, linewidth=0)
        axis.plot(YEARS, middle[:, i], color=color, label=name)
        axis.plot(YEARS, PELTS[:, i], ".", color=color)
    axis.set_xticks(YEARS[::5])
    axis.set_ylabel("pelts [thousands]")
    axis.legend(frameon=False)
    figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "pelts.png", bbox_inches="tight")


if __name__ == "__main__":
    main()
