"""ResumableTrainer: transformers' Trainer whose runs stop at the end of a step, and go on from there as if they had not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from surefoot.checkpoint import MANIFEST, read_manifest
from surefoot.errors import DataError, Preempted
from surefoot.signals import StopRequest
from surefoot.training import guard
from surefoot.training.checkpoints import RUN_STATE, Saver
from surefoot.training.heartbeat import Heartbeat
from surefoot.training.metrics import Ledger
from surefoot.training.order import Order


class _EvaluationStopped(Exception):  # noqa: N818
    """Some rank was asked to stop while all were evaluating."""


class ResumableTrainer(Trainer):  # type: ignore[misc]
    """Set `ledger`, `saver`, `order`, `request`, `heartbeat`, `grace_s`, and `parts` (by name, with state() and restore()) before train().

    When a rank is asked to stop, all save at the end of the same step and raise Preempted.
    """

    ledger: Ledger
    saver: Saver
    order: Order
    request: StopRequest
    heartbeat: Heartbeat
    parts: dict[str, Any]
    grace_s: float
    _stops = False  # agreed by all ranks
    _owes_evaluation = False  # of the step that a checkpoint holds
    _steps_an_epoch = 1
    _begins_at: Path | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self.order

    def _init_training_state(self, max_steps: int, steps_an_epoch: int, *rest: Any) -> tuple[int, int]:
        self._steps_an_epoch = steps_an_epoch
        where: tuple[int, int] = super()._init_training_state(max_steps, steps_an_epoch, *rest)
        self._find_best()
        self._check_cursor()
        return where

    def _find_best(self) -> None:
        """In this run's folder, where that step was saved or is about to be; the folder may have been moved since the state was written."""
        step = self.state.best_global_step
        best = Path(self.args.output_dir) / f"checkpoint-{step}"
        if step and (step == self.state.global_step or best.is_dir()):
            self.state.best_model_checkpoint = str(best)

    def _run_epoch(self, *args: Any, **named: Any) -> None:
        self.order.epoch = named["epoch"]
        self._pay_evaluation()
        if self.state.global_step < self.state.max_steps:  # else transformers would train a step beyond the last checkpoint's
            super()._run_epoch(*args, **named)

    def _finalize_training(self, *args: Any) -> Any:
        self._pay_evaluation()
        return super()._finalize_training(*args)

    def _pay_evaluation(self) -> None:
        if self._owes_evaluation:
            self._determine_best_metric(self._evaluate(None, None), None)
            self._find_best()
            self._owes_evaluation = False

    def get_batch_samples(self, *args: Any) -> Any:
        self.heartbeat.beat("data", self.state.global_step + 1)
        return super().get_batch_samples(*args)

    def _get_num_items_in_batch(self, *args: Any) -> Any:
        self.heartbeat.beat("token count", self.state.global_step + 1)  # waits for the other ranks' data
        return super()._get_num_items_in_batch(*args)

    def compute_loss(self, model: Any, *args: Any, **named: Any) -> Any:
        loss = super().compute_loss(model, *args, **named)
        if model.training:
            self.heartbeat.beat("backward", self.state.global_step + 1)
        return loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        self.heartbeat.beat("evaluation", self.state.global_step)
        del inputs["lengths"], inputs["rows"]
        if self._agree(self.request.is_asked()) and self.control.should_evaluate:
            self._stops = True
            raise _EvaluationStopped
        return super().prediction_step(model, inputs, *rest, **named)

    def evaluate(self, *args: Any, **named: Any) -> dict[str, float]:
        """Leaves the random state as it was, so that a run whose evaluation was put off goes on like one whose was not."""
        self.ledger.meter.pause()
        random = guard.random_state()
        try:
            return dict(super().evaluate(*args, **named))
        finally:
            guard.restore_random(random)
            self.ledger.meter.start()

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *rest: Any, **named: Any) -> None:
        """The end of a step, and once more of an epoch. The one place where a run stops for a signal."""
        self.request.begin()
        self._owes_evaluation = self._stops and self.control.should_evaluate
        self.control.should_evaluate &= not self._stops
        takes_long = self.control.should_evaluate or self.control.should_save
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *rest, **named)
        except _EvaluationStopped:
            self._owes_evaluation = True
        if takes_long and not self._stops:
            self._stops = self._agree(self.request.is_asked())
        if self._stops:
            if self.saver.last_step != self.state.global_step:
                self._save_checkpoint(model, trial)
            raise Preempted(self._farewell())

    def _agree(self, stops: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return stops
        votes = torch.tensor(float(stops), device=self.args.device)
        torch.distributed.all_reduce(votes)
        return bool(votes > 0)

    def _farewell(self) -> str:
        asked = self.request.asked or "a signal to another process"
        return (
            f"stopped by {asked} after step {self.state.global_step} of {self.state.max_steps}; checkpoint-{self.saver.last_step} is whole "
            f"(saved in {self.saver.last_s:.1f} s). The same command with --resume goes on"
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.ledger.meter.pause()
        self.heartbeat.beat("checkpoint", self.state.global_step)
        self.store_flos()
        self._find_best()
        step = self.state.global_step
        self.saver.save(step, self._write, {"cursor": self._cursor(step)}, self.state.best_model_checkpoint)
        self.ledger.meter.start()
        if self.is_world_process_zero():
            self.ledger.say(f"checkpoint-{step} saved in {self.saver.last_s:.1f} s{self._hurry()}")

    def _hurry(self) -> str:
        if self.saver.last_s <= self.grace_s:
            return ""
        return (
            f", more than --grace_s={self.grace_s:g} leaves between a stop signal and the kill: let the scheduler warn earlier "
            "(sbatch --signal=B:USR1@SECONDS, terminationGracePeriodSeconds) and say so with --grace_s"
        )

    def _write(self, folder: Path) -> None:
        """This rank's files of a checkpoint: those of transformers, and what it leaves out."""
        self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if self.args.should_save:
            self.state.save_to_json(str(folder / "trainer_state.json"))
            parts = {name: part.state() for name, part in self.parts.items()}
            content = {**parts, "files": self.ledger.sizes(), "owes_evaluation": self._owes_evaluation}
            (folder / RUN_STATE).write_text(json.dumps(content))

    def restore(self, folder: Path) -> None:
        """Takes up averages and counters where a checkpoint left them; the checkpoint of another program has none."""
        self._begins_at = folder
        if not (folder / RUN_STATE).is_file():
            return
        content = json.loads((folder / RUN_STATE).read_text())
        for name, part in self.parts.items():
            part.restore(content[name])
        self.ledger.kept, self._owes_evaluation = content["files"], content["owes_evaluation"]

    def _check_cursor(self) -> None:
        """Raises DataError when the rows that come next are not those that would have come."""
        if self._begins_at is None or not (self._begins_at / MANIFEST).is_file():
            return
        manifest, now = read_manifest(self._begins_at), self._cursor(self.state.global_step)
        before = manifest.get("cursor") if isinstance(manifest, dict) else None
        if before != now:
            raise DataError(
                f"{self._begins_at}: the order of the rows is not the one this run began with ({before} -> {now}). "
                "Give the same data, --seed and batch flags again, or start anew with another --output_dir"
            )

    def _cursor(self, step: int) -> dict[str, Any]:
        args = self.args
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return self.order.cursor(step, self._steps_an_epoch, rows)
