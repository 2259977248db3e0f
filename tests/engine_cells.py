"""Started by accelerate in finetune.py's place: one run after the other with the flags of the JSON file it is given, a list."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from finetune import train

for flags in json.loads(Path(sys.argv[1]).read_text()):
    train(**flags)
