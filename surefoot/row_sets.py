"""Which rows are evaluated on: commonsense tasks by name, files, or the rows that a run held out itself."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from surefoot.data import loading, split
from surefoot.data.formats import Dropped, Example, normalise
from surefoot.data.loading import SourceRow
from surefoot.errors import DataError, UsageError
from surefoot.evaluation import answers
from surefoot.inference import Source
from surefoot.plan import DataPlan


class RowSet(NamedTuple):
    """Rows with one line in the table. task: one of the commonsense tasks, which says what counts as an answer; None for free text."""

    name: str
    task: str | None
    examples: tuple[Example, ...]

    def metrics(self) -> tuple[str, ...]:
        """Those taken unless the user names others."""
        return ("accuracy", "perplexity") if self.task else ("exact_match", "rougeL", "sari", "perplexity")


ENDINGS = ("json", "jsonl", "json.gz", "jsonl.gz")


def of_tasks(names: Sequence[str], folder: Path) -> list[RowSet]:
    """The test rows of commonsense tasks; `all` means those of the eight that the folder holds.

    Raises:
        UsageError: an unknown task, or no file of one. DataError: rows that are not of the task.
    """
    unknown = [name for name in names if name not in (*answers.TASKS, "all")]
    if unknown:
        raise UsageError(f"--dataset={unknown[0]} is not one of {', '.join(answers.TASKS)}, all")
    wanted = [name for name in answers.TASKS if _file(folder, name)] if "all" in names else list(names)
    if not wanted:
        raise UsageError(f"--dataset=all: --data_dir={folder} holds no test file, such as boolq/test.json or test_boolq.jsonl.gz")
    sets = []
    for name in wanted:
        file = _file(folder, name)
        if file is None:
            raise UsageError(f"--dataset={name}: --data_dir={folder} holds neither {name}/test.json nor test_{name}.jsonl (or .gz)")
        rows = loading.read_rows((str(file),), "test")
        wrong = next((row.where for row in rows if not answers.is_answered(row.columns, name)), None)
        if wrong:
            raise DataError(f"{wrong}: not a row of {name}: it needs an instruction, and an answer that matches {answers.pattern(name)}")
        sets.append(RowSet(name, name, _examples([SourceRow({**row.columns, "task": name}, row.where) for row in rows])))
    return sets


def _file(folder: Path, name: str) -> Path | None:
    places = [folder / name / f"test.{ending}" for ending in ENDINGS] + [folder / f"test_{name}.{ending}" for ending in ENDINGS]
    return next((place for place in places if place.is_file()), None)


def of_files(paths: Sequence[str]) -> list[RowSet]:
    """The rows of files; those that name a commonsense task and hold its answer make a set by task, the others one by file. Several files
    name their sets.

    Raises:
        UsageError, DataError: a file that cannot be read.
    """
    sets = []
    for path in paths:
        found = by_task(of_file(path), Path(path).name)
        sets += [one._replace(name=f"{path}: {one.name}" if one.task else path) for one in found] if len(paths) > 1 else found
    return sets


def of_file(path: str | Path) -> tuple[Example, ...]:
    """The rows of a file in its order. Raises UsageError, DataError: it cannot be read, or a row has no answer."""
    return _examples(loading.read_rows((str(path),), "test"))


def held_out(source: Source) -> list[RowSet]:
    """The rows that the run held out from its training, as its run.json says; of files that are still as they were.

    Raises:
        UsageError: the adapter has no run.json, or the run held nothing out. DataError: its files have changed.
    """
    recorded = source.record.get("plan", {}).get("data")
    if not recorded:
        raise UsageError(f"--split=val: {source.name()} has no run.json of a training run. Give --data_path")
    names = ("data_path", "val_data_path")
    plan = DataPlan(**{**recorded, **{name: tuple(recorded[name]) if recorded[name] else None for name in names}})
    _check_unchanged(source)
    if plan.val_data_path:
        return of_files(plan.val_data_path)
    found = [normalise(row, plan.text_field) for row in loading.read_rows(plan.data_path, plan.data_split)]
    examples = {number: one for number, one in enumerate(found) if isinstance(one, Example)}
    numbers = split.hold_out(examples, plan).eval
    if not numbers:
        raise UsageError(
            f"--split=val: the run {source.name()} held no rows out ({split.hold_out(examples, plan).reason}). Give --data_path"
        )
    return by_task([examples[number] for number in numbers], "val")


def by_task(examples: Sequence[Example], name: str) -> list[RowSet]:
    """The rows of each commonsense task as a set, all others together as `name`."""
    sets: dict[tuple[str, str | None], list[Example]] = {}
    for example in examples:
        task = example.columns.get("task")
        is_task = isinstance(task, str) and task in answers.TASKS and answers.is_answered(example.columns, task)
        sets.setdefault((str(task), str(task)) if is_task else (name, None), []).append(example)
    return [RowSet(title, task, tuple(rows)) for (title, task), rows in sets.items()]


def _check_unchanged(source: Source) -> None:
    for file in source.record.get("data", {}).get("files", []):
        path, before = Path(file["path"]), file.get("sha256")
        if before and (not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != before):
            raise DataError(
                f"--split=val: {path} is not the file the run was trained on any more, so its held-out rows cannot be told. Restore it"
            )


def _examples(rows: Sequence[SourceRow]) -> tuple[Example, ...]:
    examples = []
    for row in rows:
        example = normalise(row, "text")
        if isinstance(example, Dropped):
            raise DataError(f"{row.where}: {example.reason}")
        examples.append(example)
    return tuple(examples)
