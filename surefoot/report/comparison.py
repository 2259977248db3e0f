"""Several runs laid over each other, as text and as a page: what differs between them, what came of them, and their curves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surefoot.report import parts
from surefoot.report.records import Run

HEADS = ("run", "status", "steps", "train loss", "eval loss", "tokens/s", "peak GiB", "time")


def named_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs, those of one name with the part of their folders that tells them apart."""
    names = [run.name for run in runs]
    folders = [str(run.folder.resolve()) for run in runs]
    common = os.path.commonpath(folders) if len(set(folders)) > 1 else ""
    apart = [str(Path(folder).relative_to(common)) if common else folder for folder in folders]
    return [run._replace(name=other if names.count(run.name) > 1 else run.name) for run, other in zip(runs, apart, strict=True)]


def outcomes(runs: Sequence[Run]) -> list[list[str]]:
    """A line for each run, under HEADS."""
    return [_outcome(run) for run in runs]


def _outcome(run: Run) -> list[str]:
    s = run.summary
    rate = s["tokens"] / s["seconds"] if s.get("seconds") else None
    figures = [s.get("steps"), s.get("train_loss"), s.get("eval_loss"), rate, s.get("peak_memory_gib")]
    return [run.name, str(run.record.get("status", "unknown")), *map(parts.plain, figures), parts.minutes(run) or "-"]


def differing(runs: Sequence[Run]) -> list[list[Any]]:
    """Plan values that are not the same in all runs: name, then a value for each run. Folders and names of runs differ always."""
    names = dict.fromkeys(choice["name"] for run in runs for choice in run.choices)
    rows = [[name, *(run.choice(name) for run in runs)] for name in names if name not in ("output_dir", "run_name", "config")]
    return [row for row in rows if any(value != row[1] for value in row[2:])]


def page(runs: Sequence[Run]) -> str:
    """The runs as one page."""
    names = [run.name for run in runs]
    metrics = dict.fromkeys((name, metric) for run in runs for name, one in _sets(run).items() for metric in _trained(one))
    scores = [[*key, *(parts.plain(_trained(_sets(run).get(key[0], {})).get(key[1], {}).get("value")) for run in runs)] for key in metrics]
    return parts.page(
        f"{len(runs)} runs",
        parts.table(HEADS, [[row[0], parts.status(run), *row[2:]] for row, run in zip(outcomes(runs), runs, strict=True)]),
        parts.section("Curves", parts.curves(runs)),
        parts.section("What differs", parts.table(("choice", *names), differing(runs)) or "<p>No choice of their plans.</p>"),
        parts.section("Evaluation", parts.table(("set", "metric", *names), scores)),
    )


def _sets(run: Run) -> dict[str, Any]:
    return run.evaluation.get("sets") or {}


def _trained(one: dict[str, Any]) -> dict[str, Any]:
    scores = one.get("scores") or {}
    return scores.get("trained") or next(iter(scores.values()), {})
