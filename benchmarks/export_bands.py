"""Where the parity bands come from: exports of several models that differ by rounding alone, and merges that are wrong.

python benchmarks/export_bands.py FOLDER [RUN ...] --out=benchmarks/results/export_bands_cpu.json    # again to go on after a stop

FOLDER takes models of random weights in several shapes, with LoRA and with DoRA; each RUN is a run folder of finetune.py to measure too,
and to merge wrongly (random adapters change so little that a wrong merge of one is no worse than its rounding).
--out gets a row for each export (model, format, what was done to it, the parity numbers) and, by format, the largest of the right ones and
the band: MARGIN times that, or times FLOOR where that is more, rounded up to two digits. surefoot/export/parity.py holds these bands, and a
test compares the two. Which wrong exports the bands let pass is counted as well: those are why the verdict also compares tensors
(surefoot/export/rounding.py).
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MARGIN = {"fp32": 4, "fp16": 4, "bf16": 4, "q8_0": 4, "nf4": 1.5}  # NF4 rounds by so much that a wider band would not tell anything
# The least that is taken for the largest difference: fp32's is the order of sums alone, which grows with a model's width and depth, and no
# wrong merge is below 400 times this
FLOOR = {"fp32": {"relative_max": 1e-4, "kl_mean": 1e-7}}
NUMBERS = ("relative_max", "kl_mean")
SMALL = ROOT / "examples/small_model"
SHAPES = {"wide": (768, 2112, 4), "deep": (256, 704, 24)}  # hidden size, MLP, layers
KEPT = ("relative_max", "kl_mean", "kl_max", "widest_flip", "greedy_equal", "prompts")
Tensors = dict[str, Any]
FORMS = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "q8_0": "gguf-q8_0", "nf4": "bnb-4bit"}  # band -> --format
SPOILT = ("fp32", "bf16", "q8_0", "nf4")  # the formats in which wrong exports are measured
SWAPPED = "two layers swapped"
WRONG: dict[str, Callable[[Tensors], Tensors]] = {
    "magnitude lost": lambda found: {name: tensor for name, tensor in found.items() if "magnitude" not in name},
    "scaled by 1.25": lambda found: {name: tensor * 1.25 if "lora_B" in name else tensor for name, tensor in found.items()},
    "one layer lost": lambda found: {
        name: tensor * 0 if "layers.1.mlp.down_proj.lora_B" in name else tensor for name, tensor in found.items()
    },
    SWAPPED: dict,  # of the merged model, not of the adapter
}


def adapted(folder: Path, shape: tuple[int, int, int], *, is_dora: bool) -> Path:
    """An adapter on a base of that shape; B as large as some hundred steps make it (a tenth of the weights' change)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if (folder / "run/adapter_model.safetensors").is_file():
        return folder / "run"
    hidden, mlp, layers = shape
    torch.manual_seed(0)
    shutil.rmtree(folder, ignore_errors=True)
    base = folder / "base"
    shutil.copytree(SMALL, base, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(SMALL)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads = hidden, mlp, layers, hidden // 32
    config.num_key_value_heads, config.head_dim = hidden // 64, 32
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, use_dora=is_dora, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.002 * torch.randn_like(parameter)
    model.save_pretrained(str(folder / "run"))
    AutoTokenizer.from_pretrained(SMALL).save_pretrained(folder / "run")
    return folder / "run"


def measure(name: str, run: Path, folder: Path, known: set[tuple[str, str]], prompts: str) -> Iterator[dict[str, Any]]:
    """A row for every format of the adapter and, where it was trained, for wrong exports of it, less the `known` (format, wrong)."""
    from surefoot.errors import UsageError
    from surefoot.export import judge, source

    wanted = {(form, what) for form in FORMS for what in ("", *(WRONG if form in SPOILT else ()))} - known
    found = source.read(str(run))
    wanted = {(form, what) for form, what in wanted if not what or found.record}
    if not wanted:
        return
    observed = judge.observe(found, prompts)
    whole = folder / f"{name}-fp32"
    if not whole.is_dir():
        export(found, whole, "fp32")
    for form, what in sorted(wanted):
        out = folder / f"{name}-wrong" if what else folder / f"{name}-{form}"
        try:
            if what == SWAPPED:
                export_model(swapped(whole, folder / f"{name}-spoilt"), out, form)
            elif not what:
                export(found, out, form)
            elif spoilt := spoiled(run, what, folder / f"{name}-spoilt"):
                export(source.read(str(spoilt), onto="seen" if found.onto == "none" else found.onto), out, form)
            else:
                continue
        except UsageError as error:  # a GGUF of a tokenizer that is not written here
            print(error, flush=True)
            continue
        file = next((path.name for path in out.glob("*.gguf")), None)
        (numbers,) = judge.judge(judge.Subject(out, form, file, whole), observed).record["against"].values()
        kept = {key: float(f"{numbers[key]:.3g}") if isinstance(numbers[key], float) else numbers[key] for key in KEPT}
        yield {"model": name, "method": found.method, "format": form, "wrong": what, **kept}


def export(found: Any, out: Path, form: str) -> None:
    from surefoot.export import formats, story

    if form in ("fp32", "fp16", "bf16"):
        story.merge_adapter(found, story.Job(out, form, True, False, "", 4 << 30), lambda _: None)
    else:
        formats.of_adapter(found, formats.Job(out, FORMS[form], True, False, "", ""), lambda _: None)


def export_model(folder: Path, out: Path, form: str) -> None:
    from surefoot.export import formats

    if form in ("fp32", "bf16"):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(folder, out)
    else:
        formats.of_model(folder, formats.Job(out, FORMS[form], True, False, "", ""), lambda _: None)


def swapped(whole: Path, folder: Path) -> Path:
    """The merged model with its layers 1 and 2 changed about."""
    from safetensors.torch import load_file, save_file

    other = {"1": "2", "2": "1"}
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    tensors = load_file(whole / "model.safetensors")
    named = {re.sub(r"(?<=layers\.)\d+", lambda found: other.get(found[0], found[0]), name): one for name, one in tensors.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def spoiled(run: Path, what: str, folder: Path) -> Path | None:
    """The adapter with what is wrong done to it; None where it has nothing of the kind."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(run / "adapter_model.safetensors")
    changed = WRONG[what](tensors)
    if what == "magnitude lost" and len(changed) == len(tensors):
        return None
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoint-*", "backend.json", "run.json", "merged-*"))
    if len(changed) < len(tensors):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": False}))
    save_file(changed, folder / "adapter_model.safetensors")
    return folder


def bands(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By format: of how many models, the largest right differences, and the band."""
    found: dict[str, Any] = {}
    right = [row for row in rows if not row["wrong"]]
    for form in dict.fromkeys(row["format"] for row in right):
        own = [row for row in right if row["format"] == form]
        largest = {key: max(row[key] for row in own) for key in NUMBERS}
        least = FLOOR.get(form, dict.fromkeys(NUMBERS, 0.0))
        found[form] = {
            "models": len(own),
            "largest": largest,
            "band": {key: rounded_up(MARGIN[form] * max(value, least[key])) for key, value in largest.items()},
        }
    return found


def rounded_up(value: float) -> float:
    """To two digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.1e}")


def outside(rows: list[dict[str, Any]], found: dict[str, Any]) -> dict[str, dict[str, str]]:
    """By what is wrong and format: how many of the wrong exports lie outside their format's band."""
    told: dict[str, dict[str, str]] = {}
    for what, form in itertools.product(WRONG, SPOILT):
        own = [row for row in rows if (row["wrong"], row["format"]) == (what, form)]
        caught = [row for row in own if any(row[key] > found[form]["band"][key] for key in NUMBERS)]
        told.setdefault(what, {})[form] = f"{len(caught)} of {len(own)}"
    return told


def bench(folder: str, *runs: str, out: str, prompts: str = "") -> None:
    """Measures what `out` lacks, an export at a time; `prompts`: a file of fewer prompts than the 32, for a large model on a CPU."""
    from surefoot import runtime

    runtime.quiet()
    place, kept = Path(folder), Path(out)
    place.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = json.loads(kept.read_text())["rows"] if kept.is_file() else []
    made: dict[str, Callable[[], Path]] = {Path(run).name: partial(Path, run) for run in runs}
    for (name, shape), is_dora in itertools.product(SHAPES.items(), (False, True)):
        title = f"{name}-{'dora' if is_dora else 'lora'}"
        made[title] = partial(adapted, place / title, shape, is_dora=is_dora)
    for name, make in made.items():
        known = {(row["format"], row["wrong"]) for row in rows if row["model"] == name}
        for row in measure(name, make(), place, known, prompts):
            print(json.dumps(row), flush=True)
            rows.append(row)
            write(kept, rows)
    write(kept, rows)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    from surefoot import machine

    here, found = machine.probe(), bands(rows)
    record = {"margin": MARGIN, "floor": FLOOR, "machine": {"gpu": here.gpu.name if here.gpu else None, "cpu": here.cpu_name}}
    record |= {"versions": here.versions, "bands": found, "wrong_exports_outside": outside(rows, found), "rows": rows}
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    import fire

    fire.Fire(bench)
