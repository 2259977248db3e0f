"""More than 200 wrong command lines: each gives one clear message and the right exit code, no traceback, and starts no training."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import finetune
from surefoot import config as configs
from surefoot.config import FLAGS
from surefoot.flag_values import kinds
from tests.conftest import SMALL_MODEL, TRAIN_ROWS

ROW = {"instruction": "Say five.", "output": "five"}
PLAIN = [name for name in FLAGS if name not in ("base_model", "config")]


def misspelt(name: str) -> str:
    middle = len(name) // 2
    return name[:middle] + name[middle + 1 :] + "x"


def numeric(name: str) -> bool:
    return bool({int, float} & set(kinds(FLAGS[name]))) and str not in kinds(FLAGS[name])


TYPOS = [[f"--{misspelt(name)}=1"] for name in PLAIN]
NO_VALUE = [[f"--{name}"] for name in FLAGS if not configs.takes_bool(name)]
NOT_A_NUMBER = [[f"--{name}=many"] for name in PLAIN if numeric(name)]
NOT_A_BOOL = [[f"--{name}=perhaps"] for name in PLAIN if kinds(FLAGS[name]) == (bool,)]
NOT_A_CHOICE = [[f"--{name}=zzz"] for name in PLAIN if FLAGS[name].metadata["choices"]]
TOO_SMALL = [[f"--{name}=-7"] for name in PLAIN if FLAGS[name].metadata["low"] is not None]
CONFLICTS = [
    "--bf16 --fp16", "--fp16=True", "--load_4bit --load_8bit", "--load_4bit --adapter_name=full", "--load_8bit --adapter_name=dora",
    "--batch_size=10 --micro_batch_size=4", "--batch_size=8 --gradient_accumulation_steps=3", "--warmup_steps=3 --warmup_ratio=0.1",
    "--warmup_ratio=2", "--resume --overwrite", "--learning_rate=0", "--max_steps=0", "--num_epochs=0 --max_steps=-1", "--lora_dropout=1",
    "--load_best_model_at_end --val_set_size=0", "--load_best_model_at_end --save_strategy=epoch", "--optim=adamw_8bit",
    "--attn_implementation=flash_attention_2", "--report_to=wandb", "--report_to none tensorboard", "--init_lora_weights=eva",
    "--load_4bit --init_lora_weights=pissa", "--micro_batch_size=2 --per_device_train_batch_size=4", "--adapter_name=prefix-tuning",
    "--adapter_name=qlora", "--use_adapterp", "--bottleneck_size=64", "--dora_simple=False", "--deepspeed=ds.json", "--packing --group_by_length",
    "--packing=False --pack_len=512", "--packing=True --pack_len=128", "--pack_len=100",
    "--num_generations=8", "--device_map=auto", "word", "-lr 3", "-lora_r 8", "--val_set_size=1.5", "--seed=4294967296", "--lora_r 8 16", "--bf16 True False", "--prompt_style=nowhere.jinja",
]  # fmt: skip


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs finetune.main() on a good command plus the given words; returns the one message after checking its form."""

    def run(*words: str, code: int = 2, model: Path | str = SMALL_MODEL, data: Path | str = TRAIN_ROWS) -> str:
        monkeypatch.chdir(tmp_path)
        good = ["--base_model", str(model), "--data_path", str(data), "--output_dir", "run", "--max_steps", "2", "--val_set_size", "0"]
        given = {word.partition("=")[0] for word in words}
        for flag in ("--max_steps", "--val_set_size"):
            if flag in given:
                place = good.index(flag)
                del good[place : place + 2]
        monkeypatch.setattr(sys, "argv", ["finetune.py", *good, *words])
        assert finetune.main() == code
        err = capsys.readouterr().err
        assert err.startswith("finetune.py: ")
        assert "Traceback" not in err
        left = {path.name for path in (tmp_path / "run").glob("*")}
        assert left <= ({"audit.json"} if code == 3 else set())
        return err

    return run


@pytest.mark.parametrize("words", TYPOS + NO_VALUE + NOT_A_NUMBER + NOT_A_BOOL + NOT_A_CHOICE + TOO_SMALL, ids=" ".join)
def test_flag_when_wrong_then_is_named(refused: Callable[..., str], words: list[str]) -> None:
    name = words[0].lstrip("-").partition("=")[0]
    assert f"--{name}" in refused(*words)


@pytest.mark.parametrize("line", CONFLICTS)
def test_flags_when_they_conflict_then_are_refused(refused: Callable[..., str], line: str) -> None:
    message = refused(*line.split())
    assert any(word.lstrip("-").partition("=")[0] in message for word in line.split())


def test_wrong_commands_when_counted_then_are_more_than_200() -> None:
    assert len(TYPOS + NO_VALUE + NOT_A_NUMBER + NOT_A_BOOL + NOT_A_CHOICE + TOO_SMALL + CONFLICTS) > 200


