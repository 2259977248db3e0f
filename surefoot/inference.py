"""A trained model opened for evaluation and inference: base and adapter as the run recorded them, under the prompts it was trained with."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surefoot import checkpoint, inputs, run_file
from surefoot.artifacts import META, PROMPT
from surefoot.config import PROMPT_STYLES
from surefoot.errors import BackendError, DataError, UsageError, joined
from surefoot.json_file import read_json
from surefoot.plan import ModelPlan

if TYPE_CHECKING:
    from surefoot.data.formats import Example
    from surefoot.data.masking import Encoder
    from surefoot.data.prompts import Prompts


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is to be opened; `record` is the run's run.json (or what an export keeps of it), empty for what was made elsewhere."""

    base_model: str
    revision: str | None
    adapter: Path | None
    style: str
    quantization: str
    record: dict[str, Any]

    @property
    def system(self) -> str:
        """The system turn that all rows of the run had, empty where there was no such one."""
        return str(self.record.get("data", {}).get("system", ""))

    def name(self) -> str:
        """The adapter's folder, else the model."""
        return str(self.adapter or self.base_model)

    def identity(self) -> dict[str, Any]:
        """What was opened, for the record beside results."""
        plan, file = self.record.get("plan", {}), self.adapter and self.adapter / "adapter_model.safetensors"
        keys = ("started", "ended", "status", "code")
        run = {key: self.record.get(key) for key in keys} | {"adapter": plan.get("adapter"), "train": plan.get("train")}
        return {
            "base_model": self.base_model,
            "revision": self.revision,
            "adapter": str(self.adapter) if self.adapter else None,
            "adapter_sha256": hashlib.sha256(file.read_bytes()).hexdigest() if file and file.is_file() else None,
            "prompt_style": self.style,
            "quantization": self.quantization,
            "run": run | {"data": self.record.get("data", {}).get("fingerprint")} if self.record else None,
        }


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The model ready to answer, its tokenizer and prompts; `kept`: adapter layers that stay with PEFT's forward, with the reason."""

    source: Source
    model: Any
    tokenizer: Any
    prompts: Prompts
    encoder: Encoder
    dtype: str
    kept: dict[str, str]

    def end_ids(self) -> list[int]:
        """The tokens that end an answer: EOS, and what the model's own generation_config adds (a chat's end of turn)."""
        own = self.model.generation_config.eos_token_id
        more = own if isinstance(own, list) else [] if own is None else [own]
        return list(dict.fromkeys([self.tokenizer.eos_token_id, *more]))

    def prompt_ids(self, examples: Sequence[Example], max_new_tokens: int) -> list[list[int]]:
        """What stands before each row's last answer, tokenised as in training.

        Raises:
            DataError: the prompt style cannot hold a row, or the model has no room for it and an answer.
        """
        from surefoot.data import asked

        found = self._ids([asked.before_answer(self.prompts, example) for example in examples])
        for example, ids in zip(examples, found, strict=True):
            if len(ids) + max_new_tokens > self.room():
                raise DataError(
                    f"{example.where}: its prompt has {len(ids):,} tokens, which with --max_new_tokens={max_new_tokens} is more than the "
                    f"{self.room():,} positions of the model. Shorten it, or ask for fewer tokens"
                )
        return found

    def room(self) -> int:
        """How many tokens the model's positions hold."""
        return int(getattr(self.model.config, "max_position_embeddings", 0) or 2**31)

    def answered_ids(self, example: Example, answers: Sequence[str]) -> list[list[int]]:
        """The row with each of the answers in place of its own, up to the answer's end."""
        from surefoot.data import asked

        return self._ids([asked.with_answer(self.prompts, example, answer) for answer in answers])

    def _ids(self, texts: list[Any]) -> list[list[int]]:
        return [encoded.ids.tolist() for encoded in self.encoder.encode(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def find(base_model: str | None, adapter: str | None, prompt_style: str | None = None, quantization: str | None = None) -> Source:
    """What the two paths name; what is not given is as the run recorded it.

    Args:
        base_model: a model's folder or Hub id; None: the adapter's own.
        adapter: an adapter's folder, best a run folder, or a checkpoint in one; a folder with a whole model counts as base_model.
        quantization: none, nf4 or int8.

    Raises:
        UsageError: nothing given, or a path that is neither.
    """
    if not base_model and not adapter:
        raise UsageError("give --lora_weights (a run folder or another adapter), --base_model, or both")
    folder = Path(adapter or str(base_model))
    if adapter and not folder.is_dir():
        raise UsageError(f"--lora_weights={adapter} is no folder (looked in {Path.cwd()})")
    config = read_json(folder / "adapter_config.json")
    if config and not adapter:
        raise UsageError(f"--base_model={base_model} is an adapter, not a model. Give it as --lora_weights")
    if adapter and not config and not (folder / "config.json").is_file():
        raise UsageError(f"--lora_weights={adapter} holds neither an adapter (adapter_config.json) nor a model (config.json)")
    root = checkpoint.home(folder)
    record = read_json(root / "run.json") or read_json(folder / META).get("run", {})
    own: dict[str, Any] = record.get("plan", {}).get("model", {})
    if not config:
        path, revision = str(folder), None
    else:
        path = base_model or own.get("path") or config["base_model_name_or_path"]
        revision = own.get("revision") if path == own.get("path") else None
        _check_base(path, adapter, given=bool(base_model))
    _check_weights(folder if config else None, Path(path))
    kept = own.get("quantization", "none") if config else "none"
    return Source(
        base_model=path, revision=revision, adapter=folder if config else None, style=prompt_style or _style(record, root),
        quantization=quantization or kept, record=record,
    )  # fmt: skip


def find_asked(flags: Any) -> Source:
    """find() by the flags that evaluate.py and infer.py share. Raises UsageError: also where they contradict each other."""
    if flags.load_4bit and flags.load_8bit:
        raise UsageError("--load_4bit and --load_8bit are two forms of one base: give one of them")
    adapter = flags.lora_weights
    if flags.config and not adapter:
        adapter = str(run_file.read(flags.config).get("output_dir", "./output"))
    return find(flags.base_model, adapter, flags.prompt_style, "int8" if flags.load_8bit else "nf4" if flags.load_4bit else None)


def _style(record: dict[str, Any], folder: Path) -> str:
    """The run's prompt style: its Jinja file as it then was; where its rows chose for themselves and all alike, theirs."""
    style = str(record.get("plan", {}).get("data", {}).get("prompt_style", "auto"))
    if style not in PROMPT_STYLES and (folder / PROMPT).is_file():
        return str(folder / PROMPT)
    used = list(record.get("data", {}).get("styles", {}))
    return used[0] if style == "auto" and len(used) == 1 else style


def _check_base(path: str, adapter: str | None, *, given: bool) -> None:
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        flag = f"--base_model={path} is no folder" if given else f"--lora_weights={adapter}: its base model {path} is not on this machine"
        raise UsageError(f"{flag}. Give --base_model the folder where it lies")


def _check_weights(adapter: Path | None, base: Path) -> None:
    """Raises UsageError for weights that are missing, empty or cut off, before torch is loaded."""
    problems: list[str] = []
    if adapter and not any((adapter / f"adapter_model.{ending}").is_file() for ending in ("safetensors", "bin")):
        problems.append(f"--lora_weights={adapter} has adapter_config.json but no adapter_model.safetensors: the run did not save it whole")
    if adapter:
        inputs.check_weights("lora_weights", adapter, problems)
    inputs.check_weights("base_model", base, problems)
    if problems:
        raise UsageError(joined(problems))


def open_model(source: Source, *, dtype: str = "auto", merges: bool = False) -> Opened:
    """The model on this machine's first GPU, else on the CPU, with its adapter ready for inference.

    Args:
        dtype: of weights and activations; auto is bf16 on a GPU that has it, fp16 on another, fp32 on a CPU.
        merges: put the adapter into the base's weights, in memory.

    Raises:
        UsageError, BackendError: the model or the adapter cannot be loaded.
    """
    import torch
    from peft import PeftModel
    from transformers import GenerationConfig

    from surefoot import runtime
    from surefoot.backends import hf
    from surefoot.data import masking
    from surefoot.ops.served import serve

    runtime.quiet()
    dtype = _dtype(dtype)
    if merges and (source.adapter is None or source.quantization != "none"):
        why = "there is no adapter" if source.adapter is None else f"its base is quantized ({source.quantization})"
        raise UsageError(f"--merge=True: {why}. Leave it out, or merge with scripts/merge.py first")
    plan = _model_plan(source, dtype, loads_on_gpu=torch.cuda.is_available())
    has_tokenizer = source.adapter and (source.adapter / "tokenizer_config.json").is_file()
    tokenizer = hf.load_tokenizer(dataclasses.replace(plan, path=str(source.adapter), revision=None) if has_tokenizer else plan)
    model = hf.load_model(plan, len(tokenizer), None, widens=False)
    kept: dict[str, str] = {}
    if source.adapter is not None:
        try:
            adapted = PeftModel.from_pretrained(model, str(source.adapter))
        except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
            if "size mismatch" in str(error):
                raise UsageError(
                    f"--lora_weights={source.adapter} was trained on another base than {source.base_model}: its tensors have other shapes. "
                    "Give --base_model the right one"
                ) from error
            first = " ".join(str(error).split())[:300]
            raise BackendError(f"--lora_weights={source.adapter} does not load onto {source.base_model}: {first}") from error
        model, kept = (adapted.merge_and_unload(safe_merge=True), {}) if merges else serve(adapted, hf.DTYPES[dtype])
    ends = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends)  # type: ignore[no-untyped-call]  # a model's own sampling or penalties would pass unsaid
    return Opened(
        source=source, model=model.eval().requires_grad_(False), tokenizer=tokenizer, prompts=_prompts(source.style, tokenizer),
        encoder=masking.make_encoder(tokenizer), dtype=dtype, kept=kept,
    )  # fmt: skip


def _prompts(style: str, tokenizer: Any) -> Prompts:
    from surefoot.data import prompts

    if style in ("verbatim", "text"):  # what rows of prompt and completion, or of plain text, choose for themselves
        return dataclasses.replace(prompts.load("auto", tokenizer), style="verbatim")
    return prompts.load(style, tokenizer)


def _model_plan(source: Source, dtype: str, *, loads_on_gpu: bool) -> ModelPlan:
    trusts = source.record.get("plan", {}).get("model", {}).get("trust_remote_code", False)
    return ModelPlan(
        path=source.base_model, revision=source.revision, trust_remote_code=trusts, attn_implementation="sdpa",
        quantization=source.quantization, compute_dtype=dtype, frozen_dtype=dtype, loads_on_gpu=loads_on_gpu,
        cutoff_len=0, use_gradient_checkpointing=False, enable_torch_compile=False, fused_adapters=False, fused_loss=False,
        recompute_layers=0, offload_inputs=False,
    )  # fmt: skip


def _dtype(asked: str) -> str:
    import torch

    if asked != "auto":
        return asked
    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
