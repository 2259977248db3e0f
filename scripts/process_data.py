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

from surefoot import run_file, script  # noqa: E402
from surefoot.data import stream, structured  # noqa: E402
from surefoot.data.formats import Dropped  # noqa: E402
from surefoot.data.loading import SourceRow  # noqa: E402
from surefoot.data.report import percent  # noqa: E402
from surefoot.data.three_splits import ThreeSplits  # noqa: E402
from surefoot.errors import DataError, UsageError  # noqa: E402
from surefoot.script import flag  # noqa: E402

RATIOS = {"train": 0.7, "val": 0.1, "test": 0.2}


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


USAGE = f"""\
{__doc__}

python scripts/process_data.py [--raw_path data/raw] [--out data/processed]

Raw json, jsonl, csv, parquet or txt (plain or .gz) go to train.jsonl, val.jsonl and test.jsonl in --out, and what was done to report.json.
Rows come out as {{system, user, assistant}}, conversations as {{messages}}, plain text as {{text}}. Alpaca's instruction and input are both
kept. Files are read row by row, so that memory does not grow with them; only .json is read whole. Nothing is lost without being counted."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    raw_path: str = flag("data/raw", "a file, several with commas between them, or a folder, whose files are all read")
    out: str = flag("data/processed", "the folder of the three splits; made when needed")
    config: str = flag("", "a run file (YAML): its seed and data.split.train_ratio, val_ratio, test_ratio; else 0.7, 0.1 and 0.2")
    system_prompt: str = flag("", "for rows that have none")
    max_chars: int = flag(4096, "the longest question and answer, in characters; 0: any length", low=0)
    overlong: str = flag(
        "drop",
        "what a longer question does: drop the row, or truncate_prompt (its end is kept). Longer answers are always dropped",
        choices=("drop", "truncate_prompt"),
    )
    user_field: str = flag("", "the column of the question, where its name is not a known one")
    assistant_field: str = flag("", "the column of the answer")
    seed: int | None = flag(None, "of the split; default: the run file's, else 42. Equal rows fall on the same side")


def run(flags: Flags) -> None:
    """Reads, splits and writes the rows."""
    settings = run_file.dotted(flags.config) if flags.config else {}
    shares = _shares(settings, flags.config)
    seed = settings.get("seed", 42) if flags.seed is None else flags.seed
    files = stream.find(flags.raw_path, "raw_path")
    folder = Path(flags.out)
    if any(path.resolve().parent == folder.resolve() for path in files.paths):
        raise UsageError(f"--out={flags.out} is the folder of the raw files. Name another one")
    began, counts, splits = time.perf_counter(), Counts(), ThreeSplits(folder, seed)
    try:
        structurer = structured.Structurer(structured.Fields(flags.user_field, flags.assistant_field), flags.system_prompt)
        for row, columns in _kept(files, structurer, Caps(flags.max_chars, flags.overlong), counts):
            splits.add(structured.as_line(columns, row.where))
        if not splits.hashes:
            raise DataError("\n".join([f"--raw_path={flags.raw_path}: no row is left of {counts.read:,}", *counts.lines(flags.max_chars)]))
        sizes = splits.close(shares)
    finally:
        splits.discard()
    record = {"files": [str(path) for path in files.paths], "seed": seed, "shares": shares, "max_chars": flags.max_chars, "splits": sizes}
    (folder / "report.json").write_text(json.dumps(record | vars(counts), indent=2) + "\n", encoding="utf-8")
    print(f"read: {counts.read:,} rows of {len(files.paths)} file{'s' * (len(files.paths) > 1)} in {time.perf_counter() - began:.1f} s")
    print(
        "\n".join(
            [*counts.lines(flags.max_chars), *(f"written: {folder / name}.jsonl, {rows:,} rows" for name, rows in sizes.items() if rows)]
        )
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
    sys.exit(script.main(Flags, USAGE, run))
