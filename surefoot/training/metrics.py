"""What a log line holds: loss, grad_norm, learning rate, real tokens/s, MFU, peak memory, time left; and metrics.jsonl."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

PATIENCE_S = 10.0  # without a line, until the first one
# Dense bf16 (fp16 for Volta and Turing) tensor-core peak in TFLOP/s, from NVIDIA's data sheets, without sparsity.
PEAK_TFLOPS = {
    "B200": 2250.0, "H200": 989.0, "H100 NVL": 835.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0,
    "A10": 125.0, "A6000": 155.0, "RTX 4090": 165.0, "RTX 3090": 71.0, "V100": 125.0, "T4": 65.0,
}  # fmt: skip


def peak_tflops(gpu_name: str | None) -> float | None:
    """The GPU's dense 16-bit peak in TFLOP/s, None where it is not known."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if gpu_name and name in gpu_name), None)


def flops_per_token(model: Any) -> float:
    """Training FLOPs of a token's matrix products, recompute not counted (so MFU, not HFU); attention scores are left out.

    A frozen weight costs 4 (forward 2, gradient of its input 2), a trained one 6; an input embedding is a lookup and costs nothing.
    """
    embedding = model.get_input_embeddings().weight
    is_tied = getattr(model.config, "tie_word_embeddings", False)
    total = 0.0
    for name, parameter in model.named_parameters():
        if (parameter is embedding and not is_tied) or parameter.ndim < 2:
            continue
        # a 4-bit tensor packs two weights into a byte
        count = parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)
        total += count * (6 if parameter.requires_grad or "lora_" in name else 4)
    return total


def peak_memory_gib() -> float:
    """The peak so far: of the GPU's allocator, or of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Meter:
    """Counts real tokens (padding left out) and wall time between log lines, evaluation and saving left out."""

    def __init__(self, model: Any, gpu_name: str | None, processes: int) -> None:
        self.flops_per_token = flops_per_token(model)
        self.peak = peak_tflops(gpu_name)
        self.processes = processes
        self._tokens: int | torch.Tensor = 0  # on the device until it is asked for: reading it would make the host wait
        self._earlier_tokens = 0
        self.seconds = 0.0
        self.steps = 0
        self.widest = (0, 0)
        self._earlier_seconds, self._began = 0.0, time.perf_counter()
        self._resumed_at: float | None = None

    def start(self) -> None:
        self._resumed_at = time.perf_counter()

    def pause(self) -> None:
        if self._resumed_at is not None:
            self.seconds += time.perf_counter() - self._resumed_at
            self._resumed_at = None

    def count(self, lengths: torch.Tensor, shape: Sequence[int] = (0, 0)) -> None:
        """Adds a micro-batch: the tokens of its rows, and its rows and width with padding."""
        self._tokens += lengths.sum()
        self.widest = max(self.widest, (shape[0], shape[1]), key=math.prod)

    @property
    def total_tokens(self) -> int:
        return self._earlier_tokens + int(self._tokens)

    @property
    def total_seconds(self) -> float:
        """Wall time of the run, that of the parts before a resume up to their checkpoint included."""
        return self._earlier_seconds + time.perf_counter() - self._began

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"tokens": self.total_tokens, "seconds": self.total_seconds, "widest": self.widest}

    def restore(self, state: dict[str, Any]) -> None:
        self._earlier_tokens, self._earlier_seconds = state["tokens"], state["seconds"]
        self.widest = (state["widest"][0], state["widest"][1])

    def take(self, steps_left: int) -> dict[str, float]:
        """The figures since the last call; tokens_per_s is over all processes (taken as equally busy), mfu a fraction of one GPU's peak."""
        if self._resumed_at is not None:
            self.pause()
            self.start()
        if not self.steps or not self.seconds:
            return {}
        tokens = int(self._tokens)
        rate = tokens / self.seconds
        figures = {"tokens_per_s": rate * self.processes, "peak_memory_gib": peak_memory_gib()}
        if self.peak:
            figures["mfu"] = rate * self.flops_per_token / (self.peak * 1e12)
        figures["seconds_left"] = steps_left * self.seconds / self.steps
        self._earlier_tokens += tokens
        self._tokens, self.seconds, self.steps = 0, 0.0, 0
        return figures


