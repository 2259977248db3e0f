"""Ask: what the user wants launched, and the words of the command line it is read from."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surefoot.errors import UsageError, joined

ROOT = Path(__file__).resolve().parent.parent.parent
WORLDS = ("local", "docker", "slurm", "k8s", "sky")
KINDS = ("job", "jobset", "trainjob")
CONTAINERS = ("apptainer", "pyxis")
ALONE = ("single", "cpu")  # profiles of one process
NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")  # a DNS label that leaves room for Kubernetes' suffixes


def _option(default: Any, doc: str, worlds: Sequence[str] = WORLDS) -> Any:
    return field(default=default, metadata={"doc": doc, "worlds": worlds})


@dataclass(frozen=True, kw_only=True)
class Ask:
    """profile and image are None until settled(): they follow from the other fields."""

    world: str
    flags: tuple[str, ...] = ()
    nodes: int = _option(1, "machines")
    gpus: int = _option(1, "GPUs, and processes, of each node; 0: one process on a CPU")
    profile: str | None = _option(None, "a file of profiles/ without .yaml; default: single or cpu for one process, else ddp")
    stage: int = _option(1, "which image, and finetune.py's --stage")
    image: str | None = _option(None, "needed by k8s, sky and --container; docker: surefoot:stageN", ("docker", "slurm", "k8s", "sky"))
    container: str | None = _option(None, "apptainer or pyxis: what runs --image on the nodes; without it the checkout's own", ("slurm",))
    name: str = _option("surefoot", "of the job", ("slurm", "k8s", "sky"))
    grace_s: int = _option(180, "seconds between the warning and the kill", ("docker", "slurm", "k8s"))
    cpus: int = _option(8, "cores for each process", ("slurm", "k8s"))
    memory: int = _option(64, "GiB of memory for each process", ("slurm", "k8s"))
    time: str | None = _option(None, "time limit as sbatch takes it", ("slurm",))
    kind: str = _option("job", "job (Indexed Job), jobset or trainjob", ("k8s",))
    claim: str = _option("surefoot-runs", "PersistentVolumeClaim for /runs, where the run works", ("k8s",))
    accelerator: str = _option("H100", "GPU model", ("sky",))
    bucket: str | None = _option(None, "bucket mounted at /runs, where the run works", ("sky",))
    submit: bool = _option(False, "hand it over; without it nothing is started")

    @property
    def is_cpu(self) -> bool:
        return self.gpus == 0 or (self.profile or "").startswith("cpu")

    @property
    def processes(self) -> int:
        """Of each node."""
        return max(self.gpus, 1)


OPTIONS = {f.name: f for f in dataclasses.fields(Ask) if f.metadata}


def profiles() -> list[str]:
    return sorted(file.stem for file in (ROOT / "profiles").glob("*.yaml"))


def parse(argv: Sequence[str]) -> Ask:
    """WORLD [--option value ...] -- FLAGS OF finetune.py.

    Raises:
        UsageError: everything that is wrong before `--`, with the valid values.
    """
    before, after = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    world, words = (before[0], list(before[1:])) if before else ("", [])
    if world not in WORLDS:
        raise UsageError(f"{world or 'no world'!r} is no world. Use {', '.join(WORLDS)}")
    problems = [] if after else ["no flags for finetune.py: give them after --, as in `-- --base_model M --data_path F --output_dir O`"]
    values: dict[str, Any] = {}
    while words:
        word = words.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in OPTIONS or world not in OPTIONS[name].metadata["worlds"]:
            problems.append(_unknown(word, name, world))
            if not after:
                break  # the rest is finetune.py's, without the -- before it
            if word.startswith("--") and not equals and words and not words[0].startswith("--"):
                words.pop(0)
        elif name == "submit":
            values[name] = True
        elif not equals and (not words or words[0].startswith("--")):
            problems.append(f"--{name} needs a value")
        else:
            values[name] = text if equals else words.pop(0)
    problems += _wrong(values)
    problems += _missing(world, values)
    if problems:
        raise UsageError(joined(problems))
    return settled(Ask(world=world, flags=tuple(after), **values))


def settled(ask: Ask) -> Ask:
    """With its profile and image chosen.

    Raises:
        UsageError: a profile of one process for several.
    """
    alone = ask.nodes * ask.processes == 1
    profile = ask.profile or (("cpu" if ask.is_cpu else "single") if alone else "cpu_2proc" if ask.is_cpu else "ddp")
    if profile in ALONE and not alone:
        raise UsageError(
            f"--profile={profile} starts one process, not {ask.nodes} x {ask.processes}. "
            f"Leave --nodes and --gpus away, or use {', '.join(name for name in profiles() if name not in ALONE)}"
        )
    image = ask.image or (f"surefoot:stage{ask.stage}" if ask.world == "docker" else None)
    return dataclasses.replace(ask, profile=profile, image=image)


def _unknown(word: str, name: str, world: str) -> str:
    here = [option for option, f in OPTIONS.items() if world in f.metadata["worlds"]]
    if name in OPTIONS:
        return f"--{name} means nothing under {world}. There: {', '.join(f'--{option}' for option in here)}"
    close = difflib.get_close_matches(name, here, n=1)
    hint = f"Did you mean --{close[0]}?" if close else f"Options are {', '.join(f'--{option}' for option in here)}."
    return f"{word} is no option of surefoot.launch. {hint} Flags of finetune.py come after --"


def _missing(world: str, values: dict[str, Any]) -> list[str]:
    problems = []
    if world in ("k8s", "sky") and "image" not in values:
        problems.append(
            f"--image is missing: {world} pulls it from a registry. "
            "REPOSITORY=REGISTRY/surefoot docker/build.sh stage1 --push puts one there"
        )
    if world == "sky" and "bucket" not in values:
        problems.append("--bucket is missing: its name is taken for the whole world, so there is no default")
    if world == "slurm" and ("image" in values) != ("container" in values):
        given, other = ("image", "container") if "image" in values else ("container", "image")
        problems.append(f"--{given} needs --{other} under slurm: without both the nodes run this checkout and its Python")
    return problems


def _wrong(values: dict[str, Any]) -> list[str]:
    """Turns the numbers of `values` into int; what cannot be, and what is not among the valid values."""
    problems = []
    for name, lowest in (("nodes", 1), ("gpus", 0), ("stage", 1), ("grace_s", 1), ("cpus", 1), ("memory", 1)):
        text = str(values.get(name, lowest))
        if not text.isdecimal() or int(text) < lowest:
            problems.append(f"--{name}={text} must be a whole number from {lowest} on")
        elif name in values:
            values[name] = int(text)
    valid = {"stage": (1, 2, 3), "kind": KINDS, "container": CONTAINERS, "profile": profiles()}
    for name, choices in valid.items():
        if name in values and values[name] not in choices:
            problems.append(f"--{name}={values[name]} is none of {', '.join(map(str, choices))}")
    for name in ("name", "claim"):
        if name in values and not NAME.fullmatch(values[name]):
            problems.append(f"--{name}={values[name]!r} must be 1 to 40 lower-case letters, digits and hyphens, a letter first")
    return problems
