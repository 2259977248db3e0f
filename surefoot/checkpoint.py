"""A checkpoint folder is whole when manifest.json, written last and beside its files, fits them: described, judged and published here."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any, NamedTuple

from surefoot.json_file import write_json

MANIFEST = "manifest.json"
PARTIAL = ".partial"  # checkpoint-N.partial is being written, or was when its run was killed
REPLACED = ".replaced"  # an earlier checkpoint of the same step, on its way out


def folders(run_folder: Path) -> list[Path]:
    """The checkpoint-N of a run folder, oldest step first; what a killed run left half-written is not among them."""
    found = [path for path in run_folder.glob("checkpoint-*") if path.name[11:].isdigit() and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name[11:])


def leftovers(run_folder: Path) -> list[Path]:
    return [path for ending in (PARTIAL, REPLACED) for path in run_folder.glob(f"checkpoint-*{ending}")]


def home(folder: Path) -> Path:
    """The run folder that a checkpoint lies in; any other folder itself."""
    return folder.parent if folder.name.startswith("checkpoint-") else folder


def share(folder: Path) -> None:
    """Gives the folder's weights the mode of its config: safetensors 0.8 lets none but their owner read them (its issue 782)."""
    for file in folder.glob("*.safetensors"):
        file.chmod(stat.S_IMODE(next(folder.glob("*config.json")).stat().st_mode))


class Found(NamedTuple):
    """The newest whole checkpoint and the older ones (not looked into), oldest first; and why newer ones are passed over."""

    checkpoints: tuple[Path, ...]
    skipped: tuple[str, ...]


def newest_whole(run_folder: Path) -> Found:
    """Reads every byte of the newest checkpoint, and of older ones only as long as the newer are not whole."""
    candidates, skipped = folders(run_folder), list[str]()
    while candidates and (reason := complaint(candidates[-1])) is not None:
        skipped.append(f"{candidates.pop()}: {reason}")
    return Found(tuple(candidates), tuple(skipped))


def complaint(folder: Path) -> str | None:
    """Why a checkpoint cannot be continued from, None when every file is there and has its SHA-256."""
    content = read_manifest(folder)
    if isinstance(content, str):
        return content
    for name, expected in content["files"].items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        size = file.stat().st_size
        if size != expected["bytes"]:
            return f"{name} is cut off or grown: {size} bytes, not {expected['bytes']}"
        if _sha256(file) != expected["sha256"]:
            return f"{name} is damaged: its SHA-256 is not the manifest's"
    return None


def read_manifest(folder: Path) -> dict[str, Any] | str:
    """The manifest, or what is wrong with it."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{MANIFEST} is missing: another program or an older version made it, or somebody changed it"
    except (ValueError, OSError) as error:
        return f"{MANIFEST} is damaged ({error})"
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        return f"{MANIFEST} is damaged (it lists no files)"
    return content


def sync(folder: Path) -> None:
    """Returns once all files of the folder and their names are on the disk, whoever wrote them."""
    for place, _, names in os.walk(folder):
        for path in (*(Path(place, name) for name in names), Path(place)):
            _sync_one(path)


def publish(partial: Path, target: Path, facts: dict[str, Any]) -> None:
    """Adds the manifest (facts, and size and SHA-256 of each file as read back) and gives the folder its name, in one rename.

    Raises:
        OSError: the disk is full or refuses; nothing that was whole before has changed.
    """
    files = sorted(path for path in partial.rglob("*") if path.is_file() and path.name != MANIFEST)
    listed = {str(path.relative_to(partial)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    write_json(partial / MANIFEST, {**facts, "files": listed})
    if target.exists():  # of a run that took another turn, or not whole
        replaced = target.with_name(target.name + REPLACED)
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    partial.rename(target)
    _sync_one(target.parent)
    for path in leftovers(target.parent):
        shutil.rmtree(path, ignore_errors=True)


def prune(run_folder: Path, limit: int | None, best: str | None) -> None:
    """Removes the oldest checkpoints until `limit` are left; the newest and the best one always stay."""
    found = folders(run_folder)
    spare = [path for path in found[:-1] if best is None or path.name != Path(best).name]
    for path in spare[: max(0, len(found) - limit)] if limit is not None else []:
        gone = path.with_name(path.name + REPLACED)  # a removal that is cut short leaves no half checkpoint under its name
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
