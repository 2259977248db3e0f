"""HostMemory: the inputs of recomputing layers wait for the backward pass in pinned host memory, copied while the GPU computes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass(eq=False, weakref_slot=True, slots=True)
class _Parked:
    """A tensor in host memory; `before` was parked just before it and will be asked for just after it."""

    host: Tensor
    device: torch.device
    before: weakref.ref[_Parked] | None
    fetched: Tensor | None = None
    arrived: torch.cuda.Event | None = None


class HostMemory:
    """Copies run on a stream of their own: out while the next layers compute, back one layer ahead of the backward pass.

    Tensors on a CPU stay where they are.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._last: weakref.ref[_Parked] | None = None

    def around(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """checkpoint(), whose saved inputs go to host memory; what the recomputed layer itself saves is not touched."""

        def parking(*args: Any, **named: Any) -> Any:
            with saved_tensors_hooks(self.park, self.bring_back):
                return checkpoint(*args, **named)

        return parking

    def park(self, tensor: Tensor) -> Tensor | _Parked:
        if not tensor.is_cuda:
            return tensor
        self._stream = self._stream or torch.cuda.Stream(tensor.device)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)  # torch keeps freed pinned memory for the next step
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        parked = _Parked(host, tensor.device, self._last)
        self._last = weakref.ref(parked)
        return parked

    def bring_back(self, parked: Tensor | _Parked) -> Tensor:
        if isinstance(parked, Tensor):
            return parked
        self._fetch(parked)
        tensor, here = parked.fetched, torch.cuda.current_stream(parked.device)
        assert tensor is not None
        assert parked.arrived is not None
        here.wait_event(parked.arrived)
        tensor.record_stream(here)
        parked.fetched = None
        if parked.before is not None and (next_one := parked.before()) is not None:
            self._fetch(next_one)
        return tensor

    def _fetch(self, parked: _Parked) -> None:
        if parked.fetched is not None or self._stream is None:
            return
        with torch.cuda.stream(self._stream):
            parked.fetched = parked.host.to(parked.device, non_blocking=True)
            parked.arrived = self._stream.record_event()
