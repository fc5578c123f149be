"""Attention whose backward pass keeps a random few of the weights: linear in the length.

Pankov & Harik, 2025, arXiv:2505.15080.
"""

from probbp.ops.sus.attention import dot_product_attention
from probbp.ops.sus.keep import suggested_keep

__all__ = ["dot_product_attention", "suggested_keep"]
