"""SurefootTrainer: transformers' Trainer that judges each step before the optimizer uses it, and saves only what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel

from surefoot import checkpoint
from surefoot.errors import NumericsError
from surefoot.training import bad_steps, engines, guard, pace
from surefoot.training.bad_steps import Culprit, Report
from surefoot.training.guard import Guard, MicroBatch, Pending, StepNumbers
from surefoot.training.health import is_decayed
from surefoot.training.resumable import ResumableTrainer

UNPLACED = 8  # micro-batches kept per rank where none of them turns out bad when it is run again


class SurefootTrainer(ResumableTrainer):
    """Set what its base asks for, `guard`, `engine` (single, ddp, deepspeed, fsdp) and `loss_spike` (warn, stop, off) before train().

    A step whose loss or gradient norm is not finite, or that trains no token, leaves the weights as they are and is kept in
    bad_steps/. `stop_reason` says why the loop was ended before its time.
    """

    guard: Guard
    engine: str
    loss_spike: str
    stop_reason: str | None = None
    _tokens: torch.Tensor | None = None
    _pending: Pending | None = None
    _trained: list[torch.nn.Parameter]

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self.ledger.meter.count(inputs.pop("lengths"), inputs["input_ids"].shape)
        rows, random = inputs.pop("rows"), guard.random_state()
        self.heartbeat.beat("forward", self.state.global_step + 1)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._tokens = num_items_in_batch
        scale = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        inputs.pop("positions", None)  # follow from the labels
        self.guard.collect({**inputs, **scale}, rows, loss, random)
        return loss

    def _prepare_for_training(self, *args: Any, **named: Any) -> Any:
        model, loader = super()._prepare_for_training(*args, **named)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        pace.spare_walks(model, self.accelerator.unwrap_model(model), self._trained)
        return model, loader

    def _clip_grad_norm(self, model: Any, limit: float | None = None) -> Any:
        """The norm before clipping, on the device (DeepSpeed has clipped); transformers' own walks through the frozen tensors too."""
        if self.engine == "deepspeed":
            return model.get_global_grad_norm()
        return self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm if limit is None else limit)

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """transformers' own counts the parameters anew for every pass."""
        return self.ledger.meter.flops_per_token * float(inputs["input_ids"].numel())

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        return [name for name, _ in model.named_parameters() if is_decayed(name)]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        # DeepSpeed drops an empty group and then fails on its length (LoRA without magnitudes has no undecayed tensor)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The last thing before optimizer.step, on every rank: where the step is judged.

        A fused AdamW skips a bad step on the device, and DeepSpeed has stepped, so that the host need not wait for the numbers: it reads
        them one step later. With a fused AdamW the weights are then still those that met the bad step.
        """
        self.heartbeat.beat("update", self.state.global_step + 1)
        norm = self._clip_grad_norm(model, float("inf")) if grad_norm is None else grad_norm
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP: each rank has its share of the sum
        measured = self.guard.measure(norm, self._tokens, stops=self.request.is_asked())
        step, window, self.guard.window = self.state.global_step + 1, self.guard.window, []
        fused = self._fused_optimizer()
        if fused is None and (self.engine != "deepspeed" or self.loss_spike == "stop"):
            self._judge(step, guard.read(measured), window)
        else:
            self.settle()
            if fused is not None:
                fused.found_inf = guard.is_bad(measured)
            self._pending = guard.send(step, measured, window) if self.stop_reason is None else None
        if self.stop_reason is not None or self.guard.bad_steps[-1:] == [step]:
            for parameter in self._trained:  # makes optimizer.step a step of nothing: no update, no decay, no moment changes
                parameter.grad = None
        return norm

    def _fused_optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer, where it can skip a step by itself and no step must be judged before it is taken."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        is_fused = isinstance(inner, torch.optim.AdamW) and bool(inner.defaults.get("fused"))
        return inner if is_fused and self.accelerator.scaler is None and self.engine != "deepspeed" and self.loss_spike != "stop" else None

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
        kept, model = None, self.accelerator.unwrap_model(self.model)
        whole = engines.whole_trainables(model) if self.engine == "fsdp" else None
        if self.is_world_process_zero():
            kept = bad_steps.keep(Path(self.args.output_dir), bad, model, whole)
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
        if "train_loss" in logs:
            logs["train_loss"] = self.guard.mean_loss  # transformers' own forgets the steps before a resume
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.settle()
        super()._save_checkpoint(model, trial)

    def _load_best_model(self) -> None:
        """Of DeepSpeed's and FSDP's adapters from the checkpoint's adapter: their own loaders want frozen and quantized weights too."""
        if self.engine in ("single", "ddp") or not isinstance(self.model, PeftModel):
            super()._load_best_model()
        else:
            engines.put_trainables(self.model, Path(self.state.best_model_checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Likewise; DeepSpeed does not come here."""
        if self.engine == "fsdp" and isinstance(self.model, PeftModel):
            engines.put_trainables(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Of DeepSpeed's and FSDP's adapters only the trained tensors are gathered; Trainer gathers the frozen weights with them."""
        if self.engine in ("single", "ddp") or not isinstance(self.model, PeftModel):
            super().save_model(output_dir, _internal_call)
            return
        whole = engines.whole_trainables(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict=whole)

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
        checkpoint.share(folder)
