"""What a resumed run must share with the run it continues: refused with the command that would be right; other versions are named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surefoot.rules.launch import PROFILES

LAUNCHED = {"engine", "offloads", "world_size"}  # what the launcher decides
CHANGES_NUMBERS = (
    "torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed", "triton", "flash-attn", "xformers",
    "unsloth", "unsloth_zoo",
)  # fmt: skip
QUANTIZATIONS = {"nf4": "--load_4bit=True", "int8": "--load_8bit=True", "none": "--load_4bit=False --load_8bit=False"}
PRECISIONS = {"bf16": "--bf16=True", "fp16": "--fp16=True", "fp32": "--bf16=False"}
ADAPTER_FLAGS = {"method": "adapter_name", "r": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora"}


def refusal(checkpoint: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two stamps and the flags that would be right; empty where nothing does. Keys that one lacks are not compared."""
    changed = [key for key in now if key in before and before[key] != now[key]]
    if not changed:
        return ""
    differences = "; ".join(_difference(key, before[key], now[key]) for key in changed)
    flags = [flag for key in changed if key not in LAUNCHED for flag in _flags(key, before[key], now[key])]
    way_out = f"To continue it, run this command with {' '.join(flags)}" if flags else "To continue it, run this command"
    if not LAUNCHED.isdisjoint(changed):
        way_out += f" under {_launch(before)}"
    return f"cannot continue {checkpoint}: it was made under other settings ({differences}). {way_out}; or give another --output_dir"


def drift(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The packages whose version differs between the two halves of a run; empty where none does."""
    moved = [
        f"{name} {before.get(name, 'absent')} -> {now.get(name, 'absent')}" for name in CHANGES_NUMBERS if before.get(name) != now.get(name)
    ]
    return f"the run began with other versions ({', '.join(moved)}): its numbers may differ from here on" if moved else ""


def _launch(before: Mapping[str, Any]) -> str:
    """The launcher that gives a stamp's engine and number of processes again."""
    engine, count = before.get("engine", "ddp"), before.get("world_size", 1)
    if count == 1 and engine in ("single", "ddp"):
        return "python"
    profile = "ds_zero3_offload" if before.get("offloads") else PROFILES.get(engine, engine)
    return f"accelerate launch --config_file profiles/{profile}.yaml --num_processes {count}"


def _difference(key: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        return ", ".join(f"{key} {name} {before[name]} -> {now[name]}" for name in now if name in before and before[name] != now[name])
    return f"{key} {before} -> {now}"


def _flags(key: str, before: Any, now: Any) -> list[str]:
    """The flags that give a stamp's value again."""
    if key == "quantization":
        return [QUANTIZATIONS[before]]
    if key == "dtype":
        return [PRECISIONS[before]]
    if key == "adapter":
        found = [f"--{flag}={before[name]}" for name, flag in ADAPTER_FLAGS.items() if name in before and before[name] != now.get(name)]
        if before.get("target_modules") != now.get("target_modules"):
            found.append(f"--target_modules {' '.join(before['target_modules'])}" if before["target_modules"] else "no --target_modules")
        return found
    name = {"attn_impl": "attn_implementation"}.get(key, key)
    return [f"--{name}={before}" if before is not None else f"no --{name}"]
