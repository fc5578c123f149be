"""Everything with everything: each pair runs and keeps a law, or is refused in words.

Three tables: estimators in samplers, operations in inference, models in inference. A cell is one of
`LAWS`, or what its refusal says. `python tests/test_matrix.py` writes them into docs/matrix.md.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from scipy import stats
from tables import (
    ESTIMATORS,
    IN_INFERENCE,
    SAMPLERS,
    squares,
    wrong_and_keyed,
    wrong_but_deterministic,
)
from targets import anisotropic
from test_models import MODELS as PLAIN
from test_state_space import MODELS as SERIES
from test_state_space import Y as SERIES_Y
from test_state_space import streaming

import probbp
from probbp.models import growth, snn
from probbp.models.blob import bayesian_lora
from probbp.numpyro import Kernel
from probbp.ops import dendrites

PAGE = Path(__file__).parent.parent / "docs" / "matrix.md"
KEY = jax.random.key(0)
PASS = 4.5  # of a z-score, as in `invariance`

LAWS = {
    "exact": "moments are those of the density, or of the model with JAX's own function",
    "trains": "the loss is that of the model with JAX's own function, and falls",
    "fits": "the loss falls, and predictions are finite",
    "exact, scores": "over the draws derivatives of the log density average to zero, and their "
    "products with the parameters to minus one",
}


class Refused(NamedTuple):
    """A cell that raises `error`, whose message holds `words`; the page says `reason`."""

    reason: str
    error: type[Exception]
    words: str


def cells(table, is_refused):
    """Return the parameters of the tests: row, column, and the refusal where there is one."""
    return [
        pytest.param(row, column, *([cell] if is_refused else []), id=f"{row}-{column}")
        for row, columns in table.items()
        for column, cell in columns.items()
        if isinstance(cell, Refused) == is_refused
    ]


def z_of_means(draws, truth):
    """Return z-scores of (chains, draws, n) against (n,), with errors from the chains' means.

    Few chains make Student's statistic of it: the z-score is the normal one that is as rare.
    """
    means = np.asarray(draws).mean(1)
    t = (means.mean(0) - truth) / (means.std(0, ddof=1) / len(means) ** 0.5)
    return np.sign(t) * stats.norm.isf(stats.t.sf(abs(t), len(means) - 1))


def moments(x):
    """Return the entries of (..., d) and their products, one of each pair."""
    i, j = np.triu_indices(x.shape[-1])
    return jnp.concatenate([x, x[..., i] * x[..., j]], -1)


# ---------------------------------------------------------------------------------------
# Estimators in samplers. Unit tangents and a scale change the step size alone, batches nothing.

SAME = ("unit", "scaled", "batches")
FIELDS = {
    name: member.estimator
    for name, member in ESTIMATORS.items()
    if not any(word in name for word in SAME)
}
FIELDS |= {"wrong": wrong_but_deterministic, "wrong, keyed": wrong_and_keyed}
WITH_ESTIMATOR = {
    f"mala, {policy}": partial(probbp.mala, key_policy=policy)
    for policy in ("carried", "refreshed", "shared")
} | {name: member.algorithm for name, member in SAMPLERS.items() if name != "mala"}
OWN_ESTIMATE = Refused(
    "the sampler makes its own gradient, along its tangents", TypeError, "takes an estimator"
)
ESTIMATOR_BY_SAMPLER = {
    field: {name: "exact" if "mala, " in name else OWN_ESTIMATE for name in WITH_ESTIMATOR}
    for field in FIELDS
}
TARGET = anisotropic(6, condition=6.0)


def tree(x):
    return {"a": x[:2], "b": x[2:]}


def logdensity_fn(position):
    return TARGET.logdensity_fn(jnp.concatenate(list(position.values())))


@pytest.mark.slow
@pytest.mark.parametrize(("field", "sampler"), cells(ESTIMATOR_BY_SAMPLER, False))
def test_an_estimator_in_a_sampler(field, sampler):
    """From exact draws, in a pytree: mean and covariance of a correlated Gaussian stay."""
    algorithm = WITH_ESTIMATOR[sampler](logdensity_fn, 0.3, estimator=FIELDS[field])

    @jax.jit
    @jax.vmap
    def chain(key, start):
        def step(state, key):
            state, _ = algorithm.step(key, state)
            return state, jnp.concatenate([state.position["a"], state.position["b"]])

        state = algorithm.init(tree(start), key)
        return jax.lax.scan(step, state, jax.random.split(key, 100))[1]

    truth = np.concatenate([TARGET.mean, TARGET.covariance[np.triu_indices(6)]])
    num_chains = 500
    starts = TARGET.draw(jax.random.key(2), num_chains)
    z = z_of_means(moments(chain(jax.random.split(KEY, num_chains), starts)), truth)
    assert np.all(abs(z) < PASS)


@pytest.mark.parametrize(("field", "sampler", "cell"), cells(ESTIMATOR_BY_SAMPLER, True))
def test_an_estimator_is_refused(field, sampler, cell):
    with pytest.raises(cell.error, match=cell.words):
        WITH_ESTIMATOR[sampler](logdensity_fn, 0.15, estimator=FIELDS[field])


# ---------------------------------------------------------------------------------------
# Operations in inference: two parameters each, and JAX's own function beside it.

# Step sizes fit for the parameters of all operations at once.
HOSTS = {
    "NUTS": partial(NUTS, step_size=0.3, adapt_step_size=False, adapt_mass_matrix=False),
    "mala": partial(Kernel, algorithm=probbp.mala, step_size=0.1, metric=None),
    "fmala": partial(Kernel, algorithm=probbp.fmala, step_size=0.1, metric=None),
    "pc_line_fmala": partial(Kernel, algorithm=probbp.pc_line_fmala, step_size=1.0, metric=None),
}
NUM_STEPS = {"NUTS": 60, "mala": 400, "fmala": 1500, "pc_line_fmala": 800}
NO_OUTPUTS = Refused("forward mode only", TypeError, "Put the running loss in the carry")
NO_SECOND = "first derivatives only"
OP_BY_HOST: dict[str, dict[str, Any]] = {
    op: {"SVI": "trains"} | dict.fromkeys(HOSTS, "exact") for op in IN_INFERENCE
}
OP_BY_HOST["rtrl.scan, outputs"] |= dict.fromkeys(("SVI", "NUTS", "mala"), NO_OUTPUTS)
OP_BY_HOST["sus.dot_product_attention"]["pc_line_fmala"] = Refused(
    NO_SECOND, TypeError, "Use keep=None where second derivatives"
)
OP_BY_HOST["feedback.direct"]["pc_line_fmala"] = Refused(
    NO_SECOND, TypeError, "Use feedback.through where second derivatives"
)


def of_ops(names, is_plain=False):
    """One posterior for each operation, side by side."""
    for name in names:
        x = numpyro.sample(name, dist.Normal(0, 1).expand([2]).to_event(1))
        key, (op, plain) = numpyro.prng_key(), IN_INFERENCE[name]
        numpyro.factor(f"{name}, seen", -squares(plain(x) if is_plain else op(x, key)) / 2)


def truths():
    """Return mean and second moments of each posterior with JAX's own function, on a grid."""
    axis = jnp.linspace(-5, 5, 401)
    grid = jnp.stack(jnp.meshgrid(axis, axis), -1).reshape(-1, 2)

    @jax.jit
    def integrate(grid):
        def mean(plain):
            log_weights = jax.vmap(lambda x: -squares(plain(x)) / 2 - x @ x / 2)(grid)
            return jax.nn.softmax(log_weights) @ moments(grid)

        return {name: mean(plain) for name, (_, plain) in IN_INFERENCE.items()}

    return integrate(grid)


