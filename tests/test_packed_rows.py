"""Packed rows as data: what lies together, how long a packed row is, and its tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from surefoot.data import packing
from surefoot.data.packing import PackedRows, Recipe, best_fit
from surefoot.data.rows import Collator
from tests.packed import PAD, collated, commonsense_lengths, rows_of


@pytest.mark.parametrize(("slots", "least"), [(1024, 0.97), (2048, 0.985), (8192, 0.99)])
def test_packed_rows_when_rows_are_short_then_are_filled_and_hold_each_row_once(slots: int, least: float) -> None:
    lengths = commonsense_lengths(20_000)
    packed = best_fit(lengths, slots, seed=42)
    assert abs(lengths.mean() - 137) < 3
    assert lengths.sum() / (len(packed) * slots) >= least
    assert max(lengths[rows].sum() for rows in packed) <= slots
    assert np.array_equal(np.sort(np.concatenate(packed)), np.arange(len(lengths)))


def test_packed_rows_when_made_again_then_are_the_same_and_another_seed_makes_others() -> None:
    lengths = commonsense_lengths(2_000)
    first, again, other = (PackedRows(rows_of(*lengths), best_fit(lengths, 1024, seed), 1024).digest() for seed in (42, 42, 43))
    assert first == again
    assert first != other


@pytest.mark.parametrize("processes", [1, 2, 7])
def test_packed_rows_when_processes_share_them_then_are_equally_many_for_each(processes: int) -> None:
    lengths = commonsense_lengths(500)
    packed = best_fit(lengths, 1024, 42, processes)
    assert len(packed) % processes == 0
    assert np.array_equal(np.sort(np.concatenate(packed)), np.arange(500))
    assert len(best_fit(np.full(3, 500), 512, 42, processes)) == 3  # a row each: there is nothing to split


@pytest.mark.parametrize(
    ("mean", "longest", "batch_size", "processes", "budget", "pack_len", "made"),
    [
        (137, 256, 128, 1, 1024, None, Recipe(1024, 17)),
        (137, 256, 128, 1, 32768, None, Recipe(17920, 1)),
        (137, 256, 128, 1, 1024, 8192, Recipe(8192, 2)),
        (137, 256, 128, 4, 1024, None, Recipe(896, 5)),
        (137, 256, 2, 1, 1024, None, Recipe(320, 1)),
        (137, 250, 1, 1, 250, None, Recipe(256, 1)),
        (137, 256, 16, 1, 256, None, Recipe(256, 9)),
        (137, 256, 8, 8, 1024, 2048, Recipe(2048, 1)),
    ],
)
def test_recipe_when_chosen_then_a_step_holds_about_batch_size_rows_within_the_budget(
    mean: int, longest: int, batch_size: int, processes: int, budget: int, pack_len: int | None, made: Recipe
) -> None:
    lengths = np.array([mean] * 998 + [longest, 2 * mean - longest])
    assert packing.recipe(lengths, batch_size, processes, budget, pack_len) == made


def test_packed_row_when_collated_then_is_its_rows_end_to_end_with_restarting_positions() -> None:
    rows = rows_of(5, 9, 1, 7)
    packed, collator = collated(rows, [[3, 0], [1, 2]], slots=32)
    batch = collator([packed[0]])
    ids = np.concatenate([rows[3]["input_ids"], rows[0]["input_ids"], np.full(20, PAD)])
    assert batch["input_ids"].tolist() == [ids.tolist()]
    labels = np.concatenate([rows[3]["labels"], rows[0]["labels"], np.full(20, -100)])
    labels[[0, 7]] = -100
    assert batch["labels"].tolist() == [labels.tolist()]
    assert batch["position_ids"].tolist() == [[*range(7), *range(5), *range(9), *range(9), 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 7, 12, 21, 30, 32]
    assert (batch["max_length_q"], batch["max_length_k"]) == (9, 9)
    assert batch["lengths"].tolist() == [7, 5]
    assert [packed.where(row) for row in batch["rows"].tolist()] == ["rows.jsonl:4", "rows.jsonl:1"]
    assert "attention_mask" not in batch


def test_packed_rows_when_collated_then_all_have_one_shape_and_rows_to_evaluate_keep_theirs() -> None:
    lengths = commonsense_lengths(60)
    rows = rows_of(*lengths)
    packed, collator = collated(rows, [piece.tolist() for piece in best_fit(lengths, 1024, 42)], slots=1024)
    batches = [collator([packed[index]]) for index in range(len(packed))]
    shapes = {tuple((name, tuple(value.shape)) for name, value in batch.items() if torch.is_tensor(value))[:5] for batch in batches}
    assert len(batches) > 5
    assert len(shapes) == 1
    assert len({batch["max_length_q"] for batch in batches}) == 1
    assert all(int(batch["cu_seq_lens_q"].diff().max()) <= batch["max_length_q"] for batch in batches)
    assert all(int(batch["cu_seq_lens_q"].diff().min()) >= 0 for batch in batches)
    separate = Collator(pad_token_id=PAD)([rows[0], rows[1]])
    assert all(torch.equal(value, separate[name]) for name, value in collator([rows[0], rows[1]]).items())
