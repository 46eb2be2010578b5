"""What all records of a run can do: show themselves, and save themselves, in any format."""

from __future__ import annotations

import os
from typing import Any


class Rendered:
    """A record, which the formats of `safeproj.report` show."""

    def render(
        self,
        format: str = "table",  # noqa: A002
        *,
        width: int = 100,
        color: bool = False,
        verbose: bool = False,
    ) -> str:
        """Return it as text, with a newline at its end.

        Args:
            format: `table`, `json`, `markdown` or `html`; of what a gate found also `sarif`,
                `junit` and `github`.
            width: columns of a table.
            color: whether a table has colours, for a terminal.
            verbose: list every finding of a gate in any format.

        Raises:
            SafeprojError: there is no such format of it, or it needs an extra that is not
                installed.
        """
        from safeproj.report import render

        shown: Any = self
        return render(shown, format, width=width, color=color, verbose=verbose)

    def save(
        self,
        path: str | os.PathLike[str],
        format: str | None = None,  # noqa: A002
        *,
        verbose: bool = False,
    ) -> None:
        """Write it to a file, whatever is there: the file is complete, or as it was.

        Args:
            path: the file.
            format: as for `render`; told from the end of the name if None: `.json`, `.md`, `.html`,
                `.txt`; of what a gate found also `.sarif`, and `.xml` for JUnit.
            verbose: as for `render`.

        Raises:
            SafeprojError: as for `render`, the name tells no format, or the file cannot be written.
        """
        from safeproj.report import save

        shown: Any = self
        save(shown, path, format, verbose=verbose)

    def _repr_html_(self) -> str:
        """Return it as notebooks show it."""
        from safeproj.report.notebook import fragment

        shown: Any = self
        return fragment(shown)
