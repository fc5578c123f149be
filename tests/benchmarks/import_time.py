"""Time to import probbp beside that of the hosts it needs, each in a process of its own.

    python tests/benchmarks/import_time.py

Alternating, the ratio of each pair, and the median and quartiles of the ratios.
"""

import subprocess
import sys
import time

import numpy as np
from tqdm import tqdm

HOSTS, OURS = "import jax, blackjax", "import probbp"
NUM_PAIRS = 15


def seconds(code):
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main():
    for code in (HOSTS, OURS):  # files are read and compiled
        seconds(code)
    pairs = np.array([[seconds(HOSTS), seconds(OURS)] for _ in tqdm(range(NUM_PAIRS))])
    low, middle, high = np.quantile(pairs[:, 1] / pairs[:, 0], [0.25, 0.5, 0.75])
    for code, time_of in zip((HOSTS, OURS), np.median(pairs, axis=0), strict=True):
        print(f"{code:24s}{time_of:6.2f} s")
    print(f"{'ratio':24s}{middle:6.2f}   quartiles {low:.2f}, {high:.2f}")


if __name__ == "__main__":
    main()
