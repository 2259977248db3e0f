"""The PAD policy, settled before the model is loaded and the adapter attached."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

# Llama 3 reserves a token for this. Numbered reserved tokens and Llama 2's <unk> (its byte fallback never emits it) are unused in training.
RESERVED = (
    r"<\|finetune_right_pad_id\|>",
    r"<\|pad\|>|\[PAD\]|<pad>",
    r"<\|reserved_special_token_\d+\|>|<reserved_\d+>|<unused\d+>",
    r"<unk>",
)
ADDED = "<|pad|>"


class Pad(NamedTuple):
    """The padding token and why it was taken."""

    token: str
    token_id: int
    reason: str


def settle(tokenizer: Any) -> Pad:
    """Gives the tokenizer its PAD (right side) and says which: its own, else a reserved token, else a new `<|pad|>`.

    Labels come from character spans and never from ids, so a PAD equal to EOS masks no EOS.
    """
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is not None:
        return Pad(tokenizer.pad_token, tokenizer.pad_token_id, "the tokenizer's own")
    token = _reserved(tokenizer)
    reason = "reserved in the vocabulary"
    if token is None:
        token, reason = ADDED, "added: the vocabulary has no reserved token"
    tokenizer.add_special_tokens({"pad_token": token})
    return Pad(token, tokenizer.pad_token_id, reason)


def _reserved(tokenizer: Any) -> str | None:
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    vocabulary = tokenizer.get_vocab()
    for pattern in RESERVED:
        hits = [token for token in vocabulary if re.fullmatch(pattern, token) and token not in taken]
        if hits:
            return str(min(hits, key=lambda token: vocabulary[token]))
    return None
