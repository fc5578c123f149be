"""Bayesian neural networks: a multilayer perceptron with Gaussian priors on its weights."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from probbp.checks import check_count, check_number

Dense = Callable[[jax.Array, jax.Array], jax.Array]


def model(
    x: jax.Array,
    y: jax.Array | None = None,
    *,
    widths: Sequence[int] = (32,),
    num_outputs: int = 1,
    is_classifier: bool = False,
    prior_scale: float = 1.0,
    noise_scale: float | None = None,
    activation: Callable[[jax.Array], jax.Array] = jnp.tanh,
    dense: Dense | Sequence[Dense] = jnp.matmul,
) -> None:
    """Regression, or classification, by a multilayer perceptron.

    Weights of a layer with n inputs have the prior N(0, prior_scale^2 / n), biases
    N(0, prior_scale^2), so that the prior of the outputs does not depend on the widths.

    Args:
        x: (rows, features).
        y: (rows,) real values, or integers below `num_outputs` for a classifier; `None` to predict.
        widths: units of each hidden layer.
        num_outputs: 1 for regression, the number of classes for a classifier.
        is_classifier: whether y are classes.
        prior_scale: of weights and biases.
        noise_scale: of y in regression; sampled (site "sigma") if `None`.
        activation: between layers.
        dense: the product of activations (rows, in) and weights (in, out); an op with another
            backward pass has its place here. One for all layers, or a sequence with one for each.

    Raises:
        ValueError: if `dense` has not one product for each layer.

    Example:
        >>> import jax
        >>> from numpyro.infer import Predictive
        >>> x = jax.random.normal(jax.random.key(0), (20, 3))
        >>> draws = Predictive(model, num_samples=5)(jax.random.key(1), x)
        >>> draws["weight_0"].shape, draws["y"].shape
        ((5, 3, 32), (5, 20))
    """
    num_outputs = check_count("num_outputs", num_outputs)
    widths = [check_count("widths", width) for width in widths]
    check_number("prior_scale", prior_scale, "(0, inf)")
    if noise_scale is not None:
        check_number("noise_scale", noise_scale, "(0, inf)")
    _check_rows(x, y)
    sizes = (x.shape[1], *widths, num_outputs)
    products = [dense] * (len(sizes) - 1) if callable(dense) else dense
    if len(products) != len(sizes) - 1:
        raise ValueError(f"{len(sizes) - 1} layers, but dense has {len(products)} products.")
    hidden = x
    for layer, (num_in, num_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        prior = dist.Normal(0, prior_scale / jnp.sqrt(num_in))
        weight = numpyro.sample(f"weight_{layer}", prior.expand([num_in, num_out]).to_event(2))
        bias = numpyro.sample(
            f"bias_{layer}", dist.Normal(0, prior_scale).expand([num_out]).to_event(1)
        )
        hidden = products[layer](activation(hidden) if layer else hidden, weight) + bias
    outputs = numpyro.deterministic("outputs", hidden if is_classifier else hidden[:, 0])
    if not is_classifier and noise_scale is None:
        noise_scale = numpyro.sample("sigma", dist.HalfNormal(1.0))
    with numpyro.plate("rows", x.shape[0]):
        likelihood = (
            dist.Categorical(logits=outputs) if is_classifier else dist.Normal(outputs, noise_scale)
        )
        numpyro.sample("y", likelihood, obs=y)


def _check_rows(x, y):
    if jnp.ndim(x) != 2:
        raise ValueError(f"x must be (rows, inputs), got {jnp.shape(x)}: x[:, None] for one input.")
    if y is not None and jnp.shape(y) != x.shape[:1]:
        raise ValueError(
            f"y must have one number for each of the {x.shape[0]} rows, {x.shape[:1]}, got "
            f"{jnp.shape(y)}: take y[:, 0] of a column."
        )
