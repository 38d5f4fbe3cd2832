"""Figures, tables and records of the book. Reads records; knows no method and no data set."""

from modlib.viz.ledger import ledger
from modlib.viz.points import Points, points
from modlib.viz.records import group, mean_and_spread, records, records_folder, values
from modlib.viz.stepper import Stepper, stepper
from modlib.viz.style import CATEGORY_COLOURS, COLOURS, band, label_lines, style
from modlib.viz.table import Table, table

__all__ = [
    "CATEGORY_COLOURS",
    "COLOURS",
    "Points",
    "Stepper",
    "Table",
    "band",
    "group",
    "label_lines",
    "ledger",
    "mean_and_spread",
    "points",
    "records",
    "records_folder",
    "stepper",
    "style",
    "table",
    "values",
]
