"""What comes after gate and up in decoder layers that recompute: computed in the first pass only.

The layer adds down_proj's output to the residual stream and is done. Its backward pass makes the SwiGLU product again by itself, and needs
of down_proj u = x A^T, and under DoRA the raw product, for the gradient of the magnitude: both are kept from the first pass. The operation
asks here when it runs, not when it is traced, so that a compiled layer has one graph for both passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


def _itself(one: Any) -> Any:
    return one


@dataclass(eq=False)
class Pass:
    """While it is entered, once() keeps what it computes, or in the second pass (is_again) gives what was kept."""

    kept: deque[tuple[Tensor, Any]]
    move: Callable[[Any], Any]
    is_again: bool
    token: Token[Pass | None] | None = field(default=None, repr=False)

    def __enter__(self) -> None:
        self.token = _PASS.set(self)

    def __exit__(self, *_: object) -> None:
        assert self.token is not None
        _PASS.reset(self.token)


_PASS: ContextVar[Pass | None] = ContextVar("pass through a recomputing layer", default=None)  # of this thread


def passes(park: Callable[[Tensor], Any] = _itself, bring_back: Callable[[Any], Tensor] = _itself) -> tuple[Pass, Pass]:
    """The contexts of a layer's first pass and of its recompute, as torch.utils.checkpoint's context_fn gives them.

    Args:
        park, bring_back: where a raw product waits, and its way back.
    """
    kept: deque[tuple[Tensor, Any]] = deque()
    return Pass(kept, park, is_again=False), Pass(kept, bring_back, is_again=True)


def once(make: Callable[[], Sequence[Tensor]], blank: Callable[[], Tensor], *, needs_raw: bool) -> tuple[Tensor, Tensor]:
    """down_proj's u and raw product by make(); in a recompute those of the first pass, or blank() for a raw product that nothing needs."""
    now = _PASS.get()
    if now is not None and now.is_again and now.kept:  # nothing is left for a second backward pass of a retained graph
        u, raw = now.kept.popleft()
        return u, now.move(raw) if needs_raw else blank()
    u, raw = make()
    if now is not None and not now.is_again:  # copies: the compiler may write into an operation's output once it has read it
        now.kept.append((u.clone(), now.move(raw.clone()) if needs_raw else None))
    return u, raw
