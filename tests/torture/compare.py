"""Two runs of one command: what a user could tell them apart by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

TIMING = {"time", "tokens_per_s", "peak_memory_gib", "seconds_left", "mfu"}
SAME = ("steps", "train_loss", "tokens", "eval_loss", "bad_steps", "loss_spikes", "still_tensors", "health")


def differences(calm: Path, tortured: Path) -> list[str]:
    """Empty where loss trace, order of rows, summary and adapter are bitwise equal."""
    if not (tortured / "run/adapter_model.safetensors").exists():
        return ["no adapter was saved"]
    found = []
    one, other = (_metrics(folder / "run/metrics.jsonl") for folder in (calm, tortured))
    if one != other:
        found.append(f"metrics.jsonl: {next(pair for pair in zip([*one, None], [*other, None], strict=False) if pair[0] != pair[1])}")
    for rank in range(len(list(calm.glob("rows-of-rank-*")))):
        expected, taken = (_rows(folder / f"rows-of-rank-{rank}.jsonl") for folder in (calm, tortured))
        wrong = [step for step in expected.keys() | taken.keys() if not _replays(expected.get(step), taken.get(step))]
        if wrong:
            found.append(f"rank {rank} met other rows at steps {sorted(wrong)}")
    one, other = (_summary(folder / "run/run.json") for folder in (calm, tortured))
    found += [f"summary: {name} is {other[name]}, not {one[name]}" for name in SAME if one.get(name) != other.get(name)]
    one, other = (load_file(folder / "run/adapter_model.safetensors") for folder in (calm, tortured))
    found += [f"tensor {name}" for name in one if not torch.equal(one[name], other[name])][:1]
    left = [path.name for path in (tortured / "run").iterdir() if path.suffix in (".partial", ".replaced")]
    return found + [f"{left} is left behind"] * bool(left)


def reached(folder: Path) -> int:
    """Steps begun by a killed run, as its rows tell."""
    lines = (folder / "rows-of-rank-0.jsonl").read_text().splitlines() if (folder / "rows-of-rank-0.jsonl").exists() else []
    return int(json.loads(lines[-1])[0]) if lines else 0


def resumed_at(run: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(path.name[11:]) for path in run.glob("checkpoint-*") if path.name[11:].isdigit()), default=0)


def _metrics(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in TIMING and not name.endswith(("_runtime", "_per_second", "_flos"))}
        for line in lines
    ]


def _rows(path: Path) -> dict[int, list[list[int]]]:
    """Of each step the rows of its micro-batches, replays one after another."""
    steps: dict[int, list[list[int]]] = {}
    for line in path.read_text().splitlines():
        step, rows = json.loads(line)
        steps.setdefault(step, []).append(rows)
    return steps


def _replays(expected: list[list[int]] | None, taken: list[list[int]] | None) -> bool:
    """`taken` is `expected`, perhaps several times, each but the last perhaps cut short by a kill."""
    if not expected or not taken:
        return expected == taken
    while taken:
        length = next(
            (n for n in range(1, len(expected) + 1) if taken[n : n + 1] == expected[:1] and expected[:n] == taken[:n]), len(expected)
        )
        if taken[:length] != expected[: len(taken[:length])]:
            return False
        taken = taken[length:]
    return True


def _summary(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())["summary"]
    return found
