"""The checks of torch and its CUDA libraries: do they load, from torch's own wheel, in the version torch was built for."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from surefoot.doctor import stack
from surefoot.doctor.check import Check
from surefoot.doctor.stack import Library, Stack

TOPIC = "torch and its libraries"
NAMES = {"cudnn": "cuDNN", "nccl": "NCCL", "cublas": "cuBLAS", "cudart": "CUDA runtime"}


def checks(found: Stack, environment: Mapping[str, str], install: str) -> Iterator[Check]:
    """install: the pip line for torch."""
    yield _torch(found, install)
    pins = wheel_pins()
    for family, name in NAMES.items():
        library = found.library(family)
        if library is not None:
            yield judge(name, library, wheel_folders(found, family), pins.get(family) or _compiled(found, family))
    yield from _shadows(found, environment)


def _torch(found: Stack, install: str) -> Check:
    if "No module named 'torch'" in found.problem:
        return Check(TOPIC, "torch", "bad", "not installed: nothing can be trained", install)
    if found.problem:
        way_out = "Unset LD_LIBRARY_PATH and LD_PRELOAD and try again; if it stays, reinstall: pip install --force-reinstall torch"
        return Check(TOPIC, "torch", "bad", f"cannot be loaded: {found.problem}", way_out)
    kind = f"CUDA {found.cuda}" if found.cuda else "a CPU build, loads no CUDA library"
    return Check(TOPIC, "torch", "ok", f"{found.torch}, {kind}, {found.folder}")


def wheel_pins() -> dict[str, str]:
    """The cuDNN and NCCL versions that the installed torch wheel asks for; none for CPU builds and builds outside PyPI."""
    try:
        wanted = importlib.metadata.requires("torch") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return parse_pins(wanted)


def parse_pins(requirements: list[str]) -> dict[str, str]:
    """Family to version from lines such as `nvidia-cudnn-cu13==9.20.0.48; platform_system == "Linux"`."""
    found = (re.match(r"nvidia-(cudnn|nccl)-cu\d+ *\(?== *([\d.]+)", line) for line in requirements)
    return {match[1]: match[2] for match in found if match}


def _compiled(found: Stack, family: str) -> str | None:
    return found.cudnn_compiled if family == "cudnn" else None


def wheel_folders(found: Stack, family: str) -> list[str]:
    """The folders of torch's site-packages that hold a library of the family."""
    site = Path(found.folder).parent
    files = [*site.glob(f"nvidia/*/lib/lib{family}*.so*"), *Path(found.folder, "lib").glob(f"lib{family}*.so*")]
    return sorted({str(file.resolve().parent) for file in files})


def judge(name: str, library: Library, own: list[str], wanted: str | None) -> Check:
    """One loaded library.

    Args:
        own: folders of torch's wheels that hold such a library; empty where torch came without (conda, vendor images).
        wanted: the version that torch was built for, None where nothing tells it.
    """
    fact = f"{library.version or 'version not told'}, {library.paths[0]}"
    folders = sorted({str(Path(path).resolve().parent) for path in library.paths})
    foreign = [folder for folder in folders if own and folder not in own]
    if len(folders) > 1 and (foreign or not own):
        fact += f"; its parts come from {len(folders)} folders: {', '.join(folders)}"
        return Check(TOPIC, name, "bad" if own else "warn", fact, _take_out(foreign or folders[1:]))
    difference = _difference(library.version, wanted)
    if difference:
        fact += f"; torch was built for {wanted}"
        verdict = "bad" if foreign or difference == "older" else "warn"
        return Check(
            TOPIC, name, verdict, fact, _take_out(foreign) if foreign else "Reinstall torch with its own libraries: pip install torch"
        )
    if foreign:
        return Check(TOPIC, name, "warn", f"{fact}; not the wheel's in {', '.join(own)}", _take_out(foreign))
    return Check(TOPIC, name, "ok", fact)


def _take_out(folders: list[str]) -> str:
    return f"Take {', '.join(folders)} out of LD_LIBRARY_PATH and LD_PRELOAD: torch then loads its wheel's"


def _difference(loaded: str | None, wanted: str | None) -> str:
    """older, newer or nothing; compared are major, minor and patch."""
    if loaded is None or wanted is None:
        return ""
    ours, theirs = ([int(part) for part in version.split(".")[:3]] for version in (loaded, wanted))
    return "older" if ours < theirs else "newer" if ours > theirs else ""


def _shadows(found: Stack, environment: Mapping[str, str]) -> Iterator[Check]:
    """CUDA libraries that the environment puts before torch's: one check a variable, family and folder."""
    in_use = {path for library in found.libraries for path in library.paths}
    seen = set()
    for variable, family, file in stack.copies(environment):
        folder = str(Path(file).resolve().parent)
        own = wheel_folders(found, family) if found.folder else []
        if folder in own or (variable, family, folder) in seen:
            continue
        seen.add((variable, family, folder))
        whose = f"the wheel's in {', '.join(own)}" if own else "the one that a CUDA wheel of torch brings"
        state = "is loaded" if str(Path(file).resolve()) in {str(Path(path).resolve()) for path in in_use} else "is not loaded now"
        fact = f"{folder} holds {Path(file).name}: it shadows {whose}, and {state}"
        way_out = f"Take {folder} out of {variable}: mixed {NAMES[family]} versions give wrong numbers without an error"
        yield Check(TOPIC, f"{variable}, {NAMES[family]}", "warn", fact, way_out)
