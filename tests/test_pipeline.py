"""From raw files to rendered rows: the three scripts as a user starts them, and what finetune.py makes of each stage."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.conftest import ROOT, SMALL_MODEL, TRAIN_ROWS

PAIRS = [{"instruction": f"Say {number}.", "input": "", "output": f"It is {number}."} for number in range(100)]


def script(name: str, *words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / f"scripts/{name}.py"), *map(str, words)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def raw(folder: Path, rows: list[dict[str, Any]], name: str = "raw.jsonl") -> Path:
    path = folder / "data/raw" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_process_when_run_twice_then_makes_the_same_exact_splits_and_equal_rows_stay_together(tmp_path: Path) -> None:
    raw(tmp_path, PAIRS + PAIRS[:10])
    assert script("process_data", folder=tmp_path).returncode == 0
    folder = tmp_path / "data/processed"
    first = {name: (folder / f"{name}.jsonl").read_bytes() for name in ("train", "val", "test")}
    splits = {name: [row["user"] for row in written(folder / f"{name}.jsonl")] for name in first}
    assert sum(map(len, splits.values())) == 110
    assert sum(len(set(users)) for users in splits.values()) == 100
    assert len(splits["val"]) == pytest.approx(11, abs=1)
    assert len(splits["test"]) == pytest.approx(22, abs=2)
    order = [f"Say {number}." for number in range(100)]
    assert list(dict.fromkeys(splits["train"])) == [user for user in order if user in splits["train"]]
    assert script("process_data", folder=tmp_path).returncode == 0
    assert {name: (folder / f"{name}.jsonl").read_bytes() for name in first} == first
    assert script("process_data", "--seed=7", folder=tmp_path).returncode == 0
    assert (folder / "val.jsonl").read_bytes() != first["val"]
    assert json.loads((folder / "report.json").read_text())["seed"] == 7


def test_split_when_rows_are_added_then_the_others_keep_their_side(tmp_path: Path) -> None:
    raw(tmp_path, PAIRS[:90])
    script("process_data", folder=tmp_path)
    sides = {row["user"]: name for name in ("train", "val", "test") for row in written(tmp_path / f"data/processed/{name}.jsonl")}
    raw(tmp_path, PAIRS)
    script("process_data", folder=tmp_path)
    moved = [
        row["user"]
        for name in ("train", "val", "test")
        for row in written(tmp_path / f"data/processed/{name}.jsonl")
        if sides.get(row["user"], name) != name
    ]
    assert len(moved) <= 9  # a random split of its own would move about 40


def test_run_file_when_it_has_shares_then_they_hold_and_an_earlier_test_split_goes(tmp_path: Path) -> None:
    raw(tmp_path, PAIRS)
    script("process_data", folder=tmp_path)
    config = tmp_path / "run.yaml"
    config.write_text("seed: 1\ndata: {split: {train_ratio: 0.9, val_ratio: 0.1}}\n")
    done = script("process_data", "--config", config, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in (tmp_path / "data/processed").iterdir()) == ["report.json", "train.jsonl", "val.jsonl"]
    assert len(written(tmp_path / "data/processed/val.jsonl")) == 10
    config.write_text("data: {split: {train_ratio: 0.9, val_ratio: 0.2}}\n")
    wrong = script("process_data", "--config", config, folder=tmp_path)
    assert wrong.returncode == 2
    assert "data.split has train_ratio=0.9 val_ratio=0.2 test_ratio=None" in wrong.stderr


def test_process_when_rows_are_over_the_cap_or_empty_then_counts_them_with_the_first_place(tmp_path: Path) -> None:
    path = raw(
        tmp_path,
        [
            *PAIRS[:3],
            {"question": "a" * 50 + "b" * 50, "answer": "c"},
            {"question": "d", "answer": "e" * 101},
            {"question": "f", "answer": " "},
        ],
    )
    done = script("process_data", "--raw_path", path, "--max_chars=50", folder=tmp_path)
    assert done.returncode == 0
    name = f"{path}"
    assert f"dropped: 16.7 % (1): a question of more than max_chars=50, first {name}:4" in done.stdout
    assert f"dropped: 16.7 % (1): an answer of more than max_chars=50, first {name}:5" in done.stdout
    assert f"dropped: 16.7 % (1): an empty answer, first {name}:6" in done.stdout
    cut = script("process_data", "--raw_path", path, "--max_chars=50", "--overlong=truncate_prompt", folder=tmp_path)
    assert "cut: 16.7 % (1) of the questions, to their last 50 characters" in cut.stdout
    users = [row["user"] for split in ("train", "val", "test") for row in written(tmp_path / f"data/processed/{split}.jsonl")]
    assert "b" * 50 in users


def test_files_when_of_every_kind_then_each_gives_its_rows(tmp_path: Path) -> None:
    folder = tmp_path / "data/raw"
    raw(tmp_path, PAIRS[:2], "a.jsonl")
    (folder / "b.json").write_text(json.dumps(PAIRS[2:4]))
    (folder / "c.csv").write_text('\ufeffquestion,answer\n"Who,\nwhen?",Ann\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "p", "completion": "q"}]), folder / "d.parquet")
    (folder / "e.txt").write_text("One\nparagraph.\n\n\nAnother.")
    (folder / "f.jsonl.gz").write_bytes(
        gzip.compress(b'\xef\xbb\xbf{"user": "zip\\u2028ped", "assistant": "yes"}\n\n{"user": "n", "assistant": NaN}\n')
    )
    (folder / "notes.md").write_text("not data")
    done = script("process_data", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [row for name in ("train", "val", "test") for row in written(tmp_path / f"data/processed/{name}.jsonl")]
    found = {(row["user"], row["assistant"]) for row in rows if "user" in row}
    pairs = {("Who,\nwhen?", "Ann"), ("p", "q"), ("zip\u2028ped", "yes")}
    assert found == {(f"Say {n}.", f"It is {n}.") for n in range(4)} | pairs
    assert f"an empty answer, first {Path('data/raw/f.jsonl.gz')}:3" in done.stdout
    assert {row["text"] for row in rows if "text" in row} == {"One\nparagraph.", "Another."}
    assert done.stdout.startswith("read: 10 rows of 6 files in ")


PEAK = """import runpy, sys
del sys.argv[0]
try: runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ended: assert ended.code == 0
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))"""


def peak_mb(*words: object) -> float:
    """Peak memory of process_data.py; not wait4's, which a big parent raises."""
    command = [sys.executable, "-c", PEAK, str(ROOT / "scripts/process_data.py"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) / 1024


def test_memory_when_the_file_is_a_hundred_times_as_long_then_grows_by_its_hashes_only(tmp_path: Path) -> None:
    peaks = []
    for rows in (800, 80_000):
        path = tmp_path / f"{rows}.jsonl"
        path.write_text("".join(f'{{"question": "{number} {"word " * 60}", "answer": "yes"}}\n' for number in range(rows)))
        peaks.append(peak_mb("--raw_path", path, "--out", tmp_path / "out"))
    assert path.stat().st_size > 24e6
    assert peaks[1] - peaks[0] < 12


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (b'{"user": "a", "assistant": "b"}\n{"user": \n', 3, "raw.jsonl:2: not valid JSON"),
        (b'{"user": "a", "assistant": "b\xff"}\n', 3, "raw.jsonl: not UTF-8: byte 0xff at offset 29 (line 1)"),
        (b'{"user": "a", "assistant": "b\\ud800"}\n', 3, "raw.jsonl:1: a text that UTF-8 cannot hold"),
        (b'[{"user": "a", "assistant": "b"}]\n', 3, "raw.jsonl:1: a list of rows, where each line must hold one. Rename the file to .json"),
        (b'{"user": "a", "assistant": ""}\n', 3, "no row is left of 1\ndropped: 100 % (1): an empty answer"),
        (b"", 3, "no row is left of 0"),
    ],
)
def test_process_when_a_file_cannot_be_used_then_says_where_and_leaves_the_earlier_splits(
    tmp_path: Path, content: bytes, code: int, says: str
) -> None:
    path = raw(tmp_path, PAIRS)
    script("process_data", folder=tmp_path)
    before = (tmp_path / "data/processed/train.jsonl").read_bytes()
    path.write_bytes(content)
    done = script("process_data", folder=tmp_path)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "data/processed/train.jsonl").read_bytes() == before
    assert not list((tmp_path / "data/processed").glob(".*"))


