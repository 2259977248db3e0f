"""Adapter health: trainable tensors are fp32, all in the optimizer, magnitudes undecayed, get gradients and move by more than rounding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from surefoot.errors import BackendError, NumericsError

FIRST_CHECK = 20  # optimizer steps
SAMPLE = 16384  # elements of a tensor that are remembered, evenly spaced
NO_DECAY = ("lora_magnitude_vector", "bias", "norm")
KINDS = {"lora_A": "A", "lora_B": "B", "lora_magnitude_vector": "magnitude", "lora_embedding_A": "A", "lora_embedding_B": "B"}


class Still(NamedTuple):
    """Trainable tensors that did not move, and whether that is all of a kind (A, B, magnitude, weight), which no healthy run has."""

    names: tuple[str, ...]
    frozen_kinds: tuple[str, ...]


def trainable(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def is_decayed(name: str) -> bool:
    """False for magnitudes, norms and biases: decay would pull DoRA's magnitudes, and with them every output, to zero."""
    return not any(word in name.lower() for word in NO_DECAY)


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


def check_optimizer(model: Any, optimizer: Any) -> None:
    """Raises BackendError for a trainable tensor that the optimizer does not hold, or decays against the rule of is_decayed()."""
    decay = {id(parameter): group.get("weight_decay", 0.0) for group in optimizer.param_groups for parameter in group["params"]}
    lost = [name for name, parameter in trainable(model) if id(parameter) not in decay]
    if lost:
        raise BackendError(f"{len(lost)} trainable tensors are in no group of the optimizer and would never change, first {lost[0]}")
    decayed = [name for name, parameter in trainable(model) if decay[id(parameter)] and not is_decayed(name)]
    if decayed:
        raise BackendError(f"{len(decayed)} magnitudes, norms or biases are under weight decay, first {decayed[0]}: it pulls them to zero")


def without_gradient(model: Any) -> list[str]:
    """The trainable tensors whose gradient is missing, not finite, or zero throughout."""
    return [name for name, parameter in trainable(model) if not _is_useful(parameter.grad)]


def _is_useful(gradient: torch.Tensor | None) -> bool:
    if gradient is None:
        return False
    size = gradient.abs().max().item() if gradient.numel() else 0.0
    return 0.0 < size < float("inf")


class Movement:
    """Remembers a sample of every trainable tensor, to tell which of them moved by more than one unit in the last place."""

    def __init__(self, model: Any) -> None:
        samples = {name: _sample(parameter) for name, parameter in trainable(model)}
        self.before = {name: sample for name, sample in samples.items() if sample.numel()}  # an engine may keep a tensor elsewhere

    def still(self, model: Any) -> Still:
        after = {name: _sample(parameter) for name, parameter in trainable(model) if name in self.before}
        names = tuple(name for name in self.before if not _moved(self.before[name], after[name]))
        kinds = {kind(name) for name in names}
        return Still(names, tuple(sorted(kinds - {kind(name) for name in self.before if name not in names})))

    def largest(self, frozen_kinds: Iterable[str]) -> float:
        """The largest remembered value among tensors of these kinds: its unit in the last place is what a step must exceed."""
        values = [float(sample.abs().max()) for name, sample in self.before.items() if kind(name) in frozen_kinds]
        return max(values, default=0.0)


def kind(name: str) -> str:
    """A, B, magnitude, or weight."""
    return next((kind for part, kind in KINDS.items() if part in name), "weight")


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # FSDP's DTensor: this rank's shard
    values = local.detach().reshape(-1)
    return values[:: max(1, values.numel() // SAMPLE)].float().cpu().clone()


def _moved(before: torch.Tensor, after: torch.Tensor) -> bool:
    ulp = torch.nextafter(before.abs(), torch.tensor(float("inf"))) - before.abs()
    return bool(((after - before).abs() > ulp).any())


class Health(TrainerCallback):  # type: ignore[misc]
    """Checks at the start, after 20 steps and, through finish(), at the end; `findings` is what run.json keeps."""

    def __init__(self, *, checks_optimizer: bool) -> None:
        self.checks_optimizer = checks_optimizer
        self.findings: dict[str, Any] = {}
        self.movement: Movement | None = None
        self.begin = 0
        self.due = FIRST_CHECK
        self.rates = 0.0
        self.judges_short_runs = True

    def remember(self, model: Any) -> None:
        """Takes the tensors as they start, before a checkpoint is loaded: a run is judged whole, however often it was resumed."""
        self.movement = Movement(model)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"findings": self.findings, "due": self.due, "rates": self.rates}

    def restore(self, state: dict[str, Any]) -> None:
        self.findings, self.due, self.rates = state["findings"], state["due"], state["rates"]

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        """On the model as the engine made it: DeepSpeed and FSDP may cast or replace tensors while they prepare it."""
        check_masters(model)
        if self.checks_optimizer:
            check_optimizer(model, optimizer)
        if self.movement is None:  # an engine has replaced the tensors: what moved can be told from here on only
            self.movement = Movement(model)
            self.begin, self.judges_short_runs = state.global_step, state.global_step == 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        is_last = state.global_step + 1 == state.max_steps
        if not self.checks_optimizer or not (is_last or self._steps(state) + 1 == FIRST_CHECK):
            return
        names = without_gradient(model)
        if len(names) < len(self.movement.before if self.movement else names):  # all of them: a skipped step
            self.findings["without_gradient"] = names

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        self.rates += max((float(group["lr"]) for group in optimizer.param_groups), default=0.0) if optimizer is not None else 0.0
        if self._steps(state) == self.due and self.movement is not None:
            still = self.movement.still(model)
            if still.frozen_kinds and self.rates < 8 * torch.finfo(torch.float32).eps * self.movement.largest(still.frozen_kinds):
                self.due *= 2  # the warm-up has not yet allowed more than rounding
                return
            self.findings[f"still_after_{self.due}_steps"] = list(still.names)
            _refuse_frozen(still, f"after {self.due} steps")

    def finish(self, model: Any, steps: int) -> list[str]:
        """The names of the tensors that did not move in this run; empty for a resumed run that had nothing left to do.

        Raises:
            NumericsError: all of a kind did not move: nothing, or not the adapter that was asked for, was learned.
        """
        if self.movement is None or steps == self.begin:
            return []
        still = self.movement.still(model)
        is_first_of_lora = steps - self.begin == 1 and set(still.frozen_kinds) == {"A"}  # B is zero until then, so A has no gradient
        is_tail = not self.judges_short_runs and steps - self.begin < FIRST_CHECK  # a resumed schedule's last steps may be tiny
        if not is_first_of_lora and not is_tail:
            _refuse_frozen(still, f"in {steps - self.begin} steps")
        return list(still.names)

    def _steps(self, state: Any) -> int:
        return int(state.global_step) - self.begin


def _refuse_frozen(still: Still, when: str) -> None:
    if still.frozen_kinds:
        raise NumericsError(
            f"nothing was learned by the {' and '.join(still.frozen_kinds)} tensors: none of them moved by more than its rounding {when} "
            f"(first {still.names[0]}). Raise --learning_rate, shorten the warm-up (--warmup_steps=0), or give more steps"
        )
