"""Every notebook's page opens with how to run it: one click once the repository has an address."""

from html import escape
from pathlib import Path

import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config

COLAB = "https://colab.research.google.com"
PACKAGE = "modlib-book.zip"


def connect(app: Sphinx) -> None:
    """Derive links from `repository` in _config.yml."""
    app.add_config_value("repository", {}, "html")
    app.connect("config-inited", _read_address)
    app.connect("doctree-resolved", _add_line)


def _read_address(app: Sphinx, config: Config) -> None:
    settings = yaml.safe_load((Path(app.confdir) / "_config.yml").read_text(encoding="utf-8"))
    address = settings["repository"]
    config.repository = {"url": address["url"].rstrip("/"), "branch": address["branch"]}
    if config.repository["url"]:
        config.html_theme_options |= {
            "repository_url": config.repository["url"],
            "repository_branch": config.repository["branch"],
            "use_issues_button": True,
            "use_repository_button": True,
        }


def _add_line(app: Sphinx, tree: nodes.document, name: str) -> None:
    source = Path(app.env.doc2path(name)).relative_to(app.srcdir)
    title = next(iter(tree.findall(nodes.title)), None)
    if source.suffix != ".ipynb" or name == app.config.root_doc or title is None:
        return
    line = nodes.raw("", _line(source, app.config.repository), format="html")
    title.parent.insert(title.parent.index(title) + 1, line)


def _line(source: Path, repository: dict[str, str]) -> str:
    root = "../" * (len(source.parts) - 1)
    notebook = f'<a href="{root}_sources/{source}" download>Download the notebook</a>'
    if url := repository["url"]:
        path = url.removeprefix("https://github.com/")
        colab = f"{COLAB}/github/{path}/blob/{repository['branch']}/{source}"
        return f'<p class="launch"><a href="{escape(colab)}">Open in Colab</a> · {notebook}</p>'
    return (
        f'<p class="launch">{notebook} · <a href="{root}{PACKAGE}" download>Download modlib</a><br>'
        f'To run it on a free GPU, go to <a href="{COLAB}">Colab</a>, choose <em>File → Upload '
        "notebook</em> and give it the first file. Its first cell then asks for the second "
        f"(<code>{PACKAGE}</code>) and installs it.</p>"
    )
