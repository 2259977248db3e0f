"""The order of the rows: a pure function of seed and epoch, the same on every rank and after every restart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices


class Order(torch.utils.data.Sampler[int]):
    """Set `epoch`, then iterate. Each epoch's order is drawn anew from seed + epoch; with `lengths`, rows of like length lie together.

    The samplers that transformers and accelerate bring lose the epoch on a resume under several processes, or draw from the global
    generator, which dropout moves on differently in each process.

    Args:
        lengths: tokens of each row where rows are to be grouped by length, else None.
        batch_size: rows of an optimizer step, over all processes.
    """

    def __init__(self, count: int, seed: int, lengths: Sequence[int] | None = None, batch_size: int = 1) -> None:
        self.count, self.seed, self.lengths, self.batch_size = count, seed, lengths, batch_size
        self.epoch = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(self.of(self.epoch))

    def of(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        if self.lengths is None:
            return list(torch.randperm(self.count, generator=generator).tolist())
        return list(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))  # type: ignore[no-untyped-call]

    def cursor(self, step: int, steps_an_epoch: int, rows_a_step: int) -> dict[str, Any]:
        """Where a run stands after `step`: the epoch, the rows of it that all processes together have taken, and that epoch's order."""
        epoch, passed = divmod(step, steps_an_epoch)
        order = np.asarray(self.of(epoch), dtype=np.int64)
        return {"epoch": epoch, "rows": passed * rows_a_step, "order": hashlib.sha256(order.tobytes()).hexdigest()}
