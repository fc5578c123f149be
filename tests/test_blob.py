"""Bayesian low-rank adaptation: any network, three noises, two objectives, prediction, files."""

import sys
from functools import cache, partial

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
import scipy.special
from cheap import compiled, fitted, key_of, like, normal
from flax import nnx
from numpyro.handlers import block, replay, seed, substitute, trace
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO

from probbp.models import blob, lora, transformer
from probbp.models.blob import bayesian_lora
from probbp.models.blob.model import _each_example
from probbp.models.lora import Factors

KEY = key_of(0)
WIDTH, CLASSES, TIME = 4, 3, 5
X = normal(1, 3, TIME, WIDTH)


@cache
def linen():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + nn.MultiHeadDotProductAttention(2)(x, x)
            return nn.Dense(CLASSES)(nn.LayerNorm()(x)).mean(1)

    network = Network()
    return network.apply, like(jax.eval_shape(network.init, KEY, X))


@cache
def flax_nnx():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(2, WIDTH, rngs=rngs, decode=False)
            self.out = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

        def __call__(self, x):
            return self.out(x + self.attention(x)).mean(1)

    graph, state = nnx.split(nnx.eval_shape(lambda: Network(nnx.Rngs(0))))
    return lambda state, x: nnx.merge(graph, state)(x), like(state)


@cache
def equinox():
    class Network(eqx.Module):
        attention: eqx.nn.MultiheadAttention
        mlp: eqx.nn.MLP

        def __call__(self, x):
            return jax.vmap(self.mlp)(x + self.attention(x, x, x)).mean(0)

    def make():
        attention = eqx.nn.MultiheadAttention(2, WIDTH, key=KEY)
        return Network(attention, eqx.nn.MLP(WIDTH, CLASSES, 6, 1, key=KEY))

    is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    shapes, rest = eqx.partition(eqx.filter_eval_shape(make), is_shape)
    return lambda arrays, x: jax.vmap(eqx.combine(arrays, rest))(x), like(shapes)


