"""Who holds up a run, told from the ranks' signs of life."""

from __future__ import annotations

import pytest

from surefoot.training.heartbeat import Beat, Seen, stalled


def seen(step: int, phase: str, moved: float, ticked: float = 100.0) -> Seen:
    return Seen(Beat(step, phase, 1, 1, "host, pid 1"), moved, ticked)


@pytest.mark.parametrize(
    ("ranks", "culprit"),
    [
        ([seen(7, "forward", 99), seen(7, "data", 95)], None),
        ([seen(7, "backward", 85), seen(7, "data", 84)], 1),
        ([seen(7, "forward", 84), seen(7, "backward", 85)], 0),
        ([seen(8, "data", 80), seen(7, "update", 80)], 1),
        ([seen(7, "backward", 95), seen(7, "backward", 80, 80)], 1),
        ([seen(7, "checkpoint", 84), seen(7, "done", 20, 20)], 0),
        ([seen(7, "checkpoint", 95), seen(7, "done", 20, 20)], None),
        ([seen(0, "start", 85), Seen(None, 80, 80)], 1),
    ],
    ids=["all_move", "no_data", "in_forward", "a_step_behind", "stopped_process", "left_alone", "other_is_done", "never_begun"],
)
def test_rank_when_none_moves_then_the_furthest_behind_is_named(ranks: list[Seen], culprit: int | None) -> None:
    assert stalled(dict(enumerate(ranks)), now=100.0, timeout_s=10.0) == culprit
