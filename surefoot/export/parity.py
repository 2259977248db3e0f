"""The parity verdict: does the exported model say what the adapter said? Logits, KL, greedy tokens and the tokenizer's bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from surefoot.script import told

NEW_TOKENS = 16


class Band(NamedTuple):
    """What an export may differ by: the largest logit difference as a share of the largest logit, and KL in nats, mean over tokens."""

    logits: float
    kl: float


# 4 times (NF4: 1.5 times) the largest difference that the format's rounding alone made to exports of LoRA, DoRA and QDoRA adapters of
# models with 4 to 30 layers: benchmarks/export_bands.py, whose numbers benchmarks/results/export_bands_cpu.json has. There some wrong
# exports stay within all bands but fp32's: rounding.py finds those by their tensors
BANDS = {
    "fp32": Band(0.0004, 4e-07),
    "fp16": Band(0.0073, 2.7e-05),
    "bf16": Band(0.15, 0.0037),
    "q8_0": Band(0.18, 0.011),
    "nf4": Band(1.1, 2.0),
}


class Reference(NamedTuple):
    """What the model to be matched says: rows of ids, where each row's answer starts, and fp32 logits [tokens, vocabulary] by row."""

    rows: list[list[int]]
    starts: list[int]
    logits: list[torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Over all tokens of all prompts. greedy_equal counts the prompts whose greedy continuations are the same, of `prompts`."""

    max_logit: float
    mean_logit: float
    relative_max: float  # max_logit by the largest reference logit
    kl_mean: float
    kl_max: float
    greedy_equal: int
    prompts: int
    widest_flip: float  # the reference's margin between the two tokens where continuations part; 0 where none do

    def beyond(self, band: Band) -> list[str]:
        """What is outside the band, in words; a number that is not finite is outside every band."""
        found = []
        if not self.relative_max <= band.logits:
            found.append(f"the largest logit difference is {self.relative_max:.2g} of the largest logit (at most {band.logits:g})")
        if not self.kl_mean <= band.kl:
            found.append(f"KL is {self.kl_mean:.2g} nats a token (at most {band.kl:g})")
        return found

    def line(self) -> str:
        return (
            f"logits max {self.max_logit:.2g} ({self.relative_max:.1g} of the largest) mean {self.mean_logit:.2g}, "
            f"KL mean {self.kl_mean:.1g} max {self.kl_max:.1g} nats, greedy tokens equal on {self.greedy_equal} of {self.prompts} prompts"
        )

    def record(self) -> dict[str, Any]:
        """Of JSON's own values: a number that is not finite as text."""
        return {name: value if not isinstance(value, float) or math.isfinite(value) else str(value) for name, value in asdict(self).items()}


@torch.no_grad()
def observe(model: Any, prompts: Sequence[Sequence[int]], columns: int) -> Reference:
    """The model's greedy continuations of the prompts, and its logits of the first `columns` tokens of the vocabulary over both."""
    rows, starts, logits = [], [], []
    for prompt in told(prompts, len(prompts), "parity, the adapter", "prompt"):
        ids = torch.tensor([list(prompt)], device=model.device)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            suppress_tokens=list(range(columns, model.get_output_embeddings().weight.shape[0])) or None,
        )
        rows.append(out[0].tolist())
        starts.append(len(prompt))
        logits.append(model(input_ids=out).logits[0, :, :columns].float().cpu())
    return Reference(rows, starts, logits)


@torch.no_grad()
def compare(reference: Reference, model: Any) -> Difference:
    """The model's logits over the reference's own rows: greedy decoding is the same exactly where each next token is."""
    found: list[dict[str, float]] = []
    for ids, start, expected in zip(
        told(reference.rows, len(reference.rows), "parity, the export", "prompt"), reference.starts, reference.logits, strict=True
    ):
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().cpu()
        found.append(_one(expected, logits, start))
    tokens = sum(row["tokens"] for row in found)
    largest = max(row["largest"] for row in found)
    worst = _max(row["max_logit"] for row in found)
    return Difference(
        max_logit=worst,
        mean_logit=sum(row["sum_logit"] for row in found) / (tokens * reference.logits[0].shape[1]),
        relative_max=worst / largest,
        kl_mean=sum(row["sum_kl"] for row in found) / tokens,
        kl_max=_max(row["max_kl"] for row in found),
        greedy_equal=sum(row["flip"] == 0 for row in found),
        prompts=len(found),
        widest_flip=_max(row["flip"] for row in found),
    )


def _max(values: Any) -> float:
    """The largest; NaN where there is one, which max() may pass over."""
    found = list(values)
    return math.nan if any(math.isnan(value) for value in found) else max(found)


def _one(expected: torch.Tensor, logits: torch.Tensor, start: int) -> dict[str, float]:
    """One row's sums. A token beyond the reference's vocabulary (an added row) must not win, so the choice is among all."""
    shared = logits[:, : expected.shape[1]]
    gap = (shared - expected).abs()
    before, after = expected.double().log_softmax(-1), shared.double().log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1).clamp_min(0)
    return {
        "tokens": float(expected.shape[0]),
        "largest": float(expected.abs().max()),
        "max_logit": float(gap.max()),
        "sum_logit": float(gap.double().sum()),
        "sum_kl": float(kl.sum()),
        "max_kl": float(kl.max()),
        "flip": _flip(expected[start - 1 : -1], logits[start - 1 : -1]),
    }


def _flip(expected: torch.Tensor, logits: torch.Tensor) -> float:
    """The reference's margin at the first next token that differs, 0 where all are the same."""
    here, there = expected.argmax(-1), logits.argmax(-1)
    parts = (here != there).nonzero()
    if not len(parts):
        return 0.0
    at = int(parts[0])
    if int(there[at]) >= expected.shape[1]:
        return math.inf
    return max(float(expected[at, here[at]] - expected[at, there[at]]), torch.finfo(torch.float32).tiny)


def tokenizer_differences(before: Any, after: Any, prompts: Sequence[str]) -> list[str]:
    """What differs between two tokenizers: chat template, special tokens and their ids, the prompts' ids."""
    found = []
    if (before.chat_template or None) != (after.chat_template or None):
        found.append("the chat template is another")
    for name in ("bos_token", "eos_token", "pad_token"):
        pairs = [(getattr(tokenizer, name), getattr(tokenizer, f"{name}_id")) for tokenizer in (before, after)]
        if pairs[0] != pairs[1]:
            found.append(f"{name} {pairs[0]} -> {pairs[1]}")
    found += [f"prompt {n} has other ids" for n, prompt in enumerate(prompts) if before(prompt)["input_ids"] != after(prompt)["input_ids"]]
    return found