def out_in(remat=False):
    """One dictionary, and weights (out, in) as in PyTorch."""

    def layer(params, x):
        query, key, value = (x @ params[f"{name}_proj.weight"].T for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", query, key))
        return x + jnp.einsum("bts,bsd->btd", weights, value)

    def apply(params, x):
        hidden = (jax.checkpoint(layer) if remat else layer)(params, x)
        return (hidden @ params["lm_head.weight"].T).mean(1)

    params = {f"{name}_proj.weight": normal(i, WIDTH, WIDTH) for i, name in enumerate("qkv")}
    return apply, params | {"lm_head.weight": normal(3, CLASSES, WIDTH)}


def scanned():
    """Two layers, stacked."""

    def apply(params, x):
        def layer(hidden, params):
            return hidden + jnp.tanh(hidden @ params["up"].T) @ params["down"], None

        return jax.lax.scan(layer, x, params)[0].mean(1)[:, :CLASSES]

    return apply, {"up": normal(0, 2, 6, WIDTH), "down": normal(1, 2, 6, WIDTH)}


def branches():
    """A stack under `vmap`, a `cond`, a `while_loop`."""

    def apply(params, x):
        heads = jax.vmap(lambda w: jnp.tanh(x @ w), in_axes=2, out_axes=-1)(params["stack"]).sum(-1)
        hidden = jax.lax.cond(
            x.shape[1] > 2, lambda w: heads @ w, lambda w: heads, params["branch"]
        )
        _, hidden = jax.lax.while_loop(
            lambda carry: carry[0] < 2,
            lambda carry: (carry[0] + 1, jnp.tanh(carry[1] @ params["loop"].T)),
            (0, hidden),
        )
        return hidden.mean(1)[:, :CLASSES]

    params = {"stack": normal(0, WIDTH, WIDTH, 2)}
    return apply, params | {name: normal(1, WIDTH, WIDTH) for name in ("branch", "loop")}


# name -> (a constructor, the weights' names and roles)
NETWORKS = {
    "linen": (
        linen,
        r"kernel$",
        {
            "params.Dense_0.kernel": "io",
            "params.MultiHeadDotProductAttention_0.key.kernel": "ioo",
            "params.MultiHeadDotProductAttention_0.out.kernel": "iio",
            "params.MultiHeadDotProductAttention_0.query.kernel": "ioo",
            "params.MultiHeadDotProductAttention_0.value.kernel": "ioo",
        },
    ),
    "nnx": (
        flax_nnx,
        r"(query|value|out)\.kernel$",
        {
            "attention.out.kernel": "iio",
            "attention.query.kernel": "ioo",
            "attention.value.kernel": "ioo",
            "out.kernel": "io",
        },
    ),
    "equinox": (
        equinox,
        r"(query_proj|value_proj|layers\.\d)\.weight",
        {
            "attention.query_proj.weight": "oi",
            "attention.value_proj.weight": "oi",
            "mlp.layers.0.weight": "oi",
            "mlp.layers.1.weight": "oi",
        },
    ),
    "out-in": (
        out_in,
        r"(q_proj|v_proj|lm_head)\.weight",
        {"lm_head.weight": "oi", "q_proj.weight": "oi", "v_proj.weight": "oi"},
    ),
    "out-in, checkpoint": (partial(out_in, remat=True), "v_proj", {"v_proj.weight": "oi"}),
    "scan": (scanned, "", {"down": "bio", "up": "boi"}),
    "vmap, cond, while": (branches, "stack|branch", {"branch": "io", "stack": "ioo"}),
    "vmap, cond, while: loop": (branches, "loop", {"loop": "oi"}),
    "transformer": (
        lambda: (
            transformer.apply,
            like(
                jax.eval_shape(
                    partial(
                        transformer.init,
                        num_classes=CLASSES,
                        max_length=TIME,
                        num_features=WIDTH,
                        width=8,
                        num_layers=1,
                    ),
                    KEY,
                )
            ),
        ),
        r"(query|value|head)\.kernel",
        {
            "head.kernel": "io",
            "layers.0.attention.query.kernel": "io",
            "layers.0.attention.value.kernel": "io",
        },
    ),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def build(name, precision=jnp.float64, **options):
    constructor, target, _ = NETWORKS[name]
    apply_fn, base = constructor()
    base = jax.tree.map(lambda leaf: np.asarray(leaf, precision), base)
    x = X.astype(precision)
    options = {"rank": 2, "init_std": 0.1} | options
    return bayesian_lora(apply_fn, base, target=target, example=(x,), **options), apply_fn, base, x


def draw_params(bayes, seed=7):
    """Return parameters as after a fit: B is not zero."""
    params = {}
    for i, (name, layout) in enumerate(bayes.layouts.items()):
        a, b = layout.shape_of_a(bayes.rank), layout.shape_of_b(bayes.rank)
        dtype = bayes.dtypes[name]
        params[f"{name}_loc"] = normal(seed + i, *a).astype(dtype)
        params[f"{name}_g"] = (0.5 + 0.1 * normal(seed + 100 + i, *a)).astype(dtype)
        params[f"{name}_B"] = normal(seed + 200 + i, *b).astype(dtype)
    return params


def run(bayes, params, base, x, *, eager=False, **options):
    """Return the sites of guide and model for one draw of A."""

    def values(params, base, x):
        guide = trace(seed(substitute(bayes.guide, params), 1)).get_trace(base, x, **options)
        model = seed(substitute(replay(bayes.model, guide), params), 2)
        sites = trace(model).get_trace(base, x, **options)
        return {name: site["value"] for name, site in sites.items() if site["type"] != "plate"}

    return (values if eager else compiled(values))(params, base, x)


@every_network
def test_layouts_are_found(name):
    constructor, target, roles = NETWORKS[name]
    apply_fn, base = constructor()
    shapes = jax.eval_shape(lambda: base)
    example = jax.ShapeDtypeStruct(X.shape, X.dtype)
    for params, x in ((base, X), (shapes, example)):
        found = lora.layouts(apply_fn, params, target, (x,))
        assert {name: layout.roles for name, layout in found.items()} == roles
    leaves = lora.named_leaves(base)
    assert all(layout.shape == leaves[name].shape for name, layout in found.items())


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [(name, jnp.float32, 1e-5) for name in NETWORKS]
    + [(name, jnp.float64, 1e-11) for name in ("out-in",)],
)
def test_signs_per_example_equal_dense_weights_per_example(name, dtype, tolerance):
    """W_j = W + s B (M + (A - M) o t_j s_j^T), one network after the other."""
    bayes, apply_fn, base, x = build(name, dtype)
    factors = {}
    for i, (weight, layout) in enumerate(bayes.layouts.items()):
        a, b = layout.shape_of_a(2), layout.shape_of_b(2)
        factors[weight] = Factors(
            a=(0.3 * normal(i, *a)).astype(dtype),
            b=(0.3 * normal(i + 10, *b)).astype(dtype),
            delta=(0.3 * normal(i + 20, *a)).astype(dtype),
            in_signs=np.sign(normal(i + 30, 3, *a[:-2], a[-1])).astype(dtype),
            out_signs=np.sign(normal(i + 40, 3, *a[:-1])).astype(dtype),
        )
    axes = dict.fromkeys(factors, Factors(None, None, None, 0, 0))
    got = compiled(partial(_each_example, bayes.apply, axes=axes, inputs=(x,)))(base, factors)
    leaves = lora.named_leaves(base)
    structure = jax.tree.structure(base)
    network = compiled(apply_fn)
    for j in range(3):
        dense = dict(leaves)
        for weight, (a, b, delta, in_signs, out_signs) in factors.items():
            layout = bayes.layouts[weight]
            a_j = a + delta * np.einsum("...r,...n->...rn", out_signs[j], in_signs[j])
            update = np.einsum("...or,...ri->...oi", b, a_j) * bayes.scale
            # Written out for each arrangement that the table has.
            if layout.roles in ("io", "bio"):
                update = np.swapaxes(update, -1, -2)
            elif layout.roles in ("ioo", "iio"):
                update = update.T
            dense[weight] = leaves[weight] + update.reshape(layout.shape)
        want = network(jax.tree.unflatten(structure, dense.values()), x[j : j + 1])[0]
        np.testing.assert_allclose(got[j], want, rtol=tolerance, atol=tolerance)
        assert np.max(abs(want - network(base, x[j : j + 1])[0])) > 1e-2
    assert got.dtype == dtype


def without_update(name):
    bayes, apply_fn, base, x = build(name)
    params = draw_params(bayes)
    params = {k: 0 * leaf if k.endswith("_B") else leaf for k, leaf in params.items()}
    return bayes, params, apply_fn, base, x


same_networks = pytest.mark.parametrize("name", ["nnx", "out-in", "out-in, checkpoint", "scan"])


@same_networks
def test_the_network_is_itself_where_b_is_zero(name):
    bayes, params, apply_fn, base, x = without_update(name)
    network = compiled(apply_fn)(base, x)
    for noise in ("shared", "flipout") if name == "out-in" else ("shared",):
        logits = run(bayes, params, base, x, noise=noise)["logits"]
        np.testing.assert_allclose(logits, network, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.optimised  # without, a loop and its parts round apart
@same_networks
def test_it_is_so_to_the_bit(name):
    bayes, params, apply_fn, base, x = without_update(name)
    shared = run(bayes, params, base, x, noise="shared", eager=True)["logits"]
    np.testing.assert_array_equal(shared, apply_fn(base, x))


@pytest.mark.parametrize(("name", "noise"), [("out-in, checkpoint", "flipout"), ("scan", "shared")])
def test_forward_and_reverse_mode_agree(name, noise):
    bayes, _, base, x = build(name)
    params = draw_params(bayes)
    options = {"y": jnp.array([0, 1, 2]), "noise": noise}

    def loss(params):
        return TraceMeanField_ELBO().loss(KEY, params, bayes.model, bayes.guide, base, x, **options)

    @compiled
    def both(params):
        tangent = jax.tree.map(jnp.ones_like, params)
        return jax.jvp(loss, (params,), (tangent,))[1], jax.grad(loss)(params)

    slope, grad = both(params)
    np.testing.assert_allclose(slope, sum(leaf.sum() for leaf in grad.values()), rtol=1e-5)
    assert all(np.any(leaf != 0) for leaf in grad.values())


def mean_and_merged(bayes, params, apply_fn, base, x):
    """Return what the posterior's mean predicts, and the network with the weights merged."""

    @compiled
    def both(params, base, x):
        mean = blob.predict(bayes, KEY, params, base, x, num_samples=0)
        return mean[0], apply_fn(blob.merge(bayes, params, base), x)

    return both(params, base, x)


def test_a_loop_is_traced_anew_for_another_rank():
    for rank in (1, 2):
        bayes, apply_fn, base, x = build("scan", rank=rank)
        np.testing.assert_allclose(*mean_and_merged(bayes, draw_params(bayes), apply_fn, base, x))


# --- noise, in the simplest network: logits = mean over time of tanh(x W) H


def pooled(base, x):
    return jnp.tanh(x @ base["w"]).mean(1) @ base["head"]


BASE = {"w": normal(5, WIDTH, 6) / 2, "head": 2 * normal(6, 6, CLASSES)}
# Features have a mean, and so errors a direction that examples and tokens share.
MANY = 0.7 + 0.5 * normal(8, 12, TIME, WIDTH)
LOGITS = np.tanh(MANY @ BASE["w"]).mean(1) @ BASE["head"]
LABELS = np.argmax(LOGITS + normal(9, 12, CLASSES), -1)


def simple(**options):
    options = {"rank": 2, "alpha": 2.0} | options
    bayes = bayesian_lora(pooled, BASE, target="^w$", example=(MANY,), **options)
    params = draw_params(bayes)
    return bayes, params | {"w_loc": 0.3 * params["w_loc"]}


def elbo(bayes, params, key=KEY, *, objective=TraceMeanField_ELBO, base=BASE, **options):
    return objective().loss(
        key, params, bayes.model, bayes.guide, base, MANY, **({"y": LABELS} | options)
    )


def test_flipout_flips_the_deviation_of_the_draw():
    """What an input reads of A has the draw's size, and a sign an example, not a token."""
    bayes = bayesian_lora(
        lambda base, x: x @ base["w"],
        {"w": np.zeros((WIDTH, 1))},
        target="w",
        example=(np.ones((1, 2, WIDTH)),),
        rank=1,
        alpha=1.0,
        likelihood=lambda out: dist.Normal(out, 1.0).to_event(2),
    )
    params = draw_params(bayes) | {"w_B": np.ones((1, 1))}
    x = np.tile(np.eye(WIDTH)[1], (40, 2, 1))  # both tokens read entry 1
    sites = run(bayes, params, x=x, base={"w": np.zeros((WIDTH, 1))})
    deviation = sites["logits"][..., 0] - params["w_loc"][0, 1]
    drawn = sites["w_A"][0, 1] - params["w_loc"][0, 1]
    np.testing.assert_allclose(abs(deviation), abs(drawn) * np.ones((40, 2)), rtol=1e-9)
    np.testing.assert_array_equal(deviation[:, 0], deviation[:, 1])
    assert 5 < np.sum(deviation[:, 0] > 0) < 35


@pytest.fixture(scope="module")
def estimates():
    """Return losses and gradients over keys for each noise, without the divergence."""
    bayes, params = simple(prior_scale=1.0)

    def of(noise):
        loss = partial(elbo, bayes, noise=noise, kl_weight=0.0)
        value_and_grad = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0))
        return compiled(lambda p, k: value_and_grad(p, jax.random.split(k, 2_000)))(params, KEY)

    return {noise: of(noise) for noise in ("shared", "flipout", "independent")}


