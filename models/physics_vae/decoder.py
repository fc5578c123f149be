"""The model of `physics_vae`: latents given labels, physics plus residual, labels given latents."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from probbp.models.physics_vae.records import observe, records_plate, rows_of
from probbp.ops import gradient_reversal


def model_of(physics, priors, labels, net, reference, overall, num_outputs, spread_of_z):
    """Return the NumPyro model.

    Args:
        physics: of one record.
        priors: of the physics' parameters.
        labels: "c" and "y", those that there are.
        net: the name of a network to the network.
        reference: labels at which the residual is zero, or `None`.
        overall: scale of the responses.
        num_outputs: of a response.
        spread_of_z: middle and spread (2, n) of the physics' parameters.
    """

    def model(
        x=None,
        c=None,
        y=None,
        *,
        known=None,
        has_c=None,
        has_y=None,
        subsample_size=None,
        num_records=None,
        strength=-1.0,
        relative=False,
        invariance=None,
        label_weight=1.0,
        heads=True,
    ):
        rows = rows_of(labels, x, c, y, known, has_c, has_y, num_records)
        sigma = numpyro.param("sigma_x", overall, constraint=dist.constraints.positive)
        if relative:
            strength = strength * jax.lax.stop_gradient(sigma) ** 2 / num_outputs
        with records_plate(rows, subsample_size) as rows:
            x = rows["x"]
            parameters = {name: numpyro.sample(name, p) for name, p in priors.items()}
            z = {
                name: numpyro.sample(f"z_{name}", _conditional_prior(net, name, label, rows))
                for name, label in labels.items()
            }
            response = _response(physics, parameters, rows["known"])
            residual = overall * _residual(net, labels, reference, z, strength)
            numpyro.deterministic("physics", response)
            numpyro.deterministic("residual", residual)
            prediction = numpyro.deterministic("prediction", response + residual)
            numpyro.sample("x", dist.Normal(prediction, sigma).to_event(1), obs=x)
            if not heads:
                return
            for name, label in labels.items():
                outputs = net(f"head_{name}")(z[name])
                numpyro.deterministic(f"{name}_mean", label.mean(outputs))
                # Without x all is drawn, and a label is what the draws are conditioned on.
                value, has = (None, None) if x is None else (rows[name], rows[f"has_{name}"])
                with numpyro.handlers.scale(scale=label_weight):
                    observe(name, label.likelihood(outputs), value, has)
                if invariance is not None and x is not None:
                    told = _reversed(parameters, spread_of_z, invariance)
                    outputs = net(f"adversary_{name}")(told)
                    observe(f"{name}_adversary", label.likelihood(outputs), value, has)

    return model


def _prior(net, name, features):
    mean, log_scale = jnp.split(net(f"prior_{name}")(features), 2, -1)
    return dist.Normal(mean, jnp.exp(jnp.clip(log_scale, -7.0, 3.0))).to_event(1)


def _conditional_prior(net, name, label, rows):
    """Return p(z | label), the label summed over or sampled in rows that lack it."""
    value, has = rows[name], rows[f"has_{name}"]
    if has is None:
        return _prior(net, name, label.features(value))
    if label.marginal.has_enumerate_support:
        support = label.marginal.enumerate_support(expand=False)
        weights = label.marginal.log_prob(support) + jnp.zeros((*has.shape, 1))
        # Finite, so that no derivative is 0 * inf.
        is_value = value[:, None] == support
        weights = jnp.where(has[:, None], jnp.where(is_value, 0.0, -1e9), weights)
        components = _prior(net, name, label.features(support)).expand(weights.shape)
        return dist.MixtureSameFamily(dist.Categorical(logits=weights), components)
    missing = numpyro.sample(f"{name}_missing", label.marginal.mask(~has))
    has = has.reshape(has.shape + (1,) * (missing.ndim - has.ndim))
    return _prior(net, name, label.features(jnp.where(has, value, missing)))


def _response(physics, parameters, known):
    """Map the physics over records."""
    if known is None:
        return jax.vmap(physics)(parameters)
    return jax.vmap(physics)(parameters, known)


def _residual(net, labels, reference, z, strength):
    """Return the residual (records, outputs) in units of the responses' scale."""
    network = net("residual")
    z_ref = None if reference is None else _mean_latents(net, labels, reference)
    residual = network(gradient_reversal(jnp.concatenate(list(z.values()), -1), strength))
    if z_ref is not None:
        residual -= network(gradient_reversal(z_ref, strength))
    return residual


def _mean_latents(net, labels, reference):
    """Return the residual's latents at the reference."""
    values = {name: jnp.asarray(reference[name])[None] for name in labels}
    means = [_prior(net, name, labels[name].features(values[name])).mean for name in labels]
    return jnp.concatenate(means, -1)


def _reversed(parameters, spread_of_z, strength):
    """Return the physics' parameters (records, n) in units of their spread, gradient reversed."""
    values = [value.reshape(len(value), -1) for value in parameters.values()]
    shift, spread = spread_of_z
    return gradient_reversal((jnp.concatenate(values, -1) - shift) / spread, strength)
