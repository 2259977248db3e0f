"""guard_cost.py: what finite-or-stop costs a training step: blocks of steps with the guard and without it, in turn, in one run.

python benchmarks/guard_cost.py --base_model=FOLDER --data=ROWS.jsonl --out=FILE.json [--rows=4] [--accumulation=1]

The guard weighs most in short steps of one forward pass. Every batch is padded to --width tokens, so that all steps do the same work;
without the guard a step takes transformers' own way. A call adds a case to --out.
"""

from __future__ import annotations

import datetime
import functools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BLOCK = 5  # steps between two clock readings


def bench(base_model: str, data: str, out: str = "", rows: int = 4, accumulation: int = 1, width: int = 256, pairs: int = 12) -> None:
    """Prints and writes the median step of both kinds and the ratio pair by pair."""
    from finetune import train

    times: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        _alternate(times, width)
        folder = train(
            base_model=base_model, data_path=data, output_dir=Path(scratch) / "run", adapter_name="lora",
            lora_dropout=0, stage=2, batch_size=rows * accumulation, per_device_train_batch_size=rows,
            max_steps=BLOCK * 2 * (pairs + 1), val_set_size=0, save_strategy="no",
            report_to="none", logging_steps=10_000, cutoff_len=width, learning_rate=1e-4, data_cache=False,
        )  # fmt: skip
        machine = json.loads((folder / "run.json").read_text())["plan"]["machine"]
    guarded, bare = times[2::2], times[3::2]  # the first pair warms up; the last block has no end
    ratios = [one / other for one, other in zip(guarded, bare, strict=False)]
    result = {
        "date": datetime.date.today().isoformat(),
        "guarded_step_ms": round(statistics.median(guarded) * 1e3, 3),
        "bare_step_ms": round(statistics.median(bare) * 1e3, 3),
        "ratio_median": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "rows": rows,
        "accumulation": accumulation,
        "width": width,
        "adapter": "lora",
        "base_model": Path(base_model).name,
        "machine": machine,
    }
    print(json.dumps({key: value for key, value in result.items() if key != "machine"}))
    if out:
        earlier = json.loads(Path(out).read_text()) if Path(out).is_file() else []
        Path(out).write_text(json.dumps([*earlier, result], indent=2) + "\n")


def _alternate(times: list[float], width: int) -> None:
    """Lets the trainer's guard work in even blocks only, and reads the clock at the end of each block."""
    import torch
    from transformers import Trainer

    from surefoot.data import rows
    from surefoot.training.loop import SurefootTrainer

    guarded_step, guarded_norm = SurefootTrainer.training_step, SurefootTrainer._get_grad_norm
    began = [0.0, -1.0]  # the clock, and the step it was read at
    rows.Collator = functools.partial(rows.Collator, multiple_of=width)  # type: ignore[misc, assignment]

    def is_guarded(trainer: Any) -> bool:
        return trainer.state.global_step // BLOCK % 2 == 0

    def step(self: Any, model: Any, inputs: Any, count: Any = None) -> Any:
        if self.state.global_step % BLOCK == 0 and self.state.global_step != began[1]:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter()
            if self.state.global_step:
                times.append((now - began[0]) / BLOCK)
            began[:] = now, self.state.global_step
        if is_guarded(self):
            return guarded_step(self, model, inputs, count)
        del inputs["lengths"], inputs["rows"]
        return Trainer.training_step(self, model, inputs, count)

    def norm(self: Any, model: Any, grad_norm: Any = None) -> Any:
        if is_guarded(self):
            return guarded_norm(self, model, grad_norm=grad_norm)
        return Trainer._get_grad_norm(self, model, grad_norm=grad_norm)

    SurefootTrainer.training_step, SurefootTrainer._get_grad_norm = step, norm  # type: ignore[method-assign]


if __name__ == "__main__":
    import fire

    fire.Fire(bench)
