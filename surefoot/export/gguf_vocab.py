"""A byte-level BPE tokenizer as GGUF holds it: tokens, kinds, merges, special ids, the pre-tokenizer's name, the chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from surefoot.errors import UsageError
from surefoot.export import carry

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# how text is split before BPE -> llama.cpp's name of it. Another name than the right one changes tokens without a word.
PRE_TOKENIZERS = {
    (rf"{_WORDS}\p{{N}}{{1,3}}{_REST}", False): "llama-bpe",
    (rf"{_WORDS}\p{{N}}{_REST}", False): "qwen2",
    ("", True): "gpt-2",
    ("digits", True): "smollm",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType


class Vocabulary(NamedTuple):
    """`special` are bos, eos and pad ids where the tokenizer has them."""

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    pre: str
    special: dict[str, int]
    adds_bos: bool
    chat_template: str | None


def read(folder: Path, rows: int) -> Vocabulary:
    """The tokenizer in `folder`, filled up to the model's `rows` with unused tokens.

    Raises:
        UsageError: as check().
    """
    content, pre = check(folder)
    model = content["model"]
    loaded = carry.tokenizer(folder)
    tokens = [f"[UNUSED{index}]" for index in range(rows)]
    kinds = [UNUSED] * rows
    for token, index in model["vocab"].items():
        tokens[index], kinds[index] = token, NORMAL
    for index, added in loaded.added_tokens_decoder.items():
        tokens[index], kinds[index] = added.content, CONTROL if added.special else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    special = {name: getattr(loaded, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return Vocabulary(
        tokens,
        kinds,
        merges,
        pre,
        {name: index for name, index in special.items() if index is not None},
        loaded("x")["input_ids"][:1] == [loaded.bos_token_id],
        loaded.chat_template or None,
    )


WAY_OUT = "Give --converter=convert_hf_to_gguf.py of llama.cpp, which knows more"


def check(folder: Path) -> tuple[dict[str, Any], str]:
    """The content of tokenizer.json, and llama.cpp's name of how it splits text.

    Raises:
        UsageError: it is no byte-level BPE, or splits text in a way whose name in llama.cpp is not known here.
    """
    try:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder}/tokenizer.json cannot be read ({error}): a GGUF is made from a fast tokenizer") from None
    model = content["model"]
    if model.get("type") != "BPE":
        raise UsageError(f"{folder}: a {model.get('type')} tokenizer is not written here. {WAY_OUT}")
    if model.get("byte_fallback") and "<0x00>" in model["vocab"]:  # without such tokens it never acts, as in a GGUF's tokenizer read back
        raise UsageError(f"{folder}: a BPE tokenizer with byte fallback is not written here. {WAY_OUT}")
    return content, _pre(folder, content.get("pre_tokenizer"))


def _pre(folder: Path, pre_tokenizer: dict[str, Any] | None) -> str:
    steps = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    split = next((step["pattern"].get("Regex", "") for step in steps if step.get("type") == "Split"), "")
    if any(step.get("type") == "Digits" and step.get("individual_digits") for step in steps):
        split = "digits"
    by_words = any(step.get("type") == "ByteLevel" and step.get("use_regex", True) for step in steps)
    name = PRE_TOKENIZERS.get((split, by_words))
    if name is None:
        raise UsageError(f"{folder}: its tokenizer splits text in a way whose name in llama.cpp is not known here. {WAY_OUT}")
    return name
