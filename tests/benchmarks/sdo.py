"""What a derivative through one step of a diffusion sampler costs, and how far it points astray.

    python tests/benchmarks/sdo.py [--fast]

scikit-learn's digits, 64 numbers; a residual perceptron of 3 blocks of width 256, trained here to
predict the noise on the linear schedule; DDIM from pure noise, batches of 32, float32. The loss is
the mean squared distance of the upper half of the samples to other digits' (in-painting).

Cost: "forward" is the sampler, all else its value and gradient. `extra` is what the gradient adds
to the forward pass, over what the full gradient adds: of the time (medians of ratios within a
round) and of the operations (those of matrix products, counted in JAX's program). Memory is the
temporary buffers that XLA reports, `/ full` over those of the full gradient without checkpoints.

Direction: cosine and ratio of norms to the full gradient. For noise both are means over samples,
with the least cosine of any sample; data noised up to `start` and sampled from there. For
parameters they are those of the batch's gradient, means over 16 keys where steps are drawn. About
five minutes on two cores.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from _race import race
from flax import nnx
from sklearn.datasets import load_digits

from probbp.models import diffusion
from probbp.ops import sdo

BATCH, SHARE = 32, 0.1
DIGITS = jnp.asarray(load_digits().data / 8 - 1, jnp.float32)
PATH = sdo.gaussian_path(np.cov(np.asarray(DIGITS).T))
METHODS = {
    "full": {"keep_step": "all"},
    "full, checkpointed": {"keep_step": "all", "checkpoint": True},
    "first": {},
    "first, unit path": {"surrogate": sdo.gaussian_path(1.0)},
    "first, Gaussian path": {"surrogate": PATH},
    "Last(5), Gaussian path": {"keep_step": sdo.Last(5), "surrogate": PATH},
    "random, one for all": {"keep_step": "random"},
    "random": {"keep_step": "random"},
    "random, Gaussian path": {"keep_step": "random", "surrogate": PATH},
    "each, checkpointed": {"keep_step": "each", "checkpoint": True},
    f"Subset({SHARE})": {"keep_step": sdo.Subset(SHARE), "surrogate": PATH},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a smoke test; its numbers are rough")
    fast = parser.parse_args().fast
    trained = diffusion.train(
        jax.random.key(0),
        diffusion.Denoiser((64,), rngs=nnx.Rngs(0)),
        DIGITS,
        sdo.linear(50),
        num_steps=100 if fast else 3000,
        prediction="eps",
    )
    graph, params = nnx.split(trained.network)
    loss = partial(inpainting, graph)
    for argnum, name in enumerate(("noise", "parameters")):
        for num_steps in (10,) if fast else (10, 50, 100):
            cost(loss, params, num_steps, argnum, name, num_rounds=3 if fast else 15)
    for num_steps in (10,) if fast else (10, 50, 100):
        starts = (999, 499, 199, 99) if num_steps == 50 else (999,)
        print(f"\n{num_steps} steps, gradient of the noise: cosine (least), norm over full's")
        directions(loss, params, num_steps, starts)
        print(f"\n{num_steps} steps, gradient of the parameters: cosine, norm over full's")
        of_parameters(loss, params, num_steps, num_keys=2 if fast else 16)


def inpainting(graph, noise, params, target, schedule, **options):
    """Return the distance (batch,) of each sample to its target."""
    x = sdo.sample(nnx.merge(graph, params), noise, schedule, **options)
    return jnp.mean((x - target)[:, :32] ** 2, axis=1)


def problem(schedule):
    """Return noise, or data noised up to the schedule's start, and targets."""
    key_rows, key_noise = jax.random.split(jax.random.key(1))
    rows = jax.random.randint(key_rows, (2, BATCH), 0, len(DIGITS))
    signal = schedule.signal[0] if schedule.times[0] < 999 else 0.0
    noise = jax.random.normal(key_noise, (BATCH, 64))
    return signal**0.5 * DIGITS[rows[0]] + (1 - signal) ** 0.5 * noise, DIGITS[rows[1]]


