"""Text from a model: prompts in batches, or one as it comes. Prompts are token ids, so that no tokenizer setting can change them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy, num_beams > 1 a deterministic beam search."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1

    def config(self, end_ids: Sequence[int]) -> GenerationConfig:
        """As transformers takes it, with nothing left to the model's own generation_config.json."""
        samples = self.temperature > 0
        choice = {"temperature": self.temperature, "top_p": self.top_p} if samples else {}
        return GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=self.max_new_tokens, do_sample=samples, num_beams=self.num_beams, top_k=0 if samples else None,
            eos_token_id=list(end_ids), pad_token_id=end_ids[0], use_cache=True, **choice,
        )  # fmt: skip


def complete(
    model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, end_ids: Sequence[int], *,
    batch_size: int = 32, tick: Callable[[int], object] = int,
) -> list[list[int]]:  # fmt: skip
    """The tokens that follow each prompt, up to and without the first of end_ids.

    Args:
        tick: told the number of prompts done after each batch. Batches hold prompts of like length, the longest first.
    """
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    found: list[list[int]] = [[]] * len(prompts)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for index, ids in zip(batch, continued(model, [prompts[index] for index in batch], sampling, end_ids), strict=True):
            found[index] = ids
        tick(len(batch))
    return found


@torch.no_grad()
def continued(
    model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, end_ids: Sequence[int], streamer: Any = None
) -> list[list[int]]:
    """One batch, padded on the left with the padding masked; `streamer` (transformers') gets a single prompt's tokens as they come."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    out = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=sampling.config(end_ids), streamer=streamer
    )
    return [_until(row, end_ids) for row in out[:, width:].tolist()]


def _until(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in end_ids), len(ids))
    return ids[:end]
