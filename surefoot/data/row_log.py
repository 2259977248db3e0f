"""RowLog: what became of each source row on its way to the collator."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from surefoot.data.loading import SourceRow
from surefoot.data.rows import Places

TRAINED, EVALUATED, CUT, DROPPED = "trained", "evaluated", ", prompt cut", "dropped: "
MASKED = DROPPED + "no token to train on"
SHOWN = 80  # characters of a row that a message shows


@dataclass(kw_only=True)
class RowLog:
    """Parallel lists, one entry a row in the order read.

    `tokens` are a row's before any cut and `answers` the trained ones among them; both are 0 for a row that never became tokens.
    """

    rows: list[SourceRow] = field(default_factory=list)
    formats: list[str] = field(default_factory=list)
    templates: list[str] = field(default_factory=list)
    fates: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)

    def add(self, row: SourceRow, format_name: str) -> int:
        """Enters a row and returns its index."""
        self.rows.append(row)
        self.formats.append(format_name)
        for texts in (self.templates, self.fates):
            texts.append("")
        for counts in (self.tokens, self.answers):
            counts.append(0)
        return len(self.rows) - 1

    def drop(self, index: int, reason: str) -> None:
        self.fates[index] = DROPPED + reason

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every row that became tokens, before any cut."""
        tokens = np.array(self.tokens, dtype=np.int64)
        return tokens[tokens > 0]

    def places(self) -> Places:
        """Of all source rows."""
        parts = [row.where.rpartition(":") for row in self.rows]
        file, files = coded([part[0] for part in parts])
        return Places(files, file, np.array([int(part[2]) for part in parts], dtype=np.int32))

    def text(self, index: int) -> str:
        """The beginning of the row, as it would stand in a .jsonl file; characters that a terminal would obey are escaped."""
        text = json.dumps(self.rows[index].columns, ensure_ascii=False, default=str)
        short = text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
        return "".join(character if character.isprintable() else character.encode("unicode_escape").decode() for character in short)


def coded(texts: Sequence[str]) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """The texts as codes (int32), and what each code means, in the order of their first use."""
    table: dict[str, int] = {}
    codes = [table.setdefault(text, len(table)) for text in texts]
    return np.array(codes, dtype=np.int32), tuple(table)
