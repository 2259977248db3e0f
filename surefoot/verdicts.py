"""Verdict: what the attention canary found on this machine; ask() runs it in a process of its own and keeps the answer.

A kernel that crashes or hangs takes its process with it, so the canary never runs in the one that trains.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surefoot.machine import Machine

VERSION = 2  # of the canary's cases: a new one forgets the old answers
TIMEOUT_S = 180.0
STACK = ("torch", "transformers", "flash-attn", "triton")
SDPA_KERNELS = ("cudnn", "flash", "efficient", "math")
BACKENDS = ("eager", *(f"sdpa_{kernel}" for kernel in SDPA_KERNELS), "flash_attention_2", "varlen")
ALL_BACKENDS = (*BACKENDS, "flex")  # no run uses flex, and compiling it takes longer than all others together
MASKS = ("causal", "explicit", "packed")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The run's attention: query heads, key/value heads, their size, bf16, fp16 or fp32, longest row in tokens, rows a pass."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    length: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One backend under one kind of mask. state is pass, fail or unavailable; error is relative to fp64, the worst of all heads."""

    backend: str
    mask: str
    state: str
    reason: str = ""
    error: float | None = None
    milliseconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """All verdicts for a shape; seconds is what measuring took, where from says when and on what."""

    shape: Shape
    rows: tuple[Verdict, ...]
    origin: str
    seconds: float

    def of(self, backend: str, mask: str) -> Verdict | None:
        return next((verdict for verdict in self.rows if (verdict.backend, verdict.mask) == (backend, mask)), None)

    def passes(self, backend: str, masks: Sequence[str]) -> bool:
        """True when it was measured under each of the masks and passed."""
        return all((verdict := self.of(backend, mask)) is not None and verdict.state == "pass" for mask in masks)

    def obstacle(self, backend: str, masks: Sequence[str]) -> str:
        """The first reason against it."""
        for mask in masks:
            verdict = self.of(backend, mask)
            if verdict is None:
                return f"not measured under a {mask} mask"
            if verdict.state != "pass":
                return f"{verdict.mask}: {verdict.reason}"
        return ""

    def as_record(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def known(machine: Machine, shape: Shape, backends: Sequence[str] = BACKENDS) -> Verdicts | None:
    """The kept verdicts, None when there are none or the file is damaged (ask() then writes it anew)."""
    path = _path(machine, shape, backends)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(Verdict(**row) for row in content["rows"])
        return Verdicts(
            shape=Shape(**content["shape"]), rows=rows, origin=f"{content['origin']}, kept in {path}", seconds=content["seconds"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def ask(
    machine: Machine, shape: Shape, backends: Sequence[str] = BACKENDS, *, fresh: bool = False, say: Callable[[str], None] = lambda _: None
) -> Verdicts:
    """The kept verdicts, or those of a canary run now. Processes of one machine wait for the first one's answer.

    Args:
        fresh: measure again whatever is kept.
        say: gets a line before a measurement, which takes some 15 s on a GPU.
    """
    import filelock

    path = _path(machine, shape, backends)
    text = "attention canary: trying the attention kernels of this machine at the run's shape (the answer is kept)"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock: Any = filelock.FileLock(path.with_suffix(".lock"))
        with lock:
            found = None if fresh else known(machine, shape, backends)
            if found is None:
                say(f"attention canary: {path} is damaged, made again" if path.exists() and not fresh else text)
                found = _measure(machine, shape, backends)
                _keep(path, found)
            return found
    except OSError as error:  # measured by each process, kept by none
        say(f"{text[: text.index(' (')]}; the cache folder cannot be written: {error}")
        return _measure(machine, shape, backends)


def _path(machine: Machine, shape: Shape, backends: Sequence[str]) -> Path:
    stack = {name: machine.versions.get(name) for name in STACK}
    gpu = machine.gpu
    device = dataclasses.astuple(gpu) if gpu else machine.cpu_name
    facts = [VERSION, backends, dataclasses.astuple(shape), device, machine.driver, machine.cuda, machine.cudnn, stack]
    return Path(machine.cache_dir) / "attention" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]}.json"


def _keep(path: Path, found: Verdicts) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(found.as_record(), indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _measure(machine: Machine, shape: Shape, backends: Sequence[str]) -> Verdicts:
    began = time.monotonic()
    rows: list[Verdict] = []
    todo = list(backends)
    while todo:
        lines, ending = _child(machine.local_rank, shape, todo)
        begun = [line["begin"] for line in lines if "begin" in line]
        rows += [Verdict(**line["verdict"]) for line in lines if "verdict" in line]
        if ending:
            victim = begun[-1] if begun else todo[0]
            rows = [row for row in rows if row.backend != victim]
            rows += [Verdict(backend=victim, mask=mask, state="fail", reason=f"the kernel {ending}") for mask in MASKS]
        todo = todo[todo.index(begun[-1]) + 1 :] if begun else todo[1:]
    where = machine.gpu.name if machine.gpu else machine.cpu_name
    origin = f"measured {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC on {machine.hostname}, {where}"
    return Verdicts(shape=shape, rows=tuple(rows), origin=origin, seconds=round(time.monotonic() - began, 1))


def _child(device: int, shape: Shape, backends: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """The child's lines, and how it ended where that was not well."""
    task = json.dumps({"shape": dataclasses.asdict(shape), "backends": list(backends), "device": device})
    home = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", "-c", "from surefoot.attention import canary; canary.main()"]
    env = {**os.environ, "PYTHONPATH": path}
    try:
        done = subprocess.run(command, input=task, capture_output=True, text=True, timeout=TIMEOUT_S, env=env)
        text = done.stdout
        ending = "" if done.returncode == 0 else f"ended its process ({_last_line(done.stderr) or done.returncode})"
    except subprocess.TimeoutExpired as error:
        text = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        ending = f"did not return within {TIMEOUT_S:.0f} s"
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")], ending


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:200] if lines else ""
