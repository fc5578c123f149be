r"""Growth inside NumPyro's SVI: a posterior over the weight of every dendrite.

The dendrites themselves are frozen basis functions; what is random is v, with prior N(0, tau^2). A
neuron without a dendrite has no site: each one costs its divergence. The ELBO charges for capacity,
and so it needs no validation rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.svi import SVIState

from probbp.checks import check_count, check_number, check_rng_key
from probbp.models.growth.acceptance import Proposal, Search, by_layer, checked_search, said
from probbp.models.growth.machine import Fit, Host, programs_of
from probbp.models.growth.weights import connected, masks_of, random_layer, sites_of
from probbp.ops import dendrites as ops
from probbp.ops.dendrites import Observation


def from_svi(
    rng_key: jax.Array,
    model: Callable[..., Any],
    optimiser: Any,
    *args: Any,
    guide: Callable[[Callable], Callable] = AutoNormal,
    layers: Sequence[str],
    prior_scale: float = 1.0,
    accept_all: bool = False,
    epoch_steps: int = 100,
    num_particles: int = 64,
    num_draws: int = 16,
    search: Search | None = None,
    **kwargs: Any,
) -> Host:
    r"""Return what `grow` drives: a NumPyro model of a network whose dendrites are random.

    **Sites.** The weights of the set k of a layer's dendrites are the site `<layer>_dendrite_<k>`,
    as long as there are accepted neurons. Growth makes a new model and a new guide; parameters of
    old sites are carried over by name, in their unconstrained form, bit for bit.

    **The jump.** Candidates are fitted to the errors :math:`E_q\,\partial(-\log p)/\partial z` at
    draws of the posterior, and accepted greedily by the joint evidence of their weights given
    that posterior, in closed form. A guide with `<site>_auto_loc` and `<site>_auto_scale`, as
    `AutoNormal` has them, starts at the weights' Laplace posterior, so that the ELBO rises at once
    by `joint_log_evidence_gain` of the accepted, less what independent weights cannot express. What
    training then adds is not foreseen: the prediction knows of v alone. The curvature is the Fisher
    information, from labels drawn by the model.

    The score of an epoch is an estimate of the ELBO, with the same noise in each epoch of a phase.
    Perforation is not offered: SVI needs the gradient. Growth is a search over models, by
    optimisation; for averages over models the evidence of each is a rough weight.

    Args:
        rng_key: of the guide's start and the scores.
        model: `(*args, layer, **kwargs)`, which calls `layer(name, x, kernel, bias)` of
            `probbp.ops.dendrites.grown`; continuous latent sites.
        optimiser: of Optax or NumPyro.
        args: arrays of the model, the data.
        guide: `model -> guide`.
        layers: names of the layers that may grow.
        prior_scale: tau.
        accept_all: whether every neuron gets a dendrite, whatever the evidence says.
        epoch_steps: steps of SVI in an epoch.
        num_particles: of an epoch's score.
        num_draws: of the posterior, for the errors.
        search: how candidates are sought; `Search()` by default.
        kwargs: options of the model.

    Raises:
        ValueError: for layers that the model does not call.

    Returns:
        A `Host`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> import optax
        >>> from numpyro.infer import Predictive
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from probbp.models.growth import Search, grow, with_dendrites
        >>> def model(x, y=None, *, layer):
        ...     w = numpyro.sample("w", dist.Normal(0, 1).expand([2, 1]).to_event(2))
        ...     with numpyro.plate("rows", len(x)):
        ...         numpyro.sample("y", dist.Normal(layer("out", x, w)[:, 0], 0.1), obs=y)
        >>> x = jax.random.normal(jax.random.key(0), (100, 2))
        >>> y = jnp.tanh(2 * x[:, 0] * x[:, 1])
        >>> host = from_svi(
        ...     jax.random.key(1), model, optax.adam(0.05), x, y, layers=["out"],
        ...     search=Search(num_steps=20))
        >>> result = grow(jax.random.key(2), host, max_sets=1, max_epochs=3, progress_bar=False)
        >>> grown = with_dendrites(model, result.dendrites)
        >>> latents = Predictive(AutoNormal(grown), params=result.params, num_samples=5)
        >>> draws = latents(jax.random.key(3), x, y)
        >>> Predictive(grown, posterior_samples=draws)(jax.random.key(4), x[:7])["y"].shape
        (5, 7)
    """
    check_rng_key("rng_key", rng_key)
    check_number("prior_scale", prior_scale, "(0, inf)")
    epoch_steps = check_count("epoch_steps", epoch_steps)
    num_particles = check_count("num_particles", num_particles)
    num_draws = check_count("num_draws", num_draws)
    search = checked_search(search)
    layer = partial(ops.grown, activation=search.activation)
    kernels = _kernels(rng_key, model, args, kwargs, layers)
    rules = {"prior_scale": prior_scale, "accept_all": accept_all, "num_draws": num_draws}
    accept = jax.jit(partial(_accept, search=search, **rules))
    built = partial(
        _program,
        model,
        guide,
        optimiser,
        args,
        kwargs,
        layer_fn=layer,
        prior_scale=prior_scale,
        num_particles=num_particles,
    )
    shapes = {name: kernels[name] for name in layers}
    return _SVIHost(rng_key, shapes, args, epoch_steps, num_draws, accept, built, layer)


@dataclass(frozen=True)
class _SVIHost:
    """A NumPyro model, and the programs of each structure of its sites."""

    rng_key: jax.Array
    kernels: dict[str, jax.ShapeDtypeStruct]
    args: tuple
    epoch_steps: int
    num_draws: int
    accept: Callable[..., Proposal]
    built: Callable[..., "_Program"]
    layer: Callable
    max_sets: None = None
    known: dict[Any, "_Program"] = field(default_factory=dict)

    def program(self, dendrites):
        """Return SVI, and its compiled functions, for the sites that these dendrites have."""
        masks = masks_of(dendrites)
        sites = sites_of(masks)
        structure = tuple((site, tuple(neurons)) for site, (_, _, neurons) in sites.items())
        sizes = tuple((name, len(mask)) for name, mask in sorted(masks.items()))
        if (structure, sizes) not in self.known:
            self.known[structure, sizes] = self.built(sites)
        return self.known[structure, sizes]

    def init(self):
        return self.like({name: [] for name in self.kernels})

    def like(self, masks):
        dendrites = {}
        for name, kernel in self.kernels.items():
            there = ops.empty(jnp.zeros(kernel.shape, kernel.dtype), len(masks[name]))
            mask = jnp.asarray(masks[name], there.mask.dtype).reshape(there.mask.shape)
            dendrites[name] = there._replace(mask=mask)
        state = self.program(dendrites).init(self.rng_key, dendrites)
        return Fit(state.optim_state, dendrites)

    def epoch(self, rng_key, fit):
        run = self.program(fit.dendrites)
        shared = fit.state, fit.dendrites, self.args
        state, score = run.epoch(rng_key, self.rng_key, *shared, self.epoch_steps)
        return Fit(state, fit.dendrites), score

    def propose(self, rng_key, fit):
        key_draws, key_search = jax.random.split(rng_key)
        run = self.program(fit.dendrites)
        shared = fit.state, fit.dendrites, self.args
        observed, labelled = (
            {name: each[name] for name in self.kernels}
            for each in run.observe(key_draws, *shared, self.num_draws)
        )
        return self.accept(key_search, observed, labelled, fit.dendrites)

    def grow(self, fit, proposal, slot):
        del slot
        old = self.program(fit.dendrites)
        dendrites = {
            name: ops.grow(there, proposal.candidates[name], proposal.masks[name])
            for name, there in fit.dendrites.items()
        }
        new = self.program(dendrites)
        state = new.init(self.rng_key, dendrites, _starts(old, new, proposal))
        params = dict(new.svi.optim.get_params(state.optim_state))
        known = old.svi.optim.get_params(fit.state)
        params |= {name: leaf for name, leaf in known.items() if name in params}
        return Fit(new.svi.optim.init(params), dendrites)

    def params(self, fit):
        return self.program(fit.dendrites).constrained(fit.state)

    def programs(self, fit):
        return programs_of(self, fit)


class _Program(NamedTuple):
    """SVI and its compiled functions for one structure of sites."""

    sites: dict[str, Any]
    svi: SVI
    init: Callable[..., Any]
    constrained: Callable[..., Any]
    epoch: Callable[..., Any]
    observe: Callable[..., Any]


def _program(
    model, guide, optimiser, args, kwargs, weights, *, layer_fn, prior_scale, num_particles
):
    def grown_model(*args, dendrites, **kwargs):
        layer = random_layer(dendrites, weights, layer_fn, prior_scale)
        return model(*args, layer=layer, **kwargs)

    svi = SVI(grown_model, guide(grown_model), optimiser, Trace_ELBO())
    bound = Trace_ELBO(num_particles=num_particles)

    def init(rng_key, dendrites, starts=None):
        # A start of no parameter's name would become a parameter.
        state = svi.init(rng_key, *args, dendrites=dendrites, **kwargs)
        known = svi.get_params(state)
        starts = {name: leaf for name, leaf in (starts or {}).items() if name in known}
        if not starts:
            return state
        return svi.init(rng_key, *args, dendrites=dendrites, init_params=starts, **kwargs)

    def constrained(optim_state):
        return svi.constrain_fn(svi.optim.get_params(optim_state))

    @partial(jax.jit, static_argnames="length")
    def epoch(rng_key, score_key, optim_state, dendrites, args, length):
        def step(state, _):
            return svi.update(state, *args, dendrites=dendrites, **kwargs)[0], None

        state = SVIState(optim_state, None, rng_key)
        state = jax.lax.scan(step, state, None, length=length)[0]
        params = constrained(state.optim_state)
        loss = bound.loss(
            score_key, params, svi.model, svi.guide, *args, dendrites=dendrites, **kwargs
        )
        return state.optim_state, -loss

    @partial(jax.jit, static_argnames="num_draws")
    def observe(rng_key, optim_state, dendrites, args, num_draws):
        def draw(key):
            key_guide, key_model, key_labels = jax.random.split(key, 3)
            with_params = substitute(seed(svi.guide, key_guide), constrained(optim_state))
            sites = trace(with_params).get_trace(*args, dendrites=dendrites, **kwargs)
            latents = {n: s["value"] for n, s in sites.items() if s["type"] == "sample"}
            layer = layer_fn(connected(dendrites, weights, latents))

            def loss(layer, are_drawn):
                plain = substitute(seed(model, key_model), latents)
                sites = trace(plain).get_trace(*args, layer=layer, **kwargs)
                return -_log_likelihood(sites, key_labels if are_drawn else None)

            seen = ops.observe(partial(loss, are_drawn=False), layer)[1]
            drawn = ops.observe(partial(loss, are_drawn=True), layer)[1]
            return seen, {name: each.errors for name, each in drawn.items()}

        drawn = jax.lax.map(draw, jax.random.split(rng_key, num_draws))
        # The examples of all draws, one after the other.
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), drawn)

    return _Program(weights, svi, init, constrained, epoch, observe)


def _starts(old, new, proposal):
    """Return where the guide's parameters of new sites start: at the weights' posterior."""
    starts = {}
    for site, (name, _, neurons) in new.sites.items():
        if site not in old.sites:
            starts[f"{site}_auto_loc"] = proposal.weights[name][neurons]
            starts[f"{site}_auto_scale"] = proposal.scales[name][neurons]
    return starts


def _log_likelihood(sites, key_labels):
    """Return that of the data, or of labels that the model draws: its curvature's expectation."""
    total = 0.0
    for i, site in enumerate(sites.values()):
        if site["type"] != "sample" or not site["is_observed"]:
            continue
        value = site["value"]
        if key_labels is not None:
            key = jax.random.fold_in(key_labels, i)
            value = jax.lax.stop_gradient(site["fn"].sample(key))
        log_prob = jnp.sum(site["fn"].log_prob(value))
        total = total + (1.0 if site["scale"] is None else site["scale"]) * log_prob
    return total


