"""The story as one HTML page that needs nothing else: no scripts, no fonts, pictures inside."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastloss import plot
from fastloss.lecture import Section


def check() -> None:
    """Raise if a page could not be made here."""
    plot.figure_class()
    _environment()


def _environment() -> Any:
    try:
        import jinja2
        import markupsafe  # comes with it
    except ImportError as error:
        raise ImportError('the page needs Jinja2: pip install "fastloss[cli]"') from error
    loader = jinja2.PackageLoader("fastloss.lecture", "")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    environment.filters["typeset"] = lambda text: markupsafe.Markup(_typeset(str(markupsafe.escape(text))))
    return environment


def _typeset(text: str) -> str:
    """Indices below the line, s_j as in print, and a minus that is as long as a plus."""
    text = re.sub(r"\b([a-z])_([a-z])\b", r"\1<sub>\2</sub>", text)
    return re.sub(r"(?<![\w.−-])-(?=\d)", "−", text)


def page(title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> bytes:
    """The page, in UTF-8."""
    seconds = sum(section.seconds for section in sections)
    template = _environment().get_template("page.html.j2")
    text: str = template.render(title=title, facts=facts, sections=sections, seconds=seconds)
    return text.encode()
