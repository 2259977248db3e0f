"""FSDP2's clipping and AdamW on each process's pieces against PyTorch's through DTensor: two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from surefoot.training import pace

SHAPES = ((5, 3), (1, 4), (8,))  # in pieces of unequal sizes, one process has none of the second


def parameters(scale: float) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    mesh = init_device_mesh("cpu", (2,))
    found = []
    for shape in SHAPES:
        value, gradient = torch.randn(2, *shape, generator=generator)
        parameter = torch.nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
        parameter.grad = distribute_tensor(gradient * scale, mesh, [Shard(0)])
        found.append(parameter)
    return found


def compare(rank: int, store: str, scale: float, fused: bool) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    ours, theirs = parameters(scale), parameters(scale)
    steps = [torch.optim.AdamW(group, lr=0.1, weight_decay=0.1, fused=fused) for group in (ours, theirs)]
    pace.step_on_pieces(steps[0])
    for _ in range(2):
        norm = pace.clip_pieces(ours, 1.0)
        expected = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        assert isinstance(expected, DTensor)
        torch.testing.assert_close(norm, expected.full_tensor())
        for step in steps:
            step.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.full_tensor(), other.full_tensor())
        assert all(isinstance(steps[0].state[mine][name], DTensor) for name in ("exp_avg", "exp_avg_sq")), "as checkpoints keep them"
    dist.destroy_process_group()


@pytest.mark.parametrize(("scale", "fused"), [(10.0, True), (10.0, False), (0.01, True)])
def test_step_when_each_process_has_pieces_then_is_that_of_the_whole_tensors(scale: float, fused: bool, tmp_path: Path) -> None:
    mp.spawn(compare, (str(tmp_path / "store"), scale, fused), nprocs=2)


def test_optimizer_of_another_kind_when_given_then_is_left_alone() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    pace.step_on_pieces(optimizer)
    assert "_init_group" not in vars(optimizer)
