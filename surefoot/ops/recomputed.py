"""down_proj's product in decoder layers that recompute: made in the first pass and not again.

A decoder layer adds it to the residual stream and is done. Its backward pass needs nothing of it (LoRA), or the raw product for the
gradient of the magnitude (DoRA), which is kept from the first pass. The operation asks here when it runs, not when it is traced, so that a
compiled layer has one graph for both passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


def _itself(one: Any) -> Any:
    return one


@dataclass(eq=False)
class Pass:
    """While it is entered, product() keeps what it makes, or in the second pass (is_again) gives what was kept."""

    kept: deque[Any]
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
        park, bring_back: where a kept product waits, and its way back.
    """
    kept: deque[Any] = deque()
    return Pass(kept, park, is_again=False), Pass(kept, bring_back, is_again=True)


def product(make: Callable[[], Tensor], blank: Callable[[], Tensor], *, is_needed: bool) -> Tensor:
    """make(); in a recompute the product of the first pass where the backward pass needs it, else blank()."""
    now = _PASS.get()
    if now is None:
        return make()
    if now.is_again:
        if not is_needed:
            return blank()
        return now.move(now.kept.popleft()) if now.kept else make()  # none is left for a second backward pass of a retained graph
    raw = make()
    if is_needed:
        now.kept.append(now.move(raw.clone()))  # a copy: the compiler may write into an operation's output once it has read it
    return raw