def cost(loss, params, num_steps, argnum, name, num_rounds):
    schedule = sdo.linear(num_steps)
    noise, target = problem(schedule)

    def mean_loss(noise, params, target, rng_key, options):
        return loss(noise, params, target, schedule, rng_key=rng_key, **options).mean()

    args = noise, params, target, jax.random.key(2)
    functions = {"forward": partial(mean_loss, options={"keep_step": "all"})}
    for method, options in METHODS.items():
        if "for all" in method:
            continue
        functions[method] = jax.value_and_grad(partial(mean_loss, options=options), argnum)
    compiled = {k: jax.jit(fun).lower(*args).compile() for k, fun in functions.items()}
    seconds = race({k: partial(call, *args) for k, call in compiled.items()}, num_rounds)
    extra = (seconds - seconds[:, :1]) / (seconds[:, 1:2] - seconds[:, :1])
    flops = [products(jax.make_jaxpr(fun)(*args).jaxpr) for fun in functions.values()]
    memory = [c.memory_analysis().temp_size_in_bytes for c in compiled.values()]
    print(f"\n{num_steps} steps, gradient of the {name}")
    print(
        f"{'':24s}{'ms':>8s}{'extra':>8s}{'Gflop':>8s}{'extra':>8s}{'MiB':>8s}{'/ full':>8s}",
        flush=True,
    )
    for i, method in enumerate(functions):
        print(
            f"{method:24s}{1e3 * np.median(seconds[:, i]):8.2f}{np.median(extra[:, i]):8.3f}"
            f"{flops[i] / 1e9:8.3f}{(flops[i] - flops[0]) / (flops[1] - flops[0]):8.3f}"
            f"{memory[i] / 2**20:8.2f}{memory[i] / memory[1]:8.4f}",
            flush=True,
        )


def products(jaxpr):
    """Return the operations of a program's matrix products, loops included."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            summed = np.prod([left[i] for i in contracted])
            total += 2 * summed * np.prod(eqn.outvars[0].aval.shape)
        inner = [
            products(getattr(sub, "jaxpr", sub))
            for value in eqn.params.values()
            for sub in (value if isinstance(value, tuple | list) else [value])
            if hasattr(sub, "eqns") or hasattr(getattr(sub, "jaxpr", None), "eqns")
        ]
        if eqn.primitive.name == "cond":  # a subset's: kept with probability SHARE
            total += SHARE * max(inner) + (1 - SHARE) * min(inner)
        else:
            total += eqn.params.get("length", 1) * sum(inner)
    return total


def directions(loss, params, num_steps, starts):
    print(f"{'start':24s}" + "".join(f"{start:>22d}" for start in starts))
    rows = {}
    for start in starts:
        num = min(num_steps, start + 1)
        schedule = sdo.linear(num, start=start)
        noise, target = problem(schedule)

        @partial(jax.jit, static_argnums=3)
        def grad(noise, params, target, method, schedule=schedule):
            options = METHODS[method] | {"rng_key": jax.random.key(3)}
            return jax.grad(lambda z: loss(z, params, target, schedule, **options).sum())(noise)

        exact = grad(noise, params, target, "full")
        for method in METHODS:
            if "full" in method or "for all" in method:
                continue
            estimate = grad(noise, params, target, method)
            norms = jnp.linalg.norm(estimate, axis=1), jnp.linalg.norm(exact, axis=1)
            cosine = jnp.sum(estimate * exact, axis=1) / (norms[0] * norms[1])
            ratio = jnp.mean(norms[0] / norms[1])
            cell = f"{jnp.mean(cosine):.2f} ({jnp.min(cosine):.2f}) {ratio:.3g}"
            rows.setdefault(method, []).append(cell)
    for method, cells in rows.items():
        print(f"{method:24s}" + "".join(f"{cell:>22s}" for cell in cells), flush=True)


def of_parameters(loss, params, num_steps, num_keys):
    schedule = sdo.linear(num_steps)
    noise, target = problem(schedule)

    @partial(jax.jit, static_argnums=0)
    def grad(method, params, rng_key):
        options = METHODS[method] | {"rng_key": rng_key}

        def fun(params):
            if "for all" not in method:
                return loss(noise, params, target, schedule, **options).mean()
            # Samples that are batches of their own draw the same step from the same key.
            one = lambda z, y: loss(z[None], params, y[None], schedule, **options)[0]
            return jax.vmap(one)(noise, target).mean()

        return jax.flatten_util.ravel_pytree(jax.grad(fun)(params))[0]

    exact = grad("full", params, jax.random.key(0))
    for method in METHODS:
        if "full" in method:
            continue
        estimates = [grad(method, params, k) for k in jax.random.split(jax.random.key(4), num_keys)]
        norms = [jnp.linalg.norm(e) for e in estimates]
        # A subset may be empty, and then says nothing.
        cosines = [e @ exact / max(n, 1e-30) for e, n in zip(estimates, norms, strict=True)]
        cosines, ratios = (np.array(a) / jnp.linalg.norm(exact) for a in (cosines, norms))
        print(f"{method:24s}{np.mean(cosines):8.2f}{np.mean(ratios):10.3g}", flush=True)


if __name__ == "__main__":
    main()
