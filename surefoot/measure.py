"""Rows put to an opened model: what it says to each, what each is worth, and the scores of a set."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from surefoot import generate
from surefoot.data.formats import Example
from surefoot.errors import DataError
from surefoot.evaluation import answers, intervals, likelihood, texts
from surefoot.generate import Sampling
from surefoot.inference import Opened
from surefoot.row_sets import RowSet

METRICS = ("accuracy", "exact_match", "rougeL", "sari", "perplexity")
SHARES = ("accuracy", "exact_match")  # right or wrong by row
SCORINGS = ("generate", "loglikelihood")


@dataclass(frozen=True, kw_only=True)
class How:
    """How the rows are put to the model."""

    scoring: str
    sampling: Sampling
    batch_size: int


class Said(NamedTuple):
    """Of each row: the generated text (empty under loglikelihood), the prediction, its worth by metric, its loss and trained tokens."""

    texts: list[str]
    predictions: list[str | None]
    worth: dict[str, list[float]]
    losses: list[tuple[float, int]]


def measure(opened: Opened, rows: RowSet, metrics: Sequence[str], how: How, tick: Callable[[int], object] = int) -> Said:
    """Puts every row to the model, once for its answer and once for its loss, as the metrics need it.

    Args:
        tick: told the number of rows done; len(rows.examples) in all for each of the two.

    Raises:
        DataError: the prompt style cannot hold a row, or the set has no such metric.
    """
    said: list[str] = [""] * len(rows.examples)
    predictions: list[str | None] = [None] * len(rows.examples)
    losses: list[tuple[float, int]] = []
    if "accuracy" in metrics and rows.task is None:
        raise DataError(
            f"--metrics=accuracy: {rows.name} holds rows without a commonsense task's answer. Leave accuracy out, or give --dataset"
        )
    if any(metric != "perplexity" for metric in metrics):
        if how.scoring == "loglikelihood" and rows.task:
            predictions = _likeliest(opened, rows, how.batch_size, tick)
        else:
            asked = opened.prompt_ids(rows.examples, how.sampling.max_new_tokens)
            ids = generate.complete(opened.model, asked, how.sampling, opened.end_ids(), batch_size=how.batch_size, tick=tick)
            said = [opened.decode(one) for one in ids]
            predictions = [answers.first_match(text, rows.task) if rows.task else text.strip() for text in said]
    if "perplexity" in metrics:
        encoded = opened.encoder.encode([_rendered(opened, example) for example in rows.examples])
        losses = likelihood.trained_loss(opened.model, encoded, batch_size=min(8, how.batch_size), tick=tick)
    return Said(said, predictions, _worth(rows, metrics, said, predictions), losses)


def _likeliest(opened: Opened, rows: RowSet, batch_size: int, tick: Callable[[int], object]) -> list[str | None]:
    """The offered answer that the model gives the greatest probability."""
    offered, candidates = [], []
    for example in rows.examples:
        instruction, said = str(example.columns["instruction"]), example.turns[-1].text
        right = str(example.columns["answer"])
        choices = answers.options(instruction, rows.task or "")
        if right not in choices or said.count(right) != 1:
            raise DataError(
                f"{example.where}: --scoring=loglikelihood needs `Answer format: a/b/c` in the instruction with {right!r} among it, and "
                f"{right!r} once in the output. Use --scoring=generate"
            )
        offered.append(choices)
        candidates.append(opened.answered_ids(example, [said.replace(right, choice) for choice in choices]))
    jobs = likelihood.wanted(candidates)
    is_one_a_row = len(jobs) == len(rows.examples)
    by_row = likelihood.answer_scores(opened.model, jobs, batch_size=batch_size, tick=tick if is_one_a_row else int)
    tick(0 if is_one_a_row else len(rows.examples))
    return [choices[max(range(len(choices)), key=by_row[row].__getitem__)] for row, choices in enumerate(offered)]


def _rendered(opened: Opened, example: Example) -> Any:
    rendered = opened.prompts.render(example)
    if not hasattr(rendered, "text"):
        raise DataError(f"{example.where}: {rendered.reason}")
    return rendered


def _worth(rows: RowSet, metrics: Sequence[str], said: list[str], predictions: list[str | None]) -> dict[str, list[float]]:
    worth: dict[str, list[float]] = {}
    references = [example.turns[-1].text if example.turns else "" for example in rows.examples]
    if "accuracy" in metrics:
        right = [str(example.columns["answer"]) for example in rows.examples]
        worth["accuracy"] = [float(answer == predicted) for answer, predicted in zip(right, predictions, strict=True)]
    if "exact_match" in metrics:
        worth["exact_match"] = [float(texts.exact_match(one, right)) for one, right in zip(said, references, strict=True)]
    if "rougeL" in metrics:
        worth["rougeL"] = [100 * value for value in texts.rouge_l(said, references)]
    if "sari" in metrics:
        sources = [example.turns[-2].text if len(example.turns) > 1 else "" for example in rows.examples]
        worth["sari"] = [texts.sari(asked, one, [right]) for asked, one, right in zip(sources, said, references, strict=True)]
    return worth


def scores(rows: RowSet, said: Said) -> dict[str, dict[str, Any]]:
    """By metric its value with the 95 % interval (Wilson for shares, normal for means), and what belongs to it."""
    found: dict[str, dict[str, Any]] = {}
    for metric, values in said.worth.items():
        if metric in SHARES:
            low, high = intervals.wilson(round(sum(values)), len(values))
            found[metric] = {"value": sum(values) / len(values), "low": low, "high": high}
        else:
            found[metric] = dict(zip(("value", "low", "high"), intervals.mean(values), strict=True))
    if "accuracy" in found:
        right = [str(example.columns["answer"]) for example in rows.examples]
        tasks = [str(example.columns["task"]) for example in rows.examples]
        counted = answers.score(tasks, right, said.predictions)
        found["accuracy"] |= {"correct": counted.correct, "formed": counted.formed, "commonest": counted.majority, "rows": counted.total}
    if said.losses:
        nats = sum(loss for loss, _ in said.losses) / max(1, sum(count for _, count in said.losses))
        found["perplexity"] = {"value": math.exp(min(nats, 700.0)), "nats_per_token": nats}
    return found


def differences(said: Said, base: Said) -> dict[str, dict[str, float]]:
    """By metric the gain over `base` on the same rows with its 95 % interval: Newcombe's for shares, else of the mean difference."""
    found = {}
    for metric, values in said.worth.items():
        if metric in SHARES:
            gain = intervals.paired_difference([bool(v) for v in values], [bool(v) for v in base.worth[metric]])
        else:
            gain = intervals.mean([one - other for one, other in zip(values, base.worth[metric], strict=True)])
        found[metric] = dict(zip(("value", "low", "high"), gain, strict=True))
    return found


