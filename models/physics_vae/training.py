"""SVI with a strength that follows its steps, and the players for an optimiser of each."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax.core import Tracer
from numpyro.infer import SVI, Trace_ELBO

from probbp.checks import check_count, check_number
from probbp.models.physics_vae.model import PhysicsVAE

Schedule = Callable[[Any], Any]


def svi(
    vae: PhysicsVAE,
    optimiser: Any,
    *,
    strength: float | Schedule = 0.0,
    invariance: float | Schedule | None = None,
    relative: bool = False,
    loss: Any = None,
) -> SVI:
    """Return NumPyro's SVI with a strength that follows its steps.

    `SVI(vae.model, vae.guide, optimiser, loss)` with `strength=...` in each call of `update` does
    the same. Here `run` takes a schedule too: a step's strength is computed in the compiled step.

    The optimiser sees a vector field that is no gradient where the strength is above 0. As a game
    of two players it has its own rules: `optax.multi_transform({...}, roles)` gives each player an
    optimiser, and `optax.optimistic_gradient_descent` or `optax.optimistic_adam_v2` are updates
    that do not circle around a saddle.

    A model is not to be chosen by its loss or by its reconstruction: the plain autoencoder,
    strength -1, has the best of both and the worst physics.

    Args:
        vae: from `physics_vae`.
        optimiser: of Optax or NumPyro.
        strength: lambda, or a function of the number of steps made. Useful strengths are small: the
            reversed gradient sums over all outputs, and grows as 1 / sigma_x^2. The paper takes
            values with lambda * outputs from 1 / 16 to 1 / 2. The default cuts the gradient.
        invariance: factor of the adversary on z_x, or a schedule; `None` for no adversary.
        relative: whether the strength is in units of sigma_x^2 / outputs.
        loss: an ELBO; by default `Trace_ELBO` with four particles.

    Warns:
        UserWarning: for a constant strength above 1 / outputs, unless relative: it overpowers the
            labels, and the fit collapses.

    Example:
        >>> schedule = dann_schedule(1 / 256, num_steps=1000)
        >>> float(schedule(0)), round(256 * float(schedule(1000)), 3)
        (0.0, 1.0)
    """
    if not callable(strength):
        check_number("strength", strength, "(-inf, inf)")
    if invariance is not None and not callable(invariance):
        check_number("invariance", invariance, "(-inf, inf)")
    is_known = not isinstance(strength, Tracer)
    if not callable(strength) and is_known and not relative and strength > 1 / vae.num_outputs:
        warnings.warn(
            f"strength={strength} is {strength * vae.num_outputs:.3g} / outputs. The reversed "
            "gradient sums over outputs: above 1 / outputs it overpowers the labels' and the fit "
            "collapses. Take less, or relative=True.",
            stacklevel=2,
        )
    loss = Trace_ELBO(num_particles=4) if loss is None else loss
    return _ScheduledSVI(vae, optimiser, loss, strength, invariance, relative)


def dann_schedule(peak: float, num_steps: int, *, sharpness: float = 10.0) -> Schedule:
    r"""Return the schedule :math:`\lambda_p = \lambda (2 / (1 + e^{-\gamma p}) - 1)` of a strength.

    Args:
        peak: lambda, reached up to a factor tanh(gamma / 2).
        num_steps: at which p, the share of them that is made, is one; there it stays.
        sharpness: gamma.

    Reference:
        Ganin et al., 2016, arXiv:1505.07818, section 5.2.2.

    Returns:
        `(step) -> strength`.

    Example:
        >>> schedule = dann_schedule(2.0, 100)
        >>> [round(float(schedule(step)), 2) for step in (0, 10, 100)]
        [0.0, 0.92, 2.0]
    """
    check_number("peak", peak, "(-inf, inf)")
    num_steps = check_count("num_steps", num_steps)
    check_number("sharpness", sharpness, "(0, inf)")

    def schedule(step):
        p = jnp.minimum(step / num_steps, 1.0)
        return peak * (2 / (1 + jnp.exp(-sharpness * p)) - 1)

    return schedule


def cyclical_schedule(peak: float, period: int, *, ramp: float = 0.5) -> Schedule:
    """Return a schedule that climbs from 0 to `peak` in each period, and stays for its rest.

    Args:
        peak: the largest strength.
        period: steps of a cycle.
        ramp: share of the period in which it climbs.

    Returns:
        `(step) -> strength`.

    Example:
        >>> schedule = cyclical_schedule(1.0, period=100)
        >>> [round(float(schedule(step)), 2) for step in (0, 25, 75, 100)]
        [0.0, 0.5, 1.0, 0.0]
    """
    check_number("peak", peak, "(-inf, inf)")
    period = check_count("period", period)
    check_number("ramp", ramp, "(0, 1]")
    return lambda step: peak * jnp.minimum((step % period) / (ramp * period), 1.0)


def roles(params: Mapping[str, Any]) -> dict[str, str]:
    """Name the players to whom parameters belong, as labels for `optax.multi_transform`.

    Args:
        params: of SVI, by name.

    Returns:
        "encoder", which the reversed gradients reach; "adversary", the networks that read z_x;
        "noise", sigma_x; "decoder", the rest.

    Example:
        >>> roles({"encoder$params": 0, "residual$params": 0, "sigma_x": 0})
        {'encoder$params': 'encoder', 'residual$params': 'decoder', 'sigma_x': 'noise'}
    """

    def role(name):
        if name.startswith(("encoder", "adversary")):
            return name.split("_")[0].split("$")[0]
        return "noise" if name == "sigma_x" else "decoder"

    return {name: role(name) for name in params}


class _ScheduledSVI(SVI):
    """SVI that hands each step its strengths."""

    def __init__(self, vae, optimiser, loss, strength, invariance, relative):
        super().__init__(vae.model, vae.guide, optimiser, loss, relative=relative)
        self._schedules = {"strength": strength}
        if invariance is not None:
            self._schedules["invariance"] = invariance

    def _at(self, svi_state):
        step = svi_state.optim_state[0]
        return {name: s(step) if callable(s) else s for name, s in self._schedules.items()}

    def init(self, rng_key, *args, **kwargs):
        options = {name: s(0) if callable(s) else s for name, s in self._schedules.items()}
        return super().init(rng_key, *args, **options | kwargs)

    def update(self, svi_state, *args, **kwargs):
        return super().update(svi_state, *args, **self._at(svi_state) | kwargs)

    def stable_update(self, svi_state, *args, **kwargs):
        return super().stable_update(svi_state, *args, **self._at(svi_state) | kwargs)

    def evaluate(self, svi_state, *args, **kwargs):
        return super().evaluate(svi_state, *args, **self._at(svi_state) | kwargs)