@pytest.mark.parametrize("noise", ["flipout", "independent"])
def test_the_noises_have_one_mean_and_fewer_errors_where_examples_differ(estimates, noise):
    (losses, grads), (other_losses, other_grads) = estimates["shared"], estimates[noise]
    for shared, other in [(losses, other_losses)] + [(grads[k], other_grads[k]) for k in grads]:
        error = np.sqrt((shared.var(0) + other.var(0)) / len(losses))
        assert np.all(abs(shared.mean(0) - other.mean(0)) < 4.5 * error)
    for name in grads:
        assert other_grads[name].var(0).sum() < 0.7 * grads[name].var(0).sum()


def test_signs_per_token_are_biased(estimates):
    """They average out within an example: the loss is that of a smoother network."""
    bayes, params = simple(prior_scale=1.0)
    loc, g, b = (params[f"w_{part}"] for part in ("loc", "g", "B"))

    def loss_per_token(key):
        key_noise, key_in, key_out = jax.random.split(key, 3)
        delta = g**2 * jax.random.normal(key_noise, loc.shape)
        s = jax.random.rademacher(key_in, MANY.shape)
        t = jax.random.rademacher(key_out, (*MANY.shape[:2], 2))
        inner = MANY @ loc.T + ((MANY * s) @ delta.T) * t
        hidden = jnp.tanh(MANY @ BASE["w"] + bayes.scale * inner @ b.T)
        logits = hidden.mean(1) @ BASE["head"]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), LABELS[:, None], 1).sum()

    per_token = compiled(lambda k: jax.vmap(loss_per_token)(jax.random.split(k, 2_000)))(KEY)
    for losses, _ in estimates.values():
        error = np.sqrt((per_token.var() + losses.var()) / len(losses))
        assert per_token.mean() < losses.mean() - 4 * error


