"""Config: every flag once, with its name, type, default and one line of help; text or values in, one checked value out."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from surefoot import compat
from surefoot.errors import UsageError, joined
from surefoot.flag_values import convert, kinds

PROMPT_STYLES = ("auto", "alpaca", "alpaca_indented", "chat")  # any other is the path of a Jinja file
PEFT_INITS = ("gaussian", "pissa", "olora", "eva", "loftq", "orthogonal")


def _flag(default: Any, group: str, doc: str, *, choices: tuple[Any, ...] = (), low: float | None = None) -> Any:
    return field(default=default, metadata={"group": group, "doc": doc, "choices": choices, "low": low})


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the user asked for, nothing decided yet. None means "not given: the plan chooses and says why"."""

    base_model: str = _flag("", "model", "Hugging Face model id, or a local folder")
    local_dir: str | None = _flag(None, "model", "a local copy of base_model, used when it holds config.json")
    revision: str | None = _flag(None, "model", "branch, tag or commit of a model id")
    trust_remote_code: bool = _flag(False, "model", "run the Python code that comes with the model")
    load_4bit: bool = _flag(False, "model", "QLoRA/QDoRA: frozen weights in NF4 with double quantization (bitsandbytes)")
    load_8bit: bool = _flag(False, "model", "frozen weights in int8 (bitsandbytes)")
    backend: str = _flag("auto", "model", "who loads the model", choices=("auto", "hf", "bnb", "unsloth"))
    strict_backend: bool = _flag(False, "model", "fail instead of falling back to another backend")

    adapter_name: str = _flag("lora", "adapter", "what is trained", choices=("lora", "dora", "rslora", "full"))
    lora_r: int = _flag(8, "adapter", "rank", low=1)
    lora_alpha: float | str = _flag(
        16.0,
        "adapter",
        "scale numerator: alpha / r, with rslora alpha / sqrt(r); r or 2r: that times the rank",
        choices=("r", "2r"),
        low=1e-6,
    )
    lora_dropout: float = _flag(0.05, "adapter", "dropout on the adapter's input; DoRA is faster at 0", low=0.0)
    use_rslora: bool = _flag(False, "adapter", "scale by sqrt(r), also with dora")
    target_modules: tuple[str, ...] | None = _flag(None, "adapter", "layer names to adapt; default: every linear layer but the head")
    init_lora_weights: bool | str = _flag(
        True, "adapter", f"True, False, or PEFT's {', '.join(PEFT_INITS)}, pissa_niter_N", choices=(*PEFT_INITS, "pissa_niter_N")
    )

    data_path: tuple[str, ...] = _flag(
        ("yahma/alpaca-cleaned",), "data", "files (json, jsonl, csv, parquet; plain or .gz), or a Hub data set id"
    )
    data_split: str = _flag("train", "data", "split of a Hub data set")
    val_data_path: tuple[str, ...] | None = _flag(None, "data", "evaluate on these files instead of a split of data_path")
    val_set_size: int | float = _flag(2000, "data", "rows (or a fraction) held out for evaluation; 0: none", low=0)
    cutoff_len: int = _flag(256, "data", "longest row in tokens", low=8)
    overlong: str = _flag("drop", "data", "what a row over cutoff_len suffers", choices=("drop", "truncate_prompt", "error"))
    prompt_style: str = _flag("auto", "data", "auto, alpaca, alpaca_indented, chat, or a Jinja file")
    text_field: str = _flag("text", "data", "column of plain-text rows")
    train_on_inputs: bool = _flag(False, "data", "train on the prompt too (the older scripts' default)")
    group_by_length: bool = _flag(False, "data", "batch rows of like length: less padding")
    packing: bool | str = _flag(
        "auto", "data", "short rows share a row of fixed length; auto: on a GPU, where it is safe and they are short", choices=("auto",)
    )
    pack_len: int | None = _flag(None, "data", "slots of a packed row; default: what batch_size needs, in the fewest passes", low=8)
    dataloader_num_workers: int = _flag(0, "data", "processes that collate batches", low=0)
    audit: str = _flag(
        "fail",
        "data",
        "what too many lost or sick rows do: fail ends the run before the model is loaded (exit 3), warn goes on",
        choices=("fail", "warn"),
    )
    data_cache: bool = _flag(True, "data", "keep the tokenised rows for the next run, in SUREFOOT_CACHE or ~/.cache/surefoot")

    batch_size: int = _flag(128, "training", "rows per optimizer step, over all processes and accumulation", low=1)
    per_device_train_batch_size: int = _flag(4, "training", "rows per forward pass of a process", low=1)
    per_device_eval_batch_size: int | None = _flag(None, "training", "default: as in training", low=1)
    gradient_accumulation_steps: int | None = _flag(None, "training", "default: batch_size / (per device x processes)", low=1)
    num_epochs: float = _flag(3.0, "training", "passes over the data", low=0.0)
    max_steps: int = _flag(-1, "training", "stop after this many optimizer steps; -1: num_epochs decides", low=-1)
    learning_rate: float = _flag(3e-4, "training", "peak learning rate", low=0.0)
    lr_scheduler_type: str = _flag(
        "cosine", "training", "learning-rate schedule", choices=("cosine", "linear", "constant", "constant_with_warmup")
    )
    warmup_steps: int | None = _flag(None, "training", "warm-up in steps", low=0)
    warmup_ratio: float | None = _flag(None, "training", "warm-up as a fraction of all steps; default 0.06", low=0.0)
    weight_decay: float = _flag(
        0.01, "training", "AdamW decay of LoRA's A and B or of the weights; never magnitudes, norms, biases", low=0.0
    )
    max_grad_norm: float = _flag(1.0, "training", "clip the gradient's norm; 0: no clipping", low=0.0)
    optim: str = _flag(
        "auto", "training", "optimizer", choices=("auto", "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit")
    )
    max_bad_steps: int = _flag(3, "training", "end the run (exit 4) after so many skipped non-finite steps in a row", low=1)
    loss_spike: str = _flag("warn", "training", "what a sudden rise of the loss does", choices=("warn", "stop", "off"))
    seed: int = _flag(42, "training", "of the split, the order, the adapter and dropout", low=0)

    bf16: bool | None = _flag(None, "precision and speed", "bf16 autocast over fp32 master weights; default: where the hardware has it")
    fp16: bool | None = _flag(None, "precision and speed", "fp16 autocast with loss scaling; default: GPUs without bf16")
    stage: int = _flag(1, "precision and speed", "1 eager, 2 fused attention, 3 fused attention and compile", choices=(1, 2, 3))
    attn_implementation: str | None = _flag(
        None, "precision and speed", "default: the stage's (1: eager)", choices=("eager", "sdpa", "flash_attention_2")
    )
    disable_cudnn_sdpa: bool | None = _flag(
        None, "precision and speed", "no cuDNN kernels in sdpa attention; default: the stage's (1: True)"
    )
    disable_flash_sdpa: bool = _flag(False, "precision and speed", "no flash kernels in sdpa attention")
    enable_torch_compile: bool | None = _flag(None, "precision and speed", "compile each decoder layer; default: the stage's (1: False)")
    fused_adapters: bool = _flag(True, "precision and speed", "this program's LoRA and DoRA products; False: PEFT's own")
    fused_loss: bool = _flag(True, "precision and speed", "cross-entropy in chunks, without the logits of the whole batch")
    use_gradient_checkpointing: bool | str = _flag(
        "auto",
        "precision and speed",
        "recompute activations: True all layers, False none, auto as few as fit the GPU, selective at least one, "
        "offload (unsloth means it too) all, with their inputs in host memory",
        choices=("auto", "selective", "offload", "unsloth"),
    )
    deterministic: bool = _flag(False, "precision and speed", "deterministic kernels only; slower")
    debug: bool = _flag(False, "precision and speed", "synchronous kernels and device-side assertions; much slower")

    output_dir: str = _flag("./output", "run folder", "adapter, tokenizer, checkpoints and records go here")
    overwrite: bool = _flag(False, "run folder", "remove the earlier run in output_dir")
    resume: bool = _flag(False, "run folder", "continue from the newest checkpoint in output_dir, if there is one")
    resume_from_checkpoint: bool | str | None = _flag(None, "run folder", "a checkpoint folder to continue from; True or auto: as --resume")
    grace_s: float = _flag(30.0, "run folder", "seconds a stop signal leaves before the kill; a slower checkpoint is reported", low=0.0)
    hang_timeout_s: float = _flag(
        1800.0, "run folder", "end the run (exit 5) with every process's stacks when one has not moved for so long; 0: never", low=0.0
    )
    eval_strategy: str = _flag("steps", "run folder", "when to evaluate", choices=("no", "steps", "epoch"))
    eval_step: int = _flag(200, "run folder", "evaluate every so many steps", low=1)
    save_strategy: str = _flag("steps", "run folder", "when to save a checkpoint", choices=("no", "steps", "epoch"))
    save_step: int = _flag(200, "run folder", "save every so many steps", low=1)
    save_total_limit: int | None = _flag(3, "run folder", "checkpoints kept", low=1)
    load_best_model_at_end: bool | None = _flag(None, "run folder", "end with the lowest eval_loss; default: when steps allow it")

    logging_steps: int = _flag(10, "logging", "log every so many steps", low=1)
    report_to: tuple[str, ...] | None = _flag(
        None,
        "logging",
        "tensorboard (default), wandb, trackio, mlflow, none",
        choices=("tensorboard", "wandb", "trackio", "mlflow", "none"),
    )
    run_name: str | None = _flag(None, "logging", "name shown by the trackers")
    wandb_project: str | None = _flag(None, "logging", "W&B project; giving it adds wandb to report_to")
    wandb_watch: str | None = _flag(None, "logging", "W&B: false, gradients, all", choices=("false", "gradients", "all"))
    wandb_log_model: str | None = _flag(None, "logging", "W&B: false, end, checkpoint", choices=("false", "end", "checkpoint"))
    wandb_online: bool = _flag(True, "logging", "False: W&B writes to disk only")

    config: str | None = _flag(None, "this program", "YAML file with these names, flat or in groups; flags win over it")
    dry_run: bool = _flag(False, "this program", "print the plan and stop")
    plan_json: bool = _flag(False, "this program", "print the plan as JSON")

    sources: Mapping[str, str] = field(default_factory=dict, compare=False, metadata={"flag": False})
    notes: tuple[str, ...] = field(default=(), compare=False, metadata={"flag": False})

    def given(self, name: str) -> bool:
        """True when a flag or the run file set it."""
        return name in self.sources

    def source(self, name: str) -> str:
        """`flag`, `file PATH` or `default`."""
        return self.sources.get(name, "default")

    @property
    def resumes(self) -> bool:
        return self.resume or bool(self.resume_from_checkpoint)

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint named by the user, None where the newest whole one is meant."""
        return (
            self.resume_from_checkpoint if isinstance(self.resume_from_checkpoint, str) and self.resume_from_checkpoint != "auto" else None
        )

    @classmethod
    def parse(cls, flags: Mapping[str, Any], *, file_values: Mapping[str, Any] | None = None, extra: Iterable[str] = ()) -> Config:
        """Text (from a command line) or values (from Python or YAML) to a Config; flags win over file_values.

        Raises:
            UsageError: names every problem of every flag, those in `extra` first.
        """
        problems, notes = list(extra), list[str]()
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        asked_file = str(flags.get("config", ""))
        for source, given in ((f"file {asked_file}", file_values or {}), ("flag", flags)):
            seen: dict[str, str] = {}
            found: list[str] = []
            for typed, raw in given.items():
                name = _resolve(typed, raw, found, notes)
                if name is None:
                    continue
                if name in seen and raw in SAYS_NOTHING:
                    continue
                if name in seen and raw != given[seen[name]] not in SAYS_NOTHING:
                    found.append(f"--{typed}={raw} and --{seen[name]}={given[seen[name]]} are the same flag. Give one of them")
                seen[name] = typed
                try:
                    values[name] = convert(FLAGS[name], raw)
                    sources[name] = source
                except UsageError as error:
                    found.append(str(error))
            problems += found if source == "flag" else [f"{source}: {problem}" for problem in found]
        if not values.get("base_model") and not any("base_model" in problem for problem in problems):
            problems.append("--base_model is missing: a Hugging Face model id or a local folder")
        if problems:
            raise UsageError(joined(problems))
        return cls(**values, sources=types.MappingProxyType(sources), notes=tuple(notes))


SAYS_NOTHING = (None, "", "None")  # as older scripts pass lora_target_modules beside target_modules


def _fields() -> dict[str, dataclasses.Field[Any]]:
    hints = typing.get_type_hints(Config)
    flags = {f.name: f for f in dataclasses.fields(Config) if f.metadata.get("flag", True)}
    for f in flags.values():
        f.type = hints[f.name]
    return flags


FLAGS: Mapping[str, dataclasses.Field[Any]] = _fields()


def canonical(typed: str) -> str:
    """The flag's own name for an older name or one with hyphens; unknown names come back unchanged."""
    name = typed if typed in FLAGS or typed in compat.RETIRED else typed.replace("-", "_")
    return compat.ALIASES.get(name, name)


def takes_list(name: str) -> bool:
    return name in FLAGS and any(typing.get_origin(kind) is tuple for kind in kinds(FLAGS[name]))


def takes_bool(name: str) -> bool:
    return name in FLAGS and bool in kinds(FLAGS[name])


def _resolve(typed: str, raw: Any, problems: list[str], notes: list[str]) -> str | None:
    name = canonical(typed)
    if name in FLAGS:
        return name
    if name in compat.RETIRED:
        harmless, reason = compat.RETIRED[name]
        if any(_same(raw, value) for value in harmless):
            notes.append(f"--{typed}={raw} has no effect here and is ignored ({reason})")
        else:
            problems.append(f"--{typed}={raw} is not supported: {reason}")
        return None
    close = difflib.get_close_matches(name, [*FLAGS, *compat.ALIASES], n=1)
    hint = f"Did you mean --{close[0]}?" if close else "See --help"
    problems.append(f"--{typed} is not a flag. {hint}")
    return None


def _same(raw: Any, value: Any) -> bool:
    return raw == value or str(raw).lower() == str(value).lower()
