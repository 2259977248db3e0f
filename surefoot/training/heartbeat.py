"""A sign of life of every rank, watched by every rank: who stalls is named, with step, phase and the stacks of all, and the run ends."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from surefoot.errors import BackendError

FOLDER = "heartbeats"
PHASES = ("start", "data", "token count", "forward", "backward", "update", "evaluation", "checkpoint", "end")  # in the order of a step
DONE = "done"


class Beat(NamedTuple):
    """Where a rank is: `moves` grows with every phase it enters, `ticks` as long as its process lives."""

    step: int
    phase: str
    moves: int
    ticks: int
    process: str  # host and pid


class Seen(NamedTuple):
    """A rank's newest beat, and when (on the watcher's own clock) it last entered a phase and last ticked."""

    beat: Beat | None
    moved_at: float
    ticked_at: float


def stalled(seen: Mapping[int, Seen], now: float, timeout_s: float) -> int | None:
    """The rank that holds up the others, None where all move: a process that is gone or stopped, else the one that is furthest behind."""
    running = {rank: one for rank, one in seen.items() if one.beat is None or one.beat.phase != DONE}
    if not any(now - min(one.moved_at, one.ticked_at) > timeout_s for one in running.values()):
        return None
    gone = {rank: one for rank, one in running.items() if now - one.ticked_at > timeout_s / 2}
    return min(gone or running, key=lambda rank: _place((gone or running)[rank]))


def _place(one: Seen) -> tuple[int, int, float]:
    if one.beat is None:
        return -1, 0, one.moved_at
    return one.beat.step, PHASES.index(one.beat.phase), one.moved_at


@dataclass(kw_only=True)
class Heartbeat:
    """Call beat() at the start of each phase. While entered, a thread writes heartbeats/rank-N.json and reads the others'.

    Args:
        timeout_s: 0: nobody watches.
    """

    run_folder: Path
    rank: int
    processes: int
    timeout_s: float
    step: int = 0
    phase: str = "start"
    moves: int = 0
    seen: dict[int, Seen] = field(default_factory=dict)
    _over: threading.Event = field(default_factory=threading.Event)
    _ticks: int = 0

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def beat(self, phase: str, step: int) -> None:
        self.step, self.phase, self.moves = step, phase, self.moves + 1

    def __enter__(self) -> None:
        if self.timeout_s > 0:
            (self.run_folder / FOLDER).mkdir(parents=True, exist_ok=True)
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        """This rank needs no watching any more, and does not hold up the others."""
        if self.timeout_s > 0:
            self._over.set()
            self._thread.join()
            self._write(DONE)  # phase stays: an error tells where it happened
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        tick = min(5.0, self.timeout_s / 10)
        with self._file("stacks-of-rank-{}.txt").open("w") as stacks:
            while not self._over.wait(tick):
                if not self._write():
                    continue  # nobody can tell who lives by files on a disk that is full; the next checkpoint says what is wrong
                # for a thread that never lets Python run: written by C, when this thread has been starved for so long
                faulthandler.dump_traceback_later(2 * self.timeout_s, exit=True, file=stacks)
                self._look()
                culprit = stalled(self.seen, time.monotonic(), self.timeout_s)
                if culprit is not None:
                    faulthandler.dump_traceback(stacks, all_threads=True)
                    stacks.flush()
                    is_speaker = self._is_speaker()
                    if not self._over.wait(3 * tick if is_speaker else 6 * tick):  # for the others' stacks; the others, for the speaker
                        if is_speaker:
                            print(f"finetune.py: {self._verdict(culprit)}", file=sys.stderr, flush=True)
                        os._exit(BackendError.exit_code)

    def _write(self, phase: str | None = None) -> bool:
        self._ticks += 1
        file = self._file("rank-{}.json")
        partial = file.with_suffix(".part")
        beat = Beat(self.step, phase or self.phase, self.moves, self._ticks, f"{socket.gethostname()}, pid {os.getpid()}")
        try:
            partial.write_text(json.dumps(beat))
            os.replace(partial, file)
        except OSError:
            return False
        return True

    def _look(self) -> None:
        now = time.monotonic()
        for rank in range(self.processes):
            beat, before = self._read(rank), self.seen.get(rank, Seen(None, now, now))
            moved = beat is not None and (before.beat is None or beat[:3] != before.beat[:3])
            self.seen[rank] = Seen(beat, now if moved else before.moved_at, now if beat != before.beat else before.ticked_at)

    def _read(self, rank: int) -> Beat | None:
        try:
            return Beat(*json.loads((self.run_folder / FOLDER / f"rank-{rank}.json").read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _file(self, name: str) -> Path:
        return self.run_folder / FOLDER / name.format(self.rank)

    def _is_speaker(self) -> bool:
        """The first rank that lives."""
        now = time.monotonic()
        return self.rank == min(rank for rank, one in self.seen.items() if now - one.ticked_at < self.timeout_s / 2)

    def _verdict(self, culprit: int) -> str:
        now = time.monotonic()
        lines = [f"{self._told(culprit, now)} and holds up the run (--hang_timeout_s={self.timeout_s:g})"]
        lines += [f"  {self._told(rank, now)}" for rank in self.seen if rank != culprit]
        where = self.run_folder / FOLDER
        return "\n".join(lines) + f"\n  stacks: {where}/stacks-of-rank-*.txt. The same command with --resume goes on"

    def _told(self, rank: int, now: float) -> str:
        one = self.seen[rank]
        if one.beat is None:
            return f"rank {rank} has not begun for {now - one.moved_at:.0f} s"
        state = "is gone or stopped" if now - one.ticked_at > self.timeout_s / 2 else "has not moved"
        return f"rank {rank} ({one.beat.process}) {state} for {now - one.moved_at:.0f} s at step {one.beat.step} in {one.beat.phase}"
