"""Rows: the tokenised data set in flat arrays; Collator: a batch of it as tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from surefoot.data.masking import Encoded

IGNORED = -100  # torch's cross_entropy and transformers' losses leave this label out


class Places(NamedTuple):
    """Where rows stand: row i in line line[i] of files[file[i]], both int32."""

    files: tuple[str, ...]
    file: NDArray[np.int32]
    line: NDArray[np.int32]

    def where(self, index: int) -> str:
        """As `file:line`."""
        return f"{self.files[self.file[index]]}:{self.line[index]}"

    def take(self, indices: NDArray[np.int64]) -> Places:
        return Places(self.files, self.file[indices], self.line[indices])


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Row i has the tokens ids[offsets[i]:offsets[i + 1]] (int32) and of them those `trained` (bool): 5 bytes a token."""

    def __init__(self, offsets: NDArray[np.int64], ids: NDArray[np.int32], trained: NDArray[np.bool_], places: Places) -> None:
        self.offsets, self.ids, self.trained, self.places = offsets, ids, trained, places

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = index % len(self)
        start, end = self.offsets[row], self.offsets[row + 1]
        ids = self.ids[start:end]
        return {"input_ids": ids, "labels": np.where(self.trained[start:end], ids, np.int32(IGNORED)), "row": row}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [int(length) for length in np.diff(self.offsets)]

    @property
    def trained_tokens(self) -> NDArray[np.int32]:
        """Trained tokens of each row."""
        before = np.concatenate([[0], np.cumsum(self.trained, dtype=np.int64)])
        return np.diff(before[self.offsets]).astype(np.int32)

    def where(self, index: int) -> str:
        """The place of row `index` in its file, as `file:line`; a Hub data set counts as a file by its name."""
        return self.places.where(index)

    def digest(self) -> str:
        """SHA-256 of tokens, mask and row borders."""
        digest = hashlib.sha256()
        for array in (self.offsets, self.ids, self.trained):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def flat(rows: Sequence[Encoded], places: Places) -> Rows:
    """The encoded rows, which stand at `places`, in flat arrays."""
    lengths = [len(row.ids) for row in rows]
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    ids = np.concatenate([row.ids for row in rows]) if rows else np.zeros(0, dtype=np.int32)
    trained = np.concatenate([row.trained for row in rows]) if rows else np.zeros(0, dtype=np.bool_)
    return Rows(offsets, ids, trained, places)


@dataclass(frozen=True, kw_only=True)
class Collator:
    """A list of rows as int64 tensors: input_ids and labels (rows x width, padded on the right), and of each row its length and its index.

    There is no attention_mask: under causal attention no token sees the padding to its right, and the padding's own labels are -100.
    Attention kernels take their causal path without one, and some give NaN gradients when they are passed a mask (pytorch#196678).
    Padding is known from the lengths and never from ids, so a PAD equal to EOS hides no EOS from the loss.
    """

    pad_token_id: int
    multiple_of: int = 8

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        width = -(-max(lengths) // self.multiple_of) * self.multiple_of
        input_ids = torch.full((len(rows), width), self.pad_token_id, dtype=torch.int64)
        labels = torch.full((len(rows), width), IGNORED, dtype=torch.int64)
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            input_ids[index, :length] = torch.from_numpy(np.array(row["input_ids"], dtype=np.int64))
            labels[index, :length] = torch.from_numpy(np.array(row["labels"], dtype=np.int64))
        return {
            "input_ids": input_ids,
            "labels": labels,
            "lengths": torch.tensor(lengths, dtype=torch.int64),
            "rows": torch.tensor([row["row"] for row in rows], dtype=torch.int64),
        }
