"""Mend what other extensions write that a screen reader or a validator stumbles over."""

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

_REPEATED = ("proof", "proof-content", "exercise-content", "solution-content")
_ARGUMENTS = re.compile(r'<dl>\n((?:<dd><em class="sig-param">.*</dd>\n)+)</dl>')


def connect(app: Sphinx) -> None:
    """Mend trees before pages are written from them, and pages before they are saved."""
    app.connect("doctree-resolved", _drop_repeated_ids)
    app.connect("html-page-context", _mend_roles)


def _drop_repeated_ids(app: Sphinx, tree: nodes.document, name: str) -> None:
    """sphinx-proof and sphinx-exercise give the bodies of all their blocks one and the same id."""
    for node in tree.findall(nodes.Element):
        node["ids"] = [id for id in node["ids"] if id not in _REPEATED]


def _mend_roles(
    app: Sphinx, name: str, template: str, context: dict[str, Any], tree: nodes.document | None
) -> None:
    """docutils marks sources with a role that ARIA has withdrawn; Sphinx, arguments as a list without terms."""
    body = context.get("body", "").replace('role="doc-biblioentry"', 'role="listitem"')
    context["body"] = _ARGUMENTS.sub(_as_lines, body)


def _as_lines(arguments: re.Match[str]) -> str:
    lines = arguments[1].replace("<dd>", '<span class="sig-line">').replace("</dd>", "</span>")
    return f"<span>{lines}</span>"
