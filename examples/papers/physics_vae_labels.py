"""Physics and confounders apart by supervision: labels that count more, a reference, an adversary.

Koune & Cicirello, 2025, arXiv:2506.13658, separate the known physics from confounders by the labels
of domain and class. Structures and scores are those of `physics_vae.py`; here the likelihood of the
labels weighs ten times as much.

    python examples/papers/physics_vae_labels.py [--fast]

- plain, the paper's: the strengths of `physics_vae.py`.
- reference and adversary: the paper's, with a reference at which the residual is zero, and an
  adversary that reads domain and class off the physical parameters.
- deeper plain: the default encoder, with two hidden layers; the paper's, in all others, has one.

Figures are mean and standard deviation over six seeds of network and fit; "p" is the two-sided
p-value of a paired t-test against the plain autoencoder.
"""

import time

import jax
from _evidence import below, over_seeds
from _papers import PHYSICS_VAE
from _results import panels, parsed, parser, write
from _structures import (
    NUM_TRAIN,
    STUDIES,
    compare,
    difference,
    draw_errors,
    print_study,
    target,
)
from tqdm import tqdm

PLAIN, DEEPER, PAPER, BOTH = "plain", "deeper plain", "the paper's", "reference and adversary"
CHOSEN = ("beam on springs", "beam, known confounder", "oscillator")


def main():
    arguments = parsed(parser(__doc__))
    fast = arguments.fast
    num_seeds, num_steps = (2, 100) if fast else (6, 8000)
    start = time.perf_counter()
    found = {}
    for title in (bar := tqdm(CHOSEN[: 1 if fast else 3])):
        bar.set_description(title)
        study = STUDIES[title]

        def fitted(settings, study=study, **options):
            return compare(study, settings, num_seeds, num_steps, **options)

        fits = fitted({PLAIN: (-1.0, 10.0), PAPER: (study.strength, 10.0)})
        adversary = {"anchored": True, "invariance": lambda step, s=study: s.invariance}
        fits |= fitted({BOTH: (study.strength, 10.0)}, **adversary)
        fits |= fitted({DEEPER: (-1.0, 10.0)}, encoder="deeper")
        found[title] = study, fits
        bar.clear()
        print_study(title, study, fits, PLAIN)
    print(f"\n{time.perf_counter() - start:.0f} seconds, JAX {jax.__version__}")

    study, fits = found[CHOSEN[0]]
    error = f"error {target(study)}"
    figure, axes = panels(len(found))
    draw_errors(axes, found)
    write(
        arguments,
        paper=PHYSICS_VAE,
        claim="Labels of domain and class, with the reversed gradient, separate the known physics "
        "from confounders.",
        setting=f"Simulated beams and an oscillator, {NUM_TRAIN} records, labels that count ten "
        f"times, {num_steps} steps, {num_seeds} seeds. The figure: beam on springs, posterior mean "
        "of E.",
        ours=over_seeds(f"{error}, reversed", fits[PAPER].scores[error]),
        baseline=over_seeds("plain, a deeper encoder", fits[DEEPER].scores[error]),
        checks=[
            check
            for title, (study, fits) in found.items()
            for check in (
                *(
                    below(
                        f"{target(study)} is recovered better by {name} than by {other}, {title}",
                        difference(fits, name, other, f"error {target(study)}"),
                    )
                    for name, other in ((PAPER, PLAIN), (PAPER, DEEPER), (BOTH, DEEPER))
                ),
                *(
                    below(
                        f"the physics takes under a tenth of what is the confounders', by {name}, "
                        f"{title}",
                        over_seeds("share taken", fits[name].scores["leaks to physics"]),
                        0.1,
                    )
                    for name in (PAPER, BOTH)
                ),
            )
        ],
        figure=figure,
        caption="Error of the posterior mean of a physical parameter on held-out records, a dot "
        "for each seed and a line at their mean; labels count ten times.",
    )


if __name__ == "__main__":
    main()
