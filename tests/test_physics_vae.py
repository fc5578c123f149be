"""A physical model with a residual: the reversal's algebra, the density, labels, prediction."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from cheap import compiled, key_of, normal
from flax import nnx
from numpyro.distributions import biject_to
from numpyro.handlers import replay, seed, substitute, trace
from numpyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from numpyro.infer.util import compute_log_probs

from probbp.models import physics, physics_vae
from probbp.models.physics import finite_elements, oscillators
from probbp.models.physics_vae import categorical, continuous

KEY = key_of(0)
ROWS, OUTPUTS, CLASSES = 6, 5, 3
TIMES = np.linspace(0.1, 2.0, OUTPUTS)
PRIORS = {"phase": dist.Uniform(-1.0, 3.0), "rate": dist.LogNormal(0.0, 0.5)}
# With these, one support of each kind: an interval, the positive numbers, the line, the simplex.
ALL_PRIORS = PRIORS | {
    "shift": dist.Normal(0.0, 1.0),
    "shares": dist.Dirichlet(np.array([2.0, 3.0, 4.0])),
}
TRACES = []


def response(parameters):
    TRACES.append(1)
    wave = jnp.exp(-parameters["rate"] * TIMES) + jnp.sin(parameters["phase"] + TIMES)
    if "shares" in parameters:
        wave = parameters["shares"][0] * wave + parameters["shares"][1] + parameters["shift"]
    return wave


X = normal(1, ROWS, OUTPUTS)
C = normal(2, ROWS, 2) * 3 + 5
Y = np.array([0, 1, 2, 2, 1, 0])
SOME = np.array([True, False, True, True, False, True])


def build(priors=PRIORS, **options):
    labels = {"domain": continuous(C), "classes": categorical(CLASSES)}
    sizes = {"domain_dim": 2, "class_dim": 1, "width": 6}
    return physics_vae.physics_vae(response, priors, X, **labels | sizes | options)


@cache
def usual():
    return build()


def __getattr__(name):
    """Return `VAE` to the modules that import it; it is built where it is asked for."""
    if name == "VAE":
        return usual()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def partitioned():
    return build(guide="partitioned")


def params_of(vae, **options):
    svi = SVI(vae.model, vae.guide, optax.sgd(0.1), Trace_ELBO())
    init = compiled(lambda: svi.get_params(svi.init(KEY, X, C, Y, **options)))
    return init()


@cache
def usual_params():
    return params_of(usual())


def loss_fn(vae, elbo, **options):
    """Return the compiled `(params, key, x, c, y, **options) -> loss, gradient`."""

    def loss(params, rng_key, x, c, y, **arguments):
        return elbo.loss(rng_key, params, vae.model, vae.guide, x, c, y, **options | arguments)

    return compiled(jax.value_and_grad(loss))


@cache
def value_and_grad():
    return loss_fn(usual(), Trace_ELBO())


def sites_of(vae, params, x, c=None, y=None, **options):
    """Return values, log densities and scales of the sites of a guide's draw, in two dictionaries.

    Of the guide, and of the model replayed with it.
    """

    def run(params, rng_key, x, c, y):
        guide = trace(seed(substitute(vae.guide, params), rng_key)).get_trace(x, c, y, **options)
        model = seed(replay(substitute(vae.model, params), guide), rng_key)
        both = guide, trace(model).get_trace(x, c, y, **options)
        return [{name: summary(site) for name, site in sites.items()} for sites in both]

    def summary(site):
        log_prob = site["fn"].log_prob(site["value"]) if site["type"] == "sample" else 0.0
        return {"value": site["value"], "log_prob": log_prob, "scale": site.get("scale", 1.0)}

    return compiled(run)(params, KEY, x, c, y)


def total(sites):
    return sum(site["log_prob"] for site in sites.values())


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


# ---------------------------------------------------------------------------------------
# The reversal.


@pytest.mark.parametrize(
    "elbo",
    [Trace_ELBO, TraceMeanField_ELBO, pytest.param(TraceGraph_ELBO, marks=pytest.mark.slow)],
)
def test_the_strength_acts_on_the_encoder_alone_and_linearly(elbo):
    # In passing: a strength in units of the noise is another name for the same.
    relative = elbo is TraceMeanField_ELBO
    unit = OUTPUTS / usual_params()["sigma_x"] ** 2 if relative else 1.0
    run = loss_fn(usual(), elbo(), relative=True) if relative else loss_fn(usual(), elbo())
    run = value_and_grad() if elbo is Trace_ELBO else run
    results = {
        s: run(usual_params(), KEY, X, C, Y, strength=s * unit) for s in (-1.0, 0.0, 0.25, 3.0)
    }
    expected_value, expected_grads = value_and_grad()(usual_params(), KEY, X, C, Y, strength=0.25)
    np.testing.assert_allclose(flat(results[0.25][1]), flat(expected_grads), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose([value for value, _ in results.values()], expected_value, rtol=1e-12)
    cut, plain = results[0.0][1], results[-1.0][1]
    for strength, (_, grads) in results.items():
        for name in usual_params():
            here, zero, one = (flat(g[name]) for g in (grads, cut, plain))
            expected = zero + strength * (zero - one) if name == "encoder$params" else one
            np.testing.assert_allclose(here, expected, rtol=1e-9, atol=1e-9 * abs(one).max())
    assert abs(flat(cut["encoder$params"]) - flat(plain["encoder$params"])).max() > 0.1


def test_a_schedule_acts_at_its_step_and_compiles_once():
    rate, strengths = 1e-5, np.array([-1.0, 2.0, 0.3])
    svi = physics_vae.svi(
        *(usual(), optax.sgd(rate)),
        **{"strength": lambda step: jnp.asarray(strengths)[step], "loss": Trace_ELBO()},
    )
    state = jax.jit(svi.init)(KEY, X, C, Y)
    step = jax.jit(svi.update)
    for i, strength in enumerate(strengths):
        x, c, y = X * (1 + i), C + i, np.roll(Y, i)
        params, (_, key) = svi.get_params(state), jax.random.split(state.rng_key)
        _, grads = value_and_grad()(params, key, x, c, y, strength=strength)
        state, loss = step(state, x, c, y)
        assert np.isfinite(loss)
        before, grad, after = (
            flat(tree["encoder$params"]) for tree in (params, grads, svi.get_params(state))
        )
        np.testing.assert_allclose(after, before - rate * grad, rtol=1e-9, atol=1e-12)
        if i == 0:
            TRACES.clear()
    assert not TRACES


def test_schedules():
    dann, cyclical = physics_vae.dann_schedule(0.5, 100), physics_vae.cyclical_schedule(2.0, 10)
    start, middle, end, after = compiled(jax.vmap(dann))(np.array([0, 50, 100, 1000]))
    np.testing.assert_allclose(middle, 0.5 * (2 / (1 + np.exp(-5)) - 1), rtol=1e-6)
    assert start == 0
    assert end == after
    steps = np.array([0, 1, 5, 9, 11])
    np.testing.assert_allclose(compiled(jax.vmap(cyclical))(steps), [0, 0.4, 2, 2, 0.4])


def test_a_strength_out_of_scale_warns():
    with pytest.warns(UserWarning, match="overpowers"):
        physics_vae.svi(usual(), optax.adam(1e-3), strength=1.5 / OUTPUTS)


def test_two_optimisers_and_optimistic_updates():
    players = {
        "encoder": optax.optimistic_gradient_descent(1e-4),
        "adversary": optax.set_to_zero(),
        "noise": optax.set_to_zero(),
        "decoder": optax.adam(1e-3),
    }
    optimiser = optax.multi_transform(players, physics_vae.roles)
    svi = physics_vae.svi(partitioned(), optimiser, strength=0.1, invariance=1.0, loss=Trace_ELBO())

    @compiled
    def run():
        state = svi.init(KEY, X, C, Y)
        return svi.get_params(state), svi.get_params(svi.update(state, X, C, Y)[0])

    before, after = run()
    roles = physics_vae.roles(before)
    assert set(roles.values()) == set(players)
    for name, role in roles.items():
        moved = bool(np.any(flat(before[name]) != flat(after[name])))
        assert moved == (role in ("encoder", "decoder")), name


# ---------------------------------------------------------------------------------------
# The density: guide and model against a plain one.


def mlp(params, x):
    layers = params["layers"]
    for i in range(len(layers)):
        x = x @ layers[i]["kernel"] + layers[i]["bias"]
        x = x if i == len(layers) - 1 else x * jax.nn.sigmoid(x)
    return x


def conditional(params, features, z):
    mean, log_scale = jnp.split(mlp(params, features), 2, -1)
    return dist.Normal(mean, jnp.exp(log_scale)).log_prob(z).sum(-1)


@pytest.mark.parametrize("guide", ["joint", "partitioned"])
def test_the_elbo_is_that_of_a_plain_implementation(guide):
    vae = partitioned() if guide == "partitioned" else build(ALL_PRIORS)
    params = params_of(vae)
    drawn, model = sites_of(vae, params, X, C, Y)
    values = {name: site["value"] for name, site in drawn.items()}
    u_size = {"phase": 1, "rate": 1, "shift": 1, "shares": 2}

    @compiled
    def plain(params, values):
        # q: the Gaussian of u, and the Jacobian by automatic differentiation.
        mean, factor = vae.encode(params, X)
        u = mean + jnp.einsum("nij,nj->ni", factor, values["noise"])
        log_q = dist.MultivariateNormal(mean, scale_tril=factor).log_prob(u)
        start, parameters = 0, {}
        for name, prior in vae.priors.items():
            size, transform = u_size[name], biject_to(prior.support)
            shape = transform.inverse_shape(prior.event_shape)
            part = u[:, start : start + size]
            start += size

            def free(v, transform=transform, shape=shape, size=size):
                value = transform(v.reshape(shape))
                return jnp.ravel(value)[:size], value

            jacobian, parameters[name] = jax.vmap(jax.jacfwd(free, has_aux=True))(part)
            log_q -= jnp.linalg.slogdet(jacobian)[1]

        # p: the conditional priors of the rows' own labels, the sum of the parts, the heads.
        net = {name.removesuffix("$params"): value for name, value in params.items()}
        z_c, z_y = values["z_c"], values["z_y"]
        g = jax.vmap(response)(parameters)
        scale = jnp.sqrt((X.std(0) ** 2).mean())
        h = scale * mlp(net["residual"], jnp.concatenate([z_c, z_y], -1))
        standard_c = (C - C.mean(0)) / C.std(0)
        m, log_s = jnp.split(mlp(net["head_c"], z_c), 2, -1)
        log_p = (
            sum(prior.log_prob(parameters[name]) for name, prior in vae.priors.items())
            + conditional(net["prior_c"], standard_c, z_c)
            + conditional(net["prior_y"], jnp.eye(CLASSES)[Y], z_y)
            + dist.Normal(g + h, scale).log_prob(X).sum(-1)
            + dist.Normal(m, jnp.exp(log_s)).log_prob(standard_c).sum(-1)
            - jnp.log(C.std(0)).sum()
            + jnp.take_along_axis(jax.nn.log_softmax(mlp(net["head_y"], z_y)), Y[:, None], 1)[:, 0]
        )
        return log_q, log_p, g, h, parameters, factor

    log_q, log_p, g, h, parameters, factor = plain(params, values)
    np.testing.assert_allclose(total(drawn), log_q, rtol=1e-10)
    np.testing.assert_allclose(total(model), log_p, rtol=1e-10)
    for name in vae.priors:
        np.testing.assert_allclose(values[name], parameters[name], rtol=1e-12)
    if vae is partitioned():
        np.testing.assert_array_equal(factor[:, 2:, :2], 0)
        np.testing.assert_array_equal(factor[:, 4:, 2:4], 0)
    # The user's function, and a sum.
    np.testing.assert_allclose(model["physics"]["value"], g, rtol=1e-14)
    np.testing.assert_allclose(model["residual"]["value"], h, rtol=1e-12)
    both = model["physics"]["value"] + model["residual"]["value"]
    np.testing.assert_allclose(model["prediction"]["value"], both, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------------------------
# Labels.


def test_what_is_missing_does_not_matter_and_what_is_there_does():
    def run(c, y, has=SOME):
        return value_and_grad()(usual_params(), KEY, X, c, y, strength=0.0, has_c=has, has_y=has)

    value, grads = run(C, Y)
    hole = np.where(SOME[:, None], C, np.nan)
    again, same = run(hole, np.where(SOME, Y, 99))
    assert value == again
    np.testing.assert_array_equal(flat(grads), flat(same))
    assert np.isfinite(flat(grads)).all()
    first = np.arange(ROWS) == 0
    assert run(C + first[:, None], Y)[0] != value
    assert run(C, np.where(first, 2, Y))[0] != value
    complete, _ = value_and_grad()(usual_params(), KEY, X, C, Y, strength=0.0)
    np.testing.assert_allclose(run(C, Y, np.ones(ROWS, bool))[0], complete, rtol=1e-12)


def test_missing_classes_are_summed_over_and_missing_numbers_are_drawn():
    guide, model = sites_of(usual(), usual_params(), X)

    @compiled
    def plain(params, z_c, z_y, drawn):
        each = [conditional(params["prior_y$params"], e, z_y) for e in jnp.eye(CLASSES)]
        standard = (drawn - C.mean(0)) / C.std(0)
        return {
            "z_y": jax.nn.logsumexp(jnp.stack(each), axis=0) - jnp.log(CLASSES),
            # A missing number: the conditional prior at the draw, and the prior of the draw.
            "z_c": conditional(params["prior_c$params"], standard, z_c),
            "c_missing": dist.Normal(C.mean(0), C.std(0)).log_prob(drawn).sum(-1),
            # Nothing is observed where nothing is there.
            "c": jnp.zeros(ROWS),
            "y": jnp.zeros(ROWS),
        }

    z_c, z_y, drawn = (guide[name]["value"] for name in ("z_c", "z_y", "c_missing"))
    for name, expected in plain(usual_params(), z_c, z_y, drawn).items():
        np.testing.assert_allclose(model[name]["log_prob"], expected, rtol=1e-10)
    assert "y_missing" not in model


def test_a_subsample_is_the_same_rows_in_model_and_guide():
    guide, model = sites_of(usual(), usual_params(), X, C, Y, subsample_size=3)
    rows = guide["records"]["value"]
    np.testing.assert_array_equal(model["records"]["value"], rows)
    for name, values in {"x": X, "c": C, "y": Y}.items():
        np.testing.assert_array_equal(model[name]["value"], values[rows])
    assert model["x"]["scale"] == guide["noise"]["scale"] == 2
    mean, factor = compiled(usual().encode)(usual_params(), X)
    z_y = mean[rows, -1] + np.einsum("nj,nj->n", factor[rows, -1], guide["noise"]["value"])
    np.testing.assert_allclose(model["z_y"]["value"][:, 0], z_y, rtol=1e-12)


# ---------------------------------------------------------------------------------------
# Options.


def test_the_residual_vanishes_at_the_reference():
    vae = build(reference={"c": C[0], "y": Y[0]})

    @compiled
    def residual(params, move):
        values = dict(params)
        features = {"c": (C[0] - C.mean(0)) / C.std(0), "y": jnp.eye(CLASSES)[Y[0]]}
        for name, value in features.items():
            mean, _ = jnp.split(mlp(params[f"prior_{name}$params"], value), 2)
            values[f"z_{name}"] = mean[None] + move
        model = substitute(seed(vae.model, KEY), values)
        return trace(model).get_trace(num_records=1)["residual"]["value"]

    params = usual_params() | params_of(vae)
    np.testing.assert_allclose(residual(params, 0.0), 0, atol=1e-14)
    assert abs(residual(params, 1.0)).max() > 1e-3


def test_the_adversary_pushes_the_encoder_alone_and_labels_can_weigh_more():
    params = params_of(usual(), invariance=0.0)

    def run(invariance, label_weight):
        options = {"invariance": invariance, "label_weight": label_weight}
        return value_and_grad()(params, KEY, X, C, Y, strength=-1.0, **options)

    (value, still), (same, pushed) = run(0.0, 1.0), run(1.0, 1.0)
    np.testing.assert_allclose(value, same, rtol=1e-13)
    _, plain = value_and_grad()(usual_params(), KEY, X, C, Y, strength=-1.0)
    (double, heavy), (triple, _) = run(0.0, 2.0), run(0.0, 3.0)
    np.testing.assert_allclose(triple - double, double - value, rtol=1e-9)
    for name in params:
        close = partial(np.allclose, flat(still[name]), rtol=1e-9, atol=1e-9)
        assert close(flat(pushed[name])) == (name != "encoder$params")
        assert close(flat(heavy[name])) == (not name.startswith(("encoder", "head")))
        if name in plain:
            assert close(flat(plain[name]))
        if name.startswith("head"):
            np.testing.assert_allclose(flat(heavy[name]), 2 * flat(still[name]), rtol=1e-9)


# ---------------------------------------------------------------------------------------
# Prediction and refinement.


def test_another_domain_leaves_the_physics_as_it_is_to_the_bit():
    @compiled
    def run(c):
        draws = physics_vae.predict(usual(), KEY, usual_params(), X, c, num_samples=3)
        # z_c is a draw of the new domain's prior.
        features = (C + 2 - C.mean(0)) / C.std(0)
        return draws, jnp.split(mlp(usual_params()["prior_c$params"], features), 2, -1)

    (here, _), (there, (mean, log_scale)) = run(None), run(C + 2)
    for name in (*PRIORS, "z_y", "physics"):
        np.testing.assert_array_equal(here[name], there[name])
    assert here["physics"].shape == (3, ROWS, OUTPUTS)
    assert np.all(here["z_c"] != there["z_c"])
    assert np.all(here["residual"] != there["residual"])
    assert np.all(abs(there["z_c"] - mean) < 6 * np.exp(log_scale))
    np.testing.assert_allclose(here["y_mean"].sum(-1), 1)
    assert here["y"].shape == (3, ROWS)
    assert here["c"].shape == here["c_mean"].shape == (3, ROWS, 2)
    data = physics_vae.to_arviz(here, {"x": X})
    assert data.posterior["physics"].shape == (1, 3, ROWS, OUTPUTS)
    assert set(data.posterior_predictive.data_vars) == {"x", "c", "y"}
    assert data.observed_data["x"].shape == X.shape


def test_the_refined_density_is_the_models_and_its_gradient_true():
    refined = physics_vae.refinement(usual(), usual_params(), X[0], C[0])
    mean, factor = compiled(usual().encode)(usual_params(), X[:1])
    np.testing.assert_allclose(refined.position, mean[0], rtol=1e-13)
    np.testing.assert_allclose(refined.inverse_mass_matrix, factor[0] @ factor[0].T)
    position = np.asarray(refined.position) + 0.1
    density, basis, h = refined.logdensity_fn, np.eye(len(position)), 1e-5

    @compiled
    def derivatives(position):
        several = jax.vmap(density)
        slopes = (several(position + h * basis) - several(position - h * basis)) / (2 * h)
        return density(position), jax.jacfwd(density)(position), slopes

    value, grad, slopes = derivatives(position)
    np.testing.assert_allclose(grad, slopes, rtol=1e-6, atol=1e-6)

    @compiled
    def plain(position):
        sites = refined.constrain_fn(position)
        log_p = sum(prior.log_prob(sites[name]) for name, prior in PRIORS.items())
        standard = (C[0] - C.mean(0)) / C.std(0)
        log_p += conditional(usual_params()["prior_c$params"], standard, sites["z_c"])
        each = conditional(usual_params()["prior_y$params"], jnp.eye(CLASSES), sites["z_y"])
        log_p += jax.nn.logsumexp(each) - jnp.log(CLASSES)
        log_p += dist.Normal(sites["prediction"], usual_params()["sigma_x"]).log_prob(X[0]).sum()
        for name, prior in PRIORS.items():
            transform = biject_to(prior.support)
            u = transform.inv(sites[name])
            log_p += transform.log_abs_det_jacobian(u, sites[name])
        return log_p

    np.testing.assert_allclose(value, plain(position), rtol=1e-10)
    # Without c, it is sampled too.
    assert physics_vae.refinement(usual(), usual_params(), X[0]).position.shape == (
        len(position) + 2,
    )


def test_a_reversed_gradient_is_not_the_densitys():
    """Why `refinement`, and MCMC, take the strength -1."""
    sites = {name: sites[:1] for name, sites in predicted().items()}

    def log_probs(z, strength):
        options = {"strength": strength, "heads": False}
        data = X[:1], C[:1], Y[:1]
        return compute_log_probs(usual().model, data, options, {**usual_params(), **z})[0]

    @compiled
    def run(z, strength):
        density = jax.value_and_grad(lambda z: sum(log_probs(z, strength).values()))(z)
        return *density, jax.grad(lambda z: log_probs(z, strength)["x"])(z)

    (_, cut, none), (_, true, likelihood), (_, turned, _) = (run(sites, s) for s in (0.0, -1, 0.1))
    for name in PRIORS:
        # The physics hears x whatever the strength.
        np.testing.assert_allclose(cut[name], true[name], rtol=1e-9)
        np.testing.assert_allclose(turned[name], true[name], rtol=1e-9)
    for name in ("z_c", "z_y"):
        value = sites[name]
        step = np.zeros_like(value)
        step[0, 0] = 1e-5
        high, low = (run(sites | {name: value + sign * step}, -1.0)[0] for sign in (1, -1))
        np.testing.assert_allclose(true[name][0, 0], (high - low) / 2e-5, rtol=1e-6)
        # Cut: x is not heard at all, by either; reversed: with the other sign.
        np.testing.assert_array_equal(none[name], 0)
        np.testing.assert_allclose(true[name] - cut[name], likelihood[name], rtol=1e-9)
        np.testing.assert_allclose(turned[name] - cut[name], -0.1 * likelihood[name], rtol=1e-8)
        assert abs(turned[name] - true[name]).max() > 1e-3 * abs(true[name]).max()


def predicted():
    guide, _ = sites_of(usual(), usual_params(), X, C, Y)
    return {name: guide[name]["value"] for name in usual().latents}


class Given(nnx.Module):
    """A network without weights."""

    def __init__(self, fun):
        self.fun = fun

    def __call__(self, x):
        return self.fun(x)


def linear_vae(**networks):
    """Return an autoencoder whose physics is a number, and two records for its scales."""
    x = np.array([[-1.0, 1.0], [1.0, -1.0]])
    return physics_vae.physics_vae(
        lambda parameters: jnp.stack([parameters["a"], jnp.zeros(())]),
        {"a": dist.Normal(0.0, 1.0)},
        x,
        classes=categorical(2),
        class_dim=1,
        networks={name: Given(fun) for name, fun in networks.items()},
    ), x


def guide_of(spread):
    """Return an encoder with `spread` times the width of the posterior."""

    def encoder(x):
        # The posterior of a is N(x_0 / 2, 1 / 2), that of z_y the prior N(0, 1).
        widths = jnp.broadcast_to(2 + jnp.log(jnp.array([0.5**0.5, 1.0]) * spread), x.shape)
        location = jnp.stack([x[:, 0] / 2, jnp.zeros(len(x))], -1)
        return jnp.concatenate([location, widths, jnp.zeros((len(x), 1))], -1)

    return encoder


@pytest.mark.slow
def test_pareto_k_tells_a_narrow_guide_from_the_right_one():
    ks = {}
    for spread in (1.0, 0.3):
        vae, x = linear_vae(
            encoder=guide_of(spread),
            prior_y=lambda features: jnp.zeros((*features.shape[:-1], 2)),
            residual=lambda z: jnp.zeros((len(z), 2)),
        )
        ks[spread] = physics_vae.pareto_k(vae, KEY, {"sigma_x": 1.0}, x, num_samples=400)
    assert ks[1.0].shape == (2,)
    # The guide is the posterior but for the quantiles of draws in the unit of `a`.
    assert (ks[1.0] < 0.5).all()
    assert (ks[0.3] > 0.7).all()


def test_leakage_counts_what_either_part_takes():
    def encoder(x):
        z = jnp.stack([x[:, 0], 0.5 * x[:, 1]], -1)
        return jnp.concatenate([z, jnp.zeros((len(x), 3))], -1)

    vae, _ = linear_vae(encoder=encoder, residual=lambda z: jnp.stack([0 * z[:, 0], z[:, 0]], -1))
    a, b = normal(0, 2, 4, 50)
    run = compiled(partial(physics_vae.leakage, vae, {}))
    alone, other = run(np.stack([a, 0 * a], -1)), run(np.stack([0 * b, b], -1))
    np.testing.assert_allclose([alone["residual"], other["physics"]], 0, atol=1e-30)
    np.testing.assert_allclose(other["residual"], 0.25, rtol=1e-6)
    # `a` is given in units of its prior's spread, by 1000 draws.
    assert 0.8 < alone["physics"] < 1.2


# ---------------------------------------------------------------------------------------
# The case studies.

CASES = {
    "beam": physics.beam,
    "offset": partial(physics.beam, "offset"),
    "bow": partial(physics.beam, "bow"),
    "oscillator": physics.oscillator,
    "bridges": physics.bridges,
}


@pytest.mark.parametrize("name", CASES)
def test_the_physics_is_right_where_the_case_says_so(name):
    case = CASES[name]()
    records = compiled(lambda: physics.simulate(KEY, case, 4))()
    assert np.isfinite(records.x).all()
    values = {k: v[0] for k, v in records.factors.items()} | case.reference
    values |= {"initial": 1.0} if name == "oscillator" else {}
    values |= {"load": 1.0} if name == "bridges" else {}
    known = (np.stack([np.asarray(values[k]) for k in case.known]),) if case.known else ()

    @compiled
    def both(values):
        return case.response(values), case.physics({k: values[k] for k in case.priors}, *known)

    clean, found = both(values)
    error = abs(found - clean).max()
    # The springs of the paper's beam never let go altogether.
    assert error < (0.3 if name == "beam" else 1e-5)


def test_the_bridge_is_a_continuous_beam_where_its_supports_are_stiff():
    """The equation of three moments for a load on the first span or the second."""
    stiff, span = np.array([13.0, 13.0]), 20.0
    sensor = (finite_elements.SENSOR + 0.5) * finite_elements.ELEMENT
    ours = compiled(finite_elements.strain)(stiff, np.zeros(2))
    moments = np.zeros(len(physics.WINDOW))
    for axle in finite_elements.AXLES:
        place = np.asarray(finite_elements.SPEED * physics.WINDOW + axle)
        for i, p in enumerate(place):
            a = p if p <= span else 2 * span - p
            over_pier = -a * (span**2 - a**2) / (4 * span**2) if 0 <= a <= span else 0.0
            left = over_pier / span + (span - a) / span * (0 <= p <= span)
            moments[i] += left * sensor - max(sensor - p, 0.0) * (p >= 0)
    expected = 1e3 * finite_elements.AXLE_LOAD * moments / finite_elements.BENDING
    near = [
        np.min(np.abs(np.asarray(p + finite_elements.AXLES) - sensor)) > finite_elements.ELEMENT
        for p in np.asarray(finite_elements.SPEED * physics.WINDOW)
    ]
    np.testing.assert_allclose(ours[np.array(near)], expected[np.array(near)], atol=2e-4)


def by_runge_and_kutta(m):
    return oscillators.oscillation(m, 0.0, 1.0, 1.0)


def by_diffrax(m):
    diffrax = pytest.importorskip("diffrax")
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, state, m: jnp.stack([state[1], -state[0] / m])),
        diffrax.Tsit5(),
        t0=0.0,
        t1=9.95,
        dt0=None,
        y0=jnp.array([1.0, 0.0]),
        args=m,
        saveat=diffrax.SaveAt(ts=physics.TIMES),
        stepsize_controller=diffrax.PIDController(rtol=1e-7, atol=1e-8),
        adjoint=diffrax.DirectAdjoint(),
    )
    return solution.ys[:, 0]


@pytest.mark.parametrize("solve", [by_runge_and_kutta, by_diffrax])
def test_a_physics_may_solve_a_differential_equation(solve):
    """Value and gradient are those of the oscillator's closed form."""
    physics_fn = physics.oscillator().physics
    closed = lambda m: physics_fn({"m": m})
    both = compiled(lambda m: [(f(m), jax.jacfwd(f)(m)) for f in (solve, closed)])
    ours, theirs = both(1.5)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


