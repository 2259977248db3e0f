"""An Example as the text the model reads, with the character spans of what it is trained to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from surefoot.config import PROMPT_STYLES
from surefoot.data import chat, jinja_file
from surefoot.data.chat import ChatTemplate
from surefoot.data.formats import Dropped, Example
from surefoot.data.jinja_file import JinjaFile, Spans, asked_with_context
from surefoot.errors import DataError, UsageError

_TASK = "Below is an instruction that describes a task"
_ASK = "Write a response that appropriately completes the request."
_PAIRED = ", paired with an input that provides further context"
_INDENT = " " * 16  # of the f-string's own source line, which the older recipes trained on

VERBATIM = ("prompt_completion", "input_target")


class Rendered(NamedTuple):
    """`text` with the `trained` spans (start, end) of its characters; is_whole when a chat template wrote it, BOS included."""

    text: str
    trained: Spans
    style: str
    is_whole: bool = False


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Renders rows in one style (auto: in the style that fits the row)."""

    style: str
    eos: str
    template: ChatTemplate | None
    file: JinjaFile | None

    @property
    def allows_unknown(self) -> bool:
        """True when the file marks its answers itself, so that rows need no known format."""
        return self.file is not None and self.file.has_markers

    def render(self, example: Example) -> Rendered | Dropped:
        """The whole text, EOS at its end, and its trained spans; Dropped where a Jinja file renders an empty answer.

        Raises:
            DataError: the style cannot hold the row.
        """
        if self.file is not None:
            text, spans = self.file.render(example)
            is_empty = not any(text[start:end].strip() for start, end in spans)
            return Dropped("an empty answer") if is_empty else self._ended(text, spans, self.style)
        if example.text is not None:
            return self._ended(example.text, ((0, len(example.text)),), "text")
        style = self._fitting(example) if self.style == "auto" else self.style
        if style == "chat":
            return self._chat(example)
        prompt, answer = prompt_text(example, style), example.turns[-1].text
        return self._ended(prompt + answer, ((len(prompt), len(prompt) + len(answer)),), style)

    def _fitting(self, example: Example) -> str:
        if example.format in VERBATIM:
            return "verbatim"
        if example.format == "alpaca" and example.is_single:
            return "alpaca"
        if self.template is None:
            way_out = "--prompt_style=alpaca, or a Jinja file" if example.is_single else "--prompt_style a Jinja file"
            raise DataError(
                f"{example.where}: a row of format {example.format} is a conversation, and the tokenizer has no chat template. "
                f"Give {way_out}, or take the tokenizer of an instruction-tuned model"
            )
        return "chat"

    def _chat(self, example: Example) -> Rendered:
        if self.template is None:
            raise UsageError("--prompt_style=chat: the tokenizer has no chat template. Give --prompt_style=alpaca or a Jinja file")
        text, spans = self.template.render(example)
        if text.rstrip().endswith(self.eos):
            return Rendered(text, spans, "chat", is_whole=True)
        # the white space after a turn's end token belongs to a next turn, and there is none
        text = text.rstrip() if text.rstrip().endswith(self.template.specials) else text
        return self._ended(text, spans, "chat")._replace(is_whole=True)

    def _ended(self, text: str, spans: Spans, style: str) -> Rendered:
        """With EOS at its end, trained. A text that ends with EOS gets no second one."""
        start, end = spans[-1]
        body = text.rstrip()
        if not body.endswith(self.eos):
            body = text + self.eos
        is_next = text[end:].strip() in ("", self.eos)
        last = ((start, len(body)),) if is_next else ((start, end), (len(body) - len(self.eos), len(body)))
        return Rendered(body, spans[:-1] + last, style)


def load(style: str, tokenizer: Any) -> Prompts:
    """The renderer of a style: auto, alpaca, alpaca_indented, chat, or the path of a Jinja file.

    Raises:
        UsageError: the file cannot be used. DataError: the tokenizer has no EOS.
    """
    if tokenizer.eos_token is None:
        raise DataError(
            "the tokenizer has no EOS token, so that the model would never learn to stop. Set eos_token in tokenizer_config.json"
        )
    file = None if style in PROMPT_STYLES else jinja_file.load(style)
    return Prompts(style=style, eos=tokenizer.eos_token, template=chat.load(tokenizer), file=file)


def prompt_text(example: Example, style: str) -> str:
    """What stands before the answer in the styles alpaca, alpaca_indented and verbatim.

    Raises:
        DataError: the row has a system turn or several answers, for which these styles have no place.
    """
    if not example.is_single:
        what = "a system turn" if example.system else f"{len(example.turns)} turns"
        raise DataError(f"{example.where}: --prompt_style={style} has no place for {what}. Give --prompt_style=chat or a Jinja file")
    asked, context = example.turns[0].text, example.context
    if style == "verbatim":
        return asked_with_context(asked, context)
    return (_indented if style == "alpaca_indented" else _alpaca)(asked, context)


def _alpaca(asked: str, context: str) -> str:
    """Stanford Alpaca's wording."""
    blocks = [f"{_TASK}{_PAIRED if context else ''}. {_ASK}", f"### Instruction:\n{asked}"]
    blocks += [f"### Input:\n{context}"] if context else []
    return "\n\n".join([*blocks, "### Response:\n"])


def _indented(asked: str, context: str) -> str:
    """The older recipes' white space, in which each line but the first begins with 16 spaces.

    Their first line ends with two spaces, with an input with one; so does NVlabs/DoRA's finetune.py, commit bd3ed6f.
    """
    first = f"{_TASK}{_PAIRED if context else ''}. {_ASK}" + (" " if context else "  ")
    lines = ["### Instruction:", asked, "", *(["### Input:", context, ""] if context else []), "### Response:", ""]
    return first + "\n\n" + "\n".join(_INDENT + line for line in lines)
