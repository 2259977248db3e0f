"""Answers of an opened model: in a conversation as they are made, or to a file of questions that a stopped process goes on with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from surefoot import generate
from surefoot.data import asked
from surefoot.data.asked import Job
from surefoot.data.formats import Example, Turn
from surefoot.errors import DataError, UsageError
from surefoot.generate import Sampling
from surefoot.inference import Opened

HELP = "/reset forgets the conversation, /system TEXT sets the system turn, /history shows what the model reads, /exit ends"
CHUNK = 8  # batches that are answered longest first, then written in order


class Talk:
    """A conversation. A prompt style that holds one question only gets each question alone."""

    def __init__(self, opened: Opened, sampling: Sampling, system: str, seed: int) -> None:
        style = _talking_style(opened)
        self.opened = dataclasses.replace(opened, prompts=dataclasses.replace(opened.prompts, style=style))
        self.sampling, self.system = sampling, system_of(opened, system)
        self.said: list[tuple[str, str]] = []
        self.keeps_history = style == "chat" or opened.prompts.file is not None
        if self.system and not self.keeps_history:
            raise UsageError(
                f"--system: the prompt style {style} has no place for a system turn. Leave it out, or give --prompt_style=chat"
            )
        self.manner = f"prompts in the style {style}" + (
            "" if self.keeps_history else ": each question is asked alone, without what was said before"
        )
        torch.manual_seed(seed)

    def answer(self, text: str, *, streams: bool = False) -> str:
        """The model's answer, also printed as it comes. Of a conversation too long for the model the oldest turns are left out."""
        settled = self.said[:-1] if self.said and self.said[-1][0] == "user" else self.said  # without a question whose answer was stopped
        self.said = [*(settled if self.keeps_history else []), ("user", text)]
        while (ids := self._ids()) is None:
            self.said = self.said[2:]
        streamer = TextStreamer(self.opened.tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
        (made,) = generate.continued(self.opened.model, [ids], self.sampling, self.opened.end_ids(), streamer)
        reply = self.opened.decode(made)
        self.said.append(("assistant", reply))
        return reply

    def command(self, line: str) -> str:
        """Carries out a line that begins with / and says what it did."""
        name, _, rest = line.strip().partition(" ")
        if name == "/reset":
            self.said = []
            return "(a new conversation)"
        if name == "/system":
            if not self.keeps_history:
                return f"(the prompt style {self.opened.prompts.style} has no place for a system turn)"
            self.system, self.said = rest, []
            return "(a new conversation with this system turn)" if rest else "(a new conversation without a system turn)"
        if name == "/history":
            return str(self.opened.tokenizer.decode(self._ids() or [])) if self.said else "(nothing was said yet)"
        return HELP

    def _ids(self) -> list[int] | None:
        """What the model reads next; None where the conversation is too long for it and older turns can go."""
        said = self.said if self.said[-1][0] == "user" else self.said[:-1]
        try:
            return self.opened.prompt_ids([asked.conversation(said, self.system)], self.sampling.max_new_tokens)[0]
        except DataError:
            if len(said) > 2:
                return None
            self.said = []
            raise


def system_of(opened: Opened, given: str) -> str:
    """--system; auto: the turn that all training rows had, where the prompt style has a place for one."""
    if given != "auto":
        return given
    return opened.source.system if _talking_style(opened) == "chat" or opened.prompts.file is not None else ""


def _talking_style(opened: Opened) -> str:
    """auto goes by the row's columns, and a typed question has none: the chat template where there is one, else the bare text."""
    style = opened.prompts.style
    return style if style != "auto" else "chat" if opened.prompts.template else "verbatim"


def start(job: Job, opened: Opened, sampling: Sampling, settings: dict[str, Any]) -> int:
    """Makes the output ready and returns how many rows are left: whole lines that the same model and settings made stay.

    Raises:
        UsageError: the file holds answers of something else.
    """
    facts = {
        "input_sha256": job.sha256, "model": opened.source.identity(), "dtype": opened.dtype, "sampling": dataclasses.asdict(sampling),
        "settings": settings,
    }  # fmt: skip
    made_by = json.loads(json.dumps(facts))
    if job.out.exists():
        before = json.loads(job.note.read_text(encoding="utf-8")) if job.note.is_file() else {}
        changed = [name for name in made_by if before.get(name) != made_by[name]]
        if changed:
            raise UsageError(
                f"--output_file={job.out} exists and was not made by this command ({', '.join(changed)} differ). "
                "Remove it, or give another file"
            )
    job.note.write_text(json.dumps(made_by, indent=2) + "\n", encoding="utf-8")
    done = _whole_lines(job.out)
    return len(job.rows) - done


def _whole_lines(path: Path) -> int:
    """The number of whole lines; half a line at the end, of a process that was killed, is cut off."""
    if not path.exists():
        path.touch()
        return 0
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        path.write_bytes(whole)
    return whole.count(b"\n")


def answer_file(job: Job, opened: Opened, sampling: Sampling, settings: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Answers the rows that are left; after each chunk, once it is written, (rows, tokens) of it.

    A chunk's sampling is seeded by its first row, and chunks begin at fixed rows, so that a run in pieces says what one in a go says.

    Raises:
        DataError: the prompt style cannot hold a row.
    """
    size = settings["batch_size"] * CHUNK
    place = _whole_lines(job.out)
    while place < len(job.rows):
        first = place - place % size
        numbers = range(first, min(first + size, len(job.rows)))
        torch.manual_seed(settings["seed"] + first)
        asks = [_with_system(job.questions[number], settings["system"]) for number in numbers]
        ids = opened.prompt_ids(asks, sampling.max_new_tokens)
        made = generate.complete(opened.model, ids, sampling, opened.end_ids(), batch_size=settings["batch_size"])
        lines = [_line(opened, job.rows[number].where, tokens, sampling) for number, tokens in zip(numbers, made, strict=True)]
        with job.out.open("a", encoding="utf-8") as out:
            out.write("".join(lines[place - first :]))
        fresh = made[place - first :]
        place = numbers.stop
        yield len(fresh), sum(map(len, fresh))


def _line(opened: Opened, where: str, tokens: list[int], sampling: Sampling) -> str:
    ended = "length" if len(tokens) >= sampling.max_new_tokens else "end"
    return json.dumps({"where": where, "output": opened.decode(tokens), "tokens": len(tokens), "finish": ended}, ensure_ascii=False) + "\n"


def _with_system(example: Example, system: str) -> Example:
    """The row with --system as its system turn, if it has none of its own."""
    if not system or example.system:
        return example
    return dataclasses.replace(example, turns=(Turn("system", system, False), *example.turns))
