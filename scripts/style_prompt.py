"""style_prompt.py: one style for every answer, written into the system prompt of each row.

python scripts/style_prompt.py --style="Answer concisely in 2 lines." [--in FOLDER] [--out FOLDER]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script also runs from a checkout that is not installed

from surefoot import script  # noqa: E402
from surefoot.data import stage  # noqa: E402
from surefoot.data.loading import SourceRow  # noqa: E402
from surefoot.errors import DataError, UsageError  # noqa: E402
from surefoot.script import REQUIRED, flag  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Flags:
    style: str = flag(REQUIRED, 'what the answers shall be like, such as "Answer concisely in 2 lines."; or the first word', is_bare=True)
    in_: str = flag("data/processed", "the folder of train.jsonl, val.jsonl and test.jsonl")
    out: str = flag("data/processed_with_style", "the folder of the styled splits; made when needed")
    mode: str = flag("prepend", "prepend the style to the row's own system prompt, or replace it", choices=("prepend", "replace"))


def run(flags: Flags) -> None:
    """Styles every row of the splits that process_data.py made."""
    if not flags.style.strip():
        raise UsageError("--style is empty. Say what the answers shall be like")
    counts = stage.rewrite(stage.split_files(flags.in_, "in"), Path(flags.out), lambda row: styled(row, flags.style, flags.mode), "styling")
    print("\n".join(f"written: {path}, {rows:,} rows" for path, rows in counts.items()))


def styled(row: SourceRow, style: str, mode: str) -> dict[str, Any]:
    """The chat row with the style in its system turn, a line above what was there.

    Raises:
        DataError: the row is plain text, or nothing that process_data.py writes.
    """
    columns = row.columns
    if "messages" in columns:
        turns = columns["messages"]
        own, rest = (turns[0]["content"], turns[1:]) if turns[0]["role"] == "system" else ("", turns)
        return {"messages": [{"role": "system", "content": _joined(style, own, mode)}, *rest]}
    if "user" not in columns:
        raise DataError(f"{row.where}: a row of {', '.join(columns)} has no system prompt. Style only questions and answers")
    return {**columns, "system": _joined(style, columns.get("system") or "", mode)}


def _joined(style: str, own: str, mode: str) -> str:
    return f"{style}\n{own}" if own and mode == "prepend" else style


if __name__ == "__main__":
    sys.exit(script.main(Flags, __doc__, run))
