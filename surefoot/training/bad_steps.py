"""A bad step, kept: which micro-batch and which module made it, and the batch with the adapter as files to replay it from."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors.torch import save_file

from surefoot.training.guard import MicroBatch, StepNumbers, random_state, restore_random

FOLDER = "bad_steps"
KEPT = 10  # folders


class Culprit(NamedTuple):
    """The first thing that was not finite. module is a dotted name; phase is weights, forward, loss, backward or gradient."""

    phase: str
    module: str


class Outcome(NamedTuple):
    """A micro-batch run again: its loss, the norm of its gradient (NaN where the forward pass failed), and the first bad thing."""

    loss: float
    grad_norm: float
    culprit: Culprit | None


def rerun(model: Any, batch: MicroBatch, loss_scope: Callable[[], contextlib.AbstractContextManager[Any]]) -> Outcome:
    """Runs a micro-batch forward and backward under watch and names the first non-finite value of it.

    The forward pass is watched module by module; then the gradients of their outputs, from the loss down; then those of the weights.
    No gradient is accumulated and no hook of a data-parallel engine fires; dropout draws what it drew the first time.

    Args:
        model: not wrapped by an engine, with whole (unsharded) weights.
        loss_scope: makes the context of the training forward pass (autocast).
    """
    sick = next((name for name, parameter in model.named_parameters() if parameter.requires_grad and not _is_finite(parameter)), None)
    before, seen = random_state(), list[tuple[Culprit, torch.Tensor]]()
    try:
        with _watched(model, seen), torch.compiler.set_stance("force_eager"):
            outcome = _rerun(model, batch, loss_scope, seen)
    finally:
        restore_random(before)
    return outcome._replace(culprit=Culprit("weights", sick)) if sick is not None else outcome


def _rerun(model: Any, batch: MicroBatch, loss_scope: Callable[[], Any], seen: list[tuple[Culprit, torch.Tensor]]) -> Outcome:
    restore_random(batch.random)
    model.train()
    with loss_scope():
        loss = model(**batch.inputs).loss
    culprit = _first_bad(seen) or (None if _is_finite(loss) else Culprit("loss", "the loss function"))
    if culprit is not None:
        return Outcome(loss.item(), float("nan"), culprit)
    seen.clear()
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, [parameter for _, parameter in trained], allow_unused=True)
    named = [(name, gradient) for (name, _), gradient in zip(trained, gradients, strict=True) if gradient is not None]
    culprit = _first_bad(seen) or next((Culprit("gradient", name) for name, gradient in named if not _is_finite(gradient)), None)
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient.float()) for _, gradient in named]))
    return Outcome(loss.item(), norm.item(), culprit)


@contextlib.contextmanager
def _watched(model: Any, seen: list[tuple[Culprit, torch.Tensor]]) -> Iterator[None]:
    """Every module notes whether its output, and later the gradient of it, is finite; on the device, so that nothing waits."""

    def watch(name: str) -> Callable[..., None]:
        def note(_module: Any, _args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if not torch.is_tensor(tensor) or not tensor.is_floating_point():
                return
            seen.append((Culprit("forward", name), torch.isfinite(tensor.detach()).all()))
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: seen.append((Culprit("backward", name), torch.isfinite(gradient).all())))

        return note

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first_bad(seen: list[tuple[Culprit, torch.Tensor]]) -> Culprit | None:
    return next((culprit for culprit, is_good in seen if not bool(is_good)), None)


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all())


def as_files(batch: MicroBatch) -> dict[str, torch.Tensor]:
    """The micro-batch as named host tensors, random state included."""
    tensors = {f"input.{name}": tensor.detach().cpu().contiguous() for name, tensor in batch.inputs.items() if torch.is_tensor(tensor)}
    numbers = {f"number.{name}": torch.tensor(number) for name, number in batch.inputs.items() if isinstance(number, int)}
    random = {f"random.{name}": state for name, state in batch.random.items()}
    return {**tensors, **numbers, **random, "rows": batch.rows.cpu(), "loss": batch.loss.detach().float().cpu().reshape(1)}


def from_files(tensors: dict[str, torch.Tensor], device: torch.device) -> MicroBatch:
    """The inverse of as_files()."""
    inputs: dict[str, Any] = {
        name.removeprefix("input."): tensor.to(device) for name, tensor in tensors.items() if name.startswith("input.")
    }
    inputs |= {name.removeprefix("number."): int(number) for name, number in tensors.items() if name.startswith("number.")}
    random = {name.removeprefix("random."): tensor for name, tensor in tensors.items() if name.startswith("random.")}
    return MicroBatch(inputs, tensors["rows"], tensors["loss"][0], random)


class Report(NamedTuple):
    """What one rank found: the rows of its suspected micro-batches, the culprit where it found one, and as_files() of each micro-batch."""

    rank: int
    rows: list[str]
    culprit: Culprit | None
    files: list[dict[str, torch.Tensor]]


class BadStep(NamedTuple):
    """A skipped step. reports are those of the ranks that found a culprit, of all ranks where none did."""

    step: int
    complaint: str
    numbers: StepNumbers
    reports: list[Report]

    @property
    def culprit(self) -> Culprit | None:
        return self.reports[0].culprit

    @property
    def is_hopeless(self) -> bool:
        """The weights themselves are not finite: no later step can be."""
        return self.culprit is not None and self.culprit.phase == "weights"

    def cause(self) -> str:
        return self.complaint + (f"; first in {self.culprit.module} ({self.culprit.phase})" if self.culprit else "")

    def last_words(self, in_a_row: int, kept: Path | None) -> str:
        """Why the run ends, and the ways out."""
        times = "once" if in_a_row == 1 else f"{in_a_row} steps in a row"
        state = (
            "The weights are not finite: go back to an earlier checkpoint"
            if self.is_hopeless
            else "The weights are those of the last good step, saved as a checkpoint"
        )
        replay = f", or find the cause: python scripts/replay_batch.py {kept}" if kept else ""
        return f"step {self.step}: {self.cause()}, {times}. {state}. Lower --learning_rate, use --attn_implementation=eager{replay}"

    def as_record(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "reason": self.complaint,
            "loss": str(self.numbers.loss),
            "grad_norm": str(self.numbers.grad_norm),
            "trained_tokens": self.numbers.tokens,
            "culprit": self.culprit._asdict() if self.culprit else None,
            "ranks": [{"rank": report.rank, "rows": report.rows} for report in self.reports],
        }


def gathered(step: int, complaint: str, numbers: StepNumbers, reports: list[Report]) -> BadStep:
    """The bad step from the reports of all ranks."""
    return BadStep(step, complaint, numbers, [report for report in reports if report.culprit] or reports)


def keep(run_folder: Path, bad: BadStep, model: Any, whole: dict[str, torch.Tensor] | None = None) -> Path | None:
    """Adds a line to bad_steps.jsonl and writes bad_steps/step-N: record.json, the batches, and the adapter that met them.

    Returns:
        The folder; None when ten are there already, for one cause shows in ten.

    Args:
        model: a PeftModel's adapter is saved beside the batches; other models are replayed from their newest checkpoint.
        whole: the adapter's tensors, where an engine keeps the model's in pieces.
    """
    with (run_folder / f"{FOLDER}.jsonl").open("a") as file:
        file.write(json.dumps(bad.as_record()) + "\n")
    folder = run_folder / FOLDER / f"step-{bad.step}"
    if folder.parent.is_dir() and len(list(folder.parent.glob("step-*"))) >= KEPT:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    for report in bad.reports:
        for number, tensors in enumerate(report.files):
            save_file(tensors, folder / f"batch-{number}-of-rank-{report.rank}.safetensors")
    if isinstance(model, PeftModel):
        model.save_pretrained(folder, state_dict=whole, save_embedding_layers=False)
    (folder / "record.json").write_text(json.dumps(bad.as_record(), indent=2) + "\n")
    return folder
