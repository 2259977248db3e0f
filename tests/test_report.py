"""report.html and compare_runs.py: what a real run leaves, what a browser makes of it, and folders that are damaged."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from finetune import train
from surefoot.errors import NumericsError
from surefoot.report import charts, comparison, page, records
from tests.conftest import ROOT
from tests.runs import quick

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)")
ANSWER = {
    "set": "s",
    "where": "rows.jsonl:1",
    "reference": "yes",
    "base": {"text": "<script>alert(1)</script>"},
    "trained": {"text": "yes"},
}
SCORES = {"accuracy": {"value": 0.445, "low": 0.397, "high": 0.494}}
EVALUATION = {"label": "x", "sets": {"s": {"rows": 9, "scores": {"trained": SCORES, "base": {"accuracy": {"value": 0.1}}}, "gain": SCORES}}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> tuple[Path, Path]:
    """Two short runs; the first was evaluated afterwards."""
    folder = tmp_path_factory.mktemp("runs")
    made = [train(**quick(data_path=rows, output_dir=folder / name, adapter_name=name)) for name in ("dora", "lora")]
    (made[0] / "evaluation.json").write_text(json.dumps(EVALUATION))
    (made[0] / "evaluation.jsonl").write_text(json.dumps(ANSWER) + "\n")
    return made[0], made[1]


class Found(HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: dict[str, list[str]] = {}
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def found(source: str) -> Found:
    reader = Found()
    reader.feed(source)
    return reader


def compare(*words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/compare_runs.py"), *map(str, words)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def test_run_when_done_then_its_report_has_plan_audit_curves_and_needs_nothing_else(runs: tuple[Path, Path]) -> None:
    source = (runs[1] / "report.html").read_text(encoding="utf-8")
    shown = found(source)
    assert not {"script", "link", "img", "iframe"} & set(shown.tags)
    assert not any(word in source for word in ("http", "url(", "@import"))
    drawn = shown.attributes["aria-label"]
    assert drawn == [
        f"{name} by step" for name in ("loss", "gradient norm", "learning rate", "tokens/s, padding left out", "peak memory, GiB")
    ]
    record = json.loads((runs[1] / "run.json").read_text())
    assert record["data"]["verdict"] in shown.text
    for choice in record["plan"]["choices"]:
        assert choice["name"] in shown.text
        assert choice["reason"] in shown.text
    losses = [entry for entry in records.read(runs[1]).log if "loss" in entry]
    assert len(losses) == 6
    for entry in losses:
        assert f"training, step {entry['step']}: {entry['loss']:.4g}" in shown.text


def test_run_when_it_fails_then_its_report_says_why(tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from surefoot.training import trainer

    def broken(*_: object) -> None:
        raise NumericsError("step 3: the loss <b>was</b> nan")

    monkeypatch.setattr(trainer, "_trainer", broken)
    with pytest.raises(NumericsError):
        train(**quick(data_path=rows, output_dir=tmp_path / "run"))
    shown = found((tmp_path / "run/report.html").read_text())
    assert "failed: step 3: the loss <b>was</b> nan" in shown.text
    assert "b" not in shown.tags


def test_report_when_made_again_after_an_evaluation_then_has_scores_and_answers(runs: tuple[Path, Path], tmp_path: Path) -> None:
    done = compare(runs[0], folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"written: {runs[0] / 'report.html'}\n")
    source = (runs[0] / "report.html").read_text()
    assert "0.445 (0.397 to 0.494)" in source
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in source
    assert "script" not in found(source).tags


def test_runs_when_compared_then_the_table_and_page_have_what_differs(runs: tuple[Path, Path], tmp_path: Path) -> None:
    done = compare(*runs, "--out=both.html", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    heads, first, second, last = done.stdout.splitlines()
    assert heads.split()[:2] == ["run", "status"]
    assert (first.split()[:3], second.split()[:3]) == (["dora", "done", "6"], ["lora", "done", "6"])
    assert last == "written: both.html"
    differ = {row[0]: row[1:] for row in comparison.differing([records.read(run) for run in runs])}
    assert differ["method"] == ["dora", "lora"]
    assert "learning_rate" not in differ
    shown = found((tmp_path / "both.html").read_text())
    assert "evaluation loss by step" in shown.attributes["aria-label"]
    assert "dora, step 1: " in shown.text
    assert "lora, step 1: " in shown.text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "name two run folders or more"),
        (["none", "other"], "none holds no run.json: it is no run folder of finetune.py"),
        (["damaged"], f"{Path('damaged/run.json')} is damaged"),
    ],
)
def test_comparison_when_a_folder_is_no_run_then_one_message(tmp_path: Path, words: list[str], says: str) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/run.json").write_text('{"plan": ')
    done = compare(*words, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"compare_runs.py: {says}")


def test_log_when_its_last_line_is_half_then_the_others_are_read(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"status": "running"}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": "nan"}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    run = records.read(tmp_path)
    assert run.curve("loss")[1:] == [(2, 1.5)]
    assert math.isnan(run.curve("loss")[0][1])
    source = page.of(run)
    assert "step 1: not finite" in source
    assert "step 2: 1.5" in source


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.0, 3.7, (0, 1, 2, 3, 4)), (1.0, 1.0, (0.9, 0.95, 1.0, 1.05, 1.1)), (0.0, 0.0, (-0.1, -0.05, 0.0, 0.05, 0.1)), (15000.0, 15480.0, (15000, 15100, 15200, 15300, 15400, 15500))],
)  # fmt: skip
def test_ticks_when_made_then_are_round_and_hold_the_range(low: float, high: float, ticks: tuple[float, ...]) -> None:
    assert charts.steps(low, high) == pytest.approx(ticks)


def test_curve_when_long_then_keeps_its_peaks() -> None:
    points = [(float(step), 1.0) for step in range(100_000)]
    points[777], points[54_321] = (777.0, 50.0), (54_321.0, -3.0)
    kept = charts.thinned(points)
    assert len(kept) <= charts.MOST_POINTS
    assert {(777.0, 50.0), (54_321.0, -3.0)} <= set(kept)
    assert list(kept) == sorted(kept)


def rendered(path: Path, width: int, scratch: Path) -> dict[str, Any]:
    """What Chromium says of the page at this width: its own width, and the box of every chart and of every text in it."""
    probe = """<script>document.title = JSON.stringify({width: innerWidth, page: document.documentElement.scrollWidth,
      charts: [...document.querySelectorAll('svg')].map(svg => { const outer = svg.getBoundingClientRect();
        return {width: outer.width, height: outer.height, inside: [...svg.querySelectorAll('text, circle')].every(mark => {
          const box = mark.getBoundingClientRect(); return box.left >= outer.left - 1 && box.right <= outer.right + 1; })}; }),
      fetched: performance.getEntriesByType('resource').length})</script>"""
    copy = scratch / "probed.html"
    copy.write_text(path.read_text().replace("</body>", f"{probe}</body>"))
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={scratch / 'profile'}",
        f"--window-size={width},900",
    ]
    done = subprocess.run([*command, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr
    told: dict[str, Any] = json.loads(title[1])
    return told


@browser
@pytest.mark.parametrize("width", [1280, 600])
def test_pages_when_shown_in_a_browser_then_fit_its_width_and_fetch_nothing(runs: tuple[Path, Path], tmp_path: Path, width: int) -> None:
    compare(*runs, "--out=both.html", folder=tmp_path)
    for path, count in ((runs[0] / "report.html", 5), (tmp_path / "both.html", 6)):
        told = rendered(path, width, tmp_path)
        assert told["page"] <= told["width"]
        assert told["fetched"] == 0
        assert len(told["charts"]) == count
        assert all(chart["inside"] and chart["width"] > 300 and chart["height"] > 100 for chart in told["charts"])
