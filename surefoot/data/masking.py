"""One tokenisation of each whole text, labels from its character spans, and what happens to rows over the cut-off.

A token is trained when its last character lies inside a trained span. So a token that a tokenizer merges from the prompt's end and the
answer's beginning is trained (it ends in the answer), and one that runs out of an answer into what follows is not. The prompt is never
tokenised apart: its tokens need not be those it has inside the whole text.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from surefoot.data.prompts import Rendered
from surefoot.errors import DataError


class Encoded(NamedTuple):
    """A row's token ids, which of them are trained, and how many leading ones (BOS) must stay when its prompt is cut."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    lead: int


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """The tokenizer, and the ids that its own rule puts before a text."""

    tokenizer: Any
    prefix: tuple[int, ...]

    def encode(self, batch: Sequence[Rendered]) -> list[Encoded]:
        """The rows of a batch, whole. BOS as the tokenizer's rule says, never twice; EOS is in the text, so that the rule adds none."""
        if not batch:  # tokenizers fail on an empty list
            return []
        out = self.tokenizer(
            [rendered.text for rendered in batch],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [self._row(*parts) for parts in zip(batch, out["input_ids"], out.encodings, strict=True)]

    def _row(self, rendered: Rendered, ids: list[int], encoding: Any) -> Encoded:
        # offsets are asked for where a span begins and ends only: the list of all of them takes a fifth of the time
        def end(index: int) -> int:
            return int(encoding.token_to_chars(index)[1])

        tokens = range(len(ids))
        trained = np.zeros(len(ids), dtype=np.bool_)
        for start, stop in rendered.trained:
            trained[bisect_right(tokens, start, key=end) : bisect_right(tokens, stop, key=end)] = True
        has_bos = bool(ids) and ids[0] == self.tokenizer.bos_token_id
        if rendered.is_whole or has_bos:
            return Encoded(np.array(ids, dtype=np.int32), trained, int(has_bos))
        lead = len(self.prefix)
        return Encoded(np.array([*self.prefix, *ids], dtype=np.int32), np.concatenate([np.zeros(lead, dtype=np.bool_), trained]), lead)


def make_encoder(tokenizer: Any) -> Encoder:
    """The encoder of a fast tokenizer.

    Raises:
        DataError: the tokenizer gives no character offsets, or does not know its own EOS.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"the tokenizer ({type(tokenizer).__name__}) gives no character offsets, from which the labels are made. "
            "Give a base model with a tokenizer.json (a fast tokenizer)"
        )
    probe = "a"
    bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
    ruled = tokenizer(probe)["input_ids"]
    place = next(index for index in range(len(ruled)) if ruled[index : index + len(bare)] == bare)
    if tokenizer(probe + tokenizer.eos_token, add_special_tokens=False)["input_ids"][-1] != tokenizer.eos_token_id:
        raise DataError(
            f"the tokenizer does not read its EOS {tokenizer.eos_token!r} as one token (id {tokenizer.eos_token_id}), "
            "so that the model would never learn to stop. Add it to the special tokens in tokenizer.json"
        )
    return Encoder(tokenizer=tokenizer, prefix=tuple(ruled[:place]))


def is_trainable(row: Encoded) -> bool:
    """False when no token after the first is trained; nothing predicts the first one."""
    return bool(row.trained[1:].any())


def cut_prompt(row: Encoded, cutoff_len: int) -> Encoded | None:
    """The row cut to cutoff_len tokens from the left of its prompt, BOS kept; None when everything from its first answer on does not fit.

    At least one token stays before the answer, for the first token of a row is never predicted.
    """
    too_many = len(row.ids) - cutoff_len
    first_trained = int(row.trained.argmax())
    if first_trained - too_many < max(row.lead, 1):
        return None
    cut = slice(row.lead, row.lead + too_many)
    return Encoded(np.delete(row.ids, cut), np.delete(row.trained, cut), row.lead)
