"""How to serve an export: SERVING.md with a vLLM line, and an Ollama Modelfile whose TEMPLATE says what the model was trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """A conversation as fixed text around what is said: pairs of (before, after). `start` begins every conversation, `default` follows
    where there is no system turn, `asks` stands before the answer that is wanted. system is None where such turns have no place.
    """

    start: str
    default: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    asks: str


def style_of(record: dict[str, Any]) -> str:
    """The style that most training rows were rendered in (run.json): chat, alpaca, alpaca_indented, ...; "" where not known."""
    styles = record.get("data", {}).get("styles") or {}
    return str(max(styles, key=lambda name: styles[name])) if styles else ""


def pieces(tokenizer: Any, style: str) -> Pieces | None:
    """The model's prompt as pieces; None where it cannot be written so, such as templates that treat turns differently by place."""
    if style in ("alpaca", "alpaca_indented"):
        example = Example(format="alpaca", where="serving", columns={}, turns=(Turn("user", "\0", False), Turn("assistant", "", True)))
        before, after = prompt_text(example, style).split("\0")
        return Pieces("", "", None, (before, after), ("", tokenizer.eos_token or ""), "")
    if not tokenizer.chat_template or style not in ("", "chat"):
        return None
    found = _of_template(tokenizer)
    if found is None or _written(found, LONGER) != _rendered(tokenizer, LONGER):
        return None
    return found


MARK = "\1{}\2"  # what no template says itself
LONGER = tuple((role, MARK.format(n)) for n, role in enumerate(("user", "assistant", "user", "assistant", "user")))


def _rendered(tokenizer: Any, turns: Sequence[tuple[str, str]], *, asks: bool = True) -> str:
    """The template's own text; "" where it refuses."""
    import jinja2

    try:
        messages = [{"role": role, "content": text} for role, text in turns]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))
    except (jinja2.TemplateError, ValueError):
        return ""


def _written(found: Pieces, turns: Sequence[tuple[str, str]]) -> str:
    """The text of a conversation from its pieces, as Ollama's template below writes it."""
    pairs = {"system": found.system or ("", ""), "user": found.user, "assistant": found.assistant}
    has_system = any(role == "system" for role, _ in turns)
    return found.start + "".join(("" if has_system else found.default, *(text.join(pairs[role]) for role, text in turns), found.asks))


def _of_template(tokenizer: Any) -> Pieces | None:
    """The pieces between marks set in place of what is said."""
    user, answer, system, next_user = (MARK.format(name) for name in "UASV")
    alone = _rendered(tokenizer, [("user", user)], asks=False)
    asked = _rendered(tokenizer, [("user", user)])
    answered = _rendered(tokenizer, [("user", user), ("assistant", answer)], asks=False)
    twice = _rendered(tokenizer, [("user", user), ("assistant", answer), ("user", next_user)], asks=False)
    if not (user in alone and answer in answered and next_user in twice and asked.startswith(alone) and twice.startswith(answered)):
        return None
    before, after = alone.split(user, 1)
    opening = twice[len(answered) :].partition(next_user)[0]
    lead = before.removesuffix(opening)
    header, ending = answered.removeprefix(alone).split(answer, 1)
    start, default, pair = lead, "", None
    with_system = _rendered(tokenizer, [("system", system), ("user", user)], asks=False)
    if with_system.count(system) == 1 and with_system.endswith(f"{opening}{user}{after}"):
        if not with_system.startswith(lead):  # a system text of the template's own, which the user's replaces
            start = tokenizer.bos_token if tokenizer.bos_token and lead.startswith(tokenizer.bos_token) else ""
            default = lead.removeprefix(start)
        first, second = with_system.removeprefix(start).removesuffix(f"{opening}{user}{after}").split(system)
        pair = (first, second)
    return Pieces(start, default, pair, (opening, after), (header, ending), asked[len(alone) :])


def modelfile(weights: str, found: Pieces, tokenizer: Any, *, adds_bos: bool, system: str = "") -> str:
    """Ollama's Modelfile, with the system turn of who gives none. llama.cpp adds BOS itself where the GGUF says so; a second one would be a
    turn the model never saw.
    """
    start = found.start
    if adds_bos and tokenizer.bos_token and start.startswith(tokenizer.bos_token):
        start = start.removeprefix(tokenizer.bos_token)
    if found.default:
        start += f"{{{{ if not .System }}}}{found.default}{{{{ end }}}}"
    pairs = [("user", found.user), ("assistant", found.assistant), *([("system", found.system)] if found.system else [])]
    turns = "".join(f'{{{{ if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{ end }}}}' for role, (before, after) in pairs)
    template = f"{start}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{found.asks}"
    stops = "".join(f'PARAMETER stop "{token}"\n' for token in stop_tokens(tokenizer, found))
    spoken = f'SYSTEM """{system}"""\n' if system and found.system and '"""' not in system else ""
    return f'FROM {weights}\nTEMPLATE """{template}"""\n{spoken}{stops}'


def stop_tokens(tokenizer: Any, found: Pieces | None) -> list[str]:
    """EOS, and the special token that ends an answer in the template."""
    ending = (found.assistant[1] if found else "").strip()
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special and ending.startswith(token.content)]
    return list(dict.fromkeys([*tokens, *([tokenizer.eos_token] if tokenizer.eos_token else [])]))


def jinja(found: Pieces, *, adds_bos: bool) -> str:
    """A chat template for a style without one of its own, of a single question, which is all that the style has a place for.

    It writes BOS itself: servers add none to what a chat template wrote.
    """
    asked = "(messages | selectattr('role', 'equalto', 'user') | list)[-1]['content']"
    return f"{{{{ {'bos_token + ' * adds_bos}{found.user[0]!r} + {asked} + {found.user[1]!r} }}}}"


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
    adds_bos = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    lines = [f"# Serving {out.name}", ""]
    options = ""
    if found and not found.system and style.startswith("alpaca") and gguf is None:
        name = JINJA.format(style=style)
        (folder / name).write_text(jinja(found, adds_bos=adds_bos), encoding="utf-8")
        options = f" --chat-template {out / name}"
        lines += [f"Trained on prompts in the {style} style, not through the tokenizer's own chat template: {name} writes them.", ""]
    if gguf is None:
        lines += ["vLLM:", "```", f"vllm serve {out}{options}", "```", ""]
    if found:
        weights = f"./{gguf}" if gguf else "."
        system = str(record.get("data", {}).get("system", ""))
        (folder / "Modelfile").write_text(modelfile(weights, found, tokenizer, adds_bos=adds_bos, system=system), encoding="utf-8")
        lines += ["Ollama:", "```", f"ollama create {out.name.lower()} -f {out / 'Modelfile'}", f"ollama run {out.name.lower()}", "```", ""]
    else:
        say("note: no Ollama Modelfile: the prompt the model was trained on cannot be written as Ollama's template")
        lines += ["No Ollama Modelfile: the prompt the model was trained on cannot be written as Ollama's template.", ""]
    lines += [f"Stop tokens: {', '.join(stop_tokens(tokenizer, found))}.", "", f"{UNMERGED}.", ""]
    (folder / "SERVING.md").write_text("\n".join(lines), encoding="utf-8")
    if record.get("plan", {}).get("adapter", {}).get("method") == "dora":
        say(f"note: {UNMERGED}")
