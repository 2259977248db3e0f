"""The rows of a packed row must not see each other: this model shows it, with this attention, before it is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from surefoot.errors import BackendError

PROBE = 16  # tokens of each of the two rows, at most
LIMIT = 1e-2  # of the largest logit; rows that are apart are so to the bit, but int8 scales and experts are chosen over the whole batch


@torch.no_grad()
def check(model: Any, ids: Any, loss_scope: Callable[[], contextlib.AbstractContextManager[Any]]) -> float:
    """How far another first row moves the second row's logits, as a share of the largest of them.

    Args:
        model: not wrapped by an engine.
        ids: token ids of any row, of which the lowest and the highest make two first rows, and the first ones the second row.
        loss_scope: makes the context of the training forward pass (autocast).

    Raises:
        BackendError: they are moved by more than 1 %, so the rows see each other.
    """
    second = torch.as_tensor(np.asarray(ids[:PROBE], dtype=np.int64))
    was_training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"), loss_scope():
            one, other = (_logits(model, torch.full((PROBE,), int(first)), second) for first in (min(ids), max(ids)))
    finally:
        model.train(was_training)
    moved = float((one - other).abs().max() / one.abs().max().clamp_min(1e-30))
    if not moved <= LIMIT:
        raise BackendError(
            f"--packing: under {type(model).__name__} the rows of a packed row see each other (another first row moves the second's "
            f"logits by {moved:.2g} of the largest). Use --packing=False"
        )
    return moved


def _logits(model: Any, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Of the second of two packed rows, fp32 [tokens, vocabulary]."""
    ids = torch.cat([first, second])
    ends = torch.tensor([0, len(first), len(ids)], dtype=torch.int32, device=model.device)
    inputs = {
        "input_ids": ids[None].to(model.device),
        "position_ids": torch.cat([torch.arange(len(first)), torch.arange(len(second))])[None].to(model.device),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": PROBE,
        "max_length_k": PROBE,
    }
    logits: torch.Tensor = model(**inputs).logits[0, len(first) :].float()
    return logits
