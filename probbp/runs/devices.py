"""Chains over the devices of a mesh, and over processes: where arrays lie, and how they come back.

The partitioning is JAX's: a program is written for all chains and compiled for all devices, and
`jax.distributed` makes one mesh of several processes' devices. Here stands what it takes beyond.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from probbp.types import Tree


class Devices(NamedTuple):
    """What a run asks of the devices it is on.

    Attributes:
        jit: `jax.jit` of a function whose outputs have the chains as leading axis; `donate_argnums`
            as there.
        put: host arrays with the chains as leading axis, to the devices.
        get: arrays with the chains as leading axis, to every process, as NumPy arrays.
        writes: whether this process is the one that writes files.
        wait: `name -> None`, until every process is there.
    """

    jit: Callable[..., Callable]
    put: Callable[[Tree], Tree]
    get: Callable[[Tree], Tree]
    writes: bool
    wait: Callable[[str], None]


def devices(mesh: Mesh | None, num_chains: int) -> Devices:
    """Return the ways to and from the devices.

    Args:
        mesh: chains are split over its first axis; its other axes are for the log density's data.
            `None` for JAX's default device.
        num_chains: a multiple of the size of that axis.

    Raises:
        ValueError: where the chains can't be split evenly, and for several processes without mesh.
    """
    if mesh is None:
        if jax.process_count() > 1:
            raise ValueError(
                f"There are {jax.process_count()} processes, and no mesh that says who runs which "
                'chain. Give one: mesh=jax.make_mesh((jax.device_count(),), ("chains",)).'
            )
        return Devices(jax.jit, put, jax.device_get, True, _no_wait)
    axis, size = mesh.axis_names[0], mesh.devices.shape[0]
    if num_chains % size:
        raise ValueError(
            f"{num_chains} chains can't be split evenly over the {size} devices of the mesh's axis "
            f"{axis!r}. Take a multiple of {size}."
        )
    # Whatever the types of the mesh's axes: the partitioner finds its way through any algorithm.
    sharding = NamedSharding(Mesh(mesh.devices, mesh.axis_names), PartitionSpec(axis))

    def jit(fun, donate_argnums=()):
        return _jit(fun, sharding, donate_argnums)

    def spread(tree):
        return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), put(tree))

    if jax.process_count() == 1:
        return Devices(jit, spread, jax.device_get, True, _no_wait)
    from jax.experimental import multihost_utils

    def get(tree):
        return multihost_utils.process_allgather(tree, tiled=True)

    return Devices(jit, spread, get, jax.process_index() == 0, multihost_utils.sync_global_devices)


def put(tree: Tree) -> Tree:
    """Copy host arrays to JAX's default device: what a program is donated must not be NumPy's."""
    return jax.tree.map(partial(jnp.array, copy=True), tree)


def _no_wait(name):
    del name


def _jit(fun, sharding, donate_argnums):
    """Compile for the mesh. Closed-over arrays that lie on several devices stay where they lie.

    `jax.jit` would make each of them a constant of the program, whole on every device.
    """
    compiled = None

    def call(*args):
        nonlocal compiled
        if compiled is None:
            closed, shape = jax.make_jaxpr(fun, return_shape=True)(*args)
            for const in nested_constants(closed.jaxpr):
                if is_spread(const):
                    raise ValueError(
                        "The log density closes over an array on several devices within a jax.jit "
                        "of its own, where it would be copied to each of them. Leave that jax.jit "
                        "out: the whole run is compiled anyway."
                    )
            spread = [i for i, const in enumerate(closed.consts) if is_spread(const)]

            def with_data(data, *args):
                consts = list(closed.consts)
                for i, const in zip(spread, data, strict=True):
                    consts[i] = const
                flat = jex.jaxpr_as_fun(jex.ClosedJaxpr(closed.jaxpr, consts))
                return jax.tree.unflatten(jax.tree.structure(shape), flat(*jax.tree.leaves(args)))

            program = jax.jit(
                with_data,
                out_shardings=sharding,
                donate_argnums=tuple(i + 1 for i in np.atleast_1d(donate_argnums).astype(int)),
            )
            data = [closed.consts[i] for i in spread]
            compiled = lambda *args: program(data, *args)
        return compiled(*args)

    return call


def is_spread(value: Any) -> bool:
    """Return whether the value is an array on several devices."""
    return isinstance(value, jax.Array) and len(value.sharding.device_set) > 1


def nested_constants(jaxpr: jex.Jaxpr) -> list[Any]:
    """Return the arrays that a program closes over, but for those at its top."""
    found = []
    for eqn in jaxpr.eqns:
        found += [var.val for var in eqn.invars if isinstance(var, jex.Literal)]
        is_jaxpr = lambda value: isinstance(value, jex.Jaxpr | jex.ClosedJaxpr)
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            if isinstance(value, jex.ClosedJaxpr):
                found += value.consts
                value = value.jaxpr
            if isinstance(value, jex.Jaxpr):
                found += nested_constants(value)
    return found
