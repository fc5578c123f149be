"""What grows with devices, chains, dimension and data.

    python tests/benchmarks/scale.py [--fast]

Steps a second of `probbp.sample` with `probbp.mala`, from the first return to the host to the last:
without start and compilation, with the copy of every tenth draw to the host. Exponents are slopes
of log time against log size with standard errors, over all sizes and over the three largest, where
the fixed cost of a step hardly counts. Host devices share the same few cores: more devices than
cores can't be faster, and show what splitting costs. At the end the loop that BlackJAX's users
write, `run_inference_algorithm` under `jax.vmap`, beside ours, in alternation: steps alone, and
everything from the call to ArviZ's object, compilation included. Float32, minutes on two cores.
"""

import argparse
import json
import subprocess
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a smoke test; its numbers are rough")
    parser.add_argument("--devices", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    fast = args.fast
    if args.devices:
        jax.config.update("jax_num_cpu_devices", args.devices)
        print(json.dumps(on_devices(args.devices, fast)))
        return
    devices(fast)
    sizes = 4 ** np.arange(2 if fast else 0, 5 if fast else 7)
    table("chains", "100 dimensions", sizes, lambda n: (normal, 100, n), fast)
    sizes = 10 ** np.arange(1, 4 if fast else 7)
    table("dimension", "4 chains", sizes, lambda d: (normal, d, 4), fast)
    sizes = 10 ** np.arange(2, 5 if fast else 7)
    table("rows", "4 chains, 10 coefficients", sizes, lambda n: (regression(n), 10, 4), fast)
    beside_blackjax(fast)


def normal(x):
    return -0.5 * jnp.sum(x**2)


def regression(num_rows, place=jnp.asarray):
    x = np.random.default_rng(0).normal(size=(num_rows, 10)).astype(np.float32)
    x, y = place(x), place(x.sum(axis=1))
    return lambda beta: -0.5 * jnp.sum((y - x @ beta) ** 2) - 0.5 * jnp.sum(beta**2)


def sample(logdensity_fn, dim, num_chains, num_draws, thinning=10, mesh=None):
    """Return the draws, and the seconds of a step in the median of eleven pieces."""
    import probbp
    from probbp.samplers import sinks

    times, in_memory = [], sinks.in_memory

    def watched(*args):
        sink = in_memory(*args)

        def add(*args):
            times.append(time.perf_counter())
            return sink.add(*args)

        return sink._replace(add=add)

    sinks.in_memory = watched
    try:
        data = probbp.sample(
            jax.random.key(0),
            partial(probbp.mala, logdensity_fn),
            jnp.zeros(dim),
            num_warmup=0,
            num_samples=12 * num_draws,
            every=num_draws,
            num_chains=num_chains,
            thinning=thinning,
            metric=None,
            initial_step_size=1e-4,
            mesh=mesh,
            progress_bar=False,
        )
    finally:
        sinks.in_memory = in_memory
    return data.posterior["x"].values, np.median(np.diff(times)) / (num_draws * thinning)


def num_draws_of(cost, fast):
    """So many that a piece takes about a tenth of a second."""
    return int(np.clip((1e6 if fast else 5e6) / cost, 1, 500))


def table(name, rest, sizes, case, fast):
    print(
        f"\n{name} ({rest})".ljust(42) + f"{'steps/s':>12s}{'us/step':>12s}{'chain steps/s':>16s}"
    )
    times = []
    for size in map(int, sizes):
        logdensity_fn, dim, num_chains = case(size)
        cost = num_chains * dim * (size if name == "rows" else 1) + 1000
        _, step = sample(logdensity_fn, dim, num_chains, num_draws_of(cost, fast))
        times.append(step)
        print(f"{size:41d}{1 / step:12.1f}{1e6 * step:12.1f}{num_chains / step:16.1f}", flush=True)
    for label, part in (("all", slice(None)), ("the three largest", slice(-3, None))):
        slope, error = fit(np.log(sizes[part]), np.log(times[part]))
        print(f"time ~ {name}^e over {label}: e = {slope:.2f} ± {error:.2f}")


def fit(x, y):
    """Slope of a least-squares line, and its standard error."""
    x, y = x - np.mean(x), y - np.mean(y)
    slope = x @ y / (x @ x)
    residual = y - slope * x
    return slope, np.sqrt(residual @ residual / (len(x) - 2) / (x @ x))


def devices(fast):
    """Chains, and then rows, on 1, 2, 4 and 8 host devices, a process each."""
    print("host devices: steps a second, and the largest difference to the draws of one device")
    print(f"{'':12s}{'64 chains, 100 dim.':>22s}{'':>10s}{'4 chains, 4e5 rows':>22s}")
    counts = (1, 2) if fast else (1, 2, 4, 8)
    first = None
    for count in counts:
        command = [sys.executable, __file__, "--devices", str(count), *["--fast"] * fast]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        result = json.loads(said)
        first = first or result
        row = f"{count:<12d}"
        for part in ("chains", "rows"):
            gap = np.max(np.abs(np.subtract(result[part]["draws"], first[part]["draws"])))
            row += f"{1 / result[part]['step']:22.1f}{gap:10.1e}"
        print(row, flush=True)


def on_devices(count, fast):
    """In a process with so many host devices: seconds a step, and the first draws."""
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    chains = Mesh(np.array(jax.devices()), ("chains",))
    both = Mesh(np.array(jax.devices())[None], ("chains", "rows"))
    rows = NamedSharding(both, PartitionSpec("rows"))
    cases = {
        "chains": (normal, 100, 64, chains),
        "rows": (
            regression(80_000 if fast else 400_000, lambda x: jax.device_put(x, rows)),
            10,
            4,
            both,
        ),
    }
    result = {}
    for name, (logdensity_fn, dim, num_chains, mesh) in cases.items():
        num_draws = 1 if name == "rows" else num_draws_of(num_chains * dim, fast)
        draws, step = sample(logdensity_fn, dim, num_chains, num_draws, mesh=mesh)
        result[name] = {"step": float(step), "draws": draws[:, :5, :5].tolist()}
    return result


def beside_blackjax(fast):
    """4096 chains of 100 dimensions on one device: our loop and BlackJAX's, in alternation."""
    import blackjax

    from probbp.diagnostics import from_blackjax

    num_chains, dim, num_draws = (512 if fast else 4096), 100, (10 if fast else 20)
    num_rounds = 3 if fast else 7
    sampler = blackjax.mala(normal, 1e-4)

    def theirs():
        """As many draws in as many pieces, and what ArviZ reads."""
        times, history = [], []
        init = jax.jit(jax.vmap(sampler.init))
        states = init(jax.random.normal(jax.random.key(0), (num_chains, dim)))

        @partial(jax.jit, donate_argnums=1)
        def piece(key, states):
            def chain(key, state):
                return blackjax.util.run_inference_algorithm(
                    key, sampler, num_draws, initial_state=state
                )

            return jax.vmap(chain)(jax.random.split(key, num_chains), states)

        for i in range(12):
            states, kept = piece(jax.random.fold_in(jax.random.key(1), i), states)
            history.append(jax.device_get(kept))
            times.append(time.perf_counter())
        states, infos = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *history)
        from_blackjax(states, infos)
        return np.median(np.diff(times)) / num_draws

    def ours():
        return sample(normal, dim, num_chains, num_draws, thinning=1)[1]

    steps, totals = [], []
    for i in range(num_rounds + 1):
        row = []
        for loop in (ours, theirs) if i % 2 else (theirs, ours):
            start = time.perf_counter()
            step = loop()
            row.append((step, time.perf_counter() - start))
        if i:  # the first round imports and warms up
            (a, whole_a), (b, whole_b) = row if i % 2 else row[::-1]
            steps.append((a, b))
            totals.append((whole_a, whole_b))
    print(f"\n{num_chains} chains, {dim} dimensions, one device: ours / BlackJAX's loop")
    for name, pairs, unit in (("a step", steps, 1e3), ("from call to ArviZ", totals, 1e3)):
        a, b = unit * np.transpose(pairs)
        ratio = np.median(a / b)
        low, high = np.quantile(a / b, [0.25, 0.75])
        print(
            f"{name:20s}{np.median(a):10.1f} ms {np.median(b):10.1f} ms   ratio {ratio:.3f} "
            f"(quartiles {low:.3f}, {high:.3f}; {len(pairs)} rounds)"
        )


if __name__ == "__main__":
    main()
