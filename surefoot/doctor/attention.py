"""The attention canary for the doctor, at the shape of Llama-3.1-8B; a run asks it again at its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from surefoot import verdicts
from surefoot.doctor.stack import Stack
from surefoot.machine import Machine
from surefoot.verdicts import Shape, Verdict


def attention_rows(machine: Machine, stack: Stack, say: Callable[[str], None]) -> Sequence[Verdict]:
    """One verdict a backend and mask; kept ones where there are any. bf16 needs compute capability 8.0, older GPUs are tried in fp16."""
    dtype = "bf16" if min(capability for _, capability in stack.gpus) >= (8, 0) else "fp16"
    shape = Shape(heads=32, kv_heads=8, head_dim=128, dtype=dtype, length=2048, rows=1)
    return verdicts.ask(machine, shape, say=say).rows
