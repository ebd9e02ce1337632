"""Where rows come from: JSON lines, JSON, parquet, a folder saved by `datasets`, or the hub.

A Table knows its columns and can be read again from the start.  Rows are numbered from 1; in a JSON lines file the
number is the line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tropd.base.reading import (
    check_file,
    check_path,
    nearest,
    opened,
    parse_json,
    read_bytes,
    read_json,
    read_lines,
    refusing,
    shortened,
)
from tropd.errors import DataError

Row = Mapping[str, Any]
SUFFIXES = (".jsonl", ".json", ".parquet")
_MARKS = ("state.json", "dataset_dict.json")
"""By which a folder is known that `datasets` saved."""


@dataclass(frozen=True, kw_only=True)
class Table:
    source: str
    columns: tuple[str, ...]
    read: Callable[[], Iterator[tuple[int, Row]]]
    """Every call starts at the first row."""


def open_table(path: str, *, split: str = "train", name: str | None = None, streaming: bool = False) -> Table:
    """The rows behind `path`; nothing but the head is read when `streaming`."""
    check_path(path, "the data set", DataError)
    file = Path(path).expanduser()
    if file.exists() and not file.is_dir():
        check_file(file, DataError)
    if file.suffix in SUFFIXES:
        if not file.is_file():
            raise _missing(path, file)
        table = _parquet_table(file) if file.suffix == ".parquet" else _json_table(file, streaming)
    elif file.is_dir() and any((file / mark).is_file() for mark in _MARKS):
        table = _saved_table(file, split)
    elif file.is_file():
        raise DataError(f"{path}: '{file.suffix}' files are not read. Write the rows as one of {', '.join(SUFFIXES)}.")
    elif file.is_dir():
        inside = sorted(other.name for other in file.iterdir() if other.suffix in SUFFIXES)
        there = f" It holds {', '.join(inside[:3])}: give one of them." if inside else ""
        raise DataError(
            f"{shortened(path)} is a folder, but `datasets` saved no data set in it.{there} Give a file "
            f"({', '.join(SUFFIXES)}), or a folder written by save_to_disk."
        )
    elif path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise _missing(path, file)
    else:
        table = _hub_table(path, split, name, streaming)
    if not table.columns:
        raise DataError(f"{table.source} is empty. Give a data set with at least one row and column.")
    return table


def table_of(rows: Any, source: str) -> Table:
    """A `datasets.Dataset`, or a list of dicts."""
    names = getattr(rows, "column_names", None)
    if names is None:
        if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Sequence):
            raise DataError(f"{source}: a {type(rows).__name__} is given. Give a list of dicts, or a datasets.Dataset.")
        wrong = next((number for number, row in enumerate(rows, start=1) if not isinstance(row, Mapping)), None)
        if wrong is not None:
            raise DataError(f"{source}: row {wrong} is a {type(rows[wrong - 1]).__name__}. Give a dict for each.")
        names = list(dict.fromkeys(column for row in rows for column in row))
        if odd := [name for name in names if not isinstance(name, str)]:
            raise DataError(f"{source}: a column is called {odd[0]!r}. Give text as the key of each.")
        broken = next((number for number, row in enumerate(rows, start=1) if not _is_unicode(row)), None)
        if broken is not None:
            raise DataError(f"{source}: row {broken} holds a lone surrogate, which is no text. Repair it.")
    elif isinstance(names, Mapping):
        raise DataError(f"{source}: a DatasetDict was given. Give one of its splits: {', '.join(names)}.")
    if not names:
        raise DataError(f"{source}: there are no rows. Give at least one.")
    return Table(source=source, columns=tuple(names), read=lambda: _numbered(rows, source))


def _is_unicode(row: Row) -> bool:
    try:
        json.dumps(row, ensure_ascii=False, default=str, skipkeys=True).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_text(row: Row, column: str) -> str:
    """The text of a column that has to hold some."""
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"no text in '{column}', and it is asked for")
    return value


def read_scalar(row: Row, column: str) -> str:
    """Text, or a number as text."""
    value = row.get(column)
    if not isinstance(value, str | int | float):
        kind = "nothing" if value is None else f"a {type(value).__name__}"
        raise DataError(f"'{column}' holds {kind}, and text or a number is asked for")
    return str(value)


def _missing(path: str, file: Path) -> DataError:
    siblings = [str(other.name) for other in file.parent.iterdir()] if file.parent.is_dir() else []
    where = f"the folder {file.parent.resolve()} has no such file" if siblings else f"{file.parent} holds nothing"
    return DataError(f"{path} does not exist: {where}{nearest(file.name, siblings)}. Give the path of a data file.")


def _parse_object(raw: bytes, file: Path, number: int) -> Row:
    row = parse_json(raw, f"{file}, line {number}", DataError)
    if not isinstance(row, dict):
        raise DataError(f"{file}, line {number} holds a {type(row).__name__}. Write one JSON object per line.")
    return row


def _read_lines(file: Path) -> Iterator[tuple[int, Row]]:
    for number, raw in read_lines(file, DataError):
        if raw.strip():
            yield number, _parse_object(raw, file, number)


def _read_array(file: Path) -> Iterator[tuple[int, Row]]:
    rows = parse_json(read_bytes(file, DataError, limit=None), str(file), DataError)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{file}, element {number} holds a {type(row).__name__}. Write an array of objects.")
        yield number, row


def _json_table(file: Path, streaming: bool) -> Table:
    with opened(file, DataError) as head:
        start = head.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    read = _read_array if file.suffix == ".json" and start == b"[" else _read_lines
    if streaming:
        _, first = next(read(file), (0, {}))
        return Table(source=str(file), columns=tuple(first), read=lambda: read(file))
    rows = list(read(file))
    columns = dict.fromkeys(column for _, row in rows for column in row)
    return Table(source=str(file), columns=tuple(columns), read=lambda: iter(rows))


def _parquet_table(file: Path) -> Table:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(
            f"{file}: parquet needs pyarrow, which is not installed. Run: pip install 'tropd[data]'"
        ) from error

    def broken() -> AbstractContextManager[None]:
        return refusing(lambda why: f"{file} is not a readable parquet file ({why}). Write it again.", DataError)

    def read() -> Iterator[tuple[int, Row]]:
        number = 0
        with broken(), parquet.ParquetFile(file) as content:
            for batch in content.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row

    with broken(), parquet.ParquetFile(file) as content:
        columns = tuple(content.schema_arrow.names) if content.metadata.num_rows else ()
    return Table(source=str(file), columns=columns, read=read)


def _import_datasets(path: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"'{path}' is read with the package `datasets`, which is not installed. Run: pip install 'tropd[data]' "
            "(.jsonl and .json files are read without it)"
        ) from error
    return datasets


def _saved_table(folder: Path, split: str) -> Table:
    datasets = _import_datasets(str(folder))
    for mark in _MARKS:
        if (folder / mark).exists():
            read_json(folder / mark, DataError)
    with refusing(lambda why: f"{folder} cannot be read as a saved data set ({why}). Save it again.", DataError):
        data = datasets.load_from_disk(str(folder))
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            known = ", ".join(data)
            raise DataError(f"{folder} has no split '{split}'{nearest(split, data)}; it has {known}. Set data.split.")
        data = data[split]
    return Table(
        source=str(folder), columns=tuple(data.column_names) if len(data) else (), read=lambda: _numbered(data)
    )


def _hub_table(path: str, split: str, name: str | None, streaming: bool) -> Table:
    datasets = _import_datasets(path)
    what = f"data set '{path}'" + (f" ({name})" if name else "") + f", split '{split}'"
    with refusing(
        lambda why: (
            f"{what} cannot be loaded: {why}. It is no file or folder here, so it was looked for on the hub: "
            f"check the spelling, `name` and `split`, and the network; or give a local file ({', '.join(SUFFIXES)})."
        ),
        DataError,
    ):
        data = datasets.load_dataset(path, name, split=split, streaming=streaming)
        first = next(iter(data), {})
    return Table(source=what, columns=tuple(data.column_names or first), read=lambda: _numbered(data, what))


def _numbered(data: Iterable[Row], what: str = "the data set") -> Iterator[tuple[int, Row]]:
    number = 0
    try:
        for row in data:
            number += 1
            yield number, row
    except OSError as error:
        raise DataError(f"{what} stopped after row {number}: {error}. Check the network and resume.") from error
