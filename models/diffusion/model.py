"""A diffusion model as a prior: noise is the sample site, and what it becomes is deterministic."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from probbp.checks import check_number
from probbp.ops import sdo
from probbp.ops.sdo import Subset


def prior(
    name: str,
    denoiser: Callable[..., jax.Array],
    shape: Sequence[int],
    schedule: sdo.Schedule,
    *,
    eta: float = 0.0,
    keep_step: Any = "first",
    **options: Any,
) -> jax.Array:
    r"""Sample from a diffusion model inside a NumPyro model.

    .. math:: x_T \sim N(0, I), \qquad x_0 = \mathrm{sampler}(x_T)

    **Sites.** `<name>_noise`, x_T; with `eta` above 0 `<name>_step_noise` too,
    `(num_steps, *shape)`,
    what the sampler adds; and `<name>`, x_0, deterministic. The user's likelihood is of x_0.
    Conditioning that is to be inferred is a site of the user's that `denoiser` closes over.

    The log density is exact, that of the sampler as it is, with its number of steps. Its derivative
    goes through `keep_step`: SVI optimises with that, and Metropolis samplers (`probbp.mala` by
    `probbp.numpyro.Kernel`, NumPyro's HMC) are exact with it. Draws "random" and `Subset` take
    `numpyro.prng_key()`: a fresh key in each step of SVI and of `Kernel`; NumPyro's own MCMC has
    one for the whole run, and stays exact.

    Args:
        name: of the site.
        denoiser: as `probbp.ops.sdo.sample` takes it, for a batch of `(batch, *shape)`.
        shape: of one sample. Plates around the call add their own.
        schedule: from `probbp.ops.sdo`.
        eta: 0 for DDIM, 1 for DDPM.
        keep_step: what a derivative goes through; "all" is exact.
        **options: of `probbp.ops.sdo.sample`: `surrogate`, `prediction`, `checkpoint`.

    Returns:
        x_0, `(*plates, *shape)`.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from probbp.models import diffusion
        >>> from probbp.ops import sdo
        >>> schedule = sdo.linear(20)
        >>> data = diffusion.mixture([0.5, 0.5], [[-2.0, 0.0], [2.0, 0.0]], jnp.eye(2) / 4)
        >>> denoiser = diffusion.mixture_denoiser(data, schedule)
        >>> path = sdo.gaussian_path(data.variance)
        >>> def model(y):
        ...     x = diffusion.prior("x", denoiser, (2,), schedule, surrogate=path)
        ...     numpyro.sample("y", dist.Normal(x[0], 0.5), obs=y)
        >>> svi = SVI(model, AutoNormal(model), numpyro.optim.Adam(0.05), Trace_ELBO())
        >>> result = svi.run(jax.random.key(0), 50, jnp.array(2.0), progress_bar=False)
        >>> bool(result.losses[-1] < result.losses[0])
        True
    """
    check_number("eta", eta, "[0, 1]", "It is 0 for DDIM, 1 for DDPM.")
    shape, num_steps = tuple(shape), len(schedule.times)

    def normal(site, shape):
        event = dist.Normal(jnp.zeros(shape), 1.0).to_event(len(shape))
        return numpyro.sample(f"{name}_{site}", event)

    noise = normal("noise", shape)
    plates = noise.shape[: noise.ndim - len(shape)]
    if eta:
        step_noise = normal("step_noise", (num_steps, *shape))
        step_noise = jnp.moveaxis(step_noise.reshape(-1, num_steps, *shape), 1, 0)
        options["step_noise"] = step_noise
    if keep_step == "random" or isinstance(keep_step, Subset):
        options["rng_key"] = numpyro.prng_key()
    noise = noise.reshape(-1, *shape)
    x = sdo.sample(denoiser, noise, schedule, eta=eta, keep_step=keep_step, **options)
    return numpyro.deterministic(name, x.reshape(*plates, *shape))
