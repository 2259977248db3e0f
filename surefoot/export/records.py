"""surefoot_meta.json: which run, base and adapter an export was made of, by which versions, and its parity in a word."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surefoot import artifacts
from surefoot.artifacts import META
from surefoot.export.source import Source
from surefoot.json_file import write_json

if TYPE_CHECKING:
    from surefoot.export.judge import Verdict

PARITY = "parity.json"
RUN = ("started", "ended", "status", "code", "data", "summary")
PACKAGES = ("torch", "transformers", "peft", "safetensors", "bitsandbytes", "gguf")


def of_source(source: Source) -> dict[str, Any]:
    """The adapter, its run and its base."""
    return {
        "adapter": {
            "path": str(source.adapter.resolve()),
            "sha256": sha256(source.adapter / "adapter_model.safetensors"),
            "method": source.method,
            **{name: source.config.get(name) for name in ("r", "lora_alpha", "use_rslora", "init_lora_weights")},
        },
        "base": {"name": source.base_name, "path": str(source.base.resolve()), "seen": source.seen, "merged_onto": source.onto},
        **of_run(source.record),
    }


def of_run(record: dict[str, Any]) -> dict[str, Any]:
    """What inference and evaluation read of run.json, in its own form: above all the prompt that the model was trained with."""
    if "plan" not in record:
        return {}
    plan = {name: record["plan"][name] for name in ("model", "adapter", "data", "train")}
    return {"run": {name: record[name] for name in RUN if name in record} | {"plan": plan}}


def write(folder: Path, verdict: Verdict | None, **facts: Any) -> None:
    """Writes surefoot_meta.json, and parity.json when there is a verdict."""
    if verdict is not None:
        write_json(folder / PARITY, verdict.record)
    parity = "not checked (--parity=False)" if verdict is None else verdict.record["verdict"]
    write_json(folder / META, {"made_by": artifacts.code_state(), "versions": _versions(), **facts, "parity": parity})


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _versions() -> dict[str, str | None]:
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
