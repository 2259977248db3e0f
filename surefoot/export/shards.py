"""The tensors of a model folder, read one at a time, and written shard by shard so that no more than one is in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from surefoot.errors import BackendError, UsageError

INDEX = "model.safetensors.index.json"


class Stored(NamedTuple):
    """A tensor of a safetensors file; dtype as safetensors names it (BF16, F32)."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_floating(self) -> bool:
        return self.dtype in ("F64", "F32", "F16", "BF16")

    def read(self) -> torch.Tensor:
        """The tensor. The file is opened for it alone, so that its pages are given back."""
        with safe_open(self.file, framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(self.name).clone()
        return tensor


class Output(NamedTuple):
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def stored(folder: Path) -> dict[str, Stored]:
    """Every tensor of the model by name, in the order of its files.

    Raises:
        UsageError: no safetensors, or a file that the index names is missing or damaged.
    """
    found: dict[str, Stored] = {}
    for file in _files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.offset_keys():
                    part = opened.get_slice(name)
                    found[name] = Stored(name, file, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{file} cannot be read ({error}): copy or download it again") from None
    return found


def _files(folder: Path) -> list[Path]:
    """The index's files, or the only one. A folder may hold a second format's weights as well (consolidated.safetensors)."""
    if (folder / INDEX).is_file():
        named = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in sorted(set(named.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UsageError(f"{folder}: {INDEX} names {', '.join(missing[:3])}, which {'is' if len(missing) == 1 else 'are'} missing")
        return files
    files = [folder / "model.safetensors"] if (folder / "model.safetensors").is_file() else sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if files:
        raise UsageError(f"{folder} holds {len(files)} safetensors files and no {INDEX}: copy the index as well")
    hint = (
        "its weights are pytorch_model*.bin: load and save_pretrained() them once"
        if any(folder.glob("pytorch_model*.bin"))
        else "no weights"
    )
    raise UsageError(f"{folder} holds no *.safetensors ({hint})")


def grouped(outputs: Sequence[Output], limit: int) -> list[list[Output]]:
    """The outputs in shards of at most `limit` bytes each, in order; a larger tensor is a shard of its own."""
    groups: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if groups[-1] and size + output.size > limit:
            groups.append([])
            size = 0
        groups[-1].append(output)
        size += output.size
    return groups


def write(folder: Path, outputs: Sequence[Output], make: Callable[[Output], torch.Tensor], *, limit: int) -> Iterator[Output]:
    """Writes the model's safetensors and, for several, their index; yields each tensor once it is made.

    Raises:
        BackendError: the disk refused.
    """
    groups = grouped(outputs, limit)
    names = (
        ["model.safetensors"] if len(groups) == 1 else [f"model-{n:05}-of-{len(groups):05}.safetensors" for n in range(1, len(groups) + 1)]
    )
    for name, group in zip(names, groups, strict=True):
        tensors = {}
        for output in group:
            tensors[output.name] = make(output)
            yield output
        try:
            save_file(tensors, folder / name, metadata={"format": "pt"})
        except (SafetensorError, OSError) as error:
            raise BackendError(f"{folder / name} cannot be written ({error}). Is the disk full?") from None
    if len(groups) > 1:
        index = {
            "metadata": {"total_size": sum(output.size for output in outputs)},
            "weight_map": {output.name: name for name, group in zip(names, groups, strict=True) for output in group},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
