"""Packing: may short rows share a row, and which attention keeps them apart. Their lengths decide the rest when they are read."""

from __future__ import annotations

from collections.abc import Iterator

from surefoot.rules import attention, backend
from surefoot.rules.desk import Choice, Desk

KNOWN_LAYERS = {"full_attention", "sliding_attention"}  # recurrent ones carry a state, and chunked ones a border, across rows


def packing(desk: Desk, implementation: str) -> Iterator[Choice]:
    """Whether rows are packed (on, off; auto: where they are short), in how many slots, and through which attention."""
    c = desk.config
    inside, why_inside = _inside(desk, implementation)
    if c.packing is True:
        _refuse(desk, implementation)
        value, reason = "on", ""
    elif c.packing is False:
        value, reason = "off", ""
    else:
        obstacle = _obstacle(desk, implementation, inside, why_inside)
        value = "off" if obstacle else "auto"
        reason = obstacle or "on where the rows are short against cutoff_len, which shows when they are read"
    yield Choice("packing", value, c.source("packing"), reason)
    yield _pack_len(desk, value)
    idle = "" if value != "off" else "no effect: packing is off"
    yield Choice("packed_attention", inside, "auto", idle or why_inside)


def _pack_len(desk: Desk, packing: str) -> Choice:
    c = desk.config
    if c.pack_len is None:
        return Choice("pack_len", None, "default", "" if packing == "off" else "from batch_size, in the fewest passes that fit")
    if c.packing is False:
        desk.problems.append(f"--pack_len={c.pack_len} contradicts --packing=False. Drop one of them")
    elif c.pack_len < c.cutoff_len:
        desk.problems.append(
            f"--pack_len={c.pack_len} is shorter than a row may be (--cutoff_len={c.cutoff_len}), and rows are not split. "
            f"Use --pack_len={c.cutoff_len} or more, or a shorter --cutoff_len"
        )
    return desk.as_given("pack_len", "no effect: packing is off" if packing == "off" else "slots")


def _refuse(desk: Desk, implementation: str) -> None:
    """The problems of --packing=True, and what it sets aside."""
    c = desk.config
    if c.group_by_length:
        desk.problems.append("--packing=True and --group_by_length=True exclude each other: packed rows are all equally long. Drop one")
    layers = _unknown_layers(desk)
    if layers:
        desk.problems.append(f"--packing=True: the model's {layers} layers would carry one row into the next. Use --packing=False")
    if c.given("gradient_accumulation_steps"):
        desk.notes.append(
            f"--gradient_accumulation_steps={c.gradient_accumulation_steps} gives way to packing, "
            "which takes the passes that hold batch_size rows on average"
        )
    if implementation == "eager":
        desk.notes.append("eager attention computes C x C scores a head for a packed row of C slots: keep --pack_len near cutoff_len")


def _obstacle(desk: Desk, implementation: str, inside: str, why_inside: str) -> str:
    """Why packing=auto leaves rows apart."""
    if desk.config.group_by_length:
        return "group_by_length was asked for"
    if backend.uses_unsloth(desk):
        return "Unsloth keeps packed rows apart in its own collator only"
    if not desk.machine.gpus:
        return "packed only on a GPU, unless --packing=True"
    if implementation == "eager":
        return "eager attention makes C x C scores a head for a packed row of C slots"
    if _unknown_layers(desk):
        return f"the model's {_unknown_layers(desk)} layers would carry one row into the next"
    if attention.has_short_windows(desk):
        return "the model has sliding windows shorter than a row"
    if implementation == "sdpa":
        return "" if inside == "varlen" else why_inside
    if desk.verdicts is None:
        return f"nothing has checked {implementation} on packed rows on this machine"
    obstacle = desk.verdicts.obstacle(implementation, ("packed",))
    return f"{implementation} {obstacle}" if obstacle else ""


def _inside(desk: Desk, implementation: str) -> tuple[str, str]:
    """The attention of a packed row, and why."""
    if implementation != "sdpa":
        return implementation, ""
    obstacle = attention.varlen_obstacle(desk)
    if not obstacle:
        return "varlen", "torch's varlen kernel: right under the canary, no mask"
    return "sdpa", f"with a mask of C x C for C slots: {obstacle}"


def _unknown_layers(desk: Desk) -> str:
    kinds = attention.text_model(desk).get("layer_types")
    return ", ".join(sorted(set(kinds) - KNOWN_LAYERS)) if isinstance(kinds, list) else ""
