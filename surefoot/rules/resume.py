"""The run folder: begin, continue, overwrite, or refuse."""

from __future__ import annotations

from surefoot.rules.desk import Choice, Desk


def resume_from(desk: Desk) -> Choice:
    """The checkpoint to continue from, None for a run from the start or one that is finished already."""
    c, folder = desk.config, desk.inputs.run_folder
    source = c.source("resume" if c.resume else "resume_from_checkpoint")
    if c.resumes and c.overwrite:
        desk.problems.append("--overwrite and --resume exclude each other. Give one of them")
    if c.checkpoint is not None:
        return Choice("resume_from", c.checkpoint, source, "")
    desk.notes.extend(f"passed over {skipped}" for skipped in folder.skipped)
    if c.resumes and folder.status == "unfinished" and folder.checkpoints:
        why = f"newest of {len(folder.checkpoints)} checkpoints" + (f", {len(folder.skipped)} passed over" if folder.skipped else "")
        return Choice("resume_from", folder.checkpoints[-1], source, why)
    if c.resumes and folder.status == "unfinished" and folder.skipped:
        desk.problems.append(
            f"--resume: no checkpoint in {c.output_dir} is whole ({'; '.join(folder.skipped)}). "
            "Put their files back, name a checkpoint with --resume_from_checkpoint, or begin anew with --overwrite"
        )
    elif c.resumes and folder.status == "finished":
        _refuse_longer(desk)
    elif not c.resumes and not c.overwrite:
        _refuse_overwriting(desk)
    elif c.overwrite and folder.status == "foreign" and folder.clash:
        desk.problems.append(
            f"--overwrite: {c.output_dir} holds {folder.clash} but no run.json, so it is no run of this program and stays as it is. "
            "Choose another --output_dir"
        )
    return Choice("resume_from", None, source if c.resumes else "default", "no checkpoint to continue from" if c.resumes else "")


def is_finished(desk: Desk) -> bool:
    """The same command has run to its end: nothing is left to do."""
    c, folder = desk.config, desk.inputs.run_folder
    same_length = folder.length == (c.max_steps, c.num_epochs)
    return c.resumes and c.checkpoint is None and not c.overwrite and folder.status == "finished" and same_length


def _refuse_longer(desk: Desk) -> None:
    c, folder = desk.config, desk.inputs.run_folder
    if is_finished(desk):
        return
    desk.problems.append(
        f"--resume: the run in {c.output_dir} is finished. To train it further give "
        f"--resume_from_checkpoint={folder.checkpoints[-1] if folder.checkpoints else 'CHECKPOINT'}; to start anew, --overwrite"
    )


def _refuse_overwriting(desk: Desk) -> None:
    folder, name = desk.inputs.run_folder, desk.config.output_dir
    if folder.status == "finished":
        desk.problems.append(f"--output_dir={name} holds a finished run. Choose another folder, or --overwrite it")
    elif folder.status == "unfinished" and (folder.checkpoints or folder.skipped):
        desk.problems.append(f"--output_dir={name} holds an unfinished run. --resume continues it, --overwrite starts anew")
    elif folder.status == "foreign" and folder.clash:
        desk.problems.append(f"--output_dir={name} holds {folder.clash}, which this run would replace. Choose another folder")