class Ledger(TrainerCallback):  # type: ignore[misc]
    """Writes every log to metrics.jsonl and one line of it to the terminal; a bar shows the steps where there is a terminal."""

    def __init__(self, path: Path, meter: Meter, *, resumes: bool) -> None:
        self.path, self.meter = path, meter
        self.mode = "a" if resumes else "w"
        self.kept: dict[str, int] = {}
        self.bar: Any = None
        self.passes = 0  # of the step under way
        self.began = time.monotonic()
        self.speaks_at = self.began + PATIENCE_S

    def sizes(self) -> dict[str, int]:
        """Bytes of the files that grow, which are on the disk when this returns: a resumed run cuts off what came after its checkpoint."""
        found = {}
        for path in (self.path, self.path.with_name("bad_steps.jsonl")):
            if path.exists():
                with path.open("a") as file:
                    os.fsync(file.fileno())
                    found[path.name] = file.tell()
        return found

    def _cut_back(self) -> None:
        for name, size in self.kept.items():
            path = self.path.with_name(name)
            if path.exists() and path.stat().st_size > size:
                os.truncate(path, size)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.path.open(self.mode).close()
            self._cut_back()
            if sys.stderr.isatty():
                from tqdm import tqdm

                self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)
        self.meter.start()
        self.began = time.monotonic()
        self.speaks_at = self.began + PATIENCE_S

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.passes += 1
        self._sign_of_life(args, state)

    def _sign_of_life(self, args: Any, state: Any) -> None:
        """How far the run is before its first log line, each time after twice the wait."""
        waited = time.monotonic() - self.began
        if state.is_world_process_zero and self.began + waited > self.speaks_at:
            self.speaks_at = self.began + 2 * waited
            passes = f", pass {self.passes} of {args.gradient_accumulation_steps} of the next" if self.passes else ""
            self.say(f"step {state.global_step}/{state.max_steps}{passes}: {duration(waited)} so far")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.steps += 1
        self.passes = 0
        self._sign_of_life(args, state)
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        entry = {"step": state.global_step, **{name: _plain(value) for name, value in logs.items()}, "time": round(time.time(), 3)}
        with self.path.open("a") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")
        line = log_line(state.global_step, state.max_steps, logs)
        if line:
            self.speaks_at = math.inf
            self.say(line)

    def say(self, text: str) -> None:
        """A line on the terminal that leaves the bar whole."""
        self.bar.write(text) if self.bar is not None else print(text, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.pause()
        if self.bar is not None:
            self.bar.close()


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity; they are written as text."""
    number = float(value) if torch.is_tensor(value) else value
    return str(number) if isinstance(number, float) and not math.isfinite(number) else number


FORMATS = {
    "loss": "loss {:.4f}",
    "eval_loss": "eval_loss {:.4f}",
    "grad_norm": "grad_norm {:.3g}",
    "learning_rate": "lr {:.3g}",
    "tokens_per_s": "{:,.0f} tokens/s",
    "mfu": "mfu {:.1%}",
    "peak_memory_gib": "{:.1f} GiB",
}


def log_line(step: int, max_steps: int, logs: dict[str, float]) -> str:
    """One terminal line, or nothing for the summary that Trainer logs at the end."""
    if "train_runtime" in logs:
        return ""
    parts = [text.format(logs[name]) for name, text in FORMATS.items() if name in logs]
    if "seconds_left" in logs:
        parts.append(f"{duration(logs['seconds_left'])} left")
    return f"step {step:>{len(str(max_steps))}}/{max_steps}  " + "  ".join(parts)


def duration(seconds: float) -> str:
    whole = math.ceil(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
