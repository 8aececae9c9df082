"""The site: `pip install ".[docs]" && sphinx-build -W .docs build/docs` from the root of the repository."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import kdejsd

project = "kdejsd"
release = kdejsd.__version__
copyright = "the authors of kdejsd, MIT licence"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"kdejsd {release}"
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
copybutton_prompt_text = ">>> |\\.\\.\\. "
copybutton_prompt_is_regexp = True

default_role = "py:obj"  # a name in single backticks is a link where it is a name of ours
highlight_language = "none"
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # what Lightning says of its methods is told there
autodoc_default_options = {"members": True}
napoleon_use_param = False  # "encoder, decoder: ..." is one entry for two arguments
napoleon_use_ivar = True
napoleon_custom_sections = ["Returns"]  # as text: what stands before a colon there is no type

# log, det: the converter leaves no space before and after them.
_BESIDE_FUNCTION = re.compile(r"(</m(?:i|n|sub|sup|frac)>)(?=<mi>[a-z]{2,}</mi>)|(<mi>[a-z]{2,}</mi>)(?=<m[isnf])")
_QUOTED = re.compile(r"(``?[^`]+``?)")
_SPECIAL = re.compile(r"[\\*|]|(?<=\w)_(?!\w)|(?<=\b\w)\.(?!\S)")  # the last: "l." is no number of a list


def as_rst(_app: Any, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Turns a docstring into reStructuredText.

    Docstrings are plain text but for their sections, lists and backticks: a block that is indented after an empty
    line is a formula or a table, to be shown as it is, and so is an example from its first `>>>` to an empty line;
    elsewhere `|x|` and `a * b` are no markup.
    """
    found: list[str] = []
    depth = 0  # of the last line that was no formula
    literal = example = False
    for before, line in pairwise(["", *lines]):
        indent = len(line) - len(line.lstrip())
        example = bool(line) and (example or line.lstrip().startswith(">>>"))
        if example:
            found.append(line)
            continue
        if line and not before and found:
            begins = indent > depth and not literal
            if begins:
                found += [" " * depth + "::", ""]
            literal = indent > depth
        if line and not literal:
            depth = indent
            parts = _QUOTED.split(line)
            parts[::2] = [_SPECIAL.sub(r"\\\g<0>", part) for part in parts[::2]]
            line = "".join(parts)
            if re.match(r" *\\\* ", line):  # a list
                line = line.replace("\\*", "*", 1)
        found.append(line)
    lines[:] = found


def visit_formula(self: Any, node: Any) -> None:
    """Writes a formula as MathML, which browsers render by themselves: a page needs no script and no network."""
    import latex2mathml.converter  # here, as the tests read this file without what builds the site
    from docutils import nodes

    display = "block" if isinstance(node, nodes.math_block) else "inline"
    formula = latex2mathml.converter.convert(node.astext(), display=display)
    formula = _BESIDE_FUNCTION.sub(r'\g<0><mspace width="0.17em"/>', formula)
    self.body.append(f'<div class="formula">{formula}</div>' if display == "block" else formula)
    raise nodes.SkipNode


def without_links_to_files(_app: Any, _path: Any, _document: str, content: list[str]) -> None:
    """Leaves the words of an included page's links to files that are no pages of the site."""
    content[0] = re.sub(r"\[([^\]]+)\]\((?!\.\./\.docs/|https?:|#)[^)]+\)", r"\1", content[0])


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", as_rst, priority=400)  # before napoleon's
    app.connect("include-read", without_links_to_files)
    app.add_html_math_renderer("mathml", (visit_formula, None), (visit_formula, None))
