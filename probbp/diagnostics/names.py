"""The names under which a pytree's leaves appear in tables and data sets."""

import jax

from probbp.types import Tree


def leaf_names(tree: Tree) -> list[str]:
    """Join each leaf's path by dots ("a", "b.0"); a lone array is "x".

    Raises:
        ValueError: if two leaves come to the same name.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    names = [
        ".".join(jax.tree_util.keystr((key,), simple=True) for key in path) or "x" for path in paths
    ]
    first: dict[str, str] = {}
    for name, path in zip(names, paths, strict=True):
        where = jax.tree_util.keystr(path)
        if name in first:
            raise ValueError(
                f"The leaves {first[name]} and {where} would both be called {name!r}, and one of "
                "them would be lost: rename one."
            )
        first[name] = where
    return names
