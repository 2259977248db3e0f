"""train(): from a plan, a model and rows to a trained and verified run folder; returns the summary that run.json keeps."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from surefoot.errors import BackendError, LostError, NumericsError
from surefoot.plan import Plan
from surefoot.signals import StopRequest
from surefoot.training import compiling, engines, gpu_memory, leak, pace, saved
from surefoot.training.arguments import training_arguments
from surefoot.training.checkpoints import Saver, disk_complaint, read_torch_files_anywhere
from surefoot.training.guard import Guard
from surefoot.training.health import Health, trainable
from surefoot.training.heartbeat import Heartbeat
from surefoot.training.loop import SurefootTrainer
from surefoot.training.metrics import Ledger, Meter, duration, peak_memory_gib
from surefoot.training.order import Order
from surefoot.training.recompute import recompute
from surefoot.training.schedule import Schedule


def train(plan: Plan, model: Any, tokenizer: Any, data: Any, collator: Any, request: StopRequest) -> dict[str, Any]:
    """Trains `model` in place and saves it, with the tokenizer, at the root of the run folder.

    Returns:
        The summary: steps, losses, tokens, seconds, peak memory, tensors that did not move.

    Raises:
        NumericsError: too many steps in a row were not finite, the loss rose and was to stop the run, or nothing was learned.
        BackendError: a trainable tensor is not fp32 or not in the optimizer, the GPU's memory ran out, the disk is full, or the saved
            files are wrong.
        Preempted: `request` was made on some rank, and a checkpoint of the last step is there.
    """
    recompute(model, plan.model.recompute_layers, plan.model.offload_inputs)
    request.leave_if_asked()
    trainer = _trainer(plan, model, tokenizer, data, collator)
    trainer.request = request
    positions = pace.positions_of_single_rows() if data.packed is None else contextlib.nullcontext()
    with _explained(plan, trainer.heartbeat), trainer.heartbeat, positions:
        return _train(plan, trainer, model, data)


@contextlib.contextmanager
def _explained(plan: Plan, heartbeat: Heartbeat) -> Iterator[None]:
    """Turns what memory, disk, a checkpoint's files or a lost process did into one line; every other error passes as it is."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BackendError(_out_of_memory(plan)) from error
    except pickle.UnpicklingError as error:
        what = "holds more than tensors and numbers, which is not loaded"
        raise BackendError(f"{plan.output.resume_from}: a file {what} ({str(error).splitlines()[0]}). Take another checkpoint") from error
    except (OSError, SafetensorError, RuntimeError) as error:
        text = str(error).splitlines()[0] if str(error) else ""
        way_out = "the same command with --resume goes on"
        if (reason := disk_complaint(error)) is not None:
            raise BackendError(
                f"--output_dir={plan.output.folder} cannot be written: {reason}. With room or rights there {way_out}"
            ) from error
        if isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error):  # gloo has no type of its own
            place = f"rank {heartbeat.rank} lost another process at step {heartbeat.step} in {heartbeat.phase}"
            raise LostError(f"{place} ({text.partition('. This is')[0]}). What that one said last is the cause; {way_out}") from error
        raise


def _train(plan: Plan, trainer: SurefootTrainer, model: Any, data: Any) -> dict[str, Any]:
    engine = engines.prepare(plan, model, trainer.accelerator)
    trained = sum(parameter.numel() for _, parameter in trainable(model))  # now: an engine leaves each process its piece
    engines.check_ranks(plan, data.report.fingerprint, trained)
    if plan.machine.engine == "deepspeed":
        engines.know_deepspeeds_constants()  # in checkpoints, which are read to go on and for the best weights at the end
    if plan.output.resume_from is not None:
        trainer.restore(Path(plan.output.resume_from))
        read_torch_files_anywhere()
    health = trainer.parts["health"]
    packing = None if data.packed is None else {**data.report.packing, "leak": _leak(trainer, model, data.train[0]["input_ids"])}
    reserved, compiled = gpu_memory.reserved_gib(), compiling.so_far()
    result = trainer.train(resume_from_checkpoint=plan.output.resume_from)
    trainer.heartbeat.beat("end", result.global_step)
    trainer.request.begin()  # what is left is short, and is not stopped
    trainer.settle()
    if trainer.stop_reason is not None:
        raise NumericsError(trainer.stop_reason)
    guard, meter = trainer.guard, trainer.ledger.meter
    summary = {
        "steps": result.global_step,
        "train_loss": guard.mean_loss,
        "tokens": meter.total_tokens * plan.machine.world_size,
        "seconds": round(meter.total_seconds, 3),
        "save_seconds": round(trainer.saver.last_s, 3),
        "peak_memory_gib": round(peak_memory_gib(), 3),
        "memory": _memory(plan, meter),
        "gpu_memory": gpu_memory.report(reserved, plan.machine.gpu.memory_gib if plan.machine.gpu else None),
        "compile": compiling.since(compiled),
        "trainable_parameters": trained,
        "bad_steps": guard.bad_steps,
        "loss_spikes": guard.spikes,
        "still_tensors": health.finish(model, result.global_step),
        "health": health.findings,
        "packing": packing,
        "engine": engine,
        "best_checkpoint": trainer.state.best_model_checkpoint,
    }
    if data.eval is not None and plan.train.eval_strategy != "no":
        summary["eval_loss"] = _final_eval_loss(trainer)
    trainer.save_model(plan.output.folder)
    summary["saved"] = _check_saved(plan, model, data)
    return summary


