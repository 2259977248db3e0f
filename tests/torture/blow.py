"""One process of a tortured run: finetune.py's main() with a signal that it sends itself at a chosen place, and a trace of its rows."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PLACES = ("step", "evaluation", "write", "sync", "manifest", "rename", "prune", "last_save")


class Blow(NamedTuple):
    """Signal `number` at the `turn`-th time that a process of `ranks` comes to `place`."""

    place: str
    turn: int
    number: int
    ranks: tuple[int, ...]


def run(argv: list[str], rank: int, blow: Blow | None, trace: Path) -> int:
    """Exit code of finetune.py with these words, in this (forked) process."""
    import finetune
    from surefoot import signals
    from surefoot.training.loop import SurefootTrainer

    _trace_rows(SurefootTrainer, trace)
    if blow is not None and rank in blow.ranks:
        _arm(blow)
    sys.argv = ["finetune.py", *argv]
    code = finetune.main()
    signals.ignore()  # as finetune.py does
    return code


def _trace_rows(trainer: Any, path: Path) -> None:
    step = trainer.training_step

    @functools.wraps(step)
    def traced(self: Any, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        with path.open("a") as file:
            file.write(json.dumps([self.state.global_step, inputs["rows"].tolist()]) + "\n")
        return step(self, model, inputs, *rest)

    trainer.training_step = traced


def _arm(blow: Blow) -> None:
    from surefoot import checkpoint
    from surefoot.training.loop import SurefootTrainer

    owner, name = {
        "step": (SurefootTrainer, "compute_loss"),
        "evaluation": (SurefootTrainer, "prediction_step"),
        "write": (SurefootTrainer, "_save_rng_state"),  # the weights are written, the rest is not
        "sync": (checkpoint, "sync"),
        "manifest": (checkpoint, "write_json"),
        "rename": (checkpoint, "_sync_one"),  # in publish(): after the rename, before the folder's entry is on the disk
        "prune": (checkpoint, "prune"),
        "last_save": (SurefootTrainer, "_save"),
    }[blow.place]
    original: Callable[..., Any] = getattr(owner, name)
    turns = iter(range(1, 10**9))

    @functools.wraps(original)
    def struck(*args: Any, **named: Any) -> Any:
        if next(turns) == blow.turn:
            os.kill(os.getpid(), blow.number)
        return original(*args, **named)

    setattr(owner, name, struck)


def name_of(number: int) -> str:
    return signal.Signals(number).name
