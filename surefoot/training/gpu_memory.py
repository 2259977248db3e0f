"""The GPU's memory before and after training, as its allocator reserved it: what a larger batch or a smaller card must fit."""

from __future__ import annotations

import torch


def reserved_gib() -> float | None:
    """The peak of reserved memory so far, None without a GPU. What is reserved includes the allocator's unused blocks."""
    return torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None


def report(before_gib: float | None, total_gib: float | None) -> dict[str, float] | None:
    """GiB reserved before training, at the peak, and for training, with their share of the card; None without a GPU."""
    peak = reserved_gib()
    if before_gib is None or total_gib is None or peak is None:
        return None
    return {
        "total_gib": round(total_gib, 3),
        "reserved_before_gib": round(before_gib, 3),
        "peak_reserved_gib": round(peak, 3),
        "for_training_gib": round(peak - before_gib, 3),
        "peak_percent": round(100 * peak / total_gib, 1),
        "for_training_percent": round(100 * (peak - before_gib) / total_gib, 1),
    }


def line(found: dict[str, float] | None) -> str:
    """The report as a line, empty without one."""
    if found is None:
        return ""
    f = found
    return (
        f"GPU memory: {f['reserved_before_gib']:.1f} GiB reserved before training, {f['peak_reserved_gib']:.1f} at the peak "
        f"({f['peak_percent']:.1f} % of {f['total_gib']:.1f}), {f['for_training_gib']:.1f} of it for training "
        f"({f['for_training_percent']:.1f} %)\n"
    )
