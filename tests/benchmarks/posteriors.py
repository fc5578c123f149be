"""Eight posteriors of posteriordb as NumPyro models, with the moments of their reference draws.

posteriordb (Magnusson et al., https://github.com/stan-dev/posteriordb) holds Stan models, data, and
10,000 nearly independent draws from each posterior. These are the same models in NumPyro. All of
them, the ODE and the recursion over time included, have derivatives in reverse and in forward mode,
nested too.

`load(folder)` reads one JSON file per posterior:

    {"data": {...},                       the posterior's data, as in posteriordb
     "reference": {"theta[1]": {"mean", "n", "mcse", "mean_square", ...}, ...}}

The numbers are those of the `n` reference draws; `mcse` is the Monte Carlo error of the mean.
The comparison needs float64: call `numpyro.enable_x64()` first.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.linalg import cho_solve, solve_triangular
from numpyro.distributions import constraints


class Posterior(NamedTuple):
    """A model, its data, and what the reference draws say.

    Attributes:
        name: the name in posteriordb.
        model: the NumPyro model.
        model_kwargs: its data.
        start: rough values of sites, where a local mode would catch chains that come from afar.
        counted: keyword arguments that leave the model no loop, to count its operations by: XLA
            counts a loop's body once, however often it runs.
        reference: parameter -> moments of the reference draws.
        names: parameter -> (NumPyro site, index in it); the index of a scalar site is `()`.
    """

    name: str
    model: Callable
    model_kwargs: dict
    start: dict
    counted: dict
    reference: dict[str, dict[str, float]]
    names: dict[str, tuple[str, tuple]]


def load(folder) -> dict[str, Posterior]:
    """Reads the posteriors that a folder holds.

    Args:
        folder: where the files `<name>.json` are.

    Returns:
        Name -> posterior, in the order of `MODELS`; those without a file are left out.

    Raises:
        FileNotFoundError: when the folder holds none of them.
    """
    folder = Path(folder).expanduser()
    found = {
        name: folder / f"{name}.json" for name in MODELS if (folder / f"{name}.json").is_file()
    }
    if not found:
        raise FileNotFoundError(
            f"No reference posterior in {folder}. Give a folder with one file per posterior, made "
            "from posteriordb (https://github.com/stan-dev/posteriordb): <name>.json, which holds "
            '{"data": the data, "reference": {parameter: {"mean", "n", "mcse", "mean_square"}}} '
            f"of the reference draws. The names: {', '.join(MODELS)}."
        )
    return {name: _read(name, path) for name, path in found.items()}


def entry(draws: dict, where: tuple[str, tuple]):
    """One parameter out of draws with two leading axes, (chain, draw, ...)."""
    site, index = where
    return draws[site][(..., *index)]


def eight_schools(y, sigma):
    """Treatment effects in eight schools, non-centered; `tau` has the half-Cauchy's tail."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand(y.shape).to_event(1))
    theta = numpyro.deterministic("theta", mu + tau * z)
    numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def kidscore_interaction(kid_score, mom_hs, mom_iq):
    """Linear regression with an interaction on raw scales: coefficients correlated up to -0.99."""
    beta = numpyro.sample("beta", _flat(constraints.real_vector, 4))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    mean = beta[0] + beta[1] * mom_hs + beta[2] * mom_iq + beta[3] * mom_hs * mom_iq
    numpyro.sample("kid_score", dist.Normal(mean, sigma), obs=kid_score)


def autoregression(y, order):
    """An autoregressive time series, given its first `order` values."""
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand((order,)).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    lagged = jnp.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], axis=-1)
    numpyro.sample("y", dist.Normal(alpha + lagged @ beta, sigma), obs=y[order:])


def garch(y, sigma1, *, unroll=1):
    """GARCH(1, 1) volatility: a scan over time. The support of `beta1` depends on `alpha1`."""
    mu = numpyro.sample("mu", _flat(constraints.real))
    alpha0 = numpyro.sample("alpha0", _flat(constraints.positive))
    alpha1 = numpyro.sample("alpha1", _flat(constraints.unit_interval))
    # Flat on the whole triangle, not on each of its slices. `ImproperUniform` alone would say so,
    # but NumPyro 0.22 misses that its support moves, and maps the draws to another interval.
    beta1 = numpyro.sample("beta1", dist.Uniform(0.0, 1.0 - alpha1))
    numpyro.factor("beta1_flat", jnp.log1p(-alpha1))

    def volatility(variance, y):
        return alpha0 + alpha1 * (y - mu) ** 2 + beta1 * variance, variance

    _, variance = jax.lax.scan(volatility, sigma1**2, y, unroll=unroll)
    numpyro.sample("y", dist.Normal(mu, jnp.sqrt(variance)), obs=y)


def linear_regression(y, X):
    """Linear regression whose likelihood is far narrower than its prior."""
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand(X.shape[1:]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10.0))
    numpyro.sample("y", dist.Normal(X @ beta, sigma), obs=y)


def gaussian_mixture(y):
    """Two Gaussians, told apart by the order of their means."""
    mu = numpyro.sample("mu", _flat(constraints.ordered_vector, 2))
    numpyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0).expand((2,)).to_event(1))
    theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
    each = dist.Normal(mu, sigma).log_prob(y[:, None]) + jnp.log(jnp.stack([theta, 1.0 - theta]))
    numpyro.factor("y", jnp.logaddexp(each[:, 0], each[:, 1]).sum())


