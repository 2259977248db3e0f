"""A row as a question to a trained model: the text before its answer, and the text with another answer in its place."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surefoot.data import loading
from surefoot.data.formats import Dropped, Example, Turn, normalise
from surefoot.data.loading import SourceRow
from surefoot.data.prompts import Prompts, Rendered
from surefoot.errors import DataError, UsageError

PLACE = "answer"  # stands for the answer in questions that have none; never part of a prompt


@dataclass(frozen=True, kw_only=True)
class Job:
    """A file of questions and where its answers go. note: the file beside `out` that says what made it."""

    rows: list[SourceRow]
    out: Path
    note: Path
    sha256: str
    questions: list[Example] = field(repr=False)


def read_job(asks: str, out: str) -> Job:
    """Reads and checks the questions before a model is loaded.

    Raises:
        UsageError: a file that is not there, or cannot be written. DataError: a row without a question.
    """
    if not Path(asks).is_file():
        raise UsageError(f"--input_file={asks} does not exist (looked in {Path.cwd()})")
    path = Path(out)
    if not path.parent.is_dir():
        raise UsageError(f"--output_file={out}: {path.parent} is no folder")
    try:
        rows = loading.read_rows((asks,), "test")
    except UsageError as error:
        raise UsageError(str(error).replace("--data_path=", "--input_file=")) from None
    note = path.with_suffix(".made_by.json")
    digest = hashlib.sha256(Path(asks).read_bytes()).hexdigest()
    return Job(rows=rows, out=path, note=note, sha256=digest, questions=[question(row) for row in rows])


def before_answer(prompts: Prompts, example: Example) -> Rendered:
    """The text up to the row's last answer, which the model is to continue.

    Raises:
        DataError: the prompt style cannot hold the row, or it is plain text.
    """
    rendered, start, _ = _placed(prompts, example)
    return Rendered(rendered.text[:start], (), rendered.style, rendered.is_whole)


def with_answer(prompts: Prompts, example: Example, answer: str) -> Rendered:
    """The text up to the end of `answer`, which takes the place of the row's last one.

    Raises:
        DataError: as before_answer(), or the prompt file marks its answers itself.
    """
    if prompts.allows_unknown:
        raise DataError(
            f"--prompt_style={prompts.style} marks its answers itself, so that no other can stand there. Use --scoring=generate"
        )
    turn = example.turns[-1]._replace(text=answer)
    rendered, _, end = _placed(prompts, dataclasses.replace(example, turns=(*example.turns[:-1], turn)))
    return Rendered(rendered.text[:end], (), rendered.style, rendered.is_whole)


def question(row: SourceRow) -> Example:
    """A row of messages, instruction (with input and system), user (with system), prompt or input; an answer in it is not read.

    Raises:
        DataError: the row has none of these.
    """
    columns = dict(row.columns)
    if isinstance(columns.get("messages"), list):
        said = [turn for turn in columns["messages"] if isinstance(turn, dict)]
        while said and said[-1].get("role") == "assistant":
            said.pop()
        columns = {**columns, "messages": [*said, {"role": "assistant", "content": PLACE}]}
    else:
        asked, answered = next(((a, b) for a, b in ASKED if columns.get(a) is not None), ("", ""))
        if not asked:
            names = ", ".join(map(str, columns)) or "(none)"
            raise DataError(f"{row.where}: no question: the row has columns {names}. Give prompt, instruction, user, messages or input")
        columns = {name: value for name, value in columns.items() if name in (asked, "input", "system")} | {answered: PLACE}
    example = normalise(SourceRow(columns, row.where), "text")
    if isinstance(example, Dropped):
        raise DataError(f"{row.where}: {example.reason}")
    return example


ASKED = (("instruction", "output"), ("user", "assistant"), ("prompt", "completion"), ("input", "target"))


def conversation(said: Sequence[tuple[str, str]], system: str = "") -> Example:
    """(role, text) pairs that end with the user's, as a row whose answer is still to come."""
    turns = [Turn("system", system, False)] if system else []
    turns += [Turn(role, text, False) for role, text in said]
    turns.append(Turn("assistant", PLACE, True))
    return Example(format="messages", where="the conversation", columns={}, turns=tuple(turns))


def _placed(prompts: Prompts, example: Example) -> tuple[Rendered, int, int]:
    """The whole text, and where the last answer's span begins and the answer itself ends."""
    if example.text is not None or (not example.turns and not prompts.allows_unknown):
        raise DataError(f"{example.where}: plain text has no question and answer; only --metrics=perplexity can be taken")
    turns = tuple(turn._replace(is_trained=False) for turn in example.turns[:-1]) + example.turns[-1:]
    rendered: Any = prompts.render(dataclasses.replace(example, turns=turns))
    if isinstance(rendered, Dropped):
        raise DataError(f"{example.where}: {rendered.reason}")
    answer = example.turns[-1].text.strip() if example.turns else ""
    starts = [start for start, end in rendered.trained if answer in rendered.text[start:end]]
    start = starts[-1] if starts else rendered.trained[-1][0]
    return rendered, start, rendered.text.index(answer, start) + len(answer)
