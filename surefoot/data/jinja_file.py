"""A prompt written by the user as a Jinja file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from surefoot.data.formats import Example
from surefoot.errors import DataError, UsageError

# Unicode noncharacters, kept for a program's own use: they mark where a {% generation %} block begins and ends.
OPEN, CLOSE = "\ufdd0", "\ufdd1"

Spans = tuple[tuple[int, int], ...]


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, as chat templates have it."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return OPEN + caller() + CLOSE


@dataclass(frozen=True, kw_only=True)
class JinjaFile:
    """A compiled prompt file. Without {% generation %} it renders the prompt, and the answer follows it."""

    path: str
    template: jinja2.Template
    has_markers: bool
    flag: str = "prompt_style"

    def render(self, example: Example) -> tuple[str, Spans]:
        """The whole text and the spans of its answers.

        Raises:
            DataError: the template uses a name the row does not have, or raises.
        """
        if not (example.turns or self.has_markers):
            raise DataError(
                f"{example.where}: --{self.flag}={self.path} renders a prompt, and a row of plain text has no answer to follow it. "
                "Put {% generation %} ... {% endgeneration %} around the answer in the file, or give --prompt_style=auto"
            )
        answer = example.turns[-1].text if example.turns else ""
        try:
            marked = self.template.render(_variables(example))
        except jinja2.TemplateError as error:
            raise DataError(
                f"{example.where}: --{self.flag}={self.path}: {error.message}. The row has columns {', '.join(map(str, example.columns))}"
            ) from None
        if not self.has_markers:
            return marked + answer, ((len(marked), len(marked) + len(answer)),)
        return _unmarked(marked, f"{example.where}: --{self.flag}={self.path}")


def load(path: str, flag: str = "prompt_style") -> JinjaFile:
    """The compiled file; errors name it as the value of `flag`.

    Raises:
        UsageError: it cannot be read, or is not valid Jinja.
    """
    # as in chat templates, the line break after a block tag is dropped ({% endif +%} keeps it); the one that ends the file is the prompt's
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, extensions=[_Generation], trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    try:
        source = Path(path).read_text(encoding="utf-8")
        tree = environment.parse(source)
        template = environment.from_string(source)
    except (OSError, UnicodeDecodeError) as error:
        others = "is neither auto, alpaca, alpaca_indented, chat, nor" if flag == "prompt_style" else "is not"
        raise UsageError(f"--{flag}={path} {others} a readable Jinja file: {error}") from None
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(f"--{flag}={path}:{error.lineno}: not valid Jinja: {error.message}") from None
    has_markers = any(map(_is_marker, tree.find_all(jinja2.nodes.CallBlock)))
    return JinjaFile(path=path, template=template, has_markers=has_markers, flag=flag)


def _is_marker(block: jinja2.nodes.CallBlock) -> bool:
    return isinstance(block.call.node, jinja2.nodes.ExtensionAttribute)


def _variables(example: Example) -> dict[str, Any]:
    """The row's own columns, which win, over what every row has."""
    asked = next((turn.text for turn in reversed(example.turns) if turn.role == "user"), "")
    ours = {
        "system": example.system,
        "instruction": asked,
        "input": example.context,
        "prompt": asked_with_context(asked, example.context),
        "messages": [{"role": turn.role, "content": turn.text} for turn in example.turns],
    }
    return ours | {str(name): "" if value is None else value for name, value in example.columns.items()}


def asked_with_context(asked: str, context: str) -> str:
    """alpaca's two columns as one text, for prompts that have one place for them."""
    return f"{asked}\n\n{context}" if context else asked


def _unmarked(marked: str, place: str) -> tuple[str, Spans]:
    pieces = marked.split(OPEN)
    text, spans = pieces[0], []
    for piece in pieces[1:]:
        answer, close, rest = piece.partition(CLOSE)
        if not close or CLOSE in rest:
            raise DataError(f"{place}: {{% generation %}} blocks must not stand inside each other")
        spans.append((len(text), len(text) + len(answer)))
        text += answer + rest
    if not spans:
        raise DataError(f"{place}: no {{% generation %}} block was rendered, so nothing would be trained on")
    return text, tuple(spans)
