"""What mini-batches gain on a real posterior: exact and inexact samplers, by the rows they touch.

    python tests/benchmarks/large_data.py [--fast]

Logistic regression on statsmodels' `fair`, 6366 rows, 9 coefficients of orthonormal covariates,
mini-batches of 100 rows. The reference is NumPyro's NUTS on all rows. No times: `rows` counts the
rows whose likelihood is evaluated, with or without its gradient, in all steps after warm-up; `cost`
counts a row with its gradient as what XLA says that takes beside its value alone. `error` is the
largest error of a posterior mean in posterior standard deviations, and `(MC)` what chance gives,
the reference aside; `sd off by` the largest error of a standard deviation. The least effective
sample size of the coefficients counts. Five minutes of one core; `--fast` is a smoke test
without HMCECS, SGHMC, SGNHT and most step sizes.
"""

import argparse
from functools import partial
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import statsmodels.api as sm
from blackjax.diagnostics import effective_sample_size
from numpyro.infer import HMCECS, MCMC, NUTS

import probbp
from probbp.numpyro import Kernel, subsampled

numpyro.enable_x64()
NUM_ROWS = 100


def fair():
    """Return covariates (6366, 9), made orthonormal, and whether there was an affair."""
    table = sm.datasets.fair.load_pandas().data
    x = table.drop(columns="affairs").to_numpy(float)
    q, _ = np.linalg.qr(np.c_[np.ones(len(x)), (x - x.mean(0)) / x.std(0)])
    return jnp.asarray(np.sqrt(len(x)) * q), jnp.asarray((table["affairs"] > 0).to_numpy(float))


def model(x, y, num_rows=None):
    weights = numpyro.sample("weights", dist.Normal(0, 2.5).expand([x.shape[1]]).to_event(1))
    with numpyro.plate("rows", len(y), subsample_size=num_rows) as index:
        numpyro.sample("y", dist.BernoulliLogits(x[index] @ weights), obs=y[index])


def run_mcmc(kernel, num_steps, *args, extra_fields=(), num_warmup, num_chains=4, **run):
    """Return draws (chains, steps, d), and the mean leapfrogs per step where there are any."""
    method = "sequential" if isinstance(kernel, HMCECS) else "vectorized"
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_steps,
        num_chains=num_chains,
        chain_method=method,
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), *args, extra_fields=extra_fields, **run)
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["weights"])
    leapfrogs = [float(jnp.mean(mcmc.get_extra_fields()[name])) for name in extra_fields]
    return draws, *leapfrogs


