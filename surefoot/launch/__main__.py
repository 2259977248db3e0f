"""python -m surefoot.launch WORLD [--option value ...] -- FLAGS OF finetune.py: checks the flags, shows what it will run, and runs it.

The processes of one machine are started by surefoot.launcher, which node.sh calls.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from surefoot import terminal
from surefoot.errors import SurefootError, UsageError
from surefoot.launch import command, manifests
from surefoot.launch.ask import OPTIONS, ROOT, WORLDS, Ask, parse
from surefoot.launch.check import check
from surefoot.launch.command import Command

RESTARTED = ("k8s", "sky")  # worlds that start the same command again; slurm.sbatch adds --resume itself when it is requeued
WARNED = OPTIONS["grace_s"].metadata["worlds"]
COMMANDS = {"local": command.local, "docker": command.docker, "slurm": command.slurm}


def completed(ask: Ask) -> Ask:
    """With the flags that a world and a stage add.

    Raises:
        UsageError: --overwrite where the command may be started again; --grace_s where the world has to know it too.
    """
    names = {word[2:].partition("=")[0].replace("-", "_") for word in ask.flags if word.startswith("--")}
    if "help" in names:
        raise UsageError("--help after -- is finetune.py's: `python finetune.py --help` shows its flags")
    if "overwrite" in names and ask.world in (*RESTARTED, "slurm"):
        raise UsageError(
            f"--overwrite under {ask.world} would remove the run's own checkpoints when it is started again. Choose a new --output_dir"
        )
    added = [] if ask.stage == 1 or "stage" in names else [f"--stage={ask.stage}"]
    if ask.world in WARNED:
        if "grace_s" in names:
            raise UsageError(f"--grace_s after -- is not what {ask.world} would keep to. Give it before --, for both")
        added.append(f"--grace_s={ask.grace_s}")
    added += ["--resume"] if ask.world in RESTARTED and not names & {"resume", "resume_from_checkpoint"} else []
    return dataclasses.replace(ask, flags=(*ask.flags, *added))


def document(ask: Ask) -> str:
    """The YAML that kubectl or sky takes."""
    return manifests.render(manifests.K8S[ask.kind](ask) if ask.world == "k8s" else manifests.sky(ask))


def handed_over(ask: Ask) -> Command:
    """What --submit starts; for k8s the document is its stdin."""
    if ask.world == "k8s":
        return Command(variables={}, words=("kubectl", "create", "--filename", "-"), stdin=document(ask))
    if ask.world == "sky":
        file = Path(tempfile.mkdtemp(prefix="surefoot-sky-"), f"{ask.name}.yaml")
        file.write_text(document(ask))
        return Command(variables={}, words=("sky", "jobs", "launch", "--yes", "--workdir", str(ROOT), str(file)))
    return COMMANDS[ask.world](ask)


def submit(ask: Ask) -> int:
    """Starts the client and returns its exit code.

    Raises:
        UsageError: there is no such client here.
    """
    client = {"slurm": "sbatch", "k8s": "kubectl", "sky": "sky", "docker": "docker"}.get(ask.world)
    if client and shutil.which(client) is None:
        raise UsageError(f"--submit needs {client}, which is not installed here. Nothing was submitted")
    job = handed_over(ask)
    environment = {**os.environ, **job.variables}
    return subprocess.run(job.words, env=environment, input=job.stdin or None, text=True).returncode


def shown(ask: Ask) -> str:
    return document(ask) if ask.world in RESTARTED else COMMANDS[ask.world](ask).text() + "\n"


def help_text() -> str:
    usage, _, meaning = str(__doc__).splitlines()[0].partition(": ")
    lines = [
        terminal.text(f"{usage}\n\n{meaning.capitalize()}"),
        "",
        f"worlds: {', '.join(WORLDS)}; docs/launch.md tells them apart",
        "",
        "options",
    ]
    for name, option in OPTIONS.items():
        worlds = option.metadata["worlds"]
        where = "" if len(worlds) == len(WORLDS) else f" ({', '.join(worlds)})"
        default = "" if option.default in (None, False) else f"={option.default}"
        lines += terminal.flag(f"--{name}{default}", f"{option.metadata['doc']}{where}")
    ends = "Exit codes: 0 shown or submitted; 2 a wrong option or flag; with --submit the client's own."
    return "\n".join([*lines, "", terminal.text(ends)])


def main(argv: Sequence[str]) -> int:
    before = argv[: argv.index("--")] if "--" in argv else argv
    if not argv or argv[0] == "help" or {"-h", "--help"} & set(before):
        print(help_text())
        return 0
    try:
        ask = completed(parse(argv))
        plan = check(ask)
        world = f"{ask.nodes} x {ask.processes} process(es) under profiles/{ask.profile}.yaml"
        print(f"checked: {world}, {plan.train.batch_size} rows a step", file=sys.stderr)
        if ask.nodes > 1 and ask.world in ("local", "docker"):
            print(f"for each node, with NODE_RANK=0 to {ask.nodes - 1} and MASTER_ADDR, the address of node 0, set there", file=sys.stderr)
        print(shown(ask), end="", flush=True)
        return submit(ask) if ask.submit else 0
    except SurefootError as error:
        print(f"surefoot.launch: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(terminal.piped(lambda: main(sys.argv[1:])))
