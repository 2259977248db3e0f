"""Stack: torch and the CUDA libraries as a process really loads them, read off /proc/self/maps; and what a search path would load."""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from surefoot.doctor import child

FAMILIES = ("cudnn", "nccl", "cublas", "cudart")
TIMEOUT_S = 120.0  # a cold import of torch from a network disk
CHILD = "from surefoot.doctor import stack; stack.main()"


class Library(NamedTuple):
    """A CUDA library in the process: its family, every file of it, and the version that the library itself tells."""

    family: str
    paths: tuple[str, ...]
    version: str | None


@dataclass(frozen=True, kw_only=True)
class Stack:
    """torch as it loads here. problem: why it does not, and then the rest is empty; cuda_problem: why it sees no GPU."""

    problem: str = ""
    torch: str = ""
    folder: str = ""  # of torch/__init__.py
    cuda: str | None = None
    cudnn_compiled: str | None = None
    architectures: tuple[str, ...] = ()
    gpus: tuple[tuple[str, tuple[int, int]], ...] = ()  # name, compute capability
    cuda_problem: str = ""
    libraries: tuple[Library, ...] = ()

    def library(self, family: str) -> Library | None:
        return next((library for library in self.libraries if library.family == family), None)


def load() -> Stack:
    """Loads torch in a process of its own: a library that shadows another can end the process that loads it."""
    answer = child.finish(child.python(CHILD, TIMEOUT_S))
    lines = [line for line in answer.output.splitlines() if line.startswith("{")]
    if answer.problem or not lines:
        return Stack(problem=answer.problem or "importing it ended the process without an answer")
    return from_record(json.loads(lines[-1]))


def from_record(record: dict[str, Any]) -> Stack:
    """The Stack that main() wrote as JSON."""
    gpus = tuple((name, (major, minor)) for name, (major, minor) in record.pop("gpus"))
    libraries = tuple(Library(family, tuple(paths), version) for family, paths, version in record.pop("libraries"))
    return Stack(**{**record, "architectures": tuple(record["architectures"])}, gpus=gpus, libraries=libraries)


def main() -> None:
    """The child: imports torch, makes it load its libraries, and writes one line of JSON."""
    import torch

    compiled = getattr(torch._C, "_cudnn", None)
    record: dict[str, Any] = {
        "torch": torch.__version__,
        "folder": str(Path(torch.__file__).parent),
        "cuda": torch.version.cuda,
        "cudnn_compiled": ".".join(map(str, compiled.getCompileVersion())) if compiled else None,
        "architectures": [],
        "gpus": [],
        "cuda_problem": "",
    }
    if torch.version.cuda:
        try:
            record |= _use_gpu()
        except (RuntimeError, AssertionError) as error:
            record["cuda_problem"] = child.last_line(str(error).partition("\n")[0])
    found = loaded(Path("/proc/self/maps").read_text(errors="replace"))
    record["libraries"] = [(family, paths, version_of(family, paths)) for family, paths in found.items()]
    print(json.dumps(record))


def _use_gpu() -> dict[str, Any]:
    """A product and a convolution: cuBLAS and the parts of cuDNN are only loaded when they are first used."""
    import torch

    torch.cuda.init()  # type: ignore[no-untyped-call]
    ones = torch.ones(1, 1, 16, 16, device="cuda")
    torch.nn.functional.conv2d(ones, torch.ones(1, 1, 3, 3, device="cuda"))
    torch.matmul(ones, ones)
    torch.cuda.synchronize()
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {"gpus": [(p.name, (p.major, p.minor)) for p in found], "architectures": torch.cuda.get_arch_list()}


def loaded(maps: str) -> dict[str, tuple[str, ...]]:
    """The files of each CUDA library family in the text of a /proc/PID/maps, sorted; families without one are left out."""
    found: dict[str, set[str]] = {}
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        path = fields[5].removesuffix(" (deleted)") if len(fields) == 6 else ""
        family = family_of(path.rpartition("/")[2])
        if family:
            found.setdefault(family, set()).add(path)
    return {family: tuple(sorted(found[family])) for family in FAMILIES if family in found}


def family_of(name: str) -> str | None:
    """cudnn for libcudnn.so.9 and its parts such as libcudnn_graph.so.9.20.0; None for other files."""
    match = re.match(rf"lib({'|'.join(FAMILIES)})[^.]*\.so(\.|$)", name)
    return match[1] if match else None


def version_of(family: str, paths: tuple[str, ...]) -> str | None:
    """Asks the library itself; None where its main file is not loaded or does not have the call."""
    main_file = next((path for path in paths if re.match(rf"lib{family}(-[0-9a-f]+)?\.so", path.rpartition("/")[2])), None)
    if main_file is None:
        return None
    try:
        library = ctypes.CDLL(main_file)
        if family == "cublas":
            return ".".join(str(_by_reference(library.cublasGetProperty, part)) for part in range(3))
        if family == "cudnn":
            library.cudnnGetVersion.restype = ctypes.c_size_t
            return readable(family, library.cudnnGetVersion())
        return readable(family, _by_reference(library.ncclGetVersion if family == "nccl" else library.cudaRuntimeGetVersion))
    except (OSError, AttributeError):
        return None


def _by_reference(function: Any, *arguments: int) -> int:
    value = ctypes.c_int(0)
    function(*arguments, ctypes.byref(value))
    return value.value


def readable(family: str, number: int) -> str:
    """A version number as cudnn.h, nccl.h and cuda_runtime_api.h pack it: cuDNN 8 and older and CUDA use another base than the rest."""
    if family == "cudart":
        return f"{number // 1000}.{number % 1000 // 10}"
    base = 1000 if family == "cudnn" and number < 10000 else 10000
    return f"{number // base}.{number % base // 100}.{number % 100}"


def search_path(text: str) -> tuple[str, ...]:
    """The folders of an LD_LIBRARY_PATH in order; ld.so takes an empty entry for the current folder."""
    return tuple(folder or "." for folder in re.split("[:;]", text)) if text else ()


def copies(environment: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(variable, family, file) for every CUDA library that LD_PRELOAD or a folder of LD_LIBRARY_PATH puts before torch's own."""
    files = [("LD_PRELOAD", Path(name)) for name in re.split("[: ]", environment.get("LD_PRELOAD", "")) if name]
    for folder in dict.fromkeys(search_path(environment.get("LD_LIBRARY_PATH", ""))):
        files += [("LD_LIBRARY_PATH", Path(folder, name)) for name in _names(folder)]
    return [(variable, family, str(file)) for variable, file in files if (family := family_of(file.name))]


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:  # ld.so passes over it too
        return []
