"""Mend what other extensions write that a screen reader or a validator stumbles over."""

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

_REPEATED = ("proof", "proof-content", "exercise-content", "solution-content")


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
    """docutils marks the entries of a list of sources with a role that ARIA has withdrawn."""
    body = context.get("body", "")
    context["body"] = body.replace('role="doc-biblioentry"', 'role="listitem"')
