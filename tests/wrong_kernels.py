"""Forward-mode MALA in plain JAX: the published kernels, and the same with one bug each.

Cobb & Jha, 2025, arXiv:2505.18081, on flat vectors and independent of the package. A test
of the invariance test: it must pass `RIGHT` and reject every entry of `WRONG`.

Notation: f = log π, v a unit tangent, a = ∇f(x)·v, η = |vᵀ∇²f(x)v| (1 where there is no
preconditioning), ε the step; b, η* are the same at the proposal y.
"""

from functools import partial

import jax
import jax.numpy as jnp

# ---------------------------------------------------------------------------------------
# Two kernels with switches. Their defaults are right.


def full_noise(
    logdensity_fn,
    epsilon,
    *,
    curved=False,
    reverse_tangent="same",
    hastings=True,
    reverse_slope=True,
    reverse_scale=True,
    noise_key=True,
    log_det=lambda d: d,
):
    """FMALA and, if `curved`, PC-FMALA: y = x + ½ε²(a/η) v + σ z, σ² = ε²/η, z in R^d.

    log r = f(y) - f(x) + log N(x; y + ½ε²(b/η*) w, σ*²) - log N(y; x + ½ε²(a/η) v, σ²).

    Args:
        logdensity_fn: f, `(d,) -> ()`.
        epsilon: ε.
        curved: precondition by η.
        reverse_tangent: w is the "same" v, a "fresh" one, or the unit "displacement".
        hastings: keep the two proposal densities.
        reverse_slope: take b at y, not a again.
        reverse_scale: take η* at y, not η again.
        noise_key: give z a key of its own, not the key of v.
        log_det: how often -log σ enters a density of dimension d.
    """

    def step(rng_key, x):
        key_v, key_z, key_w, key_accept = jax.random.split(rng_key, 4)
        v = unit_tangent(key_v, x)
        z = jax.random.normal(key_z if noise_key else key_v, x.shape, x.dtype)
        f_x, a, eta = derivatives(logdensity_fn, x, v, curved)
        y = x + epsilon**2 / 2 * a / eta * v + epsilon / jnp.sqrt(eta) * z

        if reverse_tangent == "same":
            w = v
        elif reverse_tangent == "fresh":
            w = unit_tangent(key_w, x)
        else:
            w = (y - x) / jnp.linalg.norm(y - x)
        f_y, b, eta_y = derivatives(logdensity_fn, y, w, curved)
        b = b if reverse_slope else a
        eta_y = eta_y if reverse_scale else eta

        def log_normal(displacement, slope, tangent, eta):
            residual = displacement - epsilon**2 / 2 * slope / eta * tangent
            quadratic = jnp.sum(residual**2) * eta / epsilon**2
            return (log_det(x.size) * jnp.log(eta) - quadratic) / 2

        log_ratio = f_y - f_x
        if hastings:
            log_ratio += log_normal(x - y, b, w, eta_y) - log_normal(y - x, a, v, eta)
        return accept(key_accept, log_ratio, x, y)

    return step


def line(
    logdensity_fn,
    epsilon,
    *,
    curved=False,
    tangent="unit",
    reverse_tangent="same",
    hastings=True,
    reverse_scale=True,
    projected=False,
    log_det=lambda d: 1,
):
    """Line-FMALA and, if `curved`, PC-Line-FMALA: y = x + s v with a scalar s.

    s = ½ε² a/η + ε z/√η, and the densities are those of s on the line:
    log r = f(y) - f(x) + log N(-s; ½ε² b/η*, ε²/η*) - log N(s; ½ε² a/η, ε²/η).

    Args:
        logdensity_fn: f, `(d,) -> ()`.
        epsilon: ε.
        curved: precondition by η.
        tangent: v is "unit", of "gaussian" length, or depends on the "position".
        reverse_tangent: the tangent of b is the "same" v or a "fresh" one.
        hastings: keep the two proposal densities.
        reverse_scale: take η* at y, not η again.
        projected: write the densities in the coordinate α = x·v, which is s for unit v
            (for Gaussian v it is not) and x·w in the reverse one.
        log_det: how often -log σ enters a density of s, in d dimensions.
    """

    def step(rng_key, x):
        key_v, key_z, key_w, key_accept = jax.random.split(rng_key, 4)
        if tangent == "unit":
            v = unit_tangent(key_v, x)
        else:
            v = jax.random.normal(key_v, x.shape, x.dtype)
            if tangent == "position":
                v = (x + v) / jnp.linalg.norm(x + v)
        f_x, a, eta = derivatives(logdensity_fn, x, v, curved)
        z = jax.random.normal(key_z, (), x.dtype)
        s = epsilon**2 / 2 * a / eta + epsilon / jnp.sqrt(eta) * z
        y = x + s * v

        w = v if reverse_tangent == "same" else unit_tangent(key_w, x)
        f_y, b, eta_y = derivatives(logdensity_fn, y, w, curved)
        eta_y = eta_y if reverse_scale else eta

        def log_normal(along, slope, eta):
            residual = along - epsilon**2 / 2 * slope / eta
            quadratic = residual**2 * eta / epsilon**2
            return (log_det(x.size) * jnp.log(eta) - quadratic) / 2

        forward, reverse = (s * v @ v, -s * v @ w) if projected else (s, -s)
        log_ratio = f_y - f_x
        if hastings:
            log_ratio += log_normal(reverse, b, eta_y) - log_normal(forward, a, eta)
        return accept(key_accept, log_ratio, x, y)

    return step


