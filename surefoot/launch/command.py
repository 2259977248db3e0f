"""Command: a process with its variables, shown as a line for a shell and started as its words, so that the two cannot differ."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from surefoot.launch.ask import ROOT, Ask


@dataclass(frozen=True, kw_only=True)
class Command:
    variables: Mapping[str, str]
    words: tuple[str, ...]
    stdin: str = ""

    def text(self) -> str:
        """The line that does the same in a POSIX shell, whatever the values hold."""
        return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in self.variables.items()), shlex.join(self.words)])


def local(ask: Ask) -> Command:
    return Command(variables=_node(ask), words=(str(ROOT / "launch/node.sh"), *ask.flags))


def docker(ask: Ask) -> Command:
    variables = {"IMAGE": str(ask.image), "STAGE": str(ask.stage), "GRACE_S": str(ask.grace_s), **_node(ask), "GPUS": str(ask.gpus)}
    return Command(variables=variables, words=(str(ROOT / "launch/docker.sh"), *ask.flags))


def slurm(ask: Ask) -> Command:
    """Partition, account and the like come from sbatch's own variables (SBATCH_PARTITION, SBATCH_ACCOUNT)."""
    options = [f"--job-name={ask.name}", f"--nodes={ask.nodes}", f"--signal=B:USR1@{ask.grace_s}"]
    options += [] if ask.is_cpu else [f"--gpus-per-node={ask.gpus}"]
    options += [f"--cpus-per-task={ask.cpus * ask.processes}", f"--mem={ask.memory * ask.processes}G"]
    options += [f"--time={ask.time}"] if ask.time else []
    variables = {"SUREFOOT": str(ROOT), "PROFILE": str(ask.profile), "GPUS": str(ask.processes)}
    variables |= {"CONTAINER": ask.container, "IMAGE": str(ask.image)} if ask.container else {}
    return Command(variables=variables, words=("sbatch", *options, str(ROOT / "launch/slurm.sbatch"), *ask.flags))


def _node(ask: Ask) -> dict[str, str]:
    """node.sh's variables; NODE_RANK and MASTER_ADDR of several nodes are given by hand on each."""
    return {"NODES": str(ask.nodes), "GPUS": str(ask.processes), "PROFILE": str(ask.profile)}
