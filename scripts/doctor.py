"""doctor.py: is this machine fit to train, at which stage, with which backends, and if not why?

python scripts/doctor.py [--output_dir FOLDER] [--json]
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script also runs from a checkout that is not installed

from surefoot import script, terminal  # noqa: E402
from surefoot.errors import UsageError  # noqa: E402
from surefoot.script import flag  # noqa: E402

USAGE = f"""\
{__doc__}
Nothing is changed or downloaded. On a GPU the attention canary runs once for each set of versions (some 15 s); its answer is kept.
Exit codes: 0 fit (warnings may stand); 2 a wrong flag; 5 not fit, and each line marked bad says why."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    output_dir: str = flag(".", "where runs will write: its disk is looked at")
    json: bool = flag(False, "one JSON object on stdout and nothing else")


def main() -> int:
    """Not script.main(): the doctor also runs where Fire, as all else, is missing."""
    if any(word in script.HELP for word in sys.argv[1:]):
        print(f"{terminal.text(USAGE)}\n\n{script.help_text(Flags)}")
        return 0
    try:
        flags = script.parse(Flags, sys.argv[1:])
    except UsageError as error:
        print(f"doctor.py: {error}", file=sys.stderr)
        return error.exit_code
    try:
        from surefoot.doctor import report
        from surefoot.doctor.attention import attention_rows
    except ModuleNotFoundError as error:
        if error.name != "packaging":
            raise
        print("doctor.py: the package packaging is not installed, so nothing else of surefoot's is. Use pip install -e .", file=sys.stderr)
        return 5
    say = silent if flags.json else say_on_stderr
    found = report.examine(flags.output_dir, attention_rows, say)
    print(json.dumps(report.record(found), indent=2) if flags.json else report.text(found))
    return found.exit_code


def say_on_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def silent(text: str) -> None:
    """--json prints nothing else."""


if __name__ == "__main__":
    sys.exit(terminal.piped(main))
