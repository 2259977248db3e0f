"""Rows as the collator batches them, as text that shows what is trained, what is only read, and what is padding."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from surefoot.data.audit import REASONS, Audit
from surefoot.data.pipeline import Data
from surefoot.data.row_log import EVALUATED, TRAINED
from surefoot.data.rows import IGNORED, Collator

OUTER_SPACES = re.compile(r"^ +| +$", re.MULTILINE)


class Piece(NamedTuple):
    """A stretch of a row; kind is trained, read, padding, or source for the text of a row that was dropped."""

    text: str
    kind: str
    is_special: bool = False


class Shown(NamedTuple):
    """A row and the line of facts above it."""

    title: str
    pieces: tuple[Piece, ...]


def first_rows(data: Data, collator: Collator, tokenizer: Any, count: int, batch_size: int) -> list[Shown]:
    """The first `count` training rows in file order, batch_size of them a batch."""
    indices = range(min(count, len(data.train)))
    batches = (indices[start : start + batch_size] for start in range(0, len(indices), batch_size))
    return [shown for batch in batches for shown in _batched(data, TRAINED, batch, collator, tokenizer)]


def worst_rows(data: Data, collator: Collator, tokenizer: Any, count: int) -> list[Shown]:
    """For each reason that the audit met, its `count` longest rows (of the 5 it keeps), each a batch of its own."""
    sides = {side: data.audit.sources(side).tolist() for side in (TRAINED, EVALUATED)}
    worst = {row.source: row for finding in data.audit.findings for row in finding.worst[:count]}
    shown = []
    for row in worst.values():
        side = next((side for side, sources in sides.items() if row.source in sources), None)
        if side is None:
            shown.append(Shown(f"{row.where} | {_facts(data.audit, row.source)}", (Piece(visible(row.text), "source"),)))
        else:
            shown += _batched(data, side, [sides[side].index(row.source)], collator, tokenizer)
    return shown


def _batched(data: Data, side: str, indices: Sequence[int], collator: Collator, tokenizer: Any) -> Iterator[Shown]:
    """The rows of one batch."""
    rows = data.eval if side == EVALUATED and data.eval is not None else data.train
    sources = data.audit.sources(side)
    batch = collator([rows[index] for index in indices])
    for place, index in enumerate(batch["rows"].tolist()):
        trained = (batch["labels"][place] != IGNORED).tolist()
        ids, length = batch["input_ids"][place].tolist(), int(batch["lengths"][place])
        title = f"{rows.where(index)} | {_facts(data.audit, int(sources[index]), length)}"
        yield Shown(title, tuple(pieces(ids, trained, length, tokenizer)))


def _facts(audit: Audit, source: int, length: int | None = None) -> str:
    """Fate, tokens, format, template and reasons of a source row."""
    entry = {name: int(column[source]) for name, column in audit.columns.items()}
    cut = f" ({entry['tokens']:,} before the cut)" if length is not None and length != entry["tokens"] else ""
    tokens = f"{length or entry['tokens']:,} tokens{cut}, {entry['trained']:,} of them trained"
    met = [reason.name for bit, reason in enumerate(REASONS) if entry["reasons"] >> bit & 1]
    template = audit.templates[entry["template"]] or "none"
    made = f"format {audit.formats[entry['format']]}, prompt {template}"
    return " | ".join([audit.fates[entry["fate"]], tokens, made, *([", ".join(met)] if met else [])])


def pieces(ids: Sequence[int], trained: Sequence[bool], length: int, tokenizer: Any) -> Iterator[Piece]:
    """The row's stretches of tokens that are alike in being trained and being special, then its padding."""
    special = set(tokenizer.all_special_ids) | {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}

    def text_until(end: int) -> str:
        # whole beginnings are decoded: a stretch alone would lose the space that SentencePiece hides at its first word
        return str(tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)).rstrip("\ufffd")

    start, before = 0, ""
    for (is_trained, is_special), stretch in groupby(range(length), key=lambda index: (trained[index], ids[index] in special)):
        start += len(list(stretch))
        text = text_until(start)
        yield Piece(visible(text[len(before) :]), "trained" if is_trained else "read", is_special)
        before = text
    if length < len(ids):
        yield Piece(f"{visible(tokenizer.convert_ids_to_tokens(ids[length]))} x {len(ids) - length}", "padding", True)


def visible(text: str) -> str:
    """Spaces at the ends of lines as a dot, line breaks and tabs with a sign, and what a terminal would obey or hide as its escape."""
    dotted = OUTER_SPACES.sub(lambda spaces: "\u00b7" * len(spaces[0]), text)
    return "".join(_sign(character) for character in dotted)


def _sign(character: str) -> str:
    if character in "\n\t":
        return "\u21b5\n" if character == "\n" else "\u2192\t"
    return character if character.isprintable() else character.encode("unicode_escape").decode()
