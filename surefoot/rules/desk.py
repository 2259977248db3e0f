"""Desk: the papers on the table while the plan is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from surefoot.config import Config
from surefoot.detection import Answer
from surefoot.inputs import Inputs
from surefoot.machine import Machine
from surefoot.memory import Estimate
from surefoot.rules.speeds import SPEEDS, Speed
from surefoot.stages import STAGES, Stage
from surefoot.verdicts import Verdicts


class Choice(NamedTuple):
    """One effective value, where it came from (flag, file, stage, default, auto), and why."""

    name: str
    value: Any
    source: str
    reason: str


@dataclass(kw_only=True)
class Desk:
    """What the rules read, and what they write down: `problems` stop the plan, `notes` are printed with it.

    obstacle says why the backend asked for cannot run, where that only matters to --strict_backend. verdicts are the attention canary's.
    unsloth is what a trial of it said, None where nobody asked; speeds are the measured ones. estimate is of the run's memory, None where
    there is none.
    """

    config: Config
    machine: Machine
    inputs: Inputs
    problems: list[str]
    notes: list[str]
    obstacle: str | None = field(default=None)
    verdicts: Verdicts | None = field(default=None)
    unsloth: Answer | None = field(default=None)
    speeds: tuple[Speed, ...] = field(default=SPEEDS)
    estimate: Estimate | None = field(default=None)

    @property
    def stage(self) -> Stage:
        return STAGES[self.config.stage]

    def as_given(self, name: str, reason: str = "") -> Choice:
        """The config's own value."""
        return Choice(name, getattr(self.config, name), self.config.source(name), reason)
