"""Figures, tables and the reader of records."""

import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from bs4 import BeautifulSoup
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from modlib import viz
from modlib.viz.style import _apart


def draw(power: int) -> Figure:
    figure, axes = plt.subplots(figsize=(3, 2))
    axes.plot(range(10), [x**power for x in range(10)])
    return figure


def some_stepper(start: int = 0) -> viz.Stepper:
    return viz.stepper(
        map(draw, (1, 2, 3)), ["line", 'a <b> & "c"', "cubic"], label="power", start=start
    )


def parsed(stepper: viz.Stepper) -> BeautifulSoup:
    return BeautifulSoup(stepper._repr_html_(), "html.parser")


# --- the stepper -----------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 2])
def test_stepper_shows_one_frame_and_describes_each(start: int) -> None:
    page = parsed(some_stepper(start))
    frames = page.select("[data-frame]")
    assert [frame.has_attr("hidden") for frame in frames] == [i != start for i in range(3)]
    assert [image["alt"] for image in page.select("img")] == ["line", 'a <b> & "c"', "cubic"]
    assert page.select_one("input")["value"] == str(start)


def test_stepper_slider_can_be_used_without_a_mouse_or_sight() -> None:
    page = parsed(some_stepper())
    slider = page.select_one("label input[type=range]")
    assert page.select_one("label").get_text(strip=True) == "power"
    assert slider["aria-valuetext"] == "line" and slider["max"] == "2"
    assert page.select_one("button")["aria-label"] == "Play"
    assert page.select_one("[data-controls]")["style"].startswith(
        "display:none"
    )  # until scripts run


def test_stepper_is_the_same_text_every_time_and_asks_for_nothing() -> None:
    first, second = some_stepper()._repr_html_(), some_stepper()._repr_html_()
    assert first == second
    assert not re.search(r"https?://|<script| id=", first)


