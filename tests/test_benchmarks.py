"""The speed benchmark on a tiny shape: ours and a peer in processes of their own, what it writes, and README's table."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from surefoot.rules import speeds
from tests.conftest import ROOT, TRAIN_ROWS

BENCHMARKS = ROOT / "benchmarks"
PEER, OURS = "peft", "ours1"


class Bench(NamedTuple):
    folder: Path
    result: dict[str, Any]


def speed(folder: Path, *words: str, out: str = "speed.json") -> subprocess.CompletedProcess[str]:
    """speed.py with one round of twelve steps on the tiny shape."""
    command = [
        sys.executable, str(BENCHMARKS / "speed.py"), f"--data={TRAIN_ROWS}", f"--out={folder / out}", f"--work={folder / 'work'}",
        "--tiny", "--only=dora_2048", "--rounds=1", "--steps=12", "--warmup=1", *words,
    ]  # fmt: skip
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=True)


def table(*words: str) -> str:
    command = [sys.executable, str(BENCHMARKS / "speed_table.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("speed")
    speed(folder, f"--systems={OURS},{PEER}")
    return Bench(folder, json.loads((folder / "speed.json").read_text()))


def test_speed_when_run_then_holds_the_figures_of_ours_and_of_the_peer(bench: Bench) -> None:
    runs = {run["system"]: run for run in bench.result["runs"]}
    assert [run.get("error") for run in runs.values()] == [None, None]
    assert set(runs) == {OURS, PEER}
    for run in runs.values():
        assert [(steps, tokens) for steps, tokens, _ in run["windows"]] == [(1, 4 * 64), (3, 4 * 64), (4, 4 * 64), (4, 4 * 64)]
        assert run["tokens_per_s"] == pytest.approx(256 / sorted(seconds for _, _, seconds in run["windows"][1:])[1], rel=0.01)
        assert 0.05 < run["peak_memory_gib"] < 8
        assert run["losses"][0] == pytest.approx(math.log(8192), abs=0.1)  # random weights: every token is as likely as another
    assert runs[OURS]["losses"][-1] == pytest.approx(runs[PEER]["losses"][-1], abs=0.1)
    assert "--stage=1" in runs[OURS]["flags"]


def test_speed_when_run_then_names_versions_and_no_folder_of_the_machine(bench: Bench) -> None:
    (environment,) = bench.result["environments"]
    assert {"torch", "transformers", "peft"} <= environment["versions"].keys()
    assert environment["cpu_name"]
    assert not re.search(r"/(tmp|home|root|work)/", json.dumps(bench.result))


def test_speed_when_called_again_then_runs_only_what_is_missing(bench: Bench) -> None:
    before = (bench.folder / "speed.json").read_text()
    assert speed(bench.folder, f"--systems={OURS},{PEER}").stdout == ""
    assert (bench.folder / "speed.json").read_text() == before
    late = speed(bench.folder, "--systems=seed,peft,liger", "--rounds=2", "--time_limit_s=1")
    assert "time limit" in late.stdout
    assert (bench.folder / "speed.json").read_text() == before


def test_speed_when_a_run_fails_then_its_error_is_kept_and_shown(bench: Bench) -> None:
    speed(bench.folder, f"--systems={OURS}", "--ours_flags=--learning_rate=fast", out="failed.json")
    (run,) = json.loads((bench.folder / "failed.json").read_text())["runs"]
    assert run["error"].startswith("exit 2: finetune.py: --learning_rate=fast")
    shown = table(f"--results={bench.folder / 'failed.json'}", "--show")
    assert "| failed |" in shown
    assert "--learning_rate=fast" in shown


def test_table_when_made_then_stands_between_the_comments_with_its_plot(bench: Bench) -> None:
    readme, plot = bench.folder / "README.md", bench.folder / "speed.svg"
    readme.write_text("before\n<!-- speed table: python benchmarks/speed_table.py -->\nlast week\n<!-- end -->\nafter\n")
    table(f"--results={bench.folder / 'speed.json'}", f"--readme={readme}")
    text = readme.read_text()
    rates = {row["system"]: row["tokens_per_s"] for row in bench.result["medians"]}
    assert text.startswith("before\n<!-- speed table")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "last week" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("| DoRA, 4 x 64, tiny")]
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert [cell.partition(" ")[0] for cell in cells[:2]] == [f"{rates[system]:,.0f}" for system in (OURS, PEER)]
    assert float(cells[2]) == pytest.approx(rates[OURS] / rates[PEER], abs=0.01)
    assert plot.read_text().count("<rect") == 2


def test_table_when_its_results_are_missing_then_says_who_makes_them() -> None:
    words = [sys.executable, str(BENCHMARKS / "speed_table.py"), "--results=nowhere.json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "--results=nowhere.json does not exist. benchmarks/speed.py makes it\n")


def test_readme_when_results_are_kept_then_its_table_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import speed_table

    kept = speed_table.markdown(json.loads(speed_table.RESULTS.read_text())) if speed_table.RESULTS.is_file() else None
    assert speed_table.between((ROOT / "README.md").read_text()) == kept


@pytest.mark.parametrize("known", speeds.SPEEDS, ids=lambda known: f"{known.method}-{known.quantization}")
def test_speeds_when_auto_goes_by_them_then_are_the_kept_medians(known: speeds.Speed) -> None:
    kept = json.loads((BENCHMARKS / "results/speed_h200.json").read_text())
    rates = {(row["case"], row["system"]): row["tokens_per_s"] for row in kept["medians"]}
    case = {"none": f"{known.method}_2048", "nf4": f"q{known.method}_2048_recompute"}[known.quantization]
    assert (known.ours, known.unsloth) == (round(rates[case, "ours3"]), round(rates[case, "unsloth"]))
