"""The PAD policy: a tokenizer's own, a reserved token, and only then a new one."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from surefoot import tokens


def tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with these special tokens behind its 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    core.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=core, **named)


@pytest.mark.parametrize(
    ("special", "named", "token", "reason"),
    [
        (("<s>", "<e>", "<own>"), {"pad_token": "<own>"}, "<own>", "the tokenizer's own"),
        (("<s>", "<e>"), {"pad_token": "<e>"}, "<e>", "the tokenizer's own"),
        (("<e>", "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"), {}, "<|finetune_right_pad_id|>", "reserved in the vocabulary"),
        (("<e>", "<|reserved_special_token_3|>", "<|reserved_special_token_1|>"), {}, "<|reserved_special_token_3|>", "reserved in the vocabulary"),
        (("<unk>", "<s>", "<e>"), {"unk_token": "<unk>"}, "<unk>", "reserved in the vocabulary"),
        (("<s>", "<e>"), {"bos_token": "<s>"}, "<|pad|>", "added: the vocabulary has no reserved token"),
        (("<e>", "<file_sep>", "<turn>"), {"chat_template": "<turn>"}, "<file_sep>", "a special token that the chat template does not use"),
    ],
)  # fmt: skip
def test_pad_when_settled_then_follows_the_policy(special: tuple[str, ...], named: dict[str, str], token: str, reason: str) -> None:
    made = tokenizer(*special, eos_token="<e>", **named)
    size = len(made)
    pad = tokens.settle(made)
    assert (pad.token, pad.reason) == (token, reason)
    assert made.pad_token_id == pad.token_id
    assert made.padding_side == "right"
    assert len(made) == size + (reason.startswith("added"))
