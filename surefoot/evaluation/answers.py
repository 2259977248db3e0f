"""Answers as the commonsense recipes judge them: the first allowed answer in the generated text is the prediction.

The patterns are LLM-Adapters' (commonsense_evaluate.py, Apache-2.0), for its eight tasks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from surefoot.evaluation.intervals import wilson

TASKS = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Challenge", "ARC-Easy", "openbookqa")
PATTERNS = {"boolq": r"true|false", "piqa": r"solution[12]", "hellaswag": r"ending[1-4]", "winogrande": r"option[12]"}
ANSWER_OF_A_CHOICE = r"answer[1-5]"  # social_i_qa, ARC, openbookqa


class Score(NamedTuple):
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
        return wilson(self.correct, self.total)


def pattern(task: str) -> str:
    """The regular expression of a task's allowed answers."""
    return PATTERNS.get(task, ANSWER_OF_A_CHOICE)


def first_match(text: str, task: str) -> str | None:
    """The first allowed answer in the text, None where there is none."""
    found = re.search(pattern(task), text.lower())
    return found.group() if found else None


def options(instruction: str, task: str) -> tuple[str, ...]:
    """The answers that the row offers, read off its `Answer format: a/b/c`."""
    return tuple(dict.fromkeys(re.findall(pattern(task), instruction.rpartition("Answer format:")[2].lower())))


def is_answered(columns: Mapping[str, Any], task: str) -> bool:
    """True for a row of these tasks: an instruction, and an answer that its task allows."""
    answer = columns.get("answer")
    return isinstance(answer, str) and isinstance(columns.get("instruction"), str) and re.fullmatch(pattern(task), answer) is not None


def score(tasks: Sequence[str], answers: Sequence[str], predictions: Sequence[str | None]) -> Score:
    """Counts the predictions that are the answer; the three have one entry a row."""
    return Score(
        correct=sum(answer == predicted for answer, predicted in zip(answers, predictions, strict=True)),
        formed=sum(predicted is not None for predicted in predictions),
        majority=_majority(tasks, answers),
        total=len(answers),
    )


def _majority(tasks: Sequence[str], answers: Sequence[str]) -> int:
    counts: dict[str, Counter[str]] = {}
    for task, answer in zip(tasks, answers, strict=True):
        counts.setdefault(task, Counter())[answer] += 1
    return sum(max(one.values()) for one in counts.values())
