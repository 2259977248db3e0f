"""make_audit(): the reasons that each source row meets, judged on tokens and masks as they came out. Nothing that made them is trusted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jinja2
import numpy as np
from numpy.typing import NDArray

from surefoot.data.audit import REASONS, Audit, Finding, Reason, WorstRow, having
from surefoot.data.row_log import EVALUATED, MASKED, TRAINED, RowLog, coded
from surefoot.data.rows import Rows

WORST = 5  # rows shown for each reason
PROBE = "tromba"  # an answer whose end is easily found in a rendered conversation


class Judged(NamedTuple):
    """Of the rows of one side: trained tokens (int32), whether none of them is learnt, whether the answer's end is, and a key a row."""

    trained: NDArray[np.int32]
    is_masked: NDArray[np.bool_]
    has_end: NDArray[np.bool_]
    keys: list[bytes]


def make_audit(log: RowLog, train: Rows, held: Rows | None, ends: Mapping[int, str], words: Mapping[str, Any]) -> Audit:
    """The audit of the rows that were read and of what was made of them.

    Args:
        ends: the tokens that may end an answer, text by id.
        words: what the texts of REASONS name: cutoff_len, and advice on it.
    """
    places = log.places()
    tables: dict[str, tuple[str, ...]] = {"files": places.files}
    columns = {"file": places.file, "line": places.line, "tokens": np.array(log.tokens, dtype=np.int32)}
    for name, texts in (("format", log.formats), ("template", log.templates), ("fate", log.fates)):
        columns[name], tables[f"{name}s"] = coded(texts)
    sides = [(having(columns["fate"], tables["fates"], TRAINED), _judged(train, ends))]
    if held is not None:
        sides.append((having(columns["fate"], tables["fates"], EVALUATED), _judged(held, ends)))
    columns["trained"] = np.zeros_like(columns["tokens"])
    for at, judged in sides:
        columns["trained"][at] = judged.trained
    flags = _flags(log, columns, sides, words["cutoff_len"])
    columns["reasons"] = np.zeros_like(columns["tokens"])
    for bit, reason in enumerate(REASONS):
        columns["reasons"] |= flags[reason.name] << np.int32(bit)
    evaluated = len(held) if held is not None else 0
    named = dict(words) | {"ends": " or ".join(ends.values())}
    findings = [_finding(log, reason, flags[reason.name], evaluated, named) for reason in REASONS]
    return Audit(findings=tuple(findings), tokens=len(train.ids), trained_tokens=int(train.trained.sum()), columns=columns, **tables)


def _flags(
    log: RowLog, columns: Mapping[str, NDArray[np.int32]], sides: list[tuple[NDArray[np.int64], Judged]], cutoff_len: int
) -> dict[str, NDArray[np.bool_]]:
    """For each reason, which source rows meet it."""
    flags = {reason.name: np.zeros(len(log.rows), dtype=np.bool_) for reason in REASONS}
    flags["over_cutoff"] = columns["tokens"] > cutoff_len
    flags["empty"] = columns["tokens"] == 0
    flags["all_masked"] = np.array([fate == MASKED for fate in log.fates], dtype=np.bool_)
    for at, judged in sides:
        flags["all_masked"][at] = judged.is_masked
        flags["no_end"][at] = ~judged.is_masked & ~judged.has_end
    flags["answer_lost"] = (columns["trained"] < np.array(log.answers)) & ~flags["all_masked"]
    at, judged = sides[0]
    flags["duplicated"][at] = list(_repeats(judged.keys))
    seen = set(judged.keys)
    for at, judged in sides[1:]:
        flags["shared"][at] = [key in seen for key in judged.keys]
    return flags


def _repeats(keys: list[bytes]) -> Iterator[bool]:
    seen: set[bytes] = set()
    for key in keys:
        yield key in seen
        seen.add(key)


def _finding(log: RowLog, reason: Reason, flags: NDArray[np.bool_], evaluated: int, words: Mapping[str, Any]) -> Finding:
    indices = np.flatnonzero(flags)
    longest = sorted(indices.tolist(), key=lambda index: -log.tokens[index])[:WORST]
    return Finding(
        reason=reason.name,
        rows=len(indices),
        of=evaluated if reason.name == "shared" else len(log.rows),
        limit=reason.limit,
        text=reason.text.format(**words),
        way_out=reason.way_out.format(**words),
        first=log.rows[indices[0]].where if len(indices) else "",
        worst=tuple(WorstRow(index, log.rows[index].where, log.tokens[index], log.text(index)) for index in longest),
    )


def _judged(rows: Rows, ends: Mapping[int, str]) -> Judged:
    trained = rows.trained_tokens
    first = rows.trained[rows.offsets[:-1]]  # nothing predicts a row's first token
    return Judged(trained, trained == first, _has_end(rows, ends), _keys(rows))


def _has_end(rows: Rows, ends: Mapping[int, str]) -> NDArray[np.bool_]:
    """Whether the last trained token that says something is followed at once by a trained token of `ends`."""
    is_end = np.isin(rows.ids, list(ends))
    said = np.flatnonzero(rows.trained & ~is_end)
    start, stop = rows.offsets[:-1], rows.offsets[1:]
    last: NDArray[np.int64] = np.concatenate([[-1], said])[np.searchsorted(said, stop)]
    following = np.minimum(last + 1, stop - 1)
    is_followed = (last + 1 < stop) & rows.trained[following] & is_end[following]
    return np.asarray((last < start) | is_followed)


def _keys(rows: Rows) -> list[bytes]:
    """Equal for rows of equal tokens and mask."""
    borders = zip(rows.offsets[:-1].tolist(), rows.offsets[1:].tolist(), strict=True)
    pieces = ((rows.ids[start:end].tobytes() + rows.trained[start:end].tobytes()) for start, end in borders)
    return [hashlib.blake2b(piece, digest_size=16).digest() for piece in pieces]


def end_tokens(tokenizer: Any) -> dict[int, str]:
    """EOS, and the special token that the tokenizer's chat template writes after an answer, text by id."""
    ends = {int(tokenizer.eos_token_id): str(tokenizer.eos_token)}
    if not tokenizer.chat_template:
        return ends
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except jinja2.TemplateError:  # a template that refuses this conversation; rows that need it will say so
        return ends
    after = text.rpartition(PROBE)[2].lstrip()
    special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    written = max((text for text in special if after.startswith(text)), key=len, default=None)
    return ends | ({special[written]: written} if written else {})
