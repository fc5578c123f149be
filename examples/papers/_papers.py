"""The papers: title, authors, number on arXiv."""

from typing import NamedTuple


class Paper(NamedTuple):
    title: str
    authors: str
    arxiv: str


BLOB = Paper(
    "BLoB: Bayesian Low-Rank Adaptation by Backpropagation for Large Language Models",
    "Wang, Shi, Han, Metaxas & Wang, 2024",
    "2406.11675",
)
DENDRITES = Paper(
    "Perforated Backpropagation: A Neuroscience Inspired Extension to Artificial Neural Networks",
    "Brenner & Itti, 2025",
    "2501.18018",
)
DSBP = Paper(
    "Dynamic Spectral Backpropagation for Efficient Neural Network Training",
    "Muthuraman, 2025",
    "2505.23369",
)
FEEDBACK = Paper(
    "Convergence and Alignment of Gradient Descent with Random Backpropagation Weights",
    "Song, Xu & Lafferty, 2021",
    "2106.06044",
)
FMALA = Paper(
    "Backpropagation-Free Metropolis-Adjusted Langevin Algorithm",
    "Cobb & Jha, 2025",
    "2505.18081",
)
PHYSICS_VAE = Paper(
    "Adversarial Disentanglement by Backpropagation with Physics-Informed Variational Autoencoder",
    "Koune & Cicirello, 2025",
    "2506.13658",
)
RATE = Paper(
    "Advancing Training Efficiency of Deep Spiking Neural Networks through Rate-based "
    "Backpropagation",
    "Yu, Liu, Wang, Li & Wang, 2024",
    "2410.11488",
)
RTRL = Paper(
    "Backpropagation Through Time For Networks With Long-Term Dependencies",
    "Bird & Polivoda, 2021",
    "2103.15589",
)
SDO = Paper(
    "You Only Look One Step: Accelerating Backpropagation in Diffusion Sampling with Gradient "
    "Shortcuts",
    "Dou et al., 2025",
    "2505.07477",
)
SUS = Paper(
    "SUS backprop: linear backpropagation algorithm for long inputs in transformers",
    "Pankov & Harik, 2025",
    "2505.15080",
)
