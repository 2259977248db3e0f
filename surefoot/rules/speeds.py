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


# medians of benchmarks/results/speed_h200.json; tests/test_benchmarks.py holds them together
SOURCE = "Llama-3.1-8B's shape, 4 x 2,048 tokens, no recompute, both in turn on one H200, ours at stage 3"
QUANTIZED = "Llama-3.1-8B's shape, 4 x 2,048 tokens, recompute, an H200 each, ours at stage 3"
SPEEDS = (
    Speed("dora", "none", 16_220, 14_447, SOURCE),
    Speed("lora", "none", 16_867, 16_145, SOURCE),
    Speed("dora", "nf4", 11_218, 6_213, QUANTIZED),
)


def find(method: str, quantization: str, speeds: tuple[Speed, ...] = SPEEDS) -> Speed | None:
    """The figures for this method, None where nobody has measured both."""
    return next((speed for speed in speeds if (speed.method, speed.quantization) == (method, quantization)), None)
