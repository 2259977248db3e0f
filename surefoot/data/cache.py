"""The cache of tokenised rows: <cache_dir>/rows/<key>/ holds the arrays, the report and the audit of one set of files and settings.

An entry is written aside and renamed, read whole and checked against its SHA-256 sums, and never changed. Rows of a Hub data set are not
kept. At most KEPT entries stay, those used last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.numpy

import surefoot
from surefoot.data import audit, progress, report
from surefoot.data.pipeline import Data
from surefoot.data.report import SourceFile
from surefoot.data.row_log import EVALUATED, TRAINED
from surefoot.data.rows import Places, Rows, flat

if TYPE_CHECKING:
    from surefoot.plan import DataPlan

VERSION = 1  # of the entries' form
KEPT = 10  # entries; one of 147,580 rows takes 0.1 GB
NOT_ABOUT_ROWS = ("audit", "cache_dir")  # fields of a DataPlan
ARRAYS, RECORDS, SUMS = "arrays.safetensors", "records.json", "sums.json"
ROW_ARRAYS = ("offsets", "ids", "trained")


def key(plan: DataPlan, tokenizer: Any, files: tuple[SourceFile, ...]) -> str | None:
    """SHA-256 of everything that makes the rows; None where they are not to be kept (--data_cache=False, a Hub data set).

    Data files and a Jinja file enter with their content, paths as given (they are printed), the code by its files: a change forgets.
    """
    if plan.cache_dir is None or any(file.sha256 is None for file in files):
        return None
    settings = {name: value for name, value in dataclasses.asdict(plan).items() if name not in NOT_ABOUT_ROWS}
    style = Path(plan.prompt_style)
    prompt = _sha256(style.read_bytes()) if style.is_file() else None
    code = [_sha256(file.read_bytes()) for file in sorted(Path(__file__).parent.glob("*.py"))]
    facts = [VERSION, surefoot.__version__, code, settings, prompt, [dataclasses.astuple(file) for file in files], _identity(tokenizer)]
    return _sha256(json.dumps(facts, sort_keys=True, default=str).encode())


def _identity(tokenizer: Any) -> list[Any]:
    """What decides a fast tokenizer's ids. The state of its truncation and padding is left out: it differs from call to call."""
    import tokenizers
    import transformers

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    del backend["truncation"], backend["padding"]
    ruled = tokenizer("a")["input_ids"]  # BOS and EOS as its rule adds them
    template = tokenizer.chat_template
    return [
        transformers.__version__,
        tokenizers.__version__,
        backend,
        tokenizer.special_tokens_map,
        tokenizer.eos_token_id,
        ruled,
        template,
    ]


def kept_or_made(plan: DataPlan, name: str | None, make: Callable[[], Data], *, shows_progress: bool = False) -> Data:
    """The entry of that key, else what make() gives, which is kept. Of several processes one makes it and the others read.

    The report says where the rows came from, and what was wrong with the cache: a damaged entry is made again, and a folder that cannot
    be written is done without.
    """
    import filelock

    if name is None or plan.cache_dir is None:
        return make()
    entry = Path(plan.cache_dir) / "rows" / name
    found, _ = _read(entry)
    if found is not None:
        return found
    lock = filelock.FileLock(entry.with_suffix(".lock"))
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, shows_progress)
    except (OSError, NotImplementedError) as error:  # the latter where the file system knows no locks
        return _noted(make(), f"cache: the rows are not kept, for {entry.parent} cannot be written: {error}")
    try:
        found, damage = _read(entry)
        if found is not None:
            return found
        data = make()
        complaint = _keep(data, entry)
    finally:
        lock.release()
    notes = [f"cache: {entry} is damaged ({damage}), made again"] if damage else []
    return _noted(data, *notes, *([f"cache: the rows are not kept: {complaint}"] if complaint else []))


def _acquire(lock: Any, shows_progress: bool) -> None:
    import filelock

    try:
        lock.acquire(timeout=progress.PATIENCE_S)
    except filelock.Timeout:
        if shows_progress:
            print("waiting for another process, which tokenises the same rows", flush=True)
        lock.acquire()


def _noted(data: Data, *notes: str) -> Data:
    return dataclasses.replace(data, report=data.report.noting(*notes))


def _read(entry: Path) -> tuple[Data | None, str]:
    """What the entry holds, or how it is damaged; (None, "") where there is none."""
    try:
        sums = json.loads((entry / SUMS).read_bytes())
        content = {name: (entry / name).read_bytes() for name in (ARRAYS, RECORDS)}
    except (OSError, ValueError) as error:
        return None, (str(error) if entry.exists() else "")
    wrong = [name for name, raw in content.items() if not isinstance(sums, dict) or sums.get(name) != _sha256(raw)]
    if wrong:
        return None, f"{' and '.join(wrong)}: not the bytes that were written"
    with contextlib.suppress(OSError):  # a folder of another user's
        os.utime(entry)  # its last use
    return _data(safetensors.numpy.load(content[ARRAYS]), json.loads(content[RECORDS])), ""


def _data(arrays: dict[str, Any], records: dict[str, Any]) -> Data:
    columns = {name: arrays[f"column.{name}"] for name in records["columns"]}
    seen = audit.from_totals(records["audit"], columns)
    places = Places(seen.files, columns["file"], columns["line"])
    train, held = (_rows(arrays, side, places.take(seen.sources(side))) for side in (TRAINED, EVALUATED))
    told = dataclasses.replace(report.from_record(records["report"]), from_cache=True)
    return Data(train=train, eval=held if len(held) else None, audit=seen, report=told)


def _rows(arrays: dict[str, Any], side: str, places: Places) -> Rows:
    return Rows(places=places, **{name: arrays[f"{side}.{name}"] for name in ROW_ARRAYS})


def _keep(data: Data, entry: Path) -> str:
    """Writes the entry and removes the oldest ones. Returns what went wrong."""
    arrays = {f"column.{name}": column for name, column in data.audit.columns.items()}
    for side, rows in ((TRAINED, data.train), (EVALUATED, data.eval or flat([], data.train.places))):
        arrays |= {f"{side}.{name}": getattr(rows, name) for name in ROW_ARRAYS}
    records = {"report": data.report.as_record(), "audit": data.audit.totals(), "columns": list(data.audit.columns)}
    content = {ARRAYS: safetensors.numpy.save(arrays), RECORDS: json.dumps(records).encode()}
    sums = {name: _sha256(raw) for name, raw in content.items()}
    partial = entry.with_name(f".{entry.name}.{os.getpid()}")
    try:
        for left in entry.parent.glob(f".{entry.name}.*"):  # of a process that was killed; this one holds the lock
            shutil.rmtree(left)
        partial.mkdir()
        for name, raw in (content | {SUMS: json.dumps(sums).encode()}).items():
            (partial / name).write_bytes(raw)
        _remove(entry)
        partial.rename(entry)
        _forget_oldest(entry.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        return str(error)
    return ""


def _forget_oldest(folder: Path) -> None:
    entries = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    for entry in sorted(entries, key=lambda entry: -entry.stat().st_mtime)[KEPT:]:
        _remove(entry)
        entry.with_suffix(".lock").unlink(missing_ok=True)


def _remove(entry: Path) -> None:
    """Out of every reader's sight at once; one that has it half read finds it gone and makes the rows itself."""
    if entry.exists():
        gone = entry.with_name(f".{entry.name}.{os.getpid()}.gone")
        entry.rename(gone)
        shutil.rmtree(gone)


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()
