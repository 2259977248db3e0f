"""The order of the rows and where a run stands in it."""

from __future__ import annotations

import torch
from accelerate.data_loader import SeedableRandomSampler

from surefoot.training.order import Order


def test_order_when_drawn_then_is_accelerates_and_moves_no_global_state() -> None:
    theirs = SeedableRandomSampler(range(50), data_seed=42)
    theirs.set_epoch(2)
    before = torch.get_rng_state()
    order = Order(50, 42)
    order.epoch = 2
    assert list(order) == list(theirs)
    assert torch.equal(before, torch.get_rng_state())


def test_order_when_grouped_by_length_then_is_every_row_and_each_epoch_its_own() -> None:
    lengths = [(7 * row) % 64 + 1 for row in range(200)]
    order = Order(200, 1, lengths, 4)
    assert sorted(order.of(0)) == list(range(200))
    assert order.of(0) == order.of(0) != order.of(1)
    assert lengths[order.of(0)[0]] == max(lengths)  # transformers puts the longest first: memory runs out at once or never


def test_cursor_when_the_epoch_ends_then_stands_at_the_next_ones_start() -> None:
    order = Order(56, 3)
    assert [order.cursor(step, 7, 8)[name] for step in (6, 7) for name in ("epoch", "rows")] == [0, 48, 1, 0]
    assert order.cursor(7, 7, 8) != Order(56, 4).cursor(7, 7, 8)
