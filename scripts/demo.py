"""demo.py: trains a DoRA adapter on the shipped commonsense rows and prints what it learned.

python scripts/demo.py [--model=small|smollm2] [--output_dir=output/demo]
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the demo also runs from a checkout that is not installed

from surefoot import script  # noqa: E402
from surefoot.script import flag  # noqa: E402

TRAIN_ROWS, HELDOUT_ROWS = ROOT / "examples/data/commonsense_train.jsonl", ROOT / "examples/data/commonsense_heldout.jsonl"


class Setting(NamedTuple):
    """Flags that fit the model to two CPU cores, and how many held-out rows are scored."""

    flags: dict[str, Any]
    heldout: int


SETTINGS = {
    "small": Setting({"num_epochs": 3, "lora_r": 16, "lora_alpha": 32, "per_device_train_batch_size": 16}, 400),
    "smollm2": Setting({"num_epochs": 1, "lora_r": 16, "lora_alpha": 32, "per_device_train_batch_size": 8}, 200),
}
COMMON = {
    "adapter_name": "dora", "lora_dropout": 0.0, "batch_size": 16, "learning_rate": 1e-3, "lr_scheduler_type": "linear",
    "weight_decay": 0.0, "cutoff_len": 512, "val_set_size": 0, "save_strategy": "no", "group_by_length": True, "overwrite": True,
}  # fmt: skip


class Result(NamedTuple):
    loss: float  # nats per answer token
    accuracy: dict[str, Any]  # as measure.scores() has it


@dataclass(frozen=True, kw_only=True)
class Flags:
    model: str = flag("small", "small: the shipped 4M-parameter model; smollm2: SmolLM2-135M-Instruct", choices=tuple(SETTINGS))
    output_dir: str = flag("output/demo", "the run folder, in place of an earlier demo's")


def run(flags: Flags) -> None:
    """Scores the base model on held-out rows, trains DoRA through finetune.train, scores again and prints both."""
    from finetune import train
    from surefoot.training.metrics import duration

    setting = SETTINGS[flags.model]
    path = _model_folder(flags.model)
    print(f"base model {path.name}; {setting.heldout} held-out rows, none of them in the training file", flush=True)
    before = measure(path, None, setting.heldout)
    folder = train(base_model=path, data_path=TRAIN_ROWS, output_dir=flags.output_dir, **COMMON, **setting.flags)
    after = measure(path, folder, setting.heldout)
    seconds = json.loads((folder / "run.json").read_text())["summary"]["seconds"]
    print(f"\ntrained for {duration(seconds)}. On {setting.heldout} held-out rows:\n{table(before, after)}\nadapter: {folder.resolve()}")


def _model_folder(model: str) -> Path:
    if model == "small":
        return ROOT / "examples/small_model"
    from scripts.fetch_smollm2 import fetch

    return fetch(str(ROOT / "models/smollm2"))


def measure(path: Path, adapter: Path | None, count: int) -> Result:
    """Answer loss and generated answers of the base model, or of the base with the adapter, on the first `count` held-out rows."""
    from surefoot import inference, measure, row_sets
    from surefoot.generate import Sampling

    opened = inference.open_model(inference.find(str(path), adapter and str(adapter), "alpaca"), dtype="fp32")
    sets = row_sets.by_task(row_sets.of_file(HELDOUT_ROWS)[:count], "held out")
    how = measure.How(scoring="generate", sampling=Sampling(max_new_tokens=12), batch_size=32)
    with script.progress(2 * count, "after" if adapter else "before") as tick:
        said = [measure.measure(opened, one, ("accuracy", "perplexity"), how, tick) for one in sets]
    scores = measure.scores(*measure.joined(sets, said))
    return Result(scores["perplexity"]["nats_per_token"], scores["accuracy"])


def table(before: Result, after: Result) -> str:
    """Before and after, with the 95 % interval of the accuracy and what always giving the commonest answer would get."""
    lines = [f"{'':<24}{'before':>18}{'after':>18}"]
    lines.append(f"{'answer loss':<24}{before.loss:>18.3f}{after.loss:>18.3f}")
    one, two = before.accuracy, after.accuracy
    for title, key in (("answers in form", "formed"), ("accuracy", "correct")):
        lines.append(f"{title:<24}{one[key] / one['rows']:>18.1%}{two[key] / two['rows']:>18.1%}")
    interval = f"({two['low']:.1%} to {two['high']:.1%})"
    lines.append(f"{'':<24}{'':>18}{interval:>18}")
    lines.append(f"{'commonest answer':<24}{'':>18}{two['commonest'] / two['rows']:>18.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(script.main(Flags, __doc__, run))
