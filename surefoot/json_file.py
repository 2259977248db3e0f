"""Records in JSON: read_json() for what a user may have damaged, write_json() whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from surefoot.errors import UsageError


def read_json(path: Path) -> dict[str, Any]:
    """The file's object; {} where there is no file.

    Raises:
        UsageError: it cannot be read, or is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} is damaged ({error}): restore it") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} is damaged (it holds no object): restore it")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Written beside, synced and renamed, so that a reader never meets half a file."""
    partial = path.with_name(f".{path.name}.part")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
