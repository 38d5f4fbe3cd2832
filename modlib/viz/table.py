"""Small tables for notebooks: rows in, an accessible HTML table out."""

from collections.abc import Mapping, Sequence
from html import escape


class Table:
    """Rows under a caption. Made by ``table``; notebooks display it by themselves.

    >>> shown = table([{"method": "E2EBP", "accuracy (%)": 93.1}], caption="One seed")
    >>> shown.columns, shown.rows
    (['method', 'accuracy (%)'], [['E2EBP', '93.1']])
    """

    def __init__(self, rows: Sequence[Mapping[str, object]], caption: str) -> None:
        self.columns = list(rows[0])
        self.rows = [[str(row[name]) for name in self.columns] for row in rows]
        self.caption = caption

    def __repr__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )

    def _repr_html_(self) -> str:
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in self.columns)
        body = "\n".join(self._row(row) for row in self.rows)
        return (
            '<div class="modlib-table" tabindex="0" role="region" '
            f'aria-label="{escape(self.caption)}" style="overflow-x:auto">\n'
            f"<table><caption>{escape(self.caption)}</caption>\n"
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
        )

    @staticmethod
    def _row(row: Sequence[str]) -> str:
        first, *rest = map(escape, row)
        cells = "".join(f"<td>{cell}</td>" for cell in rest)
        return f'<tr><th scope="row">{first}</th>{cells}</tr>'


def table(rows: Sequence[Mapping[str, object]], *, caption: str) -> Table:
    """A table whose first column names the rows.

    A published number stands in a column of its own, with its source in the caption or the cell.

    Args:
        rows: mappings with the same keys, which become the column titles.
        caption: what the table shows, with units, the number of seeds and the record it comes from.

    Raises:
        ValueError: there are no rows, or a row has other columns than the first.

    >>> table([{"method": "E2EBP", "accuracy (%)": "93.1 ± 0.2"}], caption="Three seeds")
    method  accuracy (%)
    E2EBP   93.1 ± 0.2
    """
    if not rows:
        raise ValueError("rows: none were given; a table needs at least one")
    for number, row in enumerate(rows):
        if list(row) != list(rows[0]):
            raise ValueError(
                f"rows: row {number} has the columns {list(row)}, the first has {list(rows[0])}"
            )
    return Table(rows, caption)
