"""report.html of one run: what was asked, what was decided and why, what was found, what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from surefoot.report import parts, records
from surefoot.report.records import Run

DATA = (
    "rows_read", "train_rows", "eval_rows", "split", "formats", "styles",
    "tokens", "trained_tokens", "mean_length", "p95_length", "max_length",
)  # fmt: skip
SAMPLES, CHARACTERS = 12, 600  # shown of the changed answers, and of each
FIGURES = {
    "steps": "steps", "train_loss": "mean training loss", "eval_loss": "evaluation loss", "tokens": "tokens", "seconds": "seconds",
    "peak_memory_gib": "peak memory, GiB", "trainable_parameters": "trainable parameters",
}  # fmt: skip


@contextmanager
def kept(folder: str, *, is_main: bool) -> Iterator[None]:
    """Writes the report when the run inside ends, however it ends; nothing where it left no run.json."""
    try:
        yield
    finally:
        if is_main and Path(folder, "run.json").is_file():
            try:
                write(Path(folder))
            except OSError as error:  # the run itself is saved, or has an error of its own to tell
                print(f"report.html could not be written: {error}", flush=True)


def write(folder: Path) -> Path:
    """Makes folder/report.html anew. Raises UsageError: the folder holds no run."""
    path = folder / "report.html"
    path.write_text(of(records.read(folder)), encoding="utf-8")
    return path


def of(run: Run) -> str:
    """The page of a run."""
    asked = [(choice["name"], choice["value"], choice["source"]) for choice in run.choices if choice["source"].startswith(("flag", "file"))]
    return parts.page(
        run.name,
        _outcome(run),
        parts.section("Curves", parts.curves([run])),
        parts.section("Evaluation", _evaluation(run)),
        parts.section("Answers before and after", _answers(run)),
        parts.section("What was asked", parts.table(("flag", "value", "from"), asked)),
        parts.section("What was decided", _machine(run), _decided(run), _notes(run)),
        parts.section("Data", _data(run.record.get("data") or {})),
        parts.section("Attention canary", _canary(run.record.get("plan", {}).get("attention"))),
        parts.section("Health", _health(run)),
    )


def _outcome(run: Run) -> str:
    code = run.record.get("code") or {}
    rows: list[tuple[str, Any]] = [("status", parts.status(run)), ("started", run.record.get("started"))]
    rows += [("took", parts.minutes(run))] if parts.minutes(run) else []
    rows += [(text, run.summary[key]) for key, text in FIGURES.items() if key in run.summary]
    if run.summary.get("seconds"):
        rows.append(("tokens/s over all", run.summary.get("tokens", 0) / run.summary["seconds"]))
    commit = f"{code.get('commit') or 'no commit'}{', with changes' if code.get('is_clean') is False else ''}"
    rows.append(("code", f"surefoot {code.get('surefoot', '?')}, {commit}"))
    return parts.facts(rows)


def _machine(run: Run) -> str:
    here = run.record.get("plan", {}).get("machine") or {}
    gpus = here.get("gpus") or []
    what = f"{len(gpus)} x {gpus[0]['name']}" if gpus else f"no GPU, {here.get('cpu_count', '?')} CPU cores"
    versions = [f"{name} {version}" for name, version in (here.get("versions") or {}).items() if name in ("torch", "transformers", "peft")]
    return f"<p>{escape('; '.join([what, ', '.join(versions), 'backend ' + str(run.record.get('plan', {}).get('backend'))]))}</p>"


def _decided(run: Run) -> str:
    heads = ("choice", "value", "source", "reason")
    rows = [tuple(choice[name] for name in ("name", "value", "source", "reason")) for choice in run.choices]
    said = [row for row in rows if row[3]]
    rest = [row[:3] for row in rows if not row[3]]
    more = f"<details><summary>{len(rest)} more with nothing to say</summary>\n{parts.table(heads[:3], rest)}</details>" if rest else ""
    return parts.table(heads, said) + more


def _notes(run: Run) -> str:
    return "".join(f"<p>note: {escape(note)}</p>" for note in run.record.get("plan", {}).get("notes", []))


def _data(data: Mapping[str, Any]) -> str:
    if not data:
        return ""
    passed = str(data.get("verdict", "")).startswith("passed")
    rows: list[tuple[str, Any]] = [("audit", parts.verdict(str(data.get("verdict", "")), is_good=passed))]
    rows += [(name.replace("_", " "), data[name]) for name in DATA if name in data]
    rows += [(f"dropped: {reason}", f"{drop['rows']:,}, first {drop['first']}") for reason, drop in (data.get("dropped") or {}).items()]
    rows += [("file", f"{file['path']} (sha256 {(file.get('sha256') or 'unknown')[:16]})") for file in data.get("files", [])]
    return parts.facts(rows)


def _canary(attention: Mapping[str, Any] | None) -> str:
    if not attention:
        return "<p>Not asked: nothing but eager attention, or no GPU, was in question.</p>"
    rows = [
        (v["backend"], v["mask"], parts.verdict(v["state"], is_good=v["state"] == "pass"), v["error"], v["milliseconds"], v["reason"])
        for v in attention["rows"]
    ]
    heads = ("backend", "mask", "verdict", "error against fp64", "ms", "reason")
    return parts.table(heads, rows) + f"<p>{escape(str(attention['origin']))}</p>"


def _health(run: Run) -> str:
    summary = run.summary
    if not summary:
        return ""
    memory = summary.get("memory") or {}
    bad, spikes, still = (summary.get(name) or [] for name in ("bad_steps", "loss_spikes", "still_tensors"))
    found = {"skipped steps": bad, "loss spikes": spikes, "tensors that did not move": still}
    rows: list[tuple[str, Any]] = [(name, parts.verdict(parts.plain(one), is_good=not one)) for name, one in found.items()]
    if memory.get("measured_peak_gib"):
        rows.append(("memory, GiB", f"{memory['estimated_gib']} estimated, {memory['measured_peak_gib']} measured"))
    return parts.facts(rows)


def _evaluation(run: Run) -> str:
    rows = []
    for name, one in (run.evaluation.get("sets") or {}).items():
        sides = one["scores"]
        for metric in next(iter(sides.values()), {}):
            gain = one.get("gain", {}).get(metric)
            rows.append(
                (name, metric, *(_score(sides.get(side, {}).get(metric)) for side in ("base", "trained")), _score(gain), one.get("rows"))
            )
    for task, metrics in (run.evaluation.get("lm_eval") or {}).items():
        rows += [(f"lm-eval {task}", metric, "-", f"{value:.4g}", "-", None) for metric, value in metrics.items()]
    return parts.table(("set", "metric", "base", "trained", "gain", "rows"), rows)


def _score(score: Mapping[str, float] | None) -> str:
    if not score:
        return "-"
    return f"{score['value']:.4g}" + (f" ({score['low']:.4g} to {score['high']:.4g})" if "low" in score else "")


def _answers(run: Run) -> str:
    both = [row for row in run.answers if "base" in row and "trained" in row]
    changed = [row for row in both if row["base"].get("text") != row["trained"].get("text")]
    rows = [
        (row["where"], *(_cut(text) for text in (row["reference"], row["base"].get("text"), row["trained"].get("text"))))
        for row in changed[:SAMPLES]
    ]
    told = f"<p>The first {len(rows)} of {len(changed):,} answers that changed, of {len(both):,}.</p>" if rows else ""
    return told + parts.table(("row", "reference", "base", "trained"), rows, texts=True)


def _cut(text: str | None) -> str:
    said = text or ""
    return said if len(said) <= CHARACTERS else f"{said[:CHARACTERS]} (and {len(said) - CHARACTERS:,} more characters)"
