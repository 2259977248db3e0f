"""process_data.py: raw rows of any known shape to chat rows, split into train, val and test."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script also runs from a checkout that is not installed

from surefoot import command, run_file  # noqa: E402
from surefoot.data import stream, structured  # noqa: E402
from surefoot.data.formats import Dropped  # noqa: E402
from surefoot.data.loading import SourceRow  # noqa: E402
from surefoot.data.report import percent  # noqa: E402
from surefoot.data.three_splits import ThreeSplits  # noqa: E402
from surefoot.errors import DataError, UsageError  # noqa: E402

RATIOS = {"train": 0.7, "val": 0.1, "test": 0.2}
OVERLONG = ("drop", "truncate_prompt")


class Caps(NamedTuple):
    """The longest question and answer in characters (0: any), and what a longer question does."""

    max_chars: int
    overlong: str


@dataclass
class Counts:
    """Rows read, and those that are not as they were, with the place of the first of each kind."""

    read: int = 0
    cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def drop(self, reason: str, where: str) -> None:
        self.dropped[reason] += 1
        self.first.setdefault(reason, where)

    def lines(self, max_chars: int) -> list[str]:
        lines = [
            f"dropped: {percent(rows, self.read)} ({rows:,}): {reason}, first {self.first[reason]}" for reason, rows in self.dropped.items()
        ]
        if self.cut:
            lines.append(f"cut: {percent(self.cut, self.read)} ({self.cut:,}) of the questions, to their last {max_chars:,} characters")
        return lines


def process_data(
    raw_path: str = "data/raw",
    out: str = "data/processed",
    config: str = "",
    system_prompt: str = "",
    max_chars: int = 4096,
    overlong: str = "drop",
    user_field: str = "",
    assistant_field: str = "",
    seed: int | None = None,
) -> None:
    """Raw json, jsonl, csv, parquet or txt (plain or .gz) to out/train.jsonl, val.jsonl and test.jsonl, and what was done to report.json.

    Rows come out as {system, user, assistant}, conversations as {messages}, plain text as {text}. Alpaca's instruction and input are both
    kept. Files are read row by row, so that memory does not grow with them; only .json is read whole.

    Args:
        raw_path: a file, several with commas between them, or a folder, whose files are all read.
        out: the folder of the three splits; made when needed.
        config: a run file (YAML), of which seed and data.split.train_ratio, val_ratio and test_ratio are read; else 0.7, 0.1 and 0.2.
        system_prompt: for rows that have none.
        max_chars: the longest question and answer, in characters; 0: any length. Nothing is lost without being counted.
        overlong: what a longer question does: drop the row, or truncate_prompt (its end is kept). Longer answers are always dropped.
        user_field: the column of the question, where its name is not a known one.
        assistant_field: the column of the answer.
        seed: of the split; else the run file's, else 42. Equal rows fall on the same side.
    """
    settings = run_file.dotted(config) if config else {}
    shares = _shares(settings, config)
    used_seed = settings.get("seed", 42) if seed is None else seed
    if max_chars < 0:
        raise UsageError(f"--max_chars={max_chars} must be at least 0 (0: any length)")
    if overlong not in OVERLONG:
        raise UsageError(f"--overlong={overlong} is not one of {', '.join(OVERLONG)}")
    files = stream.find(raw_path, "raw_path")
    folder = Path(out)
    if any(path.resolve().parent == folder.resolve() for path in files.paths):
        raise UsageError(f"--out={out} is the folder of the raw files. Name another one")
    began, counts, splits = time.perf_counter(), Counts(), ThreeSplits(folder, used_seed)
    try:
        structurer = structured.Structurer(structured.Fields(user_field, assistant_field), system_prompt)
        for row, columns in _kept(files, structurer, Caps(max_chars, overlong), counts):
            splits.add(structured.as_line(columns, row.where))
        if not splits.hashes:
            raise DataError("\n".join([f"--raw_path={raw_path}: no row is left of {counts.read:,}", *counts.lines(max_chars)]))
        sizes = splits.close(shares)
    finally:
        splits.discard()
    record = {"files": [str(path) for path in files.paths], "seed": used_seed, "shares": shares, "max_chars": max_chars, "splits": sizes}
    (folder / "report.json").write_text(json.dumps(record | vars(counts), indent=2) + "\n", encoding="utf-8")
    print(f"read: {counts.read:,} rows of {len(files.paths)} file{'s' * (len(files.paths) > 1)} in {time.perf_counter() - began:.1f} s")
    print(
        "\n".join([*counts.lines(max_chars), *(f"written: {folder / name}.jsonl, {rows:,} rows" for name, rows in sizes.items() if rows)])
    )


def _kept(files: stream.Files, structurer: structured.Structurer, caps: Caps, counts: Counts) -> Iterator[tuple[SourceRow, dict[str, Any]]]:
    """Each row that stays, with its chat row; the others are counted."""
    for row in stream.rows(files, "processing"):
        counts.read += 1
        columns = structurer(row)
        if not isinstance(columns, Dropped) and caps.max_chars:
            columns = _capped(columns, caps, counts)
        if isinstance(columns, Dropped):
            counts.drop(columns.reason, row.where)
        else:
            yield row, columns


def _shares(settings: dict[str, Any], config: str) -> list[float]:
    """Of train, val and test: the run file's, else RATIOS."""
    given = {name: settings.get(f"data.split.{name}_ratio") for name in RATIOS}
    if all(share is None for share in given.values()):
        return list(RATIOS.values())
    told = " ".join(f"{name}_ratio={share}" for name, share in given.items())
    shares = [share if isinstance(share, (int, float)) else 0.0 for share in given.values()]
    if any(isinstance(share, str) for share in given.values()) or min(shares) < 0 or shares[0] == 0 or abs(sum(shares) - 1) > 1e-6:
        raise UsageError(f"--config={config}: data.split has {told}. They must be numbers that sum to 1, with train_ratio above 0")
    return shares


def _capped(columns: dict[str, Any], caps: Caps, counts: Counts) -> dict[str, Any] | Dropped:
    """The row, cut or dropped where a part is longer than max_chars."""
    max_chars = caps.max_chars
    if "assistant" not in columns:
        texts = [columns["text"]] if "text" in columns else [turn["content"] for turn in columns["messages"]]
        return columns if max(map(len, texts)) <= max_chars else Dropped(f"a text of more than max_chars={max_chars}")
    if len(columns["assistant"]) > max_chars:
        return Dropped(f"an answer of more than max_chars={max_chars}")
    if len(columns["user"]) > max_chars:
        if caps.overlong == "drop":
            return Dropped(f"a question of more than max_chars={max_chars}")
        counts.cut += 1
        columns["user"] = columns["user"][-max_chars:]
    return columns


if __name__ == "__main__":
    sys.exit(command.run(process_data))
