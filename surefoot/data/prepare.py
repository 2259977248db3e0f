"""prepare(): from the paths of a DataPlan to tokenised rows and the report on them. The same on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from surefoot.data import loading, masking, progress, prompts, report, split
from surefoot.data.formats import Dropped, Example, normalise
from surefoot.data.masking import Encoded
from surefoot.data.prompts import Rendered
from surefoot.data.report import DataReport, Tally
from surefoot.data.rows import Rows
from surefoot.errors import DataError

if TYPE_CHECKING:
    from surefoot.plan import DataPlan

BATCH = 1000  # rows a call of the tokenizer, whose threads share them


@dataclass(frozen=True, kw_only=True)
class Data:
    """What the trainer gets; eval is None when no row is held out."""

    train: Rows
    eval: Rows | None
    report: DataReport


def prepare(plan: DataPlan, tokenizer: Any, *, shows_progress: bool = False) -> Data:
    """Reads, recognises, splits, renders and tokenises the rows.

    Args:
        shows_progress: one process of a run may say how far it is; the others stay silent.

    Raises:
        UsageError: a path, the prompt file or val_set_size cannot be used.
        DataError: rows that cannot be trained on, or none left.
    """
    works = _Works(
        plan=plan,
        prompts=prompts.load(plan.prompt_style, tokenizer),
        encoder=masking.make_encoder(tokenizer),
        tally=Tally(),
        shows_progress=shows_progress,
    )
    examples = works.read(plan.data_path)
    parts = split.given(examples, works.read(plan.val_data_path)) if plan.val_data_path else split.hold_out(examples, plan)
    train, held = works.tokenise(parts.train, "to train on"), None
    if parts.eval:
        held = works.tokenise(parts.eval, "to evaluate on")
    return Data(train=train, eval=held, report=_report(works, parts, train, held))


@dataclass(frozen=True, kw_only=True)
class _Works:
    """The rows' way from file to token, and the count of what happens on it."""

    plan: DataPlan
    prompts: prompts.Prompts
    encoder: masking.Encoder
    tally: Tally
    shows_progress: bool

    def read(self, paths: Sequence[str]) -> list[Example]:
        """The rows of the files that hold something to train on."""
        examples = []
        for row in loading.read_rows(paths, self.plan.data_split):
            self.tally.rows += 1
            example = normalise(row, self.plan.text_field, allows_unknown=self.prompts.allows_unknown)
            if isinstance(example, Dropped):
                self.tally.drop(example.reason, row.where)
                continue
            self.tally.formats[example.format] += 1
            self.tally.cut_turns += example.cut_turns
            self.tally.layouts[example.format, tuple(row.columns)] += 1
            examples.append(example)
        self._some_left(examples, "in " + ", ".join(paths))
        return examples

    def tokenise(self, examples: Sequence[Example], purpose: str) -> Rows:
        """The examples as tokens, those over the cut-off dropped or cut."""
        kept: list[Encoded] = []
        for batch in progress.batches(examples, BATCH, shows_progress=self.shows_progress):
            places, rendered = self._rendered(batch)
            for where, row in zip(places, self.encoder.encode(rendered), strict=True):
                fitting = self._fitting(row, where)
                if fitting is not None:
                    kept.append(fitting)
        self._refuse_overlong()
        self._some_left(kept, purpose)
        return Rows(kept)

    def _rendered(self, batch: Sequence[Example]) -> tuple[list[str], list[Rendered]]:
        places, texts = [], []
        for example in batch:
            text = self.prompts.render(example)
            if isinstance(text, Dropped):
                self.tally.drop(text.reason, example.where)
                continue
            self.tally.styles[text.style] += 1
            places.append(example.where)
            texts.append(text)
        return places, texts

    def _fitting(self, row: Encoded, where: str) -> Encoded | None:
        self.tally.lengths.append(len(row.ids))
        if not masking.is_trainable(row):
            self.tally.drop("no token to train on", where)
            return None
        if len(row.ids) <= self.plan.cutoff_len:
            return self._labelled(row)
        shorter = masking.cut_prompt(row, self.plan.cutoff_len) if self.plan.overlong == "truncate_prompt" else None
        if shorter is None:
            self.tally.drop(self._too_long, f"{where} ({len(row.ids):,} tokens)")
            return None
        self.tally.truncated += 1
        return self._labelled(shorter)

    def _labelled(self, row: Encoded) -> Encoded:
        return row._replace(trained=np.ones_like(row.trained)) if self.plan.train_on_inputs else row

    @property
    def _too_long(self) -> str:
        what = "an answer that does not fit into" if self.plan.overlong == "truncate_prompt" else "more tokens than"
        return f"{what} cutoff_len={self.plan.cutoff_len}"

    def _refuse_overlong(self) -> None:
        drop = self.tally.dropped.get(self._too_long)
        if drop and self.plan.overlong == "error":
            raise DataError(
                f"{drop.first}: over --cutoff_len={self.plan.cutoff_len}, and --overlong=error. {drop.rows:,} of "
                f"{len(self.tally.lengths):,} rows are; the longest has {max(self.tally.lengths):,} tokens. "
                f"{self.tally.cutoff_advice(self.plan.cutoff_len)}; --overlong=drop or truncate_prompt goes on without"
            )

    def _some_left(self, rows: Sequence[Any], purpose: str) -> None:
        if not rows:
            advice = f". {self.tally.cutoff_advice(self.plan.cutoff_len)}" if self._too_long in self.tally.dropped else ""
            raise DataError(f"no row is left {purpose}. Dropped of {self.tally.rows:,} rows: {self.tally.reasons()}{advice}")


def _report(works: _Works, parts: split.Split, train: Rows, held: Rows | None) -> DataReport:
    lengths, tally, plan = train.lengths, works.tally, works.plan
    return DataReport(
        rows_read=tally.rows,
        train_rows=len(train),
        eval_rows=len(held) if held is not None else 0,
        shared_rows=parts.shared,
        split=parts.reason,
        formats=dict(tally.formats),
        styles=dict(tally.styles),
        dropped=tally.dropped,
        truncated=tally.truncated,
        cut_turns=tally.cut_turns,
        unused_columns={} if works.prompts.file else tally.unused(plan.text_field),
        tokens=len(train.ids),
        trained_tokens=int(train.trained.sum()),
        mean_length=round(float(np.mean(lengths)), 1),
        p95_length=int(np.quantile(lengths, 0.95, method="higher")),
        max_length=max(lengths),
        advice=tally.cutoff_advice(plan.cutoff_len),
        files=report.source_files((*plan.data_path, *(plan.val_data_path or ()))),
        fingerprint=hashlib.sha256((train.digest() + (held.digest() if held is not None else "")).encode()).hexdigest(),
    )
