"""Posteriors beside posteriordb's: regressions, hierarchies, state spaces, solvers with free loops.

All data come with scikit-learn and statsmodels, stand here, or are simulated from a seed. `TARGETS`
has a model by name, `IS_REVERSE` those that reverse mode differentiates. The truth is what a long
run of another sampler says.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.preprocessing import StandardScaler
from statsmodels.datasets import engel, fair, grunfeld, macrodata, nile, stackloss


def tumours():
    """A logistic regression on ten measurements of cells, 11 parameters."""
    data = load_breast_cancer()
    x = StandardScaler().fit_transform(data.data[:, :10])
    return partial(logistic, x=x, y=data.target)


def tumours_all():
    """The same on all thirty measurements, 31 parameters."""
    data = load_breast_cancer()
    return partial(logistic, x=StandardScaler().fit_transform(data.data), y=data.target)


def eights():
    """Eights among handwritten digits: a logistic regression on all pixels, 65 parameters."""
    data = load_digits()
    return partial(logistic, x=StandardScaler().fit_transform(data.data), y=data.target == 8)


def logistic(x, y):
    intercept = numpyro.sample("intercept", dist.Normal(0, 5))
    beta = numpyro.sample("beta", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
    numpyro.sample("y", dist.Bernoulli(logits=intercept + x @ beta), obs=y)


def affairs():
    """How many affairs: a Poisson regression on eight answers, 9 parameters."""
    data = fair.load_pandas().data.iloc[::10]
    x = StandardScaler().fit_transform(data.drop(columns="affairs").to_numpy())
    y = np.round(data["affairs"].to_numpy())

    def model():
        intercept = numpyro.sample("intercept", dist.Normal(0, 2))
        beta = numpyro.sample("beta", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
        numpyro.sample("y", dist.Poisson(jnp.exp(intercept + x @ beta)), obs=y)

    return model


def stack_loss():
    """A robust regression: Student noise whose degrees of freedom are a parameter, 6 parameters."""
    data = stackloss.load_pandas().data
    y = data["STACKLOSS"].to_numpy()
    x = StandardScaler().fit_transform(data.drop(columns="STACKLOSS").to_numpy())
    y = (y - y.mean()) / y.std()

    def model():
        intercept = numpyro.sample("intercept", dist.Normal(0, 1))
        beta = numpyro.sample("beta", dist.Normal(0, 1).expand([3]).to_event(1))
        scale = numpyro.sample("scale", dist.HalfNormal(1))
        degrees = numpyro.sample("degrees", dist.Gamma(2, 0.1))
        numpyro.sample("y", dist.StudentT(degrees, intercept + x @ beta, scale), obs=y)

    return model


def food():
    """Engel's law with a spread that grows with income, 4 parameters."""
    data = engel.load_pandas().data
    x, y = np.log(data["income"].to_numpy()), np.log(data["foodexp"].to_numpy())
    x, y = x - x.mean(), y - y.mean()

    def model():
        intercept = numpyro.sample("intercept", dist.Normal(0, 1))
        slope = numpyro.sample("slope", dist.Normal(0, 1))
        level = numpyro.sample("level", dist.Normal(-1, 1))
        growth = numpyro.sample("growth", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(intercept + slope * x, jnp.exp(level + growth * x)), obs=y)

    return model


def progression():
    """Diabetes: a linear regression with shrinkage of unknown strength, 13 parameters."""
    x, y = load_diabetes(return_X_y=True)
    x, y = StandardScaler().fit_transform(x), (y - y.mean()) / y.std()

    def model():
        spread = numpyro.sample("spread", dist.HalfNormal(0.5))
        intercept = numpyro.sample("intercept", dist.Normal(0, 1))
        beta = numpyro.sample("beta", dist.Normal(0, spread).expand([10]).to_event(1))
        scale = numpyro.sample("scale", dist.HalfNormal(1))
        numpyro.sample("y", dist.Normal(intercept + x @ beta, scale), obs=y)

    return model


def dugongs():
    """Length of dugongs by age, a curve that levels off, 4 parameters (Carlin & Gelfand, 1991)."""
    age = np.array(
        [1.0, 1.5, 1.5, 1.5, 2.5, 4.0, 5.0, 5.0, 7.0, 8.0, 8.5, 9.0, 9.5, 9.5, 10.0, 12.0, 12.0]
        + [13.0, 13.0, 14.5, 15.5, 15.5, 16.5, 17.0, 22.5, 29.0, 31.5]
    )
    length = np.array(
        [1.80, 1.85, 1.87, 1.77, 2.02, 2.27, 2.15, 2.26, 2.47, 2.19, 2.26, 2.40, 2.39, 2.41, 2.50]
        + [2.32, 2.32, 2.43, 2.47, 2.56, 2.65, 2.47, 2.64, 2.56, 2.70, 2.72, 2.57]
    )

    def model():
        end = numpyro.sample("end", dist.Normal(2.5, 1))
        growth = numpyro.sample("growth", dist.HalfNormal(2))
        rate = numpyro.sample("rate", dist.Uniform(0.5, 1))
        scale = numpyro.sample("scale", dist.HalfNormal(0.5))
        numpyro.sample("y", dist.Normal(end - growth * rate**age, scale), obs=length)

    return model