def _accept(
    rng_key, observed, labelled, dendrites, *, search, prior_scale, accept_all, num_draws
) -> Proposal:
    """Seek dendrites at the posterior's draws, and accept by the evidence of their weights."""
    key_halves, key_search = jax.random.split(rng_key)
    found, gradients, roots = {}, {}, {}
    keys = jax.random.split(key_search, len(observed))
    for key, name in zip(keys, sorted(observed), strict=True):
        there, seen = dendrites[name], observed[name]
        num_examples = len(seen.inputs) // num_draws
        # The draws of one example are on one side.
        order = jax.random.permutation(key_halves, num_examples)
        is_held = jnp.tile(order >= num_examples // 2, num_draws)
        rows = jnp.argsort(is_held, stable=True)
        half = num_draws * (num_examples // 2)
        halves = (rows[:half], rows[half:])
        train, held = (
            ops.rows(Observation(*(leaf[at] for leaf in seen)), there, activation=search.activation)
            for at in halves
        )
        found[name] = ops.search(key, train, held, **search._asdict())
        d = said(found[name].candidate, seen.inputs, there, search.activation)
        gradients[name] = -ops.contributions(d, seen.errors).sum(0) / num_draws
        roots[name] = ops.contributions(d, labelled[name]) / num_draws**0.5

    names = sorted(observed)
    gradient = jnp.concatenate([gradients[name] for name in names])
    root = jnp.concatenate([roots[name] for name in names], 1)
    curvature = root.T @ root
    mask, gains = ops.greedy(gradient, curvature, prior_scale)
    if accept_all:
        mask = jnp.ones_like(mask)
    # The posterior's mean given the accepted, and the scales of its best independent one.
    taken = mask.astype(gradient.dtype)
    precision = jnp.eye(len(mask)) / prior_scale**2 + taken[:, None] * curvature * taken
    weights = jnp.linalg.solve(precision, taken * gradient)
    scales = jax.lax.rsqrt(jnp.diag(precision))
    return Proposal(
        {
            name: found[name].candidate._replace(
                kernel=found[name].candidate.kernel.reshape(dendrites[name].kernel.shape[1:])
            )
            for name in names
        },
        by_layer(mask, gradients),
        by_layer(weights, gradients),
        {name: found[name].score for name in names},
        None,
        by_layer(gains, gradients),
        by_layer(scales, gradients),
    )


def _kernels(rng_key, model, args, kwargs, layers):
    kernels, plain = {}, ops.grown({})

    def note(name, x, kernel, bias=None, **options):
        kernels[name] = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)
        return plain(name, x, kernel, bias, **options)

    trace(seed(model, rng_key)).get_trace(*args, layer=note, **kwargs)
    unknown = [name for name in layers if name not in kernels]
    if unknown:
        raise ValueError(f"The model calls the layers {list(kernels)}, and not {unknown}.")
    return kernels
