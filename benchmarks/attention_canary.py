"""attention_canary.py: the attention canary's verdicts on this machine, as a table and as JSON.

python benchmarks/attention_canary.py --out=benchmarks/results/attention_canary_h200.json [--heads=32 --kv_heads=8 --rows=4] [--all]

--all tries FlexAttention too, whose compilation takes longer than everything else.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHAPES = (("bf16", 256), ("bf16", 2048), ("fp16", 256), ("fp32", 256))


def bench(heads: int = 32, kv_heads: int = 8, head_dim: int = 128, rows: int = 4, all: bool = False, out: str = "") -> None:
    """Measures afresh at each dtype and length."""
    from surefoot import verdicts
    from surefoot.machine import probe
    from surefoot.verdicts import Shape

    here = probe()
    found = []
    for dtype, length in SHAPES:
        shape = Shape(heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, length=length, rows=rows)
        found.append(verdicts.ask(here, shape, verdicts.ALL_BACKENDS if all else verdicts.BACKENDS, fresh=True))
        print(f"\n{dtype}, length {length}, {rows} rows; {found[-1].seconds} s")
        for row in found[-1].rows:
            numbers = f"{row.error:9.2g} {row.milliseconds:9.3f} ms" if row.error is not None and row.milliseconds else ""
            print(f"{row.backend:<18} {row.mask:<9} {row.state:<12}{numbers:<23} {row.reason}".rstrip())
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": dataclasses.asdict(here),
        "verdicts": [one.as_record() for one in found],
    }
    if out:
        Path(out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    import fire

    fire.Fire(bench)
