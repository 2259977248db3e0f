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
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script also runs from a checkout that is not installed

from surefoot import cli, script  # noqa: E402
from surefoot.diagnosis import diagnose, short_run, stability, text  # noqa: E402
from surefoot.errors import UsageError, joined  # noqa: E402
from surefoot.script import flag  # noqa: E402

USAGE = f"""\
{__doc__}
Runs the command's first steps with finetune.py in a process of its own and a folder of its own (--output_dir is not touched), with a
constant learning rate and no warm-up, and checks: exit code, losses finite and not 0.0, gradient norms finite (outside 0.1 to 10 is a
warning), loss falling. Then it says which --stage to use next, or which flags lead back. --compare_stages runs the same steps under two
stages and says whether the losses agree.

One process, one GPU: it refuses to run under accelerate launch. The flags of finetune.py: python finetune.py --help
Exit codes: 0 every check passed, or the stages agree; 4 a check failed, or they disagree; else finetune.py's own (2, 3, 5)."""


@dataclass(frozen=True, kw_only=True)
class Own:
    """This script's own flags."""

    steps: int | None = flag(None, f"optimizer steps; default 10, {diagnose.COMPARED_STEPS} with --compare_stages", low=2)
    compare_stages: tuple[str, ...] | None = flag(None, "two stages, such as 1 2; the first is the reference", choices=("1", "2", "3"))
    band: float | None = flag(
        None,
        f"the stages agree: mean |loss difference| by mean loss; {stability.OUTLIER} bands at most in any step; default {stability.BAND:g}",
        low=1e-9,
    )
    keep: str | None = flag(
        None, "a folder to keep the runs in; else they lie under TMPDIR (--adapter_name=full: a whole model each) and go"
    )
    json: bool = flag(False, "one JSON object on stdout instead of the report; finetune.py's own lines go to stderr either way")


def _check(own: Own) -> tuple[int, ...]:
    """The stages to compare, () for none. Raises UsageError: flags that do not go together."""
    problems = []
    stages = tuple(map(int, own.compare_stages or ()))
    if stages and (len(stages) != 2 or stages[0] == stages[1]):
        problems.append(
            f"--compare_stages={' '.join(own.compare_stages or ())} must be two different stages out of 1, 2 and 3, such as 1,2"
        )
    if own.band and not stages:
        problems.append("--band has a meaning only with --compare_stages. Drop it, or say --compare_stages=1,2")
    if problems:
        raise UsageError(joined(problems))
    return stages


def run(own: Own, words: Sequence[str]) -> int:
    """Tests the command of finetune.py's `words` and prints what was found; returns the exit code."""
    stages, keep = _check(own), Path(own.keep) if own.keep else None
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: the test runs one process of its own. Start it as python scripts/diagnose.py ..."
        )
    flags = short_run.flags_of(words)
    config = cli.parse(flags)
    diagnose.check_flags(config, compares=bool(stages), keep=keep)
    steps = own.steps or (diagnose.COMPARED_STEPS if stages else 10)
    with nullcontext(keep) if keep else tempfile.TemporaryDirectory(prefix="diagnose-") as folder:
        trial = short_run.Trial(
            config, flags, steps, Path(folder), keep is not None, say=lambda line: print(f"  | {line}", file=sys.stderr, flush=True)
        )
        print(text.heading(trial, stages), file=sys.stderr if own.json else sys.stdout, flush=True)
        report = diagnose.compare(trial, stages, own.band or stability.BAND) if stages else diagnose.diagnose(trial)
    print(json.dumps(text.record(report, trial, stages), indent=2) if own.json else text.text(report, stages))
    return report.exit_code


if __name__ == "__main__":
    sys.exit(script.main(Own, USAGE, run, passes_on=True))
