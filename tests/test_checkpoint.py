"""A checkpoint folder on the disk: whole, damaged, half-written, replaced, pruned."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from surefoot import checkpoint
from surefoot.errors import BackendError
from surefoot.training.checkpoints import Saver


def made(run: Path, step: int, content: bytes = b"weights") -> Path:
    partial = run / f"checkpoint-{step}{checkpoint.PARTIAL}"
    (partial / "global_step").mkdir(parents=True)
    (partial / "adapter.safetensors").write_bytes(content)
    (partial / "global_step/shard-0.pt").write_bytes(b"optimizer")
    checkpoint.sync(partial)
    checkpoint.publish(partial, run / f"checkpoint-{step}", {"step": step})
    return run / f"checkpoint-{step}"


def test_checkpoint_when_published_then_is_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    folder = made(tmp_path, 3)
    manifest = checkpoint.read_manifest(folder)
    assert checkpoint.complaint(folder) is None
    assert isinstance(manifest, dict)
    assert sorted(manifest["files"]) == ["adapter.safetensors", "global_step/shard-0.pt"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda folder: os.truncate(folder / "global_step/shard-0.pt", 3), "shard-0.pt is cut off or grown: 3 bytes, not 9"),
    "changed": (lambda folder: (folder / "adapter.safetensors").write_bytes(b"WEIGHTS"), "adapter.safetensors is damaged: its SHA-256"),
    "gone": (lambda folder: (folder / "adapter.safetensors").unlink(), "adapter.safetensors is missing"),
    "no manifest": (lambda folder: (folder / checkpoint.MANIFEST).unlink(), "manifest.json is missing"),
    "half a manifest": (lambda folder: os.truncate(folder / checkpoint.MANIFEST, 20), "manifest.json is damaged"),
    "empty manifest": (lambda folder: (folder / checkpoint.MANIFEST).write_text("[]"), "lists no files"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_resume_when_the_newest_checkpoint_is_damaged_then_passes_over_it_and_says_why(tmp_path: Path, kind: str) -> None:
    damage, says = DAMAGE[kind]
    for step in (9, 10):
        made(tmp_path, step)
    made(tmp_path, 11).rename(tmp_path / "checkpoint-11.partial")  # a run killed before the rename
    damage(tmp_path / "checkpoint-10")
    found = checkpoint.newest_whole(tmp_path)
    assert [path.name for path in found.checkpoints] == ["checkpoint-9"]
    assert len(found.skipped) == 1
    assert says in found.skipped[0]


def test_checkpoint_when_its_step_is_saved_again_then_is_replaced(tmp_path: Path) -> None:
    made(tmp_path, 3)
    folder = made(tmp_path, 3, b"other weights")
    assert checkpoint.complaint(folder) is None
    assert (folder / "adapter.safetensors").read_bytes() == b"other weights"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(None, None, [1, 2, 3, 10]), (2, None, [3, 10]), (2, "run/checkpoint-1", [1, 10]), (1, "run/checkpoint-2", [2, 10])],
)
def test_checkpoints_when_over_the_limit_then_the_newest_and_the_best_stay(
    tmp_path: Path, limit: int | None, best: str | None, left: list[int]
) -> None:
    for step in (1, 2, 3, 10):
        made(tmp_path, step)
    checkpoint.prune(tmp_path, limit, best)
    assert [checkpoint.step_of(path) for path in checkpoint.folders(tmp_path)] == left


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_save_when_the_disk_refuses_then_is_one_error_and_the_last_checkpoint_stays(tmp_path: Path, number: int) -> None:
    made(tmp_path, 3)

    def write(folder: Path) -> None:
        (folder / "adapter.safetensors").write_bytes(b"half")
        raise OSError(number, os.strerror(number))

    with pytest.raises(BackendError, match=rf"checkpoint of step 6 cannot be written: .*{os.strerror(number)}. checkpoint-3 is as it was"):
        Saver(tmp_path, 1, 0, 1).save(6, write, {}, None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert checkpoint.complaint(tmp_path / "checkpoint-3") is None


def test_save_when_a_process_left_no_random_state_then_says_so(tmp_path: Path) -> None:
    saver = Saver(tmp_path, 1, 0, 2)
    saver._first = lambda problem: problem  # type: ignore[method-assign]  # the other process is on another disk
    with pytest.raises(BackendError, match="1 of 2 processes' random states arrived: is the folder shared"):
        saver.save(6, lambda folder: (folder / "rng_state_0.pth").write_bytes(b"0") and None, {}, None)


def test_save_when_the_error_is_a_bug_then_passes(tmp_path: Path) -> None:
    def write(_folder: Path) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        Saver(tmp_path, 1, 0, 1).save(6, write, {}, None)
