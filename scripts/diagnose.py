"""diagnose.py: is this training command stable? Runs a few real steps of it and judges them, or compares two stages.

python scripts/diagnose.py FLAGS OF finetune.py [--steps N] [--keep FOLDER] [--json]
python scripts/diagnose.py FLAGS OF finetune.py --compare_stages 1 2 [--steps N] [--band X] [--keep FOLDER] [--json]
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script also runs from a checkout that is not installed

from surefoot import cli  # noqa: E402
from surefoot.diagnosis import diagnose, short_run, stability, text  # noqa: E402
from surefoot.errors import SurefootError, UsageError, joined  # noqa: E402
from surefoot.flag_values import bool_word  # noqa: E402

HELP = f"""\
{__doc__}
Runs the command's first steps with finetune.py in a process of its own and a folder of its own (--output_dir is not touched), with a
constant learning rate and no warm-up, and checks: exit code, losses finite and not 0.0, gradient norms finite (outside 0.1 to 10 is a
warning), loss falling. Then it says which --stage to use next, or which flags lead back. --compare_stages runs the same steps under two
stages and says whether the losses agree.

  --steps=N                 optimizer steps (10; {diagnose.COMPARED_STEPS} with --compare_stages)
  --compare_stages=1,2      the two stages, the first is the reference
  --band={stability.BAND:g}              agreement: mean |loss difference| by mean loss; {stability.OUTLIER} bands at most in any step
  --keep=FOLDER             keep the run folder(s) there; otherwise they lie under TMPDIR and are removed (--adapter_name=full writes a
                            whole model there)
  --json                    one JSON object on stdout instead of the report; finetune.py's own lines go to stderr either way

One process, one GPU: it refuses to run under accelerate launch. The flags of finetune.py: python finetune.py --help
Exit codes: 0 every check passed, or the stages agree; 4 a check failed, or they disagree; else finetune.py's own (2, 3, 5)."""


class Own(NamedTuple):
    """This script's own flags."""

    stages: tuple[int, ...] = ()
    steps: int | None = None
    band: float = stability.BAND
    keep: Path | None = None
    as_json: bool = False


def split(argv: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """This script's own flags with the words that follow each, and the words that are finetune.py's."""
    own: dict[str, list[str]] = {}
    rest: list[str] = []
    into = rest
    for word in argv:
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if word.startswith("--") and name in READERS:
            into = own[name] = [value] if equals else []
            continue
        if word.startswith("--"):
            into = rest
        into.append(word)
    return own, rest


def _stages(words: list[str]) -> tuple[int, ...] | None:
    found = " ".join(words).replace(",", " ").split()
    return tuple(map(int, found)) if len(set(found)) == len(found) == 2 and set(found) <= {"1", "2", "3"} else None


def _steps(words: list[str]) -> int | None:
    return int(words[0]) if len(words) == 1 and words[0].isdecimal() and int(words[0]) >= 2 else None


def _band(words: list[str]) -> float | None:
    try:
        value = float(" ".join(words))
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None


def _keep(words: list[str]) -> Path | None:
    return Path(words[0]) if len(words) == 1 and words[0] else None


def _json(words: list[str]) -> bool | None:
    return bool_word(words[0]) if len(words) == 1 else None if words else True


# flag -> (field of Own, its reader: None for words that break the rule, the rule)
READERS: dict[str, tuple[str, Any, str]] = {
    "compare_stages": ("stages", _stages, "two different stages out of 1, 2 and 3, such as 1,2"),
    "steps": ("steps", _steps, "a whole number of at least 2"),
    "band": ("band", _band, "a number above 0"),
    "keep": ("keep", _keep, "a folder"),
    "json": ("as_json", _json, "given bare, or True or False"),
}


def own_flags(given: dict[str, list[str]]) -> Own:
    """Raises UsageError: every wrong flag of this script's own."""
    values, problems = {}, []
    for name, words in given.items():
        field, reader, rule = READERS[name]
        values[field] = reader(words)
        if values[field] is None:
            problems.append(f"--{name}={' '.join(words)} must be {rule}")
    if "band" in given and "compare_stages" not in given:
        problems.append("--band has a meaning only with --compare_stages. Drop it, or say --compare_stages=1,2")
    if problems:
        raise UsageError(joined(problems))
    return Own(**values)


def run(argv: Sequence[str]) -> int:
    """Tests the command and prints what was found; returns the exit code."""
    given, words = split(argv)
    own = own_flags(given)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: the test runs one process of its own. Start it as python scripts/diagnose.py ..."
        )
    flags = short_run.flags_of(words)
    config = cli.parse(flags)
    diagnose.check_flags(config, compares=bool(own.stages), keep=own.keep)
    steps = own.steps or (diagnose.COMPARED_STEPS if own.stages else 10)
    with nullcontext(own.keep) if own.keep else tempfile.TemporaryDirectory(prefix="diagnose-") as folder:
        trial = short_run.Trial(
            config, flags, steps, Path(folder), own.keep is not None, say=lambda line: print(f"  | {line}", file=sys.stderr, flush=True)
        )
        print(text.heading(trial, own.stages), file=sys.stderr if own.as_json else sys.stdout, flush=True)
        report = diagnose.compare(trial, own.stages, own.band) if own.stages else diagnose.diagnose(trial)
    print(json.dumps(text.record(report, trial, own.stages), indent=2) if own.as_json else text.text(report, own.stages))
    return report.exit_code


def main() -> int:
    argv = sys.argv[1:]
    if not argv or any(word in cli.HELP for word in argv):
        print(HELP)
        return 0
    try:
        return run(argv)
    except SurefootError as error:
        print(f"diagnose.py: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
