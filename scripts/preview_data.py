"""preview_data.py: the rows exactly as a training command will train on them. Loads the tokenizer and no model; needs no GPU.

python scripts/preview_data.py FLAGS OF finetune.py [--rows N] [--worst] [--html FILE]
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script also runs from a checkout that is not installed

from surefoot import cli, inputs, machine  # noqa: E402
from surefoot.config import FLAGS, Config  # noqa: E402
from surefoot.errors import SurefootError, UsageError, joined  # noqa: E402
from surefoot.plan import Plan, make_plan  # noqa: E402

if TYPE_CHECKING:
    from surefoot.data.preview import Piece, Shown

HELP = f"""\
{__doc__}
  --rows=N      how many (5); with --worst, how many for each reason
  --worst       the audit's worst rows in place of the first ones
  --html=FILE   also write a page with the audit's totals and the rows; FILE ends in .html

Trained text is green on a terminal and stands between \u27e6 and \u27e7 elsewhere; a dot is a space at the end of a line.
The flags of finetune.py: python finetune.py --help. Those that leave the rows alone are read and not judged; --output_dir is not touched.
Exit codes: 0 shown; 2 usage; 3 data, also when the rows are shown and the audit refuses them; 5 the tokenizer cannot be loaded."""

# flags beside the data's own that the rows or their batches depend on
ALSO = ("base_model", "local_dir", "revision", "trust_remote_code", "per_device_train_batch_size", "seed")
GREEN, BOLD, DIM, PLAIN = "\033[32m", "\033[1m", "\033[2m", "\033[0m"


class Own(NamedTuple):
    """This script's own flags."""

    rows: int = 5
    worst: bool = False
    html: Path | None = None


def split(argv: Sequence[str]) -> tuple[Own, list[str]]:
    """This script's own flags, and the words that are finetune.py's.

    Raises:
        UsageError: every wrong flag of this script's own.
    """
    own, rest, problems, words = Own(), [], [], list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in Own._fields:
            rest.append(word)
            continue
        if name != "worst" and not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else ""
        try:
            own = own._replace(**{name: READERS[name](value)})
        except ValueError as error:
            problems.append(f"--{name}={value} {error}")
    if problems:
        raise UsageError(joined(problems))
    return own, rest


def _rows(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ValueError("must be a whole number of at least 1")
    return int(text)


def _worst(text: str) -> bool:
    if text.lower() not in ("", "true", "false"):
        raise ValueError("must be given bare, or True or False")
    return text.lower() != "false"


def _html(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError("must end in .html")
    if not path.parent.is_dir():
        raise ValueError(f"cannot be written: {path.parent} is no folder")
    return path


READERS: dict[str, Any] = {"rows": _rows, "worst": _worst, "html": _html}


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


def run(argv: Sequence[str]) -> None:
    """Shows the rows.

    Raises:
        SurefootError: as finetune.py does before it loads a model; AuditError after the rows are shown.
    """
    own, words = split(argv)
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
    if own.html:
        _write(own.html, page.page(data.report, data.audit, shown))
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


def main() -> int:
    argv = sys.argv[1:]
    if not argv or any(word in cli.HELP for word in argv):
        print(HELP)
        return 0
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal that cannot write what a row holds
    try:
        run(argv)
    except SurefootError as error:
        print(f"preview_data.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
