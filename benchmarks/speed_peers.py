"""speed_peers.py: one peer of speed.py in a process of its own; its last line is JSON with the steps and the peak memory.

A bare loop (forward, backward, fused AdamW step) over rows.npz, adapters r=32 alpha=64 dropout 0 on seven projections, bf16 autocast:
  peft     bf16 base, sdpa            liger        the same with Liger's kernels
  seed     fp32 base, eager           unsloth      FastLanguageModel
  unsloth_sft: FastLanguageModel under trl's SFTTrainer, which packs the rows
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speed_works import ALPHA, CUTOFF, EVERY, RANK, TARGETS, Work

if TYPE_CHECKING:
    import torch

RECOMPUTES = {"use_reentrant": False}
Window = tuple[int, float, float]  # steps, real tokens a step, seconds a step


def measure(system: str, model: str, rows: str, work: str, steps: int) -> None:
    """Trains `steps` steps and prints {"windows": [Window, ...], "losses": [...], "peak_memory_gib": ...}."""
    if system.startswith("unsloth"):  # it patches what it finds, so that it wants to be imported first
        import unsloth  # noqa: F401
    case = Work(**json.loads(work))
    if system == "unsloth_sft":
        windows, losses = _sft(case, model, rows, steps)
    else:
        load = {"peft": _peft, "liger": _peft, "seed": _peft, "unsloth": _unsloth}[system]
        windows, losses = _bare_loop(load(case, model, system), _batches(case, rows, steps))
    print(json.dumps({"windows": windows, "losses": losses, "peak_memory_gib": round(_peak_memory_gib(), 3)}))


def _peft(work: Work, folder: str, system: str) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    loader = AutoModelForCausalLM
    if system == "liger":
        from liger_kernel.transformers import AutoLigerKernelForCausalLM

        loader = AutoLigerKernelForCausalLM
    options: dict[str, Any] = {
        "dtype": torch.float32 if system == "seed" else torch.bfloat16,
        "attn_implementation": "eager" if system == "seed" else "sdpa",
        "device_map": {"": _device()},
    }
    if work.quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = loader.from_pretrained(folder, **options)
    model.config.use_cache = False
    if work.quantization == "nf4":
        model = prepare_model_for_kbit_training(model, work.recompute, RECOMPUTES)
    elif work.recompute:
        model.gradient_checkpointing_enable(RECOMPUTES)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, use_dora=work.method == "dora", target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config).train()


def _unsloth(work: Work, folder: str, system: str) -> Any:
    import torch
    from unsloth import FastLanguageModel

    longest = work.length or (work.tokens if system == "unsloth_sft" else CUTOFF)
    model, _ = FastLanguageModel.from_pretrained(
        model_name=folder, max_seq_length=longest, dtype=torch.bfloat16, load_in_4bit=work.quantization == "nf4"
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0,
        bias="none",
        use_dora=work.method == "dora",
        target_modules=list(TARGETS),
        use_gradient_checkpointing="unsloth" if work.recompute else False,
        max_seq_length=longest,
    )
    return FastLanguageModel.for_training(model, use_gradient_checkpointing=work.recompute)


class Clock:
    """Reads the time after the first step and every EVERY steps, when the GPU has done them."""

    def __init__(self) -> None:
        self.windows: list[Window] = []
        self._tokens: list[int] = []
        self._step = 0
        self._began = _now()

    def step(self, tokens: int) -> None:
        self._step += 1
        self._tokens.append(tokens)
        if self._step == 1 or self._step % EVERY == 0:
            now, count = _now(), len(self._tokens)
            self.windows.append((count, sum(self._tokens) / count, (now - self._began) / count))
            self._began, self._tokens = now, []


def _bare_loop(model: Any, batches: Iterator[tuple[int, dict[str, torch.Tensor]]]) -> tuple[list[Window], list[float]]:
    """The windows of the steps, and the losses."""
    import torch

    device = _device()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    clock, losses = Clock(), []
    for tokens, batch in batches:
        inputs = {name: _on(device, tensor) for name, tensor in batch.items()}
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        clock.step(tokens)
    return clock.windows, [loss.item() for loss in losses]


def _batches(work: Work, file: str, steps: int) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Real tokens of a batch, and the batch: padded on the right to a multiple of 8 with a mask where the rows' lengths differ."""
    import torch

    rows = [torch.as_tensor(row, dtype=torch.int64) for row in _rows(file)]
    for step in range(steps):
        batch = [rows[(step * work.rows + index) % len(rows)] for index in range(work.rows)]
        if work.length:
            ids = torch.stack(batch)
            yield ids.numel(), {"input_ids": ids, "labels": ids}
            continue
        width = -(-max(map(len, batch)) // 8) * 8
        ids, mask = torch.zeros(work.rows, width, dtype=torch.int64), torch.zeros(work.rows, width, dtype=torch.int64)
        for index, row in enumerate(batch):
            ids[index, : len(row)], mask[index, : len(row)] = row, 1
        yield int(mask.sum()), {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask == 1, -100)}


def _rows(file: str) -> list[Any]:
    import numpy as np

    with np.load(file) as stored:
        return np.split(stored["ids"], stored["offsets"][1:-1])


def _sft(work: Work, folder: str, file: str, steps: int) -> tuple[list[Window], list[float]]:
    """trl's SFTTrainer over packs of work.tokens tokens; the losses are those of its log lines."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    clocks, tokens, losses = list[Clock](), [0], list[float]()

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clocks.append(Clock())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clocks[0].step(tokens[-1])

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    settings = SFTConfig(
        output_dir="sft", per_device_train_batch_size=1, gradient_accumulation_steps=1, max_steps=steps, learning_rate=1e-4, bf16=True,
        optim="adamw_torch_fused", logging_steps=EVERY, logging_first_step=True, save_strategy="no", report_to="none", packing=True,
        max_length=work.tokens,
        gradient_checkpointing=work.recompute, disable_tqdm=True, use_cpu=_device() == "cpu",
    )  # fmt: skip
    trainer = SFTTrainer(
        model=_unsloth(work, folder, "unsloth_sft"),
        args=settings,
        train_dataset=Dataset.from_dict({"input_ids": [row.tolist() for row in _rows(file)]}),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Watch()],
    )
    if _device() == "cuda" and not trainer.args.packing:
        raise SystemExit("speed_peers.py: Unsloth turned the packing off")
    step = trainer.training_step

    def counted(model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        mask = inputs.get("attention_mask")
        tokens.append(int(inputs["input_ids"].numel() if mask is None else mask.sum()))
        return step(model, inputs, *rest, **named)

    trainer.training_step = counted
    trainer.train()
    return clocks[0].windows, losses


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _on(device: str, tensor: torch.Tensor) -> torch.Tensor:
    """Copied without a wait for the GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device == "cuda" else tensor


def _now() -> float:
    """Seconds, when the GPU has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak_memory_gib() -> float:
    """The peak of the GPU's allocator, or of this process on a CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def words(system: str, work: Work, model: Path, rows: Path, steps: int) -> list[str]:
    """The command that measures a peer."""
    return [sys.executable, __file__, system, str(model), str(rows), json.dumps(dataclasses.asdict(work)), str(steps)]


def read(output: str) -> dict[str, Any]:
    """What measure() printed; libraries may print after it."""
    return dict(json.loads(next(line for line in reversed(output.splitlines()) if line.startswith('{"windows"'))))


if __name__ == "__main__":
    system, model, rows, work, steps = sys.argv[1:]
    measure(system, model, rows, work, int(steps))
