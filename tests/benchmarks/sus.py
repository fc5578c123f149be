"""What a sparse backward pass of attention costs and tells, beside two exact ones.

    python tests/benchmarks/sus.py [--fast]

Random queries, keys and values of width 64, float32; the logits have standard deviation 1
("diffuse") or 3 ("peaked"). "dense" is `jax.nn.dot_product_attention`; "chunked" an exact pass in
blocks of 128 queries with its backward pass written by hand, which stores the log-sum-exp alone;
"keep=None" the exact limit of ours, in blocks too; the others keep 32 weights a query and head.

Time is the median over rounds, the calls in turn; of the backward pass alone, given what the
forward pass stored, and of both. Its ratios are medians of ratios within a round. Memory is the
temporary buffers that XLA reports for both. "variance" is E|estimate - exact|^2 / |exact|^2 of the
gradient with respect to query, key and value. Exponents are fitted to the backward pass of one head
over the lengths. Float32, about ten minutes on two cores; with --fast to n = 2048.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from _race import race

from probbp.ops import sus

KEEP, WIDTH, BLOCK = 32, 64, 128
CASES = [(1024, 1), (2048, 1), (4096, 1), (8192, 1), (16384, 1), (4096, 4), (2048, 8), (8192, 4)]
SPREADS = {"diffuse": 1.0, "peaked": 3.0}
LOGITS_OF_DENSE = 2**27  # beyond, dense attention does not fit everywhere
METHODS = {
    "dense": lambda rng_key: jax.nn.dot_product_attention,
    "chunked": lambda rng_key: chunked,
    "keep=None": lambda rng_key: partial(sus.dot_product_attention, keep=None),
    **{
        sampling: lambda rng_key, sampling=sampling: partial(
            sus.dot_product_attention, keep=KEEP, rng_key=rng_key, sampling=sampling
        )
        for sampling in ("systematic", "filled", "independent")
    },
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a smoke test; its numbers are rough")
    fast = parser.parse_args().fast
    cases = [case for case in CASES if case[0] * case[1] <= (2048 if fast else 2**20)]
    backward = {}
    for spread in SPREADS:
        for length, heads in cases:
            title = f"{length} tokens, {heads} heads, {spread}"
            rows = compare(length, heads, SPREADS[spread], num_rounds=3 if fast else 7)
            print_table(title, rows)
            if heads == 1:
                for name, row in rows.items():
                    backward.setdefault((name, spread), []).append((length, row["backward"]))
    print("\nexponent of the backward pass in the length")
    for (name, spread), points in backward.items():
        if len(points) > 2:
            lengths, seconds = np.log(np.array(points)).T
            print(f"{name:14s}{spread:10s}{np.polyfit(lengths, seconds, 1)[0]:6.2f}")
    tradeoff(length=1024 if fast else 4096, num_keys=4 if fast else 12)


def compare(length, heads, spread, num_rounds):
    """Return name -> what is printed of it."""
    arrays, grad = inputs(length, heads, spread)
    rng_key = jax.random.key(1)
    calls, rows = {}, {}
    exact = None
    for name, make in METHODS.items():
        if name == "dense" and length**2 * heads > LOGITS_OF_DENSE:
            continue
        if name == "independent" and length**2 * heads > 2**26:
            continue

        def forward(rng_key, *arrays, make=make):
            return jax.vjp(make(rng_key), *arrays)

        def both(rng_key, grad, *arrays, forward=forward):
            return forward(rng_key, *arrays)[1](grad)

        compiled = jax.jit(both).lower(rng_key, grad, *arrays).compile()
        _, pullback = jax.jit(forward)(rng_key, *arrays)
        backward = jax.jit(lambda pullback, grad: pullback(grad)).lower(pullback, grad).compile()
        calls[name, "both"] = partial(compiled, rng_key, grad, *arrays)
        calls[name, "backward"] = partial(backward, pullback, grad)
        rows[name] = {"MiB": compiled.memory_analysis().temp_size_in_bytes / 2**20, "variance": 0.0}
        if name == "chunked":
            exact = compiled(rng_key, grad, *arrays)
        elif name in ("systematic", "filled", "independent"):
            keys = jax.random.split(jax.random.key(2), 3)
            rows[name]["variance"] = relative_variance(
                [compiled(key, grad, *arrays) for key in keys], exact
            )
    seconds = dict(zip(calls, race(calls, num_rounds).T, strict=True))
    for name, row in rows.items():
        for part in ("backward", "both"):
            row[part] = float(np.median(seconds[name, part]))
            for other in ("chunked", "dense"):
                if other in rows:
                    ratios = np.divide(seconds[name, part], seconds[other, part])
                    row[part, other] = float(np.median(ratios))
    return rows


def print_table(title, rows):
    print(
        f"\n{title}\n{'':14s}{'backward':>10s}{'/ chunked':>10s}{'both':>10s}{'/ chunked':>10s}"
        f"{'/ dense':>9s}{'MiB':>9s}{'/ dense':>9s}{'variance':>10s}"
    )
    for name, row in rows.items():
        dense = f"{row['both', 'dense']:9.3f}" if "dense" in rows else f"{'':9s}"
        memory = f"{row['MiB'] / rows['dense']['MiB']:9.3f}" if "dense" in rows else f"{'':9s}"
        print(
            f"{name:14s}{1e3 * row['backward']:8.0f}ms{row['backward', 'chunked']:10.3f}"
            f"{1e3 * row['both']:8.0f}ms{row['both', 'chunked']:10.3f}{dense}"
            f"{row['MiB']:9.1f}{memory}{row['variance']:10.4f}",
            flush=True,
        )


def tradeoff(length, num_keys):
    """Print variance over `keep`, for weights from diffuse to peaked: cheap or quiet."""
    print(f"\nrelative variance at {length} tokens, systematic (filled)")
    keeps = (8, 16, 32, 64, 128)
    title = "deviation of logits, effective keys"
    print(f"{title:36s}" + "".join(f"{f'keep={keep}':>18s}" for keep in keeps))
    for spread in (0.0, 1.0, 2.0, 3.0, 4.0):
        arrays, grad = inputs(length, 1, spread)
        exact = jax.jit(lambda grad, *arrays: jax.vjp(chunked, *arrays)[1](grad))(grad, *arrays)
        logits = jnp.einsum("qh,sh->qs", arrays[0][0, :64, 0], arrays[1][0, :, 0]) / WIDTH**0.5
        effective = float(jnp.median(1 / jnp.sum(jax.nn.softmax(logits) ** 2, axis=-1)))
        cells = []
        for keep in keeps:
            variances = []
            for sampling in ("systematic", "filled"):
                op = partial(sus.dot_product_attention, keep=keep, sampling=sampling)

                @jax.jit
                def estimate(rng_key, grad, *arrays, op=op):
                    return jax.vjp(partial(op, rng_key=rng_key), *arrays)[1](grad)

                keys = jax.random.split(jax.random.key(3), num_keys)
                estimates = [estimate(key, grad, *arrays) for key in keys]
                variances.append(relative_variance(estimates, exact))
            cells.append(f"{variances[0]:8.4f} ({variances[1]:.4f})")
        print(f"{spread:10.1f}{effective:26.0f}" + "".join(f"{c:>18s}" for c in cells), flush=True)


def inputs(length, heads, spread):
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, grad = (jax.random.normal(k, (1, length, heads, WIDTH)) for k in keys)
    return (spread * query, key, value), grad


def relative_variance(estimates, exact):
    def squared(tree):
        return sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(tree))

    errors = [squared(jax.tree.map(jnp.subtract, estimate, exact)) for estimate in estimates]
    return float(np.mean(errors)) / squared(exact)


@jax.custom_vjp
def chunked(query, key, value):
    """Exact attention in blocks of queries; the backward pass computes the weights again."""
    return _chunked(query, key, value)[0]


def _chunked(query, key, value):
    def block(query):
        logits = jnp.einsum("bnth,bsnh->bnts", query, key) / WIDTH**0.5
        peak = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - peak)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        return jnp.einsum("bnts,bsnh->bnth", weights, value) / total, peak + jnp.log(total)

    output, log_total = jax.lax.map(block, _split(query))
    return _join(output), (query, key, value, output, log_total)


def _backward(stored, grad):
    query, key, value, output, log_total = stored

    def block(carry, rows):
        query, output, log_total, grad = rows
        logits = jnp.einsum("bnth,bsnh->bnts", query, key) / WIDTH**0.5
        weights = jnp.exp(logits - log_total)
        moved = jnp.einsum("bnth,bsnh->bnts", grad, value)
        moved = weights * (moved - jnp.sum(grad * output, -1, keepdims=True)) / WIDTH**0.5
        d_key = carry[0] + jnp.einsum("bnts,bnth->bsnh", moved, query)
        d_value = carry[1] + jnp.einsum("bnts,bnth->bsnh", weights, grad)
        return (d_key, d_value), jnp.einsum("bnts,bsnh->bnth", moved, key)

    rows = (_split(query), output, log_total, _split(grad))
    carry, d_query = jax.lax.scan(block, (jnp.zeros_like(key), jnp.zeros_like(value)), rows)
    return _join(d_query), *carry


def _split(x):
    batch, length, heads, width = x.shape
    return jnp.transpose(x.reshape(batch, -1, BLOCK, heads, width), (1, 0, 3, 2, 4))


def _join(x):
    num_blocks, batch, heads, block, width = x.shape
    return jnp.transpose(x, (1, 0, 3, 2, 4)).reshape(batch, num_blocks * block, heads, width)


chunked.defvjp(_chunked, _backward)


if __name__ == "__main__":
    main()
