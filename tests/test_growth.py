"""Growth: the state machine on a scripted host, and losses, Flax and SVI as hosts."""

from functools import cache, partial
from types import SimpleNamespace

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from cheap import compiled, key_of, normal
from flax import linen, nnx
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from probbp.models import growth
from probbp.models.growth.acceptance import Proposal, Search, propose
from probbp.models.growth.machine import Fit, Host
from probbp.ops import dendrites as ops
from probbp.ops.dendrites import Candidate, Dendrites
from probbp.runs.fingerprints import fingerprint

KEY = key_of(0)


def same(a, b):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left, right)


# ---------------------------------------------------------------------------------------
# The machine, on a host whose scores are written down: by the number of sets, epoch by epoch.


def scripted(scores, asked=lambda num_sets: True):
    """Return a host whose state counts the epochs of a phase."""

    def like(masks):
        there = ops.empty(jnp.zeros((1, 1)), len(masks["layer"]))
        return Fit((jnp.zeros(()), jnp.zeros((), int)), {"layer": there})

    def epoch(rng_key, fit):
        draw, count = fit.state
        num_sets = fit.dendrites["layer"].mask.shape[0]
        script = scores[num_sets]
        draw = draw + jax.random.normal(rng_key)
        return Fit((draw, count + 1), fit.dendrites), script[min(int(count), len(script) - 1)]

    def propose(rng_key, fit):
        num_sets = fit.dendrites["layer"].mask.shape[0]
        u = jax.random.normal(rng_key, (1, 1))
        candidate = Candidate(u, jnp.zeros(1), jnp.zeros((num_sets, 1)))
        mask = jnp.full(1, float(asked(num_sets)))
        zeros = {"layer": jnp.zeros(1)}
        return Proposal({"layer": candidate}, {"layer": mask}, *4 * (zeros,))

    def grow(fit, proposal, slot):
        there = ops.grow(fit.dendrites["layer"], proposal.candidates["layer"])
        return Fit((fit.state[0], jnp.zeros((), int)), {"layer": there})

    first = partial(like, {"layer": []})
    return SimpleNamespace(
        init=first,
        like=like,
        epoch=epoch,
        propose=propose,
        grow=grow,
        params=lambda fit: fit.state,
        layer=None,
        max_sets=None,
        programs=lambda fit: {},
    )


PARTS = [name for name in vars(Host) if not name.startswith("_")]


def but(host, **changes):
    """Return a host with other methods."""
    return SimpleNamespace(**{name: getattr(host, name) for name in PARTS} | changes)


run = partial(growth.grow, KEY, patience=2, progress_bar=False)


def kinds(result):
    return [event.kind for event in result.history if event.kind != "neurons"]


def test_a_set_that_helps_is_kept():
    result = run(scripted([[1, 2, 3], [2, 4, 5], [3, 6, 7]]), max_sets=2)
    assert kinds(result) == ["kept", "grown", "kept", "grown", "kept", "stopped"]
    assert result.score == 7
    assert result.history[-1].num_dendrites == 2
    # Back to the best epoch of the phase: three of them, and two in which nothing rose.
    assert [e.epoch for e in result.history if e.kind == "kept"] == [5, 10, 15]
    assert result.params[1] == 3


def test_a_set_that_does_not_help_is_taken_back_and_tries_end_it():
    result = run(scripted([[1, 2, 3], [1, 2, 3.0005]]), max_sets=3, max_tries=3)
    again = ["grown", "taken back"]
    assert kinds(result) == ["kept", *3 * again, "stopped"]
    # What is left is the network of the first phase, to the bit.
    base = run(scripted([[1, 2, 3]]), max_sets=0)
    same(result.params, base.params)
    same(result.dendrites, base.dendrites)
    assert result.score == 3
    assert result.history[-1].num_dendrites == result.history[-1].num_sets == 0


def test_tries_start_anew_after_a_success():
    scores = [[1], [0, 0, 0, 0, 0], [5]]
    results = iter([0.0, 2.0, 0.0, 0.0])

    def epoch(rng_key, fit):
        if fit.dendrites["layer"].mask.shape[0] == 0:
            return fit, 1.0
        if int(fit.state[1]) == 0:
            epoch.now = next(results)
        return Fit((fit.state[0], fit.state[1] + 1), fit.dendrites), epoch.now

    result = run(but(scripted(scores), epoch=epoch), max_sets=3, max_tries=2)
    ends = ["taken back", "kept", "taken back", "taken back"]
    expected = [kind for end in ends for kind in ("grown", end)]
    assert kinds(result) == ["kept", *expected, "stopped"]


