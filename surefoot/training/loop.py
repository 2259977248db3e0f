"""SurefootTrainer: transformers' Trainer that judges each step before the optimizer uses it, stops and saves at a step's end only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import Trainer

from surefoot.checkpoint import MANIFEST, read_manifest
from surefoot.errors import DataError, NumericsError, Preempted
from surefoot.signals import StopRequest
from surefoot.training import bad_steps, guard
from surefoot.training.bad_steps import Culprit, Report
from surefoot.training.checkpoints import RUN_STATE, Saver
from surefoot.training.guard import Guard, MicroBatch, Pending, StepNumbers
from surefoot.training.health import Health, is_decayed
from surefoot.training.metrics import Ledger
from surefoot.training.order import Order

UNPLACED = 8  # micro-batches kept per rank where none of them turns out bad when it is run again


class _EvaluationStopped(Exception):  # noqa: N818
    """Some rank was asked to stop while all were evaluating."""


class SurefootTrainer(Trainer):  # type: ignore[misc]
    """Set `ledger`, `guard`, `health`, `saver`, `order`, `request`, `engine` (single, ddp, deepspeed, fsdp) and `loss_spike` (warn, stop,
    off) before train().

    A step whose loss or gradient norm is not finite, or that trains no token, leaves the weights as they are and is kept in
    bad_steps/. `stop_reason` says why the loop was ended before its time. When a rank is asked to stop, all save at the end of the same
    step and raise Preempted.
    """

    ledger: Ledger
    guard: Guard
    health: Health
    saver: Saver
    order: Order
    request: StopRequest
    engine: str
    loss_spike: str
    stop_reason: str | None = None
    _tokens: torch.Tensor | None = None
    _pending: Pending | None = None
    _stops = False  # agreed by all ranks
    _owes_evaluation = False  # of the step that a checkpoint holds
    _steps_an_epoch = 1
    _begins_at: Path | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self.order

    def _init_training_state(self, max_steps: int, steps_an_epoch: int, *rest: Any) -> tuple[int, int]:
        self._steps_an_epoch = steps_an_epoch
        where: tuple[int, int] = super()._init_training_state(max_steps, steps_an_epoch, *rest)
        if self.state.best_global_step:  # the folder may have been moved since
            self.state.best_model_checkpoint = self._checkpoint_of(self.state.best_global_step)
        self._check_cursor()
        return where

    def _checkpoint_of(self, step: int) -> str | None:
        path = Path(self.args.output_dir) / f"checkpoint-{step}"
        return str(path) if path.is_dir() else None

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
            self._owes_evaluation = False

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self.ledger.meter.count(inputs.pop("lengths"), inputs["input_ids"].shape)
        rows, random = inputs.pop("rows"), guard.random_state()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._tokens = num_items_in_batch
        scale = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        inputs.pop("positions", None)  # follow from the labels
        self.guard.collect({**inputs, **scale}, rows, loss, random)
        return loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        del inputs["lengths"], inputs["rows"]
        if self._agree(self.request.is_asked()) and self.control.should_evaluate:
            self._stops = True
            raise _EvaluationStopped
        return super().prediction_step(model, inputs, *rest, **named)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        return [name for name, _ in model.named_parameters() if is_decayed(name)]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        # DeepSpeed drops an empty group and then fails on its length (LoRA without magnitudes has no undecayed tensor)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The last thing before optimizer.step, on every rank: where the step is judged.

        A fused AdamW skips a bad step on the device, so that the host need not wait for the numbers: it reads them one step later, when
        the weights are still those that met the bad step.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        measured = self.guard.measure(norm, self._tokens, stops=self.request.is_asked())
        step, window, self.guard.window = self.state.global_step + 1, self.guard.window, []
        fused = self._fused_optimizer()
        if fused is None:
            self._judge(step, guard.read(measured), window)
        else:
            self.settle()
            fused.found_inf = guard.is_bad(measured)
            self._pending = guard.send(step, measured, window) if self.stop_reason is None else None
        if self.stop_reason is not None or self.guard.bad_steps[-1:] == [step]:
            for parameter in model.parameters():  # makes optimizer.step a step of nothing: no update, no decay, no moment changes
                parameter.grad = None
        return norm

    def _fused_optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer, where it can skip a step by itself and no step must be judged before it is taken."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        is_fused = isinstance(inner, torch.optim.AdamW) and bool(inner.defaults.get("fused"))
        return (
            inner
            if is_fused and self.accelerator.scaler is None and self.engine in ("single", "ddp") and self.loss_spike != "stop"
            else None
        )

    def settle(self) -> None:
        """Judges the step whose numbers are on their way."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._judge(pending.step, pending.read(), pending.window)

    def _judge(self, step: int, numbers: StepNumbers, window: list[MicroBatch]) -> None:
        self._stops |= numbers.stops
        complaint = numbers.complaint(may_overflow=self._scaler_copes(numbers))
        if complaint is not None:
            self._skip(step, complaint, numbers, window)
            return
        self._check_spike(step, numbers.loss)
        self.guard.accept(numbers)

    def _scaler_copes(self, numbers: StepNumbers) -> bool:
        """fp16's loss scaler meets infinities on purpose and skips those steps itself, until its scale has nothing left to give."""
        scaler = self.accelerator.scaler
        return scaler is not None and (abs(numbers.grad_norm) < float("inf") or scaler.get_scale() >= 1.0)

    def _check_spike(self, step: int, loss: float) -> None:
        text = self.guard.spike(loss) if self.loss_spike != "off" else None
        if text is None:
            return
        self.guard.spikes.append(step)
        self._say(f"step {step}: {text}")
        if self.loss_spike == "stop":
            self._stop(
                f"step {step}: {text}, and --loss_spike=stop. The weights before it are in the newest checkpoint. "
                "Look at its rows, lower --learning_rate, or go on with --resume --loss_spike=warn"
            )

    def _skip(self, step: int, complaint: str, numbers: StepNumbers, window: list[MicroBatch]) -> None:
        if self.engine == "deepspeed":  # its engine has stepped inside backward
            raise NumericsError(
                f"step {step}: {complaint}, and DeepSpeed has used it already. Continue from the last checkpoint with --resume, "
                "with a lower --learning_rate or --attn_implementation=eager"
            )
        is_last_straw = self.guard.reject(step)
        bad = bad_steps.gathered(step, complaint, numbers, self._reports(window, looks=numbers.tokens != 0))
        kept = None
        if self.is_world_process_zero():
            kept = bad_steps.keep(Path(self.args.output_dir), bad, self.accelerator.unwrap_model(self.model))
        self._say(f"step {step} skipped: {bad.cause()}" + (f"; kept in {kept}" if kept else ""))
        if is_last_straw or bad.is_hopeless:
            self._stop(bad.last_words(self.guard.in_a_row, kept), saves=not bad.is_hopeless)

    def _stop(self, reason: str, *, saves: bool = True) -> None:
        self.stop_reason = reason
        self.control.should_save = saves
        self.control.should_training_stop = True

    def _reports(self, window: list[MicroBatch], *, looks: bool) -> list[Report]:
        """Every rank's report, on every rank."""
        culprit, batches = self._find(window) if looks else (None, window[:1])
        rows = [self.train_dataset.where(int(row)) for batch in batches for row in batch.rows]
        mine = Report(self.accelerator.process_index, rows, culprit, [bad_steps.as_files(batch) for batch in batches])
        return list(gather_object([mine])) if self.accelerator.num_processes > 1 else [mine]

    def _find(self, window: list[MicroBatch]) -> tuple[Culprit | None, list[MicroBatch]]:
        """This rank's first bad micro-batch and its culprit, or no culprit and the micro-batches that must hold it."""
        suspects = sorted(window, key=lambda batch: bool(torch.isfinite(batch.loss)))  # bad losses first
        if self.engine in ("single", "ddp"):
            model = self.accelerator.unwrap_model(self.model)
            for batch in suspects:
                culprit = bad_steps.rerun(model, batch, self.compute_loss_context_manager).culprit
                if culprit is not None:
                    return culprit, [batch]
        return None, suspects[:UNPLACED]

    def _say(self, text: str) -> None:
        if self.is_world_process_zero():
            self.ledger.say(text)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.settle()
            logs["loss"] = self.guard.take_mean_loss()
            logs |= self.ledger.meter.take(self.state.max_steps - self.state.global_step)
        super().log(logs, start_time)

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
        self.settle()
        self.ledger.meter.pause()
        self.store_flos()
        step, best = self.state.global_step, self.state.best_global_step
        if best:
            self.state.best_model_checkpoint = (
                str(Path(self.args.output_dir) / f"checkpoint-{step}") if best == step else self._checkpoint_of(best)
            )
        self.saver.save(step, self._write, {"cursor": self._cursor(step)}, self.state.best_model_checkpoint)
        self.ledger.meter.start()

    def _write(self, folder: Path) -> None:
        """This rank's files of a checkpoint: those of transformers, and what it leaves out."""
        self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if self.args.should_save:
            self.state.save_to_json(str(folder / "trainer_state.json"))
            parts = {name: part.state() for name, part in self._parts().items()}
            content = {**parts, "files": self.ledger.sizes(), "owes_evaluation": self._owes_evaluation}
            (folder / RUN_STATE).write_text(json.dumps(content))

    def _parts(self) -> dict[str, Any]:
        return {"guard": self.guard, "meter": self.ledger.meter, "health": self.health}

    def restore(self, folder: Path) -> None:
        """Takes up averages and counters where a checkpoint left them; the checkpoint of another program has none."""
        self._begins_at = folder
        if not (folder / RUN_STATE).is_file():
            return
        content = json.loads((folder / RUN_STATE).read_text())
        for name, part in self._parts().items():
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

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if isinstance(self.model, PeftModel):
            # embedding rows stay out of an adapter: they are frozen, and a PAD row is never read
            self.model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
        else:
            self.model.config.use_cache = True  # off for training only; generation from these files wants it
            self.model.save_pretrained(folder, state_dict=state_dict)
            self.model.config.use_cache = False
        self.processing_class.save_pretrained(folder)
