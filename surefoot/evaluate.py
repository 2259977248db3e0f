"""Held-out scores: answers generated greedily and matched as the commonsense recipes do, and the loss of the trained tokens."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Which answers a task allows; the first match in the generated text is the prediction (LLM-Adapters' procedure).
ANSWERS = {
    "boolq": r"true|false",
    "piqa": r"solution[12]",
    "hellaswag": r"ending[1-4]",
    "winogrande": r"option[12]",
}
ANSWER_OF_A_CHOICE = r"answer[1-5]"  # social_i_qa, ARC, openbookqa


@dataclass(frozen=True, kw_only=True)
class Score:
    """correct of total; formed counts the rows that gave any allowed answer, majority those that the commonest answer of each task gets."""

    correct: int
    formed: int
    majority: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson score interval of the accuracy."""
        z, n, p = 1.96, self.total, self.accuracy
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return centre - half, centre + half


def score_answers(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, str]],
    prompts: Sequence[str],
    *,
    batch_size: int = 32,
    tick: Callable[[int], object] = int,
) -> Score:
    """Generates up to 12 tokens for each prompt, greedily, and counts answers equal to the row's `answer`.

    Args:
        rows: each with `answer` and `task`.
        prompts: the text before the answer, one a row, BOS not included.
        tick: told the number of rows done after each batch.
    """
    correct = formed = 0
    for batch in _batches(range(len(rows)), batch_size):
        texts = generate(model, tokenizer, [prompts[index] for index in batch], max_new_tokens=12)
        for index, text in zip(batch, texts, strict=True):
            match = re.search(ANSWERS.get(rows[index]["task"], ANSWER_OF_A_CHOICE), text.lower())
            formed += match is not None
            correct += match is not None and match.group() == rows[index]["answer"]
        tick(len(batch))
    return Score(correct=correct, formed=formed, majority=_majority(rows), total=len(rows))


def _majority(rows: Sequence[Mapping[str, str]]) -> int:
    tasks: dict[str, Counter[str]] = {}
    for row in rows:
        tasks.setdefault(row["task"], Counter())[row["answer"]] += 1
    return sum(max(answers.values()) for answers in tasks.values())


def _batches(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (indices[start : start + size] for start in range(0, len(indices), size))


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int) -> list[str]:
    """The greedy continuation of each prompt; rows are padded on the left and the padding is masked."""
    model.eval()
    tokenizer.padding_side = "left"
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)
    tokenizer.padding_side = "right"
    rows = model.get_input_embeddings().weight.shape[0]
    inputs["input_ids"].masked_fill_(inputs["input_ids"] >= rows, tokenizer.eos_token_id)  # an added PAD has no row in the base model
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, pad_token_id=tokenizer.pad_token_id)
    return [str(text) for text in tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]


@torch.no_grad()
def mean_loss(model: Any, rows: Any, collator: Callable[[list[Any]], dict[str, torch.Tensor]], *, batch_size: int = 16) -> float:
    """Cross-entropy in nats per trained token, over all rows."""
    model.eval()
    total, count = 0.0, 0
    for batch in _batches(range(len(rows)), batch_size):
        inputs = collator([rows[index] for index in batch])
        inputs.pop("lengths")
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        trained = int((inputs["labels"][:, 1:] != -100).sum())
        total += float(model(**inputs, use_cache=False).loss) * trained
        count += trained
    return total / count
