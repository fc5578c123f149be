"""What is stiffness, and what is temperature? A physical model with a residual, kept apart.

A thousand beams deflect under a load. Beam theory gives the deflection from stiffness E and the
load's position x_F; in truth a support gives way (log_k), in three grades of which half are
labelled, and temperature T bows the beam. A variational autoencoder adds to the theory a residual
that depends on temperature and grade (Koune & Cicirello, 2025, arXiv:2506.13658). Trained as usual,
strength -1, the residual's latents may carry what is the physics'; with the gradient cut (0) or
reversed, they can't.
"""

import sys
from functools import partial

import arviz as az
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from numpyro.infer import Trace_ELBO

import probbp
from probbp.models import physics, physics_vae

case = physics.beam("offset")
train = physics.simulate(jax.random.key(0), case, 1024)
test = physics.simulate(jax.random.key(1), case, 1000)
is_labelled = jax.random.bernoulli(jax.random.key(2), 0.5, (1024,))


def grades(records):
    return jnp.digitize(records.factors["log_k"], jnp.array([6.67, 7.33]))


def build(rng_key):
    """The physics is a function of named parameters, with priors on their supports.

    Networks may be your own: the encoder is the paper's, with one hidden layer.
    """
    rngs = nnx.Rngs(rng_key)
    encoder = physics_vae.MLP((32, 128, 6 * (6 + 3) // 2), rngs, activation=jax.nn.relu)
    return physics_vae.physics_vae(
        case.physics,
        case.priors,
        train.x,
        domain=physics_vae.continuous(train.c),
        classes=physics_vae.categorical(3),
        networks={"encoder": encoder},
        rngs=rngs,
    )


@jax.jit
@partial(jax.vmap, in_axes=(0, None))
@partial(jax.vmap, in_axes=(None, 0))
def fit(strength, rng_key, num_steps=1500):
    """SVI takes it as any other model; the strength is traced, so that all fits are one program."""
    vae, optimiser = build(rng_key), optax.adam(optax.cosine_decay_schedule(4e-3, num_steps))
    svi = physics_vae.svi(vae, optimiser, strength=lambda step: strength, loss=Trace_ELBO())
    # Grades are few nats beside 32 deflections: they count ten times.
    options = {"has_y": is_labelled, "label_weight": 10.0, "subsample_size": 128}
    data = train.x, train.c, grades(train)
    return svi.run(rng_key, num_steps, *data, **options, progress_bar=False).params


strengths = {"-1: plain": -1.0, "0: cut": 0.0, "1/256: reversed": 1 / 256}
fits = fit(jnp.array(list(strengths.values())), jax.random.split(jax.random.key(3), 2))
vae = build(jax.random.key(0))
predict = jax.jit(partial(physics_vae.predict, vae, num_samples=16))
figure = plt.figure(figsize=(12, 7), layout="constrained")
above, below = figure.subfigures(2, 1)

# How well is each cause read off each group of latents, one draw of the posterior?
print("Two fits of each\nstrength              error of E      error of x_F      right grade")
for ax, (i, name) in zip(above.subplots(1, 3), enumerate(strengths), strict=True):
    tables, scores = [], []
    for seed in range(2):
        params = jax.tree.map(lambda leaf, i=i, seed=seed: leaf[i, seed], fits)
        draws = predict(jax.random.key(4), params, test.x)
        errors = [jnp.mean((draws[p].mean(0) - test.factors[p]) ** 2) ** 0.5 for p in case.priors]
        scores.append([*errors, jnp.mean(draws["y_mean"].mean(0).argmax(-1) == grades(test))])
        groups = {
            "$z_x$": jnp.stack([draws[p][0] for p in case.priors], -1),
            "$z_c$": draws["z_c"][0],
            "$z_y$": draws["z_y"][0],
        }
        table = physics_vae.disentanglement(groups, test.factors)
        tables.append([list(row.values()) for row in table.values()])
    e, x_f, right = np.transpose(scores)
    print(
        f"{name:18s}{e[0]:8.3f},{e[1]:6.3f}{x_f[0]:10.3f},{x_f[1]:6.3f}"
        f"{right[0]:10.1%},{right[1]:6.1%}"
    )
    cells = np.mean(tables, 0)
    ax.imshow(cells, vmin=0, vmax=1, cmap="Blues")
    for (row, column), cell in np.ndenumerate(cells):
        ax.text(column, row, f"{cell:.2f}", ha="center", va="center", color="tab:red")
    ax.set_xticks(range(4), list(test.factors))
    ax.set_yticks(range(3), list(groups))
    ax.set_title(f"$R^2$, strength {name}")

# Cut: one beam as it is, and what it would do at other temperatures. Its physics stays the same.
params = jax.tree.map(lambda leaf: leaf[1, 0], fits)
truth = {name: value[0] for name, value in test.factors.items()}
panels = dict(zip(("physics", "residual", "prediction"), below.subplots(1, 3), strict=True))
for temperature, colour in zip((-10.0, -3.0, 4.0), ("tab:blue", "0.5", "tab:orange"), strict=True):
    there = jnp.array([[temperature]])
    draws = physics_vae.predict(vae, jax.random.key(5), params, test.x[:1], there, num_samples=200)
    for site, ax in panels.items():
        low, middle, high = np.quantile(draws[site][:, 0], [0.025, 0.5, 0.975], axis=0)
        ax.fill_between(physics.POINTS, low, high, color=colour, alpha=0.3)
        ax.plot(physics.POINTS, middle, color=colour, label=f"{temperature:.0f} deg C")
        ax.set_title(f"{site} of one beam [mm]")
        ax.set_xlabel("along the beam [m]")
    clean = case.response(truth | {"T": temperature})
    panels["prediction"].plot(physics.POINTS, clean, "k:", linewidth=1)
panels["prediction"].plot([], [], "k:", label="truth")
panels["prediction"].legend()
figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "physics_vae.png")

# The encoder's posterior is a guess; its Pareto k says whether that is good enough (below 0.7), and
# if it is not, chains on the true one start from it.
given = test.c[0], grades(test)[0]
refined = physics_vae.refinement(vae, params, test.x[0], *given)
rows = test.x[:1], *(label[None] for label in given)
k = physics_vae.pareto_k(vae, jax.random.key(6), params, *rows, num_samples=500)
posterior = probbp.sample(
    jax.random.key(7),
    partial(probbp.mala, refined.logdensity_fn),
    refined.position,
    num_warmup=1500,
    num_samples=1000,
    thinning=10,
    metric="dense",
    dispersion=0.01,
    postprocess_fn=refined.constrain_fn,
    progress_bar=False,
)
print(f"\nThat beam: Pareto k {k[0]:.2f}; E = {truth['E']:.2f}, x_F = {truth['x_F']:.3f} in truth")
print(az.summary(posterior, var_names=["E", "x_F", "z_c", "z_y"], round_to=3).to_string())
