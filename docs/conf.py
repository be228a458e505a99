"""The documentation site: `make docs`. Guides are the Markdown files here; the reference is the docstrings."""

import re
from itertools import pairwise

import fastloss

project = "fastloss"
author = "the fastloss developers"
release = fastloss.__version__
copyright = author

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"fastloss {release}"
html_static_path = ["_static"]
html_show_sphinx = False

# Links between headings, as the forge makes them.
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]

# `name` in a docstring is code: a link, where there is something of that name.
default_role = "autolink"
napoleon_numpy_docstring = True
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"
python_use_unqualified_type_names = True


def plain(lines: list[str]) -> list[str]:
    """A docstring whose `formulas` are code, and whose |bars| are no substitutions of reStructuredText's."""
    found = []
    for line in lines:
        if not line.lstrip().startswith((">>>", "...")):
            parts = re.split(r"(?<!`)`([^`]+)`(?!`)", line)  # what is in backticks is at odd places
            for k, part in enumerate(parts):
                if k % 2 == 0:
                    parts[k] = part.replace("|", r"\|")
                else:
                    parts[k] = f"`{part}`" if re.fullmatch(r"[\w.]+", part) else f"``{part}``"
            line = "".join(parts)
        found.append(line)
    return found


def prose_first(lines: list[str]) -> list[str]:
    """A docstring whose lists of parameters hold nothing else: sentences among them go before the list.

    Napoleon takes what stands at the margin there for the name of a parameter.
    """
    heads = [k for k, line in enumerate(lines[1:]) if re.fullmatch(r"-{4,}", line)]
    found = lines[: heads[0]] if heads else list(lines)
    for start, end in pairwise([*heads, len(lines)]):
        blocks = "\n".join(lines[start:end]).strip().split("\n\n")
        if lines[start] == "Attributes":  # Sphinx takes what is before a blank for the type of what follows
            named = re.compile(r"^\w+(?:, \w+)+ : ", re.MULTILINE)
            blocks = [named.sub(lambda found: found[0].replace(", ", ","), block) for block in blocks]
        sentences = [block for block in blocks if "\n " not in block and block.endswith(".")]
        prose = sentences if lines[start] == "Parameters" else []
        found += "\n\n".join([*prose, *(block for block in blocks if block not in prose), ""]).split("\n")
    return found


def setup(app):
    def process(app, what, name, thing, options, lines):
        lines[:] = plain(prose_first(lines))

    app.connect("autodoc-process-docstring", process, priority=400)  # before Napoleon's
