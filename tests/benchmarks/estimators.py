"""What the estimators of a gradient are worth, and what they cost.

    python tests/benchmarks/estimators.py [--fast]

First the relative variance E|estimate - g|^2 / |g|^2 of each estimator beside theory, and its bias,
on two negative log posteriors where NumPyro would start a chain: a Bayesian logistic regression on
scikit-learn's breast cancer data, and a Bayesian neural network on the same rows, its weights in
leaves. z is the distance from theory in standard errors; a row in which the mean of the estimates
is off beyond chance says "biased".

Then the cost: operations and temporary buffers, as XLA reports them of one compiled call, and time,
all as ratios to reverse mode, on a deep network with its layers written out and in a loop. The loop
shows what memory forward mode saves; of layers written out, XLA's CPU backend gives a directional
derivative about as many buffers as a gradient. XLA counts the body of a loop once, so that
operations of layers in a loop, or of tangents taken one by one, are too few, and those of the QR
decomposition not at all: time tells what they take. Calls run in turn, in a new order in each
round, and a time ratio is the median over the rounds of the ratio to reverse mode in the same
round; "fastest" compares the fastest rounds, for a machine with other work on it. Float32. Two to
three minutes on two cores.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from _race import race
from numpyro.infer.util import initialize_model
from sklearn.datasets import load_breast_cancer

from probbp.diagnostics.gradients import gradient_quality
from probbp.estimators import averaged, forward, reverse
from probbp.models import bnn

sys.path.append(str(Path(__file__).parents[1]))

from tables import ESTIMATORS, Member


class Problem(NamedTuple):
    """A function and where it is differentiated."""

    name: str
    fun: Callable
    params: Any


def of_tangents(tangents: Any, k: int) -> Member:
    """Return forward gradients along k tangents, with their relative variance."""
    formula = {
        "gaussian": lambda d: (d + 1) / k,
        "unit": lambda d: (d - 1) / k,
        "orthogonal": lambda d: d / k - 1,
    }
    return Member(forward(k, tangents=tangents), formula[tangents])


# The members of the tests' table are along four tangents.
MEMBERS = ESTIMATORS | {
    f"{tangents}, k={k}": of_tangents(tangents, k)
    for tangents in ("gaussian", "unit", "orthogonal")
    for k in (1, 16)
}

COSTS = {
    "reverse": reverse(),
    "forward, k=1": forward(1),
    "forward, k=4": forward(4),
    "forward, k=16": forward(16),
    "forward, k=4, one by one": forward(4, batch_size=1),
    "forward, k=16, one by one": forward(16, batch_size=1),
    "orthogonal, k=16": forward(16, tangents="orthogonal"),
    "averaged, 4 of k=4": averaged(forward(4), 4),
    "averaged, 4 of k=4, in turn": averaged(forward(4), 4, batch_size=1),
    "averaged, 16 of k=1, in turn": averaged(forward(1), 16, batch_size=1),
}
"""The first is what the others are compared with."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fast", action="store_true", help="a smoke test; its numbers are rough")
    fast = parser.parse_args().fast
    for problem in (logistic_regression(), neural_network()):
        print_variances(problem, num_keys=200 if fast else 2000)
    for is_loop in (False, True):
        print_costs(deep_network(1024, is_loop), num_rounds=3 if fast else 21)


def print_variances(problem: Problem, num_keys: int) -> None:
    """Print relative variance beside theory, for all estimators."""
    num_params = optax.tree.size(problem.params)
    leaves = len(jax.tree.leaves(problem.params))
    print(f"\n{problem.name}: {num_params} parameters in {leaves} leaves, {num_keys} keys")
    print(
        f"{'':30s}{'variance':>10s}{'s.e.':>8s}{'theory':>9s}{'z':>6s}"
        f"{'slope':>8s}{'s.e.':>8s}{'cosine':>8s}  bias"
    )
    for i, (name, member) in enumerate(MEMBERS.items()):
        quality = gradient_quality(
            jax.random.key(i), member.estimator, problem.fun, problem.params, num_keys=num_keys
        )
        row = quality.overall
        theory, z = "", ""
        if member.variance is not None:
            expected = member.variance(num_params)
            theory = f"{expected:.4g}"
            error = row.relative_variance_error
            z = f"{(row.relative_variance - expected) / error:+.1f}" if error else "exact"
        print(
            f"{name:30s}{row.relative_variance:10.4g}{row.relative_variance_error:8.2g}"
            f"{theory:>9s}{z:>6s}{row.slope:8.4f}{row.slope_error:8.4f}{row.cosine:8.3f}"
            f"  {'biased: ' + ', '.join(quality.biased) if quality.biased else 'none seen'}",
            flush=True,
        )


