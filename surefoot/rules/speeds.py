"""Measured training speeds of this program's own layers and of Unsloth's: what --backend=auto goes by where both can run."""

from __future__ import annotations

from typing import NamedTuple


class Speed(NamedTuple):
    """Tokens per second of one GPU for a method and quantization, at the faster setting of each; source says what was run."""

    method: str
    quantization: str
    ours: int
    unsloth: int
    source: str


# Llama-3.1-8B's shape with random weights, r=32 on seven projections, 4 rows of 2,046 (ours) or 2,048 tokens, no recompute, 2026-11-21;
# ours: benchmarks/results/fused_h200.txt at stage 3; Unsloth 2026.10.9: a bare training loop on another H200. benchmarks/speed.py measures
# both in turn; its table is to replace these.
SOURCE = "single runs on one H200 each, ours at stage 3"
SPEEDS = (
    Speed("dora", "none", 15_900, 14_237, SOURCE),
    Speed("lora", "none", 16_500, 15_940, SOURCE),
)


def find(method: str, quantization: str, speeds: tuple[Speed, ...] = SPEEDS) -> Speed | None:
    """The figures for this method, None where nobody has measured both."""
    return next((speed for speed in speeds if (speed.method, speed.quantization) == (method, quantization)), None)