def lotka_volterra(y_init, y, ts, *, substeps=16, unroll=1):
    """Hares and lynxes: u' = (θ₁ - θ₂v)u, v' = (-θ₃ + θ₄u)v, seen through multiplicative noise."""
    loc, scale = jnp.array([1.0, 0.05, 1.0, 0.05]), jnp.array([0.5, 0.05, 0.5, 0.05])
    theta = numpyro.sample("theta", dist.TruncatedNormal(loc, scale, low=0.0).to_event(1))
    z_init = numpyro.sample("z_init", dist.LogNormal(jnp.log(10.0), 1.0).expand((2,)).to_event(1))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1.0, 1.0).expand((2,)).to_event(1))
    log_z = predator_prey(theta, jnp.log(z_init), ts, substeps, unroll)
    numpyro.sample("y_init", dist.LogNormal(jnp.log(z_init), sigma), obs=y_init)
    numpyro.sample("y", dist.LogNormal(log_z, sigma), obs=y)


def predator_prey(theta, log_z_init, ts, substeps, unroll=1):
    """The logarithms of both populations at the times `ts` [years], from time 0.

    Runge-Kutta of fourth order, `substeps` to an interval, in the logarithms: positive whatever the
    step. A plain scan, and so open to every mode of differentiation. With 16 substeps the relative
    error at the posterior mean is 5e-7.

    Returns:
        (times, 2).
    """
    growth = jnp.stack([theta[0], -theta[2]])
    meeting = jnp.stack([-theta[1], theta[3]])

    def slope(log_z):
        return growth + meeting * jnp.exp(log_z[::-1])

    def step(log_z, h):
        k1 = slope(log_z)
        k2 = slope(log_z + 0.5 * h * k1)
        k3 = slope(log_z + 0.5 * h * k2)
        k4 = slope(log_z + h * k3)
        log_z = log_z + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
        return log_z, log_z

    h = np.repeat(np.diff(ts, prepend=0.0) / substeps, substeps)
    _, path = jax.lax.scan(step, log_z_init, h, unroll=unroll)
    return path[substeps - 1 :: substeps]


def gp_poisson_regression(x, k):
    """Counts whose log rate is a Gaussian process, in coordinates that straighten the posterior.

    Stan's model has `f = L f_tilde` with `f_tilde ~ N(0, I)`. Eleven large counts pin `f` down, so
    that `f_tilde` has to follow every move of `rho` and `alpha`, and no single move gets far. Here
    `z` has the posterior of `f_tilde` for its origin and its unit, as it would be given the
    hyperparameters and observations `log k ~ N(f, 1 / k)`: the same density with its Jacobian,
    and close to N(0, I) whatever the hyperparameters.
    """
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    z = numpyro.sample("z", _flat(constraints.real_vector, len(x)))

    covariance = alpha**2 * jnp.exp(-0.5 * ((x[:, None] - x) / rho) ** 2) + 1e-10 * jnp.eye(len(x))
    factor = jnp.linalg.cholesky(covariance)
    weighted = factor.T * k
    precision = jnp.linalg.cholesky(jnp.eye(len(x)) + weighted @ factor)
    mean = cho_solve((precision, True), weighted @ jnp.log(k))
    f_tilde = mean + solve_triangular(precision.T, z)
    numpyro.factor("f_tilde", dist.Normal(0.0, 1.0).log_prob(f_tilde).sum())
    numpyro.factor("jacobian", -jnp.log(jnp.diag(precision)).sum())

    f = numpyro.deterministic("f", factor @ f_tilde)
    numpyro.sample("k", dist.Poisson(jnp.exp(f)), obs=k)


class _Entry(NamedTuple):
    model: Callable
    arguments: Callable
    counted: Callable = lambda data: {}
    start: dict = {}


def _pick(*keys):
    return lambda data: {key: data[key] for key in keys}


MODELS = {
    "eight_schools-eight_schools_noncentered": _Entry(eight_schools, _pick("y", "sigma")),
    "kidiq-kidscore_interaction": _Entry(
        kidscore_interaction, _pick("kid_score", "mom_hs", "mom_iq")
    ),
    "arK-arK": _Entry(autoregression, lambda data: {"y": data["y"], "order": data["K"]}),
    "garch-garch11": _Entry(
        garch, _pick("y", "sigma1"), lambda data: {"y": data["y"][:50], "unroll": True}
    ),
    "sblri-blr": _Entry(linear_regression, _pick("y", "X")),
    "low_dim_gauss_mix-low_dim_gauss_mix": _Entry(gaussian_mixture, _pick("y")),
    "hudson_lynx_hare-lotka_volterra": _Entry(
        lotka_volterra,
        _pick("y_init", "y", "ts"),
        lambda data: {"substeps": 2, "unroll": True},
        # Far from these, noise alone may explain the data: a mode 40 nats lower.
        {"theta": [0.5, 0.03, 0.8, 0.03], "z_init": [30.0, 5.0], "sigma": [0.3, 0.3]},
    ),
    "gp_pois_regr-gp_pois_regr": _Entry(gp_poisson_regression, _pick("x", "k")),
}
"""Name in posteriordb -> model, its keyword arguments out of the data, and what else it needs."""


def _read(name, path):
    model, arguments, counted, start = MODELS[name]
    content = json.loads(path.read_text())
    data = {
        k: np.asarray(v, float) if isinstance(v, list) else v for k, v in content["data"].items()
    }
    reference = content["reference"]
    names = {parameter: _where(parameter) for parameter in reference}
    start = {site: np.asarray(value) for site, value in start.items()}
    return Posterior(name, model, arguments(data), start, counted(data), reference, names)


def _where(parameter):
    """`"theta[1]"` -> `("theta", (0,))`: Stan counts from one."""
    site, index = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", parameter).groups()
    return site, () if index is None else (int(index) - 1,)


def _flat(support, *event_shape):
    return dist.ImproperUniform(support, (), event_shape)
