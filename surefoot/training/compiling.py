"""What torch.compile took of a run, by torch's own account."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch._dynamo.utils import calculate_time_spent, counters


class Compiling(NamedTuple):
    """Seconds spent compiling, forward and backward, and how many graphs were made."""

    seconds: float
    graphs: int


def so_far() -> Compiling:
    """Of this process; a second run in it counts from where the first ended."""
    return Compiling(calculate_time_spent()["total_wall_time"], counters["stats"]["unique_graphs"])


def since(before: Compiling) -> dict[str, Any] | None:
    """For run.json: seconds and graphs since `before`, None where nothing was compiled."""
    now = so_far()
    graphs = now.graphs - before.graphs
    return {"seconds": round(now.seconds - before.seconds, 2), "graphs": graphs} if graphs else None


def line(found: dict[str, Any] | None) -> str:
    """A line for the terminal, empty where nothing was compiled."""
    return "" if found is None else f"torch.compile: {found['seconds']:.1f} s for {found['graphs']} graphs\n"
