"""evaluate.py: how good is a trained model, and how much better than its base? Scores with 95 % intervals, as a table and as JSON.

python scripts/evaluate.py --lora_weights=RUN --data_path=examples/data/commonsense_heldout.jsonl      # any rows with answers
python scripts/evaluate.py --lora_weights=RUN --dataset boolq piqa --data_dir=dataset                  # the commonsense tasks
python scripts/evaluate.py --config=configs/run_bnb.yaml --split=val                                   # the run's own held-out rows
python scripts/evaluate.py --lora_weights=RUN --lm_eval arc_easy hellaswag                             # EleutherAI's harness
python scripts/evaluate.py --compare one/evaluation.json two/evaluation.json                           # results side by side
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not scripts/: lm-eval imports a package called evaluate, which must not be this file

from surefoot import script  # noqa: E402
from surefoot.errors import UsageError  # noqa: E402
from surefoot.script import flag  # noqa: E402

USAGE = f"""\
{__doc__}
The commonsense tasks are judged as LLM-Adapters' commonsense_evaluate.py does: the first allowed answer in the generated text counts. Its
flags are accepted (--model --adapter --dataset --base_model --batch_size --lora_weights --load_8bit); --num_beams=4 is its search. Prompts
are those of the run's own training (run.json). --scoring=loglikelihood takes the likeliest of the offered answers instead, in one forward
pass a row: faster, and another measure, since it never asks whether the model answers in form by itself.
Exit codes: 0 done; 2 usage; 3 rows that cannot be read; 5 a model or a library refused."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    lora_weights: str | None = flag(None, "the trained adapter: a run folder, a checkpoint, or any PEFT adapter; or a merged model")
    base_model: str | None = flag(None, "folder or Hub id; default: the run's own. Alone: this model is evaluated")
    config: str | None = flag(None, "a run file of finetune.py, whose output_dir is taken for --lora_weights")
    model: str | None = flag(None, "a name for the table (older recipes: LLaMA3-8B)")
    adapter: str | None = flag(None, "a name for the table (older recipes: DoRA)")
    dataset: tuple[str, ...] | None = flag(None, "commonsense tasks, or all of them that --data_dir holds: all")
    data_dir: str = flag("dataset", "where they lie: NAME/test.json or test_NAME.jsonl, also .gz")
    data_path: tuple[str, ...] | None = flag(None, "files of rows with answers (json, jsonl, csv, parquet)")
    split: str | None = flag(None, "rows of the run itself: val, held out from its training", choices=("val",))
    metrics: tuple[str, ...] | None = flag(
        None,
        "default: accuracy and perplexity for commonsense rows, else exact_match, rougeL, sari, perplexity",
        choices=("accuracy", "exact_match", "rougeL", "sari", "perplexity"),
    )
    scoring: str = flag("generate", "generate, or the faster loglikelihood", choices=("generate", "loglikelihood"))
    with_base: bool = flag(True, "evaluate the base model too, and show the rows that flipped")
    limit: int | None = flag(None, "the first so many rows of each set", low=1)
    batch_size: int = flag(32, "rows at a time", low=1)
    max_new_tokens: int = flag(32, "tokens generated at most", low=1)
    num_beams: int = flag(1, "beams of the search; 1 is greedy", low=1)
    dtype: str = flag("auto", "of weights and activations; auto: bf16 on a GPU, fp32 on a CPU", choices=("auto", "bf16", "fp16", "fp32"))
    load_8bit: bool = flag(False, "the base in int8; default: as the run had it")
    load_4bit: bool = flag(False, "the base in NF4; default: as the run had it")
    prompt_style: str | None = flag(None, "default: the run's own")
    show: int = flag(3, "flipped rows shown of each kind", low=0)
    out: str | None = flag(None, "the JSON file; default: evaluation.json in --lora_weights, else here. Answers: .jsonl beside it")
    lm_eval: tuple[str, ...] | None = flag(None, "tasks of lm-eval, which must be installed")
    lm_eval_tasks: str | None = flag(None, "a folder of your own task files for it")
    compare: tuple[str, ...] | None = flag(None, "JSON files of earlier evaluations to lay side by side; nothing is evaluated")


