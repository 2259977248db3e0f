"""compare_runs.py: several run folders side by side, as a table and as a page of curves laid over each other; or one run's report anew.

python scripts/compare_runs.py RUN RUN ... [--out=comparison.html]
python scripts/compare_runs.py RUN                # writes RUN/report.html again, with the evaluation made since
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script also runs from a checkout that is not installed

from surefoot import script  # noqa: E402
from surefoot.errors import UsageError  # noqa: E402
from surefoot.report import comparison, page, records  # noqa: E402
from surefoot.script import flag  # noqa: E402

USAGE = f"{__doc__}\nWhat differs in the runs' plans, their losses, speed, memory and scores."


@dataclass(frozen=True, kw_only=True)
class Flags:
    folders: tuple[str, ...] = flag((), "two run folders or more; of one, its report.html is written again", is_bare=True)
    out: str = flag("comparison.html", "the page")


def run(flags: Flags) -> None:
    """Compares the runs in the folders."""
    if not flags.folders:
        raise UsageError("name two run folders or more")
    runs = comparison.named_apart([records.read(Path(folder)) for folder in flags.folders])
    if len(runs) == 1:
        print(f"written: {page.write(runs[0].folder)}")
        return
    print(script.table([comparison.HEADS, *comparison.outcomes(runs)]))
    try:
        Path(flags.out).write_text(comparison.page(runs), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--out={flags.out} cannot be written: {error.strerror or error}") from None
    print(f"written: {flags.out}")


if __name__ == "__main__":
    sys.exit(script.main(Flags, USAGE, run))
