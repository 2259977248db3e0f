"""The flat storage and the batches made of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from surefoot.data.masking import Encoded
from surefoot.data.rows import Collator, Places, Rows, flat

PAD = 2


def encoded(ids: list[int], trained: list[int]) -> Encoded:
    return Encoded(np.array(ids, dtype=np.int32), np.array(trained, dtype=np.bool_), 1)


def stored(rows: list[Encoded]) -> Rows:
    """Rows that stand in every third line, from 1 on, of two files in turn."""
    lines = np.arange(len(rows), dtype=np.int32)
    return flat(rows, Places(("a.jsonl", "org/hub-set"), lines % 2, lines * 3 + 1))


ROWS = stored([encoded([1, 5, 6, 2], [0, 0, 1, 1]), encoded([1, 7], [0, 1]), encoded([1, *range(10, 18), 2], [0] * 5 + [1] * 5)])


def test_rows_when_indexed_then_give_ids_and_labels() -> None:
    assert len(ROWS) == 3
    assert ROWS[0]["input_ids"].tolist() == [1, 5, 6, 2]
    assert ROWS[0]["labels"].tolist() == [-100, -100, 6, 2]
    assert ROWS[-1]["input_ids"].tolist() == ROWS[2]["input_ids"].tolist()
    assert ROWS.ids.dtype == np.int32
    assert ROWS.trained.dtype == np.bool_
    assert ROWS.trained_tokens.tolist() == [2, 1, 5]


def test_rows_when_asked_where_they_stand_then_name_file_and_line() -> None:
    assert [ROWS.where(ROWS[index]["row"]) for index in (0, 1, -1)] == ["a.jsonl:1", "org/hub-set:4", "a.jsonl:7"]
    assert ROWS.places.file.dtype == ROWS.places.line.dtype == np.int32


@pytest.mark.parametrize("index", [3, -4])
def test_rows_when_indexed_past_the_end_then_raise_index_error(index: int) -> None:
    with pytest.raises(IndexError):
        ROWS[index]


def test_rows_when_iterated_then_end_and_have_the_lengths_said() -> None:
    assert [len(row["input_ids"]) for row in ROWS] == ROWS.lengths == [4, 2, 10]


def test_rows_when_grouped_by_length_then_the_sampler_finds_the_lengths() -> None:
    sampler = LengthGroupedSampler(2, dataset=ROWS)
    assert sampler.lengths == ROWS.lengths
    assert sorted(sampler) == [0, 1, 2]


def test_digest_when_anything_changes_then_changes() -> None:
    base = [encoded([1, 5], [0, 1]), encoded([6], [1])]
    others = [
        [encoded([1, 6], [0, 1]), encoded([6], [1])],
        [encoded([1, 5], [1, 1]), encoded([6], [1])],
        [encoded([1], [0]), encoded([5, 6], [1, 1])],
    ]
    digests = {stored(rows).digest() for rows in [base, *others]}
    assert len(digests) == 4
    assert stored(base).digest() in digests


@pytest.mark.parametrize(("multiple", "width"), [(8, 16), (1, 10), (64, 64)])
def test_batch_when_collated_then_is_padded_on_the_right_to_the_multiple(multiple: int, width: int) -> None:
    batch = Collator(pad_token_id=PAD, multiple_of=multiple)([ROWS[0], ROWS[2]])
    assert list(batch) == ["input_ids", "labels", "lengths", "rows"]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["input_ids"].shape == batch["labels"].shape == (2, width)
    assert batch["input_ids"][0].tolist() == [1, 5, 6, 2] + [PAD] * (width - 4)
    assert batch["labels"][0].tolist() == [-100, -100, 6, 2] + [-100] * (width - 4)
    assert batch["lengths"].tolist() == [4, 10]
    assert batch["rows"].tolist() == [0, 2]


def test_eos_when_it_is_also_pad_then_is_trained() -> None:
    """Row 0 ends with id 2, which is PAD here."""
    labels = Collator(pad_token_id=PAD)([ROWS[0], ROWS[1]])["labels"]
    assert labels[0, 3] == PAD
    assert labels[0, 4:].eq(-100).all()
    assert labels[1].tolist() == [-100, 7] + [-100] * 6
