"""Packed rows for the tests: lengths like the commonsense file's, the tensors of packed rows, and a small model over them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from surefoot import adapters
from surefoot.backends import hf
from surefoot.config import Config
from surefoot.data.masking import Encoded
from surefoot.data.packing import PackedCollator, PackedRows
from surefoot.data.rows import Collator, Places, Rows, flat
from surefoot.plan import make_plan
from tests.conftest import SMALL_MODEL, inputs, machine

PAD = 3
LENGTHS = (37, 5, 24, 1, 30, 12, 2)


def commonsense_lengths(rows: int) -> np.ndarray:
    """Tokens of rows like the commonsense file's: 137 in the mean, 256 at most."""
    lengths = np.random.default_rng(0).lognormal(np.log(136), 0.33, rows * 2).round().astype(np.int64)
    return lengths[(lengths >= 24) & (lengths <= 256)][:rows]


def rows_of(*lengths: int) -> Rows:
    draw = np.random.default_rng(1)
    encoded = [Encoded(draw.integers(10, 400, size=n).astype(np.int32), np.arange(n) >= n // 3, 0) for n in lengths]
    count = len(lengths)
    return flat(encoded, Places(("rows.jsonl",), np.zeros(count, dtype=np.int32), np.arange(1, count + 1, dtype=np.int32)))


def collated(rows: Rows, together: list[list[int]], slots: int) -> tuple[PackedRows, PackedCollator]:
    packed = PackedRows(rows, [np.array(indices) for indices in together], slots)
    collator = PackedCollator(separate=Collator(pad_token_id=PAD), slots=slots, longest=packed.longest, segments=packed.segments)
    return packed, collator


def small_model(attention: str = "eager", dtype: Any = torch.float32, method: str = "dora") -> Any:
    """The shipped model with an adapter on it, ready for gradients that are not zero."""
    config = Config.parse({"base_model": str(SMALL_MODEL), "adapter_name": method, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0})
    plan = make_plan(config, machine(), inputs(model_path=str(SMALL_MODEL)))
    model = adapters.attach(hf.load_model(plan.model, 1, None), plan.adapter, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.get_base_model().set_attn_implementation(attention)
    return model.to(dtype)


def trained_on(model: Any, batches: list[dict[str, Any]], **more: Any) -> tuple[torch.Tensor, float, dict[str, torch.Tensor]]:
    """The logits [tokens, vocabulary] of the real tokens in the order of rows 0, 1, ..., the loss, the gradients; tokens weigh the same."""
    model.train()
    model.zero_grad()
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    logits: dict[int, torch.Tensor] = {}
    loss = 0.0
    for batch in batches:
        given = {name: value for name, value in batch.items() if name not in ("lengths", "rows")}
        out = model(**given, **more, num_items_in_batch=tokens)
        out.loss.backward()
        loss += out.loss.item()
        real = out.logits[0, : int(batch["lengths"].sum())].detach()
        for row, piece in zip(batch["rows"].tolist(), real.split(batch["lengths"].tolist()), strict=True):
            logits[row] = piece
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return torch.cat([logits[row] for row in sorted(logits)]), loss, gradients


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())
