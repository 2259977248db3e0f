"""Are the tensors of two models the same but for one rounding? Sharper than logits: a layer's adapter that is missing moves those of a
30-layer model by less than bf16 does, and NF4 hides nearly everything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from surefoot.export import shards

# The most that rounding moves a weight. By block: half the widest gap between levels, as a share of the block's largest value (q8_0: 0.5
# of 127 and fp16's 2^-11 for the scale; NF4: 0.152 and bf16's 2^-8 before), and what the block's scale may be off by, as a share of the
# tensor's largest (NF4's scales are 8-bit numbers over 256 blocks). Else one ulp, as a share of the weight
BLOCKS = {"q8_0": (32, 0.0047, 0.0), "nf4": (64, 0.16, 0.01)}
SHARES = {"fp32": 2.0**-22, "fp16": 2.0**-10, "q8_0": 2.0**-10, "bf16": 2.0**-8, "nf4": 2.0**-8}
SLACK = 4e-6  # the order of fp32 sums; a q8_0 scale among fp16's subnormals is off by 2^-25, times 127


@torch.no_grad()
def beyond(model: Any, folder: Path, form: str, columns: int = 0) -> list[str]:
    """What of `model` is farther from the tensors in `folder` than `form` rounds, in words.

    Args:
        form: of whichever of the two is rounded; a key of SHARES.
        columns: of the vocabulary, those to compare; 0: all. Rows that a merge adds are not the adapter's.
    """
    tensors = shards.stored(folder)
    vocabulary = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None}
    found, wrong = 0, []
    for name, parameter in model.named_parameters():
        stored = tensors.get(name) or tensors.get(name.partition(".")[2])
        if stored is None:
            continue
        found += 1
        rows = (columns or None) if id(parameter) in vocabulary else None
        if not _is_rounded(stored.read().float()[:rows], _plain(parameter)[:rows], form, is_4bit=hasattr(parameter, "quant_state")):
            wrong.append(name)
    if wrong or not found:
        return [f"{len(wrong)} of {found} tensors are not those of {folder.name} but for {form}'s rounding, first {(*wrong, 'none')[0]}"]
    return []


def _is_rounded(weight: torch.Tensor, other: torch.Tensor, form: str, *, is_4bit: bool) -> bool:
    limit = _limit(weight, form, in_blocks=form != "nf4" or is_4bit)
    turned = other.T if is_4bit else other  # a Conv1D is quantized transposed
    return any(one.shape == weight.shape and bool(((one - weight).abs() <= limit).all()) for one in (other, turned))


def _plain(parameter: Any) -> torch.Tensor:
    """The weight in fp32 on the CPU, a 4-bit one dequantized."""
    if getattr(parameter, "quant_state", None) is None:
        plain: torch.Tensor = parameter.detach().float().cpu()
        return plain
    import bitsandbytes as bnb

    return bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state).float().cpu()


def _limit(weight: torch.Tensor, form: str, *, in_blocks: bool) -> torch.Tensor:
    """By how much each value may differ, of the weight's shape or one that broadcasts to it."""
    size, share, of_tensor = BLOCKS.get(form, (0, 0.0, 0.0))
    if not in_blocks or not size or weight.dim() < 2:
        return weight.abs() * SHARES[form] + SLACK
    largest = weight.abs().max()
    if weight.numel() % size or (form == "q8_0" and weight.shape[-1] % size):  # NF4's last block is short; q8_0 leaves such rows in fp16
        return largest * (share + of_tensor if form == "nf4" else SHARES[form]) + SLACK
    of_block = weight.reshape(-1, size).abs().amax(dim=1, keepdim=True)
    return (of_block * share + largest * of_tensor).expand(-1, size).reshape(weight.shape) + SLACK
