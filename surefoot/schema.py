"""schema(): the JSON schema of run files, read off Config and run_file, so that editors complete and check them."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from surefoot import compat, run_file
from surefoot.config import FLAGS
from surefoot.flag_values import kinds

TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}
# What other programs than training read.
SPLIT = {f"{name}_ratio": {"type": "number", "minimum": 0, "maximum": 1} for name in ("train", "val", "test")}
GEN = {"max_new_tokens": {"type": "integer", "minimum": 1}, "temperature": {"type": "number"}, "top_p": {"type": "number"}}
ELSEWHERE: dict[str, dict[str, Any]] = {
    "gen": {"type": "object", "properties": GEN, "description": "scripts/infer.py reads it"},
    "data.split": {"type": "object", "properties": SPLIT, "additionalProperties": False, "description": "scripts/process_data.py reads it"},
}


def schema() -> dict[str, Any]:
    """Flags flat and in groups; a name that is neither is marked by the editor, as finetune.py refuses it."""
    lora = _group("tuning.lora", {})
    groups = {name: _group(name, {"lora": lora} if name == "tuning" else {}) for name in run_file.GROUPS if "." not in name}
    flat = {name: _flag(name) for name in FLAGS if name not in ("config",)}
    aliases = {older: _flag(name) for older, name in compat.ALIASES.items()}
    top = {name: _elsewhere(name) for name in run_file.ELSEWHERE if "." not in name}
    include = {"include": {"type": "string", "description": "a run file that lies under this one, relative to it"}}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "surefoot run file (made by scripts/make_schema.py)",
        "type": "object",
        "properties": {**include, **flat, **aliases, **top, **groups},
        "additionalProperties": False,
    }


def _group(group: str, more: dict[str, Any]) -> dict[str, Any]:
    """Any flag under its own or an older name, and the group's own names."""
    own = {dotted: flag for dotted, flag in run_file.GROUPED.items() if dotted.rpartition(".")[0] == group}
    properties: dict[str, Any] = {dotted.rpartition(".")[2]: _flag(flag) for dotted, flag in own.items()}
    properties |= {
        name: {"$ref": f"#/properties/{name}"} for name in (*FLAGS, *compat.ALIASES) if name != "config" and name not in properties
    }
    properties |= {name.rpartition(".")[2]: _elsewhere(name) for name in run_file.ELSEWHERE if name.rpartition(".")[0] == group}
    if group == "tuning":
        properties["mode"] = {"enum": list(run_file.TUNING_MODES), "description": "qlora: load_4bit; full: adapter_name full"}
    return {"type": "object", "properties": {**properties, **more}, "additionalProperties": False}


def _elsewhere(name: str) -> dict[str, Any]:
    allowed = run_file.ELSEWHERE[name]
    return ELSEWHERE.get(name, {"description": "another program reads it"}) if allowed is None else {"enum": list(allowed)}


def _flag(name: str) -> dict[str, Any]:
    """Type, bound, choices, meaning and default of a flag; `auto` leaves every flag to the plan."""
    flag = FLAGS[name]
    choices, low = flag.metadata["choices"], flag.metadata["low"]
    found = [_kind(kind, choices, low) for kind in kinds(flag)]
    found += [{"const": "auto"}] if "auto" not in choices else []
    found += [{"type": "null"}] if type(None) in typing.get_args(flag.type) else []
    default = None if flag.default is dataclasses.MISSING else flag.default
    return {"anyOf": found, "description": flag.metadata["doc"], "default": list(default) if isinstance(default, tuple) else default}


def _kind(kind: Any, choices: tuple[Any, ...], low: float | None) -> dict[str, Any]:
    if typing.get_origin(kind) is tuple:
        word = {"enum": list(choices)} if choices else {"type": "string"}
        return {"anyOf": [{"type": "array", "items": word}, {"type": "string"}]}
    if kind is str and choices and not any("_N" in str(choice) for choice in choices):
        return {"enum": list(choices)}
    if kind in (int, float) and choices and not any(isinstance(choice, str) for choice in choices):
        return {"enum": list(choices)}
    return {"type": TYPES[kind]} | ({"minimum": low} if kind in (int, float) and low is not None else {})
