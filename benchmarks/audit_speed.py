"""audit_speed.py: how long rows take to be tokenised, audited and kept, and to be read back by the next process.

python benchmarks/audit_speed.py --data=ROWS.jsonl --tokenizer=FOLDER [--out=benchmarks/results/audit_speed_cpu.json]

Each time is that of a process of its own, from the loading of its tokenizer on; its start and its imports are not counted.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CUTOFFS = (256, 512)  # the older recipes' and the one that keeps commonsense_170k whole


def bench(data: str, tokenizer: str, out: str = "") -> None:
    """Prints and writes both times for each cut-off, and the share of rows that each reason of the audit meets."""
    from surefoot.machine import probe

    with tempfile.TemporaryDirectory() as cache:
        runs = [_run(data, tokenizer, cache, cutoff_len) for cutoff_len in CUTOFFS for _ in range(2)]
    here = probe()
    result = {
        "date": datetime.date.today().isoformat(),
        "data": Path(data).name,
        "runs": runs,
        "machine": {"cpu": here.cpu_name, "cpu_count": here.cpu_count, "versions": here.versions},
    }
    if out:
        Path(out).write_text(json.dumps(result, indent=2) + "\n")


def _run(*words: object) -> dict[str, Any]:
    command = [sys.executable, __file__, "one", *map(str, words)]
    line = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
    print(line, flush=True)
    return dict(json.loads(line))


def one(data: str, tokenizer: str, cache: str, cutoff_len: int) -> None:
    """One process: prepare() with the cache folder given, as a line of JSON."""
    from transformers import AutoTokenizer

    from surefoot.config import Config
    from surefoot.data.audit import write_audit
    from surefoot.data.prepare import prepare
    from surefoot.inputs import inspect
    from surefoot.machine import probe
    from surefoot.plan import make_plan

    os.environ["SUREFOOT_CACHE"] = cache
    config = Config.parse({"base_model": "org/model", "data_path": data, "cutoff_len": cutoff_len, "audit": "warn"})
    plan = make_plan(config, probe(), inspect(config)).data
    began = time.perf_counter()
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    prepared = prepare(plan, loaded)
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    write_audit(prepared.audit, Path(cache))
    line = {
        "cutoff_len": cutoff_len,
        "vocabulary": len(loaded),
        "from_cache": prepared.report.from_cache,
        "seconds": round(seconds, 2),
        "rows": prepared.report.rows_read,
        "training_tokens": prepared.report.tokens,
        "audit": {finding.reason: round(finding.share, 4) for finding in prepared.audit.findings},
        "audit_json_mb": round((Path(cache) / "audit.json").stat().st_size / 1e6, 1),
        "audit_json_seconds": round(time.perf_counter() - began, 2),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    import fire

    fire.Fire({"one": one} if sys.argv[1:2] == ["one"] else bench)