def test_where_nothing_asks_growth_stops():
    result = run(scripted([[1, 2], [3]], asked=lambda num_sets: num_sets < 1), max_sets=3)
    assert kinds(result) == ["kept", "grown", "kept", "nothing asked", "stopped"]


def test_it_may_ask_before_the_plateau():
    rising = list(range(1, 9))
    host = scripted([rising, [20]], asked=lambda num_sets: num_sets < 1)
    result = run(host, max_sets=1, every=3)
    grown = next(event for event in result.history if event.kind == "grown")
    assert grown.epoch == 3
    refused = run(scripted([rising], asked=lambda num_sets: False), max_sets=1, every=3)
    # Asked three times on the way, and at the plateau.
    assert kinds(refused) == [*3 * ["nothing asked"], "kept", "nothing asked", "stopped"][-6:]
    assert refused.score == 8


def test_a_run_that_was_interrupted_goes_on_to_the_same_end(tmp_path):
    scores = [[1, 2, 3], [2, 4, 5], [3, 4, 4], [0]]
    whole = run(scripted(scores), max_sets=3)
    host, budget = scripted(scores), iter(range(12))

    def epoch(rng_key, fit):
        if next(budget, None) is None:
            raise KeyboardInterrupt
        return host.epoch(rng_key, fit)

    with pytest.raises(KeyboardInterrupt):
        run(but(host, epoch=epoch), max_sets=3, checkpoint=tmp_path / "run")
    resumed = run(host, max_sets=3, checkpoint=tmp_path / "run")
    assert resumed.history == whole.history
    same((resumed.params, resumed.dendrites), (whole.params, whole.dendrites))
    # A finished run is read, not run.
    none = but(host, epoch=None)
    assert run(none, max_sets=3, checkpoint=tmp_path / "run").history == whole.history
    # Nothing else is taken for it, and the folder is left as it is.
    init = lambda: Fit((jnp.ones(()), jnp.zeros((), int)), host.init().dendrites)
    others = {
        "key and start": partial(run, but(host, init=init)),
        "patience": partial(run, host, patience=3),
        "the program": partial(run, but(host, programs=lambda fit: {"the program": (abs, (1,))})),
    }
    for name, another in others.items():
        with pytest.raises(ValueError, match=f"of another run. What differs: {name}"):
            another(max_sets=3, checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="of another run. What differs: key and start"):
        growth.grow(key_of(9), host, patience=2, max_sets=3, checkpoint=tmp_path / "run")
    assert run(none, max_sets=3, checkpoint=tmp_path / "run").history == whole.history
    (tmp_path / "notes" / "2024").mkdir(parents=True)
    with pytest.raises(ValueError, match="is no checkpoint of this function: it holds '2024'"):
        run(host, max_sets=3, checkpoint=tmp_path / "notes")


@pytest.mark.slow
def test_a_checkpoint_belongs_to_all_that_a_host_is_made_of():
    """Data, loss, start and options: as a run is told from another."""

    def prints(host):
        first = host.init()
        return fingerprint(host.programs(first), first, {})

    def of_loss(change=0.0, rate=0.02, **options):
        train, validation = rows(0, 70), rows(700, 740)
        options = {"search": Search(num_steps=10), "batch_size": 10} | options
        train = (train[0], train[1] + change)
        return growth.from_loss(squared, PARAMS, optax.adam(rate), train, validation, **options)

    def of_svi(change=0.0, rate=0.02, **options):
        x = normal(1, 20, 2)
        return growth.from_svi(
            KEY,
            bayesian,
            optax.adam(rate),
            x,
            x + change,
            layers=("out",),
            search=Search(num_steps=10),
            **options,
        )

    every_change = [{}, {"change": 1e-9}, {"rate": 0.03}, {"prior_scale": 2.0}]
    for make, changes in ((of_loss, every_change), (of_svi, every_change[:2])):
        seen = [str(prints(make(**change))) for change in changes]
        assert len({*seen}) == len(changes)
        assert str(prints(make())) == seen[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"patience": 0}, ValueError, "positive"),
        ({"max_sets": 3, "host": but(scripted([[1]]), max_sets=2)}, ValueError, "slots"),
        ({"host": scripted([[np.nan]])}, FloatingPointError, "learning rate"),
    ],
)
def test_the_machine_says_what_is_wrong(options, error, message):
    with pytest.raises(error, match=message):
        growth.grow(KEY, **{"host": scripted([[1]]), "progress_bar": False} | options)


