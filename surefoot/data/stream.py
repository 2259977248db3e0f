"""rows(): the rows of files of any size, one at a time, each with its place; loading.read_rows() takes them whole."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import orjson

from surefoot.data import loading
from surefoot.data.loading import SourceRow
from surefoot.data.progress import Progress
from surefoot.errors import DataError, UsageError

LOOK_EVERY = 1024  # rows between two looks at the clock
ENDINGS = (*loading.READERS, ".txt")


class Files(NamedTuple):
    """Data files and their bytes on the disk."""

    paths: tuple[Path, ...]
    size: int


def find(place: str, flag: str) -> Files:
    """The data files at `place`: a file, several with commas between them, or a folder's own (not its subfolders').

    Raises:
        UsageError: naming `flag`, there is none, or one that no reader knows.
    """
    paths: list[Path] = []
    for path in map(Path, place.split(",")):
        if not path.exists():
            raise UsageError(f"--{flag}={path} does not exist (looked in {Path.cwd()})")
        inside = [path] if path.is_file() else sorted(file for file in path.iterdir() if loading.ending(str(file)) in ENDINGS)
        if not inside:
            raise UsageError(f"--{flag}={path} holds no data file. Put {', '.join(ENDINGS)} there, each plain or .gz")
        paths += inside
    for path in paths:
        if loading.ending(str(path)) not in ENDINGS:
            raise UsageError(f"--{flag}={path}: the ending is none of {', '.join(ENDINGS)}, each plain or .gz")
    return Files(tuple(paths), sum(path.stat().st_size for path in paths))


def rows(files: Files, doing: str) -> Iterator[SourceRow]:
    """Every row of the files in order, with a sign of life in which `doing` says what is done.

    Raises:
        DataError: a file that cannot be read, named with the line where that is known.
    """
    done = 0
    with Progress(files.size, doing) as progress:
        for path in files.paths:
            try:
                with path.open("rb") as disk:
                    for number, row in enumerate(_rows(path, disk)):
                        yield row
                        if number % LOOK_EVERY == 0:
                            progress.at(done + disk.tell())
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise DataError(f"{path}: not a whole gzip file ({error}). Copy or download it again") from None
            except PermissionError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}") from None
            done += path.stat().st_size


def _rows(path: Path, disk: BinaryIO) -> Iterator[SourceRow]:
    raw: BinaryIO = gzip.GzipFile(fileobj=disk) if path.suffix.lower() == ".gz" else disk  # type: ignore[assignment]
    return READERS[loading.ending(str(path))](str(path), raw)


def _jsonl(file: str, raw: BinaryIO) -> Iterator[SourceRow]:
    for number, line in enumerate(raw, 1):
        try:
            columns = orjson.loads(line)
        except orjson.JSONDecodeError:  # a blank line, a byte-order mark, NaN, or no JSON: the slower reader knows which
            yield from loading.json_lines(file, [loading.decoded(file, line, number)], number)
            continue
        if number == 1 and isinstance(columns, list):
            raise DataError(f"{file}:1: a list of rows, where each line must hold one. Rename the file to .json")
        yield loading.row(file, number, columns)


def _csv(file: str, raw: BinaryIO) -> Iterator[SourceRow]:
    try:
        yield from loading.csv_rows(file, io.TextIOWrapper(raw, encoding="utf-8-sig", newline=""))
    except UnicodeDecodeError:
        loading.read_rows([file], "train")  # knows the line
        raise


def _parquet(file: str, raw: BinaryIO) -> Iterator[SourceRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(raw).iter_batches(LOOK_EVERY):
            for columns in batch.to_pylist():
                number += 1
                yield loading.row(file, number, columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable parquet file: {error}") from None


def _json(file: str, raw: BinaryIO) -> Iterator[SourceRow]:
    yield from loading.read_rows([file], "train")


def _txt(file: str, raw: BinaryIO) -> Iterator[SourceRow]:
    """A row {"text": ...} for each paragraph; blank lines stand between them."""
    lines: list[str] = []
    for number, line in enumerate(raw, 1):
        if line.strip():
            lines.append(loading.decoded(file, line, number).rstrip("\r\n"))
        elif lines:
            yield SourceRow({"text": "\n".join(lines)}, f"{file}:{number - len(lines)}")
            lines = []
    if lines:
        yield SourceRow({"text": "\n".join(lines)}, f"{file}:{number - len(lines) + 1}")


READERS: dict[str, Callable[[str, BinaryIO], Iterator[SourceRow]]] = {
    ".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet, ".txt": _txt,
}  # fmt: skip
