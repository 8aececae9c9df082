"""Reads the columns of CSV, Parquet and NumPy files in parts, by pyarrow and numpy, and refuses what is no number."""

from __future__ import annotations

import json
import re
import shlex
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._extras import train_extra

with train_extra():
    import pyarrow as pa
    import pyarrow.csv as pacsv
    import pyarrow.parquet as pq

_CSV = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
_SUFFIXES = (*_CSV, ".parquet", ".npy", ".npz")
_VALUES = 2**22  # in a part, in which all columns together take 32 MiB
_LINE = 2**20  # bytes of a CSV file read at a time
_BUFFER = 2**20  # bytes of a Parquet column read at a time; by default what has been read of a file is kept
_SHOWN = 10  # of many names


class Columns(ABC):
    """Describes a file, or a folder of Parquet files, as columns with names.

    Attributes:
        path: the file or folder.
        names: the names of the columns, in order.
        count: the number of rows.
        unnamed: the number of columns left out because they have no name, as the index has that pandas writes.
        in_folders: the columns of a partitioned table, which are in the names of folders alone and cannot be read.
    """

    in_folders: Sequence[str] = ()

    def __init__(self, path: Path, names: Sequence[str], count: int) -> None:
        self.path = path
        self.count = count
        twice = sorted(name for name, times in Counter(names).items() if name and times > 1)
        if twice:
            raise ValueError(
                f"{path} must have a name of its own for every column, and {shortened(twice)} "
                f"{'stands' if len(twice) == 1 else 'stand'} more than once: rename the columns"
            )
        self.names = [name for name in names if name and not name.startswith("__index_level_")]
        self.unnamed = len(names) - len(self.names)

    @abstractmethod
    def kind(self, name: str) -> pa.DataType:
        """Returns the type of a column's values."""

    @abstractmethod
    def batches(self, names: list[str], size: int) -> Iterator[Any]:
        """Yields the columns of these names, in parts of at most `size` rows, as pyarrow.RecordBatch."""

    def parts(self, names: list[str]) -> Iterator[tuple[slice, Any]]:
        """Yields the columns of these names in parts, each with the place of its rows."""
        start = 0
        for batch in self.batches(names, max(1, _VALUES // max(1, len(names)))):
            yield slice(start, start + len(batch)), batch
            start += len(batch)


class _TableColumns(Columns):
    """Holds the columns of a CSV or an .npz file in memory."""

    def __init__(self, path: Path, table: pa.Table) -> None:
        super().__init__(path, table.schema.names, table.num_rows)
        self._table = table

    def kind(self, name: str) -> pa.DataType:
        return self._table.schema.field(name).type

    def batches(self, names: list[str], size: int) -> Iterator[Any]:
        yield from self._table.select(names).to_batches(size)


class _ParquetColumns(Columns):
    """Reads the columns of a Parquet file, or of all those in a folder in the order of their paths."""

    def __init__(self, path: Path) -> None:
        self._files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not self._files:
            raise FileNotFoundError(f"{path} must be a file or a folder of .parquet files, and holds none")
        first, counts = self._opened(self._files[0]), []
        self._schema = first.schema_arrow
        for file in self._files:
            found = self._opened(file)
            kinds = {field.name: _kind(field.type) for field in found.schema_arrow}
            other = [field.name for field in self._schema if kinds.get(field.name) != _kind(field.type)]
            if other:
                raise ValueError(
                    f"{file} must have the columns of {self._files[0]}, each of the same kind, and lacks "
                    f"{shortened(other)}"
                )
            counts.append(found.metadata.num_rows)
        super().__init__(path, self._schema.names, sum(counts))
        if path.is_dir():  # where a partitioned table has folders such as year=2026, which its files do not repeat
            folders = {part for file in self._files for part in file.relative_to(path).parent.parts if "=" in part}
            self.in_folders = sorted({folder.partition("=")[0] for folder in folders} - set(self.names))

    def _opened(self, file: Path) -> pq.ParquetFile:
        return _reading(file, "a Parquet file", lambda: pq.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False))

    def kind(self, name: str) -> pa.DataType:
        return self._schema.field(name).type

    def batches(self, names: list[str], size: int) -> Iterator[Any]:
        for file in self._files:
            batches = self._opened(file).iter_batches(size, columns=names)
            while (batch := _reading(file, "a whole Parquet file", partial(next, batches, None))) is not None:
                yield batch.select(names)


class ArrayColumns(Columns):
    """Reads the columns of an .npy file, which are numbered from 1, where they stand on disk.

    Attributes:
        values: [n, d], mapped into memory.
    """

    def __init__(self, path: Path) -> None:
        values = _reading(path, "an .npy file", lambda: np.lib.format.open_memmap(path, mode="r"))
        self.values = _numeric(path, values, (2,))
        super().__init__(path, [str(place + 1) for place in range(self.values.shape[1])], len(self.values))

    def kind(self, name: str) -> pa.DataType:
        return pa.from_numpy_dtype(self.values.dtype.newbyteorder("="))

    def places(self, names: list[str]) -> list[int]:
        """Returns the places of columns in `values`."""
        return [int(name) - 1 for name in names]

    def batches(self, names: list[str], size: int) -> Iterator[Any]:
        for start in range(0, len(self.values), size):
            block = np.asfortranarray(self.values[start : start + size][:, self.places(names)])
            block = block.astype(block.dtype.newbyteorder("="), copy=False)
            yield pa.record_batch([pa.array(column) for column in block.T], names=names)


def is_read_whole(path: Path) -> bool:
    """Returns whether nothing of a file can be read without all of it."""
    return _suffix(path) in (*_CSV, ".npz")


def open_columns(path: Path) -> Columns:
    """Opens a file by its suffix.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is of no known kind, damaged, or no table of named columns.
    """
    suffix = _suffix(path)
    if suffix in _CSV:
        return _TableColumns(path, _csv(path, pacsv.read_csv))
    if suffix == ".npz":
        return _TableColumns(path, _npz(path))
    return ArrayColumns(path) if suffix == ".npy" else _ParquetColumns(path)


def names_in(path: Path) -> list[str]:
    """Returns the names of the columns of a file, for which of a CSV no more than the beginning is read."""
    if _suffix(path) in _CSV:
        beginning = _csv(path, lambda *args, **options: pacsv.open_csv(*args, **options).schema.empty_table())
        return _TableColumns(path, beginning).names
    return open_columns(path).names


def numbers(batch: Any, names: list[str]) -> Tensor:
    """Returns columns of a part as [n, d] float64; what is missing is NaN."""
    found = np.empty((batch.num_rows, len(names)))
    for place, name in enumerate(names):
        column = batch.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pa.types.is_boolean(column.type):
            column = column.cast(pa.int8())
        # Not safely: float64 has no room for the last digits of the largest integers.
        found[:, place] = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return torch.from_numpy(found)


def check_numbers(columns: Columns, names: list[str]) -> None:
    """Refuses columns that are not numbers, all there and finite.

    Raises:
        ValueError: if there is one. The error names the columns, the first of the values and its row, and what to do.
    """
    path = columns.path
    for what in ("text", "dates or times", "other values"):
        bad = [name for name in names if _kind(columns.kind(name)) == what]
        if bad:
            row, value = _first_strange(columns, bad[0])
            hold = "holds" if len(bad) == 1 else "hold"
            comma = isinstance(value, str) and "," in value and _is_number(value.replace(",", ""))
            advice = "write numbers with a decimal point and without commas, or " if comma else ""
            raise ValueError(
                f"{path} must have columns of numbers, and {shortened(bad)} {hold} {what}, such as {_shown(value)} in "
                f"row {row} of {bad[0]}: {advice}{leave_out(bad)}"
            )
    kinds = (("missing", torch.isnan), ("infinite", torch.isinf))
    counts = torch.zeros(len(kinds), len(names), dtype=torch.int64)
    rows_with, first = [0, 0], [0, 0]
    for rows, batch in columns.parts(names):
        values = numbers(batch, names)
        if bool(values.isfinite().all()):
            continue
        for place, (_, is_such) in enumerate(kinds):
            found = is_such(values)
            counts[place] += found.sum(0)
            with_one = found.any(1).nonzero().flatten()
            if len(with_one) and not rows_with[place]:
                first[place] = rows.start + int(with_one[0]) + 1
            rows_with[place] += len(with_one)
    for place, (what, _) in enumerate(kinds):
        spoiled = {name: count for name, count in zip(names, counts[place].tolist(), strict=True) if count}
        told = shortened([f"{name} ({count})" for name, count in spoiled.items()])
        if spoiled:
            raise ValueError(
                f"{path} must have a finite number in every row of every column, and in {rows_with[place]} of its "
                f"{columns.count} rows, the first of them row {first[place]}, values are {what}, by columns: "
                f"{told}; fill them in, drop these rows, or {leave_out(list(spoiled))}"
            )


def known_columns(path: Path, known: list[str], names: Sequence[str], setting: str) -> None:
    """Refuses names that a file has no columns of.

    Raises:
        ValueError: if there is one. The error says which one may be meant.
    """
    there = set(known)
    for name in names:
        if name not in there:
            like = get_close_matches(name, known, 1)
            lower = [other for other in known if other.lower() == name.strip().lower()]
            meant = f"; did you mean {(lower or like)[0]}?" if lower or like else f", only {shortened(known)}"
            if setting == "label" and not (lower or like):
                meant += "; for rows without classes: --data.label null"
            if "," in name:
                several = shlex.quote(json.dumps([part.strip() for part in name.split(",")], ensure_ascii=False))
                meant = f"; several names are a list: --data.{setting}={several}"
            raise ValueError(f"{setting} must name columns of {path}, which has no column {name}{meant}")


def shortened(names: Sequence[str]) -> str:
    """Returns the names in a line, of very many the first."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def leave_out(names: list[str]) -> str:
    """Returns the advice to leave columns out, with the setting as it is typed."""
    named = names[0] if len(names) == 1 else json.dumps(names, ensure_ascii=False)
    return f"leave {'it' if len(names) == 1 else 'them'} out with {shlex.quote(f'--data.without={named}')}"


# Files


def _suffix(path: Path) -> str:
    name = path.name.lower()
    if path.is_dir():
        return ".parquet"
    suffix = next((known for known in _SUFFIXES if name.endswith(known)), "")
    if not path.exists():
        raise FileNotFoundError(f"path must be the file of a table, and there is no {path.absolute()}")
    if not suffix:
        raise ValueError(f"path must end in one of {', '.join(_SUFFIXES)} or be a folder of .parquet files, got {path}")
    return suffix


def _reading(path: Path, what: str, read: Callable[[], Any]) -> Any:
    """Returns what is read, and tells which file it is that cannot be read.

    Raises:
        OSError: if the system cannot read it.
        ValueError: if it is damaged.
    """
    try:
        return read()
    except OSError as error:
        if error.errno is not None and error.strerror is not None:
            raise type(error)(f"{path} cannot be read: {error.strerror}") from error
        raise ValueError(f"{path} cannot be read as {what}: {_one_line(error)}") from error
    except Exception as error:  # of many kinds: pyarrow's, zlib's, zipfile's, numpy's
        reason = _one_line(error)
        if "Object arrays" in reason or "Python objects" in reason:
            reason = "it holds Python objects, which are not unpickled, as they could run code: save numbers"
        elif "pickled" in reason:  # numpy takes for a pickle whatever it does not know
            reason = "it is something else"
        raise ValueError(f"{path} cannot be read as {what}: {reason}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or repr(error)


def _csv(path: Path, read: Callable[..., Any]) -> Any:
    """Reads a CSV file whose first line names the columns; they are separated by what this line has most of."""

    def first_line() -> bytes:
        with pa.input_stream(str(path), compression="detect") as stream:
            beginning = b""
            while b"\n" not in beginning and (more := stream.read(_LINE)):
                beginning += more
        return beginning.split(b"\n", 1)[0]

    beginning = _reading(path, "a CSV file", first_line)
    try:
        line = beginning.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8, and its first line is not: save it as UTF-8") from error
    if not line.strip():
        raise ValueError(f"{path} must have the names of the columns in its first line, which is empty")
    unquoted = re.sub('"[^"]*"', "", line)
    delimiter = max(",;\t|", key=unquoted.count) if set(",;\t|") & set(unquoted) else ","

    def table() -> Any:
        block = max(_LINE, 16 * len(beginning))  # no line of a table can be longer than a block
        options = {
            # In a table of one column an empty line is a missing value.
            "parse_options": pacsv.ParseOptions(delimiter=delimiter, ignore_empty_lines=delimiter in unquoted),
            "convert_options": pacsv.ConvertOptions(strings_can_be_null=True),
        }
        try:
            return read(str(path), read_options=pacsv.ReadOptions(block_size=block), **options)
        except pa.ArrowInvalid:  # read by one thread the error has the number of the row
            return read(str(path), read_options=pacsv.ReadOptions(block_size=block, use_threads=False), **options)

    found = _reading(path, "a CSV file", table)
    found = found.rename_columns([name.strip() for name in found.schema.names])
    names = [name for name in found.schema.names if name]
    if names and all(_is_number(name) for name in names):
        raise ValueError(
            f"{path} must have the names of the columns in its first line, and has numbers there "
            f"({shortened(names)}): write the names above them"
        )
    return found


def _npz(path: Path) -> pa.Table:
    """Returns an .npz as a table: an array [n] is a column with its name, and [n, d] are columns numbered from 1."""
    columns: list[tuple[str, Any]] = []
    with _reading(path, "an .npz file", lambda: np.load(path)) as arrays:
        matrices = []
        for name in arrays.files:
            array = _reading(path, "an .npz file", partial(arrays.__getitem__, name))
            array = array.astype(array.dtype.newbyteorder("="), copy=False)
            if array.dtype.kind in "US" and array.ndim == 1:  # text, for a label
                columns.append((name, pa.array(array.tolist())))
            elif _numeric(path, array, (1, 2), f"the array {name} of ").ndim == 1:
                columns.append((name, pa.array(array)))
            else:
                matrices.append(name)
                columns += [
                    (str(place + 1), pa.array(np.ascontiguousarray(column))) for place, column in enumerate(array.T)
                ]
    counts = {len(column) for _, column in columns}
    if len(matrices) > 1 or len(counts) > 1:
        raise ValueError(
            f"{path} must hold one array [rows, columns], or arrays [rows] that are the columns, or both, of as many "
            f"rows; it holds {shortened(arrays.files)}: save the rows alone, as an .npy file"
        )
    return pa.table([column for _, column in columns], names=[name for name, _ in columns])


def _numeric(path: Path, array: np.ndarray, dimensions: tuple[int, ...], which: str = "") -> np.ndarray:
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise ValueError(f"{which}{path} must hold numbers of at most 64 bits, and holds values of type {array.dtype}")
    if array.ndim not in dimensions:
        hint = ": examples of any shape are read by --data Tensors from a file of torch.save" if array.ndim > 2 else ""
        raise ValueError(f"{which}{path} must have shape [rows, columns], and has shape {list(array.shape)}{hint}")
    return array


# Types


def _kind(type_: pa.DataType) -> str:
    """Returns what values of a type are, in words: "numbers", also true and false or nothing at all, or else what."""
    types = pa.types
    if types.is_dictionary(type_):
        type_ = type_.value_type
    for kind, tests in (
        ("numbers", (types.is_integer, types.is_floating, types.is_decimal, types.is_boolean, types.is_null)),
        ("text", (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)),
        ("dates or times", (types.is_temporal,)),
    ):
        if any(test(type_) for test in tests):
            return kind
    return "other values"


def _first_strange(columns: Columns, name: str) -> tuple[int, Any]:
    """Returns row and value of the first that is no number, or of the first at all where all texts are numbers."""
    found: tuple[int, Any] = (1, None)
    for rows, batch in columns.parts([name]):
        for place, value in enumerate(batch.column(name)):
            value = value.as_py()
            if value is not None:
                if found[1] is None:
                    found = rows.start + place + 1, value
                if not _is_number(value):
                    return rows.start + place + 1, value
    return found


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, (str, bytes)) else str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
