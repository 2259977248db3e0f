"""A conversation through the tokenizer's chat template, with the character span of each answer to train on."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jinja2

from surefoot.data.formats import Example, Turn
from surefoot.data.jinja_file import Spans, asked_with_context
from surefoot.errors import DataError

MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Templates that write today's date (Llama 3.2) would give other rows tomorrow; this is the date Llama 3.1's template falls back on.
FIXED_DATE = datetime.datetime(2024, 7, 26)


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """The tokenizer's template; `specials` are the texts of its special tokens."""

    tokenizer: Any
    source: str
    specials: tuple[str, ...]

    def render(self, example: Example) -> tuple[str, Spans]:
        """The text of the conversation, and the spans of its trained assistant turns with the token that ends each.

        Raises:
            DataError: the template refuses the row, or the answers cannot be found in what it writes.
        """
        messages = _messages(example)
        if MARKERS.search(self.source):
            text, spans = self._by_markers(example, messages)
            return text, self._with_ending(text, spans)
        return self._by_prefixes(example, messages)

    def _by_markers(self, example: Example, messages: list[dict[str, str]]) -> tuple[str, Spans]:
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, found = _guarded(
            example,
            lambda: render_jinja_template(
                [messages],
                chat_template=self.source,
                return_assistant_tokens_mask=True,
                strftime_now=FIXED_DATE.strftime,
                **self.tokenizer.special_tokens_map,
            ),
        )
        answers = [turn for turn in example.turns if turn.role == "assistant"]
        pairs = list(zip(answers, found[0], strict=False))
        if len(found[0]) != len(answers) or not all(turn.text.strip() in texts[0][start:end] for turn, (start, end) in pairs):
            raise DataError(
                f"{example.where}: the {{% generation %}} blocks of the tokenizer's chat template do not hold the row's {len(answers)} "
                "answers as they stand. Mend the template, or give --prompt_style another one"
            )
        return texts[0], tuple((start, end) for turn, (start, end) in pairs if turn.is_trained)

    def _by_prefixes(self, example: Example, messages: list[dict[str, str]]) -> tuple[str, Spans]:
        """Each answer stands between the rendering of all before it, with the assistant's header, and that which ends with it."""
        text = self._rendered(example, messages, asks=False)
        spans = []
        for index, turn in enumerate(example.turns):
            if turn.is_trained:
                before = self._rendered(example, messages[:index], asks=True)
                upto = text if index == len(messages) - 1 else self._rendered(example, messages[: index + 1], asks=False)
                self._check(example, turn, (before, upto, text))
                spans.append((len(before), self._end(text, len(before), len(upto))))
        return text, tuple(spans)

    def _rendered(self, example: Example, messages: list[dict[str, str]], *, asks: bool) -> str:
        options = {"tokenize": False, "add_generation_prompt": asks, "strftime_now": FIXED_DATE.strftime}
        return str(_guarded(example, lambda: self.tokenizer.apply_chat_template(messages, **options)))

    def _check(self, example: Example, turn: Turn, renderings: tuple[str, str, str]) -> None:
        before, upto, text = renderings
        if text.startswith(before) and text.startswith(upto) and turn.text.strip() in upto[len(before) :]:
            return
        raise DataError(
            f"{example.where}: the tokenizer's chat template writes a turn otherwise once more turns follow, or alters the answer "
            f"({turn.text.strip()[:40]!r}), so that its place cannot be known. Give the tokenizer a template with {{% generation %}} "
            "around each answer, make each answer a row of its own, or give --prompt_style a Jinja file"
        )

    def _end(self, text: str, start: int, end: int) -> int:
        """The span's end without the white space that the template writes after the turn's end token."""
        answer = text[start:end].rstrip()
        return start + len(answer) if answer.endswith(self.specials) else end

    def _with_ending(self, text: str, spans: Spans) -> Spans:
        """Spans with the turn's end token where the markers leave it out: the special token right after the last answer."""
        last = spans[-1][1]
        ending = next((token for token in self.specials if text.startswith(token, last)), None)
        return tuple((start, end + len(ending)) if ending and text.startswith(ending, end) else (start, end) for start, end in spans)


def load(tokenizer: Any) -> ChatTemplate | None:
    """The tokenizer's chat template, None where it has none."""
    if not tokenizer.chat_template:
        return None
    specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | set(tokenizer.all_special_tokens)
    longest_first = sorted(specials, key=lambda token: (-len(token), token))
    return ChatTemplate(tokenizer=tokenizer, source=tokenizer.get_chat_template(), specials=tuple(longest_first))


def _messages(example: Example) -> list[dict[str, str]]:
    texts = [asked_with_context(turn.text, example.context) if turn.role == "user" else turn.text for turn in example.turns]
    return [{"role": turn.role, "content": text} for turn, text in zip(example.turns, texts, strict=True)]


def _guarded(example: Example, render: Callable[[], Any]) -> Any:
    try:
        return render()
    except jinja2.TemplateError as error:
        raise DataError(
            f"{example.where}: the tokenizer's chat template refuses the row: {error.message}. "
            "Change the row, or give --prompt_style a Jinja file"
        ) from None
