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
    """Gives the tokenizer its PAD (right side) and says which: its own, a reserved token, an unused special token, else a new `<|pad|>`.

    Labels come from character spans and never from ids, so a PAD equal to EOS masks no EOS.
    """
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is not None:
        return Pad(tokenizer.pad_token, tokenizer.pad_token_id, "the tokenizer's own")
    token, reason = _reserved(tokenizer), "reserved in the vocabulary"
    if token is None:
        token, reason = _unused_special(tokenizer), "a special token that the chat template does not use"
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


def _unused_special(tokenizer: Any) -> str | None:
    """The last special token that is no BOS or EOS and does not occur in the chat template."""
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    return next((token for token in reversed(special) if token not in taken and token not in template), None)
