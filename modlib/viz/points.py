"""Points that tell their names: a scatter plot whose marks answer to a pointer and to the Tab key, scriptless.

Matplotlib draws the figure once. It travels as a picture, and as SVG in which every mark is an element of its
own; a style sheet shows the name of the one that is touched, in all panels at once.
"""

import io
import xml.etree.ElementTree as ET
from collections.abc import Container, Mapping, Sequence
from hashlib import sha256
from html import escape
from statistics import fmean
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from modlib.viz.style import CATEGORY_COLOURS

_SVG = "http://www.w3.org/2000/svg"
_KEYS = ("name", "category", "marker", "up")


class Points:
    """A scatter plot as SVG, with its picture. Made by ``points``; notebooks display it by themselves.

    >>> row = {"name": "A", "category": "modular", "marker": "o", "up": [1.0], "MiB": 2.0}
    >>> points([row], {"MiB": "bytes held (MiB)"}, "accuracy (%)", alt="One mark").names
    ('A',)
    """

    def __init__(self, svg: str, picture: bytes, alt: str, names: Sequence[str]) -> None:
        self.svg, self.picture, self.alt, self.names = svg, picture, alt, tuple(names)

    def __repr__(self) -> str:
        return f"Points({len(self.names)}): {self.alt}"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return {"text/html": self._html(), "image/png": self.picture, "text/plain": repr(self)}

    def _html(self) -> str:
        shown = ",\n".join(
            f'figure:has([data-point="{i}"]:is(:hover, :focus)) [data-name="{i}"]'
            for i in range(len(self.names))
        )
        return (
            "<style>.modlib-points{margin:0}\n"
            ".modlib-points svg{width:100%;max-width:46rem;height:auto;background:white}\n"
            ".modlib-points [data-name]:not([data-stays]){visibility:hidden}\n"
            ".modlib-points [data-point]:focus{outline:2px solid}\n"
            f"{shown}{{visibility:visible!important}}</style>\n"
            f'<figure class="modlib-points" role="group" aria-label="{escape(self.alt)}">\n'
            f"{self.svg}\n</figure>"
        )


def points(
    rows: Sequence[Mapping[str, Any]],
    across: Mapping[str, str],
    up: str,
    *,
    alt: str,
    stays: Mapping[str, tuple[float, float]] | None = None,
    **limits: Any,
) -> Points:
    """Draw one mark a row in one panel for each quantity across; a mark tells its name when it is touched.

    Args:
        rows: each with ``name``, ``category`` (its colour: "end-to-end", "weakly modular", "modular"),
            ``marker`` (one of Matplotlib's), ``up`` (a list: one number for each seed; the mark stands at
            the mean, with a line from the least to the greatest), and a number for each key of ``across``.
        across: for each panel the key of its quantity, and the label of its axis.
        up: the label of the upright axis.
        alt: what a reader who cannot see the figure needs to know.
        stays: names that are always shown, on the static picture too, each with its place beside the mark
            in points, (right, up).
        limits: further arguments of ``Axes.set`` for all panels, such as ``ylim``, or ``xscale="log"``.

    Raises:
        ValueError: there are no rows, or one lacks a key or is of no known category.

    >>> row = {"name": "E2EBP", "category": "end-to-end", "marker": "s", "up": [78.0, 79.0], "MiB": 22.6}
    >>> points([row], {"MiB": "bytes held (MiB)"}, "test accuracy (%)", alt="One mark", stays={"E2EBP": (9, 0)})
    Points(1): One mark
    """
    if not rows:
        raise ValueError("rows: none were given; give one for each mark")
    for row in rows:
        if missing := [key for key in (*_KEYS, *across) if key not in row]:
            raise ValueError(f"rows: one lacks {', '.join(missing)}; it has {', '.join(row)}")
        if row["category"] not in CATEGORY_COLOURS:
            known = ", ".join(CATEGORY_COLOURS)
            raise ValueError(f"rows: category={row['category']!r} is unknown; choose from {known}")
    stays = stays or {}
    figure, panels = plt.subplots(
        len(across), 1, figsize=(6.8, 3.2 * len(across)), squeeze=False, sharey=True
    )
    for place, (axes, (key, label)) in enumerate(zip(panels[:, 0], across.items(), strict=True)):
        for i, row in enumerate(rows):
            _mark(axes, row, key, f"{i}-{place}", row["name"] in stays)
        axes.set(xlabel=label, ylabel=up, **limits)
        if axes.get_xscale() == "log":  # with numbers that a reader can read off, 10 and not 10¹
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        for i, row in enumerate(rows):  # last, so that no mark covers a name
            _name(axes, row, key, f"{i}-{place}", stays.get(row["name"]))
    _key(panels[0, 0], rows)
    names = [str(row["name"]) for row in rows]
    picture, svg = _drawn(figure, names, stays)
    plt.close(figure)
    return Points(svg, picture, alt, names)


