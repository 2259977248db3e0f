"""An output folder or file that appears whole or not at all: written beside its place and renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from surefoot import checkpoint
from surefoot.artifacts import META
from surefoot.errors import BackendError, UsageError

REFUSED = ".refused"  # appended to the name of what was written but failed its parity verdict


def check(out: Path, *, overwrites: bool) -> None:
    """Raises UsageError when `out` is in use, cannot be written, or would replace what this program did not write."""
    parent = _parent(out)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"--out={out}: {parent} {'is a file' if not parent.is_dir() else 'cannot be written'}")
    if not out.exists():
        return
    if not overwrites:
        raise UsageError(f"--out={out} exists: give --overwrite, or another --out")
    if not out.is_dir() or (any(out.iterdir()) and not (out / META).is_file()):
        raise UsageError(f"--out={out} is nothing that this program exported (no {META}): remove it yourself, or give another --out")


def check_room(out: Path, size: float) -> None:
    """Raises BackendError when the disk of `out` has no `size` bytes free."""
    free = shutil.disk_usage(_parent(out)).free
    if size > free:
        raise BackendError(f"--out={out} needs {size / 2**30:.1f} GiB of disk, and {free / 2**30:.1f} are free: give one on another disk")


def _parent(out: Path) -> Path:
    """The nearest folder above `out` that is there."""
    return next(place for place in out.absolute().parents if place.exists())


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, which takes its place on the way out; removed when an error passes through."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        checkpoint.share(temporary)
        _put(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(temporary: Path, out: Path) -> None:
    """Renames; an earlier folder steps aside first and is removed last, so that a kill leaves one of the two whole."""
    earlier = out.with_name(f".{out.name}.earlier")
    shutil.rmtree(earlier, ignore_errors=True)
    if out.exists():
        out.rename(earlier)
    temporary.rename(out)
    shutil.rmtree(earlier, ignore_errors=True)


def put_aside(temporary: Path, out: Path) -> Path:
    """Moves what failed its verdict to `out` with `.refused` at its end, and returns that."""
    kept = out.with_name(out.name + REFUSED)
    shutil.rmtree(kept, ignore_errors=True)
    temporary.rename(kept)
    return kept


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
