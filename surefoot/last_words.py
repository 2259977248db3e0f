"""Last words: of the processes of one launch one says what is wrong, and all end with the same exit code."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from surefoot import signals
from surefoot.errors import Preempted, SurefootError

PATIENCE_S = 3.0  # for the others to fail alike, before the launcher ends them


def say(error: SurefootError) -> int:
    """Prints `error` where no other process of this host has printed its own, and returns the exit code that all of them end with."""
    signals.ignore()  # the launcher's SIGTERM to whoever is not gone yet must not change the exit code
    folder = signals.launch_folder()
    if signals.settle(error.exit_code):
        print(f"finetune.py: {error}", file=sys.stderr, flush=True)
    if error.exit_code == Preempted.exit_code:
        signals.tell_of_launcher()
    return error.exit_code if folder is None else _together(folder) or error.exit_code


def _together(folder: Path) -> int:
    """Waits until the other processes are here too, or for PATIENCE_S; the exit code of the first, 0 if it is not written yet."""
    everyone, end = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), time.monotonic() + PATIENCE_S
    while len(list(folder.glob(f"{signals.ENDED}*"))) < everyone and time.monotonic() < end:
        time.sleep(0.02)
    return int((folder / signals.EXIT_CODE).read_text() or 0)