def run(flags: Flags) -> None:
    """Evaluates, or compares.

    Raises:
        SurefootError: a flag, a file or a model that cannot be used.
    """
    from surefoot import inference
    from surefoot.evaluation import report, texts

    if flags.compare:
        print(script.table(report.comparison([report.read(path) for path in flags.compare])))
        return
    source = inference.find_asked(flags)
    if not (flags.dataset or flags.data_path or flags.split or flags.lm_eval):
        raise UsageError("nothing to evaluate on: give --data_path, --dataset, --split=val or --lm_eval")
    out = Path(flags.out or (source.adapter or Path(flags.lora_weights or ".")) / "evaluation.json")
    if not out.parent.is_dir():
        raise UsageError(f"--out={out}: {out.parent} is no folder")
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise UsageError(f"--out={out} {'is a folder: name a .json file in it' if out.is_dir() else 'cannot be written'}")
    sets = _sets(flags, source)
    if any("rougeL" in (flags.metrics or one.metrics()) for one in sets):
        texts.rouge_scorer()
    result, rows = evaluate(flags, source, sets)
    print("\n".join(_lines(flags, result, rows)))
    print(f"\nwritten: {', '.join(map(str, _write(out, result, rows)))} ({result['seconds']:.0f} s)")


def _write(out: Path, result: dict[str, Any], rows: list[dict[str, Any]]) -> list[Path]:
    """The result, its answers beside it, and the run's report anew where it shows them; returns what was written."""
    from surefoot.report import page

    answers, report = out.with_suffix(".jsonl"), out.parent / "report.html"
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    answers.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    shown = out.name == "evaluation.json" and report.is_file()
    return [out, answers, *([page.write(out.parent)] if shown else [])]


def _lines(flags: Flags, result: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    from surefoot.evaluation import report

    lines = [script.table(report.own_table(result))] if result["sets"] else []
    for task, metrics in result.get("lm_eval", {}).items():
        lines.append(f"lm-eval {task}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    for metric in report.SHARES:
        judged = [row for row in rows if "base" in row and metric in row.get("trained", {})]
        lines += [f"\n{metric}:", *report.flips(judged, metric, flags.show)] if judged else []
    return lines


def _sets(flags: Flags, source: Any) -> list[Any]:
    from surefoot import row_sets

    sets = []
    if flags.dataset:
        sets += row_sets.of_tasks(flags.dataset, Path(flags.data_dir))
    if flags.data_path:
        sets += row_sets.of_files(flags.data_path)
    if flags.split:
        sets += row_sets.held_out(source)
    names = [one.name for one in sets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"two sets are called {', '.join(twice)}: evaluate them in two calls, each with its own --out")
    return [one._replace(examples=one.examples[: flags.limit]) for one in sets]


def evaluate(flags: Flags, source: Any, sets: Sequence[Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result as it is written, and a record of each row."""
    from surefoot import inference, machine, measure
    from surefoot.artifacts import code_state
    from surefoot.evaluation import harness
    from surefoot.generate import Sampling
    from surefoot.ops.served import adapters_off

    began = time.monotonic()
    opened = inference.open_model(source, dtype=flags.dtype)
    how = measure.How(
        scoring=flags.scoring,
        sampling=Sampling(max_new_tokens=flags.max_new_tokens, num_beams=flags.num_beams),
        batch_size=flags.batch_size,
    )
    is_trained = source.adapter is not None or bool(source.record)
    sides: dict[str, list[Any]] = {"trained" if is_trained else "base": []}
    if source.adapter is not None and flags.with_base:
        sides["base"] = []
    for side, measured in sides.items():
        with adapters_off(opened.model) if side == "base" else nullcontext():
            for one in sets:
                metrics = flags.metrics or one.metrics()
                passes = ("perplexity" in metrics) + any(metric != "perplexity" for metric in metrics)
                with script.progress(passes * len(one.examples), f"{side} {one.name}") as tick:
                    measured.append(measure.measure(opened, one, metrics, how, tick))
    here = machine.probe()
    result: dict[str, Any] = {
        "label": "-".join(filter(None, (flags.model, flags.adapter))) or source.name(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "identity": source.identity() | {"dtype": opened.dtype, "layers_left_to_peft": opened.kept},
        "settings": {name: getattr(flags, name) for name in ("scoring", "batch_size", "max_new_tokens", "num_beams", "limit")},
        "machine": {"gpu": here.gpu.name if here.gpu else None, "cpu": here.cpu_name, "versions": here.versions},
        "code": code_state(),
        "sets": measure.scored(sets, sides),
    }
    if flags.lm_eval:
        result["lm_eval"] = harness.run(
            opened.model, opened.tokenizer, flags.lm_eval, folder=flags.lm_eval_tasks, batch_size=flags.batch_size, limit=flags.limit
        )
    return result | {"seconds": round(time.monotonic() - began, 1)}, measure.by_row(sets, sides)


if __name__ == "__main__":
    sys.exit(script.main(Flags, USAGE, run))
