"""A stage of the pipeline: the splits in one folder, row by row, to the splits of another."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from surefoot.data import stream
from surefoot.data.loading import SourceRow
from surefoot.data.structured import as_line
from surefoot.errors import UsageError

SPLITS = ("train", "val", "test")


def split_files(folder: str, flag: str) -> list[Path]:
    """train.jsonl, and val.jsonl and test.jsonl where they are, in `folder`.

    Raises:
        UsageError: naming `flag`, there is no train.jsonl.
    """
    found = [path for name in SPLITS if (path := Path(folder) / f"{name}.jsonl").is_file()]
    if not found or found[0].stem != "train":
        raise UsageError(f"--{flag}={folder} holds no train.jsonl. Make it with scripts/process_data.py (make process)")
    return found


def rewrite(sources: Sequence[Path], folder: Path, change: Callable[[SourceRow], Mapping[str, Any]], doing: str) -> dict[Path, int]:
    """Writes change(row) of each split to the split of that name in `folder`, and returns the rows of each. Splits without a source go.

    Nothing in `folder` changes before every row is written. Raises what change() raises.
    """
    if any(source.resolve().parent == folder.resolve() for source in sources):
        raise UsageError(f"--out={folder} is the folder that is read. Name another one")
    folder.mkdir(parents=True, exist_ok=True)
    parts = {folder / source.name: folder / f".{source.name}.part" for source in sources}
    try:
        counts = {final: _write(source, part, change, doing) for source, (final, part) in zip(sources, parts.items(), strict=True)}
        for name in SPLITS:
            (folder / f"{name}.jsonl").unlink(missing_ok=True)
        for final, part in parts.items():
            os.replace(part, final)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    return counts


def _write(source: Path, part: Path, change: Callable[[SourceRow], Mapping[str, Any]], doing: str) -> int:
    rows = 0
    with part.open("wb") as file:
        for row in stream.rows(stream.Files((source,), source.stat().st_size), doing):
            file.write(as_line(change(row), row.where))
            rows += 1
    return rows
