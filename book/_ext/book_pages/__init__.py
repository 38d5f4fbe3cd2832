"""What the book's pages need beyond Jupyter Book: launch links, offline assets, accessibility, the reference."""

from sphinx.application import Sphinx

from book_pages import accessible, launch, offline, reference


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the parts to Sphinx."""
    for part in (accessible, launch, offline, reference):
        part.connect(app)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