def _trainer(plan: Plan, model: Any, tokenizer: Any, data: Any, collator: Any) -> SurefootTrainer:
    trainer = SurefootTrainer(
        model=model,
        args=training_arguments(plan, evaluates=data.eval is not None),
        train_dataset=data.train if data.packed is None else data.packed,
        eval_dataset=data.eval,
        data_collator=collator,
        processing_class=tokenizer,
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.remove_callback(transformers.trainer_callback.ProgressCallback)
    trainer.remove_callback(transformers.trainer_callback.DefaultFlowCallback)
    trainer.add_callback(Schedule())
    gpu, processes = plan.machine.gpu, plan.machine.world_size
    meter = Meter(model, gpu.name if gpu else None, processes)
    trainer.ledger = Ledger(Path(plan.output.folder) / "metrics.jsonl", meter, resumes=plan.output.resume_from is not None)
    trainer.add_callback(trainer.ledger)
    trainer.guard = Guard(max_bad_steps=plan.train.max_bad_steps, processes=processes)
    trainer.engine, trainer.loss_spike = plan.machine.engine, plan.train.loss_spike
    health = Health(checks_optimizer=plan.machine.engine in ("single", "ddp"))
    if health.checks_optimizer:
        health.remember(model)
    trainer.add_callback(health)
    trainer.parts = {"guard": trainer.guard, "meter": meter, "health": health}
    folder, rank = Path(plan.output.folder), plan.machine.rank
    trainer.saver, trainer.grace_s = Saver(folder, plan.train.save_total_limit, rank, processes), plan.train.grace_s
    trainer.saver.clean()
    trainer.heartbeat = Heartbeat(run_folder=folder, rank=rank, processes=processes, timeout_s=plan.train.hang_timeout_s)
    lengths = trainer.train_dataset.lengths if plan.train.group_by_length else None
    trainer.order = Order(len(trainer.train_dataset), plan.train.seed, lengths, plan.train.batch_size)
    return trainer


def _check_saved(plan: Plan, model: Any, data: Any) -> dict[str, Any] | None:
    """Of DeepSpeed and FSDP the adapter's tensors alone: their model cannot take a second adapter, and a whole one may not fit."""
    folder = Path(plan.output.folder)
    if plan.machine.engine in ("single", "ddp"):
        return saved.check(model, folder, data.train[0]["input_ids"]) if plan.machine.is_main else None
    if plan.adapter.method == "full":
        return None
    whole = engines.whole_trainables(model)
    return {"tensors": saved.check_tensors(model, folder, whole)} if plan.machine.is_main else None


def _leak(trainer: SurefootTrainer, model: Any, ids: Any) -> float | None:
    """How far packed rows move each other's logits; None under an engine whose model is whole only in its own steps."""
    if trainer.engine not in ("single", "ddp"):
        return None
    return leak.check(model, ids, trainer.accelerator.autocast)  # the model is not prepared yet


def _out_of_memory(plan: Plan) -> str:
    t = plan.train
    ways = [f"--per_device_train_batch_size={t.per_device_train_batch_size // 2}"] if t.per_device_train_batch_size > 1 else []
    ways += [f"a --pack_len below {t.pack_len}"] if t.packing == "on" else []
    ways += [] if plan.model.offload_inputs else ["--use_gradient_checkpointing" + ("=offload" if _recomputes_all(plan) else "")]
    load = f"a packed row of {t.pack_len:,} slots" if t.packing == "on" else f"{t.per_device_train_batch_size} rows"
    return (
        f"the GPU's memory ran out at {load} a forward pass (peak {peak_memory_gib():.1f} GiB). "
        f"Use {' or '.join(ways) or '--load_4bit=True or a shorter --cutoff_len'}; the batch size of the optimizer step stays the same"
    )


def _recomputes_all(plan: Plan) -> bool:
    count = plan.model.recompute_layers
    return count == -1 or (plan.memory is not None and count == plan.memory.decoder.layers)


def _memory(plan: Plan, meter: Meter) -> dict[str, Any]:
    """The estimate for the flags, and for the widest micro-batch that came (rows x length), beside the GPU's measured peak."""
    rows, length = meter.widest
    widest = plan.memory.at(rows=rows, length=length) if plan.memory is not None and rows else None
    return {
        "planned_gib": plan.memory and round(plan.memory.gib, 3),
        "estimated_gib": widest and round(widest.gib, 3),
        "measured_peak_gib": round(peak_memory_gib(), 3) if plan.machine.gpus else None,
        "widest": [rows, length],
    }


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
    if summary["bad_steps"]:
        parts.append(f"{len(summary['bad_steps'])} steps were skipped (bad_steps.jsonl)")
    if summary["still_tensors"]:
        parts.append(f"{len(summary['still_tensors'])} tensors did not move, first {summary['still_tensors'][0]}")
    lines = compiling.line(summary["compile"]) + _memory_line(summary["memory"]) + gpu_memory.line(summary["gpu_memory"])
    return f"{lines}done: {', '.join(parts)}. Saved in {folder}"


def _memory_line(memory: dict[str, Any]) -> str:
    if memory["estimated_gib"] is None or memory["measured_peak_gib"] is None:
        return ""
    (rows, length), measured = memory["widest"], memory["measured_peak_gib"]
    return f"memory: {memory['estimated_gib']:.1f} GiB estimated for {rows} x {length:,} tokens, {measured:.1f} measured\n"
