"""Reads tables of numbers: CSV, Parquet and NumPy files."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._numbers import between
from .base import ExampleData, ExampleSet, StoredExamples
from .columns import (
    ArrayColumns,
    Columns,
    check_numbers,
    is_read_whole,
    known_columns,
    leave_out,
    names_in,
    numbers,
    open_columns,
    shortened,
)
from .files import note, path_of
from .standardization import Standardization


class Table(ExampleData):
    """Reads the rows of a table of numbers from a CSV, Parquet or NumPy file.

    A row is an example of shape (d,), its values in the order of the columns. The first line of a CSV holds the names
    of the columns (.csv or .tsv, also .gz; separated by commas, semicolons or tabs). A .parquet file has names. The
    columns of an .npy file [n, d] are numbered from 1. In an .npz file each array [n] is a column with its name, and
    one array [n, d] may stand beside them. True and false are 1 and 0. Rows are counted from 1, without the line of
    names. One line on the terminal says what was found and what was left out.

    Other files can be read like the one trained on. A run's checkpoint keeps mean, standard deviation, columns and
    classes, and `kdejsd score RUN --data.path OTHER` uses them for another file.

    Args:
        path: the file, or a folder of .parquet files, which are read in the order of their paths. `~` and environment
            variables are expanded.
        columns: the names of the columns to take, in order; None takes all.
        without: the names of columns to leave out.
        label: the name of a column whose distinct values are classes, numbered in order; it is no part of the examples.
            Rows without a value have no label.
        held_out: the share of the rows held out, drawn by the seed, where there is no held_out_path.
        held_out_path: a file with these columns, whose rows are held out. Without the label's column they have no
            label.
        standardize: move and scale each column to mean 0 and standard deviation 1 of the training rows, in float64.
            `restored` goes back. False rounds the values to float32 as they are.
        keep_in_memory: hold all rows in memory, 4 bytes a value, and twice that while they are read. False reads the
            rows of a minibatch when it comes. From an .npy file they are read directly. From Parquet they come by way
            of a copy on disk, 4 bytes a value, in $XDG_CACHE_HOME or ~/.cache, which is gone with the process.
        kwargs: as in `ExampleData`.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if a file is damaged, has no names, or has columns of a name twice; if a column is not there, no
            number, missing or infinite in some row or always the same; if the label has fractions; if there are fewer
            than three rows; and in the cases of `ExampleData`.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from kdejsd.data import Table
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "people.csv")
        ...     _ = path.write_text("name,height,age,town\\nA,150,20,x\\nB,160,40,y\\nC,170,60,x\\nD,190,60,y\\n")
        ...     data = Table(path, without="name", label="town")
        ...     examples, labels, indices = data.training[torch.arange(3)]
        >>> data.example_shape, data.columns, data.class_names, labels
        ((2,), ['height', 'age'], ['x', 'y'], tensor([1, 0, 1]))
        >>> data.restored(examples).round().tolist()
        [[160.0, 40.0], [170.0, 60.0], [190.0, 60.0]]
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        columns: list[str | int] | str | None = None,
        without: list[str | int] | str | None = None,
        label: str | int | None = None,
        held_out: float = 0.1,
        held_out_path: str | os.PathLike[str] | None = None,
        standardize: bool = True,
        keep_in_memory: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path = path_of(path)
        self.held_out_path = None if held_out_path is None else path_of(held_out_path, "held_out_path")
        self.held_out_share = between("held_out", held_out, 0, 1)
        self.standardize = standardize
        self.keep_in_memory = keep_in_memory
        self.label = None if label is None else str(label)
        self._classes: list[Any] = []
        self._chosen = _names(columns)
        self._without = _names(without) or []

    @property
    def example_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (len(self.columns),)

    @cached_property
    def columns(self) -> list[str]:
        """Returns the names of the columns that are inputs, in the order of an example's values."""
        return self._inputs(names_in(self.path))

    @property
    def class_names(self) -> list[Any]:  # type: ignore[override]
        """Returns the distinct values of the label, in the order of their numbers; it reads the file."""
        self.setup()
        return self._classes

    def _inputs(self, names: list[str]) -> list[str]:
        for setting, chosen in (("columns", self._chosen or []), ("without", self._without), ("label", self._labels)):
            known_columns(self.path, names, chosen, setting)
        twice = [name for name, times in Counter(self._chosen or []).items() if times > 1]
        if twice:
            raise ValueError(f"columns must name each column once, got {shortened(twice)} more than once")
        left = {*self._without, *self._labels}
        inputs = [name for name in (names if self._chosen is None else self._chosen) if name not in left]
        if not inputs:
            raise ValueError(f"columns must leave a column of {self.path} to train on, got none of {shortened(names)}")
        return inputs

    @property
    def _labels(self) -> list[str]:
        return [] if self.label is None else [self.label]

    def _labels_in(self, file: Columns) -> list[str]:
        """Returns the label's column, none for rows to hold out that have no classes."""
        return [name for name in self._labels if name in file.names]

    def load(self) -> tuple[ExampleSet, ExampleSet]:
        if not self.keep_in_memory and is_read_whole(self.path):
            raise ValueError(
                f"keep_in_memory must be True for {self.path}, of which no part can be read alone: save the table as "
                ".parquet or .npy"
            )
        file = open_columns(self.path)
        other = None if self.held_out_path is None else open_columns(self.held_out_path)
        files = [file] if other is None else [file, other]
        names = self.columns
        leasts = (3,) if other is None else (2, 1)  # two to train on and one held out
        for each, least in zip(files, leasts, strict=True):
            known_columns(each.path, each.names, names, "columns")
            if each.count < least:
                raise ValueError(f"{each.path} must have at least {least} rows below the names, got {each.count}")
            check_numbers(each, names)
        if other is None:
            parts = self._parts(file.count, self.held_out_share)
        else:
            parts = torch.arange(file.count), torch.arange(other.count)
        if not self._classes:
            found = set().union(*(_values(each, name) for each in files for name in self._labels_in(each)))
            if any(isinstance(value, str) for value in found):  # 1 of a file of numbers is "1" of a file of text
                found = {str(value) for value in found}
            self._classes = sorted(found, key=lambda value: (isinstance(value, str), value))
        if self.standardize and self.standardization is None:
            self.standardization = self._measured(file, parts[0])
        sets = [self._set(each) for each in files]
        if other is None:
            sets = [sets[0].subset(part) for part in parts]
        self._tell(file, other, sets)
        return sets[0], sets[1]

    def _measured(self, file: Columns, training: Tensor) -> Standardization:
        """Returns the standardisation by the training rows of a file."""
        chosen = torch.zeros(file.count, dtype=torch.bool)
        chosen[training] = True
        parts = file.parts(self.columns)
        found = Standardization.of(numbers(batch, self.columns)[chosen[rows]] for rows, batch in parts)
        constant = [name for name, scale in zip(self.columns, found.scale.tolist(), strict=True) if scale == 0]
        if constant:
            raise ValueError(
                f"{file.path} must have columns that change, and the same number stands in all {len(training)} "
                f"training rows of {shortened(constant)}, so that there is nothing to learn or to divide by; "
                f"{leave_out(constant)}"
            )
        return found

    def _set(self, file: Columns) -> ExampleSet:
        """Returns the rows of a file with their labels, in memory or stored."""
        labels = torch.full((file.count,), -1)
        for name in self._labels_in(file):
            for rows, batch in file.parts([name]):
                labels[rows] = self._numbered(batch.column(name))
        examples: Tensor | StoredExamples
        if self.keep_in_memory:
            examples = torch.empty(file.count, len(self.columns))
            for rows, part in self._prepared(file):
                examples[rows] = part
        elif isinstance(file, ArrayColumns):
            examples = _Rows(file.values, file.places(self.columns), self.standardization)
        else:
            examples = _Rows(self._copied(file))
        return ExampleSet(examples, labels)

    def _prepared(self, file: Columns) -> Iterator[tuple[slice, Tensor]]:
        """Yields the rows of a file as they are trained on, in parts."""
        for rows, batch in file.parts(self.columns):
            yield rows, _prepared(numbers(batch, self.columns), self.standardization)

    def _copied(self, file: Columns) -> np.ndarray:
        """Writes the rows of a file as they are trained on, and returns them mapped into memory."""
        size = 4 * file.count * len(self.columns)
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kdejsd"
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if size > free:
            raise OSError(
                f"keep_in_memory=False needs {_in_bytes(size)} in {folder} for the rows of {file.path}, and "
                f"{_in_bytes(free)} are free: set XDG_CACHE_HOME to a folder with more room"
            )
        note(self, f"a copy of the rows of {file.path}, {_in_bytes(size)}, is in {folder} while this process runs")
        with tempfile.TemporaryFile(dir=folder) as copy:  # without a name, so that nothing is left even of a kill
            for _, part in self._prepared(file):
                copy.write(part.numpy().data)
            copy.flush()
            return np.memmap(copy, np.float32, "r", shape=(file.count, len(self.columns)))

    def _numbered(self, column: Any) -> Tensor:
        """Returns the class numbers [n] int64 of a part of the label; -1 is for what is no class."""
        number = {str(value): place for place, value in enumerate(self._classes)}
        number |= {value: place for place, value in enumerate(self._classes)}
        encoded = column.dictionary_encode()
        values = [_class(value) for value in encoded.dictionary.to_pylist()]
        numbers_of = np.array([*(number.get(value, number.get(str(value), -1)) for value in values), -1])
        return torch.from_numpy(numbers_of[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)])

    def _tell(self, file: Columns, other: Columns | None, sets: Sequence[ExampleSet]) -> None:
        columns = "1 column" if len(self.columns) == 1 else f"{len(self.columns)} columns"
        said = [f"{file.count} rows of {columns} in {file.path}"]
        said[0] += (
            f", {len(sets[1])} of them held out" if other is None else f", {other.count} held out in {other.path}"
        )
        if self.label is not None:
            counts = Counter(torch.cat([part.labels for part in sets]).tolist())
            told = [f"{value} {counts[place]}" for place, value in enumerate(self._classes)]
            said.append(f"classes of {self.label}: {shortened(told)}")
            if counts[-1]:
                said.append(f"without a class: {counts[-1]}")
        used = {*self.columns, *self._labels}
        left = [name for name in file.names if name not in used]
        if file.unnamed:
            left.append(f"{file.unnamed} without a name")
        left += [f"{name} (in the names of folders alone)" for name in file.in_folders]
        if left:
            said.append(f"left out: {shortened(left)}")
        note(self, "; ".join(said))

    # In a checkpoint

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"columns": self.columns, "classes": self._classes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if state and (state["columns"], state["classes"]) != (self.__dict__.get("columns"), self._classes):
            self.columns, self._classes, self._sets = list(state["columns"]), list(state["classes"]), None


