"""Densities with known moments and exact draws, for tests of samplers.

`TARGETS` holds the four of the invariance test; `gaussian` and `anisotropic` build
Gaussians of any dimension. The funnel is the one of Cobb & Jha, 2025, arXiv:2505.18081,
whose sign is opposite to Neal's: w ~ N(0, 3^2), x_i ~ N(0, exp(-w)).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import chi2

Statistic = Callable[[Any], Any]


class Target(NamedTuple):
    """A density on R^d with what a test needs to know about it.

    logdensity_fn: `(d,) -> ()`, up to a constant, in the dtype of its argument.
    draw: `(rng_key, num) -> (num, d)`, exact and independent.
    statistics: name to `(..., d) -> (...,)`, for NumPy and JAX arrays alike. Half of them
        are bounded: a bug that throws a chain far away has infinite variance, so that
        only the z-score of an indicator is sure to see it.
    mean, covariance: exact, (d,) and (d, d).
    """

    name: str
    logdensity_fn: Callable[[jax.Array], jax.Array]
    draw: Callable[[jax.Array, int], jax.Array]
    statistics: dict[str, Statistic]
    mean: np.ndarray
    covariance: np.ndarray

    @property
    def dim(self) -> int:
        """Length d of a position."""
        return len(self.mean)


def gaussian(dim: int) -> Target:
    """N(0, I)."""
    return _gaussian(f"gaussian{dim}", np.eye(dim))


def anisotropic(dim: int, seed: int = 0, condition: float = 100.0) -> Target:
    """N(0, Q diag(λ) Qᵀ): Q random, λ geometric from 1 / √condition to √condition."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    variances = np.geomspace(condition**-0.5, condition**0.5, dim)
    return _gaussian(f"anisotropic{dim}", (rotation * variances) @ rotation.T)


def funnel(dim: int) -> Target:
    """The funnel of total dimension `dim`; a position is (w, x_1, .., x_{dim-1})."""

    def logdensity_fn(position):
        w, x = position[0], position[1:]
        return -(w**2) / 18 + (dim - 1) * w / 2 - jnp.exp(w) * jnp.sum(x**2) / 2

    def draw(rng_key, num):
        key_w, key_x = jax.random.split(rng_key)
        w = 3 * jax.random.normal(key_w, (num, 1))
        x = jnp.exp(-w / 2) * jax.random.normal(key_x, (num, dim - 1))
        return jnp.concatenate([w, x], axis=-1)

    def radius(p):  # chi-square with dim - 1 degrees of freedom, independent of w
        return jnp.exp(p[..., 0]) * (p[..., 1:] ** 2).sum(-1)

    quarter, half, most = (chi2.ppf(q, dim - 1) for q in (0.25, 0.5, 0.9))
    statistics = {
        "w": _coordinate(0),
        "w^2": _square(0),
        **{f"x{i}": _coordinate(i) for i in range(1, dim)},
        # The raw squares of x have too heavy a tail to tell anything.
        **{f"x{i}^2 e^w": _scaled_square(i) for i in range(1, dim)},
        "w<-3": lambda p: p[..., 0] < -3,
        "w<0": lambda p: p[..., 0] < 0,
        "w>3": lambda p: p[..., 0] > 3,
        "|w|<1": lambda p: abs(p[..., 0]) < 1,
        "r2<q25": lambda p: radius(p) < quarter,
        "r2<q50": lambda p: radius(p) < half,
        "r2>q90": lambda p: radius(p) > most,
        "w<0,r2<q50": lambda p: (p[..., 0] < 0) & (radius(p) < half),
        "w>0,r2<q50": lambda p: (p[..., 0] > 0) & (radius(p) < half),
        "x1>0": lambda p: p[..., 1] > 0,
        "|x1|<1": lambda p: abs(p[..., 1]) < 1,
    }
    covariance = np.diag([9.0] + [np.exp(4.5)] * (dim - 1))
    return Target(f"f{dim}", logdensity_fn, draw, statistics, np.zeros(dim), covariance)


