"""recompute(): the first decoder layers keep only their input and run again in the backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

from peft import PeftModel

from surefoot.errors import BackendError
from surefoot.training.offload import HostMemory


def recompute(model: Any, count: int, offload_inputs: bool = False) -> None:
    """Lets the first `count` decoder layers recompute, -1: all of them; the others keep their activations.

    The first ones, since their turn in the backward pass comes last, when the later layers' activations are gone.
    With `offload_inputs` what they do keep, their inputs and the products that a layer's `recompute_passes` spare (ops/recomputed.py),
    waits in host memory.

    Raises:
        BackendError: the model cannot recompute, or has no list of decoder layers to choose from.
    """
    if count == 0:
        return
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not base.supports_gradient_checkpointing:
        raise BackendError(f"{type(base).__name__} cannot recompute activations. Use --use_gradient_checkpointing=False")
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.disable_input_require_grads()  # only the reentrant kind needs it, and the first layer's input gradient costs a GEMM
    checkpointing = [module for module in base.modules() if hasattr(module, "_gradient_checkpointing_func")]
    inputs, products = (HostMemory(), HostMemory()) if offload_inputs else (None, None)
    for module in checkpointing:
        run: Any = module._gradient_checkpointing_func
        if passes := getattr(module, "recompute_passes", None):
            run = partial(run, context_fn=partial(passes, products.park, products.bring_back) if products else passes)
        module._gradient_checkpointing_func = inputs.around(run) if inputs else run
    if count < 0:
        return
    layers = getattr(base.get_decoder(), "layers", None)
    if layers is None:
        raise BackendError(f"{type(base).__name__} has no `layers` to choose from. Use --use_gradient_checkpointing=True, or False")
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < count
