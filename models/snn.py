"""Bayesian spiking networks: Flax modules of one time step, a model of labels, a mean-field guide.

The networks are functions `(spike, x)` as `probbp.ops.rate` runs them, made of Flax's own layers.
Spiking networks trained by rates: Yu et al., 2024, arXiv:2410.11488; batch normalisation over time:
Zheng et al., 2021, arXiv:2011.05280.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from flax import nnx
from numpyro.contrib.module import random_nnx_module
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.initialization import init_to_value

from probbp.checks import check_count, check_number
from probbp.models.modules import check_module
from probbp.ops import rate

_NAME = "network"


class MLP(nnx.Module):
    """Dense layers of spiking neurons, and a readout that does not spike.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from probbp.ops import rate
        >>> network = MLP((64, 32, 10), rngs=nnx.Rngs(0))
        >>> rate.simulate(network, rate.constant(jnp.ones((5, 64))), 8).shape
        (5, 10)
    """

    def __init__(self, sizes: Sequence[int], *, rngs: nnx.Rngs):
        """Make the layers.

        Args:
            sizes: number of inputs, of neurons in each hidden layer, and of outputs.
            rngs: of the initial weights.
        """
        sizes = [check_count("sizes", size) for size in sizes]
        *hidden, last = zip(sizes[:-1], sizes[1:], strict=True)
        self.hidden = nnx.List([nnx.Linear(n, m, rngs=rngs) for n, m in hidden])
        self.readout = nnx.Linear(*last, rngs=rngs)

    def __call__(self, spike: rate.Spike, x: jax.Array) -> jax.Array:
        """Map (..., inputs) to (..., outputs), in one step."""
        for layer in self.hidden:
            x = spike(layer(x))
        return self.readout(x)


class ConvNet(nnx.Module):
    """A residual convolutional network of spiking neurons.

    A convolution, then for each width a residual block and pooling by two; the mean over space; a
    readout that does not spike. Sums of branches are of currents, before the neurons.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from probbp.ops import rate
        >>> network = ConvNet(1, 10, widths=(8,), rngs=nnx.Rngs(0))
        >>> rate.simulate(network, rate.constant(jnp.ones((5, 8, 8, 1))), 4).shape
        (5, 10)
    """

    def __init__(
        self,
        num_channels: int,
        num_outputs: int,
        *,
        widths: Sequence[int] = (16, 32),
        norm: Callable[..., nnx.Module] | None = None,
        rngs: nnx.Rngs,
    ):
        """Make the layers.

        Args:
            num_channels: of the images.
            num_outputs: of the readout.
            widths: channels of each block.
            norm: makes the normalisation of currents from a number of channels: `BatchNorm` by
                default, or one of Flax's without batch statistics, as
                `partial(nnx.GroupNorm, num_groups=4)`.
            rngs: of the initial weights.
        """
        num_channels = check_count("num_channels", num_channels)
        num_outputs = check_count("num_outputs", num_outputs)
        widths = [check_count("widths", width) for width in widths]
        norm = BatchNorm if norm is None else norm
        conv = partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        self.stem, self.stem_norm = conv(num_channels, widths[0]), norm(widths[0], rngs=rngs)
        blocks = []
        for n, m in zip((widths[0], *widths[:-1]), widths, strict=True):
            blocks.append(
                nnx.Dict(
                    first=conv(n, m),
                    first_norm=norm(m, rngs=rngs),
                    second=conv(m, m),
                    second_norm=norm(m, rngs=rngs),
                    skip=nnx.Conv(n, m, kernel_size=(1, 1), rngs=rngs),
                )
            )
        self.blocks = nnx.List(blocks)
        self.readout = nnx.Linear(widths[-1], num_outputs, rngs=rngs)

    def __call__(self, spike: rate.Spike, x: jax.Array) -> jax.Array:
        """Map (batch, height, width, channels) to (batch, outputs), in one step."""

        def normalised(norm, current):
            return norm(spike, current) if isinstance(norm, BatchNorm) else norm(current)

        x = spike(normalised(self.stem_norm, self.stem(x)))
        for block in self.blocks:
            hidden = spike(normalised(block.first_norm, block.first(x)))
            current = normalised(block.second_norm, block.second(hidden)) + block.skip(x)
            x = nnx.avg_pool(spike(current), (2, 2), strides=(2, 2))
        return self.readout(x.mean((-3, -2)))


class BatchNorm(nnx.Module):
    """Batch normalisation of currents.

    With `order="layer"` mean and variance are over batch, space and time; with `order="time"` over
    batch and space, step by step. By rates the derivative is that of the mean over time of what is
    normalised, statistics included. After `module.eval()` the running averages are used instead.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from probbp.ops import rate
        >>> norm = BatchNorm(3)
        >>> def network(spike, x):
        ...     return spike(norm(spike, x))
        >>> rate.simulate(network, rate.constant(jnp.eye(3)), 4).shape
        (3, 3)
    """

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        rngs: nnx.Rngs | None = None,
    ):
        """Make scale and bias, ones and zeros.

        Args:
            num_features: the last axis of a current.
            momentum: of the running averages.
            epsilon: added to the variance.
            rngs: not needed; Flax's normalisations take it too.
        """
        num_features = check_count("num_features", num_features)
        check_number("momentum", momentum, "[0, 1]")
        check_number("epsilon", epsilon, "(0, inf)")
        self.scale = nnx.Param(jnp.ones(num_features))
        self.bias = nnx.Param(jnp.zeros(num_features))
        self.mean = nnx.BatchStat(jnp.zeros(num_features))
        self.var = nnx.BatchStat(jnp.ones(num_features))
        self.momentum, self.epsilon, self.use_running_average = momentum, epsilon, False

    def __call__(self, spike: rate.Spike, current: jax.Array) -> jax.Array:
        """Normalise over all axes but the last."""
        if self.use_running_average:
            mean, inverse = self.mean[...], jax.lax.rsqrt(self.var[...] + self.epsilon)
        else:
            axes = tuple(range(current.ndim - 1))
            mean = spike.average(current.mean(axes))
            var = spike.average(((current - mean) ** 2).mean(axes))
            inverse = spike.average(jax.lax.rsqrt(var + self.epsilon))
            if spike.is_last:
                for running, new in ((self.mean, mean), (self.var, var)):
                    new = jax.lax.stop_gradient(new)
                    running[...] = self.momentum * running[...] + (1 - self.momentum) * new
        return (current - mean) * inverse * self.scale[...] + self.bias[...]


def model(
    x: jax.Array,
    y: jax.Array | None = None,
    *,
    network: nnx.Module,
    num_steps: int = 8,
    num_rows: int | None = None,
    prior_scale: float = 2.0,
    temperature: float = 1.0,
    encode: Callable[[jax.Array], Callable] = rate.constant,
    simulate: Callable[..., jax.Array] = rate.simulate,
) -> None:
    """Classification by a spiking network with random weights.

    A weight that is one of n into a spiking neuron has the prior N(0, prior_scale^2 / n); biases,
    scales, and the readout, whose inputs are rates, N(0, prior_scale^2). The log density is that of
    the simulated network: a step function of the weights, whose gradient is a surrogate. It serves
    `SVI`, on an ELBO that is exact in value; in MCMC it is a force for proposals, and a Metropolis
    test makes the chain exact.

    With few rows beside the weights, a mean-field posterior is little more than its prior.
    `temperature` below 1 counts each row more than once, as is usual for deep networks (Wenzel et
    al., 2020, arXiv:2002.02405): choose it by rows that were held out.

    Args:
        x: (rows, ...) inputs.
        y: (rows,) integer labels; `None` to predict.
        network: a Flax module, called as `network(spike, x)`, that keeps no state; its last layer
            is called `readout`. Sites bear the names of its parameters, `network/readout.kernel`.
        num_steps: of the simulation.
        num_rows: size of the data of which `x` is a batch; the rows of `x` by default.
        prior_scale: of the weights.
        temperature: T of the posterior, whose log likelihood is divided by T; 1 is Bayes' rule.
        encode: `x` to the inputs of a step: `rate.constant`, or `partial(rate.bernoulli, rng_key)`.
        simulate: `rate.simulate`, or a partial of it.

    Raises:
        ValueError: for a network with state, such as the running averages of `BatchNorm`.

    Example:
        >>> from functools import partial
        >>> import jax
        >>> import optax
        >>> from flax import nnx
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> x = jax.random.normal(jax.random.key(0), (20, 5))
        >>> network = MLP((5, 8, 2), rngs=nnx.Rngs(0))
        >>> labelled = partial(model, network=network, num_steps=4)
        >>> svi = SVI(labelled, guide(labelled, network), optax.adam(1e-2), Trace_ELBO())
        >>> result = svi.run(jax.random.key(1), 5, x, (x[:, 0] > 0).astype(int), progress_bar=False)
    """
    num_steps = check_count("num_steps", num_steps)
    check_number("prior_scale", prior_scale, "(0, inf)")
    check_number("temperature", temperature, "(0, inf)")
    if num_rows is not None:
        num_rows = check_count("num_rows", num_rows, len(x))
    check_module("network", network)
    if jax.tree.leaves(nnx.state(network, nnx.Not(nnx.Param))):
        raise ValueError(
            "The network keeps a state, which a random network can't: use a normalisation without "
            "batch statistics, as ConvNet(norm=partial(nnx.GroupNorm, num_groups=4))."
        )

    def prior(name, shape):
        # Of a bias there is one, into its neuron.
        fan_in = 1 if name.startswith("readout") else math.prod(shape[:-1])
        return dist.Normal(0, prior_scale / math.sqrt(fan_in))

    random_network = random_nnx_module(_NAME, network, prior)
    logits = simulate(random_network, encode(x), num_steps)
    numpyro.deterministic("logits", logits)
    plate = numpyro.plate("rows", num_rows or len(x), subsample_size=len(x))
    with plate, numpyro.handlers.scale(scale=1 / temperature):
        numpyro.sample("y", dist.Categorical(logits=logits), obs=y)


def guide(model: Callable, network: nnx.Module, init_scale: float = 0.02) -> AutoNormal:
    """Make the mean-field guide of the weights, which starts at those of the network.

    Args:
        model: the model, with its keywords set.
        network: the same Flax module, fresh or trained.
        init_scale: standard deviation of each weight at the start.

    Returns:
        NumPyro's `AutoNormal`. See `model` for an example.
    """
    check_number("init_scale", init_scale, "(0, inf)")
    check_module("network", network)
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(network, nnx.Param)))
    values = {f"{_NAME}/" + ".".join(str(step.key) for step in path): leaf for path, leaf in leaves}
    return AutoNormal(model, init_loc_fn=init_to_value(values=values), init_scale=init_scale)
