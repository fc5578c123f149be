"""The sampler: DDIM's or DDPM's value, and a derivative through the steps that are kept."""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp

from probbp.checks import check_number, check_rng_key
from probbp.ops.sdo.keep import Keep, Subset, live_steps
from probbp.ops.sdo.path import GaussianPath, walk_of
from probbp.ops.sdo.rules import Inputs, Sampler, each_alone, one_each, stretch, subset
from probbp.ops.sdo.schedule import Prediction, Schedule, steps_of
from probbp.types import Tree


def sample(
    denoiser: Callable[..., jax.Array],
    noise: jax.Array,
    schedule: Schedule,
    *,
    keep_step: Keep = "first",
    surrogate: GaussianPath | None = None,
    rng_key: jax.Array | None = None,
    prediction: Prediction = "eps",
    eta: float = 0.0,
    step_noise: jax.Array | None = None,
    controls: Tree = None,
    checkpoint: bool = False,
) -> jax.Array:
    r"""Run a diffusion sampler, whose derivative goes through few of its networks.

    .. math::
        x_{n+1} = a_n x_n + b_n f(x_n, t_n, u_n) + s_n w_n, \qquad
        x_0 = A z + \sum_n b_n \tau_n f(x_n, t_n, u_n) + \dots, \qquad
        \tau_n = \prod_{m>n} a_m

    Read in the second way each network's output is an input of the sample. The paper differentiates
    one of them and takes the others for constants.

    Exact: the value, whatever is kept. Estimated: the derivative with respect to `noise`,
    `controls` and what `denoiser` closes over, its parameters among them. `keep_step` says how:

    ============== =================================================================================
    "first"        The first step: for the noise, which enters there (the paper).
    n, an integer  Step n; -1 is the last.
    "random"       One random step for each sample, weighted by their number: for parameters (the
                   paper). Unbiased for "each".
    "each"         All steps, but not through each other. Biased; every control has its term.
    Last(k)        The last k steps, through each other: towards exact as k grows.
    Subset(p)      Each step with probability p and weight 1/p, for the whole batch: unbiased.
                   Its variance grows with the steps, roughly by 1/p for each that matters.
    "all"          All steps: the exact derivative.
    ============== =================================================================================

    **Detached steps** carry the derivative on linearly. By default the network's output is a
    constant, and a sample that starts as pure noise gets a derivative with respect to it that is
    one or two orders of magnitude too long, since A is 157 for `linear` and predicted noise. Then
    go in steps of unit length (`optax.normalize_by_update_norm`, Adam; in a sampler
    `probbp.estimators.through` that), or take `surrogate=gaussian_path(covariance)`, which has
    about the right length and direction at the same cost, if the network is a good denoiser. With
    `prediction="v"` the default path is short (A <= 1), as that of `gaussian_path(1.0)` is for
    either prediction.

    **In a log density** its value stays exact, and Metropolis steps (`probbp.mala`, NumPyro's HMC)
    leave it invariant whatever is kept; in HMC "random" and `Subset` need one key for a whole
    trajectory. How fast they mix is another matter: `examples/papers/sdo.py` prints it. In more
    than a few dimensions the shortcut is not enough; take `Last(k)`, or "all" with `checkpoint`.

    **Cost** beside the sampler's own: backpropagation through the networks kept. "first", a number
    and "random" need memory for one network, however many steps there are ("random" calls it once
    more); `Last(k)` for k; "each" and "all" for all of them or, with `checkpoint` and with `Subset`
    always, for one and the state of each step. `tests/benchmarks/sdo.py` prints time, operations
    and memory. A Gaussian path takes `num_steps` x d numbers and, for a full covariance, products
    with d x d matrices.

    Args:
        denoiser: `(x, t) -> output`, or `(x, t, control)` with `controls`; x and output (batch,
            ...), t (batch,) times of training, in x's dtype. It predicts what `prediction` says. A
            sample's output must depend on that sample alone. Flax NNX modules are such functions,
            as long as they change no state.
        noise: z, (batch, ...), floating-point: standard normal, or data noised up to the
            schedule's start.
        schedule: from `linear` or `cosine`.
        keep_step: what the derivative goes through.
        surrogate: how detached steps pass it on; `gaussian_path(covariance)`, or `None` for the
            paper's.
        rng_key: for "random" and `Subset`. The value does not depend on it.
        prediction: "eps" for the noise, "v" for :math:`\sqrt{\bar\alpha}\epsilon -
            \sqrt{1-\bar\alpha} x_0`.
        eta: 0 for DDIM, 1 for DDPM (with the smaller of its variances).
        step_noise: w, (num_steps, batch, ...), standard normal, where eta is not 0. Its derivative
            passes on as that of `noise` does; the last step's has no effect.
        controls: pytree of arrays (num_steps, batch, ...), of which each step gets its slice:
            conditioning, guidance. What is the same in all steps may as well be closed over.
        checkpoint: whether steps that are kept are recomputed in reverse mode instead of stored.

    Returns:
        Samples, like `noise`. `jit`, `vmap`, both AD modes. Under `vmap`, `Subset` saves no time.

    Raises:
        ValueError: for shapes and options that do not fit, and where a key is missing.
        TypeError: for noise that is not floating-point, and for a derivative with respect to
            controls of steps that are not kept, which would be zero.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from probbp.ops import sdo
        >>> schedule = sdo.linear(50)
        >>> def denoiser(x, t):  # the best one, for data N(0, I / 4)
        ...     signal = jnp.asarray(schedule.train_signal)[t.astype(int)][:, None]
        ...     return jnp.sqrt(1 - signal) * x / (signal / 4 + 1 - signal)
        >>> def loss(z, **options):
        ...     return jnp.sum(sdo.sample(denoiser, z, schedule, **options) ** 2)
        >>> z = jnp.ones((1, 3))
        >>> exact = jax.grad(loss)(z, keep_step="all")
        >>> path = jax.grad(loss)(z, surrogate=sdo.gaussian_path(1 / 4))
        >>> bool(jnp.allclose(path, exact, rtol=1e-4))
        True

    Reference:
        Dou et al., 2025, arXiv:2505.07477. The Gaussian path, `Last`, "each" and `Subset` are ours.
    """
    if rng_key is not None:
        check_rng_key("rng_key", rng_key)
    noise = jnp.asarray(noise)
    num_steps = len(schedule.times)
    live = live_steps(keep_step, num_steps)
    _check_denoiser(denoiser, controls is not None)
    _check(noise, num_steps, eta, step_noise, controls)
    if rng_key is not None:
        check_rng_key("rng_key", rng_key)
    if (keep_step == "random" or isinstance(keep_step, Subset)) and rng_key is None:
        raise ValueError(f"keep_step={keep_step!r} draws steps, and needs an rng_key.")
    steps = steps_of(schedule, prediction, eta)
    walk = walk_of(surrogate, schedule, steps, prediction, noise)
    # Half precision has no number for each of 1,000 times.
    times = jnp.asarray(schedule.times, jnp.promote_types(noise.dtype, jnp.float32))
    keep, push, spread = (jnp.asarray(leaf, noise.dtype) for leaf in steps)
    inputs = Inputs(jnp.arange(num_steps), times, (keep, push, spread), step_noise, controls)

    def network(x, t, control):
        output = denoiser(x, t) if controls is None else denoiser(x, t, control)
        if not hasattr(output, "dtype") or (output.shape, output.dtype) != (x.shape, x.dtype):
            found = f"{output.shape} {output.dtype}" if hasattr(output, "dtype") else type(output)
            raise ValueError(
                f"denoiser must return an array like x, {x.shape} {x.dtype}, got {found}."
            )
        return output

    # What the network closes over must be cut off too, where a step is detached.
    control = jax.tree.map(lambda leaf: leaf[0], controls)
    t = jnp.broadcast_to(times[0], noise.shape[:1])
    converted, closure = jax.closure_convert(network, noise, t, control)
    sampler = Sampler(
        lambda closure, x, t, control: converted(x, t, control, *closure),
        closure,
        inputs,
        walk,
        checkpoint,
    )
    if live is not None:
        return stretch(sampler, noise, *live)
    if keep_step == "each":
        return each_alone(sampler, noise)
    assert rng_key is not None
    if isinstance(keep_step, Subset):
        return subset(rng_key, sampler, noise, keep_step.probability)
    return one_each(rng_key, sampler, noise)


