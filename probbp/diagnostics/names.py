"""The names under which a pytree's leaves appear in tables and data sets."""

import jax

from probbp.types import Tree


def leaf_names(tree: Tree) -> list[str]:
    """Join each leaf's path by dots ("a", "b.0"); a lone array is "x"."""
    return [
        ".".join(jax.tree_util.keystr((key,), simple=True) for key in path) or "x"
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
