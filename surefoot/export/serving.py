"""How to serve an export: SERVING.md with a vLLM line, and an Ollama Modelfile whose TEMPLATE says what the model was trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from surefoot.data.formats import Example, Turn
from surefoot.data.prompts import prompt_text
from surefoot.export import carry

UNMERGED = (
    "DoRA adapters cannot be served unmerged by vLLM or llama.cpp (their LoRA loaders know no magnitude vector): serve this merged model"
)
JINJA = "chat_template_{style}.jinja"


class Pieces(NamedTuple):
    """A conversation as fixed text around what is said; the pieces of a template that writes each turn by itself."""

    start: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]


def style_of(record: dict[str, Any]) -> str:
    """The style that most training rows were rendered in (run.json): chat, alpaca, alpaca_indented, ...; "" where not known."""
    styles = record.get("data", {}).get("styles") or {}
    return str(max(styles, key=lambda name: styles[name])) if styles else ""


def pieces(tokenizer: Any, style: str) -> Pieces | None:
    """The model's prompt as pieces; None where it cannot be written so, such as templates that treat turns differently by place."""
    if style in ("alpaca", "alpaca_indented"):
        example = Example(format="alpaca", where="serving", columns={}, turns=(Turn("user", "\0", False), Turn("assistant", "", True)))
        before, after = prompt_text(example, style).split("\0")
        return Pieces("", None, (before, after), ("", tokenizer.eos_token or ""))
    if not tokenizer.chat_template or style not in ("", "chat"):
        return None
    return _of_template(tokenizer)


def _of_template(tokenizer: Any) -> Pieces | None:
    """Found by marks in place of what is said, and checked on a longer conversation."""
    import jinja2

    def rendered(*turns: tuple[str, str], asks: bool = False) -> str:
        messages = [{"role": role, "content": text} for role, text in turns]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))

    try:
        alone = rendered(("user", "\1U\2"))
        asked = rendered(("user", "\1U\2"), asks=True)
        answered = rendered(("user", "\1U\2"), ("assistant", "\1A\2"))
        twice = rendered(("user", "\1U\2"), ("assistant", "\1A\2"), ("user", "\1V\2"), asks=True)
    except (jinja2.TemplateError, ValueError):
        return None
    try:
        with_system = rendered(("system", "\1S\2"), ("user", "\1U\2"))
    except (jinja2.TemplateError, ValueError):
        with_system = ""
    return _checked(alone, asked, answered, twice, with_system)


def _checked(alone: str, asked: str, answered: str, twice: str, with_system: str) -> Pieces | None:
    if not (asked.startswith(alone) and answered.startswith(asked) and alone.count("\1U\2") == 1 and answered.count("\1A\2") == 1):
        return None
    before, after = alone.split("\1U\2")
    header = asked[len(alone) :]
    ending = answered[len(asked) :].partition("\1A\2")[2]
    second = twice.removeprefix(answered).partition("\1V\2")[0]
    if not before.endswith(second) or twice != f"{answered}{second}\1V\2{after}{header}":
        return None
    start = before.removesuffix(second)
    system = None
    if with_system.startswith(start) and with_system.endswith(f"{second}\1U\2{after}") and with_system.count("\1S\2") == 1:
        middle = with_system.removeprefix(start).removesuffix(f"{second}\1U\2{after}")
        opening, _, closing = middle.partition("\1S\2")
        system = (opening, closing)
    return Pieces(start, system, (second, after + header), ("", ending))


def modelfile(weights: str, found: Pieces, tokenizer: Any, *, adds_bos: bool) -> str:
    """Ollama's Modelfile. llama.cpp adds BOS itself where the GGUF says so, and a second one would be a turn the model never saw."""
    start = found.start
    if adds_bos and tokenizer.bos_token and start.startswith(tokenizer.bos_token):
        start = start.removeprefix(tokenizer.bos_token)
    system = "" if found.system is None else f"{{{{ if .System }}}}{found.system[0]}{{{{ .System }}}}{found.system[1]}{{{{ end }}}}"
    template = f"{start}{system}{found.user[0]}{{{{ .Prompt }}}}{found.user[1]}{{{{ .Response }}}}{found.assistant[1]}"
    stops = "".join(f'PARAMETER stop "{token}"\n' for token in stop_tokens(tokenizer, found))
    return f'FROM {weights}\nTEMPLATE """{template}"""\n{stops}'


def stop_tokens(tokenizer: Any, found: Pieces | None) -> list[str]:
    """EOS, and the special token that ends an answer in the template."""
    ending = (found.assistant[1] if found else "").strip()
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special and ending.startswith(token.content)]
    return list(dict.fromkeys([*tokens, *([tokenizer.eos_token] if tokenizer.eos_token else [])]))


def jinja(found: Pieces) -> str:
    """A chat template for a style without one of its own, of a single question, which is all that the style has a place for."""
    return (
        "{% for message in messages if message['role'] == 'user' and loop.last %}"
        f"{{{{ {found.user[0]!r} + message['content'] + {found.user[1]!r} }}}}" + "{% endfor %}"
    )


def write(
    folder: Path,
    out: Path,
    record: dict[str, Any],
    say: Callable[[str], object],
    *,
    gguf: str | None = None,
    tokenizer_folder: Path | None = None,
) -> None:
    """Writes SERVING.md, and Modelfile where the prompt can be told to Ollama, into `folder`, which will be `out`."""
    tokenizer = carry.tokenizer(tokenizer_folder or folder)
    style = style_of(record)
    found = pieces(tokenizer, style)
    lines = [f"# Serving {out.name}", ""]
    options = ""
    if found and not found.system and style.startswith("alpaca") and gguf is None:
        name = JINJA.format(style=style)
        (folder / name).write_text(jinja(found), encoding="utf-8")
        options = f" --chat-template {out / name}"
        lines += [f"Trained on prompts in the {style} style, not through the tokenizer's own chat template: {name} writes them.", ""]
    if gguf is None:
        lines += ["vLLM:", "```", f"vllm serve {out}{options}", "```", ""]
    if found:
        adds_bos = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
        weights = f"./{gguf}" if gguf else "."
        (folder / "Modelfile").write_text(modelfile(weights, found, tokenizer, adds_bos=adds_bos), encoding="utf-8")
        lines += ["Ollama:", "```", f"ollama create {out.name.lower()} -f {out / 'Modelfile'}", f"ollama run {out.name.lower()}", "```", ""]
    else:
        say("note: no Ollama Modelfile: the prompt the model was trained on cannot be written as Ollama's template")
        lines += ["No Ollama Modelfile: the prompt the model was trained on cannot be written as Ollama's template.", ""]
    lines += [f"Stop tokens: {', '.join(stop_tokens(tokenizer, found))}.", "", f"{UNMERGED}.", ""]
    (folder / "SERVING.md").write_text("\n".join(lines), encoding="utf-8")
    if record.get("plan", {}).get("adapter", {}).get("method") == "dora":
        say(f"note: {UNMERGED}")
