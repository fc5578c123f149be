r"""Few-shot learning in the directions in which tasks differ: MAML's inner loop with a basis.

The meta-learning extension of dynamic spectral backpropagation (Muthuraman, 2025,
arXiv:2505.23369); the formulas are derived here. Model-agnostic meta-learning (Finn, Abbeel &
Levine, 2017) learns a start from which a few gradient steps fit a new task. Its one step size
becomes

.. math:: w' = w - P \nabla L_{task}(w), \qquad
    P = Q\, \mathrm{diag}(\alpha)\, Q^\top + s (I - Q Q^\top),

where Q holds the leading eigenvectors of the gradients' second moment across tasks,
:math:`E_{task}[g g^\top]`, with a rate for each and one for all other directions: Meta-SGD (Li et
al., 2017) with rank + 1 numbers in the place of one for every parameter.

Read as hierarchical Bayes, P is the covariance of a prior :math:`N(w, P)` over the tasks' weights:
`adapt` is a step or a few towards the mode of the posterior, and `posterior_mode` goes all the way.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from probbp.checks import check_count, check_number
from probbp.types import Tree

LossFn = Callable[[Tree, Tree], jax.Array]
"""`(params, batch) -> loss`, the batch being the examples of one task."""


class Basis(NamedTuple):
    """The leading eigenpairs of a second moment of gradients.

    Attributes:
        vectors: like the params, each leaf with a first axis of length `rank`: the rows are
            orthonormal over the whole tree.
        values: (rank,), their eigenvalues, falling.
        rest: the mean of the other eigenvalues.
    """

    vectors: Tree
    values: jax.Array
    rest: jax.Array


class Rates(NamedTuple):
    """P in its basis.

    Attributes:
        along: alpha, (rank,), the rate along each vector.
        rest: s, the rate in all other directions. With 0 a task moves in the subspace only.
    """

    along: jax.Array
    rest: jax.Array


def task_basis(grads: Tree, rank: int, so_far: Basis | None = None, decay: float = 0.9) -> Basis:
    r"""Return the leading eigenpairs of the tasks' gradients, :math:`E_{task}[g g^\top]`.

    Exact for the tasks given, by a singular value decomposition of (tasks, parameters): for T tasks
    and d parameters O(T min(T, d) d) operations. As an estimate of the expectation over tasks, the
    sine of its angle falls as the inverse root of T.

    Args:
        grads: like the params, each leaf with the tasks on its first axis, as `jax.vmap` of a
            gradient returns them.
        rank: how many eigenvectors.
        so_far: what earlier tasks gave. Then the second moment is `decay` times theirs, of which
            `rank` pairs are remembered, plus 1 - `decay` times that of these tasks.
        decay: between 0 and 1.

    Raises:
        ValueError: for a rank that the tasks cannot fill.

    Example:
        >>> import jax.numpy as jnp
        >>> grads = {"w": jnp.array([[3.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])}
        >>> basis = task_basis(grads, rank=1)
        >>> round(float(basis.values[0]), 3), round(float(basis.rest), 3)
        (3.333, 0.667)
        >>> (abs(basis.vectors["w"]) > 0.5).tolist()
        [[True, False, False]]
    """
    rank = check_count("rank", rank)
    check_number("decay", decay, "[0, 1]")
    rows = _rows(grads)
    rows = rows / len(rows) ** 0.5
    dim, unseen = rows.shape[1], 0.0
    if so_far is not None:
        before = _rows(so_far.vectors)
        if before.shape[1] != dim:
            raise ValueError(
                f"so_far is of {before.shape[1]} parameters, and these gradients have {dim}."
            )
        unseen = decay * so_far.rest * (dim - len(before))
        remembered = before * jnp.sqrt(decay * so_far.values)[:, None]
        rows = jnp.concatenate([remembered, (1 - decay) ** 0.5 * rows])
    if rank > min(rows.shape):
        raise ValueError(
            f"{rows.shape[0]} gradients of {dim} parameters have no {rank} leading directions: "
            f"the rank is from 1 to {min(rows.shape)}. Take the gradients of more tasks."
        )
    _, singular, vectors = jnp.linalg.svd(rows, full_matrices=False)
    squares = singular**2
    rest = (jnp.sum(squares[rank:]) + unseen) / max(dim - rank, 1)
    return Basis(_like(grads, vectors[:rank]), squares[:rank], rest)


def precondition(grad: Tree, vectors: Tree, rates: Rates) -> Tree:
    r"""Return :math:`P g`, for 4 d rank operations and nothing of size d x d.

    Args:
        grad: g, like the params.
        vectors: Q, as in `Basis`. Nothing is differentiated with respect to them.
        rates: alpha and s.

    Raises:
        ValueError: for rates that do not fit the vectors.

    Example:
        >>> import jax.numpy as jnp
        >>> vectors = jnp.array([[1.0, 0.0, 0.0]])
        >>> update = precondition(jnp.ones(3), vectors, Rates(jnp.array([0.5]), jnp.array(0.25)))
        >>> update.tolist()
        [0.5, 0.25, 0.25]
    """
    vectors = jax.lax.stop_gradient(vectors)
    rank = len(jax.tree.leaves(vectors)[0])
    if jnp.shape(rates.along) != (rank,) or jnp.shape(rates.rest):
        raise ValueError(
            f"{rank} vectors take rates of shapes ({rank},) and (), got "
            f"{jnp.shape(rates.along)} and {jnp.shape(rates.rest)}."
        )
    along = jax.tree.map(lambda v, g: jnp.tensordot(v, g, jnp.ndim(g)), vectors, grad)
    weights = (rates.along - rates.rest) * jax.tree.reduce(jnp.add, along)
    return jax.tree.map(
        lambda v, g: (rates.rest * g + jnp.tensordot(weights, v, 1)).astype(g.dtype), vectors, grad
    )


def adapt(
    loss_fn: LossFn, params: Tree, batch: Tree, vectors: Tree, rates: Rates, num_steps: int = 1
) -> Tree:
    """Return the parameters after a few preconditioned steps on a task.

    Differentiable through the steps, in both AD modes and to any order, with respect to params,
    batch and rates; not to `vectors`. With equal rates it is MAML's inner loop.

    Args:
        loss_fn: of a task.
        params: the start that all tasks share.
        batch: the examples of the task.
        vectors: Q, as in `Basis`.
        rates: of a step.
        num_steps: how many.

    Example:
        >>> import jax.numpy as jnp
        >>> loss_fn = lambda w, target: jnp.sum((w - target) ** 2) / 2
        >>> vectors, rates = jnp.array([[1.0, 0.0]]), Rates(jnp.array([1.0]), jnp.array(0.0))
        >>> adapt(loss_fn, jnp.zeros(2), jnp.array([3.0, 4.0]), vectors, rates).tolist()
        [3.0, 0.0]
    """
    num_steps = check_count("num_steps", num_steps, 0)

    def step(w, _):
        update = precondition(jax.grad(loss_fn)(w, batch), vectors, rates)
        return jax.tree.map(jnp.subtract, w, update), None

    return jax.lax.scan(step, params, length=num_steps)[0]


def posterior_mode(
    loss_fn: LossFn,
    params: Tree,
    batch: Tree,
    vectors: Tree,
    rates: Rates,
    num_steps: int = 1,
    num_products: int = 20,
) -> Tree:
    r"""Return the mode of the posterior of a task whose weights have the prior :math:`N(w, P)`.

    Newton's steps on :math:`L(w + P^{1/2} v) + |v|^2 / 2`, each solved by conjugate gradients on
    :math:`I + P^{1/2} H P^{1/2}`, which has as many eigenvalues other than 1 as the task has
    numbers to fit: so many products, and rounding's few more, make the step exact. With a squared
    error one step is ridge regression with the prior's covariance; a logistic loss takes five to
    eight, the more the wider the prior.

    For convex losses; elsewhere the Hessian H may be indefinite, and `adapt` is the tool.
    Differentiable in both AD modes, by the implicit function theorem in each step.

    Args:
        loss_fn: the negative log likelihood of a task, summed over its examples.
        params: w, the mean of the prior.
        batch: the examples of the task.
        vectors: Q, as in `Basis`.
        rates: the prior's variances. Learn their logarithms: a root has no derivative at 0.
        num_steps: of Newton's method.
        num_products: Hessian-vector products of a step, at most.

    Example:
        >>> import jax.numpy as jnp
        >>> loss_fn = lambda w, target: jnp.sum((w - target) ** 2) / 2
        >>> vectors, rates = jnp.array([[1.0, 0.0]]), Rates(jnp.array([3.0]), jnp.array(1.0))
        >>> mode = posterior_mode(loss_fn, jnp.zeros(2), jnp.array([4.0, 4.0]), vectors, rates)
        >>> [round(float(x), 3) for x in mode]
        [3.0, 2.0]
    """
    num_steps = check_count("num_steps", num_steps, 0)
    num_products = check_count("num_products", num_products)
    roots = Rates(jnp.sqrt(rates.along), jnp.sqrt(rates.rest))

    def root(v):
        return precondition(v, vectors, roots)

    def step(v, _):
        w = jax.tree.map(jnp.add, params, root(v))
        grad, product = jax.linearize(lambda w: jax.grad(loss_fn)(w, batch), w)

        def matvec(u):
            return jax.tree.map(jnp.add, u, root(product(root(u))))

        slope = jax.tree.map(jnp.add, v, root(grad))
        tol = float(jnp.finfo(roots.along.dtype).eps)
        direction, _ = jax.scipy.sparse.linalg.cg(matvec, slope, tol=tol, maxiter=num_products)
        return jax.tree.map(jnp.subtract, v, direction), None

    start = jax.tree.map(jnp.zeros_like, params)
    mode, _ = jax.lax.scan(step, start, length=num_steps)
    return jax.tree.map(jnp.add, params, root(mode))


def outer_loss(
    loss_fn: LossFn,
    params: Tree,
    rates: Rates,
    vectors: Tree,
    support: Tree,
    query: Tree,
    adapt_fn: Callable[..., Tree] = adapt,
) -> jax.Array:
    """Return what meta-learning minimises: the loss on new examples after a task's adaptation.

    Args:
        loss_fn: of a task.
        params: the start, to be learnt.
        rates: to be learnt too.
        vectors: Q, as in `Basis`.
        support: examples to adapt to; each leaf has the tasks on its first axis.
        query: new examples of the same tasks.
        adapt_fn: `adapt` or `posterior_mode`, with their options in a `functools.partial`.

    Returns:
        The mean over tasks.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> loss_fn = lambda w, target: jnp.sum((w - target) ** 2) / 2
        >>> tasks = jnp.array([[3.0, 0.0], [-2.0, 0.0]])  # they differ in one direction
        >>> vectors, rates = jnp.array([[1.0, 0.0]]), Rates(jnp.array([0.5]), jnp.array(0.5))
        >>> slope = jax.grad(outer_loss, 2)(loss_fn, jnp.zeros(2), rates, vectors, tasks, tasks)
        >>> slope.along.tolist(), float(slope.rest)  # a longer step along it would be better
        ([-3.25], 0.0)
    """

    def of_task(support, query):
        return loss_fn(adapt_fn(loss_fn, params, support, vectors, rates), query)

    return jnp.mean(jax.vmap(of_task)(support, query))


def _rows(tree):
    """Return (first axis, all others of all leaves)."""
    return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(tree)], -1)


def _like(tree, rows):
    """Undo `_rows`, with another length of the first axis."""
    leaves, treedef = jax.tree.flatten(tree)
    ends = list(itertools.accumulate(leaf[0].size for leaf in leaves))
    parts = jnp.split(rows, ends[:-1], axis=-1)
    return treedef.unflatten(
        [
            part.reshape(len(rows), *leaf.shape[1:]).astype(leaf.dtype)
            for part, leaf in zip(parts, leaves, strict=True)
        ]
    )
