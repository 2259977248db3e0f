"""Packing: whole rows laid end to end in packed rows of one length. Which rows lie together is fixed once a run."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from surefoot.data.pipeline import Data
from surefoot.data.report import percent
from surefoot.data.rows import IGNORED, Collator, Rows

if TYPE_CHECKING:
    from surefoot.plan import Plan

FILLED = 0.98  # of the slots, as best fit leaves them: what the length of a packed row is reckoned with
MULTIPLE = 64  # slots: the tiles of the GEMMs and of the attention kernels
SHORT = 0.6  # of cutoff_len: packing=auto packs rows that are at most this long in the mean


class Recipe(NamedTuple):
    """Slots of a packed row, and passes (packed rows a process) of an optimizer step."""

    slots: int
    passes: int


def recipe(lengths: NDArray[np.int64], batch_size: int, processes: int, budget: int, pack_len: int | None) -> Recipe:
    """The recipe under which a step holds batch_size rows in the mean.

    Args:
        lengths: tokens of each row.
        batch_size: rows of an optimizer step, over all processes.
        budget: slots a forward pass may have.
        pack_len: slots of a packed row; None: as few passes as the budget allows.
    """
    wanted = batch_size / processes * float(lengths.mean()) / FILLED
    if pack_len is not None:
        return Recipe(pack_len, max(1, round(wanted / pack_len)))
    slots = max(wanted / math.ceil(wanted / budget), float(lengths.max()))
    slots = math.ceil(slots / MULTIPLE) * MULTIPLE
    return Recipe(slots, max(1, round(wanted / slots)))


def best_fit(lengths: NDArray[np.int64], slots: int, seed: int, multiple: int = 1) -> list[NDArray[np.int64]]:
    """The rows of each packed row. Rows come in a random order, and each goes where it leaves the least room; a pure function.

    Args:
        lengths: tokens of each row, none over `slots`.
        multiple: of which the number of packed rows is one, as far as splitting can make it so (processes get equally many).
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    shortest, made = int(lengths.min()), 0
    room: list[int] = []  # of the packed rows that another row may fit into, ascending: slots left << 32 | number
    places = np.empty(len(lengths), dtype=np.int64)
    for visit, length in enumerate(lengths[order].tolist()):
        at = bisect_left(room, length << 32)
        left, number = divmod(room.pop(at), 1 << 32) if at < len(room) else (slots, made)
        made = max(made, number + 1)
        places[visit] = number
        if left - length >= shortest:
            insort(room, (left - length) << 32 | number)
    by_place = np.argsort(places, kind="stable")
    borders = np.flatnonzero(np.diff(places[by_place])) + 1
    return _divisible(np.split(order[by_place], borders), multiple)


def _divisible(packed: list[NDArray[np.int64]], multiple: int) -> list[NDArray[np.int64]]:
    """Splits packed rows of the most rows in two until `multiple` divides their number."""
    while len(packed) % multiple and max(map(len, packed)) > 1:
        most = max(range(len(packed)), key=lambda index: len(packed[index]))
        half = len(packed[most]) // 2
        packed.append(packed[most][half:])
        packed[most] = packed[most][:half]
    return packed


class PackedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Item i is {"packed": the rows of packed row i}; `slots` is its length, `longest` the tokens of the longest row."""

    def __init__(self, rows: Rows, packed: Sequence[NDArray[np.int64]], slots: int) -> None:
        self.rows, self.packed, self.slots = rows, packed, slots
        self.longest = int(np.diff(rows.offsets).max())

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"packed": [self.rows[int(row)] for row in self.packed[index]]}

    def where(self, row: int) -> str:
        """The place of a row (not of a packed row) in its file, as `file:line`."""
        return self.rows.where(row)

    @property
    def segments(self) -> int:
        """The most stretches of a packed row: its rows, and its padding in pieces no longer than the longest row."""
        lengths = np.diff(self.rows.offsets)
        return max(len(rows) + -(-(self.slots - int(lengths[rows].sum())) // self.longest) for rows in self.packed)

    def digest(self) -> str:
        """SHA-256 of which rows lie together, in which order."""
        digest = hashlib.sha256(str(self.slots).encode())
        for rows in self.packed:
            digest.update(rows.tobytes() + b";")
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class PackedCollator:
    """A packed row as tensors of the run's one shape; rows that are not packed (those to evaluate on) go to `separate`.

    input_ids, labels and position_ids are int64 [1, slots]. Positions restart at each row, and the label of a row's first token is -100,
    since it would be predicted from the row before. Padding on the right is cut into stretches of its own.
    cu_seq_lens_q and cu_seq_lens_k, int32 [segments + 1], are where the stretches begin, and the last one's end as often as is left;
    max_length_q and max_length_k are ints. Those are the names of transformers' FlashAttentionKwargs. lengths and rows, int64, are each
    real row's tokens and index.
    There is no attention_mask: with one, or with a cache, transformers lets the rows of a packed row see each other.
    """

    separate: Collator
    slots: int
    longest: int
    segments: int

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if "packed" not in items[0]:
            return self.separate(items)
        (item,) = items
        rows = item["packed"]
        lengths = [len(row["input_ids"]) for row in rows]
        used = sum(lengths)
        pads = [min(self.longest, self.slots - start) for start in range(used, self.slots, self.longest)]
        stretches = np.array([*lengths, *pads])
        starts = np.concatenate([[0], np.cumsum(stretches)])
        input_ids = np.full(self.slots, self.separate.pad_token_id, dtype=np.int64)
        labels = np.full(self.slots, IGNORED, dtype=np.int64)
        input_ids[:used] = np.concatenate([row["input_ids"] for row in rows])
        labels[:used] = np.concatenate([row["labels"] for row in rows])
        labels[starts[:-1]] = IGNORED
        borders = np.full(self.segments + 1, self.slots, dtype=np.int32)
        borders[: len(starts)] = starts
        ends = torch.from_numpy(borders)
        return {
            "input_ids": torch.from_numpy(input_ids)[None],
            "labels": torch.from_numpy(labels)[None],
            "position_ids": torch.from_numpy(np.arange(self.slots) - np.repeat(starts[:-1], stretches))[None],
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends.clone(),
            "max_length_q": self.longest,
            "max_length_k": self.longest,
            "lengths": torch.tensor(lengths, dtype=torch.int64),
            "rows": torch.tensor([row["row"] for row in rows], dtype=torch.int64),
        }


def collator(data: Data, separate: Collator) -> Collator | PackedCollator:
    """`separate`, or where rows are packed what makes batches of both kinds."""
    packed = data.packed
    if packed is None:
        return separate
    return PackedCollator(separate=separate, slots=packed.slots, longest=packed.longest, segments=packed.segments)


def settle(plan: Plan, data: Data) -> tuple[Plan, Data]:
    """Packs the training rows where the plan says so, or allows it and they are short.

    Returns:
        The plan with packing on or off, and if on the length of a packed row and the passes it leads to; the data with packed rows.
        Their report says what was done and why, and its fingerprint then covers which rows lie together.
    """
    train = plan.train
    if train.packing == "off":
        return plan, data
    lengths = np.diff(data.train.offsets)
    share = float(lengths.mean()) / plan.data.cutoff_len
    if train.packing == "auto" and share > SHORT:
        line = f"packing: off, the mean row has {share:.0%} of cutoff_len={plan.data.cutoff_len} tokens, over {SHORT:.0%}"
        off = dataclasses.replace(train, packing="off", pack_len=None)
        return dataclasses.replace(plan, train=off), dataclasses.replace(data, report=data.report.noting(line))
    processes, budget = plan.machine.world_size, train.per_device_train_batch_size * plan.data.cutoff_len
    slots, passes = recipe(lengths, train.batch_size, processes, budget, train.pack_len)
    packed = PackedRows(data.train, best_fit(lengths, slots, train.seed, processes), slots)
    facts = _facts(packed, passes, processes)
    report = data.report.noting(_line(facts, train.batch_size))
    fingerprint = hashlib.sha256((report.fingerprint + packed.digest()).encode()).hexdigest()
    report = dataclasses.replace(report, packing=facts, fingerprint=fingerprint)
    on = dataclasses.replace(train, packing="on", pack_len=slots, per_device_train_batch_size=1, gradient_accumulation_steps=passes)
    return dataclasses.replace(plan, train=on), dataclasses.replace(data, packed=packed, report=report)


def _facts(packed: PackedRows, passes: int, processes: int) -> dict[str, Any]:
    rows, made = len(packed.rows), len(packed)
    a_step = min(passes * processes, made)
    return {
        "rows": rows,
        "packed_rows": made,
        "slots": packed.slots,
        "tokens": int(packed.rows.offsets[-1]),
        "passes": passes,
        "processes": processes,
        "rows_per_step": round(rows / made * a_step, 1),
        "packed_rows_of_last_step": made % a_step or a_step,
        "repeated": -made % processes,  # the sampler gives every process as many
    }


def _line(facts: dict[str, Any], batch_size: int) -> str:
    made, passes = facts["packed_rows"], facts["passes"]
    a_step, last = min(passes * facts["processes"], made), facts["packed_rows_of_last_step"]
    return (
        f"packing: {facts['rows']:,} rows in {made:,} packed rows of {facts['slots']:,} slots "
        f"({percent(facts['tokens'], made * facts['slots'])} filled, {facts['rows'] / made:.1f} rows each); "
        f"a step holds {facts['rows_per_step']:.0f} rows on average (batch_size={batch_size}), {passes} pass{'es' * (passes > 1)}"
        + (f"; the last step of an epoch takes {last} packed rows in place of {a_step}" if last != a_step else "")
        + (f"; {facts['repeated']} packed rows come twice in an epoch, for the processes to have as many" if facts["repeated"] else "")
    )
