"""speed_peers.py: one peer of speed.py in a process of its own; its last line is JSON with the steps and the peak memory.

A bare loop (forward, backward, fused AdamW step) over rows.npz, adapters r=32 alpha=64 dropout 0 on seven projections, bf16 autocast:
  peft     bf16 base, sdpa            liger        the same with Liger's kernels
  seed     fp32 base, eager           unsloth      FastLanguageModel
  unsloth_sft: FastLanguageModel under trl's SFTTrainer, which packs the rows
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speed_works import ALPHA, CUTOFF, RANK, TARGETS, Work

if TYPE_CHECKING:
    import torch

RECOMPUTES = {"use_reentrant": False}


def measure(system: str, model: str, rows: str, work: str, steps: int) -> None:
    """Trains `steps` steps and prints {"steps": [[real tokens, seconds], ...], "losses": [...], "peak_memory_gib": ...}."""
    if system.startswith("unsloth"):  # it patches what it finds, so that it wants to be imported first
        import unsloth  # noqa: F401
    case = Work(**json.loads(work))
    if system == "unsloth_sft":
        taken, losses = _sft(case, model, rows, steps)
    else:
        load = {"peft": _peft, "liger": _peft, "seed": _peft, "unsloth": _unsloth}[system]
        taken, losses = _bare_loop(load(case, model, system), _batches(case, rows, steps))
    print(json.dumps({"steps": taken, "losses": losses, "peak_memory_gib": round(_peak_memory_gib(), 3)}))


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


def _bare_loop(model: Any, batches: Iterator[tuple[int, dict[str, torch.Tensor]]]) -> tuple[list[tuple[int, float]], list[float]]:
    """Real tokens and seconds of each step, and the losses."""
    import torch

    device = _device()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    taken, losses = [], []
    for tokens, batch in batches:
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        _synchronize()
        began = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _synchronize()
        taken.append((tokens, time.perf_counter() - began))
        losses.append(loss.item())
    return taken, losses


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


def _sft(work: Work, folder: str, file: str, steps: int) -> tuple[list[tuple[int, float]], list[float]]:
    """trl's SFTTrainer over packs of work.tokens tokens; a step's seconds run from the end of the one before."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    ends, tokens, losses = [time.perf_counter()], list[int](), list[float]()

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            _synchronize()
            ends[0] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            _synchronize()
            ends.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    settings = SFTConfig(
        output_dir="sft", per_device_train_batch_size=1, gradient_accumulation_steps=1, max_steps=steps, learning_rate=1e-4, bf16=True,
        optim="adamw_torch_fused", logging_steps=1, save_strategy="no", report_to="none", packing=True, max_length=work.tokens,
        gradient_checkpointing=work.recompute, disable_tqdm=True, use_cpu=_device() == "cpu",
    )  # fmt: skip
    trainer = SFTTrainer(
        model=_unsloth(work, folder, "unsloth_sft"),
        args=settings,
        train_dataset=Dataset.from_dict({"input_ids": [row.tolist() for row in _rows(file)]}),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Clock()],
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
    seconds = [end - start for start, end in itertools.pairwise(ends)]
    return list(zip(tokens, seconds, strict=True)), losses


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
    return dict(json.loads(next(line for line in reversed(output.splitlines()) if line.startswith('{"steps"'))))


if __name__ == "__main__":
    system, model, rows, work, steps = sys.argv[1:]
    measure(system, model, rows, work, int(steps))