def run_sg(step_fn, init_fn, num_steps, num_chains=4):
    """Return draws (chains, steps, d) of a stochastic-gradient sampler, a fifth left out."""

    def one_chain(rng_key):
        key_init, key_steps = jax.random.split(rng_key)

        def body(state, rng_key):
            state = step_fn(rng_key, state)
            return state, getattr(state, "position", state)["weights"]

        return jax.lax.scan(body, init_fn(key_init), jax.random.split(key_steps, num_steps))[1]

    draws = jax.jit(jax.vmap(one_chain))(jax.random.split(jax.random.key(1), num_chains))
    return np.asarray(draws)[:, num_steps // 5 :]


def sg_steps(parts, algorithm, step_size):
    """Return one step: a fresh mini-batch, and the sampler's own."""

    def step_fn(rng_key, state):
        key_draw, key_step = jax.random.split(rng_key)
        return algorithm.step(key_step, state, parts.draw(key_draw), step_size)

    return step_fn


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="a smoke test; its numbers are rough")
    fast = parser.parse_args().fast
    jax.config.update("jax_disable_most_optimizations", fast)
    scale = 1 if fast else 6
    x, y = fair()
    n, num_all = NUM_ROWS, len(y)

    parts = subsampled(jax.random.key(0), model, model_args=(x, y, n))

    def newton(mode, _):
        flat = lambda w: parts.logdensity_fn({"weights": w})
        return mode - jnp.linalg.solve(jax.hessian(flat)(mode), jax.grad(flat)(mode)), None

    mode, _ = jax.jit(lambda w: jax.lax.scan(newton, w, length=20))(jnp.zeros(x.shape[1]))
    mode = {"weights": mode}
    controlled = blackjax.sgmcmc.gradients.control_variates(
        parts.grad_estimator, mode, parts.all_rows
    )

    reference, leapfrogs = run_mcmc(
        NUTS(model), 200 * scale, x, y, extra_fields=("num_steps",), num_warmup=200
    )
    mean, sd = reference.mean((0, 1)), reference.std((0, 1))

    def flops(fun):
        analysis: Any = jax.jit(fun).lower(mode).compile().cost_analysis()
        return analysis["flops"]

    ratio = flops(jax.value_and_grad(parts.logdensity_fn)) / flops(parts.logdensity_fn)
    start = {"weights": jnp.asarray(reference[0, -1])}
    keys = jax.random.split(jax.random.key(5), 500)
    variance = [
        float(jnp.var(jax.vmap(lambda k, g=g: g(start, parts.draw(k))["weights"])(keys), 0).sum())
        for g in (parts.grad_estimator, controlled)
    ]
    print(f"value and gradient of a row cost {ratio:.1f} times its value, in operations")
    print(f"control variates divide a gradient's variance by {variance[0] / variance[1]:.0f}\n")
    for line in (
        "method|exact|rows a step|rows per|ESS per|ESS per|error|(MC)|sd off",
        "|||eff. draw|M rows|M cost|in sd||by",
    ):
        print("{:35} {:6} {:>11} {:>10} {:>8} {:>8} {:>7} {:>6} {:>7}".format(*line.split("|")))

    def report(name, exact, values, grads, draws):
        ess = np.asarray(effective_sample_size(draws)).min()
        error = np.abs((draws.mean((0, 1)) - mean) / sd).max()
        off = np.abs(draws.std((0, 1)) / sd - 1).max()
        num, rows, cost = draws.shape[0] * draws.shape[1], values + grads, values + ratio * grads
        print(
            f"{name:35} {exact:6} {rows:11.0f} {num * rows / ess:10.0f} "
            f"{1e6 * ess / num / rows:8.2f} {1e6 * ess / num / cost:8.2f} "
            f"{error:7.3f} {ess**-0.5:6.3f} {off:7.1%}",
            flush=True,
        )

    num, num_warmup = 700 * scale, 100 if fast else 500
    report("NUTS, all rows (reference)", "yes", 0, leapfrogs * num_all, reference)
    if not fast:
        # Beside the leapfrogs: the new subsample's density, and its block's Taylor terms.
        ecs = HMCECS(NUTS(model), num_blocks=10, proxy=HMCECS.taylor_proxy(mode))
        draws, leapfrogs = run_mcmc(
            ecs, 100 * scale, x, y, n, extra_fields=("hmc_state.num_steps",), num_warmup=200
        )
        report("HMCECS, Taylor proxy", "nearly", n, (leapfrogs + 1) * n, draws)
    draws, *_ = run_mcmc(Kernel(model, probbp.mala), num, x, y, num_warmup=num_warmup)
    report("MALA, all rows", "yes", 0, num_all, draws)
    starts = jax.tree.map(lambda leaf: jnp.tile(leaf, (4, 1)), mode)
    for m in (n,) if fast else (n, 10 * n):
        kernel = Kernel(model, probbp.mala)
        draws, *_ = run_mcmc(kernel, num, x, y, m, num_warmup=num_warmup, init_params=starts)
        report(f"MALA, drift of {m} rows", "yes", num_all, m, draws)
    data = probbp.sample(
        jax.random.key(2),
        partial(probbp.mala, parts.with_gradient(controlled)),
        mode,
        num_warmup=num_warmup,
        num_samples=num,
        dispersion=0.02,
        progress_bar=False,
    )
    draws = data["posterior"]["weights"].values
    report("MALA, control variates", "yes", num_all, 2 * n, draws)

    num = 2000 * scale
    for name, rows, gradient, step_sizes in (
        ("SGLD", n, parts.grad_estimator, (4e-6, 1.6e-5, 6.4e-5)),
        ("SGLD, control variates", 2 * n, controlled, (6.4e-5, 2.5e-4)),
    ):
        for h in step_sizes[:1] if fast else step_sizes:
            draws = run_sg(sg_steps(parts, blackjax.sgld(gradient), h), lambda _: mode, num)
            report(f"{name}, h = {h:.1e}", "no", 0, rows, draws)
    if fast:
        return
    sghmc = blackjax.sghmc(controlled, num_integration_steps=10, alpha=1.0)
    for h in (0.0025, 0.005):
        draws = run_sg(sg_steps(parts, sghmc, h), lambda _: mode, num // 10)
        report(f"SGHMC, control variates, h = {h}", "no", 0, 10 * 2 * n, draws)
    sgnht = blackjax.sgnht(controlled, alpha=10.0)
    for h in (0.003, 0.01):
        draws = run_sg(sg_steps(parts, sgnht, h), partial(sgnht.init, mode), num)
        report(f"SGNHT, control variates, h = {h}", "no", 0, 2 * n, draws)


if __name__ == "__main__":
    main()
