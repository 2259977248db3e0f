"""The plan's training part as transformers' arguments; everything in it was decided there."""

from __future__ import annotations

import os
from typing import Any

from torch.distributed import DistNetworkError
from transformers import TrainingArguments

from surefoot.errors import BackendError
from surefoot.plan import Plan, TrainPlan


def training_arguments(plan: Plan, *, evaluates: bool) -> TrainingArguments:
    """TrainingArguments of a plan; making them joins the processes.

    Args:
        evaluates: False when the data were too few to hold rows out, which only their reading tells.

    Raises:
        BackendError: the processes cannot meet at the launcher's address.
    """
    try:
        arguments = _arguments(plan, evaluates)
    except DistNetworkError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise BackendError(
            f"process {plan.machine.rank} of {plan.machine.world_size} cannot meet the others at {address}: {str(error).splitlines()[0]}. "
            "Give a free port: --main_process_port of accelerate launch, or MASTER_PORT"
        ) from error
    _check(arguments, plan)
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs in one process would silently become nn.DataParallel
    return arguments


def _arguments(plan: Plan, evaluates: bool) -> TrainingArguments:
    t = plan.train
    return TrainingArguments(
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
        bf16=t.precision == "bf16" and not casts_itself(plan),
        fp16=t.precision == "fp16",
        use_cpu=not plan.machine.gpus and not plan.process.fsdp_on_cpu,
        dataloader_pin_memory=bool(plan.machine.gpus),
        accelerator_config={"non_blocking": bool(plan.machine.gpus)},  # else the host waits for all GPU work at every batch
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
        ddp_timeout=int(t.hang_timeout_s or 1800) + 10,  # the heartbeat, which names the rank, comes first
        ddp_broadcast_buffers=False,  # every rank makes the same ones
        seed=t.seed,
        full_determinism=False,
        **_schedule(t, evaluates),
    )


def casts_itself(plan: Plan) -> bool:
    """True where autocast is ours: asked for 16 bits, DeepSpeed and FSDP would cast the adapters too."""
    return plan.machine.engine in ("deepspeed", "fsdp")


def _check(arguments: TrainingArguments, plan: Plan) -> None:
    """Raises BackendError where they are not the plan's: Unsloth's CPU path replaces precisions and optimizers as they are made."""
    made = {"bf16": arguments.bf16, "fp16": arguments.fp16, "optim": getattr(arguments.optim, "value", arguments.optim)}
    t = plan.train
    asked = {"bf16": t.precision == "bf16" and not casts_itself(plan), "fp16": t.precision == "fp16", "optim": t.optim}
    changed = [f"{name} {asked[name]} -> {made[name]}" for name in asked if made[name] != asked[name]]
    if changed:
        raise BackendError(f"the training arguments were changed after the plan: {', '.join(changed)}. Use --backend=hf")


def _schedule(t: TrainPlan, evaluates: bool) -> dict[str, Any]:
    takes_best = t.load_best_model_at_end and evaluates
    return {
        "eval_strategy": t.eval_strategy if evaluates else "no",
        "eval_steps": t.eval_step,
        "save_strategy": t.save_strategy,
        "save_steps": t.save_step,
        "save_total_limit": None,  # Saver keeps them: transformers deletes before it knows that the new one is whole
        "load_best_model_at_end": takes_best,
        "metric_for_best_model": "eval_loss" if takes_best else None,
        "greater_is_better": False if takes_best else None,
    }
