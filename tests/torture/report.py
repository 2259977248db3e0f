"""What all calls of the torture with one --report came to: kills, resumes, mismatches and lost steps by cell, and what they ran on."""

from __future__ import annotations

import datetime
import fcntl
import importlib.metadata
import json
import subprocess
from pathlib import Path

from tests.conftest import ROOT

COUNTS = ("runs", "kills", "resumes", "lost_steps", "mismatches")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes")


def add(path: Path, cells: dict[str, dict[str, int]], seed: int, machine: str) -> None:
    """Adds a call's cells (name -> COUNTS) to the report, which is made where there is none.

    Raises:
        SystemExit: the report is of another machine or of other versions.
    """
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # two calls may run side by side
        file.seek(0)
        report = json.loads(file.read() or json.dumps({"machine": machine, "versions": versions, "cells": {}}))
        if (report["machine"], report["versions"]) != (machine, versions):
            raise SystemExit(f"--report={path} is of {report['machine']} and {report['versions']}. Choose another file")
        for name, counts in cells.items():
            before = report["cells"].get(name, dict.fromkeys(COUNTS, 0))
            report["cells"][name] = {count: before[count] + counts[count] for count in COUNTS}
        report["total"] = {count: sum(cell[count] for cell in report["cells"].values()) for count in COUNTS}
        for name, value in (("seeds", seed), ("dates", str(datetime.date.today())), ("commits", _commit())):
            report[name] = list(dict.fromkeys([*report.get(name, []), value]))
        file.truncate(0)
        file.write(json.dumps(report, indent=2) + "\n")


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
