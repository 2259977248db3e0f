"""Zero and sick weights, found before the adapter is attached: a zero row makes DoRA's magnitude / norm 0/0, a NaN ends every run."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight

from surefoot.errors import BackendError


@torch.no_grad()
def zero_rows(model: Any, target_modules: tuple[str, ...] | None) -> dict[str, int]:
    """The number of all-zero rows (outputs) of each linear layer to adapt, where there are any.

    Args:
        target_modules: names or name endings of layers; None: every linear layer but the head.

    Raises:
        BackendError: a weight anywhere in the model is NaN or infinite.
    """
    sick, zero = [], {}
    head = model.get_output_embeddings()
    linear = {module.weight: name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        layer = linear.get(parameter)
        weight = dequantize_module_weight(modules[layer]) if layer is not None else parameter
        norms = torch.linalg.vector_norm(weight.float(), dim=-1)
        bad = int((~torch.isfinite(norms)).sum())
        if bad:
            sick.append(f"{name} ({bad} of {norms.numel()} rows)")
        is_target = layer is not None and (_is_named(layer, target_modules) if target_modules else modules[layer] is not head)
        empty = int((norms == 0).sum()) if is_target else 0
        if layer is not None and empty:
            zero[layer] = empty
    if sick:
        raise BackendError(
            f"the base model's weights are not finite: {', '.join(sick[:5])}{' ...' if len(sick) > 5 else ''}. The file is damaged, or was "
            "saved from a run that broke: download or copy it again"
        )
    return zero


def _is_named(layer: str, targets: tuple[str, ...]) -> bool:
    return any(layer == target or layer.endswith(f".{target}") for target in targets)


def describe(zero: dict[str, int], method: str) -> str:
    """One line on the zero rows that were found."""
    first = ", ".join(f"{name} ({count})" for name, count in list(zero.items())[:5])
    then = "; DoRA starts them at a millionth of the mean row norm, so that no 0/0 arises" if method == "dora" else ""
    return f"zero rows: {sum(zero.values()):,} in {len(zero)} target matrices: {first}{' ...' if len(zero) > 5 else ''}{then}"
