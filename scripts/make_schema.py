"""make_schema.py: writes configs/schema.json from Config, for editors that check YAML (make schema).

python scripts/make_schema.py [--out FILE]
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script also runs from a checkout that is not installed

from surefoot import script  # noqa: E402
from surefoot.schema import schema  # noqa: E402
from surefoot.script import flag  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Flags:
    out: str = flag(str(ROOT / "configs/schema.json"), "the file")


def run(flags: Flags) -> None:
    """Writes the schema."""
    Path(flags.out).write_text(json.dumps(schema(), indent=1) + "\n", encoding="utf-8")
    print(f"written: {flags.out}")


if __name__ == "__main__":
    sys.exit(script.main(Flags, __doc__, run))
