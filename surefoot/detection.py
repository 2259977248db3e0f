"""Whether Unsloth can train here: one process imports it and trains a tiny model, and the answer is kept per machine and versions.

A failed import leaves transformers patched and a failed kernel may take its process with it, so the process that trains never tries.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from surefoot.machine import Machine

VERSION = 1  # of the trial: a new one forgets the old answers
TIMEOUT_S = 300.0
STACK = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "triton", "unsloth", "unsloth_zoo", "xformers", "flash-attn")
PINNED = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes")  # of Unsloth's requirements, what it patches
KEPT = ("works", "no GPU", "attention conflict", "unknown architecture")  # other failures may pass, as full memory does


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is to be trained: the model type of config.json, lora or dora, nf4 or none, and bf16, fp16 or fp32."""

    model_type: str
    method: str
    quantization: str
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """kind is works, or why not: not installed, outside its pins, no GPU, attention conflict, unknown architecture, failed."""

    kind: str
    reason: str
    origin: str

    @property
    def works(self) -> bool:
        return self.kind == "works"


def known(machine: Machine, case: Case) -> Answer | None:
    """What needs no process: not installed, outside its pins, or the kept answer; None where nobody has tried."""
    for kind, reason in (("not installed", _missing(machine)), ("outside its pins", _unpinned(machine))):
        if reason:
            return Answer(kind=kind, reason=reason, origin="read from the installed packages")
    path = _path(machine, case)
    try:
        kept = Answer(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return dataclasses.replace(kept, origin=f"{kept.origin}, kept in {path}")


def ask(machine: Machine, case: Case, *, say: Callable[[str], None] = lambda _: None) -> Answer:
    """The known answer, or that of a trial now.

    Args:
        say: gets a line before a trial, which takes some 20 s.
    """
    found = known(machine, case)
    if found is not None:
        return found
    say(f"Attempting to use the Unsloth backend: a process of its own trains a tiny {case.model_type} with it (the answer is kept)")
    found = _try(machine, case)
    if found.kind in KEPT:
        _keep(_path(machine, case), found, say)
    return found


def _missing(machine: Machine) -> str:
    return "" if machine.has("unsloth") else "ImportError: No module named 'unsloth'"


def _unpinned(machine: Machine) -> str:
    """The first package that Unsloth patches and that is not the version its own requirements name; packages it lacks altogether too."""
    from packaging.requirements import Requirement

    for package in ("unsloth", "unsloth_zoo"):
        try:
            lines = importlib.metadata.requires(package) or []
        except importlib.metadata.PackageNotFoundError:
            return f"unsloth needs {package}, which is not installed"
        for wanted in map(Requirement, lines):
            if wanted.name not in PINNED or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
                continue
            version = machine.versions.get(wanted.name)
            if version is None:
                return f"{package} needs {wanted.name}, which is not installed"
            if not wanted.specifier.contains(version, prereleases=True):
                return f"{package} {machine.versions.get(package)} takes {wanted.name}{wanted.specifier}, and {version} is installed"
    return ""


def _path(machine: Machine, case: Case) -> Path:
    stack = {name: machine.versions.get(name) for name in STACK}
    device = dataclasses.astuple(machine.gpu) if machine.gpu else machine.cpu_name
    facts = [VERSION, dataclasses.astuple(case), device, machine.driver, machine.cuda, stack, machine.unsloth_switches]
    return Path(machine.cache_dir) / "unsloth" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]}.json"


def _keep(path: Path, found: Answer, say: Callable[[str], None]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(dataclasses.asdict(found), indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        say(f"the answer cannot be kept: {error}")


def _try(machine: Machine, case: Case) -> Answer:
    began = time.monotonic()
    steps, ending = _child(case)
    kind = _kind(steps, ending) if ending else "works"
    where = machine.gpu.name if machine.gpu else machine.cpu_name
    seconds = time.monotonic() - began
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    reached = f"Unsloth {machine.versions['unsloth']} trained a tiny {case.model_type} with {case.method}"
    return Answer(kind=kind, reason=ending or reached, origin=f"tried {when} UTC on {machine.hostname}, {where}, in {seconds:.0f} s")


def _kind(steps: list[str], ending: str) -> str:
    """Sorts a failure by how far the trial came and what the error says."""
    text = ending.lower()
    if "No module named 'unsloth'" in ending:
        return "not installed"
    if "xformers" in text or "flash_attn" in text or "flash-attn" in text or "memory_efficient_attention" in text:
        return "attention conflict"
    if "imported" not in steps:
        return "no GPU" if "accelerator" in text or "need a gpu" in text else "failed"
    is_unknown = any(words in text for words in ("not yet implemented", "architecture", "not supported", "unrecognized model"))
    return "unknown architecture" if is_unknown else "failed"


def _child(case: Case) -> tuple[list[str], str]:
    """The steps that the trial's process reached, and how it ended where that was not well."""
    home = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", "-c", "from surefoot.backends import unsloth_trial; unsloth_trial.main()"]
    env = {**os.environ, "PYTHONPATH": path}
    task = json.dumps(dataclasses.asdict(case))
    try:
        done = subprocess.run(command, input=task, capture_output=True, text=True, timeout=TIMEOUT_S, env=env)
    except subprocess.TimeoutExpired:
        return [], f"the trial did not return within {TIMEOUT_S:.0f} s"
    steps = [line.removeprefix("step: ") for line in done.stdout.splitlines() if line.startswith("step: ")]
    if done.returncode == 0 and "trained" in steps:
        return steps, ""
    if done.returncode < 0:
        return steps, f"the trial was ended by signal {-done.returncode}"
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    return steps, errors[-1].strip()[:300] if errors else f"the trial ended with exit code {done.returncode}"
