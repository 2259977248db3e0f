"""make_schema.py: writes configs/schema.json from Config, for editors that check YAML (make schema)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script also runs from a checkout that is not installed

from surefoot import command  # noqa: E402
from surefoot.schema import schema  # noqa: E402


def make_schema(out: str = str(ROOT / "configs/schema.json")) -> None:
    """Writes the schema.

    Args:
        out: the file.
    """
    Path(out).write_text(json.dumps(schema(), indent=1) + "\n", encoding="utf-8")
    print(f"written: {out}")


if __name__ == "__main__":
    sys.exit(command.run(make_schema))
