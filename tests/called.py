"""A script of scripts/ as a user starts it, in a process of its own or in this one."""

from __future__ import annotations

import contextlib
import importlib
import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

from surefoot import script
from tests.conftest import ROOT


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def start(name: str, *words: object, cwd: Path) -> Done:
    """A script in a process of its own."""
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    return Done(done.returncode, done.stdout, done.stderr)


def call(name: str, *words: object, cwd: Path, asked: str = "") -> Done:
    """The same in this process, which has torch loaded already."""
    module = importlib.import_module(f"scripts.{name.removesuffix('.py')}")
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(cwd), redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [name, *map(str, words)])
        patch.setattr(sys, "stdin", io.StringIO(asked))
        code = script.main(module.Flags, module.USAGE, module.run)
    return Done(code, out.getvalue(), err.getvalue())
