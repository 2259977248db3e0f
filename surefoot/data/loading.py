"""read_rows(): files and Hub data sets to rows that know where they stand."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from surefoot.errors import DataError, UsageError

HUB_ID = re.compile(r"^\w[\w.-]*(/\w[\w.-]*)?$")


class SourceRow(NamedTuple):
    """A row and its place, `file:number` counted from 1: the line in .jsonl and .csv, the row elsewhere."""

    columns: dict[str, Any]
    where: str


def read_rows(paths: Sequence[str], split: str) -> list[SourceRow]:
    """The rows of all files in order; a path that is no file and looks like a Hub id is that data set's `split`.

    Raises:
        UsageError: a path that does not exist, a folder, an unknown ending.
        DataError: a file that cannot be read, or without rows.
    """
    rows: list[SourceRow] = []
    for path in paths:
        found = _read_hub(path, split) if is_hub_id(path) else _read_file(path)
        if not found:
            raise DataError(f"{path}: 0 rows. Give a file with at least one row")
        rows += found
    return rows


def is_hub_id(path: str) -> bool:
    """True when `path` names no local file and could name a data set on the Hub."""
    return not Path(path).exists() and HUB_ID.match(path) is not None and ending(path) not in READERS


def ending(path: str) -> str:
    """`.json` for rows.json and for rows.json.gz."""
    file = Path(path)
    return (file.with_suffix("") if file.suffix.lower() == ".gz" else file).suffix.lower()


def checked(path: str) -> Path:
    """The file at `path`. Raises UsageError: there is none, a folder, an unknown ending."""
    file = Path(path)
    if file.is_dir():
        raise UsageError(f"--data_path={path} is a folder: name its files")
    if not file.is_file():
        raise UsageError(f"--data_path={path} does not exist (looked in {Path.cwd()})")
    if ending(path) not in READERS:
        raise UsageError(f"--data_path={path}: unknown ending {ending(path) or '(none)'}. Known: {', '.join(READERS)}, each also with .gz")
    return file


def _read_file(path: str) -> list[SourceRow]:
    raw = _bytes(checked(path))
    if not raw:
        raise DataError(f"{path} is empty (0 bytes)")
    return READERS[ending(path)](path, raw)


def _bytes(file: Path) -> bytes:
    try:
        raw = file.read_bytes()
        return gzip.decompress(raw) if raw and file.suffix.lower() == ".gz" else raw
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{file}: not a whole gzip file ({error}). Copy or download it again") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from None


def decoded(file: str, raw: bytes, first: int = 1) -> str:
    """UTF-8 without a byte-order mark; raw begins with the file's line `first`. Raises DataError: it is another encoding."""
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + first
        encoding = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "ISO-8859-1"
        raise DataError(
            f"{file}: not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start} (line {line}). "
            f"If it is {encoding}, convert it: iconv -f {encoding} -t UTF-8"
        ) from None


def _read_json(file: str, raw: bytes) -> list[SourceRow]:
    """A list of rows, {"data": [rows]}, one row, or JSON lines under the wrong ending."""
    text = decoded(file, raw)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{") and error.msg == "Extra data":
            return list(json_lines(file, text.split("\n")))
        if not text.strip():
            return []
        raise DataError(_not_json(file, error.lineno, error)) from None
    if isinstance(content, dict):
        content = content["data"] if isinstance(content.get("data"), list) else [content]
    if not isinstance(content, list):
        raise DataError(f"{file}: holds {kind(content)}, where a list of rows is needed")
    return [row(file, number, columns) for number, columns in enumerate(content, 1)]


def _read_jsonl(file: str, raw: bytes) -> list[SourceRow]:
    """One row a line, or a JSON list under the wrong ending."""
    text = decoded(file, raw)
    # not splitlines(): it also breaks at U+2028 and U+0085, which JSON allows inside a string
    return _read_json(file, raw) if text.lstrip().startswith("[") else list(json_lines(file, text.split("\n")))


def json_lines(file: str, lines: Iterable[str], first: int = 1) -> Iterator[SourceRow]:
    """A row for each line that is not blank; the lines begin with the file's `first`. Raises DataError: not JSON, or no object."""
    for number, line in enumerate(lines, first):
        if line and not line.isspace():
            try:
                yield row(file, number, json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(_not_json(file, number, error)) from None


def _not_json(file: str, line: int, error: json.JSONDecodeError) -> str:
    return f"{file}:{line}: not valid JSON: {error.msg} at column {error.colno}"


def row(file: str, number: int, columns: Any) -> SourceRow:
    """The columns as the file's row `number`. Raises DataError: they have no names."""
    if not isinstance(columns, dict):
        raise DataError(f"{file}:{number}: a row must be an object with named columns, found {kind(columns)}")
    return SourceRow(columns, f"{file}:{number}")


def kind(value: Any) -> str:
    """What a JSON value is, in words, with the value where it is short."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object ({', '.join(map(str, value))[:60]})"
    if value is None:
        return "null"
    word = "text" if isinstance(value, str) else "true or false" if isinstance(value, bool) else "a number"
    return f"{word} ({str(value)[:40]})"


def _read_csv(file: str, raw: bytes) -> list[SourceRow]:
    return list(csv_rows(file, io.StringIO(decoded(file, raw), newline="")))


def csv_rows(file: str, lines: Iterable[str]) -> Iterator[SourceRow]:
    """A row for each record under the header. Raises DataError: not CSV, or another number of cells than the header's."""
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{file}:1: the header names a column twice: {', '.join(header)}")
        for cells in reader:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{file}:{reader.line_num}: {len(cells)} cells, where the header has {len(header)} columns ({', '.join(header)}). "
                    'Put cells with commas or line breaks between double quotes (")'
                )
            if cells:
                yield row(file, reader.line_num, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{file}:{reader.line_num}: not valid CSV: {error}. Mend it, or give the rows as .jsonl") from None


def _read_parquet(file: str, raw: bytes) -> list[SourceRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(raw))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable parquet file: {error}") from None
    return [row(file, number, columns) for number, columns in enumerate(table.to_pylist(), 1)]


READERS: dict[str, Callable[[str, bytes], list[SourceRow]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_hub(name: str, split: str) -> list[SourceRow]:
    import datasets

    try:
        table = datasets.load_dataset(name, split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"--data_path={name} is no file here, and the Hugging Face data set of that name (--data_split={split}) could not be "
            f"loaded: {reason}. Without a connection, download it first and give its files (json, jsonl, csv or parquet)"
        ) from None
    return [row(name, number, columns) for number, columns in enumerate(table.to_list(), 1)]
