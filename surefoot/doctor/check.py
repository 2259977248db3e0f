"""Check: one fact about the machine with its verdict and the way out."""

from __future__ import annotations

from typing import NamedTuple

VERDICTS = ("ok", "warn", "bad", "unknown")


class Check(NamedTuple):
    """verdict is one of VERDICTS: bad makes the machine unfit to train; way_out is empty where nothing is to be done.

    usable: of a backend or a stage, whether it can be used here; None for other facts.
    """

    topic: str
    name: str
    verdict: str
    fact: str
    way_out: str = ""
    usable: bool | None = None
