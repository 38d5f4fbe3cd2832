"""The built book: no warning, no dead link, no request to any network, readable by everybody."""

import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup, Tag

ROOT = Path(__file__).parents[1]
CONTENTS = yaml.safe_load((ROOT / "_toc.yml").read_text())
LISTED = [page for part in CONTENTS["parts"] for page in part["chapters"]]
SECTIONS = [section for page in LISTED for section in page.get("sections", [])]
PAGES = [CONTENTS["root"], *(page["file"] for page in LISTED + SECTIONS)]
NOTEBOOKS = [name for name in PAGES if (ROOT / f"{name}.ipynb").exists()]
CHAPTERS = [c["file"] for part in CONTENTS["parts"] if "numbered" in part for c in part["chapters"]]
ADDRESS = "https://github.com/someone/something"


def build(folder: Path, address: str) -> Path:
    """Build a copy of the book, every warning an error; return the folder of its pages."""
    for name in ("book", "modlib"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (
        "_config.yml",
        "_toc.yml",
        "pyproject.toml",
        "setup.py",
        "README.md",
        "LICENSE",
        "LICENSE-TEXT",
    ):
        shutil.copy(ROOT / name, folder)
    config = folder / "_config.yml"
    config.write_text(re.sub(r'  url: ".*"', f'  url: "{address}"', config.read_text()))
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", "."]
    run = subprocess.run(
        [*command, "-W", "-n", "--keep-going"], cwd=folder, capture_output=True, text=True
    )
    warnings = [line for line in run.stderr.splitlines() if "WARNING" in line or "ERROR" in line]
    if run.returncode:
        pytest.fail("\n".join(warnings) or run.stderr[-3000:], pytrace=False)
    return folder / "_build/html"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The book as a reader gets it while the repository has no address."""
    return build(tmp_path_factory.mktemp("book"), "")


@pytest.fixture(scope="module")
def addressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The book once the repository has one."""
    return build(tmp_path_factory.mktemp("addressed"), ADDRESS)


@cache
def parsed(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def article(path: Path) -> Tag:
    found = parsed(path).select_one("article.bd-article")
    assert found is not None
    return found


def all_pages(pages: Path) -> Iterator[Path]:
    return (page for page in pages.rglob("*.html") if "_static" not in page.parts)


# --- links -----------------------------------------------------------------------------------


def test_first_page_leads_into_the_book(pages: Path) -> None:
    assert f"{CONTENTS['root']}.html" in (pages / "index.html").read_text()
    for name in PAGES:
        assert (pages / f"{name}.html").exists()


def test_no_internal_link_is_dead(pages: Path) -> None:
    for page in all_pages(pages):
        for tag in parsed(page).find_all(["a", "img", "script", "link", "source"]):
            link = tag.get("href") or tag.get("src")
            if not link or urlsplit(link).scheme:
                continue
            parts = urlsplit(link)
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.exists(), f"{page.name} links to {link}"
            if parts.fragment and target.suffix == ".html" and tag.name == "a":
                anchor = unquote(parts.fragment)
                assert parsed(target).find(id=anchor), f"{page.name} links to {link}: no such place"


def test_pages_load_nothing_from_a_network(pages: Path) -> None:
    for page in all_pages(pages):
        for tag in parsed(page).find_all(True):
            for name in ("src", "srcset", "poster", "data"):
                assert not re.match(r"(https?:)?//", str(tag.get(name, ""))), f"{page.name}: {tag}"
            if tag.name == "link":
                assert not re.match(r"(https?:)?//", tag.get("href", "")), f"{page.name}: {tag}"
    for style in pages.rglob("*.css"):
        outside = re.search(r"(url\(|@import)\s*['\"]?(https?:)?//[^)\s]*", style.read_text())
        assert not outside, f"{style.name}: {outside and outside[0]}"


# --- the address -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_notebook_can_be_downloaded(pages: Path, name: str) -> None:
    assert (pages / f"_sources/{name}.ipynb").read_bytes() == (ROOT / f"{name}.ipynb").read_bytes()


@pytest.mark.parametrize("name", CHAPTERS)
def test_without_address_a_chapter_tells_how_to_upload(pages: Path, name: str) -> None:
    line = article(pages / f"{name}.html").select_one(".launch")
    assert line is not None
    links = [link["href"] for link in line.find_all("a")]
    root = "../" * name.count("/")
    assert links == [
        f"{root}_sources/{name}.ipynb",
        f"{root}modlib-book.zip",
        "https://colab.research.google.com",
    ]
    assert "Upload notebook" in line.get_text()


@pytest.mark.parametrize("name", CHAPTERS)
def test_with_address_a_chapter_is_one_click_from_colab(addressed: Path, name: str) -> None:
    line = article(addressed / f"{name}.html").select_one(".launch")
    assert line is not None
    colab = f"https://colab.research.google.com/github/someone/something/blob/main/{name}.ipynb"
    source = f"{'../' * name.count('/')}_sources/{name}.ipynb"
    assert [link["href"] for link in line.find_all("a")] == [colab, source]


def test_links_to_the_repository_appear_with_its_address(pages: Path, addressed: Path) -> None:
    def repository_links(page: Path) -> set[str]:
        return {a["href"] for a in parsed(page).select(".bd-header-article a[href*='github.com']")}

    for name in PAGES:
        assert not repository_links(pages / f"{name}.html")
        links = repository_links(addressed / f"{name}.html")
        assert ADDRESS in links and any(link.startswith(f"{ADDRESS}/issues/new") for link in links)
    for page in all_pages(pages):
        assert "executablebooks" not in page.read_text(), f"{page.name}: a default address"


# --- what the pages say ----------------------------------------------------------------------


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapters_and_theorems_carry_the_number_of_their_place(pages: Path, name: str) -> None:
    number = CHAPTERS.index(name) + 1
    body = article(pages / f"{name}.html")
    assert body.h1 is not None and body.h1.get_text().startswith(f"{number}. ")
    captions = [
        tag.get_text() for tag in body.select(".proof .caption-number, .exercise .caption-number")
    ]
    for caption in captions:
        assert re.search(rf"\b{number}\.\d+", caption), caption


@pytest.mark.parametrize("name", PAGES)
def test_formulas_are_typeset(pages: Path, name: str) -> None:
    body = BeautifulSoup(str(article(pages / f"{name}.html")), "html.parser")
    for tag in body.select("pre, code, script, .math"):
        tag.decompose()
    raw = re.search(r".{0,40}(\$|\\(?:frac|sum|theta|mathbb|begin)\b|:::).{0,40}", body.get_text())
    assert raw is None, f"raw markup: {raw and raw[0]!r}"


@pytest.mark.parametrize("name", PAGES)
def test_page_can_be_read_by_everybody(pages: Path, name: str) -> None:
    page = parsed(pages / f"{name}.html")
    assert page.html is not None and page.html["lang"] == "en"
    assert len(article(pages / f"{name}.html").find_all("h1")) == 1
    ids = [tag["id"] for tag in page.find_all(id=True)]
    assert sorted(ids) == sorted(set(ids)), {i for i in ids if ids.count(i) > 1}
    for image in article(pages / f"{name}.html").find_all("img"):
        alt = image.get("alt", "")
        assert len(alt) > 20 and not alt.endswith((".png", ".svg")), f"{name}: alt text {alt!r}"


# --- the reference ---------------------------------------------------------------------------

reference = runpy.run_path(str(ROOT / "book/_ext/book_pages/reference.py"))
REFERENCE = [name for name in PAGES if name.startswith("book/reference/")]


def test_every_public_name_has_one_entry_with_an_example_and_its_chapter(pages: Path) -> None:
    """And no entry is of a member that torch's classes have."""
    public, members, value = (reference[name] for name in ("public", "members", "value"))
    found: dict[str, str] = {}
    for name in REFERENCE:
        for heading in article(pages / f"{name}.html").select("dt.sig[id]"):
            assert heading["id"] not in found
            found[str(heading["id"])] = name
            if heading["id"] in public():
                body = heading.find_next_sibling("dd")
                assert isinstance(body, Tag)
                link = body.select_one("p.derived a")
                page = reference["chapter"](public()[heading["id"]])
                assert link and str(link["href"]).endswith(f"{page}.html")
                assert body.select_one(".highlight .gp") or heading.parent["class"] == [
                    "py",
                    "data",
                ]
    owned = {f"{p}.{m}" for p in public() if isinstance(value(p), type) for m in members(value(p))}
    assert set(found) == set(public()) | owned


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_ends_with_the_entries_of_what_it_derives(pages: Path, name: str) -> None:
    public, chapter = reference["public"](), reference["chapter"]
    derived = {path for path, file in public.items() if f"book/{chapter(file)}" == name}
    links = article(pages / f"{name}.html").select("p.derived a")
    assert {str(link["href"]).partition("#")[2] for link in links} == derived


# --- what can be taken along -----------------------------------------------------------------


def test_the_zip_is_the_whole_book(pages: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(pages / "book.zip") as archive:
        archive.extractall(tmp_path)
    inside = {path.relative_to(tmp_path / "book") for path in tmp_path.rglob("*") if path.is_file()}
    outside = {path.relative_to(pages) for path in pages.rglob("*") if path.is_file()}
    assert outside - inside == {Path("book.zip")}


def test_the_packaged_library_installs_and_finds_its_records(pages: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    target = tmp_path / "installed"
    subprocess.run([*pip, "--target", target, pages / "modlib-book.zip"], check=True)
    assert (target / "modlib/viz/stepper.py").exists() and (target / "modlib/py.typed").exists()
    ours = list((ROOT / "book/results").glob("*/*.json"))
    if ours:
        count = "from modlib import viz; print(len(viz.records()))"
        command = [sys.executable, "-c", count]
        read = subprocess.run(
            command, env={"PYTHONPATH": target}, cwd=tmp_path, capture_output=True
        )
        assert int(read.stdout or -1) == len(ours), read.stderr


# --- in a browser ----------------------------------------------------------------------------


def browser() -> str | None:
    """A Chromium on this machine, if there is one and it can be steered."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return None
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for path in map(shutil.which, names) if path), None)


if BROWSER := browser():
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import Page, sync_playwright

    @pytest.fixture(scope="module")
    def chromium() -> Iterator[Any]:
        with sync_playwright() as playwright:
            running = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
            yield running
            running.close()

    def open_page(chromium: Any, path: Path, width: int, scheme: str) -> tuple[Page, list[str]]:
        """The page, and a list that collects what goes wrong on it."""
        page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.set_default_timeout(120_000)  # machines under test are busy
        wrong: list[str] = []
        local = ("file:", "data:", "blob:")
        page.on("request", lambda r: r.url.startswith(local) or wrong.append(f"asks for {r.url}"))
        page.on("pageerror", lambda error: wrong.append(f"script error: {error}"))
        page.on("requestfailed", lambda r: wrong.append(f"cannot load {r.url}"))
        page.goto(path.as_uri())
        page.wait_for_function(
            "!window.MathJax?.startup || MathJax.startup.promise.then(() => true)"
        )
        # Colours fade in when the theme is set; halfway their contrast is none of the page's.
        page.wait_for_function("!document.getAnimations().some(a => a.playState === 'running')")
        return page, wrong

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("name", PAGES)
    def test_page_in_a_browser(chromium: Any, pages: Path, name: str, scheme: str) -> None:
        width = {"light": 375, "dark": 1300}[scheme]
        page, wrong = open_page(chromium, pages / f"{name}.html", width, scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "scrolls sideways"
        typeset, formulas = (page.locator(each).count() for each in ("mjx-container", ".math"))
        assert typeset == formulas and page.locator("mjx-merror").count() == 0
        options = {"resultTypes": ["violations"], "preload": False}  # preloading fails on file:
        violations = Axe().run(page, options=options).response["violations"]
        found = [(v["id"], v["nodes"][0]["html"][:120], len(v["nodes"])) for v in violations]
        page.close()
        assert not wrong and not found

    @pytest.mark.parametrize("name", NOTEBOOKS)
    def test_steppers_move_with_keys_and_by_themselves(
        chromium: Any, pages: Path, name: str
    ) -> None:
        page, wrong = open_page(chromium, pages / f"{name}.html", 1300, "light")
        for figure in page.locator(".modlib-stepper").all():
            slider, shown = figure.locator("input"), figure.locator("[data-frame]:visible img")
            seen = []
            for key in ("Home", "ArrowRight", "End"):
                slider.press(key)
                assert shown.count() == 1
                seen.append(shown.get_attribute("alt"))
            assert seen[0] != seen[1]
            assert (
                slider.get_attribute("aria-valuetext")
                == figure.locator("figcaption:visible").inner_text()
            )
            slider.press("Home")
            figure.locator("button").click()
            page.wait_for_function("slider => slider.value === '1'", arg=slider.element_handle())
            assert figure.locator("button").get_attribute("aria-label") in {"Pause", "Play"}
        page.close()
        assert not wrong

    def test_search_works_without_a_server(chromium: Any, pages: Path) -> None:
        page, wrong = open_page(chromium, pages / "search.html", 1300, "light")
        page.goto((pages / "search.html").as_uri() + "?q=auxiliary+network")
        page.get_by_role("link", name="Notation and glossary").last.wait_for()
        page.wait_for_timeout(300)
        page.close()
        assert not wrong

    def test_steppers_show_one_frame_where_scripts_are_off(chromium: Any, pages: Path) -> None:
        context = chromium.new_context(java_script_enabled=False)
        page = context.new_page()
        page.goto((pages / f"{CONTENTS['root']}.html").as_uri())
        figure = page.locator(".modlib-stepper")
        assert figure.locator("[data-frame]:visible").count() == 1
        assert not figure.locator("input").is_visible()
        context.close()
