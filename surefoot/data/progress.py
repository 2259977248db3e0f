"""A sign of life over work that takes longer than 10 seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
PATIENCE_S = 10.0


def batches(items: Sequence[T], size: int, *, shows_progress: bool) -> Iterator[Sequence[T]]:
    """`items` in slices of `size`; after 10 s a progress bar on a terminal, elsewhere a plain line every 10 s."""
    from tqdm import tqdm

    is_terminal = sys.stderr.isatty()
    last = time.monotonic()
    with tqdm(total=len(items), desc="tokenising", unit=" rows", delay=PATIENCE_S, disable=not (shows_progress and is_terminal)) as bar:
        for start in range(0, len(items), size):
            batch = items[start : start + size]
            yield batch
            bar.update(len(batch))
            if shows_progress and not is_terminal and time.monotonic() - last > PATIENCE_S:
                last = time.monotonic()
                print(f"tokenised {start + len(batch):,} of {len(items):,} rows", flush=True)


class Progress:
    """The same for a stream of `size` bytes: tell it how far it is with at()."""

    def __init__(self, size: int, doing: str) -> None:
        from tqdm import tqdm

        self.size, self.doing, self.is_terminal, self.last = size, doing, sys.stderr.isatty(), time.monotonic()
        self.bar = tqdm(total=size, desc=doing, unit="B", unit_scale=True, delay=PATIENCE_S, disable=not self.is_terminal)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def at(self, position: int) -> None:
        """The bytes done so far."""
        self.bar.update(position - self.bar.n)
        if not self.is_terminal and time.monotonic() - self.last > PATIENCE_S:
            self.last = time.monotonic()
            print(f"{self.doing}: {position / 1e6:,.0f} of {self.size / 1e6:,.0f} MB", flush=True)
