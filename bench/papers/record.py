"""Keeps the rows of a study in a CSV file, from which a run that was cut off goes on."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Record:
    """The rows of a study: those that the file has already, then those that are added.

    `path` None keeps the rows in memory alone. `kinds` has the name and the type of each column. An empty cell is None.
    The file is replaced as a whole, so that a run that is stopped leaves the rows of before or those of now.

    Raises ValueError if the file has other columns or a cell that is not of its column's type.
    """

    def __init__(self, path: Path | None, kinds: Mapping[str, Callable[[Any], Any]]) -> None:
        self.path, self.kinds = path, kinds
        self.rows: list[Row] = []
        if path is None or not path.exists():
            return
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            if columns != list(kinds):
                raise ValueError(
                    f"{path} is not a record of this study: expected the columns {', '.join(kinds)}, got "
                    f"{', '.join(columns) or 'none'}"
                )
            for row in reader:
                try:
                    self.rows.append({name: kind(row[name]) if row[name] else None for name, kind in kinds.items()})
                except ValueError as error:
                    raise ValueError(f"{path}, line {reader.line_num}: {error}") from None

    def find(self, **wanted: object) -> list[Row]:
        """Returns the rows whose columns have these values."""
        return matching(self.rows, **wanted)

    def add(self, *rows: Mapping[str, Any]) -> None:
        """Adds rows, with None for columns that they lack, and writes the file."""
        if unknown := {name for row in rows for name in row} - set(self.kinds):
            raise ValueError(f"a row has columns that the record lacks: {', '.join(sorted(unknown))}")
        self.rows += [{name: row.get(name) for name in self.kinds} for row in rows]
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f"{self.path.name}.part")
        with unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(self.kinds), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        unfinished.replace(self.path)


def matching(rows: list[Row], **wanted: object) -> list[Row]:
    """Returns the rows whose columns have these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def file_name(key: Mapping[str, Any]) -> str:
    """Returns a name for a file that belongs to the row with these values alone."""
    return "_".join(map(str, key.values())).replace(" ", "_")


def rounded(value: float, digits: int = 5) -> float:
    """Returns a number as a record has it, so that a row that is read again prints the same."""
    return float(f"{value:.{digits}g}")
