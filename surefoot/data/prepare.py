"""prepare(): the rows of a DataPlan, from the cache or made, and past the audit. The same on every rank."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from surefoot.data import cache, masking, pipeline, report
from surefoot.data.audit import AuditError
from surefoot.data.pipeline import Data

if TYPE_CHECKING:
    from surefoot.plan import DataPlan

__all__ = ["Data", "prepare"]


def prepare(plan: DataPlan, tokenizer: Any, *, shows_progress: bool = False) -> Data:
    """The rows of the plan, if they pass the audit.

    Args:
        shows_progress: one process of a run may say how far it is; the others stay silent.

    Raises:
        AuditError: more lost or sick rows than the audit's limits allow, and --audit=fail.
        UsageError: a path, the prompt file or val_set_size cannot be used.
        DataError: rows that cannot be read, or none left.
    """
    return judged(load(plan, tokenizer, shows_progress=shows_progress), plan.audit)


def load(plan: DataPlan, tokenizer: Any, *, shows_progress: bool = False) -> Data:
    """prepare() without the audit's say."""
    encoder = masking.make_encoder(tokenizer)
    files = report.source_files((*plan.data_path, *(plan.val_data_path or ())))
    name = cache.key(plan, tokenizer, files)

    def make() -> Data:
        return pipeline.make(plan, encoder, files, shows_progress=shows_progress)

    return cache.kept_or_made(plan, name, make, shows_progress=shows_progress)


def judged(data: Data, audit: str) -> Data:
    """The data as they are where they pass; under --audit=warn with the complaint as the report's last line.

    Raises:
        AuditError: they do not pass, and --audit=fail.
    """
    complaint = data.audit.complaint()
    if not complaint:
        return data
    text = f"--audit={audit}: the rows do not pass:\n{complaint}"
    if audit == "fail":
        raise AuditError(f"{text}\nMend them, or go on as they are with --audit=warn", data.audit)
    return dataclasses.replace(data, report=data.report.noting(text))