def _mark(axes: Axes, row: Mapping[str, Any], key: str, place: str, stays: bool) -> None:
    colour, mean = CATEGORY_COLOURS[row["category"]], fmean(row["up"])
    axes.vlines(row[key], min(row["up"]), max(row["up"]), color=colour, lw=1.2, alpha=0.6)
    size, alpha = (8.0, 1.0) if stays else (6.5, 0.75)
    axes.plot(
        row[key], mean, row["marker"], color=colour, ms=size, alpha=alpha, gid=f"point-{place}"
    )


def _name(
    axes: Axes, row: Mapping[str, Any], key: str, place: str, stays: tuple[float, float] | None
) -> None:
    where = axes.transAxes.inverted().transform(axes.transData.transform((row[key], 0.0)))
    left = where[0] > 0.6  # of the panel's width: the name stays inside
    shift = stays or (-9 if left else 9, 0)
    axes.annotate(
        f"{row['name']}: {fmean(row['up']):.1f}",
        (row[key], fmean(row["up"])),
        shift,
        textcoords="offset points",
        ha="center" if not shift[0] else "right" if shift[0] < 0 else "left",
        va="center",
        fontsize=9,
        color=CATEGORY_COLOURS[row["category"]],
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0 if stays else 0.85, "pad": 1.5},
        gid=f"name-{place}",
    )


def _key(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """What the colours mean, in these colours, at the foot of the panel."""
    seen = {row["category"] for row in rows}
    for line, category in enumerate(c for c in reversed(CATEGORY_COLOURS) if c in seen):
        axes.text(
            0.99,
            0.04 + 0.085 * line,
            category,
            color=CATEGORY_COLOURS[category],
            transform=axes.transAxes,
            ha="right",
            fontsize=9,
            weight="bold",
            gid="key",
        )


def _drawn(figure: Figure, names: Sequence[str], stays: Container[str]) -> tuple[bytes, str]:
    """The figure as a picture with the names that stay, and as SVG with all of them."""
    salt = sha256("".join(names).encode()).hexdigest()
    with mpl.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        whole = io.StringIO()
        figure.savefig(whole, format="svg", metadata={"Date": None, "Creator": None})
    for axes in figure.axes:
        for text in axes.texts:
            kind, _, place = str(text.get_gid()).partition("-")
            text.set_visible(kind == "key" or names[int(place.split("-")[0])] in stays)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110, facecolor="white", metadata={"Software": None})
    return picture.getvalue(), _answering(whole.getvalue(), names, stays)


def _answering(svg: str, names: Sequence[str], stays: Container[str]) -> str:
    """The SVG with marks that can be pointed at and reached by Tab, and names that know their marks."""
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ET.fromstring(svg)
    for element in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(element)
    for element in root.iter(f"{{{_SVG}}}g"):
        kind, _, place = element.get("id", "").partition("-")
        if kind == "key":
            del element.attrib["id"]  # one id for several lines
        if kind not in ("point", "name"):
            continue
        number, panel = place.split("-")
        element.set(f"data-{kind}", number)
        del element.attrib["id"]
        if kind == "name":
            element.set("aria-hidden", "true")
            if names[int(number)] in stays:
                element.set("data-stays", "")
        elif panel == "0":
            element.attrib |= {"tabindex": "0", "role": "img", "aria-label": names[int(number)]}
    return ET.tostring(root, encoding="unicode")
