"""The models of a parity verdict, one in memory at a time, and the verdict as it is written beside the weights."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, NamedTuple

import torch

from surefoot.backends import hf
from surefoot.errors import BackendError
from surefoot.export import carry, parity, prompts, rounding
from surefoot.export.parity import BANDS, Reference
from surefoot.export.source import Source
from surefoot.json_file import read_json
from surefoot.plan import ModelPlan


class Subject(NamedTuple):
    """An export to judge: its folder and its format (a key of BANDS); for a GGUF also the file's name and the folder it was made from."""

    folder: Path
    format: str
    gguf: str | None = None
    made_from: Path | None = None
    trusts_remote_code: bool = False

    @property
    def hf(self) -> Path:
        """Where the config and tokenizer of transformers' form are."""
        return self.made_from or self.folder


class Verdict(NamedTuple):
    """`reasons` are why it does not hold; empty: it holds."""

    record: dict[str, Any]
    reasons: tuple[str, ...]
    line: str

    @property
    def holds(self) -> bool:
        return not self.reasons


class Observed(NamedTuple):
    """What exports are judged by: models' answers by name, of which the first decides, and the tokenizer and prompts behind them.
    `beyond` is what of the merged tensors is not PEFT's own merge.
    """

    references: dict[str, Reference]
    tokenizer: Any
    texts: tuple[str, ...]
    beyond: tuple[str, ...] = ()


def of_adapter(source: Source, subject: Subject, prompt_file: str = "") -> Verdict:
    """The export against the adapter on its base, and where that is another than it was trained on, also against that, for information.

    The merged tensors must be PEFT's own but for their dtype's rounding, those of a GGUF or 4-bit model the merged ones but for its own.
    """
    merged = Subject(subject.made_from, dtype_of(subject.made_from)) if subject.made_from else subject
    return judge(subject, observe(source, prompt_file, merged))


def observe(source: Source, prompt_file: str = "", merged: Subject | None = None) -> Observed:
    """What the adapter says on its base, and whether `merged` has the tensors of its merge."""
    texts = prompts.load(prompt_file)
    before = carry.tokenizer(source.tokenizer, trusts_remote_code=source.trusts_remote_code)
    ids = prompts.encoded(before, texts)
    rows = int(source.base_config.get("vocab_size") or source.base_config["text_config"]["vocab_size"])
    model = _adapted(source, source.onto)
    references = {f"adapter on the {_named(source.onto)} base": parity.observe(model, ids, rows)}
    beyond = rounding.beyond(model.merge_and_unload(), merged.folder, merged.format, rows) if merged and source.onto != "int8" else []
    del model
    _free()
    if source.onto != source.seen:
        references[f"adapter on the {_named(source.seen)} base it was trained on"] = _observed(_adapted(source, source.seen), ids, rows)
    return Observed(references, before, texts, tuple(beyond))


def of_model(folder: Path, subject: Subject, prompt_file: str = "") -> Verdict:
    """The export against the model it was made from."""
    texts = prompts.load(prompt_file)
    before = carry.tokenizer(folder, trusts_remote_code=subject.trusts_remote_code)
    model = _loaded(str(folder), trusts_remote_code=subject.trusts_remote_code)
    rows = model.get_output_embeddings().weight.shape[0]
    return judge(subject, Observed({f"the model {folder.name}": _observed(model, prompts.encoded(before, texts), rows)}, before, texts))


def _named(quantization: str) -> str:
    return "unquantized" if quantization == "none" else f"dequantized {quantization}"


def judge(subject: Subject, observed: Observed) -> Verdict:
    """The first reference decides; the others are measured."""
    model = _exported(subject)
    beyond = list(observed.beyond)
    if subject.made_from:  # before the first forward, which packs 4-bit weights anew on some CPUs
        beyond += rounding.beyond(model, subject.made_from, subject.format)
    found = {name: parity.compare(reference, model) for name, reference in observed.references.items()}
    del model
    _free()
    strange = _tokenizer_differences(subject, observed.tokenizer, observed.texts)
    main, *_ = found.values()
    band = BANDS[subject.format]
    reasons = [*main.beyond(band), *beyond, *strange]
    record = {
        "verdict": "beyond the band" if reasons else "holds",
        "reasons": reasons,
        "format": subject.format,
        "band": band._asdict(),
        "computed_in": "fp32",
        "new_tokens": parity.NEW_TOKENS,
        "against": {name: difference.record() for name, difference in found.items()},
        "tensor_differences": beyond,
        "tokenizer_differences": strange,
    }
    return Verdict(record, tuple(reasons), "\n".join(f"parity with the {name}: {difference.line()}" for name, difference in found.items()))


def _observed(model: Any, ids: list[list[int]], columns: int) -> Reference:
    try:
        return parity.observe(model, ids, columns)
    finally:
        del model
        _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _loaded(path: str, quantization: str = "none", vocabulary_size: int = 0, *, trusts_remote_code: bool = False) -> Any:
    """The model in fp32, with eager attention; a quantized one still quantized."""
    plan = ModelPlan(
        path=path, revision=None, trust_remote_code=trusts_remote_code, attn_implementation="eager", quantization=quantization,
        compute_dtype="fp32", frozen_dtype="fp32", loads_on_gpu=torch.cuda.is_available(), cutoff_len=0,
        use_gradient_checkpointing=False, enable_torch_compile=False, fused_adapters=False, fused_loss=False, recompute_layers=0,
        offload_inputs=False,
    )  # fmt: skip
    model = hf.load_model(plan, vocabulary_size, None).eval()
    model.config.use_cache = True
    model.generation_config.max_length = None
    return model


def _adapted(source: Source, quantization: str) -> Any:
    """The adapter through PEFT on the base with that quantization, dequantized: in fp32 nothing but the merge can then differ."""
    from peft import PeftModel

    size = carry.vocabulary_size(source)
    model = _loaded(str(source.base), quantization, size, trusts_remote_code=source.trusts_remote_code)
    if quantization != "none":
        model = model.dequantize(torch.float32)
    return PeftModel.from_pretrained(model, str(source.adapter)).eval()


def _exported(subject: Subject) -> Any:
    if subject.gguf is None:
        return _loaded(str(subject.folder), trusts_remote_code=subject.trusts_remote_code)
    from transformers import AutoConfig, AutoModelForCausalLM

    # the model's own config: transformers' reader knows no scaled rotation
    config = AutoConfig.from_pretrained(subject.hf, trust_remote_code=subject.trusts_remote_code)
    try:
        return AutoModelForCausalLM.from_pretrained(subject.folder, config=config, gguf_file=subject.gguf, dtype=torch.float32).eval()
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise BackendError(f"{subject.folder / subject.gguf} cannot be loaded back: {str(error).strip().splitlines()[0]}") from None


def _tokenizer_differences(subject: Subject, before: Any, texts: tuple[str, ...]) -> list[str]:
    if subject.gguf is not None:
        from surefoot.export import gguf_file

        return gguf_file.differences(subject.folder / subject.gguf, subject.hf)
    after = carry.tokenizer(subject.folder, trusts_remote_code=subject.trusts_remote_code)
    return parity.tokenizer_differences(before, after, texts)


def dtype_of(folder: Path) -> str:
    """fp16, bf16 or fp32, as the model's config.json says."""
    named = read_json(folder / "config.json")
    return {"float16": "fp16", "bfloat16": "bf16"}.get(str(named.get("dtype") or named.get("torch_dtype")), "fp32")
