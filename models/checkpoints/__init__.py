"""Hugging Face checkpoints as plain JAX functions of their own parameters, without PyTorch.

Llama, Qwen2 and Qwen3 (causal language models, sequence classifiers), BERT and RoBERTa (sequence
classifiers). A parameter keeps its name and its layout in the file, (out, in) for a matrix, so that
a regular expression selects it and what is trained can be written back under the same name.
"""

from probbp.models.checkpoints.load import Checkpoint, load

__all__ = ["Checkpoint", "load"]
