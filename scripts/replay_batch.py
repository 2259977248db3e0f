"""replay_batch.py: runs the batch of a bad step again under each attention backend and says which one is at fault.

python scripts/replay_batch.py RUN/bad_steps/step-12 [--base_model FOLDER] [--json]

Reads what finetune.py kept of a step that was not finite: record.json, the batch of each rank and, for an adapter, its weights;
and run.json of the run.
Exit codes: 0 replayed; 2 the folder cannot be used; 5 the model cannot be loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from surefoot import script
from surefoot.errors import UsageError
from surefoot.json_file import read_json
from surefoot.plan import AdapterPlan, ModelPlan
from surefoot.script import REQUIRED, flag
from surefoot.verdicts import SDPA_KERNELS

BACKENDS = ("eager", *(f"sdpa_{kernel}" for kernel in SDPA_KERNELS), "flash_attention_2")
PACKED_BACKENDS = (*BACKENDS, "varlen")


class Kept(NamedTuple):
    """What the run left: the record of the step, the run's plan, and the batches' files."""

    folder: Path
    record: dict[str, Any]
    plan: dict[str, Any]
    files: tuple[Path, ...]


class Replay(NamedTuple):
    """One backend over all batches: finite, not finite or unavailable, and the numbers of its first bad batch (else of the last)."""

    backend: str
    state: str
    loss: float | None = None
    grad_norm: float | None = None
    culprit: str = ""


@dataclass(frozen=True, kw_only=True)
class Flags:
    step: str = flag(REQUIRED, "the folder of a kept step, such as RUN/bad_steps/step-12", is_bare=True)
    base_model: str = flag("", "where the base model lies on this machine, if not where the run found it")
    json: bool = flag(False, "one JSON object on stdout in place of the lines")


def replay(flags: Flags) -> None:
    """Replays a kept bad step and prints a line per backend and the finding."""
    kept = read(Path(flags.step))
    results = run(kept, flags.base_model)
    text = finding(results, kept)
    if flags.json:
        _print_json(kept, results, text)
        return
    print(f"step {kept.record['step']}: {kept.record['reason']}; {len(kept.files)} batch file{'s' * (len(kept.files) != 1)}")
    for result in results:
        numbers = f"loss {result.loss:.4g}  grad_norm {result.grad_norm:.4g}" if result.loss is not None else ""
        print(f"{result.backend:<20}{result.state:<14}{numbers:<36}{result.culprit}".rstrip())
    print(text)


def read(folder: Path) -> Kept:
    """The kept step.

    Raises:
        UsageError: a file of it is missing or damaged.
    """
    content = []
    for path in (folder / "record.json", folder.parent.parent / "run.json"):
        content.append(read_json(path))
        if not content[-1]:
            raise UsageError(f"{folder} is no kept step: {path} is missing. Give a folder such as RUN/bad_steps/step-12")
    files = tuple(sorted(folder.glob("batch-*.safetensors")))
    if not files:
        raise UsageError(f"{folder} holds no batch-*.safetensors")
    return Kept(folder, content[0], content[1]["plan"], files)


def run(kept: Kept, base_model: str) -> list[Replay]:
    """Every backend over every batch."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from surefoot.training import bad_steps

    try:
        tensors = [load_file(file) for file in kept.files]
    except SafetensorError as error:
        raise UsageError(f"{kept.folder}: a batch file is damaged ({error})") from None
    model = load(kept, base_model, vocabulary_size=max(int(batch["input.input_ids"].max()) for batch in tensors) + 1)
    batches = [bad_steps.from_files(batch, model.device) for batch in tensors]
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kept.plan["train"]["precision"])
    results = []
    for backend in PACKED_BACKENDS if "cu_seq_lens_q" in batches[0].inputs else BACKENDS:
        with contextlib.ExitStack() as scope:
            try:
                _switch(model, backend, scope)
                outcomes = []
                for batch in batches:
                    outcomes.append(bad_steps.rerun(model, batch, lambda: _autocast(model.device.type, precision)))
                    if outcomes[-1].culprit is not None:
                        break
            except (RuntimeError, ValueError, ImportError) as error:
                results.append(Replay(backend, "unavailable", culprit=str(error).strip().splitlines()[0][:80]))
                continue
        last = outcomes[-1]
        where = f"first in {last.culprit.module} ({last.culprit.phase})" if last.culprit else ""
        results.append(Replay(backend, "not finite" if last.culprit else "finite", last.loss, last.grad_norm, where))
    return results


def load(kept: Kept, base_model: str, vocabulary_size: int) -> Any:
    """The base model with the adapter that met the step; without one, the run's newest checkpoint or the base itself."""
    import torch
    from peft import PeftModel

    from surefoot import adapters, runtime
    from surefoot.backends import hf

    plan, adapter = ModelPlan(**kept.plan["model"]), _adapter(kept.plan["adapter"])
    path = base_model or plan.path
    checkpoints = sorted(kept.folder.parent.parent.glob("checkpoint-*"), key=lambda place: int(place.name[11:]))
    if adapter.method == "full" and checkpoints:
        path = str(checkpoints[-1])
    runtime.quiet()
    plan = dataclasses.replace(plan, path=path, attn_implementation="eager", enable_torch_compile=False)
    model = hf.load_model(plan, vocabulary_size, None)
    if (kept.folder / "adapter_config.json").is_file():
        model = PeftModel.from_pretrained(model, kept.folder, is_trainable=True)
    else:
        model = adapters.attach(model, adapter, seed=0)
    return model.to("cuda" if torch.cuda.is_available() and plan.quantization == "none" else model.device)


def _adapter(values: dict[str, Any]) -> AdapterPlan:
    targets = values["target_modules"]
    return AdapterPlan(**{**values, "target_modules": tuple(targets) if targets else None})


def _switch(model: Any, backend: str, scope: contextlib.ExitStack) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if backend == "varlen":
        from surefoot.attention import packed

        packed.use_varlen(model)
        return
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation(backend.partition("_")[0] if backend.startswith("sdpa") else backend)
    if backend.startswith("sdpa"):
        names = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}
        scope.enter_context(sdpa_kernel([getattr(SDPBackend, names[backend.removeprefix("sdpa_")])]))


def _autocast(device: str, dtype: Any) -> contextlib.AbstractContextManager[Any]:
    import torch

    return torch.autocast(device, dtype=dtype) if dtype is not None else contextlib.nullcontext()


def finding(results: list[Replay], kept: Kept) -> str:
    """Which backend is at fault, in a sentence."""
    bad = [result for result in results if result.state == "not finite"]
    good = [result.backend for result in results if result.state == "finite"]
    train = kept.plan["train"]
    used = train["packed_attention"] if train.get("packing") == "on" else kept.plan["model"]["attn_implementation"]
    if not bad:
        return f"not reproduced: every backend that runs here is finite (the run used {used}). The machine or its state may be at fault"
    if not good:
        return f"attention is not at fault: every backend gives it, {bad[0].culprit}. Look at these rows: {', '.join(_rows(kept)[:5])}"
    return f"at fault: {', '.join(result.backend for result in bad)} ({bad[0].culprit}). Finite: {', '.join(good)}"


def _rows(kept: Kept) -> list[str]:
    return [row for rank in kept.record["ranks"] for row in rank["rows"]]


def _print_json(kept: Kept, results: list[Replay], text: str) -> None:
    rows = [{key: str(value) if isinstance(value, float) else value for key, value in result._asdict().items()} for result in results]
    print(json.dumps({"record": kept.record, "results": rows, "finding": text}, indent=2))


if __name__ == "__main__":
    sys.exit(script.main(Flags, __doc__, replay))
