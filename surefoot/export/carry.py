"""What travels beside the weights: tokenizer and chat template byte by byte, config.json, generation_config.json, the model's own code."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from surefoot import checkpoint
from surefoot.artifacts import PROMPT
from surefoot.errors import UsageError
from surefoot.export.source import Source
from surefoot.json_file import read_json, write_json

TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken",
    "spiece.model", "sentencepiece*.model", "chat_template*", "additional_chat_templates",
)  # fmt: skip
OF_BASE = ("*.py", "LICENSE*", "NOTICE*", "preprocessor_config.json")


def tokenizer(folder: Path, *, trusts_remote_code: bool = False) -> Any:
    """The tokenizer in `folder`.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trusts_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UsageError(f"{folder} holds no tokenizer that can be read: {str(error).strip().splitlines()[0]}") from None


def vocabulary_size(source: Source) -> int:
    """The tokens of the run's tokenizer, added ones included."""
    return len(tokenizer(source.tokenizer, trusts_remote_code=source.trusts_remote_code))


def copied(patterns: tuple[str, ...], source: Path, out: Path) -> None:
    """Copies the files and folders that match."""
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            if file.is_dir():
                shutil.copytree(file, out / file.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(file, out / file.name)


def files(source: Source, out: Path) -> list[str]:
    """Copies tokenizer and code, and writes generation_config.json; returns lines on what was changed."""
    copied(OF_BASE, source.base, out)
    copied(TOKENIZER, source.tokenizer, out)
    copied((PROMPT,), checkpoint.home(source.adapter), out)
    generation = read_json(source.base / "generation_config.json")
    if not generation:
        return []
    end, notes = tokenizer(source.tokenizer, trusts_remote_code=source.trusts_remote_code).eos_token_id, []
    ends = generation.get("eos_token_id")
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if end is not None and end not in known:
        generation["eos_token_id"] = [*known, end]
        notes.append(
            f"generation_config.json: eos_token_id {known} -> {[*known, end]}, so that generation stops where training ended its answers"
        )
    write_json(out / "generation_config.json", generation)
    return notes


def config(source: Source, out: Path, *, dtype: torch.dtype, rows: int, is_untied: bool) -> None:
    """Writes the base's config.json with the new dtype, vocabulary and tying."""
    content = dict(source.base_config)
    named = str(dtype).removeprefix("torch.")
    content["dtype"] = named
    if "torch_dtype" in content:
        content["torch_dtype"] = named
    for place in (content, content.get("text_config")):
        if isinstance(place, dict) and "vocab_size" in place:
            place["vocab_size"] = rows
    if is_untied:
        content["tie_word_embeddings"] = False
    write_json(out / "config.json", content)
