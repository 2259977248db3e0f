"""A short run of a training command: finetune.py in a fresh process, and what it left in its run folder."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from surefoot import cli
from surefoot.config import Config, canonical
from surefoot.diagnosis.stability import Step

FINETUNE = Path(__file__).resolve().parents[2] / "finetune.py"

# Set for every trial. A warm-up would keep the rate of a 10-step run near 0, so the schedule is constant at the given rate.
TEST_FLAGS = {"logging_steps": 1, "eval_strategy": "no", "save_strategy": "no", "lr_scheduler_type": "constant", "report_to": "none"}
# Set only where the command or its run file gives them, since they contradict the trial; none means "not given".
RESET_FLAGS = {
    "warmup_steps": "none", "warmup_ratio": "none", "load_best_model_at_end": "none", "resume_from_checkpoint": "none",
    "resume": False, "overwrite": False, "plan_json": False,
}  # fmt: skip


class Setup(NamedTuple):
    """What the child's plan ran, of what a way back or a next stage changes. reason: why attention is what it is."""

    attn_implementation: str
    enable_torch_compile: bool
    sdpa_kernels: tuple[str, ...]
    precision: str
    learning_rate: float
    lora_dropout: float
    gpu: str | None
    reason: str

    @property
    def stage(self) -> int | None:
        """The stage these settings amount to, None for compiled eager attention."""
        if self.attn_implementation == "eager":
            return None if self.enable_torch_compile else 1
        return 3 if self.enable_torch_compile else 2

    @property
    def reads_sdpa_flags(self) -> bool:
        return self.attn_implementation == "sdpa" and self.gpu is not None

    def __str__(self) -> str:
        kernels = f" ({', '.join(self.sdpa_kernels)})" if self.reads_sdpa_flags else ""
        compiled = "on" if self.enable_torch_compile else "off"
        return f"{self.attn_implementation} attention{kernels}, compile {compiled}, {self.precision}, {self.gpu or 'CPU'}"


class Trial(NamedTuple):
    """A command to try: its flags as given, how many steps of it, in which new folder; say gets the child's lines.

    is_kept: the folder outlives the trial.
    """

    config: Config
    flags: Mapping[str, Any]
    steps: int
    folder: Path
    is_kept: bool
    say: Callable[[str], None]

    def changes(self) -> dict[str, Any]:
        """The flags that the trial sets over the command's own."""
        resets = {name: value for name, value in RESET_FLAGS.items() if self.config.given(name)}
        return {"max_steps": self.steps, **TEST_FLAGS, **resets}


class Run(NamedTuple):
    """A finished child. message is its own last word if it failed; setup is None when it ended before its run folder was opened."""

    exit_code: int
    message: str
    asked_steps: int
    steps: tuple[Step, ...]
    setup: Setup | None


def flags_of(words: Sequence[str]) -> dict[str, Any]:
    """finetune.py's words as name to text, list or True, as its own command line reads them.

    Raises:
        UsageError: stray words and flags without a value.
    """
    return {name: ast.literal_eval(text) for name, _, text in (word[2:].partition("=") for word in cli.tidy(words))}


def words_of(flags: Mapping[str, Any]) -> list[str]:
    """The inverse of flags_of()."""
    words: list[str] = []
    for name, value in flags.items():
        words += [f"--{name}", *value] if isinstance(value, list) else [f"--{name}={value}"]
    return words


def replaced(flags: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """flags with `changes` in place of the same flags under any of their names."""
    return {name: value for name, value in flags.items() if canonical(name) not in changes} | dict(changes)


def start(trial: Trial, name: str, **changes: Any) -> Run:
    """Runs `python finetune.py` on the trial's flags in a fresh process: SDPA switches and compile are process-wide."""
    folder = trial.folder / name
    flags = replaced(trial.flags, {**trial.changes(), **changes, "output_dir": folder})
    lines = []
    with subprocess.Popen(
        [sys.executable, str(FINETUNE), *words_of(flags)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            lines.append(line.rstrip())
            trial.say(lines[-1])
    code = child.returncode if child.returncode >= 0 else 128 - child.returncode  # a signal, as the shell counts it
    return Run(code, last_word(lines) if code else "", trial.steps, read_steps(folder), read_setup(folder))


def last_word(lines: Sequence[str]) -> str:
    """finetune.py's message to its user, else the last line it wrote."""
    begins = [number for number, line in enumerate(lines) if line.startswith("finetune.py: ")]
    if begins:
        return "\n".join(lines[begins[-1] :]).removeprefix("finetune.py: ")
    return next((line for line in reversed(lines) if line.strip()), "it wrote nothing")


def read_steps(folder: Path) -> tuple[Step, ...]:
    """The training steps of metrics.jsonl, which writes nan and inf as text; none when the file is missing."""
    path = folder / "metrics.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    figures = Step._fields[1:]
    return tuple(Step(entry["step"], *(float(entry.get(name, "nan")) for name in figures)) for entry in entries if "loss" in entry)


def read_setup(folder: Path) -> Setup | None:
    """What run.json says was run, None when it is missing."""
    path = folder / "run.json"
    if not path.is_file():
        return None
    plan = json.loads(path.read_text())["plan"]
    decided = {**plan["model"], **plan["adapter"], **plan["train"], **plan["process"]}
    decided["sdpa_kernels"] = tuple(decided["sdpa_kernels"])
    gpus = plan["machine"]["gpus"]
    reason = next(choice["reason"] for choice in plan["choices"] if choice["name"] == "attn_implementation")
    decided |= {"gpu": gpus[0]["name"] if gpus else None, "reason": reason}
    return Setup(**{name: decided[name] for name in Setup._fields})
