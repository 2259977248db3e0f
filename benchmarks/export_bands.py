"""Where the parity bands come from: exports of several models that differ by rounding alone, and merges that are wrong.

python benchmarks/export_bands.py FOLDER [RUN ...]

FOLDER takes models of random weights in several shapes; each RUN is a run folder of finetune.py to measure as well.
Prints one JSON line for each export: model, format, what was done to it, and the parity numbers.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from surefoot import runtime  # noqa: E402
from surefoot.export import formats, judge, source, story  # noqa: E402
from surefoot.export.judge import Subject  # noqa: E402

SMALL = ROOT / "examples/small_model"
SHAPES = {"wide": (768, 2112, 4), "deep": (256, 704, 24)}  # hidden size, MLP, layers
WRONG: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "magnitude lost": lambda found: {name: tensor for name, tensor in found.items() if "magnitude" not in name},
    "scaled by 1.25": lambda found: {name: tensor * 1.25 if "lora_B" in name else tensor for name, tensor in found.items()},
    "one layer lost": lambda found: {
        name: tensor * 0 if "layers.1.mlp.down_proj.lora_B" in name else tensor for name, tensor in found.items()
    },
}


def adapted(folder: Path, shape: tuple[int, int, int]) -> Path:
    """A DoRA adapter on a base of that shape; B as large as some hundred steps make it (a tenth of the weights' change)."""
    hidden, mlp, layers = shape
    torch.manual_seed(0)
    base = folder / "base"
    shutil.copytree(SMALL, base, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(SMALL)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads = hidden, mlp, layers, hidden // 32
    config.num_key_value_heads = hidden // 64
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, use_dora=True, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.002 * torch.randn_like(parameter)
    model.save_pretrained(str(folder / "run"))
    AutoTokenizer.from_pretrained(SMALL).save_pretrained(folder / "run")
    return folder / "run"


def measure(name: str, run: Path, folder: Path) -> None:
    """Every format of the adapter, then the wrong merges in bf16."""
    found = source.read(str(run))
    for dtype in ("fp32", "fp16", "bf16"):
        out = folder / f"{name}-{dtype}"
        story.merge_adapter(found, story.Job(out, dtype, True, False, "", 4 << 30), lambda _: None)
        tell(name, dtype, "", found, Subject(out, dtype))
    for form in ("gguf-q8_0", "bnb-4bit"):
        out = folder / f"{name}-{form}"
        formats.of_adapter(found, formats.Job(out, form, True, False, "", ""), lambda _: None)
        file = next((path.name for path in out.glob("*.gguf")), None)
        tell(name, formats.BAND_OF[form], "", found, Subject(out, formats.BAND_OF[form], file, folder / f"{name}-bf16"))
    tensors = load_file(run / "adapter_model.safetensors")
    for what, change in WRONG.items():
        spoilt = folder / f"{name}-spoilt"
        shutil.rmtree(spoilt, ignore_errors=True)
        shutil.copytree(run, spoilt, ignore=shutil.ignore_patterns("checkpoint-*", "backend.json", "run.json"))
        changed = change(tensors)
        if len(changed) < len(tensors):
            config = json.loads((spoilt / "adapter_config.json").read_text())
            (spoilt / "adapter_config.json").write_text(json.dumps(config | {"use_dora": False}))
        save_file(changed, spoilt / "adapter_model.safetensors")
        out = folder / f"{name}-wrong"
        story.merge_adapter(source.read(str(spoilt), onto=found.onto), story.Job(out, "bf16", True, False, "", 4 << 30), lambda _: None)
        tell(name, "bf16", what, found, Subject(out, "bf16"))


def tell(name: str, form: str, what: str, found: source.Source, subject: Subject) -> None:
    record = judge.of_adapter(found, subject).record
    (numbers,) = record["against"].values()
    kept = {key: float(f"{numbers[key]:.3g}") for key in ("relative_max", "kl_mean", "kl_max", "widest_flip")}
    print(
        json.dumps(
            {"model": name, "format": form, "wrong": what, "verdict": record["verdict"], **kept, "greedy_equal": numbers["greedy_equal"]}
        )
    )


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 0
    runtime.quiet()
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for run in sys.argv[2:]:
        measure(Path(run).name, Path(run), folder)
    for name, shape in SHAPES.items():
        (folder / name).mkdir()
        measure(name, adapted(folder / name, shape), folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
