"""The transformers backend: tokenizer and base model as the plan says; NF4 and int8 through bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from surefoot import inputs
from surefoot.errors import BackendError, UsageError
from surefoot.plan import ModelPlan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EMBEDDING_MULTIPLE = 64  # rows; keeps the head's GEMM aligned when PAD had to be added


def load_tokenizer(plan: ModelPlan) -> Any:
    """The tokenizer of the model.

    Raises:
        UsageError: no such model. BackendError: transformers cannot read it.
    """
    with _named(plan, "tokenizer"):
        return AutoTokenizer.from_pretrained(plan.path, revision=plan.revision, trust_remote_code=plan.trust_remote_code)


def load_model(plan: ModelPlan, vocabulary_size: int, target_modules: tuple[str, ...] | None, *, widens: bool = True) -> Any:
    """The base model on its own device, with embedding rows for the whole vocabulary.

    What is not quantized is fp32, but frozen linear layers and embeddings are stored as the plan says; under
    widens=False (inference) everything is.

    Raises:
        UsageError: no such model, or target_modules names no layer of it. BackendError: it cannot be loaded.
    """
    with _named(plan, "model"):
        config = AutoConfig.from_pretrained(plan.path, revision=plan.revision, trust_remote_code=plan.trust_remote_code)
    config.use_cache = False
    if target_modules:
        check_targets(plan, config, target_modules)
    unset_hf_deepspeed_config()  # an earlier run of this process may have left one, under which ZeRO-3 would load pieces
    with _named(plan, "model"):
        model = AutoModelForCausalLM.from_pretrained(
            plan.path,
            config=config,
            revision=plan.revision,
            trust_remote_code=plan.trust_remote_code,
            dtype=DTYPES[plan.frozen_dtype],
            device_map=_device_map(plan),
            attn_implementation=plan.attn_implementation,
            quantization_config=_quantization(plan),
        )
    _keep_trainable_layout(model)
    rows = model.get_input_embeddings().weight.shape[0]
    if vocabulary_size > rows:
        model.resize_token_embeddings(vocabulary_size, pad_to_multiple_of=EMBEDDING_MULTIPLE, mean_resizing=False)
    if widens and plan.frozen_dtype != "fp32":
        _widen(model)
    return model


def kernels(model: Any) -> list[str]:
    """What really runs, read off the model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    fused = sum(bool(getattr(module, "is_fused", False)) for module in model.modules())
    found = [attention_line(base.config._attn_implementation)]
    return found + ([f"fused adapters: {fused} layers"] if fused else [])


def attention_line(name: str) -> str:
    """An attention and, where SDPA on a GPU does it, the kernels that torch may take."""
    if name != "sdpa" or not torch.cuda.is_available():
        return f"attention: {name}"
    cuda = torch.backends.cuda
    states = {
        "cudnn": cuda.cudnn_sdp_enabled(), "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(), "math": cuda.math_sdp_enabled(),
    }  # fmt: skip
    return f"attention: sdpa ({', '.join(kernel for kernel, is_on in states.items() if is_on)})"


class FrozenLinear(torch.nn.Linear):
    """A linear layer stored in 16 bits, with an fp32 one's numbers: under autocast, which rounds fp32 weights at each use, and without."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class FrozenEmbedding(torch.nn.Embedding):
    """An embedding stored in 16 bits with fp32 output, so that the residual stream is fp32."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids).float()


def _widen(model: Any) -> None:
    """From a model all in 16 bits: fp32 norms and all else but linear layers and embeddings, whose results are as in fp32 storage."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = FrozenLinear
        elif type(module) is torch.nn.Embedding:
            module.__class__ = FrozenEmbedding
        else:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    setattr(module, name, buffer.float())


def _quantization(plan: ModelPlan) -> BitsAndBytesConfig | None:
    if plan.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[plan.compute_dtype],
        )
    return BitsAndBytesConfig(load_in_8bit=True) if plan.quantization == "int8" else None


def _keep_trainable_layout(model: Any) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes 0.50 packs NF4 weights anew in the first evaluation, for a product that has no gradient."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _device_map(plan: ModelPlan) -> dict[str, Any] | None:
    """Straight to this process's GPU, or into host memory; what is quantized is made where it computes."""
    if plan.quantization == "none" and not plan.loads_on_gpu:
        return None
    return {"": torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"}


def check_targets(plan: ModelPlan, config: Any, target_modules: tuple[str, ...]) -> None:
    """Raises UsageError unless every name meets a layer: PEFT ignores a misspelt name as long as another one matches."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=plan.trust_remote_code)
    linear = [name for name, module in skeleton.named_modules() if isinstance(module, torch.nn.Linear)]
    missing = [target for target in target_modules if not any(name == target or name.endswith(f".{target}") for name in linear)]
    if missing:
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise UsageError(f"--target_modules: {plan.path} has no linear layer {', '.join(missing)}. It has {', '.join(known)}")


@contextmanager
def _named(plan: ModelPlan, what: str) -> Iterator[None]:
    """Turns what transformers raises for a wrong name or a broken file into one message."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        text = str(error)
        if (
            "is not a local folder" in text
            or "not a valid model identifier" in text
            or "couldn't connect" in text
            or "outgoing traffic" in text
        ):
            raise UsageError(inputs.no_model(plan.path, error)) from error
        raise BackendError(f"--base_model={plan.path}: transformers cannot load its {what}: {first}") from error
