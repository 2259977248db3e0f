"""DataReport: what was read, dropped and kept, for the terminal and for run.json."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surefoot.data.formats import used_columns
from surefoot.data.loading import checked, is_hub_id
from surefoot.errors import DataError


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
    """What is counted while the rows go through, beside the log of single rows."""

    formats: Counter[str] = field(default_factory=Counter)
    layouts: Counter[tuple[str, tuple[str, ...]]] = field(default_factory=Counter)
    styles: Counter[str] = field(default_factory=Counter)
    systems: set[str] = field(default_factory=set)  # two at most: whether there is more than one is all that is asked
    cut_turns: int = 0

    @property
    def system(self) -> str:
        """The one system turn that all rows have; "" where they have none, or not the same."""
        return next(iter(self.systems)) if len(self.systems) == 1 else ""

    def unused(self, text_field: str) -> dict[str, int]:
        """Columns that no format read, with the rows that have them."""
        found: Counter[str] = Counter()
        for (name, columns), count in self.layouts.items():
            if name != "columns":
                found.update({column: count for column in columns if column not in used_columns(name, text_field)})
        return dict(found)


def cutoff_advice(lengths: NDArray[np.int64], cutoff_len: int) -> str:
    """As a flag: the multiple of 32 that keeps 99 % of the rows of these lengths, or all of them where cutoff_len keeps 99 % already."""
    if not len(lengths):
        return ""
    longest = int(np.quantile(lengths, 0.99, method="higher"))
    wanted = -(-(longest if longest > cutoff_len else int(lengths.max())) // 32) * 32
    return f"--cutoff_len={wanted} keeps {percent(int((lengths <= wanted).sum()), len(lengths))}"


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """The facts of a data set. tokens and lengths are those of the training rows; fingerprint is of all tokens, masks and their order.

    reasons are the audit's rows by reason (audit.json has which), verdict is its line; packing holds its figures where rows are packed;
    notes are said last.
    """

    rows_read: int
    train_rows: int
    eval_rows: int
    split: str
    formats: Mapping[str, int]
    styles: Mapping[str, int]
    system: str
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
    reasons: Mapping[str, int]
    verdict: str
    from_cache: bool = False
    packing: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def as_record(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return dataclasses.asdict(self) | {"files": [dataclasses.asdict(file) for file in self.files], "notes": list(self.notes)}

    def noting(self, *notes: str) -> DataReport:
        return dataclasses.replace(self, notes=(*self.notes, *notes))

    def lines(self) -> list[str]:
        """Plain lines for the terminal; the last ones only where there is something to say."""
        sizes = [file.bytes for file in self.files if file.bytes is not None]
        size = f" ({sum(sizes) / 1e6:,.1f} MB)" if sizes else ""
        what = ", ".join(f"{name} {count:,}" for name, count in self.formats.items())
        how = ", ".join(f"{name} {count:,}" for name, count in self.styles.items())
        share = percent(self.trained_tokens, self.tokens)
        lines = [
            f"data: {self.rows_read:,} rows from {len(self.files)} file{'s' * (len(self.files) != 1)}{size}; format {what}; prompt {how}"
            + " (from the cache)" * self.from_cache,
            f"split: {self.train_rows:,} rows to train on, {self.eval_rows:,} to evaluate ({self.split})",
            f"tokens: {self.tokens:,}, {share} of them trained on; a row has {self.mean_length:.0f} in the mean, "
            f"{self.p95_length:,} at p95, {self.max_length:,} at most",
        ]
        return [*lines, *self._losses(), f"audit: {self.verdict}", *self._notes(), *self.notes]

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
        shared = self.reasons["shared"]
        if shared:
            lines.append(f"overlap: {shared:,} of the evaluation rows also stand in the training data, so eval_loss flatters")
        if self.cut_turns:
            lines.append(f"left out: {self.cut_turns:,} turns after the last answer of their conversation")
        if self.unused_columns:
            lines.append(f"columns not used: {', '.join(self.unused_columns)}")
        return lines


def from_record(record: Mapping[str, Any]) -> DataReport:
    """The report whose as_record() this is."""
    dropped = {reason: Drop(**drop) for reason, drop in record["dropped"].items()}
    files = tuple(SourceFile(**file) for file in record["files"])
    return DataReport(**{**record, "dropped": dropped, "files": files, "notes": tuple(record["notes"])})


def percent(part: int, whole: int) -> str:
    """With one digit after the point; two below 0.1 %. Never rounded up to all or down to none."""
    share = 100 * part / whole if whole else 0.0
    if part == whole or part == 0:
        return f"{share:.0f} %"
    return f"{min(share, 99.9):.1f} %" if share >= 0.1 else f"{max(share, 0.01):.2f} %"


def source_files(paths: Sequence[str]) -> tuple[SourceFile, ...]:
    """Size and hash of each file, read in pieces.

    Raises:
        UsageError: a path that names no data file. DataError: a file that cannot be read.
    """
    return tuple(_source_file(path) for path in paths)


def _source_file(path: str) -> SourceFile:
    if is_hub_id(path):
        return SourceFile(path=path, bytes=None, sha256=None)
    file = checked(path)
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    return SourceFile(path=path, bytes=file.stat().st_size, sha256=digest)
