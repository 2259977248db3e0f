"""configs/: every run file parses, plans, and is one that editors accept; the schema is that of today's flags."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from surefoot import run_file
from surefoot.config import Config
from surefoot.schema import schema
from tests.conftest import ROOT, TRAIN_ROWS

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SCHEMA = ROOT / "configs/schema.json"


def complaints(content: Any) -> list[str]:
    return [error.message for error in jsonschema.Draft7Validator(json.loads(SCHEMA.read_text())).iter_errors(content)]


def test_configs_when_listed_then_hold_one_per_use() -> None:
    assert {"dora_8b", "qlora_8b", "full_small", "quick_start"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_when_parsed_and_dry_run_then_plans(
    path: Path, tmp_path: Path, finetune: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    config = Config.parse({}, file_values=run_file.read(str(path)))
    assert config.output_dir.startswith("outputs/")
    for name in (*config.data_path, *(config.val_data_path or ())):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TRAIN_ROWS, tmp_path / name)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = finetune("--config", path, "--dry_run", "--plan_json")
    assert (done.returncode, done.stderr) == (0, "")
    plan = json.loads(done.stdout)
    method, quantization = plan["adapter"]["method"], plan["model"]["quantization"]
    assert (method, quantization) == {"dora_8b": ("dora", "none"), "qlora_8b": ("lora", "nf4"), "full_small": ("full", "none")}.get(
        path.stem, (method, quantization)
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_when_checked_as_an_editor_does_then_is_accepted(path: Path) -> None:
    first, *_ = path.read_text().splitlines()
    assert first == "# yaml-language-server: $schema=schema.json"
    assert complaints(yaml.safe_load(path.read_text())) == []


def test_schema_when_made_today_then_is_the_kept_one() -> None:
    assert json.loads(SCHEMA.read_text()) == schema(), "configs/schema.json is out of date: make schema"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"lora_rank": 8}, "'lora_rank' was unexpected"),
        ({"tuning": {"lora": {"rank": 8}}}, "'rank' was unexpected"),
        ({"stage": 4}, "4 is not valid under any of the given schemas"),
        ({"tuning": {"mode": "dora"}}, "'dora' is not one of ['lora', 'qlora', 'full']"),
        ({"train": {"epochs": "three"}}, "'three' is not valid under any of the given schemas"),
        ({"cutoff_len": 4}, "4 is not valid under any of the given schemas"),
    ],
)
def test_schema_when_a_value_is_wrong_then_marks_it(content: dict[str, Any], says: str) -> None:
    jsonschema.Draft7Validator.check_schema(schema())
    assert any(says in complaint for complaint in complaints(content))