# ---------------------------------------------------------------------------------------
# At the door.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"guide": "full"}, "Unknown guide"),
        ({"domain": None, "classes": None}, "a domain, classes or both"),
        ({"reference": {"c": C[0]}}, "reference must have"),
        ({"known": np.zeros(ROWS)}, "known must be"),
        ({"networks": {"decoder": Given(lambda x: x)}}, "the names are"),
        ({"networks": {"residual": Given(lambda x: x)}}, "must map"),
    ],
)
def test_options_that_do_not_fit(change, words):
    with pytest.raises(ValueError, match=words):
        build(**change)


@pytest.mark.parametrize(
    ("priors", "physics_fn", "words"),
    [
        ({"z_c": dist.Normal(0, 1)}, lambda p: X[0], "other sites"),
        ({"a": dist.Normal(0, 1).expand([2])}, lambda p: X[0], "no batch shape"),
        ({"a": dist.Normal(0, 1)}, lambda p: p["a"], "one response"),
    ],
)
def test_physics_that_does_not_fit(priors, physics_fn, words):
    with pytest.raises(ValueError, match=words):
        physics_vae.physics_vae(physics_fn, priors, X, domain=continuous(C))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((X, C[:2], Y), "first axis"), ((X, C[:, 0], Y), "c must have shape"), ((), "num_records")],
)
def test_arrays_that_do_not_fit(arguments, words):
    with pytest.raises(ValueError, match=words):
        seed(usual().model, KEY)(*arguments)


def test_labels_that_are_not_there():
    vae = build(classes=None)
    with pytest.raises(ValueError, match="got no label"):
        seed(vae.model, KEY)(X, C, Y)
    with pytest.raises(ValueError, match="finite"):
        continuous(np.array([[np.nan]]))
    with pytest.raises(ValueError, match="c has .*nan.* in record 3.*pass has_c"):
        seed(vae.model, KEY)(X, np.where(np.arange(ROWS)[:, None] == 3, np.nan, C))
    has_c = np.arange(ROWS) != 3
    seed(vae.model, KEY)(X, np.where(has_c[:, None], C, np.nan), has_c=has_c)
    with pytest.raises(ValueError, match="y has 7 in record 0"):
        seed(build(domain=None).model, KEY)(X, None, np.full(ROWS, 7))
