"""llama8b_shape.py: finetune.py on a model of Llama-3.1-8B's shape with random weights, on real commonsense rows.

python benchmarks/llama8b_shape.py --data=ROWS.jsonl --tokenizer=FOLDER --work=/tmp/llama8b --out=benchmarks/results/llama8b_h200.json
python benchmarks/llama8b_shape.py ... --shape=tiny     # the same on a CPU, so that the script cannot rot

Each case is a real `python finetune.py` process; its speed is read from its own metrics.jsonl (median of the lines after the first two).
"""

from __future__ import annotations

import datetime
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHAPES: dict[str, dict[str, Any]] = {
    "llama8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0, "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 8192, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    },
}  # fmt: skip
COMMON = (
    "--cutoff_len=512 --lora_r=32 --lora_alpha=64 --lora_dropout=0 --val_set_size=0 --save_strategy=no --logging_steps=2 "
    "--learning_rate=1e-4 --report_to=none --overwrite"
).split()
CASES: dict[str, list[str]] = {
    "dora_stage1_recipe_2_rows": ["--adapter_name=dora", "--batch_size=16", "--per_device_train_batch_size=2", "--max_steps=12"],
    "dora_stage1_4_rows": ["--adapter_name=dora", "--batch_size=16", "--per_device_train_batch_size=4", "--max_steps=20"],
    "lora_stage1_4_rows": ["--adapter_name=lora", "--batch_size=16", "--per_device_train_batch_size=4", "--max_steps=20"],
    "dora_stage1_16_rows_recompute": [
        "--adapter_name=dora", "--batch_size=16", "--per_device_train_batch_size=16", "--max_steps=12", "--use_gradient_checkpointing",
    ],
    "dora_stage2_4_rows": ["--adapter_name=dora", "--batch_size=16", "--per_device_train_batch_size=4", "--max_steps=20", "--stage=2"],
    "dora_fp16_4_rows": [
        "--adapter_name=dora", "--batch_size=16", "--per_device_train_batch_size=4", "--max_steps=12", "--bf16=False", "--fp16=True",
    ],
    "qdora_4_rows": ["--adapter_name=dora", "--batch_size=16", "--per_device_train_batch_size=4", "--max_steps=12", "--load_4bit=True"],
}  # fmt: skip


def bench(data: str, tokenizer: str, work: str, out: str, shape: str = "llama8b", cases: str = "") -> None:
    """Makes the model once, runs every case (or the comma-separated ones) and writes one JSON file."""
    folder = Path(work)
    model = make_model(folder / shape, shape, Path(tokenizer))
    chosen = cases.split(",") if cases else list(CASES)
    results = []
    for name in chosen:
        results.append(run_case(name, model, data, folder / "runs" / name))
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps({"date": datetime.date.today().isoformat(), "shape": shape, "results": results}, indent=2) + "\n")
    for row in results:
        print(json.dumps({key: row[key] for key in ("case", "rc", "tokens_per_s", "peak_memory_gib", "first_loss", "last_loss")}))


def make_model(folder: Path, shape: str, tokenizer: Path) -> Path:
    """Random bf16 weights (std 0.02) in safetensors, with the given tokenizer's files beside them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / "config.json").is_file():
        return folder
    began = time.perf_counter()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape]))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, folder / name)
    print(f"made {folder} in {time.perf_counter() - began:.0f} s", flush=True)
    return folder


def run_case(name: str, model: Path, data: str, out: Path) -> dict[str, Any]:
    """One finetune.py process: its exit code, speed, memory and losses."""
    command = [
        sys.executable,
        str(ROOT / "finetune.py"),
        f"--base_model={model}",
        f"--data_path={data}",
        f"--output_dir={out}",
        *COMMON,
        *CASES[name],
    ]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    row: dict[str, Any] = {"case": name, "rc": done.returncode, "wall_s": round(time.perf_counter() - began, 1)}
    row |= {"tokens_per_s": None, "peak_memory_gib": None, "first_loss": None, "last_loss": None}
    if done.returncode != 0:
        return row | {"message": (done.stderr or done.stdout)[-600:]}
    logs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [log for log in logs if "tokens_per_s" in log]
    record = json.loads((out / "run.json").read_text())
    steady = steps[2:] or steps
    return row | {
        "flags": CASES[name],
        "tokens_per_s": round(statistics.median(log["tokens_per_s"] for log in steady), 1),
        "mfu": statistics.median(log.get("mfu", 0.0) for log in steady),
        "peak_memory_gib": record["summary"]["peak_memory_gib"],
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "machine": record["plan"]["machine"],
    }


if __name__ == "__main__":
    import fire

    fire.Fire(bench)
