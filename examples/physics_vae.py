"""What is mass, and what is damping? A physical model with a residual, kept apart.

A thousand oscillators swing from rest. The physics knows cos(t / sqrt(m)) and no more; in truth
there is damping, which is known for half of them, the spring softens with the temperature, and the
start varies. A variational autoencoder adds to the physics a residual that depends on temperature
and damping (Koune & Cicirello, 2025, arXiv:2506.13658). Trained as usual, strength -1, the residual
takes what is the physics'; with the gradient cut (0) or reversed, it can't.
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

case = physics.oscillator()
train = physics.simulate(jax.random.key(0), case, 1024)
test = physics.simulate(jax.random.key(1), case, 2000)
is_labelled = jax.random.bernoulli(jax.random.key(2), 0.5, (1024,))

# The physics is a function of named parameters, with priors on their supports. Networks may be your
# own: here the paper's encoder, with one hidden layer.
sizes = (64, 128, 5 * (5 + 3) // 2)
vae = physics_vae.physics_vae(
    case.physics,
    case.priors,
    train.x,
    domain=physics_vae.continuous(train.c),
    classes=physics_vae.continuous(train.y[is_labelled]),
    networks={"encoder": physics_vae.MLP(sizes, nnx.Rngs(0), activation=jax.nn.relu)},
)

# SVI takes it as any other model; the strength is traced, so that three fits are one program.
strengths = {"-1: plain": -1.0, "0: cut": 0.0, "1/128: reversed": 1 / 128}
num_steps = 5000


@jax.jit
@jax.vmap
def fit(strength):
    optimiser = optax.adam(optax.cosine_decay_schedule(2e-3, num_steps))
    svi = physics_vae.svi(vae, optimiser, strength=lambda step: strength, loss=Trace_ELBO())
    # Two labels are few nats beside 64 displacements: they count ten times.
    options = {"has_y": is_labelled, "label_weight": 10.0, "subsample_size": 256}
    data = train.x, train.c, train.y
    return svi.run(jax.random.key(3), num_steps, *data, **options, progress_bar=False).params


fits = fit(jnp.array(list(strengths.values())))
figure = plt.figure(figsize=(12, 7), layout="constrained")
above, below = figure.subfigures(2, 1, height_ratios=(2, 3))

# How well is each cause read off each group of latents? And is the mass right? Mass and temperature
# enter by m / k alone, and that can be told where damping is small.
spring = 1 + 0.01 * (20 - test.factors["temperature"])
is_light = test.factors["damping"] < 0.1
print(f"{'strength':18s}{'error of m / k':>16s}{'residual, share of variance':>30s}")
for ax, (i, name) in zip(above.subplots(1, 3), enumerate(strengths), strict=True):
    params = jax.tree.map(lambda leaf, i=i: leaf[i], fits)
    draws = physics_vae.predict(vae, jax.random.key(4), params, test.x, num_samples=16)
    errors = (draws["m"].mean(0) - test.factors["m"] / spring)[is_light]
    energy = draws["residual"][0].var(0).mean() / test.x.var(0).mean()
    print(f"{name:18s}{jnp.mean(errors**2) ** 0.5:16.3f}{energy:30.2f}")
    groups = {"$z_x$": draws["m"][0], "$z_c$": draws["z_c"][0], "$z_y$": draws["z_y"][0]}
    table = physics_vae.disentanglement(groups, test.factors)
    cells = np.array([list(row.values()) for row in table.values()])
    ax.imshow(cells, vmin=0, vmax=1, cmap="Blues")
    for (row, column), cell in np.ndenumerate(cells):
        ax.text(column, row, f"{cell:.2f}", ha="center", va="center", color="tab:red")
    ax.set_xticks(range(4), list(test.factors))
    ax.set_yticks(range(3), list(groups))
    ax.set_title(f"$R^2$, strength {name}")

# Cut: one light oscillator as it is, and with more damping. Its physics stays the same.
params = jax.tree.map(lambda leaf: leaf[1], fits)
row = int(jnp.argmax(is_light))
record, truth = test.x[row], {name: value[row] for name, value in test.factors.items()}
panels = dict(zip(("physics", "residual", "prediction"), below.subplots(1, 3), strict=True))
for damping, colour in zip((0.1, 0.7, 1.6), ("tab:blue", "0.5", "tab:orange"), strict=True):
    draws = physics_vae.predict(
        vae, jax.random.key(5), params, record[None], y=jnp.array([[damping]]), num_samples=200
    )
    for site, ax in panels.items():
        low, middle, high = np.quantile(draws[site][:, 0], [0.025, 0.5, 0.975], axis=0)
        ax.fill_between(physics.TIMES, low, high, color=colour, alpha=0.3)
        ax.plot(physics.TIMES, middle, color=colour, label=f"damping {damping}")
        ax.set_title(f"{site} of one oscillator [m]")
        ax.set_xlabel("time [s]")
        ax.set_ylim(-1.3, 1.3)
    clean = case.response(truth | {"damping": damping})
    panels["prediction"].plot(physics.TIMES, clean, "k:", linewidth=1)
panels["prediction"].plot([], [], "k:", label="truth")
panels["prediction"].legend()
figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "physics_vae.png")

# The encoder's posterior is a guess; its Pareto k says whether that is good enough (below 0.7), and
# if it is not, the same Gaussian is where chains on the true one start.
given = test.c[row], test.y[row]
k = physics_vae.pareto_k(
    vae,
    jax.random.key(6),
    params,
    record[None],
    *(label[None] for label in given),
    num_samples=500,
)
refined = physics_vae.refinement(vae, params, record, *given)
posterior = probbp.sample(
    jax.random.key(7),
    partial(probbp.mala, refined.logdensity_fn),
    refined.position,
    num_warmup=3000,
    num_samples=2000,
    thinning=10,
    metric="dense",
    dispersion=0.01,
    postprocess_fn=refined.constrain_fn,
    progress_bar=False,
)
print(f"\nThat oscillator: Pareto k {k[0]:.2f}, m / k = {truth['m'] / spring[row]:.3f} in truth")
print(az.summary(posterior, var_names=["m", "z_c", "z_y"], round_to=3).to_string())
