"""The environment and the processes."""

from __future__ import annotations

from surefoot.rules.desk import Choice, Desk

FLIGHT_RECORDER = ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE")  # collectives that are kept, and where they are written
OLDER_FLIGHT_RECORDER = ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")  # of which torch 2.9 and later warn


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
    if desk.machine.gpus and desk.machine.world_size > 1:  # NCCL's flight recorder: the last collectives, written when one times out
        size, file = FLIGHT_RECORDER if _numbers(desk.machine.versions.get("torch", "")) >= (2, 9) else OLDER_FLIGHT_RECORDER
        env[size] = "2000"
        env[file] = f"{c.output_dir}/heartbeats/nccl-of-rank-"
        env["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "1"
    if desk.machine.engine == "deepspeed":  # its 0.19 reads a checkpoint's files as whole pickles, which may run code
        env["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
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
