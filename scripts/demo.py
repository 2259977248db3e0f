"""demo.py: trains a DoRA adapter on the shipped commonsense rows and prints what it learned.

python scripts/demo.py [--model=small|smollm2] [--output_dir=output/demo]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the demo also runs from a checkout that is not installed

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
    score: Any  # evaluate.Score


def demo(model: str = "small", output_dir: str = "output/demo") -> None:
    """Scores the base model on held-out rows, trains DoRA through finetune.train, scores again and prints both."""
    from finetune import train
    from surefoot.training.metrics import duration

    if model not in SETTINGS:
        sys.exit(f"demo.py: --model={model} is not one of {', '.join(SETTINGS)}")
    setting = SETTINGS[model]
    path = _model_folder(model)
    rows = [json.loads(line) for line in HELDOUT_ROWS.read_text().splitlines()][: setting.heldout]
    print(f"base model {path.name}; {len(rows)} held-out rows, none of them in the training file", flush=True)
    before = measure(path, None, rows)
    folder = train(base_model=path, data_path=TRAIN_ROWS, output_dir=output_dir, **COMMON, **setting.flags)
    after = measure(path, folder, rows)
    seconds = json.loads((folder / "run.json").read_text())["summary"]["seconds"]
    print(f"\ntrained for {duration(seconds)}. On {len(rows)} held-out rows:\n{table(before, after)}\nadapter: {folder.resolve()}")


def _model_folder(model: str) -> Path:
    if model == "small":
        return ROOT / "examples/small_model"
    from scripts.fetch_smollm2 import fetch

    return fetch(str(ROOT / "models/smollm2"))


def measure(path: Path, adapter: Path | None, rows: list[dict[str, str]]) -> Result:
    """Answer loss and generated answers of the base model, or of the base with the adapter as plain PEFT loads it."""
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from surefoot import evaluate, tokens
    from surefoot.data import formats, loading, prompts

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(path)
    pad = tokens.settle(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    examples = [formats.normalise(loading.SourceRow(row, f"row {number}"), "text") for number, row in enumerate(rows, 1)]
    asked = [prompts.prompt_text(example, "alpaca") for example in examples]
    with tqdm(total=len(rows), desc="after" if adapter else "before", unit="row", disable=not sys.stderr.isatty()) as bar:
        score = evaluate.score_answers(model, tokenizer, rows, asked, tick=bar.update)
    return Result(evaluate.mean_loss(model, *_batches(rows, tokenizer, pad.token_id)), score)


def _batches(rows: list[dict[str, str]], tokenizer: Any, pad_token_id: int) -> tuple[Any, Any]:
    """The held-out rows as the trainer would see them, and their collator."""
    from surefoot.data.prepare import prepare
    from surefoot.data.rows import Collator
    from surefoot.plan import DataPlan

    plan = DataPlan(
        data_path=(str(HELDOUT_ROWS),), data_split="train", val_data_path=None, val_set_size=0, val_set_size_is_default=False,
        cutoff_len=1024, overlong="error", prompt_style="alpaca", text_field="text", train_on_inputs=False,
        audit="warn", cache_dir=None, seed=0,
    )  # fmt: skip
    held = prepare(plan, tokenizer).train
    return [held[index] for index in range(len(rows))], Collator(pad_token_id=pad_token_id)


def table(before: Result, after: Result) -> str:
    """Before and after, with the 95 % interval of the accuracy and what always giving the commonest answer would get."""
    lines = [f"{'':<24}{'before':>18}{'after':>18}"]
    lines.append(f"{'answer loss':<24}{before.loss:>18.3f}{after.loss:>18.3f}")
    lines.append(f"{'answers in form':<24}{_share(before.score.formed, before):>18}{_share(after.score.formed, after):>18}")
    lines.append(f"{'accuracy':<24}{_share(before.score.correct, before):>18}{_share(after.score.correct, after):>18}")
    low, high = after.score.interval()
    lines.append(f"{'':<24}{'':>18}{f'({low:.1%} to {high:.1%})':>18}")
    lines.append(f"{'commonest answer':<24}{'':>18}{_share(after.score.majority, after):>18}")
    return "\n".join(lines)


def _share(count: int, result: Result) -> str:
    return f"{count / result.score.total:.1%}"


if __name__ == "__main__":
    import fire

    fire.Fire(demo)