def firms():
    """Investment of eleven firms: an intercept for each, not centered, 16 parameters."""
    data = grunfeld.load_pandas().data
    firm = np.unique(data["firm"], return_inverse=True)[1]
    y = np.log(data["invest"].to_numpy())
    x = StandardScaler().fit_transform(np.log(data[["value", "capital"]].to_numpy()))
    y = (y - y.mean()) / y.std()

    def model():
        center = numpyro.sample("center", dist.Normal(0, 1))
        spread = numpyro.sample("spread", dist.HalfNormal(1))
        beta = numpyro.sample("beta", dist.Normal(0, 1).expand([2]).to_event(1))
        each = numpyro.sample("each", dist.Normal(0, 1).expand([11]).to_event(1))
        scale = numpyro.sample("scale", dist.HalfNormal(1))
        loc = center + spread * each[firm] + x @ beta
        numpyro.sample("y", dist.Normal(loc, scale), obs=y)

    return model


def river():
    """The Nile as a local level, by a Kalman filter, 3 parameters."""
    y = nile.load_pandas().data["volume"].to_numpy()
    y = (y - y.mean()) / y.std()

    def model():
        noise = numpyro.sample("noise", dist.HalfNormal(1))
        drift = numpyro.sample("drift", dist.HalfNormal(1))
        start = numpyro.sample("start", dist.Normal(0, 1))

        def step(carry, y):
            mean, variance = carry
            variance = variance + drift**2
            total = variance + noise**2
            gain = variance / total
            logpdf = -0.5 * (jnp.log(2 * jnp.pi * total) + (y - mean) ** 2 / total)
            return (mean + gain * (y - mean), (1 - gain) * variance), logpdf

        _, terms = jax.lax.scan(step, (start, jnp.zeros(())), y)
        numpyro.factor("y", terms.sum())

    return model


def growth():
    """American growth as an autoregression of order four with Student noise, 7 parameters."""
    gdp = np.log(macrodata.load_pandas().data["realgdp"].to_numpy())
    y = np.diff(gdp)
    y = (y - y.mean()) / y.std()
    lags = np.stack([y[4 - k : len(y) - k] for k in range(1, 5)], axis=1)

    def model():
        intercept = numpyro.sample("intercept", dist.Normal(0, 1))
        beta = numpyro.sample("beta", dist.Normal(0, 0.5).expand([4]).to_event(1))
        scale = numpyro.sample("scale", dist.HalfNormal(1))
        degrees = numpyro.sample("degrees", dist.Gamma(2, 0.1))
        loc = intercept + lags @ beta
        numpyro.sample("y", dist.StudentT(degrees, loc, scale), obs=y[4:])

    return model


def influenza():
    """Boys in bed in a boarding school, 1978: SIR equations with adaptive steps, 3 parameters."""
    in_bed = np.array([3, 8, 26, 76, 225, 298, 258, 233, 189, 128, 68, 29, 14, 4])

    def slope(state, infection, recovery):
        s, i = state
        new = infection * s * i / 763
        return jnp.stack([-new, new - recovery * i])

    def model():
        infection = numpyro.sample("infection", dist.LogNormal(0.5, 0.5))
        recovery = numpyro.sample("recovery", dist.LogNormal(-0.7, 0.5))
        spread = numpyro.sample("spread", dist.Exponential(5.0))
        field = partial(slope, infection=infection, recovery=recovery)
        step = lambda state, _: (end := adaptive(field, state, 1.0), end)
        _, path = jax.lax.scan(step, jnp.array([762.0, 1.0]), length=len(in_bed))
        mean = jnp.maximum(path[:, 1], 1e-6)
        numpyro.sample("y", dist.NegativeBinomial2(mean, 1 / spread), obs=in_bed)

    return model


def adaptive(field, state, span, tolerance=1e-5):
    """Solve by steps that are halved or doubled by their error; reverse mode refuses the loop."""

    def heun(state, h):
        first = field(state)
        return state + h / 2 * (first + field(state + h * first))

    def body(carry):
        time, state, h = carry
        h = jnp.minimum(h, span - time)
        half = heun(heun(state, h / 2), h / 2)
        error = jnp.max(jnp.abs(half - heun(state, h)) / (1 + jnp.abs(half)))
        is_good = (error < tolerance) | (h < 1e-4)
        time, state = jnp.where(is_good, time + h, time), jnp.where(is_good, half, state)
        return time, state, jnp.where(error < tolerance / 4, 2 * h, jnp.where(is_good, h, h / 2))

    return jax.lax.while_loop(
        lambda carry: carry[0] < span - 1e-9, body, (jnp.zeros(()), state, jnp.asarray(0.1))
    )[1]


