"""Which rows are held out for evaluation: drawn by the seed from the rows as read, so that no token count moves them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from surefoot.data.formats import Example
from surefoot.errors import UsageError

if TYPE_CHECKING:
    from surefoot.plan import DataPlan


@dataclass(frozen=True, kw_only=True)
class Split:
    """Numbers of the rows of both sides, in file order, and why they are so."""

    train: tuple[int, ...]
    eval: tuple[int, ...]
    reason: str


def hold_out(examples: Mapping[int, Example], plan: DataPlan) -> Split:
    """val_set_size rows drawn from the examples. Rows of equal content stay on one side.

    Raises:
        UsageError: nothing would be left to train on.
    """
    size, reason = _size(len(examples), plan)
    if size == 0:
        return Split(train=tuple(examples), eval=(), reason=reason)
    drawn = _drawn(examples, size, plan.seed)
    if not drawn and not plan.val_set_size_is_default:
        raise UsageError(f"--val_set_size={plan.val_set_size} cannot be held out: the {len(examples)} rows are too often the same row")
    train = tuple(number for number in examples if number not in drawn)
    return Split(train=train, eval=tuple(number for number in examples if number in drawn), reason=reason)


def _size(count: int, plan: DataPlan) -> tuple[int, str]:
    asked = plan.val_set_size
    if asked == 0:
        return 0, "val_set_size=0"
    if plan.val_set_size_is_default:
        small = max(1, count // 10) if count > 1 else 0
        if small < asked:
            return small, f"10 % of {count:,} rows, which is less than the default of {asked:,}"
        return int(asked), "the default"
    size = int(asked) if asked >= 1 else max(1, round(count * asked))
    if size >= count:
        way_out = f"Give --val_set_size={count // 10} or less, or" if count >= 10 else "Give --val_set_size=0, or"
        raise UsageError(
            f"--val_set_size={asked} leaves no row to train on: the data hold {count:,} rows. "
            f"{way_out} evaluation rows of their own with --val_data_path"
        )
    return size, f"val_set_size={asked}"


def _drawn(examples: Mapping[int, Example], size: int, seed: int) -> set[int]:
    """The numbers of `size` rows, fewer only where rows come in equal groups that do not fit."""
    groups: dict[Hashable, list[int]] = {}
    for number, example in examples.items():
        groups.setdefault(_content(example), []).append(number)
    distinct = list(groups.values())
    drawn: set[int] = set()
    for position in np.random.default_rng(seed).permutation(len(distinct)):
        if len(drawn) + len(distinct[position]) <= size:
            drawn.update(distinct[position])
        if len(drawn) == size:
            break
    return drawn


def _content(example: Example) -> Hashable:
    if example.text is not None or example.turns:
        return example.turns, example.context, example.text
    return repr(example.columns)
