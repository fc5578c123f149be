"""How the samplers scale with the dimension, and the closed forms on Gaussians.

    python tests/benchmarks/scaling.py [--fast]

Every figure comes from independent chains at exact draws of the target, so that nothing has to
converge. Step sizes are the paper's epsilon = sqrt(2 h); ESJD is the expected squared jump distance
of a step, in all coordinates together. "expected" is theory, or a fit made apart from this code.

Cobb & Jha, 2025, arXiv:2505.18081 (the samplers); Roberts, Gelman & Gilks, 1997, and Roberts &
Rosenthal, 1998 (random-walk Metropolis and MALA).
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np

import probbp

RATIO = 1.15
"""From one step size of a grid to the next."""


class Gaussian(NamedTuple):
    """N(0, covariance), with what the measurements ask of it.

    Attributes:
        logdensity_fn: (d,) to a scalar.
        root: (d, d), a square root of the covariance: exact draws are z @ root.T.
        precision: (d, d).
        softest: (d,), unit vector along which the variance is largest.
    """

    logdensity_fn: Callable
    root: np.ndarray
    precision: np.ndarray
    softest: np.ndarray


class Case(NamedTuple):
    """A sampler under test.

    Attributes:
        name: as printed.
        algorithm: `(logdensity_fn, step_size, dim) -> SamplingAlgorithm`.
        guess: dimension to a step size epsilon from which the search starts.
        expected: exponents of ESJD and epsilon in d, acceptance rate, and ESJD, as text.
        is_quick: whether it belongs to the smoke test.
        num_chains: relative to the number asked for.
    """

    name: str
    algorithm: Callable
    guess: Callable[[int], float]
    expected: tuple[str, str, str, str]
    is_quick: bool = True
    num_chains: float = 1.0


class Best(NamedTuple):
    """The best step size of a search, with acceptance rate and efficiency there."""

    epsilon: float
    acceptance: float
    efficiency: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fast", action="store_true", help="a smoke test; its numbers are rough")
    fast = parser.parse_args().fast
    for key, table in enumerate((dimensions, closed_forms, pc_fmala_targets, ceiling, stiffness)):
        start = time.perf_counter()
        table(jax.random.key(key), fast)
        print(f"[{time.perf_counter() - start:.0f} s]\n", flush=True)


def dimensions(rng_key: jax.Array, fast: bool) -> None:
    """Print the best step on N(0, I) for each sampler and dimension, and how it scales."""
    dims = (16, 32, 64) if fast else (32, 64, 128, 256, 512, 1024)
    print("Best step size on N(0, I): ESJD (acceptance; epsilon), and exponents in d (± s.e.)")
    print(f"{'':22s}" + "".join(f"{f'd={d}':>19s}" for d in dims))
    fits = []
    for case in CASES:
        if fast and not case.is_quick:
            continue
        best = []
        for dim in dims:
            key = jax.random.fold_in(rng_key, dim)
            algorithm = partial(case.algorithm, dim=dim)
            num_chains = 1024 if fast else min(16384, max(4096, 2**21 // dim))
            count = int(case.num_chains * num_chains)
            best.append(search(key, isotropic(dim), algorithm, case.guess(dim), count))
        cells = [f"{b.efficiency:8.3g} ({b.acceptance:.2f};{b.epsilon:5.3f})" for b in best]
        print(f"{case.name:22s}" + "".join(f"{cell:>19s}" for cell in cells), flush=True)
        jump, step = (
            exponent(dims, [getattr(b, name) for b in best]) for name in ("efficiency", "epsilon")
        )
        fits.append(
            f"{case.name:22s}{jump:>15s}{case.expected[0]:>9s}{step:>17s}{case.expected[1]:>9s}"
            f"{best[-1].acceptance:15.3f}{case.expected[2]:>9s}   {case.expected[3]}"
        )
    print(
        f"\n{'':22s}{'ESJD ~ d^':>15s}{'expected':>9s}{'epsilon ~ d^':>17s}{'expected':>9s}"
        f"{f'accept d={dims[-1]}':>15s}{'expected':>9s}   expected ESJD"
    )
    print("\n".join(fits))


def closed_forms(rng_key: jax.Array, fast: bool) -> None:
    """Print acceptance and jump of PC-Line-FMALA beside their closed forms, on three Gaussians.

    The curvature is constant on each line, so that every line is MALA on N(0, 1), whatever the
    covariance; jumps are in the norm of the precision.
    """
    num_chains = 20_000 if fast else 400_000
    print("PC-Line-FMALA (floor 0) on Gaussians; A = 1 - (2 / pi) arctan((epsilon / 2)^3)")
    print(f"{'':24s}{'epsilon':>8s}{'accept':>9s}{'A':>8s}{'s.e.':>8s}{'z':>6s}", end="")
    print(f"{'ESJD':>9s}{'exact':>8s}{'s.e.':>8s}{'z':>6s}")
    targets = {
        "isotropic, d=16": isotropic(16),
        "anisotropic, d=16": anisotropic(16, 100.0),
        "correlated 0.9, d=2": gaussian(np.array([[1.0, 1.8], [1.8, 4.0]])),
    }
    worst = 0.0
    for name, target in targets.items():
        algorithm = partial(probbp.pc_line_fmala, floor=0.0)
        for i, epsilon in enumerate((0.4, 0.8, 1.2, 1.6, 2.0, 2.4)):
            key = jax.random.fold_in(rng_key, i)
            moves, acceptance = one_step(target, algorithm, num_chains)(key, epsilon)
            jump = np.einsum("ni,ij,nj->n", moves, target.precision, moves, optimize=True)
            row = f"{name:24s}{epsilon:8.1f}"
            for sample, exact in zip((acceptance, jump), line_closed_form(epsilon), strict=True):
                mean, error = np.mean(sample), np.std(sample) / np.sqrt(num_chains)
                z = (mean - exact) / error
                worst = max(worst, abs(z))
                row += f"{mean:9.4f}{exact:8.4f}{error:8.4f}{z:6.1f}"
            print(row, flush=True)
            name = ""
    print(f"largest |z| {worst:.1f}: {'agrees' if worst < 4.5 else 'DOES NOT AGREE'}")


def pc_fmala_targets(rng_key: jax.Array, fast: bool) -> None:
    """Print the acceptance rate at which PC-FMALA, tangent shared, works best.

    By the jump of a step, and by how fast the softest coordinate forgets; then how much of the
    latter is left if another acceptance rate is aimed at.
    """
    dims = (2, 8) if fast else (2, 4, 8, 16, 32, 64)
    num_chains = 1024 if fast else 8192
    aims = (0.234, 0.27, 0.3, 0.35, 0.4, 0.5)
    print("PC-FMALA (shared tangent): the best acceptance rate, and efficiency left at others")
    print(f"{'':22s}{'epsilon':>9s}{'best (ESJD)':>13s}{'best (rate)':>13s}  left at", end="")
    print("".join(f"{aim:>7}" for aim in aims))
    targets = {f"isotropic, d={d}": isotropic(d) for d in dims}
    targets |= {f"anisotropic, d={d}": anisotropic(d, 100.0) for d in dims}
    left = []
    for name, target in targets.items():
        guess = 2.38 / np.sqrt(len(target.root))
        jump = search(rng_key, target, probbp.pc_fmala, guess, num_chains)
        epsilons = jump.epsilon * 1.2 ** np.arange(-5.0, 4.0)
        rates, acceptance = relaxation(rng_key, target, probbp.pc_fmala, epsilons, num_chains // 2)
        curve = np.polyfit(acceptance, np.log(rates), 3)
        grid = np.linspace(acceptance.min(), acceptance.max(), 1000)
        values = np.polyval(curve, grid)
        left.append(np.exp(np.interp(aims, grid, values) - values.max()))
        print(f"{name:22s}{jump.epsilon:9.2f}{jump.acceptance:13.3f}", end="")
        print(f"{grid[np.argmax(values)]:13.3f}{'':9s}", end="")
        print("".join(f"{share:7.2f}" for share in left[-1]), flush=True)
    print(f"{'worst of the above':66s}" + "".join(f"{s:7.2f}" for s in np.min(left, axis=0)))


def ceiling(rng_key: jax.Array, fast: bool) -> None:
    r"""Print the acceptance of PC-FMALA with a fresh tangent as the step goes to zero.

    The ratio r of the curvatures at the two ends does not go to one with the step: the log ratio
    tends to (d log r - |z|^2 (r - 1)) / 2, and its mean acceptance, for many dimensions, to
    :math:`(2/\pi) \arctan \sqrt{2 / (\kappa_2 - 1)}`.
    """
    num_chains, dim = (20_000 if fast else 200_000), 64
    print(f"PC-FMALA at epsilon = 0.001, anisotropic Gaussian, d={dim}")
    for condition in (10.0, 100.0):
        target = anisotropic(dim, condition)
        eigenvalues = np.linalg.eigvalsh(target.precision)
        spread = np.mean(eigenvalues**2) / np.mean(eigenvalues) ** 2
        formula = 2 / np.pi * np.arctan(np.sqrt(2 / (spread - 1)))
        limit, limit_error = ceiling_by_simulation(eigenvalues, num_chains)
        for policy in ("refreshed", "shared"):
            algorithm = partial(probbp.pc_fmala, key_policy=policy, floor=0.0)
            _, acceptance = one_step(target, algorithm, num_chains)(rng_key, 1e-3)
            mean, error = np.mean(acceptance), np.std(acceptance) / np.sqrt(num_chains)
            row = f"kappa2 = {spread:.2f}  {policy:10s} acceptance {mean:.4f} +- {error:.4f}"
            if policy == "refreshed":
                z = (mean - limit) / np.hypot(error, limit_error)
                row += (
                    f"; limit at d={dim} {limit:.4f} (z = {z:.1f}); formula, d large {formula:.4f}"
                )
            print(row, flush=True)


def stiffness(rng_key: jax.Array, fast: bool) -> None:
    """Print how fast a soft coordinate forgets where a few directions are a thousand times stiffer.

    One curvature for each line is what PC-Line-FMALA is for; a full gradient's step size must suit
    the stiffest direction.
    """
    dim, num_stiff, num_chains = 64, 3, 1_000 if fast else 4_000
    print(f"A soft coordinate's rate of forgetting times d, at the best step size, d={dim}")
    print(f"{'':22s}{'isotropic':>12s}{f'{num_stiff} stiff':>12s}{'accept':>9s}{'epsilon':>9s}")
    precision = np.diag(np.r_[np.ones(dim - num_stiff), np.full(num_stiff, 1e3)])
    targets = (isotropic(dim), gaussian(np.linalg.inv(precision)))
    targets = [target._replace(softest=np.eye(dim)[0]) for target in targets]
    samplers = {
        "random walk": (_random_walk, 0.3),
        "mala": (_ours(probbp.mala), 0.8),
        "fmala": (_ours(probbp.fmala, key_policy="shared"), 0.3),
        "line_fmala": (_ours(probbp.line_fmala), 1.6),
        "pc_line_fmala": (_ours(probbp.pc_line_fmala), 1.6),
        "pc_line_fmala, k=2": (_ours(probbp.pc_line_fmala, num_tangents=2), 1.5),
    }
    for name, (algorithm, guess) in samplers.items():
        algorithm = partial(algorithm, dim=dim)
        grid = guess * RATIO ** np.arange(-28.0, 5.0, 2.0)
        results = [relaxation(rng_key, t, algorithm, grid, num_chains) for t in targets]
        best = [int(np.argmax(rates)) for rates, _ in results]
        soft, stiff = (dim * rates[i] for (rates, _), i in zip(results, best, strict=True))
        accept = results[1][1][best[1]]
        print(f"{name:22s}{soft:12.3f}{stiff:12.4f}{accept:9.2f}{grid[best[1]]:9.3f}", flush=True)


def gaussian(covariance: np.ndarray) -> Gaussian:
    precision = np.linalg.inv(covariance)
    matrix = jnp.asarray(precision, jnp.float32)
    _, axes = np.linalg.eigh(covariance)
    return Gaussian(
        lambda x: -0.5 * x @ (matrix @ x), np.linalg.cholesky(covariance), precision, axes[:, -1]
    )


def isotropic(dim: int) -> Gaussian:
    eye = np.eye(dim)
    return Gaussian(lambda x: -0.5 * jnp.sum(x**2), eye, eye, eye[0])


def anisotropic(dim: int, condition: float) -> Gaussian:
    """Variances geometric over `condition`, axes random."""
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(dim, dim)))
    variances = np.geomspace(condition**-0.5, condition**0.5, dim)
    return gaussian((rotation * variances) @ rotation.T)


def one_step(target: Gaussian, algorithm: Callable, num_chains: int) -> Callable:
    """Return `(rng_key, epsilon) -> moves (chains, d), acceptance rates (chains,)` of one step."""

    @jax.jit
    def run(rng_key, epsilon):
        sampler = algorithm(target.logdensity_fn, step_size=epsilon**2 / 2)
        moves, info = _step(sampler, target, rng_key, num_chains)
        return moves, info.acceptance_rate

    return lambda rng_key, epsilon: jax.tree.map(np.asarray, run(rng_key, jnp.float32(epsilon)))


def search(
    rng_key: jax.Array, target: Gaussian, algorithm: Callable, guess: float, num_chains: int
) -> Best:
    """Find the step size of the largest ESJD, in the norm of the precision.

    A grid of seven moves until its best is inside; a cubic through the logarithms of the five
    values around that gives the maximum. All step sizes see the same random numbers, so that the
    curve is smooth.
    """
    precision = None if np.all(target.root == np.eye(len(target.root))) else target.precision

    @jax.jit
    def on_grid(epsilons):
        def measure(epsilon):
            sampler = algorithm(target.logdensity_fn, step_size=epsilon**2 / 2)
            moves, info = _step(sampler, target, rng_key, num_chains)
            there = moves if precision is None else moves @ precision.astype(np.float32)
            return jnp.mean(jnp.sum(moves * there, axis=-1)), jnp.mean(info.acceptance_rate)

        return jax.lax.map(measure, epsilons)

    center = guess
    for _ in range(12):
        epsilons = center * RATIO ** np.arange(-3.0, 4.0)
        jumps, acceptance = map(np.asarray, on_grid(jnp.asarray(epsilons, jnp.float32)))
        index = int(np.argmax(jumps))
        if 2 <= index <= 4:
            break
        center = epsilons[index]
    near = np.flatnonzero((np.abs(np.arange(7) - index) <= 2) & (jumps > 0))
    logs = np.log(epsilons)
    curve = np.polyfit(logs[near] - logs[index], np.log(jumps[near]), 3)
    fine = np.linspace(logs[near[0]], logs[near[-1]], 1000) - logs[index]
    values = np.polyval(curve, fine)
    best = fine[np.argmax(values)] + logs[index]
    rate = np.interp(best, logs, acceptance)
    return Best(float(np.exp(best)), float(rate), float(np.exp(values.max())))


def relaxation(
    rng_key: jax.Array, target: Gaussian, algorithm: Callable, epsilons: np.ndarray, num_chains: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return how fast the softest coordinate forgets, and the acceptance rate, at each step size.

    The rate is -log(correlation) / K over K = d / 2 steps from stationarity, where mean and
    variance are known; half of it is the effective sample size of a step, where that is small.
    """
    num_steps = max(2, len(target.root) // 2)
    variance = 1 / (target.softest @ target.precision @ target.softest)

    @jax.jit
    def run(epsilon):
        sampler = algorithm(target.logdensity_fn, step_size=epsilon**2 / 2)
        key_start, key_steps = jax.random.split(rng_key)
        starts = _draw(target, key_start, num_chains)

        def chain(start, key):
            def step(state, key):
                state, info = sampler.step(key, state)
                return state, info.acceptance_rate

            keys = jax.random.split(key, num_steps)
            state, acceptance = jax.lax.scan(step, sampler.init(start, key), keys)
            return (state.position - start) @ target.softest, acceptance

        moves, acceptance = jax.vmap(chain)(starts, jax.random.split(key_steps, num_chains))
        lost = jnp.mean(moves**2) / (2 * variance)
        return -jnp.log1p(-jnp.minimum(lost, 0.99)) / num_steps, jnp.mean(acceptance)

    rates, acceptance = zip(*[run(jnp.float32(epsilon)) for epsilon in epsilons], strict=True)
    return np.array(rates), np.array(acceptance)


def line_closed_form(epsilon: float) -> tuple[float, float]:
    """Return acceptance rate and ESJD of stationary MALA on N(0, 1).

    The log ratio is -(epsilon^2 / 8) (y^2 - x^2), and (y - x, y + x) is Gaussian.
    """
    tau = (epsilon / 2) ** 3
    acceptance = 1 - 2 / np.pi * np.arctan(tau)
    jump = epsilon**2 + epsilon**4 / 4
    return acceptance, jump * (1 - 2 / np.pi * (np.arctan(tau) + tau / (1 + tau**2)))


def ceiling_by_simulation(eigenvalues: np.ndarray, num: int) -> tuple[float, float]:
    """Return the limit of the acceptance rate for this dimension, and its standard error."""
    rng = np.random.default_rng(0)
    dim = len(eigenvalues)
    ends = rng.normal(size=(2, num, dim)) ** 2
    here, there = ends @ eigenvalues / ends.sum(-1)
    ratio = there / here
    log_ratio = dim / 2 * np.log(ratio) - rng.chisquare(dim, num) / 2 * (ratio - 1)
    acceptance = np.exp(np.minimum(log_ratio, 0))
    return acceptance.mean(), acceptance.std() / np.sqrt(num)


def exponent(dims: tuple[int, ...], values: list[float]) -> str:
    """Fit a power of the dimension by least squares: the exponent and its standard error."""
    logs = np.log(dims) - np.mean(np.log(dims))
    slope, offset = np.polyfit(logs, np.log(values), 1)
    residual = np.log(values) - slope * logs - offset
    error = np.sqrt(np.sum(residual**2) / (len(dims) - 2) / np.sum(logs**2))
    return f"{slope:+.2f} ± {error:.2f}"


def _draw(target: Gaussian, rng_key: jax.Array, num: int) -> jax.Array:
    noise = jax.random.normal(rng_key, (num, len(target.root)))
    if np.all(target.root == np.eye(len(target.root))):
        return noise
    return noise @ target.root.T.astype(np.float32)


def _step(sampler, target, rng_key, num_chains):
    """Make one step of each chain, from exact draws."""
    key_start, key_step = jax.random.split(rng_key)
    starts = _draw(target, key_start, num_chains)

    def chain(start, key):
        key_init, key_step = jax.random.split(key)
        state, info = sampler.step(key_step, sampler.init(start, key_init))
        return state.position - start, info

    return jax.vmap(chain)(starts, jax.random.split(key_step, num_chains))


def _random_walk(logdensity_fn, step_size, dim):
    del dim
    sigma = jnp.sqrt(2 * step_size)
    walk = blackjax.additive_step_random_walk.normal_random_walk(logdensity_fn, sigma)
    return walk._replace(init=lambda position, rng_key: walk.init(position))


def _blackjax_mala(logdensity_fn, step_size, dim):
    del dim
    mala = blackjax.mala(logdensity_fn, step_size)
    return mala._replace(init=lambda position, rng_key: mala.init(position))


def _ours(algorithm: Callable, **options) -> Callable:
    def bound(logdensity_fn, step_size, dim):
        del dim
        return algorithm(logdensity_fn, step_size=step_size, **options)

    return bound


def _unbiased_drift(logdensity_fn, step_size, dim):
    return probbp.fmala(logdensity_fn, step_size=step_size, drift_scale=dim, key_policy="refreshed")


def _plane(num_tangents: int, acceptance: str, jump: str) -> Case:
    return Case(
        f"line_fmala, k={num_tangents}",
        _ours(probbp.line_fmala, num_tangents=num_tangents),
        lambda d: 1.6 * num_tangents ** (-1 / 6),
        ("0", "0", acceptance, jump),
        is_quick=num_tangents == 8,
        num_chains=0.25,  # each step decomposes a matrix, and its jump varies less
    )


_walk = lambda d: 2.38 / d**0.5

CASES = (
    Case("random walk", _random_walk, _walk, ("0", "-1/2", ".234", "1.33")),
    Case(
        "blackjax.mala",
        _blackjax_mala,
        lambda d: 1.6 / d ** (1 / 6),
        ("2/3", "-1/6", ".574", "29 (d=64), 169 (d=1024); fitted exponent .63"),
    ),
    Case(
        "mala",
        _ours(probbp.mala),
        lambda d: 1.6 / d ** (1 / 6),
        ("2/3", "-1/6", ".574", "the same, draw for draw"),
        is_quick=False,
    ),
    Case("fmala, carried", _ours(probbp.fmala), _walk, ("0", "-1/2", ".234", "1.33")),
    Case(
        "fmala, shared",
        _ours(probbp.fmala, key_policy="shared"),
        _walk,
        ("0", "-1/2", ".234", "1.33"),
        is_quick=False,
    ),
    Case(
        "fmala, drift_scale=d",
        _unbiased_drift,
        lambda d: 5 / d**0.73,
        ("-.91", "-.73", "low", ".092 (d=64), .007 (d=1024); exponents are fits"),
    ),
    Case("line_fmala", _ours(probbp.line_fmala), lambda d: 1.6, ("0", "0", ".70", "1.85")),
    Case(
        "pc_line_fmala",
        _ours(probbp.pc_line_fmala, floor=0.0),
        lambda d: 1.6,
        ("0", "0", ".70", "1.85"),
    ),
    _plane(2, ".62", "3.14"),
    _plane(4, ".56", "5.09"),
    _plane(8, ".54", "8.0"),
    _plane(16, ".55", "12.3"),
)

if __name__ == "__main__":
    main()
