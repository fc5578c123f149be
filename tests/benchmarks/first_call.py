"""What the first call of `probbp.sample` costs beside NumPyro's NUTS, and a second, equal one.

    python tests/benchmarks/first_call.py [--pairs 7]

CPU seconds of a process, imports aside, with nothing compiled before: four chains of 1000 draws
after 1000 of warm-up on a Gaussian of five dimensions. Alternating, and the median of the ratios of
each pair. Then the same call again, on a density that closes over 1 kB and over 50 MB of data of
which it reads little: what of a call grows with the data.
"""

import argparse
import subprocess
import sys
import time

import numpy as np
from tqdm import tqdm

CALLS = {
    "NUTS": """
from numpyro.infer import MCMC, NUTS
def call():
    mcmc = MCMC(NUTS(potential_fn=lambda x: -logdensity_fn(x)), num_warmup=1000, num_samples=1000,
                num_chains=4, chain_method="vectorized", progress_bar=False)
    mcmc.run(jax.random.key(0), init_params=jnp.zeros((4, 5)))
""",
    "probbp.mala": """
import probbp, probbp.diagnostics
from functools import partial
def call():
    probbp.sample(jax.random.key(0), partial(probbp.mala, logdensity_fn), jnp.zeros(5),
                  num_warmup=1000, num_samples=1000, num_chains=4, progress_bar=False)
""",
}
CODE = """
import time, jax, jax.numpy as jnp
{call}
data = jnp.ones({size})
def logdensity_fn(x):
    return -0.5 * jnp.sum(x**2 * data[:5])
jax.block_until_ready(jnp.zeros(3) + 1)  # the backend has started
for _ in range({num_calls}):
    begin = time.process_time()
    call()
    print(time.process_time() - begin)
"""


def seconds(name, size=250, num_calls=1):
    """CPU seconds of each call in a fresh process."""
    code = CODE.format(call=CALLS[name], size=size, num_calls=num_calls)
    command = [sys.executable, "-c", code]
    return [float(word) for word in subprocess.check_output(command, text=True).split()]


def first(num_pairs):
    pairs = np.array([[seconds(name)[0] for name in CALLS] for _ in tqdm(range(num_pairs))])
    print("first call                CPU s")
    for name, median in zip(CALLS, np.median(pairs, axis=0), strict=True):
        print(f"{name:24s}{median:7.2f}")
    low, middle, high = np.quantile(pairs[:, 1] / pairs[:, 0], [0.25, 0.5, 0.75])
    print(f"{'ratio':24s}{middle:7.2f}   quartiles {low:.2f}, {high:.2f}")


def second(num_pairs):
    sizes = {"1 kB": 250, "50 MB": 12_500_000}
    pairs = np.array(
        [
            [np.median(seconds("probbp.mala", size, 4)[1:]) for size in sizes.values()]
            for _ in tqdm(range(num_pairs))
        ]
    )
    print("\nan equal call again       CPU s")
    for name, median in zip(sizes, np.median(pairs, axis=0), strict=True):
        print(f"closing over {name:11s}{median:7.3f}")
    low, middle, high = np.quantile(pairs[:, 1] / pairs[:, 0], [0.25, 0.5, 0.75])
    print(f"{'ratio':24s}{middle:7.2f}   quartiles {low:.2f}, {high:.2f}")


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    num_pairs = parser.parse_args().pairs
    begin = time.perf_counter()
    first(num_pairs)
    second(num_pairs)
    print(f"\n{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