# ---------------------------------------------------------------------------------------
# A loss: Friedman's first function, three hidden neurons.


@cache
def friedman(num):
    x = np.random.default_rng(1).uniform(size=(num, 5))
    y = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2
    y = y + 10 * x[:, 3] + 5 * x[:, 4] + normal(2, num)
    return 3.5 * (x - 0.5), (y - 14.4) / 4.9


def network(params, x, layer):
    hidden = jnp.tanh(layer("hidden", x, params["w0"], params["b0"]))
    return layer("out", hidden, params["w1"], params["b1"])[:, 0]


def squared(params, layer, batch, rng_key):
    x, y = batch
    return jnp.mean((network(params, x, layer) - y) ** 2) / (2 * 0.04)


PARAMS = {
    "w0": normal(3, 5, 3) / 2,
    "b0": np.zeros(3),
    "w1": normal(4, 3, 1) / 2,
    "b1": np.zeros(1),
}


def rows(start, stop, num=1700):
    return jax.tree.map(lambda leaf: leaf[start:stop], friedman(num))


def friedman_host(**options):
    options = {"search": Search(num_steps=100, num_candidates=2)} | options
    train, validation = rows(0, 700), rows(700, 1100)
    return growth.from_loss(squared, PARAMS, optax.adam(0.02), train, validation, **options)


def error(result, host):
    x, y = rows(1100, 1700)
    return jnp.mean((network(result.params, x, host.layer(result.dendrites)) - y) ** 2)


@pytest.mark.slow
def test_a_small_network_grows_what_it_lacks():
    """At most half the error of the base with as many epochs; random dendrites do not get there."""
    paper = {"acceptance": "all", "freeze": True, "perforate": True}
    paper["search"] = Search(num_steps=100, num_candidates=2, partial_out=False)
    paper |= {"slots": 2}
    host = friedman_host(**paper)
    options = {"max_sets": 2, "patience": 5, "max_epochs": 40, "progress_bar": False}
    result = growth.grow(KEY, host, **options)
    base = growth.grow(KEY, host, **options | {"max_sets": 0, "max_epochs": 120, "patience": 120})

    def at_random(key, fit):
        found = host.propose(key, fit)
        kernels = {
            name: jax.random.normal(key, candidate.kernel.shape) / len(candidate.kernel) ** 0.5
            for name, candidate in found.candidates.items()
        }
        candidates = {
            name: candidate._replace(kernel=kernels[name], bias=kernels[name][0])
            for name, candidate in found.candidates.items()
        }
        return found._replace(candidates=candidates)

    random = but(host, propose=at_random)
    placebo = growth.grow(KEY, random, **options)
    assert error(result, host) < error(base, host) / 2
    assert error(placebo, random) > error(base, host) / 2
    # Frozen: both sets are as they were found, in the whole history of training.
    grown = [event for event in result.history if event.kind == "grown"]
    assert [event.num_dendrites for event in grown] == [4, 8]


@pytest.mark.slow
def test_the_same_key_grows_the_same_network_in_slots_or_without(tmp_path):
    options = {"max_sets": 1, "patience": 3, "max_epochs": 6, "progress_bar": False}
    host = friedman_host()
    result = growth.grow(KEY, host, **options, checkpoint=tmp_path / "run")
    grown = [event for event in result.history if event.kind == "grown"]
    assert len(grown) == 1
    resumed = growth.grow(KEY, host, **options, checkpoint=tmp_path / "run")
    assert resumed.history == result.history
    same((resumed.params, resumed.dendrites), (result.params, result.dendrites))
    slots = growth.grow(KEY, friedman_host(slots=1), **options)
    assert [e[:2] + e[3:] for e in slots.history] == [e[:2] + e[3:] for e in result.history]
    np.testing.assert_allclose(slots.score, result.score, rtol=1e-6)
    assert result.history[-1].num_dendrites == sum(d.mask.sum() for d in result.dendrites.values())
    assert result.history[-1].num_params == sum(map(ops.num_params, result.dendrites.values()))


