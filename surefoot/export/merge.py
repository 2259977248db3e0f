"""The merge: every tensor of the base as the adapter saw it, with its adapter, in the dtype asked for, shard by shard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from transformers.pytorch_utils import Conv1D

from surefoot.errors import NumericsError, UsageError
from surefoot.export import adapter, carry, seen, shards
from surefoot.export.adapter import Adapter
from surefoot.export.seen import Skeleton
from surefoot.export.shards import Output, Stored
from surefoot.export.source import Source

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ROWS_MULTIPLE = 64  # as training grows the embedding when PAD was added (backends/hf.py)


class Work(NamedTuple):
    """All that a tensor's merge needs, by the names of the tensors to write: where each comes from, the module whose weight it is, and
    what replaces it whole. `rows` is the vocabulary size to write; `untied` is the head's name where it leaves the shared weight.
    """

    source: Source
    adapter: Adapter
    skeleton: Skeleton
    stored: dict[str, Stored]
    modules: dict[str, str]
    replaced: dict[str, torch.Tensor]
    dtype: torch.dtype
    rows: int
    untied: str | None
    device: torch.device


class Merged(NamedTuple):
    """How many tensors the adapter changed, and lines for the user."""

    merged: int
    notes: tuple[str, ...]


def prepare(source: Source, dtype: str) -> Work:
    """Reads the adapter and the base's headers, and matches them.

    Raises:
        UsageError: the adapter and the base do not belong together.
    """
    loaded = adapter.read(source.adapter)
    bones = seen.skeleton(source.base, source.onto, trusts_remote_code=source.trusts_remote_code)
    tensors = shards.stored(source.base)
    places = {name: _stored_name(f"{name}.weight", tensors) for name in bones.kinds}
    embedding = tensors[str(places[bones.embedding])]
    untied = None
    if bones.is_tied and bones.head:
        tensors.pop(str(places[bones.head]), None)  # a copy that loading ignores
        untied = f"{bones.head}.weight" if _touches_vocabulary(loaded, bones) else None
        places[bones.head] = untied
        tensors |= {untied: embedding} if untied else {}
    replaced = {_stored_name(name, tensors) or name: tensor for name, tensor in loaded.replaced.items()}
    missing = [name for name in sorted(loaded.layers.keys() | bones.quantized) if not places.get(name)]
    missing += [name for name in replaced if name not in tensors]
    if missing:
        raise UsageError(
            f"{source.base}: its files hold no weight of {missing[0]}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}, which "
            "the adapter or its quantization changes. Is this the adapter's base model? Files laid out otherwise are not merged"
        )
    return Work(
        source=source,
        adapter=loaded,
        skeleton=bones,
        stored=tensors,
        modules={place: name for name, place in places.items() if place},
        replaced=replaced,
        dtype=DTYPES[dtype],
        rows=_rows(source, loaded, embedding.shape[0], bones),
        untied=untied,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )


def _stored_name(name: str, tensors: dict[str, Stored]) -> str | None:
    """The tensor's name in the files, which may lack the model's prefix (GPT-2: h.0 for transformer.h.0)."""
    return next((place for place in (name, name.partition(".")[2]) if place in tensors), None)


def _touches_vocabulary(loaded: Adapter, bones: Skeleton) -> bool:
    """True where the adapter changes embedding or head alone, so that they cannot share a weight any more."""
    names = {bones.embedding, bones.head}
    return bool(names & loaded.layers.keys()) or any(name.removesuffix(".weight") in names for name in loaded.replaced)


def _rows(source: Source, loaded: Adapter, rows: int, bones: Skeleton) -> int:
    """The vocabulary rows to write: the base's, grown as training grew them when the tokenizer has more tokens."""
    whole = loaded.replaced.get(f"{bones.embedding}.weight")
    if whole is not None:
        return int(whole.shape[0])
    needed = carry.vocabulary_size(source)
    return rows if needed <= rows else -(-needed // ROWS_MULTIPLE) * ROWS_MULTIPLE


def outputs(work: Work) -> list[Output]:
    """Every tensor to write, in the base's order; a head that was tied comes last."""
    found = []
    for name, tensor in work.stored.items():
        is_vocabulary = work.modules.get(name) in (work.skeleton.embedding, work.skeleton.head)
        shape = (work.rows, *tensor.shape[1:]) if is_vocabulary else tensor.shape
        found.append(Output(name, shape, work.dtype if tensor.is_floating else tensor.read().dtype))
    return found


def write(work: Work, out: Path, *, shard_bytes: int) -> Iterator[Output]:
    """Writes the merged weights to `out`, yielding each tensor's Output when it is done.

    In memory are one shard, the adapter, and fp32 copies of the matrix at hand.
    """
    return shards.write(out, outputs(work), lambda output: made(work, output), limit=shard_bytes)


@torch.no_grad()
def made(work: Work, output: Output) -> torch.Tensor:
    """One tensor of the merged model, on the CPU.

    Raises:
        NumericsError: it does not fit the dtype.
    """
    if output.name in work.replaced:
        return _cast(output.name, work.replaced[output.name], work.dtype)
    weight = work.stored[output.name].read()
    if not weight.is_floating_point():
        return weight
    module = work.modules.get(output.name)
    if module in work.adapter.layers or module in work.skeleton.quantized or tuple(weight.shape) != output.shape:
        weight = _changed(work, str(module), weight.to(work.device), output.shape[0])
    return _cast(output.name, weight, work.dtype)


def _changed(work: Work, module: str, weight: torch.Tensor, rows: int) -> torch.Tensor:
    kind = work.skeleton.kinds[module]
    if module in work.skeleton.quantized:
        weight = seen.as_seen(weight, work.source.onto, is_transposed=issubclass(kind, Conv1D))
    if module in (work.skeleton.embedding, work.skeleton.head):
        weight = grown(weight, rows)
    return adapter.merged(work.adapter, module, kind, weight) if module in work.adapter.layers else weight


def grown(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """The embedding or head with new rows below, each the mean of the old ones, whose logit is never the largest."""
    missing = rows - weight.shape[0]
    return weight if missing <= 0 else torch.cat([weight, weight.float().mean(dim=0, keepdim=True).to(weight.dtype).expand(missing, -1)])


def _cast(name: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    result = weight.to(device="cpu", dtype=dtype).contiguous()
    if not bool(torch.isfinite(result).all()):
        cause = (
            "is beyond fp16's 65504: use --dtype=bf16"
            if bool(torch.isfinite(weight).all())
            else "is not finite: is the base model damaged?"
        )
        raise NumericsError(f"{name}: a value {cause}")
    return result


def finish(work: Work, out: Path) -> Merged:
    """Writes all that is not weights beside them, and returns what was done."""
    notes = list(work.source.notes)
    rows_before = int(work.source.base_config.get("vocab_size", work.rows))
    if work.rows > rows_before:
        notes.append(f"vocabulary: {rows_before} -> {work.rows} rows, as in training; a new row is the mean of the others")
    if work.untied:
        notes.append(f"{work.untied} is written by itself: the adapter changes embedding or head, which the base shares")
    carry.config(work.source, out, dtype=work.dtype, rows=work.rows, is_untied=work.untied is not None)
    notes += carry.files(work.source, out)
    return Merged(len(work.adapter.layers) + len(work.replaced), tuple(notes))
