"""Sphinx: `make docs` builds the pages into `build/docs`, with warnings as errors."""

from importlib import metadata

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

project = "probbp"
author = "The probbp developers"
copyright = "The probbp developers"
version = release = metadata.version("probbp")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = []

autodoc_member_order = "groupwise"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Reference"]
default_role = "py:obj"  # `names` in docstrings are links where there is such a name
suppress_warnings = ["ref.python"]  # `bias` is a word as well, and an attribute of two classes

html_theme = "furo"
html_title = "probbp"
html_theme_options = {"top_of_page_buttons": []}
html_show_sphinx = False
html_static_path = ["static"]
html_css_files = ["formulas.css"]
copybutton_prompt_text = ">>> |\\.\\.\\. "
copybutton_prompt_is_regexp = True
html_math_renderer = "mathml"


def setup(app):
    """Formulas as MathML, which browsers show without a script from elsewhere."""

    def inline(translator, node):
        translator.body.append(convert(node.astext()))
        raise SkipNode

    def block(translator, node):
        translator.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
        raise SkipNode

    app.add_html_math_renderer("mathml", (inline, None), (block, None))
