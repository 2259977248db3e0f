"""The host: memory, shared memory, and disk where a run writes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from surefoot.doctor.check import Check

TOPIC = "memory and disk"
GIB = 2**30
LEAST_SHM = 1.0  # GiB; Docker gives 64 MiB, where NCCL and DataLoader workers die of a bus error
LEAST_OUTPUT = 5.0  # GiB; a checkpoint of an 8B model's r=32 adapter, fp32 with its optimizer, takes 1.0
LEAST_MODELS = 20.0  # GiB; Llama-3.1-8B in bf16 takes 15
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def checks(output_dir: str, cache_dir: str, environment: Mapping[str, str]) -> Iterator[Check]:
    yield _memory()
    shared = shutil.disk_usage("/dev/shm").total / GIB if Path("/dev/shm").exists() else 0.0
    small = shared < LEAST_SHM
    way_out = "Give the container more: docker run --shm-size=8g, or an emptyDir of medium Memory at /dev/shm" if small else ""
    yield Check(TOPIC, "/dev/shm", "warn" if small else "ok", f"{shared:.1f} GiB", way_out)
    yield disk("--output_dir", Path(output_dir), LEAST_OUTPUT, "bad", "Choose another --output_dir")
    yield disk("surefoot cache", Path(cache_dir), 1.0, "warn", "Set SUREFOOT_CACHE to a folder that can be written")
    yield disk("Hugging Face cache", hub_cache(environment), LEAST_MODELS, "warn", "Set HF_HOME to a larger disk")


def _memory() -> Check:
    found = parse_meminfo(Path("/proc/meminfo").read_text())
    total, free = found["MemTotal"], found["MemAvailable"]
    limit = _cgroup_limit()
    fact = f"{total:.1f} GiB, {free:.1f} GiB available"
    return Check(TOPIC, "memory", "ok", f"{fact}; this container may use {limit:.1f} GiB" if limit and limit < total else fact)


def parse_meminfo(text: str) -> dict[str, float]:
    """/proc/meminfo in GiB."""
    return {match[1]: int(match[2]) / 2**20 for match in re.finditer(r"^(\w+): *(\d+) kB$", text, re.MULTILINE)}


def _cgroup_limit() -> float | None:
    """GiB that the container may use, None without a limit."""
    for path in CGROUP_LIMITS:
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        return int(text) / GIB if text.isdigit() else None
    return None


def hub_cache(environment: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps what it downloads."""
    if environment.get("HF_HUB_CACHE"):
        return Path(environment["HF_HUB_CACHE"])
    cache = environment.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(environment.get("HF_HOME") or f"{cache}/huggingface") / "hub"


def disk(name: str, folder: Path, least_gib: float, severe: str, way_out: str) -> Check:
    """Free space of the folder, or of the nearest that exists; severe is the verdict where it cannot be written."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        return Check(TOPIC, name, severe, f"{existing} is a file", way_out)
    if not os.access(existing, os.W_OK | os.X_OK):
        return Check(TOPIC, name, severe, f"{existing} cannot be written", way_out)
    free = shutil.disk_usage(existing).free / GIB
    fact = f"{free:.1f} GiB free at {folder.absolute()}"
    if free >= least_gib:
        return Check(TOPIC, name, "ok", fact)
    return Check(TOPIC, name, "warn", f"{fact}; {least_gib:g} GiB are advised", f"Make room there. {way_out}")
