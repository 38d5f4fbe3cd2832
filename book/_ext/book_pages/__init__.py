"""What the book's pages need beyond Jupyter Book: chapter numbers, launch links, offline assets."""

from sphinx.application import Sphinx

from book_pages import chapters, launch, offline, unique


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the parts to Sphinx."""
    for part in (chapters, launch, offline, unique):
        part.connect(app)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
