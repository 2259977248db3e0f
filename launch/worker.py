"""One process of finetune.py under node.sh: leaves its exit code in the folder EXIT_CODES, since torchrun ends with 1 whatever it was."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

FINETUNE = Path(__file__).resolve().parent.parent / "finetune.py"


def main() -> None:
    code: object = 1
    sys.path[0] = str(FINETUNE.parent)
    sys.argv[0] = str(FINETUNE)
    try:
        runpy.run_path(str(FINETUNE), run_name="__main__")
    except SystemExit as ended:
        code = ended.code or 0
        raise
    finally:
        Path(os.environ["EXIT_CODES"], str(os.getpid())).write_text(f"{code}\n")


if __name__ == "__main__":
    main()