@pytest.mark.parametrize(
    ("name", "words", "says"),
    [
        ("process_data", [], "--raw_path=data/raw does not exist"),
        ("process_data", ["--raw_pth=x"], "--raw_pth is not a flag. Did you mean --raw_path?"),
        ("process_data", ["--max_chars=many", "x"], "2 problems:\n  - stray word 'x'"),
        ("process_data", ["--raw_path=.", "--overlong=cut"], "--overlong=cut is not one of drop, truncate_prompt"),
        ("style_prompt", [], "--style is missing"),
        ("style_prompt", ["--style=x"], "--in=data/processed holds no train.jsonl. Make it with scripts/process_data.py"),
        ("style_prompt", ["--style=x", "--mode=append"], "--mode=append is not one of prepend, replace"),
        ("render_template", ["--template=none.jinja"], "--template=none.jinja is not a readable Jinja file"),
        ("render_template", [], "--in=data/processed holds no train.jsonl"),
    ],
)
def test_command_when_wrong_then_one_message_and_exit_code_2(tmp_path: Path, name: str, words: list[str], says: str) -> None:
    done = script(name, *words, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{name}.py: ")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["process_data", "style_prompt", "render_template"])
def test_help_when_asked_for_then_shows_every_flag(tmp_path: Path, name: str) -> None:
    done = script(name, "--help", folder=tmp_path)
    assert done.returncode == 0
    assert "--out=" in done.stdout


def test_style_when_text_looks_like_a_literal_then_is_kept_as_text_and_joined_or_replaces(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "old"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}] * 1
    raw(tmp_path, [{"system": "old", "user": "u", "assistant": "a"}, {"user": "v", "assistant": "b"}, {"messages": [*turns, *turns[1:]]}])
    script("process_data", folder=tmp_path)
    script("style_prompt", "--style", '["Short", 2]', folder=tmp_path)
    folder = tmp_path / "data/processed_with_style"
    assert script("style_prompt", "--style=Short.", folder=tmp_path).returncode == 0
    systems = sorted(
        row["system"] if "system" in row else row["messages"][0]["content"]
        for name in ("train", "val", "test")
        for row in written(folder / f"{name}.jsonl")
    )
    assert systems == ["Short.", "Short.\nold", "Short.\nold"]
    script("style_prompt", "--style", '["Short", 2]', "--mode=replace", "--out=other", folder=tmp_path)
    assert written(tmp_path / "other/train.jsonl")[0].get("system", '["Short", 2]') == '["Short", 2]'


