"""The same draws on one device, on several, and from several processes. A script.

    python tests/many_devices.py FILE --devices 4 --mesh 2 2
    python tests/many_devices.py FILE --devices 2 --mesh 4 --process 0 --of 2 --port 9999

Regression of 64 rows: the chains on the first axis of the mesh, the rows on the second, if any. The
first process writes the draws to FILE.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

NUM_CHAINS = 4
X = np.random.default_rng(0).normal(size=(64, 3))
Y = X @ np.array([1.0, -2.0, 0.5]) + np.random.default_rng(1).normal(size=64)


def logdensity_fn(beta, x=X, y=Y):
    residual = y - jnp.asarray(x) @ beta["beta"]
    return -0.5 * jnp.sum(residual**2) - 0.5 * jnp.sum(beta["beta"] ** 2)


def draw(mesh=None, rows=False, **options):
    """Draws and log densities; with the rows on the second axis of the mesh if `rows`."""
    # Not before JAX knows of devices and processes: BlackJAX computes when it is imported.
    import probbp

    x, y = X, Y
    if rows:
        assert mesh is not None
        sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names[1]))
        x, y = (
            jax.make_array_from_callback(data.shape, sharding, data.__getitem__) for data in (X, Y)
        )
    data = probbp.sample(
        jax.random.key(0),
        partial(probbp.mala, partial(logdensity_fn, x=x, y=y)),
        {"beta": jnp.zeros(3)},
        **{"num_warmup": 20, "num_samples": 24, "num_chains": NUM_CHAINS, "every": 12} | options,
        metric=None,
        initial_step_size=0.01,
        mesh=mesh,
        progress_bar=False,
    )
    return data.posterior["beta"].values, data.sample_stats["lp"].values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--devices", type=int, default=1, help="of each process")
    parser.add_argument("--mesh", type=int, nargs="+", required=True)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    parser.add_argument("--port", type=int)
    parser.add_argument("--checkpoint")
    parser.add_argument("--num_warmup", type=int, default=20)
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", args.devices)
    if args.of > 1:
        jax.distributed.initialize(f"127.0.0.1:{args.port}", args.of, args.process)
    names = ("chains", "rows")[: len(args.mesh)]
    mesh = Mesh(np.array(jax.devices()).reshape(args.mesh), names)
    options = {"checkpoint": args.checkpoint, "num_warmup": args.num_warmup}
    beta, lp = draw(mesh, rows=len(args.mesh) == 2, **options)
    if args.process == 0:
        np.savez(args.file, beta=beta, lp=lp)


if __name__ == "__main__":
    main()