@pytest.mark.parametrize(
    "acceptance", [pytest.param("score test", marks=pytest.mark.slow), "evidence"]
)
def test_neurons_get_what_they_ask_for(acceptance):
    """The first neuron of each layer errs by a branch, the second by noise."""
    x, noise = normal(1, 900, 2), normal(2, 900, 2)
    errors = noise + np.stack([2 * np.tanh(3 * x[:, 0] - 2), np.zeros(900)], -1)
    parts = [ops.Observation(x[rows], errors[rows]) for rows in np.split(np.arange(900), 3)]
    search = Search(optax.adam(0.05), ops.correlation, 4, 60, 1.0, jnp.tanh, True)
    there = {"a": ops.empty(np.zeros((2, 2))), "b": ops.empty(np.zeros((2, 2)))}
    find = compiled(
        partial(propose, search=search, acceptance=acceptance, prior_scale=1.0, level=0.01)
    )
    # The second layer has its neurons the other way round.
    seen = [{"a": part, "b": part._replace(errors=part.errors[:, ::-1])} for part in parts]
    found = find(KEY, *seen, there)
    asking, others = (
        (found.masks["a"][0], found.masks["b"][1]),
        (found.masks["a"][1], found.masks["b"][0]),
    )
    assert sum(map(int, others)) == 0
    # The layers err alike: what one has taken the evidence does not pay for again.
    assert sum(map(int, asking)) == (1 if acceptance == "evidence" else 2)
    assert found.p_values["a"][0] < 1e-6 < found.p_values["a"][1]


def test_what_training_made_superfluous_is_pruned():
    """Two dendrites a neuron: those without a part in the teacher go, waiting slots stay out."""
    x, kernel, noise = normal(1, 400, 2), normal(2, 3, 2, 2), 0.5 * normal(0, 400, 2)
    there = ops.Dendrites(
        kernel,
        np.zeros((3, 2)),
        np.zeros((3, 3, 2)),
        np.array([[1.0, 0.02], [-0.02, -0.8], [9, 9]]),
        np.array([[1.0, 1], [1, 1], [0, 0]]),
    )
    teacher = there._replace(weight=np.array([[1.0, 0], [0, -0.8], [0, 0]]))
    y = compiled(ops.dense)(x, kernel[0], None, teacher) + noise

    def loss(layer):
        return jnp.sum((layer("out", x, kernel[0]) - y) ** 2) / (2 * 0.25)

    pruned = compiled(partial(growth.prune, loss))({"out": there})["out"]
    np.testing.assert_array_equal(pruned.mask, [[1, 0], [0, 1], [0, 0]])


@pytest.mark.parametrize(
    "acceptance", ["evidence", pytest.param("score test", marks=pytest.mark.slow)]
)
def test_pure_noise_asks_for_nothing(acceptance):
    x, _ = friedman(1700)
    data = x, normal(5, 1700)
    train, validation = ([leaf[at] for leaf in data] for at in (slice(700), slice(700, None)))

    def loss(params, layer, batch, rng_key):
        return jnp.mean((layer("out", batch[0], params["w"]) - batch[1][:, None]) ** 2) / 2

    host = growth.from_loss(
        loss,
        {"w": np.zeros((5, 1))},
        optax.adam(0.01),
        train,
        validation,
        acceptance=acceptance,
        level=0.01,
        search=Search(num_steps=50, num_candidates=2),
    )
    result = growth.grow(KEY, host, patience=5, max_epochs=30, progress_bar=False)
    assert kinds(result) == ["kept", "nothing asked", "stopped"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"acceptance": "some"}, "acceptance"),
        ({"layers": ("nobody",)}, "nobody"),
        ({"batch_size": 701}, "batch"),
    ],
)
def test_a_loss_says_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        friedman_host(**options)


# ---------------------------------------------------------------------------------------
# Flax.


