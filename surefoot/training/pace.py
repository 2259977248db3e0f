"""Pace: what transformers and DeepSpeed walk through and wait for at every pass, where a run needs neither."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import masking_utils


def spare_walks(model: Any, inner: Any, trained: list[torch.nn.Parameter]) -> None:
    """Gives the model its engine's train() and zero_grad() without their walks over thousands of modules and frozen tensors at every pass.

    Args:
        model: as the engine wrapped it (DeepSpeed's wrapper is always in training mode); inner: as it was, which evaluation sets to
            eval() alone.
    """
    set_mode = model.train
    set_mode()

    def train(mode: bool = True) -> Any:
        return model if mode and model.training and inner.training else set_mode(mode)  # eval() reaches modules added since

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trained:
            parameter.grad = None

    model.train, model.zero_grad = train, zero_grad


@contextlib.contextmanager
def positions_of_single_rows() -> Iterator[None]:
    """While entered, no row is taken for a packed one.

    transformers asks the device at each pass whether the positions that its model has just counted restart (masking_utils.py:755 of
    5.17.0), and the host waits for the answer.
    """
    plain = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = _never
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = plain


def _never(_positions: torch.Tensor) -> None:
    return None


def spare_deepspeeds_waits(config: dict[str, Any]) -> None:
    """Lets the host run ahead of the device through DeepSpeed's steps, as it does under DDP.

    Its throughput timer, which nobody reads, waits for the device at each forward pass and again in step() (utils/timer.py of 0.19.8).
    step() itself asks the device whether the norm is finite, to drop the step; here each norm is judged one step later, on all ranks, and
    one that is not finite ends the run.

    Args:
        config: DeepSpeed's, before its engine is made.
    """
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    config.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
    for stage in (stage_1_and_2, stage3):
        stage.is_invalid_grad_norm = _is_judged_later
        stage.mask_nan_or_inf_with_val_inplace = _leave  # its constant is copied from the host, and that waits too


def _is_judged_later(_norm: Any) -> bool:
    return False


def _leave(*_: Any, **__: Any) -> None:
    """The sum of the groups' norms is infinite where one is not finite, marked or not (combine_grad_norm_groups)."""
