"""The GPUs and their driver, as nvidia-smi tells them and as torch sees them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from surefoot.doctor import child
from surefoot.doctor.check import Check
from surefoot.doctor.stack import Stack

TOPIC = "GPUs"
TIMEOUT_S = 15.0  # nvidia-smi takes seconds where no persistence daemon holds the driver, and hangs where a GPU is lost
BUSY_MIB = 1024
# NVIDIA, CUDA Compatibility, "Minor Version Compatibility", table 1: CUDA major version to the least driver
# (docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html)
LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
GPU_FIELDS = "uuid,name,memory.total,memory.used,driver_version"
APP_FIELDS = "gpu_uuid,pid,process_name,used_memory"


class Card(NamedTuple):
    """A row of nvidia-smi; MiB, None where the driver does not tell (MIG, some clouds)."""

    uuid: str
    name: str
    memory_mib: int | None
    used_mib: int | None
    driver: str


class User(NamedTuple):
    """A process that holds GPU memory."""

    uuid: str
    pid: str
    name: str
    used_mib: int | None


class Smi(NamedTuple):
    """problem: why nvidia-smi gave no list; empty where it is not installed."""

    cards: tuple[Card, ...] = ()
    users: tuple[User, ...] = ()
    problem: str = ""


def ask_smi() -> Smi:
    """What nvidia-smi says."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return Smi()
    answer = child.ask([program, f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader,nounits"], TIMEOUT_S)
    if answer.problem:
        return Smi(problem=answer.problem)
    users = child.ask([program, f"--query-compute-apps={APP_FIELDS}", "--format=csv,noheader,nounits"], TIMEOUT_S)
    return Smi(parse_cards(answer.output), parse_users(users.output))


def parse_cards(text: str) -> tuple[Card, ...]:
    """The rows of nvidia-smi --query-gpu with GPU_FIELDS; other lines are passed over."""
    rows = [[field.strip() for field in line.split(",")] for line in text.splitlines()]
    return tuple(Card(row[0], row[1], _mib(row[2]), _mib(row[3]), row[4]) for row in rows if len(row) == 5)


def parse_users(text: str) -> tuple[User, ...]:
    """The rows of nvidia-smi --query-compute-apps with APP_FIELDS; a process name may hold commas."""
    rows = [[field.strip() for field in line.split(",")] for line in text.splitlines()]
    return tuple(User(row[0], row[1], ",".join(row[2:-1]), _mib(row[-1])) for row in rows if len(row) >= 4)


def _mib(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def parse_driver(text: str) -> str | None:
    """The version in /proc/driver/nvidia/version."""
    line = next((line for line in text.splitlines() if line.startswith("NVRM version")), "")
    match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", line)
    return match[1] if match else None


def driver_version(smi: Smi, probed: str | None) -> str | None:
    """Of the kernel module: from nvidia-smi, the machine's probe, or /proc."""
    if smi.cards or probed:
        return smi.cards[0].driver if smi.cards else probed
    try:
        return parse_driver(Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None


def checks(smi: Smi, stack: Stack, driver: str | None, environment: Mapping[str, str]) -> Iterator[Check]:
    if smi.problem:
        yield Check(
            TOPIC,
            "nvidia-smi",
            "warn",
            f"gives no list: {smi.problem}",
            "See `nvidia-smi` and `dmesg | grep -i nvrm`; restart or reload the driver",
        )
    capabilities = dict(stack.gpus)
    for index, card in enumerate(smi.cards):
        yield _card(index, card, [user for user in smi.users if user.uuid == card.uuid], capabilities.get(card.name))
    if not smi.cards:
        for index, (name, capability) in enumerate(stack.gpus):
            yield Check(TOPIC, f"GPU {index}", "ok", f"{name}, compute capability {capability[0]}.{capability[1]}")
    if not stack.problem:
        yield from _visible(smi, stack, environment)
        yield from _kernels(stack)
    if driver:
        yield driver_check(driver, stack.cuda, sees_gpu=bool(stack.gpus))


def _card(index: int, card: Card, users: list[User], capability: tuple[int, int] | None) -> Check:
    fact = card.name
    if card.memory_mib is not None:
        fact += f", {card.memory_mib / 1024:.1f} GiB"
    if capability:
        fact += f", compute capability {capability[0]}.{capability[1]}"
    held = max(card.used_mib or 0, sum(user.used_mib or 0 for user in users))
    if held <= BUSY_MIB:
        return Check(TOPIC, f"GPU {index}", "ok", fact)
    names = ", ".join(f"{user.name} (pid {user.pid}, {_gib(user.used_mib)})" for user in users) or "processes that nvidia-smi does not show"
    fact += f"; {_gib(held)} of it held by {names}"
    return Check(TOPIC, f"GPU {index}", "warn", fact, "Wait for them, end them, or choose other GPUs with CUDA_VISIBLE_DEVICES")


def _gib(mib: int | None) -> str:
    return "?" if mib is None else f"{mib / 1024:.1f} GiB"


def _visible(smi: Smi, stack: Stack, environment: Mapping[str, str]) -> Iterator[Check]:
    """Whether torch sees what nvidia-smi lists."""
    hidden = environment.get("CUDA_VISIBLE_DEVICES")
    if not smi.cards and not stack.gpus:
        yield Check(
            TOPIC, "GPUs", "ok", "none: this machine trains on its CPU" + (f" ({stack.cuda_problem})" if stack.cuda_problem else "")
        )
    elif hidden is not None and len(stack.gpus) < len(smi.cards):
        fact = f"CUDA_VISIBLE_DEVICES={hidden} leaves torch {len(stack.gpus)} of {len(smi.cards)} GPUs"
        yield Check(TOPIC, "visible", "ok" if stack.gpus else "warn", fact, "Unset CUDA_VISIBLE_DEVICES for all of them")
    elif not stack.gpus and not stack.cuda:
        yield Check(
            TOPIC,
            "visible",
            "bad",
            f"torch {stack.torch} is a CPU build and cannot use the GPU",
            "Install a CUDA build: pip install --force-reinstall torch",
        )
    elif not stack.gpus:
        way_out = "See the driver line below; in a container start it with --gpus all"
        yield Check(TOPIC, "visible", "bad", f"torch cannot use the GPU: {stack.cuda_problem}", way_out)


def _kernels(stack: Stack) -> Iterator[Check]:
    """Whether torch was built for each GPU."""
    built = ", ".join(stack.architectures)
    for name, capability in dict.fromkeys(stack.gpus):
        if stack.architectures and not runs_on(capability, stack.architectures):
            fact = f"torch {stack.torch} has no kernels for {name}, sm_{capability[0]}{capability[1]}: it has {built}"
            yield Check(TOPIC, "kernels", "bad", fact, "Install a torch build that lists this architecture")


def runs_on(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """A cubin (sm_XY) runs on its major version from its minor on, PTX (compute_XY) on everything newer; suffixes (sm_90a) bind to one."""
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", architecture)
        if match is None:
            continue
        built = (int(match[2]), int(match[3]))
        if built == capability or (not match[4] and built <= capability and (match[1] == "compute" or built[0] == capability[0])):
            return True
    return False


def driver_check(driver: str, cuda: str | None, *, sees_gpu: bool) -> Check:
    """A driver against NVIDIA's least for torch's CUDA major version."""
    major = re.match(r"\d+", driver)
    if major is None:
        return Check(TOPIC, "driver", "unknown", f"{driver!r} is no version")
    have, least = int(major[0]), LEAST_DRIVER.get(int(cuda.split(".")[0])) if cuda else None
    if least is None:
        return Check(TOPIC, "driver", "ok", driver)
    if have >= least:
        return Check(TOPIC, "driver", "ok", f"{driver}; CUDA {cuda} needs {least} or newer")
    fact = f"{driver}; torch's CUDA {cuda} needs {least} or newer"
    if sees_gpu:
        return Check(
            TOPIC, "driver", "warn", f"{fact}; it works through NVIDIA's forward compatibility package", f"Update the driver to {least}"
        )
    older = max((major for major, floor in LEAST_DRIVER.items() if floor <= have), default=None)
    build = f", or install a torch build for CUDA {older}.x" if older else ""
    return Check(TOPIC, "driver", "bad", fact, f"Update the driver to {least} or newer{build}")
