"""ThreeSplits: lines as they come to train.jsonl, val.jsonl and test.jsonl of exact shares, in 8 bytes of memory a line."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from surefoot.data.stage import SPLITS

KEPT_BYTES = 8  # of each line's hash


class ThreeSplits:
    """Lines go to one file beside the splits until close() knows how many there are.

    A line's side follows from its hash under the seed: the lowest hashes train, the next validate, the highest test. So equal lines stand
    on one side, the lines keep their order, and rows added later move only those at the borders.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.key = folder, str(seed).encode()
        folder.mkdir(parents=True, exist_ok=True)
        self.hashes = bytearray()
        self.path = folder / ".lines.part"
        self.file: BinaryIO = self.path.open("wb")

    def add(self, line: bytes) -> None:
        """A line with its line break."""
        self.hashes += hashlib.blake2b(line, digest_size=KEPT_BYTES, key=self.key).digest()
        self.file.write(line)

    def close(self, shares: Sequence[float]) -> dict[str, int]:
        """Writes the splits, removes those of an earlier call, and returns the lines of each.

        Args:
            shares: of train, val and test, which sum to 1; what is not 0 gets at least a line where there are three.
        """
        self.file.close()
        sides = _sides(np.frombuffer(self.hashes, dtype=">u8").astype(np.uint64), shares)
        counts = dict(zip(SPLITS, np.bincount(sides, minlength=3).tolist(), strict=True))
        parts = [self.folder / f".{name}.part" for name in SPLITS]
        files = [path.open("wb") for path in parts]
        with self.path.open("rb") as lines:
            for line, side in zip(lines, sides.tolist(), strict=True):
                files[side].write(line)
        for name, file, part in zip(SPLITS, files, parts, strict=True):
            file.close()
            final = self.folder / f"{name}.jsonl"
            final.unlink(missing_ok=True)
            os.replace(part, final) if counts[name] else part.unlink()
        self.discard()
        return counts

    def discard(self) -> None:
        """Removes what is not a split."""
        self.file.close()
        self.path.unlink(missing_ok=True)


def _sides(hashes: NDArray[np.uint64], shares: Sequence[float]) -> NDArray[np.int64]:
    """0, 1 or 2 for each hash."""
    count = len(hashes)
    held = [max(round(share * count), 1 if share and count > 2 else 0) for share in shares[1:]]
    first = count - sum(held)
    # the first hash of val and of test; past the last one, none is there
    edges = [np.sort(hashes)[border] if border < count else None for border in (first, first + held[0])]
    sides = np.zeros(count, dtype=np.int64)
    for edge in edges:
        sides += 0 if edge is None else (hashes >= edge).astype(np.int64)
    return sides
