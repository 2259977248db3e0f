"""process_speed.py: rows per second and peak memory of scripts/process_data.py on a .jsonl of alpaca rows.

python benchmarks/process_speed.py [--rows=2000000] [--folder=/tmp/process_speed] [--out=benchmarks/results/process_speed_cpu.json]

The rows are the shipped training rows, each with its number, over and over (about 470 bytes a row). Two processes do the same work, one
after the other. CPU seconds are user + system of the whole process, so that other work on the machine does not count.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RATE, MEMORY_MB = 50_000, 500  # what issue 8 asks for, rows per CPU second and peak


def main(rows: int = 2_000_000, folder: str = "/tmp/process_speed", out: str = "") -> None:
    """Makes the rows, processes them twice, prints and keeps what was measured; exit 1 where it is too slow or too big."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    raw = place / "raw.jsonl"
    _make(raw, rows)
    runs = [_measure(raw, place / "processed") for _ in range(2)]
    record = {"rows": rows, "bytes": raw.stat().st_size, "python": platform.python_version(), "cpu": _cpu(), "runs": runs}
    record["rows_per_cpu_second"] = round(min(rows / run["cpu_seconds"] for run in runs))
    record["peak_memory_mb"] = max(run["peak_memory_mb"] for run in runs)
    shutil.rmtree(place)
    print(json.dumps(record, indent=2))
    if out:
        Path(out).write_text(json.dumps(record, indent=2) + "\n")
    if record["rows_per_cpu_second"] < RATE or record["peak_memory_mb"] > MEMORY_MB:
        sys.exit(1)


def _make(path: Path, rows: int) -> None:
    shipped = [json.loads(line) for line in (ROOT / "examples/data/commonsense_train.jsonl").read_text().splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            row = shipped[number % len(shipped)]
            file.write(json.dumps({**row, "instruction": f"{number}. {row['instruction']}"}, ensure_ascii=False) + "\n")


def _measure(raw: Path, out: Path) -> dict[str, float]:
    began = time.perf_counter()
    command = [sys.executable, str(ROOT / "scripts/process_data.py"), f"--raw_path={raw}", f"--out={out}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"process_data.py failed: {said}")
    seconds = {"seconds": round(time.perf_counter() - began, 2), "cpu_seconds": round(used.ru_utime + used.ru_stime, 2)}
    return {**seconds, "peak_memory_mb": round(used.ru_maxrss / 1000)}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    import fire

    fire.Fire(main)
