"""sphinx-proof gives every proof and theorem body one and the same id; pages need unique ones."""

from docutils import nodes
from sphinx.application import Sphinx


def connect(app: Sphinx) -> None:
    """Drop the ids that nothing refers to, before the page is written."""
    app.connect("doctree-resolved", _drop_ids)


def _drop_ids(app: Sphinx, tree: nodes.document, name: str) -> None:
    for node in tree.findall(nodes.Element):
        node["ids"] = [id for id in node["ids"] if id not in ("proof", "proof-content")]
