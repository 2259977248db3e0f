"""A line every 10 seconds over work that takes longer."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
PATIENCE_S = 10.0


def told(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """`items`; after 10 s and every 10 s then, a line on stderr says how many of `total` are done."""
    last = time.monotonic()
    for done, item in enumerate(items, start=1):
        if time.monotonic() - last > PATIENCE_S:
            last = time.monotonic()
            print(f"{what}: {done:,} of {total:,}", file=sys.stderr, flush=True)
        yield item
