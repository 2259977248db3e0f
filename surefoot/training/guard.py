"""Finite or stop: before optimizer.step a step's loss, gradient norm and trained tokens are known to all ranks, and all decide alike."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

SPIKE_WINDOW = 64  # losses a new one is compared with
SPIKE_HISTORY = 16  # losses needed before one is called a spike
SPIKE_SCORE = 8.0  # robust deviations above the median
SPIKE_FLOOR = 0.02  # of the median: the least that counts as one deviation, for losses that hardly vary
GAUSSIAN = 1.4826  # median absolute deviation to standard deviation, for normal data (Iglewicz and Hoaglin 1993)


class MicroBatch(NamedTuple):
    """One forward pass of the step: its inputs, which rows they are, its loss (on the device), and the random state before it."""

    inputs: dict[str, Any]  # tensors, and the ints of a packed row
    rows: torch.Tensor
    loss: torch.Tensor
    random: dict[str, torch.Tensor]


class StepNumbers(NamedTuple):
    """Of one optimizer step over all ranks: mean loss, gradient norm before clipping, trained tokens (None where nobody counts them).

    stops: some rank was asked to stop.
    """

    loss: float
    grad_norm: float
    tokens: int | None
    stops: bool = False

    def complaint(self, *, may_overflow: bool = False) -> str | None:
        """What is wrong with them, None when the optimizer may use them.

        Args:
            may_overflow: an infinite norm is the loss scaler's business (fp16 finds its scale by overflowing).
        """
        if self.tokens == 0:
            return "no token of the batch is trained"
        if not _is_finite(self.loss):
            return f"the loss is {self.loss}"
        if not _is_finite(self.grad_norm) and not may_overflow:
            return f"the gradient norm is {self.grad_norm}"
        return None


@dataclass(kw_only=True)
class Guard:
    """Holds the micro-batches of the step under way, and what became of the earlier ones."""

    max_bad_steps: int
    processes: int
    window: list[MicroBatch] = field(default_factory=list)
    in_a_row: int = 0
    bad_steps: list[int] = field(default_factory=list)
    spikes: list[int] = field(default_factory=list)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=SPIKE_WINDOW))
    unlogged: list[float] = field(default_factory=list)
    total: float = 0.0
    good_steps: int = 0

    def collect(self, inputs: dict[str, Any], rows: torch.Tensor, loss: torch.Tensor, random: dict[str, torch.Tensor]) -> None:
        self.window.append(MicroBatch(inputs, rows, loss, random))

    def measure(self, grad_norm: Any, tokens: torch.Tensor | None, *, stops: bool) -> torch.Tensor:
        """The step's mean loss, gradient norm, trained tokens (-1: not counted), share of ranks asked to stop: float64 [4], on the device.

        The same on every rank, after one all-reduce: a NaN or an infinity of any rank survives the sum. Nothing here makes the host wait.

        Args:
            grad_norm: of this rank, a scalar tensor or a number.
            tokens: of all ranks, an integer scalar.
            stops: this rank is asked to stop.
        """
        device = self.window[-1].loss.device
        loss = torch.stack([batch.loss.double() for batch in self.window]).sum()
        numbers = torch.stack([loss, torch.as_tensor(grad_norm, dtype=torch.float64, device=device), loss.new_tensor(float(stops))])
        if self.processes > 1:
            torch.distributed.all_reduce(numbers)
            numbers /= self.processes
        count = torch.as_tensor(-1 if tokens is None else tokens, dtype=torch.float64, device=device)
        return torch.cat([numbers[:2], count.reshape(1), numbers[2:]])

    def accept(self, numbers: StepNumbers) -> None:
        self.in_a_row = 0
        self.good_steps += 1
        self.total += numbers.loss
        self.recent.append(numbers.loss)
        self.unlogged.append(numbers.loss)

    def reject(self, step: int) -> bool:
        """Counts a bad step; True when it is one too many in a row."""
        self.in_a_row += 1
        self.bad_steps.append(step)
        return self.in_a_row >= self.max_bad_steps

    def spike(self, loss: float) -> str | None:
        """Says so when the loss stands far above the median of the recent ones (robust z-score)."""
        if len(self.recent) < SPIKE_HISTORY:
            return None
        median = statistics.median(self.recent)
        deviation = GAUSSIAN * statistics.median(abs(value - median) for value in self.recent)
        score = (loss - median) / max(deviation, SPIKE_FLOOR * abs(median), 1e-12)
        if score < SPIKE_SCORE:
            return None
        return f"loss {loss:.4f} is {score:.1f} robust deviations above {median:.4f}, the median of the last {len(self.recent)} steps"

    def take_mean_loss(self) -> float:
        """The mean loss of the good steps since the last call, NaN where there was none."""
        mean = statistics.fmean(self.unlogged) if self.unlogged else float("nan")
        self.unlogged.clear()
        return mean

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        kept = ("in_a_row", "bad_steps", "spikes", "unlogged", "total", "good_steps")
        return {name: getattr(self, name) for name in kept} | {"recent": list(self.recent)}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up an earlier state(); bad steps that ended a run are not held against the one that goes on from there."""
        for name, value in state.items():
            setattr(self, name, deque(value, maxlen=SPIKE_WINDOW) if name == "recent" else value)
        self.in_a_row %= self.max_bad_steps

    @property
    def mean_loss(self) -> float:
        """Over all good steps."""
        return self.total / self.good_steps if self.good_steps else float("nan")


def is_bad(measured: torch.Tensor) -> torch.Tensor:
    """1.0 where the optimizer must not use the step, else 0.0: a float32 scalar on the device, as torch's fused optimizers read it."""
    return (~torch.isfinite(measured).all() | (measured[2] == 0)).float()


class Pending(NamedTuple):
    """A step whose numbers are on their way to the host."""

    step: int
    numbers: torch.Tensor
    arrived: torch.cuda.Event | None
    window: list[MicroBatch]

    def read(self) -> StepNumbers:
        if self.arrived is not None:
            self.arrived.synchronize()
        return read(self.numbers)


def send(step: int, measured: torch.Tensor, window: list[MicroBatch]) -> Pending:
    """Starts the copy of measure()'s numbers to the host."""
    if measured.device.type != "cuda":
        return Pending(step, measured, None, window)
    host = torch.empty(measured.shape, dtype=measured.dtype, pin_memory=True)
    host.copy_(measured, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return Pending(step, host, arrived, window)


def read(measured: torch.Tensor) -> StepNumbers:
    """measure()'s numbers on the host, which waits for the device."""
    loss, norm, tokens, stops = measured.tolist()
    return StepNumbers(loss, norm, int(tokens) if tokens >= 0 else None, stops > 0)


def random_state() -> dict[str, torch.Tensor]:
    """The state of torch's generators, from which dropout is drawn."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def restore_random(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _is_finite(number: float) -> bool:
    return number - number == 0.0