def mixture() -> Target:
    """½ N(m, I) + ½ N(-m, I) with m = (1.5, 1.5)."""
    center = np.full(2, 1.5)

    def logdensity_fn(position):
        m = jnp.asarray(center, position.dtype)
        squares = jnp.stack([jnp.sum((position - s * m) ** 2) for s in (-1, 1)])
        return jax.nn.logsumexp(-squares / 2)

    def draw(rng_key, num):
        key_sign, key_noise = jax.random.split(rng_key)
        sign = jax.random.rademacher(key_sign, (num, 1), float)
        return 1.5 * sign + jax.random.normal(key_noise, (num, 2))

    statistics = {
        **_moments(2),
        "x0 x1": lambda x: x[..., 0] * x[..., 1],
        "r2<1": lambda x: (x**2).sum(-1) < 1,
        "r2<4": lambda x: (x**2).sum(-1) < 4,
        "r2>12": lambda x: (x**2).sum(-1) > 12,
        "x0>1.5": lambda x: x[..., 0] > 1.5,
        "x0<-2.5": lambda x: x[..., 0] < -2.5,
        "|x0+x1|<1": lambda x: abs(x[..., 0] + x[..., 1]) < 1,
        "|x0-x1|<1": lambda x: abs(x[..., 0] - x[..., 1]) < 1,
        "x0,x1>0": lambda x: (x[..., 0] > 0) & (x[..., 1] > 0),
    }
    covariance = np.eye(2) + np.outer(center, center)
    return Target("mix", logdensity_fn, draw, statistics, np.zeros(2), covariance)


def _gaussian(name: str, covariance: np.ndarray) -> Target:
    dim = len(covariance)
    precision = np.linalg.inv(covariance)
    root = np.linalg.cholesky(covariance)
    whiten = np.linalg.inv(root)
    sd = np.sqrt(np.diag(covariance))

    def logdensity_fn(position):
        return -position @ jnp.asarray(precision, position.dtype) @ position / 2

    def draw(rng_key, num):
        return jax.random.normal(rng_key, (num, dim)) @ jnp.asarray(root.T, float)

    def radius(x):  # chi-square with dim degrees of freedom
        return ((x @ whiten.T) ** 2).sum(-1)

    quarter, half, most = (chi2.ppf(q, dim) for q in (0.25, 0.5, 0.9))
    statistics = {
        **_moments(dim),
        "x0 x-1": lambda x: x[..., 0] * x[..., -1],
        "r2<q25": lambda x: radius(x) < quarter,
        "r2<q50": lambda x: radius(x) < half,
        "r2>q90": lambda x: radius(x) > most,
        "|x|2<1": lambda x: (x**2).sum(-1) < 1,
        "x0<-sd": lambda x: x[..., 0] < -sd[0],
        "|x0|<sd": lambda x: abs(x[..., 0]) < sd[0],
        "x-1>sd": lambda x: x[..., -1] > sd[-1],
        "|x-1|<sd": lambda x: abs(x[..., -1]) < sd[-1],
        "x0,x-1>0": lambda x: (x[..., 0] > 0) & (x[..., -1] > 0),
    }
    return Target(name, logdensity_fn, draw, statistics, np.zeros(dim), covariance)


def _moments(dim: int) -> dict[str, Statistic]:
    first = {f"x{i}": _coordinate(i) for i in range(dim)}
    return first | {f"x{i}^2": _square(i) for i in range(dim)}


def _coordinate(i: int) -> Statistic:
    return lambda x: x[..., i]


def _square(i: int) -> Statistic:
    return lambda x: x[..., i] ** 2


def _scaled_square(i: int) -> Statistic:
    return lambda p: p[..., i] ** 2 * jnp.exp(p[..., 0])


TARGETS = {
    target.name: target
    for target in (
        _gaussian("g2", np.array([[1.0, 1.8], [1.8, 4.0]])),
        funnel(2),
        funnel(10),
        mixture(),
    )
}