def draws(host):
    """Return draws of all operations' posteriors: one program, without any adaptation."""
    names = [op for op in IN_INFERENCE if OP_BY_HOST[op][host] == "exact"]
    steps = {"num_warmup": 0, "num_samples": NUM_STEPS[host], "num_chains": 50}
    kernel = HOSTS[host](partial(of_ops, names))
    mcmc = MCMC(kernel, chain_method="vectorized", progress_bar=False, **steps)
    mcmc.run(KEY)
    samples = mcmc.get_samples(group_by_chain=True)
    return {name: samples[name] for name in names}


def trained():
    """Return losses of each operation, and of JAX's own function, before and after training."""
    names = [op for op in IN_INFERENCE if OP_BY_HOST[op]["SVI"] == "trains"]
    guide = AutoNormal(partial(of_ops, names))
    svi = SVI(partial(of_ops, names), guide, optax.adam(0.03), Trace_ELBO())

    def losses(params, key, is_plain):
        """Return the terms of the ELBO that are each operation's own."""
        seeded = numpyro.handlers.seed(numpyro.handlers.substitute(guide, params), key)
        q = numpyro.handlers.trace(seeded).get_trace()
        model = numpyro.handlers.seed(partial(of_ops, names, is_plain), key)
        p = numpyro.handlers.trace(numpyro.handlers.replay(model, q)).get_trace()

        def log_prob(site):
            return jnp.sum(site["fn"].log_prob(site["value"]))

        return {n: log_prob(q[n]) - log_prob(p[n]) - log_prob(p[f"{n}, seen"]) for n in names}

    @jax.jit  # with the guide's start, which would take its time outside
    def run(key):
        start = svi.init(key)
        end, _ = jax.lax.scan(lambda state, _: svi.update(state), start, length=300)
        keys = jax.random.split(key, 200)
        return [
            jax.vmap(partial(losses, svi.get_params(state), is_plain=is_plain))(keys)
            for state in (start, end)
            for is_plain in (False, True)
        ]

    results = run(KEY)
    return {name: [losses[name] for losses in results] for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("host", ["SVI", *HOSTS])
def test_operations_in_inference(host):
    """All of them in one program, which would be compiled for each worker of the tests."""
    if host == "SVI":
        for op, (first, first_plain, last, last_plain) in trained().items():
            np.testing.assert_allclose(first, first_plain, rtol=1e-5, err_msg=op)
            np.testing.assert_allclose(last, last_plain, rtol=1e-5, err_msg=op)
            fall = first - last
            assert fall.mean() > PASS * fall.std() / len(fall) ** 0.5, op
        return
    truth = truths()
    for op, late in draws(host).items():
        z = z_of_means(moments(late[:, NUM_STEPS[host] // 2 :]), truth[op])
        assert np.all(abs(z) < PASS), op


@pytest.mark.parametrize(("op", "host", "cell"), cells(OP_BY_HOST, True))
def test_an_operation_is_refused(op, host, cell):
    model = partial(of_ops, [op])
    if host == "SVI":
        svi = SVI(model, AutoNormal(model), optax.adam(0.03), Trace_ELBO())
        run = partial(svi.run, KEY, 1, progress_bar=False)
    else:
        mcmc = MCMC(HOSTS[host](model), num_warmup=0, num_samples=1, progress_bar=False)
        run = partial(mcmc.run, KEY)
    with pytest.raises(cell.error, match=cell.words):
        run()


# ---------------------------------------------------------------------------------------
# Models in inference. What other files compute on import is imported where it is needed.


class Model(NamedTuple):
    """A model with its guide (`None`: NumPyro's `AutoNormal`), arguments and labels."""

    model: Any
    args: tuple
    y: Any = None
    guide: Any = None


def labelled(name):
    model, inputs = PLAIN[name]
    y = Predictive(model, num_samples=1)(jax.random.key(1), *inputs)["y"][0]
    return Model(model, inputs, y)


def series(name):
    model, options, _ = SERIES[name]
    return Model(partial(model, **options), (jnp.asarray(SERIES_Y),))


def spiking():
    from test_snn import LABELS, NETWORK, X

    model = partial(snn.model, network=NETWORK, num_steps=3, temperature=0.2)
    return Model(model, (X,), LABELS, snn.guide(model, NETWORK))


def adapted():
    base = {"w": jnp.zeros((3, 2))}
    inputs = jax.random.normal(KEY, (30, 3))
    lora = bayesian_lora(
        lambda base, x: x @ base["w"], base, target="w", example=(inputs,), rank=1, prior_scale=1.0
    )
    return Model(lora.model, (base, inputs), (inputs[:, 0] > 0).astype(int), lora.guide)


def with_branches():
    from test_growth import bayesian

    kernel = jnp.ones((2, 2))
    candidate = dendrites.Candidate(kernel, jnp.zeros(2), jnp.zeros((0, 2)))
    branches = dendrites.grow(dendrites.empty(kernel), candidate)
    inputs = jax.random.normal(KEY, (30, 2))
    model = growth.with_dendrites(bayesian, {"out": branches})
    return Model(model, (inputs,), inputs + jnp.tanh(inputs))


def physical():
    from test_physics_vae import C, X, Y, usual

    vae = usual()
    return Model(vae.model, (X, C, Y), guide=vae.guide)


def diffused():
    from test_diffusion import model

    return Model(partial(model, keep_step="all"), ())


MODELS = {
    "hierarchical": lambda: labelled("hierarchical, non-centred"),
    "bnn": lambda: labelled("bnn"),
    "bnn, classifier": lambda: labelled("bnn, classifier"),
    "state_space.garch": lambda: series("garch"),
    "state_space.local_linear_trend": lambda: series("local_linear_trend"),
    "state_space.hidden_markov": lambda: series("hidden_markov"),
    "state_space.pendulum": lambda: series("pendulum"),
    "state_space.streamed": lambda: Model(streaming, (jnp.asarray(SERIES_Y), 60)),
    "snn": spiking,
    "blob": adapted,
    "physics_vae": physical,
    "diffusion.prior": diffused,
    "growth.with_dendrites": with_branches,
}
NOT_RUN = {
    "state_space.pendulum": "chains stay in one of its modes",
    "state_space.streamed": "keeps a state from one stretch to the next",
    "snn": "its gradient is no derivative",
    "blob": "B is a parameter, not drawn",
    "physics_vae": "decoders are parameters, not drawn",
}
DRAWN = [name for name in MODELS if name not in NOT_RUN]
MODEL_BY_INFERENCE: dict[str, dict[str, Any]] = {
    name: {
        "SVI": "fits",
        "NUTS": f"not run: {NOT_RUN[name]}" if name in NOT_RUN else "exact, scores",
    }
    for name in MODELS
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_svi(name):
    model, args, y, guide = MODELS[name]()
    labels = {} if y is None else {"y": y}
    guide = AutoNormal(model) if guide is None else guide
    svi = SVI(model, guide, optax.adam(0.02), Trace_ELBO())

    @jax.jit  # with the guide's start and the predictions, which would take their time outside
    def run(key):
        state = svi.init(key, *args, **labels)
        state, losses = jax.lax.scan(
            lambda state, _: svi.update(state, *args, **labels), state, length=300
        )
        params = svi.get_params(state) | (state.mutable_state or {})
        return losses, Predictive(model, guide=guide, params=params, num_samples=3)(key, *args)

    losses, predicted = run(KEY)
    assert losses[-50:].mean() < losses[:10].mean()
    assert all(jnp.all(jnp.isfinite(site)) for site in predicted.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_a_model_under_nuts(name):
    model, args, y, _ = MODELS[name]()
    mcmc = MCMC(
        NUTS(model, max_tree_depth=4),
        num_warmup=150,
        num_samples=400,
        num_chains=20,
        chain_method="vectorized",
        postprocess_fn=lambda z: z,  # where the chain moves, without constraints
        progress_bar=False,
    )
    labels = {} if y is None else {"y": y}
    mcmc.run(KEY, *args, **labels, extra_fields=("z_grad",))
    position = mcmc.get_samples(group_by_chain=True)
    grads = mcmc.get_extra_fields(group_by_chain=True)["z_grad"]
    x, scores = (
        jnp.concatenate(
            [tree[site].reshape(*tree[site].shape[:2], -1) for site in sorted(grads)], -1
        )
        for tree in (position, grads)
    )
    assert np.all(abs(z_of_means(scores, 0.0)) < PASS)
    products = x * scores
    assert np.all(abs(z_of_means(products, 1.0)) < PASS)
    # Chains that stood still would know neither; these know the second well.
    assert np.all(np.asarray(products).mean(1).std(0) / len(x) ** 0.5 < 0.5)


# ---------------------------------------------------------------------------------------
# The page.

TABLES = {
    "estimator": ESTIMATOR_BY_SAMPLER,
    "operation": OP_BY_HOST,
    "model": MODEL_BY_INFERENCE,
}


def page(text):
    """Return the page with the tables between its markers, and reasons below them by number."""
    before, rest = text.split("<!-- matrix -->")
    _, after = rest.split("<!-- /matrix -->")
    reasons: dict[str, int] = {}
    parts = []
    for corner, table in TABLES.items():
        columns = list(next(iter(table.values())))
        rows = [[corner, *columns], ["---"] * (len(columns) + 1)]
        for row, by_column in table.items():
            said = []
            for cell in by_column.values():
                word, _, reason = (
                    ("refused", "", cell.reason)
                    if isinstance(cell, Refused)
                    else cell.partition(": ")
                )
                number = reasons.setdefault(reason, len(reasons) + 1) if reason else ""
                said.append(f"{word} [{number}]" if reason else word)
            rows.append([row, *said])
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    laws = "\n".join(f"- *{law}*: {words}." for law, words in LAWS.items())
    why = "\n".join(f"- [{number}] {reason}." for reason, number in reasons.items())
    tables = "\n\n".join([*parts, f"{laws}\n{why}"])
    return f"{before}<!-- matrix -->\n\n{tables}\n\n<!-- /matrix -->{after}"


def test_the_page_has_the_tables():
    assert PAGE.read_text() == page(PAGE.read_text()), "run python tests/test_matrix.py"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
