"""The Python packages against what surefoot asks for (its metadata) and against the tested set (scripts/dev.lock)."""

from __future__ import annotations

import configparser
import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from surefoot.doctor.check import Check

TOPIC = "packages"
ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = {"dev", "demo"}  # extras that no run needs
READERS = {
    "bitsandbytes": "--load_4bit, --load_8bit and 8-bit optimizers",
    "deepspeed": "DeepSpeed profiles",
    "unsloth": "--backend unsloth",
    "trl": "--backend unsloth",
    "liger-kernel": "Liger kernels",
}


class Need(NamedTuple):
    """A package that surefoot asks for; extra is empty for those of every run."""

    name: str
    requirement: Requirement
    extra: str


def needs() -> list[Need]:
    """From the installed metadata, or from setup.cfg in a checkout that is not installed."""
    try:
        lines = importlib.metadata.requires("surefoot") or []
    except importlib.metadata.PackageNotFoundError:
        lines = from_setup_cfg((ROOT / "setup.cfg").read_text())
    return parse_needs(lines)


def parse_needs(lines: list[str]) -> list[Need]:
    """Requirement lines to needs, one a package and extra; test and demo tools are left out."""
    found = []
    for line in lines:
        requirement = Requirement(line)
        match = re.search(r"extra *== *['\"]([\w.-]+)['\"]", str(requirement.marker or ""))
        extra = match[1] if match else ""
        if extra not in TOOLS:
            found.append(Need(canonicalize_name(requirement.name), requirement, extra))
    return found


def from_setup_cfg(text: str) -> list[str]:
    """The requirement lines that an installation of this setup.cfg would have in its metadata."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(text)
    lines = parser["options"]["install_requires"].split("\n")
    extras = parser["options.extras_require"] if parser.has_section("options.extras_require") else {}
    lines += [f'{line}; extra == "{name}"' for name, value in extras.items() for line in value.split("\n") if line.strip()]
    return [line.strip() for line in lines if line.strip()]


def parse_lock(text: str) -> dict[str, str]:
    """Package to version of a file of `name==version` lines."""
    pairs = (line.split("#")[0].strip().partition("==") for line in text.splitlines())
    return {canonicalize_name(name): version for name, equals, version in pairs if equals}


def tested() -> dict[str, str]:
    """The tested set; empty outside a checkout, since the lock is not shipped."""
    path = ROOT / "scripts/dev.lock"
    return parse_lock(path.read_text()) if path.exists() else {}


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def pip_line(*names: str) -> str:
    """The pip command for packages, in the ranges that surefoot asks for."""
    ranges = {need.name: f"{need.requirement.name}{need.requirement.specifier}" for need in needs()}
    return "pip install " + " ".join(f"'{ranges.get(name, name)}'" for name in names)


def checks() -> Iterator[Check]:
    """One a package; optional packages only where they are installed."""
    lock = tested()
    seen: set[tuple[str, str]] = set()
    for need in needs():
        version = installed(need.name)
        key = (need.name, str(need.requirement.specifier))
        if key not in seen and (version is not None or not need.extra):
            seen.add(key)
            yield judge(need, version, lock.get(need.name))


def judge(need: Need, version: str | None, tested_version: str | None) -> Check:
    """A package: missing or out of range is bad where every run needs it, a warning where only some flags do."""
    severe = "warn" if need.extra else "bad"
    wanted = str(need.requirement.specifier) or "any version"
    pip = f"pip install '{need.requirement.name}{need.requirement.specifier}'"
    if version is None:
        return Check(TOPIC, need.name, severe, f"not installed; surefoot needs {wanted}", pip)
    only = f" (for {READERS[need.name]})" if need.extra and need.name in READERS else ""
    try:
        parsed = Version(version)
    except InvalidVersion:
        return Check(TOPIC, need.name, "unknown", f"{version} is no version that can be compared; surefoot needs {wanted}{only}")
    if not need.requirement.specifier.contains(parsed, prereleases=True):
        return Check(TOPIC, need.name, severe, f"{version}; surefoot needs {wanted}{only}", pip)
    if tested_version is not None and parsed.public != Version(tested_version).public:
        pip = f"pip install '{need.requirement.name}=={tested_version}' for the tested set"
        return Check(TOPIC, need.name, "warn", f"{version}, within {wanted}; tested with {tested_version}{only}", pip)
    return Check(TOPIC, need.name, "ok", f"{version}, {'as tested' if tested_version else f'within {wanted}'}{only}")
