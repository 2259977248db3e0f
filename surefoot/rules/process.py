"""The run folder, the environment and the processes."""

from __future__ import annotations

from surefoot.rules.desk import Choice, Desk


def resume_from(desk: Desk) -> Choice:
    c, folder = desk.config, desk.inputs.run_folder
    asked = c.resume or bool(c.resume_from_checkpoint)
    source = c.source("resume" if c.resume else "resume_from_checkpoint")
    if asked and c.overwrite:
        desk.problems.append("--overwrite and --resume exclude each other. Give one of them")
    if isinstance(c.resume_from_checkpoint, str):
        return Choice("resume_from", c.resume_from_checkpoint, source, "")
    if asked and folder.status == "unfinished" and folder.checkpoints:
        return Choice("resume_from", folder.checkpoints[-1], source, f"newest of {len(folder.checkpoints)} checkpoints")
    if asked and folder.status == "finished":
        desk.problems.append(
            f"--resume: the run in {c.output_dir} is finished. To train it further give "
            f"--resume_from_checkpoint={folder.checkpoints[-1] if folder.checkpoints else 'CHECKPOINT'}; to start anew, --overwrite"
        )
    elif not asked and not c.overwrite:
        _refuse_overwriting(desk)
    elif c.overwrite and folder.status == "foreign" and folder.clash:
        desk.problems.append(
            f"--overwrite: {c.output_dir} holds {folder.clash} but no run.json, so it is no run of this program and stays as it is. "
            "Choose another --output_dir"
        )
    return Choice("resume_from", None, source if asked else "default", "no checkpoint to continue from" if asked else "")


def _refuse_overwriting(desk: Desk) -> None:
    folder, name = desk.inputs.run_folder, desk.config.output_dir
    if folder.status == "finished":
        desk.problems.append(f"--output_dir={name} holds a finished run. Choose another folder, or --overwrite it")
    elif folder.status == "unfinished" and folder.checkpoints:
        desk.problems.append(f"--output_dir={name} holds an unfinished run. --resume continues it, --overwrite starts anew")
    elif folder.status == "foreign" and folder.clash:
        desk.problems.append(f"--output_dir={name} holds {folder.clash}, which this run would replace. Choose another folder")


def environment(desk: Desk) -> Choice:
    """Variables for programs that read them: W&B, mlflow and trackio take their project there, cuBLAS its workspace."""
    c, env = desk.config, {}
    if c.wandb_project:
        env["WANDB_PROJECT"] = c.wandb_project
    if c.wandb_watch:
        env["WANDB_WATCH"] = c.wandb_watch
    if c.wandb_log_model:
        env["WANDB_LOG_MODEL"] = c.wandb_log_model
    if not c.wandb_online:
        env["WANDB_MODE"] = "offline"
    if c.deterministic:
        env["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS keeps one result per shape only with a fixed workspace
    return Choice("environment", env, "auto", "")


def floors(desk: Desk) -> None:
    """The stage's version floors beside what is loaded: facts for the reader, no gate."""
    m, stage = desk.machine, desk.stage
    for name, loaded, floor in (("CUDA", m.cuda, stage.cuda_floor), ("cuDNN", m.cudnn, stage.cudnn_floor)):
        if m.gpus and loaded and _numbers(loaded) < _numbers(floor):
            desk.notes.append(f"stage {stage.number} was set up for {name} {floor} or newer; torch has {name} {loaded}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
