"""Long series with a handful of parameters: volatility, trend, regimes, and a pendulum.

Each likelihood is one loop over time, and hidden states are integrated out. The loop is
`probbp.ops.rtrl.scan`, whose gradient needs no more memory for a long series than for a short one;
`scan=jax.lax.scan` gives the same values and draws by backpropagation through time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from probbp.checks import check_count, check_number, check_numbers
from probbp.models import runge_kutta
from probbp.ops import rtrl

Tree = Any


def garch(
    y: jax.Array,
    *,
    first_scale: float | None = None,
    scale: float = 10.0,
    scan: Callable = rtrl.scan,
) -> None:
    r"""GARCH(1, 1): a variance that remembers the last shock and itself (Bollerslev, 1986).

    .. math::
        y_t \sim N(\mu, \sigma_t), \qquad
        \sigma_{t+1}^2 = \alpha_0 + \alpha_1 (y_t - \mu)^2 + \beta_1 \sigma_t^2

    with (alpha1, beta1) uniform where :math:`\alpha_1 + \beta_1 < 1`: the site `share` is
    :math:`\beta_1 / (1 - \alpha_1)`.

    Args:
        y: (time,), e.g. daily returns in per cent.
        first_scale: sigma of the first value; the standard deviation of `y` by default.
        scale: standard deviation of the priors of mu and alpha0, which are a normal and a half
            normal: large against `y` and its square.
        scan: the loop.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro.handlers import seed, trace
        >>> y = jnp.array([0.3, -1.1, 0.4, 2.0, -0.2])
        >>> sorted(trace(seed(garch, 0)).get_trace(y))
        ['alpha0', 'alpha1', 'beta1', 'mu', 'share', 'y']
    """
    check_number("scale", scale, "(0, inf)")
    if first_scale is not None:
        check_number("first_scale", first_scale, "(0, inf)")
    _check_series(y)
    mu = numpyro.sample("mu", dist.Normal(0.0, scale))
    alpha0 = numpyro.sample("alpha0", dist.HalfNormal(scale))
    # Uniform on the triangle: alpha1 has the density 2 (1 - alpha1). NumPyro's guides keep the
    # supports that they find at the start, so that beta1's must not move with alpha1.
    alpha1 = numpyro.sample("alpha1", dist.Beta(1.0, 2.0))
    share = numpyro.sample("share", dist.Uniform())
    beta1 = numpyro.deterministic("beta1", share * (1.0 - alpha1))
    first = jnp.std(y) if first_scale is None else first_scale

    def step(carry, y):
        variance, total = carry
        shock = (y - mu) ** 2
        total = total - 0.5 * (shock / variance + jnp.log(2 * jnp.pi * variance))
        return (alpha0 + alpha1 * shock + beta1 * variance, total), None

    dtype = jnp.result_type(y, mu)
    start = jnp.asarray(first, dtype) ** 2, jnp.zeros((), dtype)
    (_, total), _ = scan(step, start, y)
    numpyro.factor("y", total)


def local_linear_trend(y: jax.Array, *, scale: float = 1.0, scan: Callable = rtrl.scan) -> None:
    r"""A level that drifts by a slope that drifts, seen through noise (Harvey, 1989).

    .. math::
        y_t \sim N(l_t, \sigma), \qquad l_{t+1} \sim N(l_t + b_t, \sigma_l), \qquad
        b_{t+1} \sim N(b_t, \sigma_b)

    Levels and slopes are integrated out by `kalman`.

    Args:
        y: (time,), NaN where a value is missing; best scaled to unit variance.
        scale: of the half-normal priors of the three standard deviations, and a tenth of that of
            the first level and slope.
        scan: the loop.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro.handlers import seed, trace
        >>> y = jnp.array([0.1, 0.3, jnp.nan, 0.8])
        >>> sorted(trace(seed(local_linear_trend, 0)).get_trace(y))
        ['sigma', 'sigma_level', 'sigma_slope', 'y']
    """
    check_number("scale", scale, "(0, inf)")
    _check_series(y, may_lack=True)
    prior = dist.HalfNormal(scale)
    sigma, sigma_level, sigma_slope = (
        numpyro.sample(name, prior) for name in ("sigma", "sigma_level", "sigma_slope")
    )

    def system():
        return LinearGaussian(
            transition=jnp.array([[1.0, 1.0], [0.0, 1.0]]),
            loading=jnp.array([1.0, 0.0]),
            state_noise=jnp.diag(jnp.stack([sigma_level, sigma_slope]) ** 2),
            observation_noise=sigma**2,
        )

    mean, covariance = jnp.zeros(2), (10 * scale) ** 2 * jnp.eye(2)
    numpyro.factor("y", kalman(y, system, mean, covariance, scan=scan))


class LinearGaussian(NamedTuple):
    r"""A linear-Gaussian state-space model of a series of numbers.

    .. math:: y_t \sim N(h \cdot x_t, r), \qquad x_{t+1} \sim N(F x_t, Q)

    Attributes:
        transition: F, (states, states).
        loading: h, (states,).
        state_noise: Q, (states, states), a covariance.
        observation_noise: r, a variance.

    Example:
        A random walk, seen through noise of variance 0.25.

        >>> import jax.numpy as jnp
        >>> one = jnp.ones((1, 1))
        >>> walk = LinearGaussian(one, jnp.ones(1), state_noise=one, observation_noise=0.25)
    """

    transition: jax.Array
    loading: jax.Array
    state_noise: jax.Array
    observation_noise: jax.Array


def kalman(
    y: jax.Array,
    system: Callable[[], LinearGaussian],
    mean: jax.Array,
    covariance: jax.Array,
    *,
    scan: Callable = rtrl.scan,
) -> jax.Array:
    """Return the log likelihood of a series, states integrated out (Kalman, 1960).

    Args:
        y: (time,), NaN where a value is missing.
        system: makes the matrices, inside the loop, of what it closes over: few numbers, so that
            few are differentiated. The compiler takes out of the loop what does not change in it.
        mean: (states,), of the first state.
        covariance: (states, states), of the first state.
        scan: the loop.

    Returns:
        The log likelihood, a scalar.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> one = jnp.ones((1, 1))
        >>> y = jnp.array([0.1, 0.7, jnp.nan, 1.2])
        >>> def log_likelihood(noise):
        ...     return kalman(y, lambda: LinearGaussian(one, jnp.ones(1), one, noise), one[0], one)
        >>> grad = jax.grad(log_likelihood)(0.25)
    """

    def step(carry, y):
        mean, covariance, total = carry
        transition, loading, state_noise, observation_noise = system()
        is_seen = ~jnp.isnan(y)
        # Of a missing value nothing is learnt: no gain, no density.
        surprise = jnp.where(is_seen, y, 0.0) - loading @ mean
        variance = loading @ covariance @ loading + observation_noise
        gain = jnp.where(is_seen, covariance @ loading / variance, 0.0)
        density = -0.5 * (surprise**2 / variance + jnp.log(2 * jnp.pi * variance))
        mean = transition @ (mean + gain * surprise)
        covariance = covariance - variance * jnp.outer(gain, gain)
        covariance = transition @ covariance @ transition.T + state_noise
        return (mean, covariance, total + jnp.where(is_seen, density, 0.0)), None

    dtype = jnp.result_type(y, mean, covariance, *jax.tree.leaves(jax.eval_shape(system)))
    start = mean.astype(dtype), covariance.astype(dtype), jnp.zeros((), dtype)
    (_, _, total), _ = scan(step, start, y)
    return total


def hidden_markov(
    y: jax.Array, *, num_regimes: int = 2, scale: float = 1.0, scan: Callable = rtrl.scan
) -> None:
    r"""A series whose mean and spread switch between hidden regimes (Baum et al., 1970).

    .. math::
        y_t \sim N(\mu_{z_t}, \sigma_{z_t}), \qquad z_{t+1} \sim \mathrm{Categorical}(T_{z_t})

    The regimes are integrated out by the forward algorithm; the first is uniform. Means are in
    ascending order, so that regimes have names.

    Args:
        y: (time,), best standardised.
        num_regimes: number of regimes.
        scale: of the priors of means and spreads. Rows of T have a Dirichlet prior that expects a
            regime to last for ten steps.
        scan: the loop.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro.handlers import seed, trace
        >>> sites = trace(seed(hidden_markov, 0)).get_trace(jnp.zeros(5), num_regimes=3)
        >>> sites["transition"]["value"].shape
        (3, 3)
    """
    num_regimes = check_count("num_regimes", num_regimes)
    check_number("scale", scale, "(0, inf)")
    _check_series(y)
    concentration = jnp.ones((num_regimes, num_regimes))
    concentration = concentration + jnp.eye(num_regimes) * 9 * (num_regimes - 1)
    transition = numpyro.sample("transition", dist.Dirichlet(concentration).to_event(1))
    with numpyro.plate("regimes", num_regimes):
        sigma = numpyro.sample("sigma", dist.HalfNormal(scale))
    mu = numpyro.sample(
        "mu",
        dist.TransformedDistribution(
            dist.Normal(0.0, scale).expand([num_regimes]).to_event(1),
            dist.transforms.OrderedTransform(),
        ),
    )

    def step(carry, y):
        # The probabilities of the regimes given the past, and the log density of the past.
        belief, total = carry
        log_joint = jnp.log(belief) + dist.Normal(mu, sigma).log_prob(y)
        evidence = jax.nn.logsumexp(log_joint)
        now = jnp.exp(log_joint - evidence)
        return (jnp.sum(now[:, None] * transition, axis=0), total + evidence), None

    dtype = jnp.result_type(y, mu)
    start = jnp.full(num_regimes, 1 / num_regimes, dtype), jnp.zeros((), dtype)
    (_, total), _ = scan(step, start, y)
    numpyro.factor("y", total)


def pendulum(
    y: jax.Array,
    *,
    time_step: float,
    num_substeps: int = 1,
    max_frequency: float = 10.0,
    scan: Callable = rtrl.scan,
) -> None:
    r"""A damped pendulum, of any amplitude, whose angle is seen through noise.

    .. math:: \ddot\varphi = -\omega^2 \sin\varphi - 2 \zeta \omega \dot\varphi, \qquad
        y_t \sim N(\varphi_t, \sigma)

    by Runge and Kutta's method of fourth order.

    Args:
        y: (time,), angles [rad], the first at the start.
        time_step: between angles [s].
        num_substeps: steps of the method between angles.
        max_frequency: upper end of omega's uniform prior [rad/s].
        scan: the loop.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro.handlers import seed, trace
        >>> y = jnp.array([0.5, 0.4, 0.1, -0.2])
        >>> sorted(trace(seed(pendulum, 0)).get_trace(y, time_step=0.1))
        ['angle', 'omega', 'sigma', 'velocity', 'y', 'zeta']
    """
    check_number("time_step", time_step, "(0, inf)")
    num_substeps = check_count("num_substeps", num_substeps)
    check_number("max_frequency", max_frequency, "(0, inf)")
    _check_series(y)
    omega = numpyro.sample("omega", dist.Uniform(0.0, max_frequency))
    zeta = numpyro.sample("zeta", dist.HalfNormal(0.5))
    angle = numpyro.sample("angle", dist.Uniform(-jnp.pi, jnp.pi))
    velocity = numpyro.sample("velocity", dist.Normal(0.0, max_frequency))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    h = time_step / num_substeps

    def slope(state):
        return jnp.stack([state[1], -(omega**2) * jnp.sin(state[0]) - 2 * zeta * omega * state[1]])

    def advance(_, state):
        return runge_kutta.step(slope, state, h)

    def step(carry, y):
        state, total = carry
        total = total + dist.Normal(state[0], sigma).log_prob(y)
        return (jax.lax.fori_loop(0, num_substeps, advance, state), total), None

    dtype = jnp.result_type(y, omega)
    state = jnp.stack([angle, velocity]).astype(dtype)
    (_, total), _ = scan(step, (state, jnp.zeros((), dtype)), y)
    numpyro.factor("y", total)


def streamed(
    name: str,
    step: Callable[[Tree, Tree, Tree], tuple[Tree, jax.Array]],
    params: Tree,
    init: Tree,
    xs: Tree,
) -> jax.Array:
    r"""Return the log likelihood of the next stretch of a series that streams through a model.

    For a model that is handed one stretch a step of SVI: the state at the end of each, and its
    sensitivity to the parameters, are kept in NumPyro's mutable state and taken up by the next. The
    gradient is that of the stretch's log likelihood given the whole past, with respect to one shift
    of all past and present parameters (`probbp.ops.rtrl.advance`), where a scan that starts afresh
    would forget how the state came about. Memory does not grow with what has streamed.

    Args:
        name: of the mutable site.
        step: `(params, state, x) -> (state, log_density)`.
        params: pytree of floating-point arrays.
        init: pytree of floating-point arrays, the state before the first stretch.
        xs: pytree of arrays with the time on the first axis: the stretch.

    Returns:
        The log likelihood of the stretch, a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> from numpyro.handlers import seed, trace
        >>> def step(params, mean, y):  # an exponentially weighted mean, and what y is worth
        ...     return mean + params["gain"] * (y - mean), -0.5 * (y - mean) ** 2
        >>> def model(y):
        ...     gain = numpyro.sample("gain", dist.Uniform())
        ...     numpyro.factor("y", streamed("mean", step, {"gain": gain}, jnp.zeros(()), y))
        >>> sorted(trace(seed(model, 0)).get_trace(jnp.ones(10)))
        ['gain', 'mean', 'y']
    """
    init = jax.tree.map(jnp.asarray, init)

    def no_sensitivity(leaf):
        return jax.tree.map(lambda p: jnp.zeros(leaf.shape + jnp.shape(p), leaf.dtype), params)

    kept = numpyro.primitives.mutable(
        name, {"state": init, "sensitivity": jax.tree.map(no_sensitivity, init)}
    )

    def with_total(params, carry, x):
        state, density = step(params, carry[0], x)
        return state, carry[1] + density

    total = jnp.zeros(())
    start = (kept["state"], total), (kept["sensitivity"], no_sensitivity(total))
    carry, sensitivity = rtrl.advance(with_total, params, *start, xs)
    kept["state"], kept["sensitivity"] = carry[0], sensitivity[0]
    return rtrl.attach(carry[1], sensitivity[1], params)


def _check_series(y, *, may_lack=False):
    """Require a series of numbers; NaN stands for missing values where a model may lack some."""
    if jnp.ndim(y) != 1 or not jnp.size(y):
        raise ValueError(f"y must be a series (time,), got {jnp.shape(y)}: y[:, 0] of a column.")
    if not may_lack:
        way_out = "Of missing values only local_linear_trend and kalman know what to do."
        check_numbers("y", y, "(-inf, inf)", way_out)
