"""LoftQ's start of an adapter over NF4 weights: s B A is the best rank-r piece of what quantization lost (arXiv 2310.08659, one step)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open

from surefoot.errors import BackendError

ADAPTER = "default"


@torch.no_grad()
def start(model: Any, path: str, revision: str | None) -> int:
    """Sets A and B of every quantized layer from the checkpoint's own weights; returns how many layers.

    PEFT's replace_lora_weights_loftq() does so on a GPU only, and leaves the adapter's scale s out of account.

    Args:
        path: the base model, a folder or a Hub id that has been loaded (only its local copy is read).

    Raises:
        BackendError: the checkpoint lacks a layer's weight under the layer's name.
    """
    from peft.tuners.lora import Linear4bit  # PEFT has it only where bitsandbytes is installed

    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit) and ADAPTER in module.lora_A
    }
    missing = set(layers)
    for name, weight in _weights(_folder(path, revision), {f"{name}.weight": name for name in layers}):
        _set(layers[name], weight)
        missing.discard(name)
    if missing:
        raise BackendError(f"--init_lora_weights=loftq: {path} has no weight of {min(missing)}. Use --init_lora_weights=True")
    return len(layers)


def _set(layer: Any, weight: torch.Tensor) -> None:
    """weight [out, in] is the checkpoint's. A [r, in] and B [out, r] share the singular values evenly."""
    kept = dequantize_module_weight(layer.get_base_layer()).float()
    lost = weight.to(kept.device).float() - kept
    left, values, right = torch.svd_lowrank(lost, q=min(2 * layer.r[ADAPTER], *lost.shape), niter=4)
    rank = layer.r[ADAPTER]
    root = (values[:rank] / layer.scaling[ADAPTER]).sqrt()
    layer.lora_B[ADAPTER].weight.copy_(left[:, :rank] * root)
    layer.lora_A[ADAPTER].weight.copy_((right[:, :rank] * root).T)


def _weights(folder: Path, wanted: dict[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The wanted tensors of a folder's safetensors files, one after the other."""
    index = folder / "model.safetensors.index.json"
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    for file in files:
        with safe_open(folder / file, framework="pt", device="cpu") as content:
            for key in content.keys():  # noqa: SIM118 (it is no dict)
                if key in wanted:
                    yield wanted[key], content.get_tensor(key)


def _folder(path: str, revision: str | None) -> Path:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, revision=revision, local_files_only=True))
