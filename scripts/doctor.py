"""doctor.py: is this machine fit to train, at which stage, with which backends, and if not why?

python scripts/doctor.py [--output_dir FOLDER] [--json]
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script also runs from a checkout that is not installed

HELP = f"""\
{__doc__}
  --output_dir=FOLDER   where runs will write: its disk is looked at (.)
  --json                one JSON object on stdout and nothing else

Nothing is changed or downloaded. On a GPU the attention canary runs once for each set of versions (some 15 s); its answer is kept.
Exit codes: 0 fit (warnings may stand); 2 a wrong flag; 5 not fit, and each line marked bad says why."""
FLAGS = ("output_dir", "json", "help")


class Flags(NamedTuple):
    output_dir: str = "."
    as_json: bool = False
    wants_help: bool = False


def parse(argv: Sequence[str]) -> tuple[Flags, list[str]]:
    """The flags, and what is wrong with the words."""
    flags, problems, words = Flags(), [], list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if word in ("-h", "--help", "help"):
            flags = flags._replace(wants_help=True)
        elif word == "--json":
            flags = flags._replace(as_json=True)
        elif word.startswith("--") and name == "output_dir":
            value = value if equals else words.pop(0) if words and not words[0].startswith("--") else ""
            flags = flags._replace(output_dir=value)
            problems += [] if value else ["--output_dir needs a folder"]
        else:
            problems.append(_complaint(word, name, equals))
    return flags, problems


def _complaint(word: str, name: str, equals: str) -> str:
    if name in FLAGS and equals:
        return f"{word}: --{name} takes no value"
    close = difflib.get_close_matches(name, FLAGS, n=1)
    guess = f"did you mean --{close[0]}?" if close else f"there are {', '.join(f'--{flag}' for flag in FLAGS)}"
    return f"{word} is not a flag: {guess}" if word.startswith("-") else f"stray word {word!r}: flags begin with --"


def main() -> int:
    flags, problems = parse(sys.argv[1:])
    if flags.wants_help:
        print(HELP)
        return 0
    if problems:
        print(f"doctor.py: {'; '.join(problems)}", file=sys.stderr)
        return 2
    try:
        from surefoot.doctor import report
        from surefoot.doctor.attention import attention_rows
    except ModuleNotFoundError as error:
        if error.name != "packaging":
            raise
        print("doctor.py: the package packaging is not installed, so nothing else of surefoot's is. Use pip install -e .", file=sys.stderr)
        return 5
    say = silent if flags.as_json else say_on_stderr
    found = report.examine(flags.output_dir, attention_rows, say)
    print(json.dumps(report.record(found), indent=2) if flags.as_json else report.text(found))
    return found.exit_code


def say_on_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def silent(text: str) -> None:
    """--json prints nothing else."""


if __name__ == "__main__":
    sys.exit(main())
