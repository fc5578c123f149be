"""Does an inference find what a simulator hides? Simulation-based calibration.

Draw parameters from the prior and data given them, infer, and count how many posterior draws lie
below the truth: over many repetitions a right inference makes this rank uniform. Talts, Betancourt,
Simpson, Vehtari & Gelman, 2018, arXiv:1804.06788.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats
from tqdm.auto import tqdm

from probbp.checks import check_count, check_function, check_rng_key
from probbp.diagnostics.names import leaf_names
from probbp.types import Tree

NUM_UPDATES = 20
"""How often a vectorised run comes back to the host, unless `batch_size` says otherwise."""

NUM_THRESHOLDS = 200
"""At most so many points of a rank's distribution function are compared with the uniform one."""


class RankStatistics(NamedTuple):
    """Ranks of the truth among the draws; shown as a table of p-values.

    Attributes:
        ranks: name to (num_simulations, ...), integers from 0 to `num_draws`.
        num_draws: posterior draws per simulation.
    """

    ranks: dict[str, np.ndarray]
    num_draws: int

    def __repr__(self) -> str:
        """Tell, for each scalar, the p-value, and where and how widely its ranks lie."""
        p_values, overall = uniformity(self)
        names = [name for name, _ in scalars(self.ranks)]
        width = max(map(len, ["quantity", *names]))
        num_simulations = len(next(iter(self.ranks.values())))
        lines = [
            f"{num_simulations} simulations, {self.num_draws} draws each",
            f"{'quantity':{width}}  {'p-value':>8}  {'mean':>5}  {'spread':>6}",
        ]
        ranks = (column for _, column in scalars(self.ranks))
        flat = np.concatenate([np.ravel(p) for p in p_values.values()])
        for name, column, p_value in zip(names, ranks, flat, strict=True):
            # A uniform rank, over num_draws, has mean 1/2 and variance (1 + 2 / num_draws) / 12.
            spread = column.std() / self.num_draws / math.sqrt((1 + 2 / self.num_draws) / 12)
            mean = column.mean() / self.num_draws
            lines.append(f"{name:{width}}  {p_value:8.2g}  {mean:5.2f}  {spread:6.2f}")
        lines += [
            f"All together: p = {overall:.2g} (Bonferroni over {len(flat)}).",
            "Right: mean 0.5, spread 1. Mean above 0.5: draws too low. Spread above 1: too narrow.",
        ]
        return "\n".join(lines)


