"""The adapter's tensors by layer, and one layer's merge: PEFT's own arithmetic, in fp32, on that layer alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from surefoot.errors import BackendError, NumericsError, UsageError

PREFIX = "base_model.model."
PARTS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
NAME = "default"


class Adapter(NamedTuple):
    """`layers` are the adapter's tensors by module and part; `replaced` are whole tensors that were trained beside it, by name."""

    config: LoraConfig
    layers: dict[str, dict[str, torch.Tensor]]
    replaced: dict[str, torch.Tensor]


def read(folder: Path) -> Adapter:
    """The adapter in `folder`.

    Raises:
        UsageError: the file is damaged, or holds a tensor that is not understood. NumericsError: a tensor is not finite.
    """
    file = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{file} cannot be read ({error}): take another checkpoint") from None
    layers: dict[str, dict[str, torch.Tensor]] = {}
    replaced, strange = {}, []
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        part = next((part for part in PARTS if name.endswith(f".{part}")), None)
        if not bool(torch.isfinite(tensor).all()):
            raise NumericsError(f"{file}: {key} is not finite. The training broke: take an earlier checkpoint")
        if part:
            layers.setdefault(name.removesuffix(f".{part}"), {})[part] = tensor
        elif "lora_" not in name and name.endswith((".weight", ".bias")):
            replaced[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
        else:
            strange.append(key)
    if strange or not layers:
        raise UsageError(f"{file}: {f'{strange[0]} is not understood' if strange else 'it holds no LoRA tensors'}, so it is not merged")
    return Adapter(LoraConfig.from_pretrained(str(folder)), layers, replaced)


@torch.no_grad()
def merged(adapter: Adapter, name: str, kind: type[torch.nn.Module], weight: torch.Tensor) -> torch.Tensor:
    """The fp32 weight of the module `name` with its adapter merged: W + s BA, or m (W + s BA) / |W + s BA| by rows for DoRA.

    Args:
        kind: of the module: Linear, Conv1D (weight transposed) or Embedding.
        weight: of the base as the adapter saw it.

    Raises:
        UsageError: shapes disagree. BackendError: PEFT refuses. NumericsError: the result is not finite.
    """
    layer = _layer(adapter.config, name, _bare(kind, weight.float()))
    live = {part: parameter for part, parameter in _parts(layer).items() if parameter is not None}
    saved = adapter.layers[name]
    for part in live.keys() | saved.keys():
        here, there = live.get(part), saved.get(part)
        if here is None or there is None or here.shape != there.shape:
            shapes = (
                f"{None if there is None else tuple(there.shape)} in the file, {None if here is None else tuple(here.shape)} for this base"
            )
            raise UsageError(f"{name}.{part}: shape {shapes}. Is this the adapter's base model?")
        here.copy_(there)
    try:
        layer.merge(safe_merge=True)
    except ValueError as error:  # PEFT's own check for NaN
        raise NumericsError(f"{name}: the merged weight is not finite (a zero row of the base under DoRA?): {error}") from None
    result: torch.Tensor = layer.get_base_layer().weight.detach()
    return result


def _bare(kind: type[torch.nn.Module], weight: torch.Tensor) -> torch.nn.Module:
    """A module of that kind with this weight and no bias, which the merge leaves alone."""
    rows, columns = weight.shape
    with torch.device("meta"):
        if issubclass(kind, torch.nn.Embedding):
            module: torch.nn.Module = torch.nn.Embedding(rows, columns)
        elif issubclass(kind, Conv1D):
            module = Conv1D(columns, rows)
        else:
            module = torch.nn.Linear(columns, rows, bias=False)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return module


def _layer(config: LoraConfig, name: str, module: torch.nn.Module) -> Any:
    """The module as PEFT's adapted layer, at its full name, by which rank_pattern and alpha_pattern find it.

    PiSSA and OLoRA take their part out of the base's weight here, as they did when training began.
    """
    root = place = torch.nn.Module()
    *path, leaf = name.split(".")
    for step in path:
        below = torch.nn.Module()
        place.add_module(step, below)
        place = below
    place.add_module(leaf, module)
    init = config.init_lora_weights if config.init_lora_weights in ("pissa", "olora") else False
    alone = dataclasses.replace(
        config,
        target_modules=[name],
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=None,
        bias="none",
        eva_config=None,
        init_lora_weights=init,
        inference_mode=True,
    )
    try:
        inject_adapter_in_model(alone, root, adapter_name=NAME)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise BackendError(f"PEFT cannot adapt {name}: {error}") from None
    return root.get_submodule(name)


def _parts(layer: Any) -> dict[str, torch.Tensor | None]:
    """The layer's own tensors by the names that files use."""
    magnitude = layer.lora_magnitude_vector[NAME].weight if NAME in layer.lora_magnitude_vector else None
    if NAME in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[NAME], layer.lora_embedding_B[NAME]
        return {"lora_embedding_A": a, "lora_embedding_B": b, "lora_magnitude_vector": magnitude}
    return {"lora_A.weight": layer.lora_A[NAME].weight, "lora_B.weight": layer.lora_B[NAME].weight, "lora_magnitude_vector": magnitude}
