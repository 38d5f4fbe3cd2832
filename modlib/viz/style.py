"""How the book's figures look: colours for every eye, labels on lines, the spread of the seeds."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation
from numpy.typing import ArrayLike

COLOURS = ("#7a0c0c", "#2850e6", "#00875a", "#a56900", "#8236a0", "#444444")
"""Dark red, blue, green, ochre, violet, grey: legible as text on white, apart for every eye."""

CATEGORY_COLOURS = {
    "end-to-end": COLOURS[0],
    "weakly modular": COLOURS[1],
    "modular": COLOURS[2],
}
"""The three categories of the survey always wear these colours."""


def style() -> None:
    """Give every later Matplotlib figure the look of the book.

    >>> style()
    >>> import matplotlib.pyplot as plt
    >>> plt.rcParams["axes.spines.top"]
    False
    >>> plt.rcParams["axes.prop_cycle"].by_key()["color"] == list(COLOURS)
    True
    """
    mpl.rcParams.update(
        {
            "axes.prop_cycle": cycler(color=COLOURS)
            + cycler(linestyle=["-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), "-"]),
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.labelcolor": "#222222",
            "axes.edgecolor": "#777777",
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 12,
            "axes.titleweight": "bold",
            "figure.constrained_layout.use": True,
            "figure.dpi": 120,
            "figure.facecolor": "white",
            "figure.figsize": (6.4, 3.8),
            "font.size": 11,
            "grid.color": "#e3e3e3",
            "grid.linewidth": 0.8,
            "image.cmap": "cividis",
            "legend.frameon": False,
            "lines.linewidth": 2.2,
            "savefig.facecolor": "white",
            "xtick.color": "#444444",
            "ytick.color": "#444444",
        }
    )


def band(
    axes: Axes,
    x: ArrayLike,
    runs: ArrayLike,
    *,
    label: str = "",
    color: str | None = None,
    **line: object,
) -> Line2D:
    """Draw the mean of several seeds as a line, and their least and greatest as a band around it.

    Args:
        axes: where to draw.
        x: (T,) positions, for example epochs.
        runs: (seeds, T) one row for each seed.
        label: the name of the line, drawn by :func:`label_lines`.
        color: the line's colour, by default the next of the cycle.
        line: further arguments of ``Axes.plot``.

    Raises:
        ValueError: ``runs`` is not a table of (seeds, T) that fits ``x``.

    >>> import matplotlib.pyplot as plt
    >>> runs, colour = [[0.1, 0.5], [0.3, 0.7]], CATEGORY_COLOURS["end-to-end"]
    >>> line = band(plt.figure().gca(), [1, 2], runs, label="E2EBP", color=colour)
    >>> line.get_ydata().round(2).tolist()
    [0.2, 0.6]
    """
    at, table = np.asarray(x, dtype=float), np.asarray(runs, dtype=float)
    if table.ndim != 2 or table.shape[1:] != at.shape:
        raise ValueError(
            f"runs: shape {table.shape} for x of shape {at.shape}; give one row of {at.size} a seed"
        )
    (drawn,) = axes.plot(at, table.mean(axis=0), label=label, color=color, **line)  # type: ignore[arg-type]
    if len(table) > 1:
        axes.fill_between(
            at, table.min(axis=0), table.max(axis=0), color=drawn.get_color(), alpha=0.18, lw=0
        )
    return drawn


def label_lines(axes: Axes, *, lines: Sequence[Line2D] | None = None, gap: float = 1.25) -> None:
    """Write each line's label at its right end in its own colour, instead of a legend.

    Labels that would lie on one another are moved apart. Call it last, when the limits are final.

    Args:
        axes: the axes whose lines to label.
        lines: by default every line that has a label.
        gap: the least distance of two labels, in heights of the text.

    >>> import matplotlib.pyplot as plt
    >>> axes = plt.figure().gca()
    >>> _ = axes.plot([0, 1], [0, 1], label="train"), axes.plot([0, 1], [0, 1], label="test")
    >>> label_lines(axes)
    >>> [text.get_text() for text in axes.texts]
    ['train', 'test']
    """
    if lines is None:
        lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    lines = [line for line in lines if line.get_label()]
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # settles limits and layout before they are read
    size = mpl.rcParams["font.size"]
    height = gap * size * figure.dpi / 72  # pixels
    ends = [
        axes.transData.transform(
            (np.asarray(line.get_xdata())[-1], np.asarray(line.get_ydata())[-1])
        )
        for line in lines
    ]
    places = _apart([end[1] for end in ends], height)
    for line, end, place in zip(lines, ends, places, strict=True):
        shift = ScaledTranslation(6 / 72, (place - end[1]) / figure.dpi, figure.dpi_scale_trans)
        axes.text(
            float(np.asarray(line.get_xdata())[-1]),
            float(np.asarray(line.get_ydata())[-1]),
            str(line.get_label()),
            color=line.get_color(),
            fontsize=size,
            va="center",
            transform=axes.transData + shift,
        )


def _apart(positions: Sequence[float], least: float) -> list[float]:
    """The positions in their order, moved as little as needed to be ``least`` apart.

    >>> _apart([0.0, 0.5, 10.0], 2.0)
    [-0.75, 1.25, 10.0]
    """
    clusters: list[list[int]] = []
    for index in sorted(range(len(positions)), key=lambda i: positions[i]):
        clusters.append([index])
        while len(clusters) > 1 and _span(clusters[-1], positions, least)[0] < (
            _span(clusters[-2], positions, least)[1] + least
        ):
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    moved = list(positions)
    for cluster in clusters:
        low, _ = _span(cluster, positions, least)
        for rank, index in enumerate(cluster):
            moved[index] = low + rank * least
    return moved


def _span(cluster: Sequence[int], positions: Sequence[float], least: float) -> tuple[float, float]:
    """Lowest and highest place of a cluster that is spread evenly about its mean."""
    centre = float(np.mean([positions[i] for i in cluster]))
    half = (len(cluster) - 1) * least / 2
    return centre - half, centre + half
