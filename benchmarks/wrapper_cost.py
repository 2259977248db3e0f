"""wrapper_cost.py: what finetune.train costs over a bare PyTorch loop: the same model, adapter, rows and optimizer, taken in turn.

python benchmarks/wrapper_cost.py [--rounds=5] [--steps=40] [--out=benchmarks/results/wrapper_cost_cpu.json]

Prints the median step of each side, their ratio pair by pair, and the wall time of --help and --dry_run.
"""

from __future__ import annotations

import datetime
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MODEL = ROOT / "examples/small_model"
BATCH, RATE, EVERY = 16, 1e-3, 5  # rows a step, learning rate, steps between two clock readings


def bench(rounds: int = 5, steps: int = 40, out: str = "") -> None:
    """Runs bare loop and finetune.train alternately and compares their step times."""
    import torch

    from surefoot.machine import probe

    with tempfile.TemporaryDirectory() as scratch:
        rows = _rows(Path(scratch) / "rows.jsonl")
        pairs = []
        for number in range(rounds):
            pairs.append((bare_step(rows, steps), wrapped_step(rows, steps, Path(scratch) / f"run{number}")))
            print(f"bare {pairs[-1][0] * 1e3:.1f} ms, finetune {pairs[-1][1] * 1e3:.1f} ms a step", flush=True)
    machine = probe()
    result = {
        "date": datetime.date.today().isoformat(),
        "bare_step_ms": round(statistics.median(bare for bare, _ in pairs) * 1e3, 2),
        "finetune_step_ms": round(statistics.median(ours for _, ours in pairs) * 1e3, 2),
        "ratio_median": round(statistics.median(ours / bare for bare, ours in pairs), 4),
        "ratios": [round(ours / bare, 4) for bare, ours in pairs],
        "help_s": _seconds(["--help"]),
        "dry_run_s": _seconds([f"--base_model={MODEL}", "--dry_run"]),
        "threads": torch.get_num_threads(),
        "machine": {"cpu_count": machine.cpu_count, "gpus": [gpu.name for gpu in machine.gpus], "versions": machine.versions},
    }
    print(json.dumps(result, indent=2))
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(result, indent=2) + "\n")


def _rows(path: Path) -> Path:
    """160 shipped rows of middling length, so that every batch is padded alike."""
    lines = sorted((ROOT / "examples/data/commonsense_train.jsonl").read_text().splitlines(), key=len)
    path.write_text("\n".join(lines[220:380]) + "\n")
    return path


def bare_step(rows: Path, steps: int) -> float:
    """Seconds a step of a plain PEFT + PyTorch loop, the median of stretches of 5 steps after the first."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

    from surefoot import tokens
    from surefoot.config import Config
    from surefoot.data.prepare import prepare
    from surefoot.data.rows import Collator
    from surefoot.inputs import inspect
    from surefoot.machine import probe
    from surefoot.plan import make_plan

    config = Config.parse({"base_model": str(MODEL), "data_path": str(rows), "val_set_size": 0, "cutoff_len": 512})
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    pad = tokens.settle(tokenizer)
    data = prepare(make_plan(config, probe(), inspect(config)).data, tokenizer).train
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager").to(device)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"))
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, steps)
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True, collate_fn=Collator(pad_token_id=pad.token_id))
    clock, done = [], 0
    while done < steps:
        for batch in loader:
            ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)
            model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
            if done % EVERY == 0:
                clock.append(_now(device))
    return _median_step(clock)


def wrapped_step(rows: Path, steps: int, folder: Path) -> float:
    """The same of finetune.train, from the times in its metrics.jsonl."""
    from finetune import train

    train(
        base_model=MODEL, data_path=rows, output_dir=folder, adapter_name="dora", lora_r=16, lora_alpha=32, lora_dropout=0, cutoff_len=512,
        val_set_size=0, batch_size=BATCH, per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=RATE, warmup_steps=2,
        logging_steps=EVERY, save_strategy="no", bf16=False,
    )  # fmt: skip
    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return _median_step([log["time"] for log in logs if "loss" in log and log["step"] % EVERY == 0])


def _now(device: str) -> float:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    return time.time()


def _median_step(clock: list[float]) -> float:
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(clock[1:])) / EVERY


def _seconds(words: list[str]) -> float:
    """The wall time of a whole finetune.py process, the median of 5."""

    def once() -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, str(ROOT / "finetune.py"), *words], check=True, capture_output=True)
        return time.perf_counter() - began

    return round(statistics.median(once() for _ in range(5)), 3)


if __name__ == "__main__":
    import fire

    fire.Fire(bench)
