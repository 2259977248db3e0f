"""Saver: a checkpoint is written by all ranks beside its place, synced, described, and put there in one rename, or not at all."""

from __future__ import annotations

import errno
import functools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError

from surefoot import checkpoint
from surefoot.errors import BackendError

RUN_STATE = "run_state.json"  # what transformers does not keep: averages, counters, how long the growing files were
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ENOENT, errno.ESTALE)


class Saver:
    """Writes the checkpoints of a run; `last_s` is how long the last one took, `last_step` which it was.

    Args:
        limit: checkpoints kept, None: all.
    """

    def __init__(self, run_folder: Path, limit: int | None, rank: int, processes: int) -> None:
        self.run_folder, self.limit, self.rank, self.processes = run_folder, limit, rank, processes
        self.last_s, self.last_step = 0.0, -1

    def clean(self) -> None:
        """Removes what a killed run left half-written."""
        for path in checkpoint.leftovers(self.run_folder) if self.rank == 0 else ():
            shutil.rmtree(path, ignore_errors=True)

    def save(self, step: int, write: Callable[[Path], None], facts: dict[str, Any], best: str | None) -> None:
        """Called on every rank. `write` puts this rank's files into the folder it is given.

        Raises:
            BackendError: a rank could not write, on every rank; the earlier checkpoints are as they were.
        """
        began = time.perf_counter()
        target = self.run_folder / f"checkpoint-{step}"
        partial = target.with_name(target.name + checkpoint.PARTIAL)
        stages: tuple[Callable[[], None], ...] = (
            lambda: self._as_main(lambda: _anew(partial)),
            lambda: write(partial),
            lambda: checkpoint.sync(partial),
            lambda: self._as_main(lambda: self._publish(partial, target, facts)),
        )
        for stage in stages:
            problem = self._first(_attempt(stage))
            if problem is not None:
                self._as_main(lambda: shutil.rmtree(partial, ignore_errors=True))
                raise BackendError(self._refusal(step, problem))
        self._as_main(lambda: checkpoint.prune(self.run_folder, self.limit, best))
        self.last_s, self.last_step = time.perf_counter() - began, step

    def _publish(self, partial: Path, target: Path, facts: dict[str, Any]) -> None:
        states = len(list(partial.glob("rng_state*.pth")))
        if states != self.processes:
            raise OSError(
                errno.ENOENT, f"{states} of {self.processes} processes' random states arrived: is the folder shared by all nodes?"
            )
        checkpoint.publish(partial, target, {**facts, "step": int(target.name[11:]), "world_size": self.processes})

    def _as_main(self, action: Callable[[], None]) -> None:
        if self.rank == 0:
            action()

    def _first(self, problem: str | None) -> str | None:
        """Of all ranks', so that all go on or none does; also the barrier between the stages."""
        if self.processes == 1:
            return problem
        return next((text for text in gather_object([problem]) if text is not None), None)

    def _refusal(self, step: int, problem: str) -> str:
        kept = checkpoint.folders(self.run_folder)
        state = f"{kept[-1].name} is as it was" if kept else "There is no earlier checkpoint"
        return (
            f"--output_dir={self.run_folder}: the checkpoint of step {step} cannot be written: {problem}. {state}. "
            "Free space or rights there, then give the same command with --resume"
        )


def _anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _attempt(action: Callable[[], None]) -> str | None:
    """What the disk has against it; every other error passes."""
    try:
        action()
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = disk_complaint(error)
        if reason is None:
            raise
        return reason
    return None


def disk_complaint(error: BaseException) -> str | None:
    """The error in the disk's words, None where it is not the disk's. torch and safetensors wrap what the system said."""
    text = str(error)
    if isinstance(error, OSError):
        return text if error.errno in DISK else None
    is_wrapped = isinstance(error, SafetensorError) or any(word in text for word in ("PytorchStreamWriter", "inline_container", "iostream"))
    return text.splitlines()[0] if is_wrapped else None


@functools.cache  # torch cannot sort two of one priority
def read_torch_files_anywhere() -> None:
    """transformers 5.17 loads the optimizer of several CPU processes onto "cpu:0", a place that torch cannot restore to."""
    torch.serialization.register_package(7, lambda _: None, lambda stored, place: stored if place.startswith("cpu:") else None)
