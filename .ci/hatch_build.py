"""The sources of `models/` are the package `probbp.models`, with or without links."""

from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

EDITABLE = '''"""The package, where it is developed."""

from pathlib import Path

__file__ = {file!r}
__path__ = [str(Path(__file__).parent)]
exec(compile(Path(__file__).read_bytes(), __file__, "exec"))
'''


class Package(BuildHookInterface):
    """Puts the models into a wheel, and into an editable install one file that leads here.

    That one shows no other folder of the root, and is found before a folder of the package's name
    in which somebody works, as a clone's parent has.
    """

    def initialize(self, version, build_data):
        """Name each file with its place."""
        root = Path(self.root)
        if version == "editable":
            file = Path(self.directory) / "probbp.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(EDITABLE.format(file=str(root / "probbp" / "__init__.py")))
            build_data["force_include_editable"][str(file)] = "probbp/__init__.py"
            return
        for path in sorted((root / "models").rglob("*")):
            if path.suffix == ".py" or path.name == "py.typed":
                build_data["force_include"][str(path)] = f"probbp/{path.relative_to(root)}"