def scored(sets: Sequence[RowSet], sides: Mapping[str, Sequence[Said]]) -> dict[str, Any]:
    """By set its rows, the scores of each side, and with two sides the gain of `trained`; several sets also together, as `all`."""
    named, every = list(sets), {side: list(said) for side, said in sides.items()}
    if len(sets) > 1:
        pooled = {side: joined(sets, said) for side, said in sides.items()}
        if all(said.worth for _, said in pooled.values()):
            named.append(next(iter(pooled.values()))[0])
            for side, (_, said) in pooled.items():
                every[side].append(said)
    found = {}
    for place, rows in enumerate(named):
        one: dict[str, Any] = {"rows": len(rows.examples), "scores": {side: scores(rows, said[place]) for side, said in every.items()}}
        if len(every) > 1:
            one["gain"] = differences(every["trained"][place], every["base"][place])
        found[rows.name] = one
    return found


def by_row(sets: Sequence[RowSet], sides: Mapping[str, Sequence[Said]]) -> list[dict[str, Any]]:
    """A record of each row: its set, place and reference, and of each side the text, the prediction and the worth."""
    rows = []
    for place, one in enumerate(sets):
        for number, example in enumerate(one.examples):
            reference = str(example.columns["answer"]) if one.task else example.turns[-1].text if example.turns else ""
            row: dict[str, Any] = {"set": one.name, "where": example.where, "reference": reference}
            for side, said in sides.items():
                worth = {metric: values[number] for metric, values in said[place].worth.items()}
                row[side] = {"text": said[place].texts[number], "prediction": said[place].predictions[number], **worth}
            rows.append(row)
    return rows


def joined(sets: Sequence[RowSet], said: Sequence[Said]) -> tuple[RowSet, Said]:
    """All rows of several sets as one, for the metrics that all of them have."""
    shared = [metric for metric in said[0].worth if all(metric in one.worth for one in said)]
    rows = RowSet("all", sets[0].task, tuple(example for one in sets for example in one.examples))
    return rows, Said(
        [text for one in said for text in one.texts],
        [prediction for one in said for prediction in one.predictions],
        {metric: [value for one in said for value in one.worth[metric]] for metric in shared},
        [loss for one in said for loss in one.losses] if all(one.losses for one in said) else [],
    )