def simulation_based_calibration(
    rng_key: jax.Array,
    simulate: Callable[[jax.Array], tuple[Tree, Any]],
    infer: Callable[[jax.Array, Any], Tree],
    *,
    num_simulations: int,
    batch_size: int | None = None,
    vectorized: bool = True,
    quantities: Callable[[Tree, Any], dict[str, jax.Array]] | None = None,
    progress_bar: bool = True,
) -> RankStatistics:
    """Rank true parameters among posterior draws, in many simulated data sets.

    If `infer` draws independently from the posterior of the model behind `simulate`, every rank is
    exactly uniform on 0, .., num_draws. Draws that are too wide gather the ranks in the middle, too
    narrow ones at both ends, shifted ones on one side. *Autocorrelated* draws gather them at both
    ends too, right as they may be: thin a chain until its draws are nearly independent (by its
    autocorrelation time or more), and leave out its warm-up.

    It can't see everything. It judges on average over the prior, so that errors may cancel between
    data sets, or hide where the prior rarely goes; simulator and inference that share a wrong model
    agree; and an inference that ignores the data and draws from the prior has uniform ranks in
    every parameter. So can one that forgets the prior have, in a location. Quantities see what
    parameters hide, the first the log likelihood, the second the log prior: pass both.

    Args:
        rng_key: key of all simulations. The same key gives the same ranks, whatever `batch_size`.
        simulate: `rng_key -> (params, data)`, one draw of both; `params` is a pytree of real
            arrays. `numpyro_simulator` makes one of a NumPyro model.
        infer: `(rng_key, data) -> draws`, the tree of `params`, each leaf with a first axis
            (num_draws,).
        num_simulations: how often; a few hundred show a shift or a wrong scale by a quarter of the
            posterior's standard deviation.
        batch_size: simulations at once; by default a twentieth of them. Memory grows with it.
        vectorized: run batches under `jax.jit(jax.vmap(...))`. If `False`, one by one in Python,
            uncompiled, for what JAX can't trace.
        quantities: `(params, data) -> {name: array}`, further quantities to rank; traced by `vmap`
            over draws in either case.
        progress_bar: whether to show progress.

    Returns:
        The ranks of each leaf of `params`, named by its path ("a", "b.c"; "x" for a lone array),
        and of each further quantity. Ties are broken at random. Printing it shows p-values.

    Raises:
        ValueError: if `draws` does not have the tree and shapes of `params`, a name is taken twice
            (told before the first inference), a count is not positive, or a draw is NaN.

    Example:
        >>> import jax
        >>> def simulate(rng_key):
        ...     key_mu, key_y = jax.random.split(rng_key)
        ...     mu = jax.random.normal(key_mu)
        ...     return {"mu": mu}, mu + jax.random.normal(key_y)
        >>> def infer(rng_key, y):  # the posterior is N(y / 2, 1 / 2)
        ...     return {"mu": y / 2 + 0.5**0.5 * jax.random.normal(rng_key, (99,))}
        >>> result = simulation_based_calibration(
        ...     jax.random.key(0), simulate, infer, num_simulations=200, progress_bar=False)
        >>> p_values, overall = uniformity(result)

    Reference:
        Talts et al., 2018, arXiv:1804.06788; Modrak et al., 2023, arXiv:2211.02383 (quantities that
        depend on data).
    """
    check_rng_key("rng_key", rng_key)
    num_simulations = check_count("num_simulations", num_simulations)
    batch_size = None if batch_size is None else check_count("batch_size", batch_size)
    check_function("simulate", simulate, "Pass rng_key -> (params, data), as numpyro_simulator's.")
    check_function("infer", infer, "Pass (rng_key, data) -> draws.")
    if quantities is not None:
        check_function("quantities", quantities, "Pass (params, data) -> {name: array}.")

    further = quantities or (lambda params, data: {})

    def simulation(rng_key):
        key_simulate, key_infer, key_ties = jax.random.split(rng_key, 3)
        params, data = simulate(key_simulate)
        truth, extra = _named(params), further(params, data)
        if taken := truth.keys() & extra.keys():
            raise ValueError(f"quantities gives {sorted(taken)} anew: choose other names.")
        truth |= extra
        draws = infer(key_infer, data)
        num_draws = _check_draws(params, draws)
        sample = _named(draws) | jax.vmap(lambda draw: further(draw, data))(draws)
        keys = jax.random.split(key_ties, len(truth))
        ranks = {n: _rank(k, truth[n], sample[n]) for k, n in zip(keys, truth, strict=True)}
        lost = {n: jnp.any(jnp.isnan(sample[n])) | jnp.any(jnp.isnan(truth[n])) for n in truth}
        return ranks, lost, num_draws

    keys = jax.random.split(rng_key, num_simulations)
    with tqdm(total=num_simulations, disable=not progress_bar, desc="simulations") as bar:
        if vectorized:
            size = min(batch_size or -(-num_simulations // NUM_UPDATES), num_simulations)
            results = list(_in_batches(simulation, keys, size, bar))
        else:
            results = []
            for key in keys:
                results.append(jax.tree.map(lambda leaf: np.asarray(leaf)[None], simulation(key)))
                bar.update()
    ranks, lost, num_draws = jax.tree.map(
        lambda *parts: np.concatenate(parts)[:num_simulations], *results
    )
    for name, flags in lost.items():
        if flags.any():
            raise ValueError(
                f"{name!r} is NaN in {flags.sum()} of {num_simulations} simulations, and NaN has "
                "no rank. Look at one such data set: was the step size too large, or a scale zero?"
            )
    return RankStatistics(ranks, int(num_draws[0]))


def uniformity(result: RankStatistics) -> tuple[dict[str, np.ndarray], float]:
    r"""Test whether ranks are uniform, scalar by scalar, and all together.

    The test compares the ranks' empirical distribution function with the uniform one, at up to 200
    thresholds t at once. At each the number of ranks below t is binomial, with a two-sided p-value
    of its own; the statistic is the least of these, and its p-value the probability that the whole
    function strays as far at some threshold. It is computed, not simulated: given their sum, the
    counts between thresholds are Poisson, so that the probability of staying inside is a chain of
    convolutions.

    The p-value is exact, up to rounding: under uniform ranks P(p <= a) <= a, with a little slack as
    ranks are discrete. Below about 1e-14 it is held within [g / 2, K g], where g is the statistic
    and K the number of thresholds. Unlike Kolmogorov and Smirnov's it sees a wrong spread as well
    as a shift, and unlike a chi-square test it needs no bins.

    Args:
        result: of `simulation_based_calibration`.

    Returns:
        The p-values, name to an array of the quantity's shape; and one for all scalar quantities
        together by Bonferroni, the least times their number. Whatever they depend on, a right
        inference is below a with probability at most a.

    Example:
        >>> import numpy as np
        >>> ranks = np.arange(200) % 100
        >>> p_values, overall = uniformity(RankStatistics({"x": ranks}, 99))
        >>> overall > 0.5
        True

    Reference:
        Säilynoja, Bürkner & Vehtari, 2022, arXiv:2103.10522 (the test); Moscovich & Nadler, 2017,
        arXiv:1503.04363 (Poisson recursion for boundary crossing).
    """
    check_result(result)
    num_ranks = result.num_draws + 1
    num_simulations = len(next(iter(result.ranks.values())))
    thresholds = np.linspace(1, num_ranks - 1, min(num_ranks - 1, NUM_THRESHOLDS))
    thresholds = np.unique(thresholds.round().astype(int))
    counts = np.arange(num_simulations + 1)
    below = thresholds[:, None] / num_ranks
    # (threshold, count): how unlikely is a count as far from the middle as this one, or farther.
    tails = 2 * np.minimum(
        stats.binom.cdf(counts, num_simulations, below),
        stats.binom.sf(counts - 1, num_simulations, below),
    )
    shares = np.diff(thresholds, prepend=0, append=num_ranks) / num_ranks
    steps = [stats.poisson.pmf(counts, num_simulations * share) for share in shares]

    def p_value(ranks):
        observed = np.searchsorted(np.sort(ranks), thresholds, side="left")
        statistic = tails[np.arange(len(thresholds)), observed].min()
        # Mirror images (r and num_draws - r) are equal but for rounding: neither is farther out.
        outside = 1 - _probability_inside(tails > statistic * (1 + 1e-9), steps)
        return np.clip(outside, statistic / 2, min(1.0, len(thresholds) * statistic))

    p_values = {
        name: np.apply_along_axis(p_value, 0, ranks) for name, ranks in result.ranks.items()
    }
    flat = np.concatenate([np.ravel(values) for values in p_values.values()])
    return p_values, min(1.0, float(flat.min()) * len(flat))


def numpyro_simulator(
    model: Callable, *args: Any, data: tuple[str, ...] | list[str] | str, **kwargs: Any
) -> Callable[[jax.Array], tuple[dict[str, jax.Array], dict[str, jax.Array]]]:
    """Make a NumPyro model a simulator: draw all its sites, and call some of them data.

    Args:
        model: a NumPyro model, unconditioned: its data sites are drawn, not observed.
        *args: of the model.
        data: the names of the sites that the inference is to see.
        **kwargs: of the model.

    Returns:
        `rng_key -> (params, data)`, two dictionaries by name of site: the sampled sites that are
        not data, as they are (constrained), and those that are. Deterministic sites are left out.

    Raises:
        ValueError: on the first draw, if a name of `data` is no site, a site is observed, or none
            is left to infer.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> def model(y=None):
        ...     mu = numpyro.sample("mu", dist.Normal(0, 1))
        ...     numpyro.sample("y", dist.Normal(mu, 1).expand([3]), obs=y)
        >>> params, seen = numpyro_simulator(model, data="y")(jax.random.key(0))
        >>> list(params), seen["y"].shape
        (['mu'], (3,))
    """
    from numpyro import handlers

    check_function("model", model, "Pass a NumPyro model.")
    names = (data,) if isinstance(data, str) else data
    if not (isinstance(names, tuple | list) and all(isinstance(name, str) for name in names)):
        raise TypeError(f"data must be the name of a site, or a tuple of names, got {data!r}.")

    def simulate(rng_key):
        trace = handlers.trace(handlers.seed(model, rng_key)).get_trace(*args, **kwargs)
        sites = {name: site for name, site in trace.items() if site["type"] == "sample"}
        if unknown := set(names) - set(sites):
            raise ValueError(
                f"data names {sorted(unknown)}, but the model samples {sorted(sites)} only: choose "
                "among these."
            )
        if observed := [name for name, site in sites.items() if site["is_observed"]]:
            raise ValueError(
                f"The model observes {observed}: a simulator draws its data. Call it without them "
                "(`y=None`), and without `numpyro.factor`."
            )
        values = {name: site["value"] for name, site in sites.items()}
        seen = {name: values.pop(name) for name in names}
        if not values:
            raise ValueError("All sites of the model are data: leave at least one to infer.")
        return values, seen

    return simulate


def _in_batches(simulation, keys, size, bar) -> Iterator[Tree]:
    """Run batches of one size, the last filled up with keys of the first."""
    run = jax.jit(jax.vmap(simulation))
    for start in range(0, len(keys), size):
        yield jax.device_get(run(keys[(start + np.arange(size)) % len(keys)]))
        bar.update(min(size, len(keys) - start))


def _rank(rng_key, truth, sample):
    """Count the draws below the truth; among equals its place is random."""
    below = jnp.sum(sample < truth, axis=0)
    ties = jnp.sum(sample == truth, axis=0)
    return below + jax.random.randint(rng_key, below.shape, 0, ties + 1)


def _probability_inside(inside: np.ndarray, steps: list[np.ndarray]) -> float:
    """Return the probability that the counts below all thresholds are where `inside` allows.

    Args:
        inside: (thresholds, num + 1), whether a count is allowed; an interval for each threshold.
        steps: the Poisson weights of the counts between thresholds, one more than thresholds.
    """
    num = inside.shape[1] - 1
    reached, first = np.ones(1), 0  # weights of the counts first, first + 1, ..
    for allowed, step in zip(inside, steps, strict=False):
        counts = np.flatnonzero(allowed)
        if not counts.size:
            return 0.0
        low, high = int(counts[0]), int(counts[-1])
        moved = np.convolve(reached, step[: high - first + 1])[: high - first + 1]
        reached, first = moved[max(low - first, 0) :], max(low, first)
    last = steps[-1][num - first - np.arange(len(reached))]
    return float(reached @ last / stats.poisson.pmf(num, num))


def _check_draws(params: Tree, draws: Tree) -> int:
    """Require draws with the tree and the shapes of the parameters, and return their number."""
    if jax.tree.structure(params) != jax.tree.structure(draws):
        raise ValueError(
            f"infer returns the tree {jax.tree.structure(draws)}, but simulate gives params "
            f"{jax.tree.structure(params)}: return the same, each leaf with a first axis of draws."
        )
    leaves = list(zip(_named(params).items(), _named(draws).values(), strict=True))
    if not leaves:
        raise ValueError("params is empty: let simulate return at least one array to infer.")
    num_draws = jnp.shape(leaves[0][1])[0] if jnp.ndim(leaves[0][1]) else 0
    for (name, truth), sample in leaves:
        if num_draws < 1 or jnp.shape(sample) != (num_draws, *jnp.shape(truth)):
            raise ValueError(
                f"The draws of {name!r} have shape {jnp.shape(sample)}, but should have "
                f"(num_draws, *{jnp.shape(truth)}), with one num_draws for all: reshape several "
                "chains into one first axis."
            )
    return num_draws


def _named(tree: Tree) -> dict[str, jax.Array]:
    """Name the leaves of a pytree by their paths."""
    return dict(zip(leaf_names(tree), map(jnp.asarray, jax.tree.leaves(tree)), strict=True))


def check_result(result: Any) -> None:
    """Require ranks, and not draws."""
    if not isinstance(result, RankStatistics):
        raise TypeError(
            "result must be the RankStatistics that simulation_based_calibration returns, got an "
            f"object of type {type(result).__name__}."
        )


def scalars(ranks: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Name each scalar of each quantity, in the order of `np.ravel`."""
    for name, values in ranks.items():
        for index in np.ndindex(values.shape[1:]):
            label = f"{name}[{','.join(map(str, index))}]" if index else name
            yield label, values[(slice(None), *index)]
