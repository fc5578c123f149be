"""Keys, draws and results for which nothing is compiled.

Every operation on a JAX array is a program of its own, compiled for each new shape; one on a NumPy
array is not. So modules draw what they hold by NumPy, and tests take results as NumPy's arrays.
"""

import jax
import jax.extend.core as jex
import numpy as np


def key_of(seed):
    """Return `jax.random.key(seed)`."""
    return jax.random.wrap_key_data(np.array([0, seed], np.uint32))


def keys_of(seed, num):
    """Return keys of their own, as a list."""
    return [jax.random.wrap_key_data(np.array([seed + 1, i], np.uint32)) for i in range(num)]


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def like(shapes, seed=0):
    """Return draws in the shapes and dtypes of a tree, which may come from `jax.eval_shape`."""
    leaves, structure = jax.tree.flatten(shapes)
    drawn = [normal((seed, i), *x.shape).astype(x.dtype) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, drawn)


def compiled(fun, **options):
    """Return `jax.jit(fun)` whose results are NumPy's arrays.

    Functions, words and truth values among its arguments are not traced.
    """

    def run(*args, **kwargs):
        static = {
            "static_argnums": [i for i, arg in enumerate(args) if _is_static(arg)],
            "static_argnames": [name for name, arg in kwargs.items() if _is_static(arg)],
        }
        found = jax.jit(fun, **static | options)(*args, **kwargs)
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(found))
        return found if traced else jax.device_get(found)

    return run


def _is_static(arg):
    is_leaf = jax.tree.all(jax.tree.map(lambda leaf: leaf is arg, arg))
    return is_leaf and (callable(arg) or isinstance(arg, str | bool))


def fitted(svi, rng_key, num_steps, *args, **kwargs):
    """Return the parameters and the losses of `svi.run`, which may be compiled as one program."""
    params, _, losses = svi.run(rng_key, num_steps, *args, progress_bar=False, **kwargs)
    return params, losses


def equations_of(fun, *args):
    """Return all equations that a function is traced to, with those of loops and branches."""
    return list(_equations(jax.make_jaxpr(fun)(*args).jaxpr))


def _equations(jaxpr):
    is_jaxpr = lambda value: isinstance(value, jex.Jaxpr | jex.ClosedJaxpr)
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(value):
                yield from _equations(getattr(value, "jaxpr", value))
