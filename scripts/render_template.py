"""render_template.py: chat rows to {input, target} through a Jinja file, so that what is trained on stands in the data."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script also runs from a checkout that is not installed

from surefoot import run_file, script  # noqa: E402
from surefoot.data import formats, jinja_file, stage  # noqa: E402
from surefoot.data.formats import Dropped  # noqa: E402
from surefoot.data.jinja_file import JinjaFile  # noqa: E402
from surefoot.data.loading import SourceRow  # noqa: E402
from surefoot.errors import DataError, UsageError  # noqa: E402
from surefoot.script import flag  # noqa: E402

PROCESSED, STYLED, RENDERED = "processed", "processed_with_style", "rendered"
CHATML = ROOT / "configs/chatml.jinja"
USAGE = f"""\
{__doc__}

python scripts/render_template.py [--data data] [--template FILE.jinja]

Every row of the splits becomes {{input, target}}: the prompt and the answer, trained on as they stand, with EOS after the answer."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    in_: str = flag("", "the folder of the splits; default: processed_with_style in the folder --data where it exists, else processed")
    out: str = flag("", "the folder of the rendered splits, made when needed; default: rendered in --data")
    template: str = flag(
        "", "a Jinja file with the names system, instruction, prompt and messages; default: the run file's, else configs/chatml.jinja"
    )
    config: str = flag("", "a run file (YAML), of which data.template_path is read")
    data: str = flag("data", "the folder of the pipeline's stages")


def run(flags: Flags) -> None:
    """Renders every row of the splits."""
    folder = flags.in_ or _newest_stage(flags.data)
    path = flags.template or (run_file.dotted(flags.config).get("data.template_path") if flags.config else None) or str(CHATML)
    renderer = Renderer(jinja_file.load(path, "template"))
    counts = stage.rewrite(stage.split_files(folder, "in"), Path(flags.out or f"{flags.data}/{RENDERED}"), renderer, "rendering")
    print(f"read: {folder}; template {path}")
    if renderer.earlier_answers:
        print(f"{renderer.earlier_answers:,} earlier answers of conversations are input here, not trained on; {folder} trains on them")
    print("\n".join(f"written: {path}, {rows:,} rows" for path, rows in counts.items()))


def _newest_stage(data: str) -> str:
    """Raises UsageError: the styled rows are older than the rows they were made of."""
    processed, styled = f"{data}/{PROCESSED}", f"{data}/{STYLED}"
    if not Path(styled, "train.jsonl").is_file():
        return processed
    first = Path(processed, "train.jsonl")
    if first.is_file() and Path(styled, "train.jsonl").stat().st_mtime < first.stat().st_mtime:
        raise UsageError(f"{styled} is older than {processed}. Style again (make style), or say --in={processed} or --in={styled}")
    return styled


class Renderer:
    """Rows to {input, target}; counts the answers before the last one."""

    def __init__(self, file: JinjaFile) -> None:
        self.file, self.earlier_answers = file, 0

    def __call__(self, row: SourceRow) -> dict[str, str]:
        """Raises DataError: no question and answer, or text after the answer, which {input, target} cannot hold."""
        example = formats.normalise(row, "text")
        if isinstance(example, Dropped) or not example.turns:
            what = example.reason if isinstance(example, Dropped) else "plain text"
            raise DataError(f"{row.where}: {what}, which has no prompt and answer to render")
        text, spans = self.file.render(example)
        start, end = spans[-1]
        if text[end:].strip():
            raise DataError(f"{row.where}: --template={self.file.path} writes text after the answer. Put it into the generation block")
        self.earlier_answers += sum(turn.is_trained for turn in example.turns) - 1
        return {"input": text[:start], "target": text[start:end]}


if __name__ == "__main__":
    sys.exit(script.main(Flags, USAGE, run))
