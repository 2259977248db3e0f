"""read(): what a run folder holds, as plain values; everything but run.json may be missing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from surefoot.errors import UsageError
from surefoot.json_file import read_json


class Run(NamedTuple):
    """run.json, the log lines of metrics.jsonl, evaluation.json, and the rows of evaluation.jsonl (answers before and after)."""

    name: str
    folder: Path
    record: dict[str, Any]
    log: list[dict[str, Any]]
    evaluation: dict[str, Any]
    answers: list[dict[str, Any]]

    def curve(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of each log line that has the key; values that were not finite are nan."""
        return [(entry["step"], number(entry[key])) for entry in self.log if key in entry]

    @property
    def summary(self) -> dict[str, Any]:
        return self.record.get("summary") or {}

    @property
    def choices(self) -> list[dict[str, Any]]:
        return list(self.record.get("plan", {}).get("choices", []))

    def choice(self, name: str) -> Any:
        """The plan's value of a flag, None where it has none."""
        return next((choice["value"] for choice in self.choices if choice["name"] == name), None)


def number(value: Any) -> float:
    """A log's value; `nan` and `inf` stand there as text."""
    found = float(value)
    return found if math.isfinite(found) else math.nan


def read(folder: Path) -> Run:
    """The run in `folder`.

    Raises:
        UsageError: it holds no run.json, or a file that is not what finetune.py or evaluate.py writes.
    """
    record = read_json(folder / "run.json")
    if not record:
        raise UsageError(f"{folder} holds no run.json: it is no run folder of finetune.py")
    log = [entry for entry in _lines(folder / "metrics.jsonl") if "step" in entry]
    name = record.get("plan", {}).get("train", {}).get("run_name") or folder.resolve().name
    return Run(str(name), folder, record, log, read_json(folder / "evaluation.json"), _lines(folder / "evaluation.jsonl"))


def _lines(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines, empty where there is none; a last line that a killed run left half is left out."""
    if not path.is_file():
        return []
    found = []
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    for place, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if place < len(lines):
                raise UsageError(f"{path}:{place} is damaged ({error})") from None
    return [line for line in found if isinstance(line, dict)]
