"""Batch, warm-up, optimizer, evaluation and trackers."""

from __future__ import annotations

from collections.abc import Iterator

from surefoot.rules import backend
from surefoot.rules.desk import Choice, Desk

DEFAULT_WARMUP = 0.06


def batch(desk: Desk) -> Iterator[Choice]:
    c, world = desk.config, desk.machine.world_size
    micro, batch = c.per_device_train_batch_size, c.batch_size
    micro_source, batch_source, why_micro, why_batch = c.source("per_device_train_batch_size"), c.source("batch_size"), "", ""
    if c.gradient_accumulation_steps and not c.given("batch_size"):
        batch, batch_source = micro * world * c.gradient_accumulation_steps, "auto"
        why_batch = f"{micro} per device x {world} processes x {c.gradient_accumulation_steps} accumulated"
    elif not c.given("per_device_train_batch_size") and batch % world == 0 and (batch // world) % micro:
        micro, micro_source = max(size for size in range(1, micro + 1) if (batch // world) % size == 0), "auto"
        why_micro = f"largest size up to {c.per_device_train_batch_size} that divides batch_size / {world} processes"
    elif not c.given("batch_size") and batch % (micro * world):
        batch, batch_source = max(1, batch // (micro * world)) * micro * world, "auto"
        why_batch = f"nearest to {c.batch_size} that {micro} per device x {world} processes divides"
    unit = micro * world
    if batch % unit:
        below, above = batch // unit * unit, -(-batch // unit) * unit
        ways = f"{below} or {above}" if below else f"{above}"
        desk.problems.append(
            f"--batch_size={batch} cannot be split: per_device_train_batch_size={micro} x {world} processes = {unit}. Use {ways}"
        )
    accumulation = max(1, batch // unit)
    if c.gradient_accumulation_steps and c.gradient_accumulation_steps != accumulation:
        desk.problems.append(
            f"--gradient_accumulation_steps={c.gradient_accumulation_steps} contradicts --batch_size={batch}: "
            f"{batch} / ({micro} x {world} processes) = {accumulation}. Drop one of them"
        )
    yield Choice("batch_size", batch, batch_source, why_batch or "rows per optimizer step, all processes together")
    yield Choice("per_device_train_batch_size", micro, micro_source, why_micro)
    given = c.given("gradient_accumulation_steps")
    source = c.source("gradient_accumulation_steps") if given else "auto"
    yield Choice("gradient_accumulation_steps", accumulation, source, f"{batch} / ({micro} per device x {world} processes)")
    evaluated = c.per_device_eval_batch_size
    yield Choice(
        "per_device_eval_batch_size", evaluated or micro, c.source("per_device_eval_batch_size") if evaluated else "auto",
        "" if evaluated else "as in training",
    )  # fmt: skip


def warmup(desk: Desk) -> Choice:
    c = desk.config
    if c.warmup_steps is not None and c.warmup_ratio is not None:
        desk.problems.append(f"--warmup_steps={c.warmup_steps} and --warmup_ratio={c.warmup_ratio:g} exclude each other. Give one of them")
    if c.warmup_ratio is not None and c.warmup_ratio >= 1:
        desk.problems.append(
            f"--warmup_ratio={c.warmup_ratio:g} is a fraction of all steps and must be below 1. For steps use --warmup_steps"
        )
    if c.lr_scheduler_type == "constant":
        if c.warmup_steps or c.warmup_ratio:
            desk.notes.append("--lr_scheduler_type=constant has no warm-up; constant_with_warmup has")
        return Choice("warmup", 0.0, "auto", "a constant schedule has none")
    if c.warmup_steps is not None:
        return Choice("warmup", float(c.warmup_steps), c.source("warmup_steps"), "steps")
    if c.warmup_ratio is not None:
        return Choice("warmup", c.warmup_ratio, c.source("warmup_ratio"), "fraction of all steps")
    return Choice("warmup", DEFAULT_WARMUP, "default", "fraction of all steps")


def optimizer(desk: Desk) -> Choice:
    c, m = desk.config, desk.machine
    if c.optim == "auto":
        fused = bool(m.gpus) or backend.uses_unsloth(desk)  # which makes it so on a CPU too
        return Choice(
            "optim", "adamw_torch_fused" if fused else "adamw_torch", "auto", "fp32 state" + (", one kernel a step" if fused else "")
        )
    if c.optim.endswith("8bit"):
        if not m.gpus:
            desk.problems.append(f"--optim={c.optim} needs a GPU. Use --optim=auto")
        elif not m.has("bitsandbytes"):
            desk.problems.append(f"--optim={c.optim} needs bitsandbytes: pip install 'surefoot[bnb]'")
        desk.notes.append(f"--optim={c.optim} keeps Adam's state in 8 bits, where the default keeps fp32")
    return desk.as_given("optim")


def steps(desk: Desk) -> None:
    c = desk.config
    if c.max_steps == 0 or (c.max_steps < 0 and c.num_epochs == 0):
        desk.problems.append("nothing to train: --max_steps is 0, or --num_epochs is 0 and --max_steps is not given")
    if c.learning_rate == 0:
        desk.problems.append("--learning_rate=0 would learn nothing. The default is 3e-4")
    if c.seed >= 2**32:
        desk.problems.append(f"--seed={c.seed} is too large: NumPy's generator takes seeds below 2**32")
    if c.val_set_size > 1 and c.val_set_size != int(c.val_set_size):
        desk.problems.append(f"--val_set_size={c.val_set_size} is neither a whole number of rows nor a fraction below 1")
    if c.max_steps > 0 and c.given("num_epochs"):
        desk.notes.append(f"--max_steps={c.max_steps} decides the length; --num_epochs={c.num_epochs:g} has no effect")


def evaluation(desk: Desk) -> Iterator[Choice]:
    c = desk.config
    has_rows = bool(c.val_data_path) or c.val_set_size > 0
    if c.val_data_path and c.given("val_set_size"):
        desk.notes.append(f"--val_data_path gives the evaluation rows; --val_set_size={c.val_set_size} has no effect")
    if has_rows:
        yield desk.as_given("eval_strategy")
    else:
        yield Choice("eval_strategy", "no", "auto", "val_set_size is 0: no evaluation rows")
    evaluates = has_rows and c.eval_strategy != "no"
    obstacle = None
    if not evaluates:
        obstacle, cure = "there is no evaluation during training", "set --val_set_size and --eval_strategy"
    elif c.eval_strategy != c.save_strategy:
        obstacle = f"eval_strategy={c.eval_strategy} and save_strategy={c.save_strategy} differ"
        cure = f"use --save_strategy={c.eval_strategy}"
    elif c.eval_strategy == "steps" and c.save_step % c.eval_step:
        obstacle = f"save_step={c.save_step} is no multiple of eval_step={c.eval_step}"
        cure = f"use --save_step={max(1, c.save_step // c.eval_step) * c.eval_step}"
    name = "load_best_model_at_end"
    if obstacle and c.load_best_model_at_end:
        desk.problems.append(f"--{name}=True cannot work: {obstacle}. Way out: {cure}")
    if c.load_best_model_at_end is not None:
        yield desk.as_given(name)
    elif obstacle:
        yield Choice(name, False, "auto", obstacle)
    else:
        yield Choice(name, True, "auto", "evaluations and checkpoints coincide; lowest eval_loss wins")


def trackers(desk: Desk) -> Choice:
    c, m = desk.config, desk.machine
    asked = c.report_to
    if asked is None and c.wandb_project:
        asked = ("tensorboard", "wandb") if m.has("tensorboard") else ("wandb",)
    elif asked and c.wandb_project and "wandb" not in asked:
        desk.notes.append(f"--report_to={','.join(asked)} leaves wandb out: --wandb_project={c.wandb_project} has no effect")
    if asked is None:
        if m.has("tensorboard"):
            return Choice("report_to", ("tensorboard",), "default", "metrics.jsonl is always written")
        return Choice("report_to", (), "auto", "tensorboard is not installed; metrics.jsonl is always written")
    if "none" in asked and len(asked) > 1:
        desk.problems.append(f"--report_to={','.join(asked)}: none stands alone")
    for name in asked:
        if name != "none" and not m.has(name):
            desk.problems.append(f"--report_to={name} needs {name}: pip install {name}")
    source = c.source("report_to") if c.report_to else c.source("wandb_project")
    return Choice("report_to", tuple(name for name in asked if name != "none"), source, "")
