"""Inputs and inspect(): what lies at the paths the user named. The only reader of files before the plan."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surefoot import checkpoint
from surefoot.config import PROMPT_STYLES, Config

DATA_ENDINGS = (".json", ".jsonl", ".csv", ".parquet")
LOCK = ".lock"  # the file of the run folder whose flock a run holds
HUB_ID = re.compile(r"^[\w][\w.-]*(/[\w][\w.-]*)?$")


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """What output_dir holds now. status is absent, empty, foreign, unfinished or finished.

    checkpoints are oldest first; where a run is to be continued the last one is whole, and `skipped` says what is wrong with newer ones.
    length is (max_steps, num_epochs) of a run's plan.
    """

    status: str
    checkpoints: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    length: tuple[int, float] | None = None
    stamp: dict[str, Any] | None = None
    clash: str | None = None
    is_writable: bool = True


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Facts about the named paths; `problems` are the ones no plan can cure."""

    model_path: str
    model_config: dict[str, Any] | None
    weights_dtypes: tuple[str, ...]  # of the local model's tensors, as safetensors names them (BF16, F32); () where not known
    run_folder: RunFolder
    resume_stamp: dict[str, Any] | None
    problems: tuple[str, ...]
    commit: str | None = None  # of a model of the Hub, which --revision names, or its main branch as it is now


def inspect(config: Config) -> Inputs:
    """Looks at base_model, the data files, the prompt file and output_dir; of their contents it reads only the JSON records."""
    problems: list[str] = []
    model_path = config.base_model
    if config.local_dir and (Path(config.local_dir) / "config.json").is_file():
        model_path = config.local_dir
    model_config = _model_config(model_path, problems)
    for name in ("data_path", "val_data_path"):
        for path in getattr(config, name) or ():
            _check_data(name, path, problems)
    _check_prompt(config.prompt_style, problems)
    folder = _run_folder(Path(config.output_dir), problems, looks_for_whole=config.resumes and config.checkpoint is None)
    stamp = folder.stamp
    if config.checkpoint is not None:
        named = Path(config.checkpoint)
        _check_checkpoint("resume_from_checkpoint", named, problems)
        content = _json(named.parent / "backend.json")
        stamp = content if isinstance(content, dict) else None
    return Inputs(
        model_path=model_path,
        model_config=model_config,
        weights_dtypes=_weights_dtypes(Path(model_path)) if model_config is not None and not problems else (),
        run_folder=folder,
        resume_stamp=stamp,
        problems=tuple(problems),
    )


def with_hub_config(found: Inputs, revision: str | None) -> Inputs:
    """`found` with config.json and commit of a Hub model, or with the problem that there is none; as it was for a folder.

    Where the Hub has the model but no config.json it is as it was too: loading says why.
    """
    if found.model_config is not None or found.problems:
        return found
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        path = hf_hub_download(found.model_path, "config.json", revision=revision)
    except (LocalEntryNotFoundError, RepositoryNotFoundError) as error:  # now: transformers would ask again for every file, 24 s each
        return dataclasses.replace(found, problems=(no_model(found.model_path, error),))
    except (HfHubHTTPError, OSError, ValueError):
        return found
    content = _json(Path(path))
    commit = Path(path).parent.name  # the Hub's cache keeps files under snapshots/COMMIT
    return dataclasses.replace(found, model_config=content, commit=commit) if isinstance(content, dict) else found


def no_model(path: str, error: Exception) -> str:
    """The problem that neither this machine nor the Hub has it."""
    first = str(error).strip().splitlines()[0]
    return (
        f"--base_model={path}: no such folder here, and the Hub could not give it ({first}). Check the name, "
        "log in for a gated model (hf auth login), or download it first and give the folder"
    )


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or os.path.exists(path) or not HUB_ID.match(path)


def _model_config(path: str, problems: list[str]) -> dict[str, Any] | None:
    if not _looks_local(path):
        return None
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        problems.append(f"--base_model={path} {what}: give a folder with config.json, or a Hugging Face id such as meta-llama/Llama-3.1-8B")
        return None
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        problems.append(
            f"--base_model={path} is an adapter, not a model: give its base model, and --resume_from_checkpoint to train it further"
        )
        return None
    content = _json(folder / "config.json")
    if not isinstance(content, dict):
        state = "has no config.json" if content is None else f"has a config.json that is not valid JSON ({content})"
        problems.append(f"--base_model={path} {state}: it is not a model folder")
        return None
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        problems.append(f"--base_model={path} holds config.json but no weights (*.safetensors)")
    check_weights("base_model", folder, problems)
    return content


