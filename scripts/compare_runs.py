"""compare_runs.py: several run folders side by side, as a table and as a page of curves laid over each other; or one run's report anew.

python scripts/compare_runs.py RUN RUN ... [--out=comparison.html]
python scripts/compare_runs.py RUN                # writes RUN/report.html again, with the evaluation made since
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script also runs from a checkout that is not installed

from surefoot import command  # noqa: E402
from surefoot.errors import UsageError  # noqa: E402
from surefoot.report import comparison, page, records  # noqa: E402


def compare_runs(*folders: str, out: str = "comparison.html") -> None:
    """Compares the runs in the folders: what differs in their plans, losses, speed, memory and scores.

    Args:
        folders: two run folders or more; of one, its report.html is written again.
        out: the page.
    """
    if not folders:
        raise UsageError("name two run folders or more")
    runs = comparison.named_apart([records.read(Path(folder)) for folder in folders])
    if len(runs) == 1:
        print(f"written: {page.write(runs[0].folder)}")
        return
    rows = [list(comparison.HEADS), *comparison.outcomes(runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print("\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows))
    try:
        Path(out).write_text(comparison.page(runs), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--out={out} cannot be written: {error.strerror or error}") from None
    print(f"written: {out}")


if __name__ == "__main__":
    sys.exit(command.run(compare_runs))
