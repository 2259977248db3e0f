"""scripts/evaluate.py and scripts/infer.py as a user starts them, on a short real run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune import train
from surefoot.data.report import Tally
from surefoot.errors import UsageError
from surefoot.plan import DataPlan
from tests.called import call, start
from tests.conftest import HELDOUT_ROWS, SMALL_MODEL, TRAIN_ROWS
from tests.runs import quick


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of DoRA on 64 short rows, of which 8 are held out."""
    folder = tmp_path_factory.mktemp("run")
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(sorted(TRAIN_ROWS.read_text().splitlines(), key=len)[:64]) + "\n")
    return train(**quick(data_path=rows, output_dir=folder / "out"))


def heldout(task: str, count: int) -> list[dict[str, str]]:
    return [row for row in map(json.loads, HELDOUT_ROWS.read_text().splitlines()) if row["task"] == task][:count]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_evaluate_when_given_the_older_recipes_flags_then_scores_the_task_and_records_who_was_scored(
    run_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "dataset/boolq").mkdir(parents=True)
    (tmp_path / "dataset/boolq/test.json").write_text(json.dumps(heldout("boolq", 6)))
    words = ["--model", "LLaMA3-8B", "--adapter", "DoRA", "--dataset", "boolq", "--base_model", SMALL_MODEL, "--batch_size", "1"]
    done = start("evaluate.py", *words, "--lora_weights", run_folder, "--max_new_tokens=8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((run_folder / "evaluation.json").read_text())
    assert result["label"] == "LLaMA3-8B-DoRA"
    assert result["identity"]["prompt_style"] == "alpaca"
    assert result["identity"]["run"]["adapter"]["method"] == "dora"
    assert len(result["identity"]["adapter_sha256"]) == 64
    boolq = result["sets"]["boolq"]
    for side in ("trained", "base"):
        score = boolq["scores"][side]["accuracy"]
        assert score["value"] == score["correct"] / 6
        assert score["low"] <= score["value"] <= score["high"]
        assert score["rows"] == 6
    assert boolq["gain"]["accuracy"]["low"] <= boolq["gain"]["accuracy"]["value"]
    assert boolq["scores"]["trained"]["perplexity"]["value"] < boolq["scores"]["base"]["perplexity"]["value"]
    rows = lines(run_folder / "evaluation.jsonl")
    assert [row["reference"] for row in rows] == [row["answer"] for row in heldout("boolq", 6)]
    right = sum(row["trained"]["prediction"] == row["reference"] for row in rows)
    assert right == boolq["scores"]["trained"]["accuracy"]["correct"]
    assert "rows put right by training" in done.stdout
    assert str(run_folder / "report.html") in done.stdout
    assert '<td class="plain">boolq</td>' in (run_folder / "report.html").read_text()


def test_evaluate_when_split_is_val_then_takes_the_rows_the_run_held_out(run_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from surefoot import inference, row_sets
    from surefoot.data import pipeline, prepare

    source = inference.find(None, str(run_folder))
    recorded = source.record["plan"]["data"]
    plan = DataPlan(**{**recorded, "data_path": tuple(recorded["data_path"]), "cache_dir": None})
    data: pipeline.Data = prepare.load(plan, AutoTokenizer.from_pretrained(SMALL_MODEL))
    assert data.eval is not None
    trained_by_it = {data.eval.where(index) for index in range(len(data.eval))}
    sets = row_sets.held_out(source)
    assert {example.where for one in sets for example in one.examples} == trained_by_it
    assert sum(len(one.examples) for one in sets) == 8


def test_evaluate_when_rows_are_free_text_then_gives_text_metrics_and_compares(run_folder: Path, tmp_path: Path) -> None:
    plain = [{"instruction": row["instruction"], "output": row["output"]} for row in heldout("openbookqa", 4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    words = ["--data_path=rows.jsonl", "--max_new_tokens=8", "--out=text.json", f"--lora_weights={run_folder}"]
    done = call("evaluate.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "text.json").read_text())["sets"]["rows.jsonl"]["scores"]["trained"]
    assert list(scores) == ["exact_match", "rougeL", "sari", "perplexity"]
    assert 0 <= scores["sari"]["low"] <= scores["sari"]["value"] <= 100
    for name in ("one", "two"):
        sets = {
            task: {"rows": 4, "scores": {"trained": {"accuracy": {"value": value, "low": 0.0, "high": 1.0}}}} for task, value in TWO[name]
        }
        (tmp_path / f"{name}.json").write_text(json.dumps({"label": name, "sets": sets}))
    table = call("evaluate.py", "--compare", "one.json", "two.json", "text.json", cwd=tmp_path).stdout
    assert table.splitlines()[0].split() == ["set", "metric", "one", "two", str(run_folder)]
    assert "boolq" in table
    assert "rows.jsonl" in table
    means = call("evaluate.py", "--compare", "one.json", "two.json", cwd=tmp_path).stdout.splitlines()[-1]
    assert means.split()[-2:] == ["35.0%", "55.0%"]


TWO = {"one": (("boolq", 0.5), ("piqa", 0.2)), "two": (("boolq", 0.6), ("piqa", 0.5))}


def test_evaluate_when_scored_by_likelihood_then_every_row_has_one_of_its_answers(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in heldout("social_i_qa", 10)))
    words = ["--scoring=loglikelihood", "--with_base=False", "--metrics=accuracy", "--out=ll.json", "--data_path=rows.jsonl"]
    done = call("evaluate.py", *words, f"--lora_weights={run_folder}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {row["trained"]["prediction"] for row in lines(tmp_path / "ll.jsonl")} <= {"answer1", "answer2", "answer3"}
    assert json.loads((tmp_path / "ll.json").read_text())["sets"]["social_i_qa"]["scores"]["trained"]["accuracy"]["formed"] == 10


def test_infer_when_its_output_was_cut_then_goes_on_and_ends_with_the_same_file(run_folder: Path, tmp_path: Path) -> None:
    rows = [{"instruction": row["instruction"]} for row in heldout("openbookqa", 20)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        f"--lora_weights={run_folder}", "--input_file=asked.jsonl", "--output_file=said.jsonl", "--batch_size=1", "--max_new_tokens=5",
        "--temperature=0.8", "--top_p=0.9",
    ]  # fmt: skip
    done = start("infer.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "20 rows answered" in done.stdout
    assert "tokens/s" in done.stdout
    whole = (tmp_path / "said.jsonl").read_bytes()
    assert [line["where"] for line in lines(tmp_path / "said.jsonl")] == [f"asked.jsonl:{number}" for number in range(1, 21)]
    kept = whole.split(b"\n")
    (tmp_path / "said.jsonl").write_bytes(b"\n".join(kept[:11]) + b"\n" + kept[11][:20])  # killed while it wrote row 12
    again = call("infer.py", *words, cwd=tmp_path)
    assert "11 of 20 rows are already in said.jsonl" in again.stderr
    assert (tmp_path / "said.jsonl").read_bytes() == whole
    other = call("infer.py", *words, "--seed=7", cwd=tmp_path)
    assert other.returncode == 2
    assert "Traceback" not in other.stderr
    assert "was not made by this command (settings differ)" in other.stderr


def test_infer_when_talked_to_then_keeps_the_conversation_of_a_chat_model(tmp_path: Path) -> None:
    typed = "/system Be kind\nHello\nAnd now?\n/history\n/reset\n/history\n/exit\n"
    done = call("infer.py", f"--base_model={SMALL_MODEL}", "--max_new_tokens=4", cwd=tmp_path, asked=typed)
    assert done.returncode == 0, done.stderr
    history = done.stdout[done.stdout.index("<|begin_of_text|>") :]
    places = [history.index(text) for text in ("Be kind", "Hello", "<|start_header_id|>assistant", "And now?")]
    assert places == sorted(places)
    assert history.rstrip().endswith("(nothing was said yet)")


def test_infer_when_all_training_rows_had_one_system_turn_then_talks_under_it(tmp_path: Path) -> None:
    said = [("system", "Answer like a pirate."), ("user", "Ready?"), ("assistant", "Aye.")]
    row = {"messages": [{"role": role, "content": text} for role, text in said]}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 16)
    train(**quick(data_path=tmp_path / "rows.jsonl", output_dir=tmp_path / "run", val_set_size=0, audit="warn", max_steps=2))
    for words, has_system in (((), True), (("--system=",), False)):
        done = call("infer.py", "--lora_weights=run", "--max_new_tokens=2", *words, cwd=tmp_path, asked="Hello\n/history\n/exit\n")
        assert done.returncode == 0, done.stderr
        history = done.stdout[done.stdout.index("<|begin_of_text|>") :]
        assert ("Answer like a pirate." in history) is has_system
        assert ("system turn: Answer like a pirate." in done.stderr) is has_system
    assert Tally(systems={"Be brief.", ""}).system == ""


def test_infer_when_the_run_learned_single_questions_then_asks_each_alone_and_weights_agree(run_folder: Path, tmp_path: Path) -> None:
    talked = call("infer.py", f"--lora_weights={run_folder}", "--max_new_tokens=4", cwd=tmp_path, asked="One\nTwo\n/history\n")
    assert "each question is asked alone" in talked.stderr
    history = talked.stdout[talked.stdout.index("Below is an instruction") :]
    assert "### Instruction:\nTwo\n" in history
    assert "One" not in history
    answers = [
        call(
            "infer.py",
            f"--lora_weights={run_folder}",
            f"--weights={weights}",
            f"--prompt={heldout('social_i_qa', 1)[0]['instruction']}",
            "--max_new_tokens=6",
            cwd=tmp_path,
        )
        for weights in ("adapter", "merged", "base")
    ]
    assert [one.returncode for one in answers] == [0, 0, 0]
    assert answers[0].stdout == answers[1].stdout != answers[2].stdout


WRONG = {
    "evaluate.py": {
        "": "give --lora_weights",
        "--lora_weights=nowhere": "--lora_weights=nowhere is no folder",
        "--lora_weights=.": "holds neither an adapter",
        f"--base_model={SMALL_MODEL}": "nothing to evaluate on",
        f"--base_model={SMALL_MODEL} --dataset=bolq": "--dataset=bolq is not one of boolq",
        f"--base_model={SMALL_MODEL} --dataset=boolq": "--data_dir=dataset holds neither boolq/test.json",
        f"--base_model={SMALL_MODEL} --split=val": "has no run.json",
        f"--base_model={SMALL_MODEL} --data_path=./rows.jsonl": "--data_path=./rows.jsonl does not exist",
        "--batch_size=0 --scorin=x": "2 problems",
        "--compare missing.json": "--compare missing.json is no file",
        f"--base_model={SMALL_MODEL} --load_4bit --load_8bit": "are two forms of one base",
        "--scoring=guess": "--scoring=guess is not one of generate, loglikelihood",
    },
    "infer.py": {
        "--prompt=x": "give --lora_weights",
        "--input_file=a.jsonl": "belong together",
        "--mode=batch": "--mode=batch needs --input_file",
        f"--base_model={SMALL_MODEL} --top_p=2": "--top_p=2 must be above 0 and at most 1",
        "--input_file=a.jsonl --output_file=b.txt": "must end in .jsonl",
        f"--base_model={SMALL_MODEL} --input_file=a.jsonl --output_file=b.jsonl": "--input_file=a.jsonl does not exist",
        f"--base_model={SMALL_MODEL} --weights=merged": "is a whole model, not an adapter",
        "--temperature=-1": "--temperature=-1.0 is too small",
    },
}


@pytest.mark.parametrize(
    ("name", "words", "expected"), [(name, words, text) for name, cases in WRONG.items() for words, text in cases.items()]
)
def test_scripts_when_flags_are_wrong_then_end_with_2_and_say_which(name: str, words: str, expected: str, tmp_path: Path) -> None:
    done = call(name, *words.split(), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{name}: ")
    assert expected in done.stderr


@pytest.mark.parametrize("name", ["evaluate.py", "infer.py"])
def test_scripts_when_asked_for_help_then_list_their_flags(name: str, tmp_path: Path) -> None:
    done = start(name, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "--lora_weights=" in done.stdout
    assert "Exit codes" in done.stdout


def test_find_when_the_adapters_base_is_gone_then_asks_for_it(run_folder: Path, tmp_path: Path) -> None:
    from surefoot import inference

    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    record = json.loads((copy / "run.json").read_text())
    record["plan"]["model"]["path"] = str(tmp_path / "gone")
    (copy / "run.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=r"is not on this machine\. Give --base_model"):
        inference.find(None, str(copy))
    assert inference.find(str(SMALL_MODEL), str(copy)).base_model == str(SMALL_MODEL)
    with pytest.raises(UsageError, match="Give it as --lora_weights"):
        inference.find(str(copy), None)


@pytest.mark.slow
def test_evaluate_when_lm_eval_runs_then_its_task_is_scored_on_the_adapter(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in heldout("boolq", 12)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/local_boolq.yaml").write_text(
        "task: local_boolq\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{instruction}}\\n"\ndoc_to_choice: ["true", "false"]\ndoc_to_target: "{{[\'true\', \'false\'].index(answer)}}"\n'
        "metric_list:\n  - metric: acc\n"
    )
    words = [f"--lora_weights={run_folder}", "--lm_eval=local_boolq", "--lm_eval_tasks=tasks", "--out=lm.json"]
    done = start("evaluate.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "lm.json").read_text())["lm_eval"]["local_boolq"]
    assert 0 <= found["acc,none"] <= 1
    wrong = start("evaluate.py", f"--lora_weights={run_folder}", "--lm_eval=no_such_task", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "has no task no_such_task" in wrong.stderr


@pytest.mark.slow
def test_training_when_scored_on_the_shipped_heldout_rows_then_beats_its_base_by_30_points(tmp_path: Path) -> None:
    """The margin: the 95 % interval of the gain in accuracy, on the same 400 rows, lies above 30 points."""
    folder = train(
        base_model=SMALL_MODEL, data_path=TRAIN_ROWS, output_dir=tmp_path / "run", adapter_name="dora", lora_r=16, lora_alpha=32,
        lora_dropout=0.0, batch_size=16, per_device_train_batch_size=16, num_epochs=3, learning_rate=1e-3, lr_scheduler_type="linear",
        weight_decay=0.0, val_set_size=0, save_strategy="no", group_by_length=True, report_to="none",
    )  # fmt: skip
    words = [f"--lora_weights={folder}", f"--data_path={HELDOUT_ROWS}", "--max_new_tokens=12", "--metrics=accuracy"]
    done = start("evaluate.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    every = json.loads((folder / "evaluation.json").read_text())["sets"]["all"]
    assert every["rows"] == 400
    assert every["gain"]["accuracy"]["low"] > 0.30
    assert every["scores"]["trained"]["accuracy"]["formed"] > 390
