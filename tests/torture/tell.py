"""Started by accelerate: the variables by which a profile reaches its processes, as JSON in the last line."""

from __future__ import annotations

import json
import os

if os.environ["RANK"] == "0":
    print(json.dumps({name: value for name, value in os.environ.items() if name.startswith(("ACCELERATE_", "FSDP_"))}))
