"""speed_run.py: one run of speed.py: the inputs it needs, its process, and the figures of its steps."""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import speed_peers
from speed_works import ALPHA, CASES, CUTOFF, EVERY, RANK, SYSTEMS, TARGETS, Work

ROOT = Path(__file__).resolve().parent.parent
OURS = (
    f"--lora_r={RANK} --lora_alpha={ALPHA} --lora_dropout=0 --target_modules {' '.join(TARGETS)} "
    "--train_on_inputs --bf16=True --learning_rate=1e-4 --lr_scheduler_type=constant --warmup_steps=0 "
    "--val_set_size=0 --audit=warn --data_cache=False "
    f"--save_strategy=no --logging_steps={EVERY} --report_to=none --overwrite"
).split()


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the runs of a call share."""

    data: Path
    tokenizer: Path
    work: Path
    tiny: bool
    steps: int
    warmup: int
    run_limit_s: float
    peer_path: str
    ours_flags: tuple[str, ...]


def run(setting: Setting, case: str, number: int, system: str) -> dict[str, Any]:
    """One process: its steps, speed, memory and environment, or the last line of its error."""
    work = CASES[case][0].tiny() if setting.tiny else CASES[case][0]
    model, rows = inputs(setting, work)
    stage, folder = SYSTEMS[system].stage, setting.work / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    flags = [] if stage is None else [*flags_of(work, stage), f"--max_steps={setting.steps}", *setting.ours_flags]
    command = (
        speed_peers.words(system, work, model, rows / "rows.npz", setting.steps)
        if stage is None
        else [sys.executable, str(ROOT / "finetune.py"), f"--base_model={model}", f"--data_path={rows / 'rows.jsonl'}",
              f"--output_dir={folder / 'adapter'}", *flags]
    )  # fmt: skip
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    row: dict[str, Any] = {"case": case, "system": system, "round": number, "date": now, "flags": flags}
    code, output, row["wall_s"] = _process(command, folder, setting, is_peer=stage is None)
    row["environment"] = environment(setting, is_peer=stage is None)
    if code != 0:
        return row | {"error": last_error(output, code)}
    measured = ours(folder / "adapter") if stage else speed_peers.read(output)
    return row | figures(measured, setting.warmup)


def flags_of(work: Work, stage: int) -> list[str]:
    """finetune.py's flags for the work; rows of no fixed length are packed."""
    rows = work.rows if work.length else 1
    packing = ["--packing=False"] if work.length else ["--packing=True", f"--pack_len={work.tokens}"]
    return [
        *OURS, f"--stage={stage}", f"--adapter_name={work.method}", f"--cutoff_len={work.length or CUTOFF}", f"--batch_size={rows}",
        f"--per_device_train_batch_size={rows}", f"--use_gradient_checkpointing={work.recompute}",
        f"--load_4bit={work.quantization == 'nf4'}", *packing,
    ]  # fmt: skip


def ours(folder: Path) -> dict[str, Any]:
    """The windows of a run folder: what lies between its log lines; a step's tokens are the mean of the run."""
    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logs = [log for log in logs if "tokens_per_s" in log]
    summary = json.loads((folder / "run.json").read_text())["summary"]
    tokens = summary["tokens"] / summary["steps"]
    counts = [log["step"] - before for log, before in zip(logs, [0, *(log["step"] for log in logs)], strict=False)]
    return {
        "windows": [(count, tokens, tokens / log["tokens_per_s"]) for count, log in zip(counts, logs, strict=True)],
        "losses": [log["loss"] for log in logs],
        "peak_memory_gib": summary["peak_memory_gib"],
    }


def figures(measured: dict[str, Any], warmup: int) -> dict[str, Any]:
    """Of the windows that begin after `warmup` steps: mean tokens a step over its median seconds."""
    windows = measured["windows"]
    begins = itertools.accumulate((count for count, _, _ in windows), initial=0)
    kinds = list(zip(windows, (begin >= warmup for begin in begins), strict=False))
    steady, first = [window for window, is_steady in kinds if is_steady], [window for window, is_steady in kinds if not is_steady]
    second = statistics.median(seconds for _, _, seconds in steady)
    tokens = statistics.mean(tokens for _, tokens, _ in steady)
    return {
        "tokens_per_s": round(tokens / second, 1),
        "step_ms": round(second * 1e3, 2),
        "tokens_per_step": round(tokens, 1),
        "peak_memory_gib": measured["peak_memory_gib"],
        "compile_s": round(sum(count * (seconds - second) for count, _, seconds in first), 2),
        "losses": [round(loss, 4) for loss in measured["losses"]],
        "windows": [[count, round(tokens), round(seconds, 4)] for count, tokens, seconds in windows],
    }


def inputs(setting: Setting, work: Work, processes: int = 1) -> tuple[Path, Path]:
    """The folders of the model and of the rows of all steps and processes, made where they are missing."""
    count = work.rows * setting.steps * processes
    model = setting.work / work.shape
    rows = setting.work / f"rows_{work.length or 'commonsense'}_{count}"
    script = [sys.executable, str(ROOT / "benchmarks/speed_inputs.py")]
    if not (model / "config.json").is_file():
        subprocess.run([*script, "model", str(model), work.shape, str(setting.tokenizer)], check=True)
    if not (rows / "rows.npz").is_file():
        shape = [work.length or 0, count, f"--data={setting.data}", f"--cutoff_len={CUTOFF}"]
        subprocess.run([*script, "rows", str(rows), str(setting.tokenizer), *map(str, shape)], check=True)
    return model, rows


def _process(command: list[str], folder: Path, setting: Setting, *, is_peer: bool) -> tuple[int, str, float]:
    """Exit code, output with the errors behind it where it failed, wall seconds."""
    began = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=folder, env=_env(setting, is_peer=is_peer), capture_output=True, text=True, timeout=setting.run_limit_s
        )
    except subprocess.TimeoutExpired:
        return 124, f"not done after {setting.run_limit_s:.0f} s", round(time.perf_counter() - began, 1)
    output = done.stdout if done.returncode == 0 else done.stdout + done.stderr
    return done.returncode, output, round(time.perf_counter() - began, 1)


def _env(setting: Setting, *, is_peer: bool) -> dict[str, str]:
    path = [setting.peer_path if is_peer else "", str(ROOT), os.environ.get("PYTHONPATH", "")]
    offline = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_COMPILE_LOCATION": str(setting.work / "unsloth_cache")}
    return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def last_error(output: str, code: int) -> str:
    """The last line that is no warning, without this machine's folders."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    line = next((line for line in reversed(lines) if re.search(r"Error|finetune\.py:|not done after", line)), lines[-1] if lines else "")
    return f"exit {code}: " + re.sub(r"(?:/[\w.+-]+)+/", "", line)[:300]


@functools.cache
def environment(setting: Setting, *, is_peer: bool) -> dict[str, Any]:
    """Machine and package versions, as a process of that kind sees them."""
    code = "import dataclasses, json; from surefoot.machine import probe; print(json.dumps(dataclasses.asdict(probe())))"
    env = _env(setting, is_peer=is_peer)
    seen = json.loads(subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return {name: seen[name] for name in ("gpus", "cpu_name", "driver", "cuda", "cudnn", "python", "versions")}
