"""Which rows are held out: by the seed, never on both sides, never moved by the cut-off, and why so many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from surefoot.errors import UsageError
from tests.test_data_prepare import read_back, ready, texts, write


def test_split_when_drawn_then_takes_its_rows_by_the_seed_and_leaks_none(tmp_path: Path) -> None:
    sides = []
    for seed in (1, 2):
        data = ready(tmp_path, texts(100), val_set_size=20, seed=seed)
        assert data.eval is not None
        train, held = read_back(data.train), read_back(data.eval)
        assert (len(train), len(held)) == (80, 20)
        assert set(train).isdisjoint(held)
        assert set(train) | set(held) == {row["text"] for row in texts(100)}
        sides.append(held)
    assert sides[0] != sides[1]


def test_split_when_rows_repeat_then_keeps_equal_rows_on_one_side(tmp_path: Path) -> None:
    data = ready(tmp_path, texts(20) * 3, val_set_size=12)
    assert data.eval is not None
    held = read_back(data.eval)
    assert len(held) == 12
    assert set(held).isdisjoint(read_back(data.train))


def test_split_when_the_cutoff_drops_rows_then_does_not_move(tmp_path: Path) -> None:
    rows = [{"text": f"row {index} " + "the cat " * (40 if index % 5 == 0 else 1)} for index in range(100)]
    wide, narrow = (ready(tmp_path, rows, val_set_size=20, cutoff_len=cutoff) for cutoff in (1000, 40))
    assert wide.eval is not None
    assert narrow.eval is not None
    assert set(read_back(narrow.eval)) <= set(read_back(wide.eval))
    assert set(read_back(narrow.train)) <= set(read_back(wide.train))
    assert narrow.report.train_rows + narrow.report.eval_rows == 80


@pytest.mark.parametrize(
    ("count", "asked", "is_default", "held", "reason"),
    [
        (40, 0, False, 0, "val_set_size=0"),
        (40, 5, False, 5, "val_set_size=5"),
        (40, 5.0, False, 5, "val_set_size=5.0"),
        (40, 0.25, False, 10, "val_set_size=0.25"),
        (40, 0.001, False, 1, "val_set_size=0.001"),
        (40, 2000, True, 4, "10 % of 40 rows, which is less than the default of 2,000"),
        (5, 2000, True, 1, "10 % of 5 rows, which is less than the default of 2,000"),
        (1, 2000, True, 0, "10 % of 1 rows, which is less than the default of 2,000"),
        (40, 3, True, 3, "the default"),
    ],
)
def test_val_set_size_when_given_or_not_then_holds_out_its_rows_and_says_why(
    tmp_path: Path, count: int, asked: float, is_default: bool, held: int, reason: str
) -> None:
    data = ready(tmp_path, texts(count), val_set_size=asked, val_set_size_is_default=is_default)
    assert (data.report.eval_rows, data.report.train_rows, data.report.split) == (held, count - held, reason)
    assert (data.eval is None) == (held == 0)


@pytest.mark.parametrize(
    ("rows", "asked", "says"),
    [
        (texts(40), 2000, "--val_set_size=2000 leaves no row to train on: the data hold 40 rows. Give --val_set_size=4 or less"),
        (texts(40), 40, "--val_set_size=40 leaves no row to train on"),
        (texts(2), 5, "Give --val_set_size=0, or evaluation rows of their own with --val_data_path"),
        (texts(1) * 9, 3, "--val_set_size=3 cannot be held out: the 9 rows are too often the same row"),
    ],
)
def test_val_set_size_when_it_cannot_be_held_out_then_names_both_numbers(tmp_path: Path, rows: list[Any], asked: float, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        ready(tmp_path, rows, val_set_size=asked)
    assert says in str(caught.value)
    assert caught.value.exit_code == 2


def test_val_data_path_when_given_then_replaces_the_split_and_overlap_is_said(tmp_path: Path) -> None:
    held = write(tmp_path / "held.jsonl", [*texts(2), {"text": "new"}])
    data = ready(tmp_path, texts(30), val_data_path=(held,), val_set_size=10)
    assert (data.report.train_rows, data.report.eval_rows, data.report.reasons["shared"], data.report.rows_read) == (30, 3, 2, 33)
    assert len(data.report.files) == 2
    assert any(line.startswith("overlap: 2 of the evaluation rows") for line in data.report.lines())
