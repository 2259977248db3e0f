"""A question asked in a process of its own: it may crash, hang or patch what it imports, and the doctor goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HOME = str(Path(__file__).resolve().parent.parent.parent)  # where `import surefoot` works from a checkout that is not installed


class Answer(NamedTuple):
    """What the process wrote to stdout; problem says how it ended where that was not well."""

    output: str
    problem: str


class Question(NamedTuple):
    process: subprocess.Popen[str] | None
    problem: str
    deadline: float  # of time.monotonic(), seconds


def start(command: Sequence[str], timeout_s: float) -> Question:
    """Starts the command in a session of its own, so that its children can be ended with it."""
    path = os.pathsep.join([HOME, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path}
    deadline = time.monotonic() + timeout_s
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", env=env, start_new_session=True
        )
    except OSError as error:
        return Question(None, f"cannot be started: {error}", deadline)
    return Question(process, "", deadline)


def python(code: str, timeout_s: float) -> Question:
    """Starts this interpreter on the code; -P: a torch.py in the current folder is not what a run would import."""
    return start([sys.executable, "-P", "-c", code], timeout_s)


def finish(question: Question) -> Answer:
    """Waits until the deadline at most. A process stuck in the kernel outlives SIGKILL, so nothing waits for it after that."""
    process = question.process
    if process is None:
        return Answer("", question.problem)
    try:
        output, errors = process.communicate(timeout=max(0.0, question.deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return Answer("", "did not answer in time and was ended")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode == 0:
        return Answer(output, "")
    name = f"ended by signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
    return Answer(output, last_line(errors) or last_line(output) or name)


def ask(command: Sequence[str], timeout_s: float) -> Answer:
    return finish(start(command, timeout_s))


def last_line(text: str) -> str:
    """The last line that says something, at most 300 characters: of a traceback, its error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
