"""The base model's layers without their weights, and the weights as a quantized run saw them: quantized and dequantized again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from surefoot.errors import BackendError


class Skeleton(NamedTuple):
    """Module kinds by name, the names of embedding and head, whether they share one weight, and what bitsandbytes quantizes."""

    kinds: dict[str, type[torch.nn.Module]]
    embedding: str
    head: str | None
    is_tied: bool
    quantized: frozenset[str]


def skeleton(base: Path, quantization: str, *, trusts_remote_code: bool) -> Skeleton:
    """The model's modules, on the meta device.

    Args:
        quantization: none, nf4 or int8.

    Raises:
        BackendError: transformers does not know the model, or bitsandbytes is missing.
    """
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trusts_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusts_remote_code)
    except (ValueError, OSError, ImportError, KeyError) as error:
        raise BackendError(f"transformers cannot read the model {base}: {str(error).strip().splitlines()[0]}") from None
    kinds = {name: type(module) for name, module in model.named_modules()}
    names = {module: name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    is_tied = head is not None and bool(getattr(config, "tie_word_embeddings", False))
    return Skeleton(
        kinds, names[model.get_input_embeddings()], None if head is None else names[head], is_tied, _quantized(model, quantization)
    )


def _quantized(model: Any, quantization: str) -> frozenset[str]:
    """The modules that transformers replaces by bitsandbytes' when it loads the model so."""
    if quantization == "none":
        return frozenset()
    try:
        import bitsandbytes as bnb
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear
        from transformers.quantizers.base import get_keys_to_not_convert
    except ImportError:
        raise BackendError(
            f"a base seen in {quantization} needs bitsandbytes, which is not installed: pip install 'surefoot[bnb]'"
        ) from None
    asked = BitsAndBytesConfig(load_in_4bit=quantization == "nf4", load_in_8bit=quantization == "int8")
    model = replace_with_bnb_linear(model, modules_to_not_convert=get_keys_to_not_convert(model), quantization_config=asked)
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return frozenset(name for name, module in model.named_modules() if isinstance(module, kinds))


def as_seen(weight: torch.Tensor, quantization: str, *, is_transposed: bool = False) -> torch.Tensor:
    """The fp32 weight after quantization and back, as bitsandbytes computes with it.

    Args:
        weight: [out, in]; [in, out] when is_transposed (Conv1D).
    """
    if is_transposed:
        return as_seen(weight.T.contiguous(), quantization).T.contiguous()
    import bitsandbytes as bnb
    from peft.utils.integrations import dequantize_bnb_weight

    plain = weight.float()
    if quantization == "nf4":  # the settings of backends/hf.py
        parameter: Any = bnb.nn.Params4bit(plain, requires_grad=False, quant_type="nf4", compress_statistics=True).to(plain.device)
        return bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state).float()
    parameter = bnb.nn.Int8Params(plain.cpu(), requires_grad=False).to(plain.device)
    state = bnb.MatmulLtState()
    state.SCB = parameter.SCB
    return dequantize_bnb_weight(parameter, state=state).float()
