"""The processes of a run must be of one mind before the first step: same rows, settings and versions."""

from __future__ import annotations

import dataclasses
from typing import Any

from accelerate.utils import gather_object

from surefoot.errors import PlanError
from surefoot.plan import Plan

OWN = ("train.run_name", "data.cache_dir", "model.path", "model.loads_on_gpu")  # what a node may have to itself


def check(plan: Plan, fingerprint: str) -> None:
    """Raises PlanError, on every rank, when one of them has other rows (by their fingerprint), settings or package versions."""
    if plan.machine.world_size == 1:
        return
    found = difference(gather_object([_facts(plan, fingerprint)]))
    if found is not None:
        raise PlanError(f"the processes do not train the same: {found}. Give every node the same data, flags and packages", is_shared=True)


def difference(facts: list[dict[str, Any]]) -> str | None:
    """What the first rank that differs from rank 0 has otherwise."""
    for rank, other in enumerate(facts):
        names = [name for name in {**facts[0], **other} if name != "host" and facts[0].get(name) != other.get(name)]
        if names:
            told = "; ".join(f"{name} is {other.get(name)}, on rank 0 {facts[0].get(name)}" for name in names[:3])
            return f"on rank {rank} ({other['host']}) {told}"
    return None


def _facts(plan: Plan, fingerprint: str) -> dict[str, Any]:
    parts: dict[str, Any] = {"train": plan.train, "adapter": plan.adapter, "data": plan.data, "model": plan.model}
    settings = {f"{part}.{name}": value for part, values in parts.items() for name, value in dataclasses.asdict(values).items()}
    same = {name: value for name, value in settings.items() if name not in OWN}
    return {"host": plan.machine.hostname, "rows": fingerprint[:12], "python": plan.machine.python, **same, **plan.machine.versions}
