"""Rules: what feedback weights are made of, and how they learn."""

import jax
import jax.numpy as jnp
from jax.core import Tracer

from probbp.checks import check_number, check_rng_key
from probbp.ops.substitute import substitute
from probbp.types import Tree


def normal(rng_key: jax.Array, kernels: Tree, scale: float | None = None) -> Tree:
    """Draw fixed random feedback weights: feedback alignment.

    Draw them once and keep them. Each kernel gets draws of its own, so that layers of one shape do
    not share them.

    Args:
        rng_key: a key.
        kernels: a kernel or a pytree of them.
        scale: the standard deviation; by default the root mean square of each kernel, so that
            errors keep their scale.

    Returns:
        The same structure, shapes and dtypes.

    Raises:
        ValueError: for a kernel of zeros without a `scale`. (It can't be seen under `jit`.)

    Reference:
        Lillicrap et al., 2014, arXiv:1411.0247.
    """
    check_rng_key("rng_key", rng_key)
    if scale is not None:
        check_number("scale", scale, "(0, inf)")
    leaves, structure = jax.tree.flatten(kernels)
    keys = jax.random.split(rng_key, max(len(leaves), 1))

    def draw(key, kernel):
        size = _root_mean_square(kernel) if scale is None else scale
        if scale is None and not isinstance(size, Tracer) and size == 0:
            raise ValueError(
                "A kernel of zeros has no scale for its feedback weights: no error would ever go "
                "back through them. Pass scale=."
            )
        return size * jax.random.normal(key, jnp.shape(kernel), jnp.result_type(kernel))

    drawn = [draw(key, kernel) for key, kernel in zip(keys, leaves, strict=False)]
    return jax.tree.unflatten(structure, drawn)


def uniform_sign(kernels: Tree) -> Tree:
    r"""Return the signs of the kernels, all with one magnitude: uniform sign-concordant feedback.

    .. math:: B = \frac{\|W\|_F}{\sqrt{\mathrm{size}(W)}} \, \mathrm{sign}(W)

    Needs no state and no key. What is made in each step, by this or the next two rules, is held
    until the backward pass: memory for one more set of kernels.

    Args:
        kernels: a kernel or a pytree of them.

    Reference:
        Liao, Leibo & Poggio, 2016, arXiv:1510.05067; Moskovitz, Litwin-Kumar & Abbott, 2018,
        arXiv:1812.06488.
    """
    return jax.tree.map(lambda kernel: _root_mean_square(kernel) * jnp.sign(kernel), kernels)


def fixed_magnitude(kernels: Tree, feedback: Tree) -> Tree:
    r"""Return the signs of the kernels with the magnitudes of other weights, :math:`|B| sign(W)`.

    Args:
        kernels: a kernel or a pytree of them.
        feedback: the same structure and shapes, drawn once by `normal`.

    Reference:
        Moskovitz, Litwin-Kumar & Abbott, 2018, arXiv:1812.06488.
    """
    return jax.tree.map(
        lambda kernel, b: jnp.abs(like(kernel, b)) * jnp.sign(kernel), kernels, feedback
    )


def redrawn(rng_key: jax.Array, kernels: Tree) -> Tree:
    r"""Return the signs of the kernels with fresh random magnitudes, :math:`|N| sign(W)`.

    Args:
        rng_key: a new one each step.
        kernels: a kernel or a pytree of them.

    Reference:
        Liao, Leibo & Poggio, 2016, arXiv:1510.05067.

    Returns:
        As `kernels`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> kernels = {"first": jnp.array([[1.0, -2.0]])}
        >>> jnp.sign(redrawn(jax.random.key(0), kernels)["first"]).tolist()
        [[1.0, -1.0]]
    """
    check_rng_key("rng_key", rng_key)
    return fixed_magnitude(kernels, normal(rng_key, kernels))


def kolen_pollack(kernels: Tree, feedback: Tree) -> Tree:
    r"""Return the kernels, whose gradients the feedback weights get too.

    `dense(x, kolen_pollack(kernel, feedback), feedback)` then has the feedback weights learn beside
    the kernel. With the same optimiser, learning rate :math:`\eta` and weight decay
    :math:`\lambda` for both, an optimiser that works element by element, and its state starting
    the same, updates are the same and

    .. math:: W - B \mapsto (1 - \eta \lambda) (W - B)

    in each step, of SGD and AdamW alike. Without decay the difference stays as it is, and they
    align in so far as what they learn outgrows it. A transformation that treats leaves unlike,
    such as a trust ratio, breaks the law.

    Args:
        kernels: a kernel or a pytree of them.
        feedback: the same structure and shapes.

    Returns:
        `kernels`, to the bit. Both AD modes, derivatives of any order.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> loss = lambda w, b: jnp.sum(kolen_pollack(w, b) ** 2)
        >>> [float(grad) for grad in jax.grad(loss, (0, 1))(3.0, 1.0)]
        [6.0, 6.0]

    Reference:
        Kolen & Pollack, 1994, doi:10.1109/ICNN.1994.374486; Akrout et al., 2019, arXiv:1904.05391.
    """
    both = jax.tree.map(lambda kernel, b: kernel + like(kernel, b), kernels, feedback)
    return substitute(kernels, both)


def like(kernel: jax.Array, feedback: jax.Array) -> jax.Array:
    """Return feedback weights in the kernel's dtype, or say why they are none for it."""
    kernel, feedback = jnp.asarray(kernel), jnp.asarray(feedback)
    if feedback.shape != kernel.shape:
        raise ValueError(
            f"feedback has shape {feedback.shape} and the kernel {kernel.shape}. Feedback weights "
            "have the kernel's own shape, not that of its transpose: `normal(rng_key, kernel)` "
            "makes some."
        )
    for name, weights in {"feedback": feedback, "the kernel": kernel}.items():
        if not jnp.issubdtype(weights.dtype, jnp.inexact):
            raise TypeError(f"{name} must be floating-point numbers, not {weights.dtype}: cast it.")
    return feedback.astype(kernel.dtype)


def _root_mean_square(x):
    return jnp.sqrt(jnp.mean(jnp.square(x)))