def test_stepper_frames_are_small_pictures_and_figures_are_closed() -> None:
    stepper = some_stepper()
    raw = io.BytesIO()
    draw(2).savefig(raw, format="png", dpi=144)
    plt.close("all")
    assert len(stepper.pictures[1]) < 0.6 * len(raw.getvalue())
    assert Image.open(io.BytesIO(stepper.pictures[1])).size == (432, 288)
    some_stepper()
    assert not plt.get_fignums()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"frames": [], "alts": []}, "none were given"),
        ({"frames": [b"1", b"2"], "alts": ["one"]}, "alts: 1 given for 2 frames"),
        ({"frames": [b"1"], "alts": ["a"], "captions": ["a", "b"]}, "captions: 2 given for 1"),
        ({"frames": [b"1"], "alts": ["a"], "start": 1}, "start: 1 given"),
    ],
)
def test_stepper_refuses_what_does_not_fit(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        viz.stepper(**arguments, label="step")  # type: ignore[arg-type]


def test_stepper_refuses_what_is_no_picture() -> None:
    with pytest.raises(TypeError, match="str given; give Matplotlib figures or PNG bytes"):
        viz.stepper(["picture.png"], ["a"], label="step")  # type: ignore[list-item]


# --- colours ---------------------------------------------------------------------------------

# Simulated dichromacy, Machado, Oliveira & Fernandes 2009, severity 1, on linear RGB.
EYES = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


def linear(colour: str) -> np.ndarray:
    value = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of linear RGB."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ np.clip(rgb, 0, 1) / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("colour", viz.COLOURS)
def test_colours_are_legible_as_text_on_white(colour: str) -> None:
    luminance = linear(colour) @ [0.2126, 0.7152, 0.0722]
    assert 1.05 / (luminance + 0.05) >= 4.5  # WCAG 2 AA


@pytest.mark.parametrize("eye", EYES)
def test_colours_differ_for_every_eye(eye: str) -> None:
    seen = [lab(np.array(EYES[eye]) @ linear(colour)) for colour in viz.COLOURS]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 20


def test_categories_differ_in_greyscale() -> None:
    lightness = sorted(lab(linear(colour))[0] for colour in viz.CATEGORY_COLOURS.values())
    assert min(np.diff(lightness)) > 8


# --- lines -----------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8), st.floats(0.1, 100))
def test_labels_move_apart_in_order_about_their_mean(positions: list[float], least: float) -> None:
    moved = _apart(positions, least)
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    gaps = np.diff([moved[i] for i in order])
    assert np.all(gaps >= least - 1e-9 * (1 + max(map(abs, moved))))
    assert np.isclose(np.mean(moved), np.mean(positions), atol=1e-6)
    if len(positions) > 1 and np.diff(sorted(positions)).min() > least:
        assert np.allclose(moved, positions)


def test_labels_stand_at_their_lines_and_do_not_overlap() -> None:
    viz.style()
    figure, axes = plt.subplots()
    for i, name in enumerate(("first", "second", "third")):
        axes.plot([0, 1], [0, 1 + 0.01 * i], label=name)
    viz.label_lines(axes)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert [text.get_color() for text in axes.texts] == list(viz.COLOURS[:3])
    assert all(box.x1 < figure.bbox.x1 for box in boxes)  # inside the picture
    plt.close(figure)


def test_band_spans_the_seeds() -> None:
    axes = plt.figure().gca()
    line = viz.band(axes, [1, 2, 3], [[1, 2, 3], [3, 2, 7]], label="E2EBP", color="#123456")
    assert line.get_ydata().tolist() == [2, 2, 5] and line.get_color() == "#123456"
    low, high = axes.collections[0].get_datalim(axes.transData).intervaly
    assert (low, high) == (1, 7)
    with pytest.raises(ValueError, match=r"runs: shape \(2,\) for x of shape \(3,\)"):
        viz.band(axes, [1, 2, 3], [1, 2])
    plt.close("all")


# --- records and tables ----------------------------------------------------------------------


def test_records_are_found_by_their_fields_and_ordered(tmp_path: Path) -> None:
    for method, seed, profile in [
        ("b", 1, "cpu"),
        ("a", 2, "cpu"),
        ("b", 0, "cpu"),
        ("a", 0, "gpu"),
    ]:
        record = {"recipe": "r", "method": method, "seed": seed, "profile": profile}
        record |= {"final": {"test_accuracy": seed / 10}}
        (tmp_path / method).mkdir(exist_ok=True)
        (tmp_path / method / f"{profile}-seed{seed}.json").write_text(json.dumps(record))
    found = viz.records(folder=tmp_path, recipe="r", profile="cpu")
    assert [(record["method"], record["seed"]) for record in found] == [
        ("a", 2),
        ("b", 0),
        ("b", 1),
    ]
    assert {
        name: viz.values(some, "final.test_accuracy") for name, some in viz.group(found).items()
    } == {
        "a": [0.2],
        "b": [0.0, 0.1],
    }


def test_records_say_what_is_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no record with recipe='none'"):
        viz.records(folder=tmp_path, recipe="none")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "half.json").write_text('{"recipe": "r", ')
    with pytest.raises(ValueError, match=r"half\.json is not valid JSON"):
        viz.records(folder=tmp_path)
    (tmp_path / "r" / "half.json").write_text("[]")
    with pytest.raises(ValueError, match=r"half\.json is not a run record"):
        viz.records(folder=tmp_path)


def test_spread_is_the_sample_standard_deviation() -> None:
    assert (
        viz.mean_and_spread([1.0, 2.0, 6.0], digits=4)
        == f"3.0000 ± {np.std([1, 2, 6], ddof=1):.4f}"
    )
    with pytest.raises(ValueError, match="none were given"):
        viz.mean_and_spread([])


def test_table_is_accessible_html() -> None:
    table = viz.table([{"method": "<A>", "x": 1}, {"method": "B", "x": 2}], caption="Two & more")
    page = BeautifulSoup(table._repr_html_(), "html.parser")
    assert page.caption.get_text() == "Two & more"
    assert [head.get_text() for head in page.select('th[scope="col"]')] == ["method", "x"]
    assert [head.get_text() for head in page.select('th[scope="row"]')] == ["<A>", "B"]
    assert [cell.get_text() for cell in page.select("td")] == ["1", "2"]
    assert page.div["tabindex"] == "0" and page.div["aria-label"]


def test_table_refuses_ragged_rows() -> None:
    with pytest.raises(ValueError, match="row 1 has the columns"):
        viz.table([{"a": 1}, {"b": 1}], caption="")


# --- points ---------------------------------------------------------------------------------------

ROWS = [
    {"name": name, "category": "modular", "marker": "o", "up": up, "MiB": x, "operations": 2 * x}
    for name, up, x in (("one", [70.0, 72.0], 1.0), ("two", [60.0], 2.0), ("a <b>", [65.0], 3.0))
]
ACROSS = {"MiB": "bytes held (MiB)", "operations": "operations"}


def drawn(**options: Any) -> Any:
    given = {"rows": ROWS, "across": ACROSS, "up": "accuracy (%)", "alt": "Three marks", **options}
    return viz.points(**given)