def _json(path: Path) -> Any:
    """The parsed file, None when it is missing, or the parser's complaint as text."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        return str(error)


def _check_data(flag: str, path: str, problems: list[str]) -> None:
    file = Path(path)
    ending = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
    if file.is_dir():
        found = sorted(child.name for child in file.iterdir() if child.name.endswith((*DATA_ENDINGS, ".gz")))
        hint = f"name its files: {', '.join(found[:4])}" if found else "it holds no json, jsonl, csv or parquet file"
        problems.append(f"--{flag}={path} is a folder: {hint}")
    elif file.is_file():
        if ending.lower() not in DATA_ENDINGS:
            problems.append(f"--{flag}={path}: unknown ending {ending or '(none)'}. Known: {', '.join(DATA_ENDINGS)}, each also with .gz")
        elif file.stat().st_size == 0:
            problems.append(f"--{flag}={path} is empty (0 bytes)")
        elif not os.access(file, os.R_OK):
            problems.append(f"--{flag}={path} cannot be read: no permission")
    elif _looks_local(path) or ending.lower() in DATA_ENDINGS:
        problems.append(f"--{flag}={path} does not exist (looked in {Path.cwd()})")


def _check_prompt(style: str, problems: list[str]) -> None:
    if style in PROMPT_STYLES or Path(style).is_file():
        return
    problems.append(f"--prompt_style={style} is neither {', '.join(PROMPT_STYLES)}, nor a Jinja file that exists")


def _check_checkpoint(flag: str, folder: Path, problems: list[str]) -> None:
    """Its files must fit its manifest; without one (another program's), its state, weights and torch files must be whole."""
    if (folder / checkpoint.MANIFEST).is_file():
        reason = checkpoint.complaint(folder)
        if reason is not None:
            problems.append(f"--{flag}={folder}: {reason}. Take an earlier checkpoint, or put its files back")
        return
    state = _json(folder / "trainer_state.json")
    if state is None:
        what = "is not a checkpoint: it has no trainer_state.json" if folder.exists() else f"does not exist (looked in {Path.cwd()})"
        problems.append(f"--{flag}={folder} {what}. --resume takes the newest one of --output_dir by itself")
    elif not isinstance(state, dict):
        problems.append(f"--{flag}={folder}: trainer_state.json is damaged ({state}). Take an earlier checkpoint (remove this one)")
    for file in sorted((*folder.glob("*.pt"), *folder.glob("*.pth"))):
        if not zipfile.is_zipfile(file):
            problems.append(
                f"--{flag}={folder}: {file.name} is cut off or damaged ({file.stat().st_size} bytes). "
                "Take an earlier checkpoint (remove this one)"
            )
    check_weights(flag, folder, problems)


def check_weights(flag: str, folder: Path, problems: list[str]) -> None:
    """Every safetensors file must hold its header and as many bytes as the header says."""
    for file in sorted(folder.glob("*.safetensors")):
        complaint = _safetensors_complaint(file)
        if complaint:
            problems.append(f"--{flag}={folder}: {file.name} {complaint}. Copy or download it again, or take another")


def _safetensors_complaint(file: Path) -> str | None:
    size = file.stat().st_size
    if size == 0:
        return "is empty (0 bytes)"
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if header_size > size - 8:
            return f"is cut off or no safetensors file ({size} bytes)"
        try:
            header = json.loads(stream.read(header_size))
        except ValueError:
            return "has no readable header"
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    return f"is cut off: {size - 8 - header_size} of {end} bytes" if size - 8 - header_size < end else None


def _weights_dtypes(folder: Path) -> tuple[str, ...]:
    found = set()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        found |= {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    return tuple(sorted(found))


def _run_folder(folder: Path, problems: list[str], *, looks_for_whole: bool) -> RunFolder:
    parent = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not parent.is_dir():
        problems.append(f"--output_dir={folder}: {parent} is a file")
        return RunFolder(status="foreign", is_writable=False)
    if not os.access(parent, os.W_OK):
        problems.append(f"--output_dir={folder} cannot be written: no permission in {parent}")
    if not folder.is_dir():
        return RunFolder(status="absent")
    record, stamp = _json(folder / "run.json"), _json(folder / "backend.json")
    for name, content in (("run.json", record), ("backend.json", stamp)):
        if content is not None and not isinstance(content, dict):
            problems.append(f"{folder / name} is damaged ({content}): mend or remove it, or give another --output_dir")
    if isinstance(record, dict):
        status = "finished" if record.get("status") == "done" else "unfinished"
    else:
        status = "foreign" if any(child.name != LOCK for child in folder.iterdir()) else "empty"
    found = checkpoint.Found(tuple(checkpoint.folders(folder)), ())
    if looks_for_whole and status == "unfinished":
        found = checkpoint.newest_whole(folder)
    ours = ("adapter_model.safetensors", "adapter_config.json", "config.json", "model.safetensors", "checkpoint-*")
    clash = next((hit.name for name in ours for hit in folder.glob(name)), None)
    return RunFolder(
        status=status,
        checkpoints=tuple(map(str, found.checkpoints)),
        skipped=found.skipped,
        length=_length(record),
        stamp=stamp if isinstance(stamp, dict) else None,
        clash=clash,
    )


def _length(record: Any) -> tuple[int, float] | None:
    """(max_steps, num_epochs) of the plan in run.json."""
    try:
        train = record["plan"]["train"]
        return int(train["max_steps"]), float(train["num_epochs"])
    except (KeyError, TypeError, ValueError):
        return None
