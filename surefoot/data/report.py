"""DataReport: what was read, dropped and kept, for the terminal and for run.json."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from surefoot.data.formats import used_columns
from surefoot.data.loading import is_hub_id


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file as it was read; a Hub data set has neither size nor hash."""

    path: str
    bytes: int | None
    sha256: str | None


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Rows dropped for one reason, and where the first of them stands."""

    rows: int
    first: str


@dataclass(kw_only=True)
class Tally:
    """What is counted while the rows go through; `lengths` are those before anything was cut."""

    rows: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    layouts: Counter[tuple[str, tuple[str, ...]]] = field(default_factory=Counter)
    styles: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, Drop] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    truncated: int = 0
    cut_turns: int = 0

    def drop(self, reason: str, where: str) -> None:
        before = self.dropped.get(reason)
        self.dropped[reason] = Drop(rows=before.rows + 1 if before else 1, first=before.first if before else where)

    def unused(self, text_field: str) -> dict[str, int]:
        """Columns that no format read, with the rows that have them."""
        found: Counter[str] = Counter()
        for (name, columns), count in self.layouts.items():
            if name != "columns":
                found.update({column: count for column in columns if column not in used_columns(name, text_field)})
        return dict(found)

    def cutoff_advice(self, cutoff_len: int) -> str:
        """As a flag: the multiple of 32 that keeps 99 % of the rows, or all of them where cutoff_len keeps 99 % already."""
        longest = int(np.quantile(self.lengths, 0.99, method="higher"))
        wanted = -(-(longest if longest > cutoff_len else max(self.lengths)) // 32) * 32
        kept = sum(length <= wanted for length in self.lengths)
        return f"--cutoff_len={wanted} keeps {percent(kept, len(self.lengths))}"

    def reasons(self) -> str:
        return "; ".join(f"{drop.rows:,} with {reason} (first {drop.first})" for reason, drop in self.dropped.items())


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """The facts of a data set. tokens and lengths are those of the training rows; fingerprint is of all tokens, masks and their order."""

    rows_read: int
    train_rows: int
    eval_rows: int
    shared_rows: int
    split: str
    formats: Mapping[str, int]
    styles: Mapping[str, int]
    dropped: Mapping[str, Drop]
    truncated: int
    cut_turns: int
    unused_columns: Mapping[str, int]
    tokens: int
    trained_tokens: int
    mean_length: float
    p95_length: int
    max_length: int
    advice: str
    files: tuple[SourceFile, ...]
    fingerprint: str

    def as_record(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return dataclasses.asdict(self) | {"files": [dataclasses.asdict(file) for file in self.files]}

    def lines(self) -> list[str]:
        """Plain lines for the terminal; the last ones only where there is something to say."""
        sizes = [file.bytes for file in self.files if file.bytes is not None]
        size = f" ({sum(sizes) / 1e6:,.1f} MB)" if sizes else ""
        what = ", ".join(f"{name} {count:,}" for name, count in self.formats.items())
        how = ", ".join(f"{name} {count:,}" for name, count in self.styles.items())
        share = percent(self.trained_tokens, self.tokens)
        lines = [
            f"data: {self.rows_read:,} rows from {len(self.files)} file{'s' * (len(self.files) != 1)}{size}; format {what}; prompt {how}",
            f"split: {self.train_rows:,} rows to train on, {self.eval_rows:,} to evaluate ({self.split})",
            f"tokens: {self.tokens:,}, {share} of them trained on; a row has {self.mean_length:.0f} in the mean, "
            f"{self.p95_length:,} at p95, {self.max_length:,} at most",
        ]
        return lines + self._losses() + self._notes()

    def _losses(self) -> list[str]:
        lines = []
        for reason, drop in self.dropped.items():
            advice = f"; {self.advice}" if "cutoff_len" in reason else ""
            lines.append(f"dropped: {percent(drop.rows, self.rows_read)} ({drop.rows:,}) of the rows: {reason}, first {drop.first}{advice}")
        if self.truncated:
            share = percent(self.truncated, self.rows_read)
            lines.append(f"cut: the prompts of {share} ({self.truncated:,}) of the rows, from the left; answers are whole; {self.advice}")
        return lines

    def _notes(self) -> list[str]:
        lines = []
        if self.shared_rows:
            lines.append(
                f"overlap: {self.shared_rows:,} of the --val_data_path rows also stand in the training data, so eval_loss flatters"
            )
        if self.cut_turns:
            lines.append(f"left out: {self.cut_turns:,} turns after the last answer of their conversation")
        if self.unused_columns:
            lines.append(f"columns not used: {', '.join(self.unused_columns)}")
        return lines


def percent(part: int, whole: int) -> str:
    """With one digit after the point; two below 0.1 %. Never rounded up to all or down to none."""
    share = 100 * part / whole if whole else 0.0
    if part == whole or part == 0:
        return f"{share:.0f} %"
    return f"{min(share, 99.9):.1f} %" if share >= 0.1 else f"{max(share, 0.01):.2f} %"


def source_files(paths: Sequence[str]) -> tuple[SourceFile, ...]:
    """Size and hash of each file, read in pieces."""
    return tuple(_source_file(path) for path in paths)


def _source_file(path: str) -> SourceFile:
    if is_hub_id(path):
        return SourceFile(path=path, bytes=None, sha256=None)
    with Path(path).open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return SourceFile(path=path, bytes=Path(path).stat().st_size, sha256=digest)