def print_costs(problem: Problem, num_rounds: int) -> None:
    """Print operations, memory and time, for all estimators."""
    calls, flops, memory = {}, [], []
    for name, estimator in COSTS.items():
        call = jax.jit(estimator(problem.fun)).lower(jax.random.key(0), problem.params).compile()
        flops.append(call.cost_analysis()["flops"])
        memory.append(call.memory_analysis().temp_size_in_bytes)
        calls[name] = partial(call, jax.random.key(0), problem.params)
    times = race(calls, num_rounds)
    ratios = np.median(times / times[:, :1], axis=0)
    fastest = times.min(axis=0) / times[:, 0].min()
    print(f"\n{problem.name}: {optax.tree.size(problem.params)} parameters, {num_rounds} rounds")
    print(
        f"{'':30s}{'Mflop':>9s}{'ratio':>8s}{'temp KiB':>11s}{'ratio':>8s}"
        f"{'ms':>9s}{'ratio':>8s}{'fastest':>9s}"
    )
    for i, name in enumerate(calls):
        print(
            f"{name:30s}{flops[i] / 1e6:9.2f}{flops[i] / flops[0]:8.2f}"
            f"{memory[i] / 1024:11.1f}{memory[i] / memory[0]:8.3f}"
            f"{1e3 * np.median(times[:, i]):9.2f}{ratios[i]:8.2f}{fastest[i]:9.2f}",
            flush=True,
        )


def breast_cancer() -> tuple[jax.Array, jax.Array]:
    """Return standardised features (569, 30) and classes (569,)."""
    x, y = load_breast_cancer(return_X_y=True)
    return jnp.asarray((x - x.mean(0)) / x.std(0), jnp.float32), jnp.asarray(y)


def logistic_regression() -> Problem:
    """Thirty slopes and an intercept, standard normal priors; two leaves."""

    def model(x, y):
        slopes = numpyro.sample("slopes", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
        intercept = numpyro.sample("intercept", dist.Normal(0, 1))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Bernoulli(logits=x @ slopes + intercept), obs=y)

    return _posterior("logistic regression", model)


def neural_network() -> Problem:
    """Two hidden layers of eight units, two classes; six leaves."""
    model = partial(bnn.model, widths=(8, 8), num_outputs=2, is_classifier=True)
    return _posterior("Bayesian neural network", model)


def deep_network(rows: int, is_loop: bool, depth: int = 20, width: int = 32) -> Problem:
    """A regression of `depth` layers, whose activations reverse mode has to keep."""
    keys = jax.random.split(jax.random.key(0), depth + 1)
    weights = [jax.random.normal(key, (width, width)) / width**0.5 for key in keys[1:]]
    if is_loop:
        weights = jnp.stack(weights)
    x = jax.random.normal(keys[0], (rows, width))

    def fun(weights):
        hidden = x
        if is_loop:
            hidden, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), hidden, weights)
        else:
            for weight in weights:
                hidden = jnp.tanh(hidden @ weight)
        return jnp.mean((hidden - jnp.sin(x)) ** 2)

    how = "in a loop" if is_loop else "written out"
    return Problem(f"deep network, {depth} layers of {width} {how}, {rows} rows", fun, weights)


def _posterior(name: str, model: Callable) -> Problem:
    """Return the negative log posterior of the breast cancer data, at NumPyro's first guess."""
    info = initialize_model(
        jax.random.key(0), model, model_args=breast_cancer(), validate_grad=False
    )
    return Problem(name, info.potential_fn, info.param_info.z)


if __name__ == "__main__":
    main()