def test_the_noises_meet_as_the_posterior_narrows():
    bayes, params = simple()
    params = params | {"w_g": 1e-6 * params["w_g"]}
    noises = ("shared", "flipout", "independent")
    values = compiled(lambda p: [elbo(bayes, p, noise=noise) for noise in noises])(params)
    np.testing.assert_allclose(values, values[0], rtol=1e-7)


# --- the objective


def test_divergence_is_the_closed_form():
    bayes, params = simple(prior_scale=0.3)
    mean, std = params["w_loc"], params["w_g"] ** 2
    by_hand = np.sum(np.log(0.3 / std) + (std**2 + mean**2) / (2 * 0.3**2) - 0.5)
    loss = TraceMeanField_ELBO(sum_sites=False).loss

    @compiled
    def both(p):
        parts = loss(KEY, p, bayes.model, bayes.guide, BASE, MANY, y=LABELS)
        return blob.kl(bayes, p)["w"], parts

    ours, parts = both(params)
    np.testing.assert_allclose(ours, by_hand, rtol=1e-12)
    np.testing.assert_allclose(abs(parts["w_A"]), by_hand, rtol=1e-12)


def test_divergence_is_that_of_the_whole_weight():
    """Theorems 3.1 and 3.2, on the subspace where both Gaussians live."""
    bayes, params = simple(prior_scale=0.3)
    b = bayes.scale * np.kron(np.eye(WIDTH), np.asarray(params["w_B"]))  # columns stacked
    mean = b @ np.asarray(params["w_loc"]).T.ravel()
    covariance = b @ np.diag(np.asarray(params["w_g"]).T.ravel() ** 4) @ b.T
    prior = 0.3**2 * b @ b.T
    basis = np.linalg.qr(b)[0]
    mean, covariance, prior = basis.T @ mean, basis.T @ covariance @ basis, basis.T @ prior @ basis
    inverse = np.linalg.inv(prior)
    by_hand = 0.5 * (
        np.trace(inverse @ covariance)
        + mean @ inverse @ mean
        - len(mean)
        + np.linalg.slogdet(prior)[1]
        - np.linalg.slogdet(covariance)[1]
    )
    ours = compiled(partial(blob.kl, bayes))(params)["w"]
    np.testing.assert_allclose(ours, by_hand, rtol=1e-9)


@pytest.mark.parametrize("noise", ["shared", "flipout", "independent"])
def test_prior_scale_is_a_gauge(noise):
    _, params = simple()

    def value(params, c):
        scaled = {
            "w_loc": c * params["w_loc"],
            "w_g": c**0.5 * params["w_g"],
            "w_B": params["w_B"] / c,
        }
        return elbo(simple(prior_scale=0.2 * c)[0], scaled, noise=noise)

    values = compiled(lambda p: [value(p, c) for c in (1.0, 0.1, 7.0)])(params)
    np.testing.assert_allclose(values, values[0], rtol=1e-12)


def test_the_objective_s_weights():
    bayes, params = simple()

    @compiled
    def values(params, n, w):
        return {
            "divergence": blob.kl(bayes, params)["w"],
            "loss": elbo(bayes, params),
            "a tenth": elbo(bayes, params, kl_weight=0.1),
            "none": elbo(bayes, params, kl_weight=0.0),
            "of 600": elbo(bayes, params, num_data=600),
            "traced": elbo(bayes, params, num_data=n, kl_weight=w),
        }

    found = values(params, 600, 0.1)
    divergence = found["divergence"]
    nll = found["loss"] - divergence
    np.testing.assert_allclose(found["a tenth"], nll + 0.1 * divergence)
    np.testing.assert_allclose(found["none"], nll)
    np.testing.assert_allclose(found["of 600"], 50 * nll + divergence)
    np.testing.assert_allclose(found["traced"], 50 * nll + 0.1 * divergence)


def test_a_one_sample_elbo_has_the_same_mean():
    bayes, params = simple(prior_scale=1.0)
    options = {"noise": "shared", "kl_weight": 0.3}

    @compiled
    def both(rng_key):
        return [
            jax.vmap(partial(elbo, bayes, params, objective=objective, **options))(
                jax.random.split(rng_key, 2_000)
            )
            for objective in (TraceMeanField_ELBO, Trace_ELBO)
        ]

    exact, sampled = both(KEY)
    error = (exact - sampled).std() / 2_000**0.5
    assert abs((exact - sampled).mean()) < 4 * error


