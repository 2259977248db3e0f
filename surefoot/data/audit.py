"""Audit: what the collator will train on, row by row, and whether too many rows are lost or sick. examine.py makes it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from surefoot.data.report import percent
from surefoot.errors import DataError

# The largest share of the source rows that passes.
OVER_CUTOFF = 0.50  # --overlong=truncate_prompt cuts prompts on purpose; past half, most rows have lost what they ask
ANSWER_LOST = 0.25  # commonsense_170k at its recipes' cutoff_len=256 loses every seventh row; a fourth changes what is learnt
NO_END = 0.01  # one cause, a template or a tokenizer, takes the end from every row it touches
ALL_MASKED = 0.01  # the same, for the labels
EMPTY = 0.10  # Alpaca has 0.05 %; at a tenth the columns are not what they were taken for
DUPLICATED = 0.50  # commonsense_170k repeats 13 % of its rows on purpose; past half, the rows are mostly copies
SHARED = 0.10  # of the validation rows; beyond, eval_loss measures memory


class Reason(NamedTuple):
    """What can be wrong with a row. `text` follows a share ("3 % of 100 "), `way_out` is what to do about it."""

    name: str
    limit: float
    text: str
    way_out: str


REASONS = (
    Reason("over_cutoff", OVER_CUTOFF, "rows have more tokens than cutoff_len={cutoff_len}", "{advice}"),
    Reason("answer_lost", ANSWER_LOST, "rows lose their answer to cutoff_len={cutoff_len}", "{advice}"),
    Reason(
        "no_end",
        NO_END,
        "rows do not train {ends} right after the answer, so that the model never learns to stop there",
        "Let the template write it there (a Jinja file: inside the generation block)",
    ),
    Reason("all_masked", ALL_MASKED, "rows have no token to train on", "The tokenizer gives wrong offsets, or the prompt no answer"),
    Reason("empty", EMPTY, "rows hold no answer to train on", "Fill or remove them, or read them with --prompt_style=FILE.jinja"),
    Reason("duplicated", DUPLICATED, "rows repeat an earlier training row", "Remove the copies; --num_epochs repeats all rows alike"),
    Reason("shared", SHARED, "validation rows are also trained on", "Remove them from one of the files"),
)


class AuditError(DataError):
    """Too many lost or sick rows under --audit=fail. `audit` is there for audit.json."""

    def __init__(self, message: str, audit: Audit) -> None:
        super().__init__(message)
        self.audit = audit


class WorstRow(NamedTuple):
    """A row, the `source`th of those read: its place, its tokens before any cut, and how it begins in its file."""

    source: int
    where: str
    tokens: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Finding:
    """For one reason: `rows` of `of` rows, the place of the first, and the longest ones."""

    reason: str
    rows: int
    of: int
    limit: float
    text: str
    way_out: str
    first: str
    worst: tuple[WorstRow, ...]

    @property
    def share(self) -> float:
        return self.rows / self.of if self.of else 0.0

    @property
    def exceeds(self) -> bool:
        return self.share > self.limit

    def complaint(self) -> str:
        """What is too much, the way out, and the longest of the rows, a line each."""
        rows = [f"      {row.where}  {row.tokens:,} tokens  {row.text}" for row in self.worst]
        share = f"{percent(self.rows, self.of)} ({self.rows:,}) of {self.of:,}"
        return "\n".join([f"  - {share} {self.text}; at most {100 * self.limit:g} % may. {self.way_out}. The longest:", *rows])


@dataclass(frozen=True, kw_only=True, eq=False)
class Audit:
    """Totals by reason in the order of REASONS, the tokens of the training rows, and columns with an entry for each source row.

    The columns are int32 arrays: file, format, template and fate are codes into the tables; line; tokens before any cut; trained, the
    tokens trained on after it; reasons, where bit i stands for REASONS[i].
    """

    findings: tuple[Finding, ...]
    tokens: int
    trained_tokens: int
    files: tuple[str, ...]
    formats: tuple[str, ...]
    templates: tuple[str, ...]
    fates: tuple[str, ...]
    columns: Mapping[str, NDArray[np.int32]]

    def of(self, reason: str) -> Finding:
        return next(finding for finding in self.findings if finding.reason == reason)

    def sources(self, fate: str) -> NDArray[np.int64]:
        """Indices of the source rows whose fate begins so; those of row_log.TRAINED are the rows of Data.train, in order."""
        return having(self.columns["fate"], self.fates, fate)

    def complaint(self) -> str:
        """Every reason over its limit with its longest rows, a line each; empty when the audit is passed."""
        return "\n".join(finding.complaint() for finding in self.findings if finding.exceeds)

    def verdict(self) -> str:
        """One line: passed or not, and what was found."""
        met = (finding for finding in self.findings if finding.rows)
        found = "; ".join(f"{percent(finding.rows, finding.of)} ({finding.rows:,}) of the {finding.text}" for finding in met)
        return f"{'not passed' if self.complaint() else 'passed'}; {found or 'nothing found'}"

    def totals(self) -> dict[str, Any]:
        """Everything but the columns, as plain values."""
        record = {name: getattr(self, name) for name in ("tokens", "trained_tokens", *TABLES)}
        return record | {"findings": [_finding_record(finding) for finding in self.findings]}

    def as_record(self) -> dict[str, Any]:
        """As plain values for JSON; the columns as parallel lists."""
        return self.totals() | {"rows": {name: column.tolist() for name, column in self.columns.items()}}


TABLES = ("files", "formats", "templates", "fates")


def having(codes: NDArray[np.int32], table: tuple[str, ...], beginning: str) -> NDArray[np.int64]:
    """Indices of the codes whose text begins so."""
    return np.flatnonzero(np.isin(codes, [code for code, text in enumerate(table) if text.startswith(beginning)]))


def _finding_record(finding: Finding) -> dict[str, Any]:
    record = dataclasses.asdict(finding) | {"worst": [row._asdict() for row in finding.worst]}
    return record | {"share": round(finding.share, 6), "exceeds": finding.exceeds}


def from_totals(record: Mapping[str, Any], columns: Mapping[str, NDArray[np.int32]]) -> Audit:
    """The audit whose totals() and columns these are."""
    names = [field.name for field in dataclasses.fields(Finding)]
    findings = [
        Finding(**{name: finding[name] for name in names} | {"worst": tuple(WorstRow(**row) for row in finding["worst"])})
        for finding in record["findings"]
    ]
    tables = {name: tuple(record[name]) for name in TABLES}
    return Audit(findings=tuple(findings), tokens=record["tokens"], trained_tokens=record["trained_tokens"], columns=columns, **tables)


def write_audit(audit: Audit, folder: Path) -> None:
    """Writes folder/audit.json, beside and renamed, so that a reader never meets half a file. Raises OSError where it cannot."""
    path = folder / "audit.json"
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    partial.write_text(json.dumps(audit.as_record(), ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    os.replace(partial, path)
