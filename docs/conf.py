"""Sphinx's configuration: `python tools/build_site.py` makes the site of the repository's files.

The source directory is the repository, so a link from one page to another is the same here, on a
code host and on disk.
"""

import inspect
import json
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.ext.napoleon import GoogleDocstring

import mimdet

project = "mimdet"
version = release = mimdet.__version__
author = "the mimdet authors"
copyright = author

extensions = ["myst_nb", "sphinx.ext.autodoc"]
include_patterns = [
    "docs/**",
    "notebooks/*.ipynb",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "mimdet/pretrained/README.md",
]
exclude_patterns = ["docs/slides.md"]  # a page of its own, made by tools/build_site.py
root_doc = "docs/index"

# Notebooks are shown as they are stored: nothing is run.
nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = "Show a solution", "Hide it"
NEW_TAGS = {"install": "remove-cell", "judge": "hide-cell", "solution": "hide-cell"}
nb_mime_priority_overrides = [("html", "image/jpeg", 5), ("html", "image/png", 4)]

myst_enable_extensions = ["dollarmath", "colon_fence", "attrs_inline"]
myst_heading_anchors = 4  # as code hosts make them
suppress_warnings = [
    "myst.header",  # a page may start below its title
    "ref.python",  # `MAE` in a signature is both mimdet.MAE and the module's: the same class
]

toc_object_entries_show_parents = "hide"
maximum_signature_line_length = 90
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True  # `()` and not what it evaluates to
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"mimdet {version}"
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"  # which browsers show themselves: pages need no network
html_copy_source = False
html_show_sourcelink = False


def plain_prose(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are prose with `code` in single backticks, and no reStructuredText."""
    parts = re.split(r"(`+[^`]+`+)", "\n".join(lines))
    for index, part in enumerate(parts):
        if index % 2:
            parts[index] = "``" + " ".join(part.strip("`").split()) + "``"
        else:
            parts[index] = re.sub(r"([*|\\]|(?<=\w)_(?!\w))", r"\\\1", part)
    text = "".join(parts)
    lines[:] = (GoogleDocstring(text).lines() if "Args:" in text else text.split("\n")) + [""]


def folders_are_no_pages(app: Any, docname: str, source: list[str]) -> None:
    """A link to a folder leads somewhere on a code host; here its text is left."""
    page = Path(app.env.doc2path(docname))

    def text_of(link: re.Match[str]) -> str:
        return link[1] if (page.parent / link[2]).is_dir() else link[0]

    if page.suffix == ".md":
        source[0] = re.sub(r"(?<!!)\[([^]]*)\]\(([^)#:]+)\)", text_of, source[0])


def tag_cells(app: Any, docname: str, source: list[str]) -> None:
    """Of a notebook the cell that installs the kit is left out, and solutions wait for a click."""
    if not docname.startswith("notebooks/"):
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        tags = cell["metadata"].setdefault("tags", [])
        tags += [NEW_TAGS[tag] for tag in tags if tag in NEW_TAGS]
    source[0] = json.dumps(notebook)


def options_of_a_command(app: Any, what: str, name: str, thing: Any, *rest: Any) -> Any:
    """The signature of a command without what only its parser wants to know."""
    if what != "function" or not name.startswith(("mimdet.commands.", "mimdet.demo.")):
        return None
    parameters = inspect.signature(thing).parameters.values()
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    return str(inspect.Signature(bare)), None


def write_math(writer: Any, node: Any) -> None:
    block = isinstance(node, nodes.math_block)
    writer.body.append(tex2mathml(node.astext(), as_block=block))
    raise nodes.SkipNode


def setup(app: Any) -> None:
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    app.connect("autodoc-process-signature", options_of_a_command)
    app.connect("source-read", tag_cells)
    app.connect("autodoc-process-docstring", plain_prose)
    app.connect("source-read", folders_are_no_pages)