def test_parameters_start_as_in_the_paper():
    bayes, base = simple(init_std=0.0025)[0], BASE
    machine = SVI(bayes.model, bayes.guide, optax.sgd(0.0), TraceMeanField_ELBO())
    init = compiled(lambda base: machine.init(KEY, base, MANY, y=LABELS).optim_state[1][0])
    params = init(base)
    assert set(params) == {"w_loc", "w_g", "w_B"}  # and nothing of the network
    assert np.all(params["w_B"] == 0)
    assert np.all(abs(params["w_loc"]) < WIDTH**-0.5)
    assert params["w_loc"].std() > 0.1
    assert 0.05 / 2**0.5 < params["w_g"].min() < params["w_g"].max() < 0.05


def test_numpyro_s_svi_fits_the_guide():
    bayes, _ = simple(noise="independent")
    labels = (LABELS + 1) % CLASSES  # what the network does not say
    machine = blob.svi(bayes, optax.adam(0.03))
    options = {"y": labels, "kl_weight": 0.1}

    @compiled
    def run():
        params, losses = fitted(machine, KEY, 800, BASE, MANY, **options)
        return losses, blob.predict(bayes, KEY, params, BASE, MANY)

    losses, logits = run()
    assert logits.shape == (10, 12, CLASSES)
    before = (LOGITS.argmax(-1) == labels).mean()
    after = (scipy.special.softmax(logits, -1).mean(0).argmax(-1) == labels).mean()
    assert after > before + 0.4
    assert losses[-50:].mean() < 0.7 * losses[:50].mean()


def test_the_network_is_an_argument_of_the_program():
    """The compiled step does not grow with the weights, and is compiled once."""
    lengths = []
    for width in (16, 256):
        base = {"w": np.ones((WIDTH, width)), "head": np.ones((width, CLASSES))}
        bayes = bayesian_lora(pooled, base, target="^w$", example=(MANY,), rank=1)
        machine = blob.svi(bayes, optax.adam(0.01))
        init = partial(machine.init, y=LABELS)
        step = jax.jit(lambda state, base, x, y, m=machine: m.update(state, base, x, y=y))
        state = jax.eval_shape(init, KEY, base, MANY)
        lengths.append(len(step.lower(state, base, MANY, LABELS).as_text()))
    assert lengths[1] < 1.05 * lengths[0]
    state = jax.jit(init)(KEY, base, MANY)
    for _ in range(3):
        state, _ = step(state, base, MANY, LABELS)
    assert step._cache_size() == 1


# --- the published rule


def test_the_published_rule_is_two_moves():
    grads = {f"w_{part}": normal(i, 2, 3) for i, part in enumerate(("loc", "g", "B"))}
    params = {f"w_{part}": normal(i + 3, 2, 3) for i, part in enumerate(("loc", "g", "B"))}
    rule = blob.alternating(
        optax.adam(0.1), prior_scale=0.2, cycle=3, kl_learning_rate=lambda count: 0.01 * (count + 1)
    )
    adam = optax.adam(0.1)

    @compiled
    def ours(state, params):
        moves, state = rule.update(grads, state, params)
        return state, optax.apply_updates(params, moves)

    @compiled
    def by_hand(step, moments, params):
        weight = 2.0 ** (step % 3 + 1) / (2.0**4 - 1)
        rate = 0.01 * (step + 1)
        means = {k: params[k] for k in ("w_loc", "w_B")}
        moves, moments = adam.update({k: grads[k] for k in means}, moments, means)
        want = optax.apply_updates(means, moves)
        want["w_loc"] -= rate * weight * want["w_loc"] / 0.2**2
        g = params["w_g"]
        want["w_g"] = g - rate * (grads["w_g"] + weight * (-2 / g + 2 * g**3 / 0.2**2))
        return moments, want

    state = jax.jit(rule.init)(params)
    moments = jax.jit(adam.init)({k: params[k] for k in ("w_loc", "w_B")})
    for step in range(5):
        moments, want = by_hand(step, moments, params)
        state, params = ours(state, params)
        for name in params:
            np.testing.assert_allclose(params[name], want[name], rtol=1e-6)


