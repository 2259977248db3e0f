"""The plan's cell of the support matrix: refused with its reason, or named where no test has run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surefoot import support
from surefoot.rules.desk import Desk

QUANTIZED = {"nf4": "--load_4bit=True", "int8": "--load_8bit=True"}


def check(desk: Desk, values: Mapping[str, Any]) -> None:
    """Adds a problem for a refused cell and a note for an untested one.

    Args:
        values: everything decided, by name.
    """
    m = desk.machine
    if m.strategy not in support.ENGINES:
        return
    method = "rslora" if values["method"] == "lora" and values["use_rslora"] else values["method"]
    cell = support.Cell(method, values["quantization"], m.strategy, values["enable_torch_compile"], values["packing"] == "on")
    refused = support.refusal(cell, "gpu" if m.gpus else "cpu")
    if refused is not None:
        desk.problems.append(f"{_words(cell, refused.cells)}: {refused.reason}. {refused.way_out}")
    elif support.verdict(cell).state == "untested":
        desk.notes.append(f"no test has run {cell} (docs/support.md)")


def _words(cell: support.Cell, refused: support.Cells) -> str:
    """The flags, and the engine, that are refused together."""
    words = [f"--adapter_name={cell.method}"] if refused.methods != support.METHODS else []
    words += [QUANTIZED[cell.quantization]] if cell.quantization in QUANTIZED and refused.quantizations != support.QUANTIZATIONS else []
    words += ["--enable_torch_compile=True"] if refused.compiles == (True,) else []
    words += ["--packing=True"] if refused.packs == (True,) else []
    engine = f" under {cell.engine}" if refused.engines != support.ENGINES else ""
    return " with ".join(words) + engine