class Convolutional(nnx.Module):
    def __init__(self, rngs):
        options = {"rngs": rngs, "padding": "CIRCULAR"}
        self.blocks = nnx.List(
            [nnx.Conv(1, 3, (3, 3), **options), nnx.Conv(3, 2, (3, 3), **options)]
        )
        self.out = nnx.Linear(2 * 16, 4, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = nnx.relu(block(x))
        return self.out(x.reshape(len(x), -1))


def test_a_flax_model_grows_unedited():
    model = Convolutional(nnx.Rngs(0))
    apply, params = growth.from_nnx(model)
    x = normal(0, 40, 4, 4, 1)
    y = np.sum(np.tanh(3 * x[:, :2, :2, 0]), (1, 2))[:, None]
    ours = compiled(lambda params, x: apply(params, ops.grown({}), x))(params, x)
    np.testing.assert_allclose(ours, compiled(model)(x), rtol=1e-12, atol=1e-14)

    def loss(params, layer, batch, rng_key):
        return jnp.mean((apply(params, layer, batch[0]) - batch[1]) ** 2)

    make = partial(growth.from_loss, loss, params, optax.adam(0.01), (x, y), (x, y), batch_size=20)
    assert sorted(make().init().dendrites) == ["blocks.0", "blocks.1", "out"]
    search = Search(num_steps=5, num_candidates=1)
    host = make(layers=("blocks.1",), acceptance="all", search=search)
    first = host.init()
    fit = host.grow(first, host.propose(KEY, first), 0)
    assert fit.dendrites["blocks.1"].kernel.shape == (1, 3, 3, 3, 2)
    grown, plain = compiled(lambda p, d: [apply(p, host.layer(t), x) for t in (d, {})])(
        params, fit.dendrites
    )
    np.testing.assert_array_equal(grown, plain)
    trained, _ = host.epoch(KEY, fit)
    old, new = jax.device_get((fit.dendrites["blocks.1"], trained.dendrites["blocks.1"]))
    assert np.all(new.weight != 0)
    assert np.any(new.kernel != old.kernel)
    # Frozen dendrites have weights in the optimiser's state, and no kernels.
    frozen = make(layers=("blocks.1",), freeze=True, slots=1).init()
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(f.state)) for f in (frozen, first)]
    assert sizes[0] - sizes[1] == 2 * old.weight.size
    grouped = nnx.Conv(2, 2, (1, 1), feature_group_count=2, rngs=nnx.Rngs(0))
    apply, params = growth.from_nnx(grouped)
    with pytest.raises(ValueError, match="groups"):
        apply(params, ops.grown({}), np.ones((1, 2, 2, 2)))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: linen.Dense(3), TypeError, r"got Dense. .*growth.from_loss"),
        (lambda: equinox.nn.Linear(2, 3, key=KEY), TypeError, "got Linear. An Equinox module has"),
        (lambda: nnx.Linear, TypeError, "not its class or its parameters"),
        (lambda: {"kernel": np.ones((2, 3))}, TypeError, "must be a Flax NNX module, got dict"),
        (lambda: nnx.BatchNorm(3, rngs=nnx.Rngs(0)), ValueError, "no nnx.Linear and no nnx.Conv"),
    ],
)
def test_models_in_which_nothing_could_grow_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        growth.from_nnx(make())


# ---------------------------------------------------------------------------------------
# SVI.


def bayesian(x, y=None, *, layer):
    """Two outputs, linear but for their dendrites, with known noise."""
    w = numpyro.sample("w", dist.Normal(0, 1).expand([2, 2]).to_event(2))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(layer("out", x, w), 0.3).to_event(1), obs=y)


