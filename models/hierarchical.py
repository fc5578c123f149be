"""Regression whose intercepts vary by group and share what they have in common."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from probbp.checks import check_count, check_number, check_numbers


def model(
    x: jax.Array,
    group: jax.Array,
    y: jax.Array | None = None,
    *,
    num_groups: int,
    scale: float = 1.0,
    is_centered: bool = True,
) -> None:
    r"""Linear regression with common slopes and partially pooled intercepts.

    .. math::
        \alpha_g \sim N(\mu, \tau), \qquad y_i \sim N(\alpha_{g(i)} + \beta \cdot x_i,\, \sigma)

    Args:
        x: (rows, features), best standardised.
        group: (rows,), integers below `num_groups`.
        y: (rows,), best standardised; `None` to predict.
        num_groups: number of groups.
        scale: of the priors of mean and spread of the intercepts, of slopes and noise.
        is_centered: whether alpha is sampled itself, best where groups have much data, or as
            mu + tau z with z ~ N(0, 1), best where they have little.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro.handlers import seed, trace
        >>> x, group = jnp.ones((6, 2)), jnp.array([0, 0, 1, 1, 2, 2])
        >>> sites = trace(seed(model, 0)).get_trace(x, group, num_groups=3)
        >>> sites["alpha"]["value"].shape, sites["y"]["value"].shape
        ((3,), (6,))
    """
    num_groups = check_count("num_groups", num_groups)
    check_number("scale", scale, "(0, inf)")
    _check_rows(x, group, y, num_groups)
    mu = numpyro.sample("mu", dist.Normal(0, scale))
    tau = numpyro.sample("tau", dist.HalfNormal(scale))
    beta = numpyro.sample("beta", dist.Normal(0, scale).expand([x.shape[1]]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(scale))
    with numpyro.plate("group", num_groups):
        if is_centered:
            alpha = numpyro.sample("alpha", dist.Normal(mu, tau))
        else:
            z = numpyro.sample("z", dist.Normal(0, 1))
            alpha = numpyro.deterministic("alpha", mu + tau * z)
    with numpyro.plate("rows", x.shape[0]):
        numpyro.sample("y", dist.Normal(alpha[group] + x @ beta, sigma), obs=y)


def _check_rows(x, group, y, num_groups):
    if jnp.ndim(x) != 2:
        raise ValueError(f"x must be (rows, slopes), got {jnp.shape(x)}: x[:, None] for one slope.")
    for name, value in {"group": group, "y": y}.items():
        if value is not None and jnp.shape(value) != x.shape[:1]:
            raise ValueError(
                f"{name} must have one entry for each of the {x.shape[0]} rows, {x.shape[:1]}, got "
                f"{jnp.shape(value)}: take {name}[:, 0] of a column."
            )
    if not jnp.issubdtype(jnp.result_type(group), jnp.integer):
        raise TypeError(f"group must be integers, got {jnp.result_type(group)}: cast it.")
    check_numbers("group", group, f"[0, {num_groups})", "Groups are counted from 0.")
