"""The attention canary: each backend forward and backward against fp64, at a run's own shape and where kernels are known to break.

Every backend is called through the code that a run calls (transformers' attention functions, torch's varlen_attn). The traps: lengths
with length % 128 == 64 under strongly negative log-sum-exp (below -88.7, where exp(-lse) overflows fp32: pytorch/pytorch#196678),
rows that see nothing (left padding), gradients that are not contiguous (pytorch/pytorch#138354), and packed rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from surefoot.attention import kernels, reference
from surefoot.verdicts import Shape, Verdict

TRAP = 704  # the length at which the cuDNN bug was reported; 704 % 128 == 64
CPU_TRAP = 192
LONGEST = 8192  # the fp64 reference of longer rows does not fit beside the rest
# Worst relative error of a head's output or gradient (Frobenius norm), about 4 units in the last place of the dtype.
NEGATIVE_TOLERANCE = 3e-2  # scores near -120 lose their own variation where a backend keeps them in 16 bits (eager does)
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-4}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Rows to attend over. lens: tokens of each row (causal and explicit) or of each packed row (packed, all in one)."""

    mask: str
    length: int
    lens: tuple[int, ...]
    is_left: bool = False
    is_negative: bool = False
    is_strided: bool = False

    def __str__(self) -> str:
        words = [f"length {self.length}"]
        words += ["left padding"] * self.is_left + ["log-sum-exp -120"] * self.is_negative + ["a strided gradient"] * self.is_strided
        return ", ".join(words)


def cases(shape: Shape, trap: int) -> tuple[Case, ...]:
    """The cases of a shape, of every kind of mask."""
    length = min(shape.length, LONGEST)
    odd = max(8, length - 8)
    like = length // 128 * 128 - 64 if length >= 128 else length
    short = max(1, length // 3)
    pieces = tuple(n for n in (short, short // 2, length - short - short // 2) if n)
    return (
        Case(mask="causal", length=length, lens=(length, length)),
        Case(mask="causal", length=odd, lens=(odd,), is_strided=True),
        Case(mask="causal", length=like, lens=(like,)),
        Case(mask="causal", length=trap, lens=(trap,), is_negative=True),
        Case(mask="explicit", length=length, lens=(length, short)),
        Case(mask="explicit", length=trap, lens=(trap,), is_negative=True),
        Case(mask="explicit", length=like, lens=(like, max(1, like // 3)), is_left=True, is_strided=True),
        Case(mask="packed", length=length, lens=pieces),
        Case(mask="packed", length=trap, lens=(64, trap - 64 - 128, 128), is_negative=True, is_strided=True),
    )


class Tensors(NamedTuple):
    """query [rows, heads, length, head_dim], key and value with kv_heads; gradient, of the output [rows, length, heads, head_dim]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    gradient: torch.Tensor


def tensors(case: Case, shape: Shape, device: torch.device) -> Tensors:
    """Random rows of the case; the gradient of padding is zero, as the loss leaves it out."""
    generator = torch.Generator(device).manual_seed(704)
    rows, dtype = (1 if case.mask == "packed" else len(case.lens)), DTYPES[shape.dtype]

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, case.length, shape.head_dim, generator=generator, device=device)

    query, key, value, gradient = draw(shape.heads), draw(shape.kv_heads), draw(shape.kv_heads), draw(shape.heads)
    if case.is_negative:
        query, key = 0.1 * query, 0.1 * key
        query[..., 0], key[..., 0] = 1.0, -120.0 * shape.head_dim**0.5
    gradient = (gradient * reference.real(case, device)[:, None, :, None]).to(dtype).transpose(1, 2)
    return Tensors(query.to(dtype), key.to(dtype), value.to(dtype), gradient if case.is_strided else gradient.contiguous())


def judge(backend: str, case: Case, shape: Shape, device: torch.device) -> Verdict:
    """One backend on one case.

    Raises:
        RuntimeError and others of kernels.REFUSALS: the backend does not take this case.
    """
    given = tensors(case, shape, device)
    leaves = [tensor.clone().requires_grad_() for tensor in given[:3]]
    output = kernels.run(backend, case, *leaves)
    output.backward(given.gradient)
    results = (output.detach(), *(leaf.grad for leaf in leaves))
    names = ("output", "query gradient", "key gradient", "value gradient")
    sick = [f"{int((~torch.isfinite(result)).sum()):,} non-finite values in the {name}" for name, result in zip(names, results, strict=True)
            if result is None or not bool(torch.isfinite(result).all())]  # fmt: skip
    if sick:
        return Verdict(backend=backend, mask=case.mask, state="fail", reason=f"{sick[0]} ({case})")
    error = reference.worst_error(case, given, results)
    limit = max(TOLERANCE[DTYPES[shape.dtype]], NEGATIVE_TOLERANCE if case.is_negative and shape.dtype != "fp32" else 0.0)
    if not error <= limit:
        return Verdict(backend=backend, mask=case.mask, state="fail", reason=f"error {error:.2g} over {limit:g} ({case})", error=error)
    return Verdict(backend=backend, mask=case.mask, state="pass", error=error)


def verdicts(backend: str, shape: Shape, device: torch.device) -> Iterator[Verdict]:
    """One verdict a kind of mask: the first failure, or a pass with the worst error and the time of a pass and its gradient."""
    trap = TRAP if device.type == "cuda" else CPU_TRAP
    for mask in kernels.MASKS[backend]:
        yield _verdict(backend, [case for case in cases(shape, trap) if case.mask == mask], shape, device)


def _verdict(backend: str, of_mask: list[Case], shape: Shape, device: torch.device) -> Verdict:
    worst = 0.0
    for case in of_mask:
        try:
            found = judge(backend, case, shape, device)
        except kernels.REFUSALS as error:
            return Verdict(backend=backend, mask=case.mask, state="unavailable", reason=kernels.refusal(error))
        if found.state == "fail":
            return found
        worst = max(worst, found.error or 0.0)
    milliseconds = kernels.milliseconds(backend, of_mask[0], shape, tensors(of_mask[0], shape, device))
    return Verdict(backend=backend, mask=of_mask[0].mask, state="pass", error=worst, milliseconds=milliseconds)


def main() -> None:
    """Reads {"shape", "backends", "device"} from stdin; writes a line when a backend begins and one per verdict."""
    task = json.loads(sys.stdin.read())
    shape = Shape(**task["shape"])
    device = torch.device("cuda", task["device"] % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for backend in task["backends"]:
        print(json.dumps({"begin": backend}), flush=True)
        for verdict in verdicts(backend, shape, device):
            print(json.dumps({"verdict": verdict.__dict__}), flush=True)
