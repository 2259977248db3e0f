"""Scores read off the model's probabilities, without generating: the likeliest answer of each row, and the loss of its trained tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Ids = Sequence[int]
POSITIONS = 16_384  # whose logits exist at once: 4 GB in 16 bits with a vocabulary of 128k


class Wanted(NamedTuple):
    """One row to read, and of which of its tokens the probability is wanted: (place in ids or just behind them, token, whose score)."""

    ids: tuple[int, ...]
    tokens: tuple[tuple[int, int, tuple[int, int]], ...]

    @property
    def first(self) -> int:
        """The first position whose logits are needed."""
        return self.tokens[0][0] - 1


def wanted(rows: Sequence[Sequence[Ids]]) -> list[Wanted]:
    """What answer_scores() must read. Candidates that differ in their last token only (answer1, answer2) share one forward row.

    Args:
        rows: of each row its candidates, each the tokens of the whole text up to the end of the answer (no EOS).
    """
    found: list[Wanted] = []
    for row, candidates in enumerate(rows):
        start = _common(candidates)
        shared: dict[tuple[int, ...], list[tuple[int, int, tuple[int, int]]]] = {}
        for number, candidate in enumerate(candidates):
            tokens = [(place, int(candidate[place]), (row, number)) for place in range(start, len(candidate))]
            shared.setdefault(tuple(int(token) for token in candidate[:-1]), []).extend(tokens)
        found += [Wanted(ids, tuple(tokens)) for ids, tokens in shared.items()]
    return found


def answer_scores(
    model: Any, jobs: Sequence[Wanted], *, batch_size: int = 64, tick: Callable[[int], object] = int
) -> dict[int, list[float]]:
    """By row the log P of each candidate, summed over the tokens in which the row's candidates differ; no length normalisation.

    Args:
        jobs: of wanted(), from any rows. tick: told the number of jobs done after each batch.
    """
    scores: dict[tuple[int, int], float] = {}
    for batch in batches(jobs, batch_size):
        values = _log_probabilities(model, batch)
        for (_, _, whose), value in zip((token for job in batch for token in job.tokens), values, strict=True):
            scores[whose] = scores.get(whose, 0.0) + value
        tick(len(batch))
    by_row: dict[int, list[float]] = {}
    for (row, _), value in sorted(scores.items()):
        by_row.setdefault(row, []).append(value)
    return by_row


def trained_loss(model: Any, rows: Sequence[Any], *, batch_size: int = 8, tick: Callable[[int], object] = int) -> list[tuple[float, int]]:
    """Of each row the summed loss of its trained tokens in nats, and their number.

    Args:
        rows: each with `ids` and `trained`, as the Encoder gives them.
    """
    jobs = []
    for number, row in enumerate(rows):
        places = [place for place in range(1, len(row.ids)) if row.trained[place]]
        jobs.append(Wanted(tuple(map(int, row.ids[:-1])), tuple((place, int(row.ids[place]), (number, 0)) for place in places)))
    sums = answer_scores(model, [job for job in jobs if job.tokens], batch_size=batch_size, tick=tick)
    return [(-sums[number][0] if number in sums else 0.0, len(job.tokens)) for number, job in enumerate(jobs)]


def batches(jobs: Sequence[Wanted], size: int) -> Iterator[list[Wanted]]:
    """At most `size` jobs at a time, of like length and the longest first, with at most POSITIONS rows of logits."""
    batch: list[Wanted] = []
    first = 0
    for job in sorted(jobs, key=lambda job: -len(job.ids)):
        first = min(first, job.first) if batch else job.first
        width = len(batch[0].ids) if batch else len(job.ids)
        if batch and (len(batch) == size or (len(batch) + 1) * (width - first) > POSITIONS):
            yield batch
            batch, first = [], job.first
        batch.append(job)
    if batch:
        yield batch


@torch.no_grad()
def _log_probabilities(model: Any, batch: Sequence[Wanted]) -> list[float]:
    """Padded on the right and without a mask, as in training: under causal attention no token sees what is to its right."""
    width = max(len(job.ids) for job in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    for row, job in enumerate(batch):
        ids[row, : len(job.ids)] = torch.tensor(job.ids)
    places = torch.tensor([(row, place - 1, token) for row, job in enumerate(batch) for place, token, _ in job.tokens]).to(model.device)
    first = min(job.first for job in batch)
    keep = torch.arange(first, width, device=model.device)
    logits = model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=keep).logits
    rows: Tensor = logits[places[:, 0], places[:, 1] - first].float()
    values: list[float] = rows.log_softmax(dim=-1).gather(1, places[:, 2:]).squeeze(1).tolist()
    return values


def _common(candidates: Sequence[Ids]) -> int:
    """How many leading tokens all candidates share, of each at least one token left."""
    shortest = min(map(len, candidates))
    same = next((place for place in range(shortest) if len({int(one[place]) for one in candidates}) > 1), shortest)
    return max(1, min(same, shortest - 1))
