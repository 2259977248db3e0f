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