FILES: dict[str, tuple[bytes, int, str]] = {
    "empty.json": (b"", 2, "is empty"),
    "rows.txt": (b"hello", 2, "unknown ending .txt"),
    "broken.json": (b'[{"instruction": "a", "output"', 3, "broken.json"),
    "broken.jsonl": (json.dumps(ROW).encode() + b"\n{oops\n", 3, "broken.jsonl:2"),
    "latin1.jsonl": ('{"instruction": "caf\xe9", "output": "x"}\n'.encode("latin-1"), 3, "UTF-8"),
    "nothing.json": (b"[]", 3, "nothing.json"),
    "blank.jsonl": (b"\n\n", 3, "blank.jsonl"),
    "numbers.json": (b"[1, 2, 3]", 3, "numbers.json"),
    "columns.jsonl": (b'{"question": "a", "reply": "b"}\n', 3, "question, reply"),
    "mixed.jsonl": (json.dumps(ROW).encode() + b'\n{"foo": "bar"}\n', 3, "mixed.jsonl:2"),
    "types.jsonl": (b'{"instruction": 3, "output": ["x"]}\n', 3, "types.jsonl:1"),
    "user_only.jsonl": (b'{"messages": [{"role": "user", "content": "hi"}]}\n', 3, "user_only.jsonl:1"),
    "header.csv": (b"instruction,output\n", 3, "header.csv"),
    "fake.parquet": (b"not parquet at all", 3, "fake.parquet"),
    "fake.jsonl.gz": (b"not gzip", 3, "fake.jsonl.gz"),
    "no_answer.jsonl": (b'{"instruction": "a", "output": ""}\n', 3, "no_answer.jsonl"),
    "long.jsonl": (json.dumps({"instruction": "a", "output": "word " * 2000}).encode(), 3, "cutoff_len"),
}


@pytest.mark.parametrize("name", FILES)
def test_data_file_when_it_cannot_be_trained_on_then_is_named(refused: Callable[..., str], tmp_path: Path, name: str) -> None:
    content, code, says = FILES[name]
    (tmp_path / name).write_bytes(content)
    assert says in refused(data=tmp_path / name, code=code)


def test_data_when_truncated_gzip_then_is_named(refused: Callable[..., str], tmp_path: Path) -> None:
    whole = gzip.compress((json.dumps(ROW) + "\n").encode() * 500)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert "cut.jsonl.gz" in refused(data=tmp_path / "cut.jsonl.gz", code=3)


@pytest.mark.parametrize("path", ["missing.json", "./missing.jsonl", "/nowhere/rows.parquet"])
def test_data_when_missing_then_says_where_it_looked(refused: Callable[..., str], path: str) -> None:
    assert "does not exist" in refused(data=path)


def test_val_set_when_it_takes_every_row_then_is_refused(refused: Callable[..., str]) -> None:
    assert "val_set_size" in refused("--val_set_size=100000")


def _model(tmp_path: Path, **files: bytes | None) -> Path:
    """A copy of the small model with files replaced (None: removed); `__` in a name stands for a dot."""
    folder = tmp_path / "model"
    shutil.copytree(SMALL_MODEL, folder)
    for name, content in files.items():
        file = folder / name.replace("__", ".")
        file.unlink() if content is None else file.write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("files", "code", "says"),
    [
        ({"config__json": None}, 2, "has no config.json"),
        ({"config__json": b"{"}, 2, "not valid JSON"),
        ({"config__json": b'{"model_type": "no_such_type"}'}, 5, "no_such_type"),
        ({"model__safetensors": None}, 2, "no weights"),
        ({"model__safetensors": b""}, 2, "is empty (0 bytes)"),
        ({"model__safetensors": b"\xff" * 4000}, 2, "cut off or no safetensors"),
        ({"model__safetensors": (16).to_bytes(8, "little") + b"{not json at all"}, 2, "no readable header"),
        ({"tokenizer__json": None, "tokenizer_config__json": None}, 5, "tokenizer"),
        ({"tokenizer__json": b"{}"}, 5, "tokenizer"),
    ],
)
def test_model_when_damaged_then_is_refused(
    refused: Callable[..., str], tmp_path: Path, files: dict[str, bytes | None], code: int, says: str
) -> None:
    assert says in refused(model=_model(tmp_path, **files), code=code)


def test_model_when_it_is_an_adapter_or_missing_then_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    assert "is an adapter, not a model" in refused(model=tmp_path / "adapter")
    assert "does not exist" in refused(model="./nowhere")
    assert "no such folder here" in refused(model="nobody/has-this-model")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"), (b"- a\n- b\n", "name: value"), (b"lora_r: [", "not valid YAML"), (b"lora_rnk: 3\n", "--lora_rnk"),
        (b"\xff\xfe\x00", "config"), (b"include: run.yaml\n", "includes itself"), (b"tuning: {mode: adapters}\n", "tuning.mode"),
        (b"model: {type: seq2seq}\n", "model.type=seq2seq"), (b"train: {bf16: perhaps}\n", "--bf16"), (b"nogroup: {lora_r: 3}\n", "nogroup.lora_r"),
    ],
)  # fmt: skip
def test_run_file_when_wrong_then_is_refused(refused: Callable[..., str], tmp_path: Path, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / "run.yaml").write_bytes(content)
    assert says in refused("--config=run.yaml")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "no trainer_state.json"),
        ({"trainer_state.json": b"{"}, "damaged"),
        ({"trainer_state.json": b"{}", "adapter_model.safetensors": b""}, "is empty (0 bytes)"),
        ({"trainer_state.json": b"{}", "adapter_model.safetensors": b"\x01"}, "cut off"),
    ],
)
def test_checkpoint_when_damaged_then_is_refused(refused: Callable[..., str], tmp_path: Path, files: dict[str, bytes], says: str) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    for name, content in files.items():
        (tmp_path / "checkpoint-1" / name).write_bytes(content)
    assert says in refused("--resume_from_checkpoint=checkpoint-1")


def test_target_modules_when_a_name_is_wrong_then_lists_the_right_ones(refused: Callable[..., str]) -> None:
    assert "q_proj" in refused("--target_modules", "q_proj", "kproj")