def test_points_are_marks_of_their_own_in_every_panel_and_reached_once_by_tab() -> None:
    page = BeautifulSoup(drawn()._repr_mimebundle_()["text/html"], "html.parser")
    assert len(page.select("[data-point]")) == len(page.select("[data-name]")) == 2 * len(ROWS)
    reached = page.select('[tabindex="0"]')
    assert [mark["aria-label"] for mark in reached] == [row["name"] for row in ROWS]
    assert not page.select("script") and "onclick" not in str(page)
    assert page.figure is not None and page.figure["aria-label"] == "Three marks"


def test_touching_a_point_shows_its_own_names_and_no_other() -> None:
    style = BeautifulSoup(drawn()._repr_mimebundle_()["text/html"], "html.parser").style
    assert style is not None
    rules = re.findall(r'data-point="(\d)"\]:is\(:hover, :focus\)\) \[data-name="(\d)"', style.text)
    assert rules == [("0", "0"), ("1", "1"), ("2", "2")]


def test_names_that_stay_are_marked_and_the_picture_shows_them_alone() -> None:
    page = BeautifulSoup(
        drawn(stays={"two": (9, 0)})._repr_mimebundle_()["text/html"], "html.parser"
    )
    assert {name["data-name"] for name in page.select("[data-stays]")} == {"1"}
    assert drawn(stays={"two": (9, 0)}).picture != drawn().picture


def test_no_id_comes_twice_in_a_figure_of_all_categories() -> None:
    categories = ("end-to-end", "weakly modular", "modular")
    rows = [{**row, "category": c} for row, c in zip(ROWS, categories, strict=True)]
    page = BeautifulSoup(drawn(rows=rows)._repr_mimebundle_()["text/html"], "html.parser")
    ids = [element["id"] for element in page.select("[id]")]
    assert len(ids) == len(set(ids)) > 0
    assert all(category in page.get_text() for category in categories)


def test_points_on_a_logarithmic_axis_read_as_plain_numbers_and_keep_their_names_inside() -> None:
    rows = [
        {"name": name, "category": "modular", "marker": "s", "up": [70.0], "MiB": mib}
        for name, mib in (("low", 5.0), ("middle", 40.0), ("high", 80.0))
    ]
    figure = drawn(rows=rows, across={"MiB": "bytes"}, xscale="log")
    texts = {t.text: str(t) for t in BeautifulSoup(figure.svg, "html.parser").find_all("text")}
    assert {"5", "10", "50"} <= set(texts)
    # 40 is in the left part of a linear axis from 5 to 80, and in the right of a logarithmic one
    assert "text-anchor: end" in texts["middle: 70.0"] and "end" not in texts["low: 70.0"]


def test_points_are_the_same_each_time() -> None:
    assert drawn()._repr_mimebundle_() == drawn()._repr_mimebundle_()


def test_points_without_rows_or_with_one_that_lacks_a_key_are_refused() -> None:
    with pytest.raises(ValueError, match="rows: none were given"):
        drawn(rows=[])
    with pytest.raises(ValueError, match="rows: one lacks seconds"):
        drawn(across={"seconds": "time"})
    with pytest.raises(
        ValueError, match="rows: category='local' is unknown; choose from end-to-end"
    ):
        drawn(rows=[{**ROWS[0], "category": "local"}])


def test_the_ledger_counts_operations_over_all_epochs_in_units_of_one_recipe(
    tmp_path: Path,
) -> None:
    for recipe, seed, epochs, flops in [("a", 0, 8, 10), ("a", 1, 8, 10), ("b", 0, 16, 20)]:
        record = {"recipe": recipe, "seed": seed, "profile": "cpu", "method": "M", "modules": 3}
        record |= {"category": "modular", "peak_saved_bytes": 2**21, "costs": {"step_flops": flops}}
        record |= {"settings": {"epochs": epochs}, "final": {"test_accuracy": 0.5 + seed / 10}}
        (tmp_path / recipe).mkdir(exist_ok=True)
        (tmp_path / recipe / f"cpu-seed{seed}.json").write_text(json.dumps(record))
    names = {"b": "second", "absent": "third", "a": "first"}
    with pytest.raises(FileNotFoundError, match="no record of 'absent', the unit"):
        viz.ledger(names, unit="absent", folder=tmp_path)
    second, first = viz.ledger(names, unit="a", folder=tmp_path)
    assert (first["name"], first["operations"], first["up"]) == ("first", 1.0, [50.0, 60.0])
    assert (second["operations"], second["MiB"], second["marker"]) == (4.0, 2.0, "^")
