"""Tables of the HTML report, complete without a script; page.js makes them sort and filter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat

from safeproj.report.html_page.document import text


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        shown: its text, not yet escaped.
        order: the number that it is sorted by, None to sort by the text.
        numeric: whether it is set to the right.
        mark: class for the style and the script.
    """

    shown: str
    order: float | None = None
    numeric: bool = False
    mark: str = ""

    def html(self, tag: str) -> str:
        """Return the cell as an element; `th` is the head of its row."""
        classes = " ".join(filter(None, ("number" if self.numeric else "", self.mark)))
        attributes = ' scope="row"' if tag == "th" else ""
        attributes += f' class="{classes}"' if classes else ""
        attributes += "" if self.order is None else f' data-order="{self.order!r}"'
        return f"<{tag}{attributes}>{text(self.shown)}</{tag}>"


@dataclass(frozen=True)
class Row:
    """One row: its cells, of which the first names it, and the cosine that a tau is compared to."""

    cells: Sequence[Cell]
    cosine: float | None = None

    def html(self) -> str:
        """Return the row as an element."""
        attribute = "" if self.cosine is None else f' data-cosine="{self.cosine!r}"'
        cells = (cell.html("td" if i else "th") for i, cell in enumerate(self.cells))
        return f"<tr{attribute}>{''.join(cells)}</tr>"


def number(value: float | None, form: str = ".4f") -> Cell:
    """Return a number; nothing where there is none."""
    return Cell("" if value is None else format(value, form), value, numeric=True)


def table(
    key: str,
    caption: str,
    headings: Sequence[str],
    rows: Iterable[Row],
    *,
    tools: bool = False,
    stacked: bool = False,
) -> str:
    """Return a table.

    Args:
        key: its id.
        caption: what it shows.
        headings: of its columns.
        rows: each with as many cells.
        tools: whether it sorts and filters.
        stacked: whether cells are below each other on a narrow screen, those with the mark `aside`
            left out; it does not filter.
    """
    listed = list(rows)
    numeric = [cell.numeric for cell in listed[0].cells] if listed else [False] * len(headings)
    head = "".join(
        f'<th scope="col"{" class=number" if right else ""}>{text(heading)}</th>'
        for heading, right in zip(headings, numeric, strict=True)
    )
    body = "\n".join(row.html() for row in listed)
    classes = " ".join(["tools"] * tools + ["stacked"] * stacked)
    kind = f' class="{classes}"' if classes else ""
    # The region can take the focus, so that a keyboard can scroll a wide table.
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{key}-caption">\n'
        f'<table id="{key}"{kind}>\n<caption id="{key}-caption">{text(caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def filled(
    key: str,
    caption: str,
    columns: dict[str, list[Cell]],
    *keep: str,
    cosines: Iterable[float | None] = repeat(None),
    stacked: bool = False,
) -> str:
    """Return a table without the columns in which nothing stands, but for those to keep."""
    used = {
        name: cells
        for name, cells in columns.items()
        if name in keep or any(cell.shown for cell in cells)
    }
    rows = (Row(cells, cosine) for *cells, cosine in zip(*used.values(), cosines, strict=False))
    return table(key, caption, list(used), rows, tools=True, stacked=stacked)


def pairs(items: Iterable[tuple[str, str]]) -> str:
    """Return names and what they stand for as a description list."""
    listed = (f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in items)
    return f"<dl>\n{chr(10).join(listed)}\n</dl>"
