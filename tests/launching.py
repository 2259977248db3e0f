"""What the tests of launch/ share: words that shells, YAML and the kubelet like to change, and programs that only write down what they got."""

from __future__ import annotations

import random
import re
import stat
from pathlib import Path

NASTY = (
    "a b",
    "$HOME",
    "$(id)",
    "$$",
    "`id`",
    "it's",
    '"',
    "\\",
    "two\nlines\n",
    "*",
    "~",
    "{task",
    "#x",
    "yes",
    "1e3",
    "",
    "é\t",
    "!",
    "&&",
    "%j",
    ": -",
    "$(NODES)",
)


def words(seed: int, count: int = 12) -> list[str]:
    """`--run_name=VALUE` words whose values are joined from NASTY, the same for the same seed."""
    chooser = random.Random(seed)
    return [f"--run_name={''.join(chooser.choices(NASTY, k=chooser.randint(1, 4)))}" for _ in range(count)]


def recorder(folder: Path, name: str) -> Path:
    """A program `folder/name` that writes its words, each ended by a NUL, to `folder/name.words`; `recorded()` reads them."""
    program = folder / name
    program.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" >"{folder}/{name}.words"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def recorded(folder: Path, name: str) -> list[str]:
    return (folder / f"{name}.words").read_text().split("\0")[:-1]


def kubelet(word: str) -> str:
    """What a container gets of a word in `args`: $$ is $, and $(NAME) the value of a variable that the pod sets (here: GONE)."""
    return re.sub(r"\$(\$|\((NODES|GPUS|PROFILE|HOME)\))", lambda found: "$" if found[1] == "$" else "GONE", word)
