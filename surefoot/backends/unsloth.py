"""The Unsloth backend, and the only file that drives it. To be imported before transformers, peft and trl, which Unsloth patches."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

with contextlib.redirect_stdout(sys.stderr):  # its banner
    import unsloth

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoConfig

from surefoot.backends import hf
from surefoot.errors import UnslothRefusedError
from surefoot.plan import ModelPlan

# what Unsloth, transformers and PEFT raise for a model or an adapter that they do not take
REFUSALS = (OSError, ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError, KeyError, ImportError, AssertionError)
ON_CPU = unsloth.DEVICE_TYPE == "cpu"
ATTENTION_SWITCHES = ("HAS_FLASH_ATTENTION", "HAS_XFORMERS")  # of its modules; no environment variable reaches them

load_tokenizer = hf.load_tokenizer  # Unsloth's own changes PAD and the chat template


def load_model(plan: ModelPlan, vocabulary_size: int, target_modules: tuple[str, ...] | None) -> Any:
    """The base model as Unsloth loads it, with embedding rows for the whole vocabulary.

    Raises:
        UsageError: target_modules names no layer of it. UnslothRefusedError: Unsloth does not take it.
    """
    with _refusing("load the model"):
        config = AutoConfig.from_pretrained(plan.path, revision=plan.revision, trust_remote_code=plan.trust_remote_code)
    if target_modules:
        hf.check_targets(plan, config, target_modules)
    model = load(plan)
    rows = model.get_input_embeddings().weight.shape[0]
    if vocabulary_size > rows:
        with _refusing("add rows to the embedding"):
            model.resize_token_embeddings(vocabulary_size, pad_to_multiple_of=hf.EMBEDDING_MULTIPLE, mean_resizing=False)
    return model


def load(plan: ModelPlan) -> Any:
    """The model of a checkpoint, its attention switched as the plan says."""
    if plan.attn_implementation == "sdpa":
        _force_sdpa()
    with _refusing("load the model"):
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            model_name=plan.path,
            revision=plan.revision,
            trust_remote_code=plan.trust_remote_code,
            max_seq_length=plan.cutoff_len,
            dtype=hf.DTYPES[plan.compute_dtype],
            load_in_4bit=plan.quantization == "nf4",
            use_gradient_checkpointing=plan.use_gradient_checkpointing,
            attn_implementation=plan.attn_implementation,
            device_map=None if ON_CPU else {"": torch.cuda.current_device()},  # else it spreads over all that are visible
            use_exact_model_name=True,  # else it may load a quantized copy of the model from its own account
        )
    if plan.quantization == "nf4" and not getattr(model, "is_loaded_in_4bit", False):
        raise UnslothRefusedError(f"Unsloth loaded {plan.path} without its 4-bit quantization")  # its CPU path only prints it
    return model


def attach(model: Any, config: LoraConfig, *, recompute: bool | str, seed: int) -> Any:
    """The model with LoRA or DoRA through Unsloth's get_peft_model, its recompute and its kernels.

    Raises:
        UnslothRefusedError: it does not take the model or the adapter.
    """
    with _refusing("attach the adapter"):
        return unsloth.FastLanguageModel.get_peft_model(
            model,
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules or ()),
            use_dora=config.use_dora,
            use_rslora=config.use_rslora,
            init_lora_weights=config.init_lora_weights,
            use_gradient_checkpointing=recompute,
            random_state=seed,
        )


def kernels(model: Any) -> list[str]:
    """What really runs, read off the model and Unsloth's modules."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if ON_CPU:
        loss = "chunked" if type(base).forward is not base.forward.__func__ else "transformers'"
        return [hf.attention_line(base.config._attn_implementation), "Unsloth's CPU path: layers of transformers and PEFT", f"loss: {loss}"]
    from unsloth.utils import attention_dispatch

    layers = list(base.get_decoder().layers)
    counts = {
        "QKV": sum(_name(getattr(layer.self_attn, "apply_qkv", None)) == "apply_lora_qkv" for layer in layers),
        "O": sum(_name(getattr(layer.self_attn, "apply_o", None)) == "apply_lora_o" for layer in layers),
        "MLP": sum(_name(layer.mlp.forward).startswith("apply_lora_mlp") for layer in layers),
    }
    found = ", ".join(f"{name} {count} of {len(layers)}" for name, count in counts.items())
    is_dora = isinstance(model, PeftModel) and model.peft_config[model.active_adapter].use_dora
    off = "DoRA: Unsloth's LoRA kernels off" if is_dora else "Unsloth's LoRA kernels off"
    return [
        hf.attention_line(attention_dispatch.select_attention_backend()),
        f"Unsloth's LoRA kernels: {found}" if any(counts.values()) else off,
        f"recompute: {getattr(model, '_unsloth_gradient_checkpointing', None)}",
    ]


def _name(function: Any) -> str:
    """Of a function, a bound method or a partial of one."""
    inner = getattr(function, "__func__", function)
    return str(getattr(getattr(inner, "func", inner), "__name__", ""))


def _force_sdpa() -> None:
    """Makes Unsloth's dispatch choose SDPA, and reads back that it does.

    Raises:
        UnslothRefusedError: it chooses another.
    """
    if ON_CPU:
        return
    from unsloth.utils import attention_dispatch

    for name, module in list(sys.modules.items()):
        if name.startswith("unsloth."):
            for switch in ATTENTION_SWITCHES:
                if switch in vars(module):
                    setattr(module, switch, False)
    chosen = attention_dispatch.select_attention_backend()
    if chosen != attention_dispatch.SDPA:
        raise UnslothRefusedError(f"--attn_implementation=sdpa: Unsloth chooses {chosen} all the same")


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Turns what is raised inside into one refusal, and Unsloth's prints into stderr's."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except REFUSALS as error:
        lines = str(error).strip().splitlines() or [""]
        raise UnslothRefusedError(f"Unsloth could not {what}: {type(error).__name__}: {lines[0]}") from error
