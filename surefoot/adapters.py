"""Attaches LoRA or DoRA through PEFT, or opens every weight; trainable tensors are fp32, DoRA's magnitudes start from the fp32 norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight

from surefoot.errors import BackendError
from surefoot.plan import AdapterPlan

ADAPTER = "default"
EMPTY_ROW = 1e-6  # of the mean row norm: far below bf16's rounding of the other rows' outputs


def attach(model: Any, plan: AdapterPlan, seed: int, by: Callable[[Any, LoraConfig], Any] | None = None) -> Any:
    """The model with its trainable part: a PeftModel, or the model itself for method full.

    Args:
        model: the base model, fp32 or quantized.
        seed: of the adapter's random A; every rank passes the same.
        by: makes the PeftModel and prepares the base for training; None: PEFT.

    Raises:
        BackendError: PEFT cannot adapt this model so.
    """
    torch.manual_seed(seed)
    if plan.method == "full":
        return model.requires_grad_(True)
    if by is None and getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        adapted = (by or get_peft_model)(model, _lora_config(plan))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise BackendError(f"PEFT cannot attach {plan.method} to {type(model).__name__}: {error}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if plan.init_lora_weights in (True, False, "gaussian", "orthogonal"):
        _draw_again(adapted, plan, seed)
    if plan.method == "dora":
        reset_magnitudes(adapted)
    return adapted


def _lora_config(plan: AdapterPlan) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=plan.lora_r,
        lora_alpha=plan.lora_alpha,
        lora_dropout=plan.lora_dropout,
        target_modules=list(plan.target_modules) if plan.target_modules else "all-linear",
        use_dora=plan.method == "dora",
        use_rslora=plan.use_rslora,
        init_lora_weights=plan.init_lora_weights if plan.init_lora_weights != "loftq" else True,  # loftq.start() follows
    )


@torch.no_grad()
def _draw_again(model: PeftModel, plan: AdapterPlan, seed: int) -> None:
    """Draws A and B as PEFT has for an fp32 base: it rounds them to the base's dtype, and how weights are stored must change no number."""
    torch.manual_seed(seed)
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or ADAPTER not in layer.lora_A:
            continue
        live = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        layer.lora_A[ADAPTER] = torch.nn.Linear(layer.in_features, plan.lora_r, bias=False)
        layer.lora_B[ADAPTER] = torch.nn.Linear(plan.lora_r, layer.out_features, bias=False)
        if plan.init_lora_weights == "orthogonal":
            layer.orthogonal_init(ADAPTER)
        elif plan.init_lora_weights:
            layer.reset_lora_parameters(ADAPTER, plan.init_lora_weights)
        live[0].weight.copy_(layer.lora_A[ADAPTER].weight)
        live[1].weight.copy_(layer.lora_B[ADAPTER].weight)
        layer.lora_A[ADAPTER], layer.lora_B[ADAPTER] = live


@torch.no_grad()
def reset_magnitudes(model: PeftModel) -> None:
    """Sets each magnitude m [out] to the row norm of W + s BA [out, in], in fp32, so that the model starts as its base (DoRA, section 4.1).

    PEFT takes the norm in the base's dtype: from bf16 weights m is off by up to 2^-8 and the first step is not the identity.
    A row that is zero altogether gets a tiny row of B first: m / norm would be 0/0, here and in every program that loads the adapter.
    """
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or ADAPTER not in layer.lora_magnitude_vector:
            continue
        norm = _row_norms(layer)
        empty = norm == 0
        if bool(empty.any()):
            _start_empty_rows(layer, empty, float(norm.mean()))
            norm = _row_norms(layer)
        magnitude = layer.lora_magnitude_vector[ADAPTER].weight
        magnitude.data = norm.to(device=magnitude.device, dtype=torch.float32)


def _row_norms(layer: LoraLayer) -> torch.Tensor:
    """The fp32 norm of each row of W + s BA."""
    weight = dequantize_module_weight(layer.get_base_layer()).float()
    product = layer.lora_B[ADAPTER].weight.float() @ layer.lora_A[ADAPTER].weight.float()
    norms: torch.Tensor = torch.linalg.vector_norm(weight + layer.scaling[ADAPTER] * product.to(weight.device), dim=1)
    return norms


def _start_empty_rows(layer: LoraLayer, empty: torch.Tensor, mean_norm: float) -> None:
    """Gives B's `empty` rows one value, such that their row of s BA has EMPTY_ROW of the other rows' mean norm."""
    columns = layer.lora_A[ADAPTER].weight.float().sum(dim=0)
    value = EMPTY_ROW * (mean_norm or 1.0) / (abs(layer.scaling[ADAPTER]) * float(torch.linalg.vector_norm(columns)))
    b = layer.lora_B[ADAPTER].weight
    b.data[empty.to(b.device)] = value


def compile_layers(model: Any, *, in_pieces: bool = False) -> int:
    """Compiles each decoder layer in place (one graph serves all of them) and returns how many.

    Args:
        in_pieces: an engine gathers a layer's weights in hooks around its forward pass, which stay outside the graph.

    Raises:
        BackendError: the model has no list of decoder layers.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = getattr(base.get_decoder(), "layers", None)
    if layers is None:
        raise BackendError(f"--enable_torch_compile: {type(base).__name__} has no `layers` to compile one by one. Set it to False")
    torch._dynamo.config.optimize_ddp = False  # it would cut each layer's graph at DDP's buckets, and keep what crosses the cuts
    for layer in layers:
        if in_pieces:
            layer.forward = torch.compile(layer.forward)
        else:
            layer.compile()
    if in_pieces:
        return len(layers)
    # the first layer's input is made to need a gradient, as the others' does: one graph for all
    base.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_() if torch.is_grad_enabled() else out)
    return len(layers)


def describe(model: Any) -> str:
    """One line: how many parameters train, of how many."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = model.num_parameters()
    return f"training {trained:,} of {total:,} parameters ({trained / total:.2%}), all fp32"