def _check_denoiser(denoiser, has_controls):
    """Require a function of two arguments, or of three with controls."""
    arguments = ("x", "t", "control") if has_controls else ("x", "t")
    wanted = f"denoiser must be a function of {' and '.join(arguments)}"
    if not callable(denoiser):
        raise TypeError(f"{wanted}, got {type(denoiser).__name__}.")
    try:
        signature = inspect.signature(denoiser)
    except (TypeError, ValueError):  # a builtin without a signature
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        raise TypeError(
            f"{wanted}, got one of {signature}. Bind what else it takes (functools.partial), and "
            "pass what differs from step to step as controls."
        ) from None


def _check(noise, num_steps, eta, step_noise, controls):
    if not jnp.issubdtype(noise.dtype, jnp.floating):
        raise TypeError(f"noise must be floating-point, got {noise.dtype}.")
    if noise.ndim < 2:
        raise ValueError(f"noise must be (batch, ...), got {noise.shape}: noise[None] for one.")
    check_number("eta", eta, "[0, 1]", "0 is DDIM, 1 is DDPM.")
    if (step_noise is None) != (eta == 0):
        raise ValueError(
            "step_noise is what eta > 0 adds in each step, standard normal (num_steps, *noise."
            f"shape); got eta={eta} and {'none' if step_noise is None else 'some'}."
        )
    if step_noise is not None and step_noise.shape != (num_steps, *noise.shape):
        raise ValueError(f"step_noise must be {(num_steps, *noise.shape)}, got {step_noise.shape}.")
    for leaf in jax.tree.leaves(controls):
        if jnp.shape(leaf)[:2] != (num_steps, noise.shape[0]):
            raise ValueError(
                f"controls must be (num_steps, batch, ...), ({num_steps}, {noise.shape[0]}, ...), "
                f"got {jnp.shape(leaf)}."
            )
