"""make(): from the files of a DataPlan to tokenised rows, their audit and the report."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from surefoot.data import examine, loading, masking, progress, prompts, report, split
from surefoot.data.audit import Audit, AuditError
from surefoot.data.formats import Dropped, Example, normalise, recognise
from surefoot.data.masking import Encoded
from surefoot.data.prompts import Rendered
from surefoot.data.report import DataReport, Drop, SourceFile, Tally
from surefoot.data.row_log import CUT, DROPPED, EVALUATED, MASKED, TRAINED, RowLog
from surefoot.data.rows import Rows, flat
from surefoot.errors import DataError

if TYPE_CHECKING:
    from surefoot.data.packing import PackedRows
    from surefoot.plan import DataPlan

BATCH = 1000  # rows a call of the tokenizer, whose threads share them


@dataclass(frozen=True, kw_only=True)
class Data:
    """What the trainer gets; eval is None when no row is held out, packed when rows are not packed."""

    train: Rows
    eval: Rows | None
    audit: Audit
    report: DataReport
    packed: PackedRows | None = None


def make(plan: DataPlan, encoder: masking.Encoder, files: tuple[SourceFile, ...], *, shows_progress: bool) -> Data:
    """Reads, recognises, splits, renders, tokenises and audits the rows. What the audit found is not judged here.

    Args:
        files: those of the plan, for the report.

    Raises:
        UsageError: a path, the prompt file or val_set_size cannot be used.
        DataError: rows that cannot be read, or none left.
    """
    works = _Works(
        plan=plan,
        prompts=prompts.load(plan.prompt_style, encoder.tokenizer),
        encoder=encoder,
        tally=Tally(),
        log=RowLog(),
        shows_progress=shows_progress,
    )
    examples = works.read(plan.data_path)
    if plan.val_data_path:
        given = works.read(plan.val_data_path)
        parts = split.Split(train=tuple(examples), eval=tuple(given), reason="--val_data_path")
        examples |= given
    else:
        parts = split.hold_out(examples, plan)
    train = works.tokenise({number: examples[number] for number in parts.train}, TRAINED)
    held = works.tokenise({number: examples[number] for number in parts.eval}, EVALUATED) if parts.eval else None
    words = {"cutoff_len": plan.cutoff_len, "advice": report.cutoff_advice(works.log.lengths(), plan.cutoff_len)}
    audit = examine.make_audit(works.log, train, held, examine.end_tokens(encoder.tokenizer), words)
    for rows, purpose in ((train, "to train on"), (held, "to evaluate on")):
        if rows is not None and not len(rows):
            raise AuditError(f"no row is left {purpose}. {works.losses()}", audit)
    return Data(train=train, eval=held, audit=audit, report=_report(works, files, parts.reason, train, held, audit))


@dataclass(frozen=True, kw_only=True)
class _Works:
    """The rows' way from file to token, and the record of what happens on it."""

    plan: DataPlan
    prompts: prompts.Prompts
    encoder: masking.Encoder
    tally: Tally
    log: RowLog
    shows_progress: bool

    def read(self, paths: Sequence[str]) -> dict[int, Example]:
        """The rows of the files that hold something to train on, by their index in the log."""
        examples = {}
        for row in loading.read_rows(paths, self.plan.data_split):
            example = normalise(row, self.plan.text_field, allows_unknown=self.prompts.allows_unknown)
            if isinstance(example, Dropped):
                index = self.log.add(row, recognise(row.columns, self.plan.text_field) or "columns")
                self.log.drop(index, example.reason)
                continue
            self.tally.formats[example.format] += 1
            self.tally.cut_turns += example.cut_turns
            self.tally.layouts[example.format, tuple(row.columns)] += 1
            examples[self.log.add(row, example.format)] = example
        if not examples:
            raise DataError(f"no row is left in {', '.join(paths)}. {self.losses()}")
        return examples

    def tokenise(self, examples: Mapping[int, Example], side: str) -> Rows:
        """The examples as tokens, those over the cut-off dropped or cut; side is the fate of those that stay."""
        kept: list[Encoded] = []
        places: list[int] = []
        for batch in progress.batches(list(examples.items()), BATCH, shows_progress=self.shows_progress):
            rendered = self._rendered(batch)
            for index, row in zip(rendered, self.encoder.encode(list(rendered.values())), strict=True):
                fitting = self._fitting(row, index, side)
                if fitting is not None:
                    kept.append(fitting)
                    places.append(index)
        self._refuse_overlong()
        return flat(kept, self.log.places().take(np.array(places, dtype=np.int64)))

    def _rendered(self, batch: Sequence[tuple[int, Example]]) -> dict[int, Rendered]:
        texts = {}
        for index, example in batch:
            text = self.prompts.render(example)
            if isinstance(text, Dropped):
                self.log.drop(index, text.reason)
                continue
            self.tally.styles[text.style] += 1
            if len(self.tally.systems) < 2:
                self.tally.systems.add(example.system)
            self.log.templates[index] = text.style
            texts[index] = text
        return texts

    def _fitting(self, row: Encoded, index: int, side: str) -> Encoded | None:
        self.log.tokens[index], self.log.answers[index], self.log.fates[index] = len(row.ids), int(row.trained.sum()), side
        if not masking.is_trainable(row):
            self.log.fates[index] = MASKED
            return None
        if len(row.ids) <= self.plan.cutoff_len:
            return self._labelled(row)
        shorter = masking.cut_prompt(row, self.plan.cutoff_len) if self.plan.overlong == "truncate_prompt" else None
        if shorter is None:
            self.log.drop(index, self._too_long)
            return None
        self.log.fates[index] = side + CUT
        return self._labelled(shorter)

    def _labelled(self, row: Encoded) -> Encoded:
        return row._replace(trained=np.ones_like(row.trained)) if self.plan.train_on_inputs else row

    @property
    def _too_long(self) -> str:
        what = "an answer that does not fit into" if self.plan.overlong == "truncate_prompt" else "more tokens than"
        return f"{what} cutoff_len={self.plan.cutoff_len}"

    def _refuse_overlong(self) -> None:
        drop = self.dropped().get(self._too_long)
        if drop and self.plan.overlong == "error":
            lengths = self.log.lengths()
            raise DataError(
                f"{drop.first}: over --cutoff_len={self.plan.cutoff_len}, and --overlong=error. {drop.rows:,} of "
                f"{len(lengths):,} rows are; the longest has {lengths.max():,} tokens. "
                f"{report.cutoff_advice(lengths, self.plan.cutoff_len)}; --overlong=drop or truncate_prompt goes on without"
            )

    def dropped(self) -> dict[str, Drop]:
        """The dropped rows by reason."""
        first: dict[str, int] = {}
        rows: Counter[str] = Counter()
        for index, fate in enumerate(self.log.fates):
            if fate.startswith(DROPPED):
                first.setdefault(fate.removeprefix(DROPPED), index)
                rows[fate.removeprefix(DROPPED)] += 1
        return {reason: Drop(rows=rows[reason], first=self._place(reason, index)) for reason, index in first.items()}

    def _place(self, reason: str, index: int) -> str:
        tokens = f" ({self.log.tokens[index]:,} tokens)" if reason == self._too_long else ""
        return self.log.rows[index].where + tokens

    def losses(self) -> str:
        """The dropped rows as a sentence, for messages."""
        dropped, lengths = self.dropped(), self.log.lengths()
        reasons = "; ".join(f"{drop.rows:,} with {reason} (first {drop.first})" for reason, drop in dropped.items())
        advice = f". {report.cutoff_advice(lengths, self.plan.cutoff_len)}" if self._too_long in dropped else ""
        return f"Dropped of {len(self.log.rows):,} rows: {reasons}{advice}"


def _report(works: _Works, files: tuple[SourceFile, ...], reason: str, train: Rows, held: Rows | None, audit: Audit) -> DataReport:
    lengths, tally, plan = train.lengths, works.tally, works.plan
    return DataReport(
        rows_read=len(works.log.rows),
        train_rows=len(train),
        eval_rows=len(held) if held is not None else 0,
        split=reason,
        formats=dict(tally.formats),
        styles=dict(tally.styles),
        system=tally.system,
        dropped=works.dropped(),
        truncated=sum(fate.endswith(CUT) for fate in works.log.fates),
        cut_turns=tally.cut_turns,
        unused_columns={} if works.prompts.file else tally.unused(plan.text_field),
        tokens=audit.tokens,
        trained_tokens=audit.trained_tokens,
        mean_length=round(float(np.mean(lengths)), 1),
        p95_length=int(np.quantile(lengths, 0.95, method="higher")),
        max_length=max(lengths),
        advice=report.cutoff_advice(works.log.lengths(), plan.cutoff_len),
        files=files,
        fingerprint=hashlib.sha256((train.digest() + (held.digest() if held is not None else "")).encode()).hexdigest(),
        reasons={finding.reason: finding.rows for finding in audit.findings},
        verdict=audit.verdict(),
    )
