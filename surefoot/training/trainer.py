"""Builds transformers' Trainer from the plan and trains; returns the summary that run.json keeps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import Trainer, TrainingArguments

from surefoot.errors import BackendError
from surefoot.plan import Plan, TrainPlan
from surefoot.training.guard import Masters, Movement, check_gradient
from surefoot.training.metrics import Ledger, Meter, duration, peak_memory_gib

NO_DECAY = ("lora_magnitude_vector", "bias", "norm")


class SurefootTrainer(Trainer):  # type: ignore[misc]
    """Trainer that counts real tokens, decays no magnitude, norm or bias, stops at a non-finite gradient and saves no pickle of itself."""

    meter: Meter

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self.meter.count(int(inputs.pop("lengths").sum()))
        return super().training_step(model, inputs, num_items_in_batch)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        inputs.pop("lengths")
        return super().prediction_step(model, inputs, *rest, **named)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        return [name for name, _ in model.named_parameters() if not any(word in name.lower() for word in NO_DECAY)]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        # DeepSpeed drops an empty group and then fails on its length (LoRA without magnitudes has no undecayed tensor)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None:  # fp16's scaler meets infinities on purpose and skips those steps itself
            check_gradient(float(norm), self.state.global_step + 1)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.meter.take(self.state.max_steps - self.state.global_step)
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **named: Any) -> dict[str, float]:
        self.meter.pause()
        try:
            return dict(super().evaluate(*args, **named))
        finally:
            self.meter.start()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.meter.pause()
        super()._save_checkpoint(model, trial)
        self.meter.start()

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


def train(plan: Plan, model: Any, tokenizer: Any, data: Any, collator: Any) -> dict[str, Any]:
    """Trains `model` in place and saves it, with the tokenizer, at the root of the run folder.

    Returns:
        The summary: steps, losses, tokens, seconds, peak memory, tensors that did not move.

    Raises:
        NumericsError: a gradient was not finite, or nothing was learned.
        BackendError: a trainable tensor is not fp32, or the GPU's memory ran out.
    """
    arguments = training_arguments(plan, evaluates=data.eval is not None)
    trainer = SurefootTrainer(
        model=model, args=arguments, train_dataset=data.train, eval_dataset=data.eval, data_collator=collator, processing_class=tokenizer
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.remove_callback(transformers.trainer_callback.ProgressCallback)
    gpu = plan.machine.gpu
    trainer.meter = Meter(model, gpu.name if gpu else None, plan.machine.world_size)
    resumes = plan.output.resume_from is not None
    trainer.add_callback(Ledger(Path(plan.output.folder) / "metrics.jsonl", trainer.meter, resumes=resumes))
    trainer.add_callback(Masters())
    movement = Movement(model)
    began = time.perf_counter()
    try:
        result = trainer.train(resume_from_checkpoint=plan.output.resume_from)
    except torch.OutOfMemoryError as error:
        raise BackendError(_out_of_memory(plan.train, plan.model.use_gradient_checkpointing)) from error
    summary = {
        "steps": result.global_step,
        "train_loss": result.training_loss,
        "tokens": trainer.meter.total_tokens * plan.machine.world_size,
        "seconds": round(time.perf_counter() - began, 3),
        "peak_memory_gib": round(peak_memory_gib(), 3),
        "trainable_parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "still_tensors": movement.check(model),
        "best_checkpoint": trainer.state.best_model_checkpoint,
    }
    if data.eval is not None and plan.train.eval_strategy != "no":
        summary["eval_loss"] = _final_eval_loss(trainer)
    trainer.save_model(plan.output.folder)
    return summary


def _out_of_memory(t: TrainPlan, recomputes: bool) -> str:
    ways = [f"--per_device_train_batch_size={t.per_device_train_batch_size // 2}"] if t.per_device_train_batch_size > 1 else []
    ways += [] if recomputes else ["--use_gradient_checkpointing"]
    return (
        f"the GPU's memory ran out at {t.per_device_train_batch_size} rows a forward pass (peak {peak_memory_gib():.1f} GiB). "
        f"Use {' or '.join(ways) or '--load_4bit=True or a shorter --cutoff_len'}; the batch size of the optimizer step stays the same"
    )


def _final_eval_loss(trainer: SurefootTrainer) -> float:
    """The eval_loss of the weights as they stand: the best checkpoint's, the last step's where it was evaluated, else measured now."""
    state = trainer.state
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
        return float(state.best_metric)
    last = [log["eval_loss"] for log in state.log_history if "eval_loss" in log and log["step"] == state.global_step]
    return last[-1] if last else trainer.evaluate()["eval_loss"]


def summary_line(summary: dict[str, Any], folder: str) -> str:
    """What the run came to, in one line."""
    parts = [f"{summary['steps']} steps in {duration(summary['seconds'])}", f"mean loss {summary['train_loss']:.4f}"]
    if "eval_loss" in summary:
        parts.append(f"eval_loss {summary['eval_loss']:.4f}")
    rate = summary["tokens"] / summary["seconds"] if summary["seconds"] else 0.0
    parts += [f"{summary['tokens']:,} tokens ({rate:,.0f}/s)", f"peak {summary['peak_memory_gib']:.1f} GiB"]
    if summary["still_tensors"]:
        parts.append(f"{len(summary['still_tensors'])} tensors did not move, first {summary['still_tensors'][0]}")
    return f"done: {', '.join(parts)}. Saved in {folder}"


def training_arguments(plan: Plan, *, evaluates: bool) -> TrainingArguments:
    """The plan's training part as transformers' arguments; everything here was decided there.

    Args:
        evaluates: False when the data were too few to hold rows out, which only their reading tells.
    """
    t = plan.train
    arguments = TrainingArguments(
        output_dir=plan.output.folder,
        per_device_train_batch_size=t.per_device_train_batch_size,
        per_device_eval_batch_size=t.per_device_eval_batch_size,
        gradient_accumulation_steps=t.gradient_accumulation_steps,
        num_train_epochs=t.num_epochs,
        max_steps=t.max_steps,
        learning_rate=t.learning_rate,
        lr_scheduler_type=t.lr_scheduler_type,
        warmup_steps=t.warmup,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        optim=t.optim,
        bf16=t.precision == "bf16",
        fp16=t.precision == "fp16",
        gradient_checkpointing=plan.model.use_gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if plan.model.use_gradient_checkpointing else None,
        use_cpu=not plan.machine.gpus,
        logging_steps=t.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=list(t.report_to) or "none",
        run_name=t.run_name,
        remove_unused_columns=False,
        prediction_loss_only=True,
        train_sampling_strategy="group_by_length" if t.group_by_length else "random",
        dataloader_num_workers=t.dataloader_num_workers,
        ddp_find_unused_parameters=False,
        seed=t.seed,
        full_determinism=False,
        **_schedule(t, evaluates),
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs in one process would silently become nn.DataParallel
    return arguments


def _schedule(t: TrainPlan, evaluates: bool) -> dict[str, Any]:
    takes_best = t.load_best_model_at_end and evaluates
    return {
        "eval_strategy": t.eval_strategy if evaluates else "no",
        "eval_steps": t.eval_step,
        "save_strategy": t.save_strategy,
        "save_steps": t.save_step,
        "save_total_limit": t.save_total_limit,
        "load_best_model_at_end": takes_best,
        "metric_for_best_model": "eval_loss" if takes_best else None,
        "greater_is_better": False if takes_best else None,
    }
