"""A run that cannot go wrong quietly: trainable tensors are fp32, gradients are finite, and the adapter has moved at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback

from surefoot.errors import BackendError, NumericsError


def trainable(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def check_masters(model: Any) -> None:
    """Raises BackendError for a trainable tensor that is not fp32: in bf16 magnitudes do not move (huggingface/trl#7268)."""
    wrong = [
        f"{name} ({str(parameter.dtype).removeprefix('torch.')})"
        for name, parameter in trainable(model)
        if parameter.dtype != torch.float32
    ]
    if wrong:
        raise BackendError(
            f"{len(wrong)} trainable tensors are not fp32 under this engine, first {wrong[0]}: master weights must be. "
            "Use profiles/ddp.yaml, or set bf16: enabled: false in the DeepSpeed configuration"
        )


class Masters(TrainerCallback):  # type: ignore[misc]
    """check_masters() on the model as the engine made it: DeepSpeed and FSDP may cast it while they prepare it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        check_masters(model)


def check_gradient(norm: float, step: int) -> None:
    """Raises NumericsError for a gradient norm that is not finite, before the optimizer uses it."""
    if norm != norm or norm in (float("inf"), float("-inf")):
        raise NumericsError(
            f"step {step}: the gradient norm is {norm}; the weights were left as after step {step - 1}. "
            "Lower --learning_rate, use --attn_implementation=eager, or continue from the last checkpoint with --resume"
        )


class Movement:
    """Remembers a digest of every trainable tensor to tell at the end which ones moved."""

    def __init__(self, model: Any) -> None:
        self.before = {name: _digest(parameter) for name, parameter in trainable(model)}

    def check(self, model: Any) -> list[str]:
        """The names of the tensors that did not move.

        Raises:
            NumericsError: none moved.
        """
        still = [name for name, parameter in trainable(model) if self.before.get(name) == _digest(parameter)]
        if len(still) == len(self.before):
            raise NumericsError(
                f"nothing was learned: none of the {len(still)} trainable tensors changed. With one or two steps the warm-up keeps "
                "the learning rate at 0; use --warmup_steps=0 or more steps"
            )
        return still


def _digest(tensor: torch.Tensor) -> tuple[float, float]:
    values = tensor.detach().double()
    return float(values.sum()), float(values.square().sum())
