"""A chapter's number is that of its file: book/ch07 is chapter 7, whatever is still unwritten."""

import re
from collections.abc import Sequence

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.environment.collectors.toctree import TocTreeCollector

Numbers = Sequence[int] | None


def connect(app: Sphinx) -> None:
    """Renumber between Sphinx's count of sections and the figures and theorems numbered by it."""
    count = TocTreeCollector.assign_figure_numbers

    def assign(collector: TocTreeCollector, env: BuildEnvironment) -> list[str]:
        for document in env.toc_secnumbers:
            if match := re.search(r"/ch(\d+)$", document):
                _renumber(env, document, int(match[1]))
        return count(collector, env)

    TocTreeCollector.assign_figure_numbers = assign  # type: ignore[assignment,method-assign]


def _renumber(env: BuildEnvironment, document: str, chapter: int) -> None:
    def renumbered(numbers: Numbers) -> tuple[int, ...] | None:
        return (chapter, *numbers[1:]) if numbers else None

    numbers = env.toc_secnumbers[document]
    for anchor in numbers:
        numbers[anchor] = renumbered(numbers[anchor])  # type: ignore[assignment]
    titled: list[nodes.Element] = [
        env.titles[document],
        *env.tocs[document].findall(nodes.reference),
    ]
    for node in titled:
        if node.get("secnumber"):
            node["secnumber"] = renumbered(node["secnumber"])
