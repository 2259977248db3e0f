"""pinned: is what torch really loads here what a lock pins? `python -m surefoot.doctor.pinned LOCK` ends with 5 where it is not.

The images ask this before every run: another cuDNN on the library path gives wrong numbers and no error.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from surefoot.doctor import libraries, stack
from surefoot.doctor.stack import Stack
from surefoot.errors import BackendError, SurefootError, UsageError, joined

# CUDA itself: cu12 wheels tell it through their runtime, cu13 wheels through cuda-toolkit
PACKAGES = {
    "torch": r"torch", "CUDA": r"(?:nvidia-cuda-runtime-cu12|cuda-toolkit)", "cuDNN": r"nvidia-cudnn-cu\d+", "NCCL": r"nvidia-nccl-cu\d+",
}  # fmt: skip


def pins(lock: str) -> dict[str, str]:
    """torch, CUDA, cuDNN and NCCL to the version that the text of a lock pins; a CPU build of torch leaves only torch.

    Raises:
        UsageError: the text pins no torch.
    """
    found = {name: re.search(rf"^{package}==([^\s\\;]+)", lock, re.MULTILINE) for name, package in PACKAGES.items()}
    if found["torch"] is None:
        raise UsageError("the lock pins no torch: it is no lock of an image. docker/lock.sh makes them")
    return {name: match[1] for name, match in found.items() if match}


def differences(wanted: Mapping[str, str], found: Stack) -> Iterator[str]:
    """One sentence for each part that is not the pinned one. What cannot be told counts as different."""
    if found.problem:
        yield f"torch cannot be loaded: {found.problem}"
        return
    if found.torch != wanted["torch"] and not ("+" not in wanted["torch"] and found.torch.partition("+")[0] == wanted["torch"]):
        yield f"torch is {found.torch}, pinned is {wanted['torch']}"
    if found.cuda != (cuda := _parts(wanted["CUDA"], 2) if "CUDA" in wanted else None):
        yield f"torch is built for CUDA {found.cuda}, pinned is {cuda}"
    for name, family in (("cuDNN", "cudnn"), ("NCCL", "nccl")):
        library = found.library(family)
        if name in wanted and (library is None or library.version != _parts(wanted[name], 3)):
            where = f"{library.version or 'of an untold version'} from {library.paths[0]}" if library else "not loaded"
            yield f"{name} is {where}, pinned is {wanted[name]}"


def _parts(version: str, count: int) -> str:
    """The first parts of a version: the libraries tell no more."""
    return ".".join(version.split(".")[:count])


def check(lock: Path) -> str:
    """Loads torch in a process of its own and says what it found.

    Raises:
        UsageError: no such lock. BackendError: something else is loaded, or it is loaded from outside torch's wheel.
    """
    if not lock.is_file():
        raise UsageError(f"{lock} does not exist: give the lock that the environment was made from")
    wanted = pins(lock.read_text())
    found = stack.load()
    problems = list(differences(wanted, found))
    if not problems:
        problems = [f"{c.name}: {c.fact}. {c.way_out}" for c in libraries.checks(found, os.environ, "") if c.verdict == "bad"]
    if problems:
        raise BackendError(f"{joined(problems)}\nThis is not the stack of {lock}. Mend it, or pass the check over with --no_check first")
    return f"stack as pinned: {', '.join(f'{name} {version}' for name, version in wanted.items())}"


def main() -> int:
    if len(sys.argv) != 2:
        print("pinned: give one lock: python -m surefoot.doctor.pinned docker/stage1.lock", file=sys.stderr)
        return UsageError.exit_code
    try:
        print(check(Path(sys.argv[1])), flush=True)
    except SurefootError as error:
        print(f"pinned: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