@pytest.mark.slow
def test_growth_in_svi_moves_the_elbo_as_foretold():
    x = normal(1, 200, 2)
    # The first output has a branch; nothing is left to grow for the second.
    y = x + np.stack([np.tanh(2 * x @ np.ones(2) - 1), np.zeros(200)], -1)
    y = y + 0.3 * normal(0, *y.shape)
    num_draws = 64
    host = growth.from_svi(
        KEY,
        bayesian,
        optax.adam(0.02),
        x,
        y,
        layers=("out",),
        epoch_steps=500,
        num_draws=num_draws,
        search=Search(num_steps=50, num_candidates=2),
    )
    fit, _ = host.epoch(KEY, host.init())
    proposal = jax.device_get(host.propose(key_of(5), fit))
    np.testing.assert_array_equal(proposal.masks["out"], [True, False])
    grown = host.grow(fit, proposal, 0)
    before, after = jax.device_get((host.params(fit), host.params(grown)))
    # Old sites to the bit, and a new one for the accepted neuron alone.
    same({name: after[name] for name in before}, before)
    new = {name: leaf.shape for name, leaf in after.items() if name not in before}
    assert new == {"out_dendrite_0_auto_loc": (1,), "out_dendrite_0_auto_scale": (1,)}
    loc, scale = (after[f"out_dendrite_0_auto_{part}"][0] for part in ("loc", "scale"))

    # It starts at the posterior of a Gaussian model, whose curvature the drawn labels estimate.
    candidate = proposal.candidates["out"]
    d = np.tanh(x @ candidate.kernel + candidate.bias)[:, 0]
    precision = d @ d / 0.3**2 + 1
    np.testing.assert_allclose(scale**-2, precision, rtol=4 * (2 / (num_draws * 200)) ** 0.5)

    # The jump by hand, at draws of the posterior: noise is Gaussian, and it is exact.
    def jump(w):
        error = (x @ w - y)[:, 0] / 0.3**2
        return ops.elbo_change(loc, scale, -error @ d, d @ d / 0.3**2, 1.0)

    noise = normal(7, 4000, 2, 2)
    jumps = compiled(jax.vmap(jump))(before["w_auto_loc"] + before["w_auto_scale"] * noise)

    # And measured.
    def elbo(dendrites, params):
        model = growth.with_dendrites(bayesian, dendrites)
        guide = AutoNormal(model)
        seed(guide, KEY)(x, y)
        bound = Trace_ELBO(num_particles=500)
        loss = jax.vmap(lambda rng_key: bound.loss(rng_key, params, model, guide, x, y))
        return -compiled(lambda rng_key: loss(jax.random.split(rng_key, 16)))(key_of(6))

    elbos = elbo(fit.dendrites, before), elbo(grown.dendrites, after)
    errors = jumps.std() / 4000**0.5, *(each.std(ddof=1) / 4 for each in elbos)
    difference = elbos[1].mean() - elbos[0].mean() - jumps.mean()
    assert abs(difference) < 4 * np.linalg.norm(errors)
    # What the host foretold, from a few draws of errors and of labels.
    errors = jumps.std() / num_draws**0.5, jumps.mean() * (2 / (num_draws * 200)) ** 0.5
    assert abs(proposal.gains["out"].sum() - jumps.mean()) < 4 * np.linalg.norm(errors)
    # Training goes on, and the ELBO with it.
    _, score = host.epoch(KEY, grown)
    assert score > elbos[1].mean()


def test_a_model_with_dendrites_is_a_numpyro_model():
    x, w = normal(0, 9, 2), normal(1, 2, 2)
    candidate = Candidate(w, np.ones(2), np.zeros((0, 2)))
    there = ops.grow(ops.empty(w), candidate, mask=np.array([0, 1]))
    grown = growth.with_dendrites(bayesian, {"out": there})
    latents = {"w": w, "out_dendrite_0": np.array([3.0])}

    @compiled
    def run():
        sites = trace(substitute(seed(grown, KEY), latents)).get_trace(x)
        return sites["y"]["fn"].base_dist.loc, sites["out_dendrite_0"]["value"]

    loc, value = run()
    expected = x @ w + np.array([0, 3]) * np.tanh(x @ w + 1)
    np.testing.assert_allclose(loc, expected, rtol=0, atol=1e-12)
    assert value.shape == (1,)


def amortised_loss(params, layer, batch, rng_key):
    """The negative ELBO of a Gaussian latent, whose guide's network takes its layers as well."""

    def model(y):
        with numpyro.plate("rows", len(y)):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z**3 / 3, 0.3), obs=y)

    def guide(y):
        hidden = jnp.tanh(layer("encoder", y[:, None], params["w0"], params["b0"]))
        loc, scale = layer("moments", hidden, params["w1"], params["b1"]).T
        with numpyro.plate("rows", len(y)):
            numpyro.sample("z", dist.Normal(loc, jax.nn.softplus(scale)))

    return Trace_ELBO().loss(rng_key, {}, model, guide, batch) / len(batch)


def test_a_guide_grows():
    y = normal(0, 300) ** 3 / 3
    params = {
        "w0": np.ones((1, 2)),
        "b0": np.array([0.0, 1]),
        "w1": np.ones((2, 2)) / 9,
        "b1": np.zeros(2),
    }
    host = growth.from_loss(
        amortised_loss,
        params,
        optax.adam(0.02),
        y[:200],
        y[200:],
        layers=("moments",),
        search=Search(num_steps=50, num_candidates=1),
    )
    fit = host.init()
    for i in range(3):
        fit, _ = host.epoch(key_of(i), fit)
    proposal = host.propose(KEY, fit)
    grown = host.grow(fit, proposal, 0)
    batch = y[200:]
    losses = compiled(lambda *d: [amortised_loss(params, host.layer(x), batch, KEY) for x in d])
    same(*losses(fit.dendrites, grown.dendrites))
    assert isinstance(grown.dendrites["moments"], Dendrites)