def test_render_when_the_styled_rows_exist_then_reads_them_and_refuses_them_when_they_are_older(tmp_path: Path) -> None:
    raw(tmp_path, PAIRS)
    script("process_data", folder=tmp_path)
    plain = script("render_template", folder=tmp_path)
    assert plain.stdout.startswith("read: data/processed;")
    row = written(tmp_path / "data/rendered/train.jsonl")[0]
    first = written(tmp_path / "data/processed/train.jsonl")[0]
    assert row == {"input": f"<|im_start|>user\n{first['user']}<|im_end|>\n<|im_start|>assistant\n", "target": first["assistant"]}
    script("style_prompt", "--style=Short.", folder=tmp_path)
    styled = script("render_template", folder=tmp_path)
    assert styled.stdout.startswith("read: data/processed_with_style;")
    assert written(tmp_path / "data/rendered/train.jsonl")[0]["input"].startswith(
        "<|im_start|>system\nShort.<|im_end|>\n<|im_start|>user\nSay "
    )
    script("process_data", folder=tmp_path)
    old = script("render_template", folder=tmp_path)
    assert old.returncode == 2
    assert "data/processed_with_style is older than data/processed. Style again (make style)" in old.stderr


def test_render_when_the_template_marks_answers_then_they_are_the_target_and_text_after_them_is_refused(tmp_path: Path) -> None:
    raw(tmp_path, PAIRS)
    script("process_data", folder=tmp_path)
    template = tmp_path / "own.jinja"
    template.write_text("Q: {{ prompt }}\nA: {% generation %}{{ assistant }}!{% endgeneration %}")
    done = script("render_template", "--template", template, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    row = written(tmp_path / "data/rendered/train.jsonl")[0]
    assert row["input"].startswith("Q: Say ")
    assert row["target"].endswith(".!")
    template.write_text("{% generation %}{{ assistant }}{% endgeneration %} end")
    wrong = script("render_template", "--template", template, folder=tmp_path)
    assert wrong.returncode == 3
    assert "writes text after the answer" in wrong.stderr


@pytest.mark.slow
def test_each_stage_when_trained_on_then_the_run_is_done(tmp_path: Path, finetune: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    raw(tmp_path, [json.loads(line) for line in TRAIN_ROWS.read_text().splitlines()[:60]])
    script("process_data", folder=tmp_path)
    script("style_prompt", "--style=Answer in one line.", folder=tmp_path)
    script("render_template", folder=tmp_path)
    for stage, form in (("processed", "user_assistant"), ("processed_with_style", "user_assistant"), ("rendered", "input_target")):
        folder = tmp_path / "data" / stage
        done = finetune(
            "--base_model", SMALL_MODEL, "--data_path", folder / "train.jsonl", "--val_data_path", folder / "val.jsonl", "--batch_size=8",
            "--max_steps=3", "--learning_rate=2e-3", "--warmup_steps=0", "--cutoff_len=512", "--report_to=none", "--save_strategy=no", "--output_dir", tmp_path / f"run_{stage}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        record = json.loads((tmp_path / f"run_{stage}/run.json").read_text())
        assert record["data"]["formats"] == {form: 48}