class _Rows(StoredExamples):
    """Reads rows of an array that is mapped into memory, those of the given columns, and standardises them."""

    def __init__(
        self, values: np.ndarray, places: list[int] | None = None, standardization: Standardization | None = None
    ) -> None:
        super().__init__(len(values))
        self.values = values
        self.places = places
        self.standardization = standardization

    def read(self, rows: Tensor) -> Tensor:
        found = self.values[rows.numpy()]
        if self.places is None:
            return torch.from_numpy(found)
        return _prepared(torch.from_numpy(found[:, self.places].astype(np.float64)), self.standardization)


def _prepared(values: Tensor, standardization: Standardization | None) -> Tensor:
    return values.float() if standardization is None else standardization.done(values)


def _names(given: list[str | int] | str | None) -> list[str] | None:
    if given is None:
        return None
    return [str(name) for name in given] if isinstance(given, (list, tuple)) else [str(given)]


def _values(file: Columns, name: str) -> set[Any]:
    """Returns the distinct values of a label.

    Raises:
        ValueError: if they are no classes.
    """
    found: set[Any] = set()
    for _, batch in file.parts([name]):
        found.update(batch.column(name).dictionary_encode().dictionary.to_pylist())
    found = {value for value in found if value is not None and value == value}
    strange = [value for value in found if not isinstance(value, (str, int, float))]
    strange += [value for value in found if isinstance(value, float) and not value.is_integer()]
    if strange:
        raise ValueError(
            f"label must name a column of classes, given as text or whole numbers, and {name} of {file.path} has "
            f"{strange[0]}"
        )
    return {_class(value) for value in found}


def _class(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _in_bytes(size: int) -> str:
    place = min(4, int(math.log(max(size, 1), 1000)))
    return f"{size / 1000**place:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[place]}"