def test_a_long_cycle_does_not_overflow():
    """All of the divergence in one cycle, half of it at the end, in single precision."""
    cycle = 909
    params = {f"w_{part}": np.ones((1, 1), np.float32) for part in ("loc", "g", "B")}
    zero = jax.tree.map(np.zeros_like, params)
    rule = blob.alternating(optax.sgd(0.0), prior_scale=1.0, cycle=cycle, kl_learning_rate=1.0)

    def step(state, _):
        moves, state = rule.update(zero, state, params)
        return state, -moves["w_loc"][0, 0]

    weights = compiled(lambda: jax.lax.scan(step, rule.init(params), length=2 * cycle)[1])()
    np.testing.assert_allclose(weights.reshape(2, cycle).sum(1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(weights[cycle - 1], 0.5, rtol=1e-6)
    assert weights.dtype == jnp.float32


def test_cycles_of_the_paper_s_code():
    for num_data, length in ((640, 316), (1119, 393), (2251, 518), (4957, 706), (9427, 909)):
        assert blob.rescaled_cycle(num_data, 4) == length


def test_the_published_schedule_fits():
    bayes, _ = simple()
    labels = (LABELS + 1) % CLASSES
    machine = blob.svi(
        bayes,
        optax.adamw(0.03, weight_decay=0.0),
        schedule="blob",
        cycle=50,
        kl_learning_rate=0.003,
    )
    run = compiled(partial(fitted, machine, KEY, 600, BASE, MANY, y=labels, num_data=100))
    params, losses = run()
    # The mean loss of the batch, without the divergence.
    assert np.log(CLASSES) / 3 < losses[0] < 10
    assert losses[-100:].mean() < 0.6 * losses[:20].mean()
    # The deviations grow from where they start towards the prior's.
    assert 0.01 < blob.std(params["w_g"]).mean() < 0.4


# --- agreement with MCMC


@pytest.mark.slow
def test_nuts_over_a_agrees_with_the_guide():
    base = {"w": jnp.zeros((3, 2))}
    bayes = bayesian_lora(
        lambda base, x: x @ base["w"],
        base,
        target="w",
        example=(jnp.ones((1, 3)),),
        rank=1,
        alpha=1.0,
        prior_scale=1.0,
    )
    x = normal(0, 60, 3)
    y = (x @ jnp.array([1.0, -2.0, 0.5]) + 0.5 * normal(1, 60) > 0).astype(int)
    model = block(substitute(bayes.model, {"w_B": jnp.array([[-0.5], [0.5]])}), hide=["w_B"])
    mcmc = MCMC(
        NUTS(model, max_tree_depth=5),
        num_warmup=200,
        num_samples=500,
        progress_bar=False,
    )
    mcmc.run(KEY, base, x, y=y)
    draws = mcmc.get_samples()["w_A"]
    assert draws.shape == (500, 1, 3)
    machine = SVI(model, bayes.guide, optax.adam(0.02), TraceMeanField_ELBO())
    params = machine.run(KEY, 1_500, base, x, y=y, progress_bar=False).params
    assert set(params) == {"w_loc", "w_g"}
    mean, loc = draws.mean(0).ravel(), params["w_loc"].ravel()
    assert mean @ loc > 0.97 * jnp.linalg.norm(mean) * jnp.linalg.norm(loc)
    ratio = blob.std(params["w_g"]).ravel() / draws.std(0).ravel()
    assert jnp.all((0.6 < ratio) & (ratio < 1.2))  # mean field is never wider


# --- prediction


def test_the_mean_and_draws_are_those_of_merged_networks():
    bayes, apply_fn, base, x = build("out-in")
    params = draw_params(bayes)
    sites = [f"{name}_A" for name in bayes.layouts]
    predictive = Predictive(
        partial(bayes.model, noise="shared"),
        guide=bayes.guide,
        params=params,
        num_samples=4,
        return_sites=["logits", "y", *sites],
    )

    @compiled
    def everything(params, base, x):
        draws = predictive(KEY, base, x)
        merged = jax.vmap(lambda sample: apply_fn(blob.merge(bayes, params, base, sample), x))
        logits = blob.predict(bayes, KEY, params, base, x, num_samples=4)
        return draws, logits, merged({name: draws[name] for name in sites})

    draws, logits, dense = everything(params, base, x)
    np.testing.assert_allclose(draws["logits"], logits, rtol=1e-12)
    assert draws["y"].shape == (4, 3)
    np.testing.assert_allclose(logits, dense, rtol=1e-9)
    assert np.all(np.std(logits, axis=0) > 1e-3)
    np.testing.assert_allclose(*mean_and_merged(bayes, params, apply_fn, base, x), rtol=1e-9)


def test_the_noises_predict_alike_for_each_example():
    bayes, params = simple()
    means = {}
    for noise in ("shared", "flipout", "independent"):
        predict = compiled(partial(blob.predict, bayes, num_samples=2_000, noise=noise))
        probabilities = scipy.special.softmax(predict(KEY, params, BASE, MANY), -1)
        means[noise] = probabilities.mean(0), probabilities.std(0) / 2_000**0.5
    for noise in ("flipout", "independent"):
        difference = abs(means[noise][0] - means["shared"][0])
        assert np.all(difference < 4.5 * np.hypot(means[noise][1], means["shared"][1]))


def test_draws_take_the_memory_of_one_forward_pass():
    bayes, params = simple()
    x = normal(0, 2_000, TIME, WIDTH)

    def memory(num_samples):
        predict = jax.jit(partial(blob.predict, bayes, num_samples=num_samples))
        analysis = predict.lower(KEY, params, BASE, x).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    logits = 2_000 * CLASSES * 8
    assert memory(64) - memory(2) < 2 * 64 * logits  # beside what is returned
    assert memory(64) < memory(2) + 2_000 * TIME * 6 * 8 * 16


def test_prior_draws_need_no_guide():
    bayes, _, base, x = build("scan")
    draws = jax.eval_shape(Predictive(bayes.model, num_samples=5), KEY, base, x)
    assert draws["y"].shape == (5, 3)
    assert set(draws) == {"y", "logits", "up_A", "down_A"}


def test_draws_are_arviz_s():
    draws = {"logits": normal(0, 6, 12, CLASSES), "y": np.ones((6, 12), int)}
    data = blob.to_arviz(draws, {"y": LABELS})
    assert data["posterior_predictive"]["logits"].shape == (1, 6, 12, CLASSES)
    np.testing.assert_array_equal(data["observed_data"]["y"], LABELS)
    mean = data["posterior_predictive"]["logits"].mean(("chain", "draw"))
    np.testing.assert_allclose(mean, draws["logits"].mean(0))


# --- dtypes, other likelihoods, networks that quax cannot trace


@pytest.mark.parametrize("name", ["out-in"])
def test_weights_in_half_precision_have_factors_in_single(name):
    bayes, apply_fn, base, x = build(name, jnp.bfloat16)
    params = draw_params(bayes)
    assert all(leaf.dtype == jnp.float32 for leaf in params.values())
    logits = run(bayes, params, base, x, noise="flipout")["logits"]
    assert logits.dtype == jnp.bfloat16
    assert np.isfinite(logits.astype(float)).all()
    merged = jax.eval_shape(partial(blob.merge, bayes), params, base)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(merged))


def test_single_precision_stays():
    bayes, _, base, x = build("out-in", jnp.float32)
    machine = blob.svi(bayes, optax.adam(0.01))

    def step(base, x):
        y = np.zeros(3, int)
        state, _ = machine.update(machine.init(KEY, base, x, y=y), base, x, y=y)
        params = machine.get_params(state)
        return params, blob.predict(bayes, KEY, params, base, x)

    for leaf in jax.tree.leaves(jax.eval_shape(step, base, x)):
        assert leaf.dtype == jnp.float32
    wide, _, _, _ = build("out-in", jnp.float32, dtype=jnp.float64)
    assert all(leaf.dtype == jnp.float64 for leaf in draw_params(wide).values())


def test_any_likelihood_and_several_inputs():
    """A sequence of real outputs, and padding."""

    def apply_fn(base, x, mask):
        return jnp.where(mask[:, :, None], x @ base["w"], 0.0)

    base = {"w": normal(0, WIDTH, 2)}
    mask = np.arange(TIME) < np.array([[5], [3], [1]])
    bayes = bayesian_lora(
        apply_fn,
        base,
        target="w",
        example=(X, mask),
        rank=1,
        likelihood=lambda out: dist.Normal(out, 0.1).to_event(2),
    )
    draws = jax.eval_shape(Predictive(bayes.model, num_samples=2), KEY, base, X, mask)
    assert draws["y"].shape == (2, 3, TIME, 2)


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


# name -> (network, parameters, input)
UNTRACEABLE = {
    "custom_vjp": (lambda base, x: doubled(x @ base["w"]).mean(1), {"w": normal(0, WIDTH, 3)}, X),
    "convolution": (
        lambda base, x: jax.lax.conv_general_dilated(
            x, base["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ).mean(1),
        {"w": normal(0, 3, WIDTH, 2)},
        X,
    ),
    "embedding": (
        lambda base, x: jnp.take(base["w"], x, axis=0).mean(1),
        {"w": normal(0, 7, 3)},
        np.arange(15).reshape(3, 5) % 7,
    ),
    "reshaped": (
        lambda base, x: jnp.einsum("btd,dhe->bhe", x, base["w"].reshape(WIDTH, 2, 3)).sum(1),
        {"w": normal(0, WIDTH, 6)},
        X,
    ),
    "tied": (
        lambda base, x: (jnp.tanh(x @ base["w"]) @ base["w"].T).mean(1),
        {"w": normal(0, WIDTH, 6)},
        X,
    ),
}


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_what_has_no_rule_is_named_and_materialised(name):
    apply_fn, base, x = UNTRACEABLE[name]
    make = partial(bayesian_lora, apply_fn, base, target="w", example=(x,), rank=2)
    with pytest.raises(ValueError, match=r"(?s)(doubled|'w').*materialise=True"):
        make()
    bayes = make(materialise=True)
    params = draw_params(bayes)
    mean, dense = mean_and_merged(bayes, params, apply_fn, base, x)
    np.testing.assert_allclose(mean, dense, rtol=1e-9)
    logits = run(bayes, params, base, x, noise="flipout")["logits"]
    assert np.max(abs(logits - dense)) > 1e-3


def test_materialised_and_factored_agree():
    values = []
    for materialise in (False, True):
        bayes, _, base, x = build("out-in, checkpoint", materialise=materialise)
        sites = run(bayes, draw_params(bayes), base, x)
        values.append(sites["logits"])
    np.testing.assert_allclose(*values, rtol=1e-9)


# --- files


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_an_adapter_is_saved_and_loaded(tmp_path, format):
    for dtype in (jnp.float64, jnp.float32, jnp.bfloat16):
        bayes, _, _, _ = build("nnx", dtype)
        params = draw_params(bayes)
        blob.save(bayes, params, tmp_path / dtype.__name__, format=format)
        loaded = blob.load(bayes, tmp_path / dtype.__name__)
        assert set(loaded) == set(params)
        for name in params:
            np.testing.assert_array_equal(loaded[name], params[name])
            assert loaded[name].dtype == params[name].dtype
    # In half precision on disk; the factors are single.
    halves = {name: leaf.astype(jnp.bfloat16) for name, leaf in params.items()}
    blob.save(bayes, halves, tmp_path / "halves", format=format)
    for name, leaf in blob.load(bayes, tmp_path / "halves").items():
        np.testing.assert_array_equal(leaf, halves[name].astype(jnp.float32))
        assert leaf.dtype == jnp.float32
    for options, message in (
        ({"rank": 3}, "another shape"),
        ({"alpha": 1.0}, "saved with scale"),
        ({"prior_scale": 1.0}, "saved with prior_scale"),
    ):
        other, _, _, _ = build("nnx", **options)
        with pytest.raises(ValueError, match=message):
            blob.load(other, tmp_path / "float64")
    with pytest.raises(ValueError, match="does not hold the factors"):
        blob.save(bayes, {"w": np.ones(3)}, tmp_path / "adapter", format=format)


def test_what_is_no_adapter_is_not_loaded(tmp_path):
    bayes, params = simple()
    with pytest.raises(ValueError, match="is not an adapter"):
        blob.load(bayes, tmp_path)
    with pytest.raises(FileNotFoundError):
        blob.load(bayes, tmp_path / "adapter")
    with pytest.raises(ValueError, match="Unknown format"):
        blob.save(bayes, params, tmp_path / "adapter", format="pickle")


@pytest.mark.parametrize("part", ["params", "options"])
def test_a_link_out_of_an_adapter_is_not_followed(tmp_path, part):
    bayes, params = simple()
    blob.save(bayes, params, tmp_path / "adapter", format="orbax")
    (tmp_path / "adapter" / part).rename(tmp_path / "outside")
    (tmp_path / "adapter" / part).symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=f"{part} is a link to .*outside of"):
        blob.load(bayes, tmp_path / "adapter")
    # A link to the adapter is the caller's own.
    (tmp_path / "adapter" / part).unlink()
    (tmp_path / "outside").rename(tmp_path / "adapter" / part)
    (tmp_path / "link").symlink_to(tmp_path / "adapter")
    assert set(blob.load(bayes, tmp_path / "link")) == set(params)


@pytest.mark.parametrize(
    ("format", "package", "extra"),
    [("safetensors", "safetensors.numpy", "models"), ("orbax", "orbax.checkpoint", "runs")],
)
def test_without_its_package_the_error_names_the_extra(
    tmp_path, monkeypatch, format, package, extra
):
    bayes, params = simple()
    blob.save(bayes, params, tmp_path / "adapter", format=format)
    monkeypatch.setitem(sys.modules, package.split(".")[0], None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"probbp\[{extra}\]"):
        blob.save(bayes, params, tmp_path / "other", format=format)
    with pytest.raises(ImportError, match=rf"probbp\[{extra}\]"):
        blob.load(bayes, tmp_path / "adapter")


# --- errors


def make(**options):
    options = {"apply_fn": pooled, "params": BASE, "target": "^w$", "example": (MANY,)} | options
    return bayesian_lora(**options)


# name -> (options, error, words)
WRONG = {
    "no match": ({"target": "query"}, ValueError, r"No weight's name.*\['head', 'w'\]"),
    "not a product": (
        {"params": BASE | {"unused": np.ones((2, 2))}, "target": ""},
        ValueError,
        "multiplies nothing by 'unused'",
    ),
    "a sum": (
        {
            "apply_fn": lambda base, x: pooled(base, x) + base["bias"][0],
            "params": BASE | {"bias": np.ones((1, CLASSES))},
            "target": "bias",
        },
        ValueError,
        "'bias' enters",
    ),
    "integers": (
        {"params": BASE | {"w": np.ones((WIDTH, 6), np.int8)}},
        ValueError,
        "'w' is of int8",
    ),
    "not an array": ({"params": BASE | {"act": jnp.tanh}}, TypeError, "equinox.partition"),
    "names that clash": (
        {"params": BASE | {"a": {"b": np.ones(1)}, "a.b": np.ones(1)}},
        ValueError,
        "same name",
    ),
    "names of factors that clash": (
        {
            "apply_fn": lambda base, x: pooled(base, x) + x.mean(1) @ base["w_B"],
            "params": BASE | {"w_B": np.ones((WIDTH, CLASSES))},
            "target": "^w",
        },
        ValueError,
        "'w' and 'w_B' would share",
    ),
    "rank": ({"rank": 0}, ValueError, "rank must be a positive integer"),
    "alpha": ({"alpha": 0.0}, ValueError, "alpha must be positive"),
    "prior": ({"prior_scale": -1.0}, ValueError, "prior_scale must be positive"),
    "start": ({"init_std": 0.0}, ValueError, "init_std must be positive"),
    "noise": ({"noise": "token"}, ValueError, "choose 'flipout'"),
    "dtype": ({"dtype": jnp.bfloat16}, ValueError, "at least single precision"),
    "batch": (
        {"apply_fn": lambda base, x, m: pooled(base, x * m), "example": (MANY, np.ones(()))},
        ValueError,
        "first axis of every input",
    ),
    "output": (
        {"apply_fn": lambda base, x: pooled(base, x).sum(0)},
        ValueError,
        "must return the 12 examples on the first axis",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name):
    options, error, words = WRONG[name]
    with pytest.raises(error, match=words):
        make(**options)


def test_calls_that_are_wrong_are_said_so():
    bayes, params = simple()
    with pytest.raises(ValueError, match="Unknown noise"):
        elbo(bayes, params, noise="token")
    with pytest.raises(ValueError, match="kl_weight must be finite and not negative"):
        jax.eval_shape(lambda: elbo(bayes, params, kl_weight=-1.0))
    with pytest.raises(ValueError, match="num_samples must be an integer of at least 0"):
        blob.predict(bayes, KEY, params, BASE, MANY, num_samples=-1)
    with pytest.raises(ValueError, match="Unknown schedule"):
        blob.svi(bayes, optax.sgd(0.1), schedule="kick")
    with pytest.raises(ValueError, match="needs a cycle"):
        blob.svi(bayes, optax.sgd(0.1), schedule="blob")
    with pytest.raises(ValueError, match="cycle must be a positive integer"):
        blob.alternating(optax.sgd(0.1), prior_scale=0.2, cycle=0)
    sequence = make(likelihood=lambda logits: dist.Normal(logits, 1.0))
    with pytest.raises(ValueError, match="likelihood has batch shape"):
        jax.eval_shape(Predictive(sequence.model, num_samples=1), KEY, BASE, MANY)
    unseeded = substitute(bayes.model, params | {"w_A": params["w_loc"]})
    with pytest.raises(ValueError, match="needs a key"):
        jax.eval_shape(lambda: unseeded(BASE, MANY, y=LABELS))