def planet():
    """A star's radial velocity: Kepler's equation by Newton's method, 6 parameters, simulated."""
    rng = np.random.default_rng(3)
    times = np.sort(rng.uniform(0, 60, 40))

    def velocity(amplitude, period, phase, eccentricity, angle):
        mean = 2 * jnp.pi * (times / period + phase)
        newton = lambda e: (e - eccentricity * jnp.sin(e) - mean) / (1 - eccentricity * jnp.cos(e))
        anomaly = jax.lax.while_loop(
            lambda e: jnp.max(jnp.abs(newton(e))) > 1e-10, lambda e: e - newton(e), mean
        )
        ratio = jnp.sqrt((1 + eccentricity) / (1 - eccentricity))
        true = 2 * jnp.arctan(ratio * jnp.tan(anomaly / 2))
        return amplitude * (jnp.cos(true + angle) + eccentricity * jnp.cos(angle))

    noise = rng.normal(size=40)
    y = np.asarray(velocity(10.0, 17.0, 0.1, 0.3, 1.0)) + 2 * noise

    def model():
        amplitude = numpyro.sample("amplitude", dist.LogNormal(2, 1))
        period = numpyro.sample("period", dist.Normal(17, 0.5))
        phase = numpyro.sample("phase", dist.Normal(0.1, 0.2))
        eccentricity = numpyro.sample("eccentricity", dist.Beta(2, 5))
        angle = numpyro.sample("angle", dist.Normal(1, 1))
        scale = numpyro.sample("scale", dist.HalfNormal(5))
        mean = velocity(amplitude, period, phase, eccentricity, angle)
        numpyro.sample("y", dist.Normal(mean, scale), obs=y)

    return model


def annuity():
    """Interest rates that solve an equation by a free loop, 4 parameters, simulated."""
    rng = np.random.default_rng(4)
    x = rng.uniform(0.2, 2, 30)

    def root(level):
        """Solve r exp(r) = level, by Newton's method."""
        newton = lambda r: (r - level * jnp.exp(-r)) / (1 + r)
        return jax.lax.while_loop(
            lambda r: jnp.max(jnp.abs(newton(r))) > 1e-10,
            lambda r: r - newton(r),
            jnp.log1p(level),
        )

    y = np.asarray(root(1.5 * x**0.8)) + 0.1 * rng.normal(size=30)

    def model():
        scale = numpyro.sample("scale", dist.HalfNormal(0.5))
        factor = numpyro.sample("factor", dist.LogNormal(0, 1))
        power = numpyro.sample("power", dist.Normal(1, 0.5))
        shift = numpyro.sample("shift", dist.Normal(0, 0.2))
        numpyro.sample("y", dist.Normal(shift + root(factor * x**power), scale), obs=y)

    return model


def answers():
    """Twenty people answer twelve questions, a Rasch model with 33 parameters, simulated."""
    rng = np.random.default_rng(5)
    ability, difficulty = rng.normal(size=20), rng.normal(size=12)
    y = rng.random((20, 12)) < 1 / (1 + np.exp(difficulty - ability[:, None]))

    def model():
        spread = numpyro.sample("spread", dist.HalfNormal(1))
        ability = numpyro.sample("ability", dist.Normal(0, 1).expand([20]).to_event(1))
        difficulty = numpyro.sample("difficulty", dist.Normal(0, 1.5).expand([12]).to_event(1))
        logits = spread * ability[:, None] - difficulty
        numpyro.sample("y", dist.Bernoulli(logits=logits).to_event(2), obs=y.astype(float))

    return model


def volatility():
    """Fifty returns whose log variance wanders, not centered, 53 parameters, simulated."""
    rng = np.random.default_rng(6)
    h = np.zeros(50)
    for t in range(1, 50):
        h[t] = 0.9 * h[t - 1] + 0.4 * rng.normal()
    y = np.exp(h / 2) * rng.normal(size=50)

    def model():
        level = numpyro.sample("level", dist.Normal(0, 1))
        persistence = numpyro.sample("persistence", dist.Beta(20, 1.5))
        spread = numpyro.sample("spread", dist.HalfNormal(0.5))
        steps = numpyro.sample("steps", dist.Normal(0, 1).expand([50]).to_event(1))
        _, h = jax.lax.scan(
            lambda h, e: (new := persistence * h + spread * e, new), jnp.zeros(()), steps
        )
        numpyro.sample("y", dist.Normal(0, jnp.exp((level + h) / 2)), obs=y)

    return model


TARGETS = {
    make.__name__: make
    for make in (
        tumours,
        affairs,
        stack_loss,
        food,
        progression,
        dugongs,
        firms,
        river,
        growth,
        influenza,
        planet,
        annuity,
        tumours_all,
        answers,
        volatility,
        eights,
    )
}
REFUSED = {"influenza", "planet", "annuity"}
"""Those that reverse mode refuses; NUTS runs in forward mode there."""
