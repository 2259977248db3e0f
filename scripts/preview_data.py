"""preview_data.py: the rows exactly as a training command will train on them. Loads the tokenizer and no model; needs no GPU.

python scripts/preview_data.py FLAGS OF finetune.py [--rows N] [--worst] [--html FILE]
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script also runs from a checkout that is not installed

from surefoot import cli, inputs, machine, script  # noqa: E402
from surefoot.config import FLAGS, Config  # noqa: E402
from surefoot.errors import UsageError  # noqa: E402
from surefoot.plan import Plan, make_plan  # noqa: E402
from surefoot.script import flag  # noqa: E402

if TYPE_CHECKING:
    from surefoot.data.preview import Piece, Shown

USAGE = f"""\
{__doc__}
Trained text is green on a terminal and stands between \u27e6 and \u27e7 elsewhere; a dot is a space at the end of a line.
The flags of finetune.py: python finetune.py --help. Those that leave the rows alone are read and not judged; --output_dir is not touched.
Exit codes: 0 shown; 2 usage; 3 data, also when the rows are shown and the audit refuses them; 5 the tokenizer cannot be loaded."""

# flags beside the data's own that the rows or their batches depend on
ALSO = ("base_model", "local_dir", "revision", "trust_remote_code", "per_device_train_batch_size", "seed")
GREEN, BOLD, DIM, PLAIN = "\033[32m", "\033[1m", "\033[2m", "\033[0m"


@dataclass(frozen=True, kw_only=True)
class Own:
    """This script's own flags."""

    rows: int = flag(5, "how many; with --worst, how many for each reason", low=1)
    worst: bool = flag(False, "the audit's worst rows in place of the first ones")
    html: str | None = flag(None, "also write a page with the audit's totals and the rows; the file ends in .html")


def _html(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--html={text} must end in .html")
    if not path.parent.is_dir():
        raise UsageError(f"--html={text} cannot be written: {path.parent} is no folder")
    return path


def plan_of(words: Sequence[str]) -> Plan:
    """The plan of the flags that concern rows: those that need a GPU or a run folder do not stand in the way of a look at the rows.

    Raises:
        UsageError: a wrong flag of finetune.py. PlanError: a path that does not exist.
    """
    import fire

    flags: dict[str, Any] = {}
    fire.Fire(lambda **given: flags.update(given), command=cli.tidy(words), serialize=lambda _: None)
    config = cli.parse(flags)
    kept = {
        name: getattr(config, name) for name in FLAGS if config.given(name) and (FLAGS[name].metadata["group"] == "data" or name in ALSO)
    }
    nowhere = Path(tempfile.gettempdir()) / f"preview-{os.getpid()}"
    rows = Config.parse({**kept, "output_dir": str(nowhere), "batch_size": config.per_device_train_batch_size, "report_to": "none"})
    return make_plan(rows, machine.probe(), inputs.inspect(rows))


def run(own: Own, words: Sequence[str]) -> None:
    """Shows the rows; `words` are finetune.py's.

    Raises:
        SurefootError: as finetune.py does before it loads a model; AuditError after the rows are shown.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal that cannot write what a row holds
    page_file = _html(own.html) if own.html else None
    plan = plan_of(words)
    from surefoot import tokens
    from surefoot.backends import hf
    from surefoot.data import page, prepare, preview
    from surefoot.data.rows import Collator

    tokenizer = hf.load_tokenizer(plan.model)
    collator = Collator(pad_token_id=tokens.settle(tokenizer).token_id)
    data = prepare.load(plan.data, tokenizer, shows_progress=True)
    if plan.data.audit == "warn":
        data = prepare.judged(data, "warn")
    if own.worst:
        shown = preview.worst_rows(data, collator, tokenizer, own.rows)
    else:
        shown = preview.first_rows(data, collator, tokenizer, own.rows, plan.train.per_device_train_batch_size)
    print("\n".join(data.report.lines()))
    print("\n".join(_row(row) for row in shown) or "\nthe audit found nothing, so no row is the worst")
    if page_file:
        _write(page_file, page.page(data.report, data.audit, shown))
    prepare.judged(data, plan.data.audit)


def _row(row: Shown) -> str:
    """On a terminal in colours, which NO_COLOR turns off."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        return f"\n{BOLD}{row.title}{PLAIN}\n" + "".join(map(_styled, row.pieces))
    runs = groupby(row.pieces, key=lambda piece: piece.kind)
    return f"\n{row.title}\n" + "".join(_bracketed(kind, "".join(piece.text for piece in pieces)) for kind, pieces in runs)


def _styled(piece: Piece) -> str:
    style = BOLD * piece.is_special + {"trained": GREEN, "read": ""}.get(piece.kind, DIM)
    return f"{style}{piece.text}{PLAIN}" if style else piece.text


def _bracketed(kind: str, text: str) -> str:
    opening, closing = {"trained": ("\u27e6", "\u27e7"), "padding": (" [", "]")}.get(kind, ("", ""))
    return opening + text + closing


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--html={path} cannot be written: {error.strerror or error}") from None
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    sys.exit(script.main(Own, USAGE, run, passes_on=True))