# ---------------------------------------------------------------------------------------
# What both share.


def unit_tangent(rng_key, x):
    """Uniform on the unit sphere."""
    v = jax.random.normal(rng_key, x.shape, x.dtype)
    return v / jnp.linalg.norm(v)


def derivatives(logdensity_fn, x, v, curved):
    """f, a = ∇f·v, and η = |vᵀ∇²f v| if `curved`, else 1."""

    def value_and_slope(x):
        return jax.jvp(logdensity_fn, (x,), (v,))

    if not curved:
        return *value_and_slope(x), jnp.ones((), x.dtype)
    (f, a), (_, h) = jax.jvp(value_and_slope, (x,), (v,))
    return f, a, jnp.abs(h)


def accept(rng_key, log_ratio, x, y):
    """Metropolis: y with probability min(1, r); x if r is not a number."""
    log_u = jnp.log(jax.random.uniform(rng_key, (), x.dtype))
    return jnp.where(log_u < log_ratio, y, x)


# ---------------------------------------------------------------------------------------
# The tables.

pc_fmala = partial(full_noise, curved=True)
pc_line = partial(line, curved=True)

# Name to (builder, ε); `builder(logdensity_fn, ε)` gives `step(rng_key, position)`.
RIGHT = {
    "fmala same": (full_noise, 0.8),
    "fmala fresh": (partial(full_noise, reverse_tangent="fresh"), 0.8),
    "line": (line, 1.6),
    "pc-fmala same": (pc_fmala, 0.8),
    "pc-fmala fresh": (partial(pc_fmala, reverse_tangent="fresh"), 0.8),
    "pc-line": (pc_line, 1.6),
}

# Name to (builder, ε, the target that shows the bug best).
WRONG = {
    "fmala, no hastings": (partial(full_noise, hastings=False), 2.4, "f2"),
    "fmala, forward slope in reverse": (partial(full_noise, reverse_slope=False), 2.4, "f2"),
    "fmala, one key for v and z": (partial(full_noise, noise_key=False), 0.4, "f10"),
    "fmala, displacement as tangent": (
        partial(full_noise, reverse_tangent="displacement"),
        0.4,
        "f10",
    ),
    "pc-fmala, no log-det": (
        partial(pc_fmala, reverse_tangent="fresh", log_det=lambda d: 0),
        0.8,
        "f10",
    ),
    "pc-fmala, forward scale both ways": (partial(pc_fmala, reverse_scale=False), 2.4, "f2"),
    "pc-fmala, log-det of d - 1": (partial(pc_fmala, log_det=lambda d: d - 1), 1.6, "f2"),
    "line, no hastings": (partial(line, hastings=False), 0.8, "mix"),
    "line, fresh tangent in reverse": (partial(line, reverse_tangent="fresh"), 0.4, "g2"),
    "line, fresh tangent, projected": (
        partial(line, reverse_tangent="fresh", projected=True),
        1.6,
        "f2",
    ),
    "line, gaussian tangent, projected": (
        partial(line, tangent="gaussian", projected=True),
        0.8,
        "f10",
    ),
    "line, tangent from position": (partial(line, tangent="position"), 1.6, "f10"),
    "pc-line, no log-det": (partial(pc_line, log_det=lambda d: 0), 1.6, "f2"),
    "pc-line, forward scale both ways": (partial(pc_line, reverse_scale=False), 2.4, "f2"),
    "pc-line, log-det of d": (partial(pc_line, log_det=lambda d: d), 1.6, "f10"),
}
