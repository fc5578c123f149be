"""The sources of `models/` are the package `probbp.models`, with or without links."""

from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Models(BuildHookInterface):
    """Puts them into a wheel; an editable install finds them through the link."""

    def initialize(self, version, build_data):
        """Name each file with its place in the wheel."""
        if version == "editable":
            return
        root = Path(self.root)
        for path in sorted((root / "models").rglob("*")):
            if path.suffix == ".py" or path.name == "py.typed":
                build_data["force_include"][str(path)] = f"probbp/{path.relative_to(root)}"
