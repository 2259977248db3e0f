"""Config.parse: text or values in, one checked value out; every wrong flag named at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from surefoot import cli
from surefoot.config import FLAGS, Config
from surefoot.errors import UsageError


def parse(**flags: object) -> Config:
    return Config.parse({"base_model": "m", **flags})


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("bf16", "true", True), ("bf16", "False", False), ("bf16", "1", True), ("bf16", True, True), ("bf16", "none", None),
        ("lora_r", "32", 32), ("batch_size", "1e2", 100), ("num_epochs", "3", 3.0), ("learning_rate", "3e-5", 3e-5),
        ("val_set_size", "120", 120), ("val_set_size", "0.1", 0.1), ("output_dir", "1.10", "1.10"), ("output_dir", "2024", "2024"),
        ("target_modules", "q_proj,k_proj", ("q_proj", "k_proj")), ("target_modules", '["q_proj", "k_proj"]', ("q_proj", "k_proj")),
        ("target_modules", "[q_proj,k_proj]", ("q_proj", "k_proj")), ("target_modules", ["q_proj"], ("q_proj",)), ("data_path", Path("a,b.json"), ("a,b.json",)),
        ("init_lora_weights", "pissa", "pissa"), ("init_lora_weights", "True", True), ("init_lora_weights", "pissa_niter_4", "pissa_niter_4"),
        ("use_gradient_checkpointing", "unsloth", "unsloth"), ("resume_from_checkpoint", "out/checkpoint-8", "out/checkpoint-8"),
        ("report_to", "wandb,tensorboard", ("wandb", "tensorboard")),
        ("report_to", "none", ("none",)),
    ],
)  # fmt: skip
def test_parse_when_text_or_value_is_good_then_has_its_type(flag: str, text: object, value: object) -> None:
    parsed = getattr(parse(**{flag: text}), flag)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("flag", "raw", "says"),
    [
        ("bf16", "tru", "must be True or False"), ("lora_r", "0", "the least is 1"), ("lora_r", "8.5", "whole number"),
        ("lora_r", True, "whole number"), ("learning_rate", "nan", "must be a number"), ("learning_rate", "-1", "too small"),
        ("adapter_name", "dorra", "Did you mean dora?"), ("adapter_name", "prefix-tuning", "PrefixTuningConfig"),
        ("adapter_name", "bottleneck", "bottleneck adapters are not built"), ("stage", "4", "not one of 1, 2, 3"),
        ("lora_rank", "4", "Did you mean --lora_r?"), ("bottleneck_size", "128", "not supported"),
        ("dora_simple", "False", "section 4.3"), ("num_generations", "8", "GRPOTrainer"), ("target_modules", "q_proj,,", "a list of words"),
        ("init_lora_weights", "loftq2", "not one of"), ("Wdecompose_target_modules", "[o_proj]", "--target_modules"),
    ],
)  # fmt: skip
def test_parse_when_value_is_wrong_then_says_the_rule(flag: str, raw: object, says: str) -> None:
    with pytest.raises(UsageError, match=f"--{flag}") as caught:
        parse(**{flag: raw})
    assert says in str(caught.value)
    assert caught.value.exit_code == 2


def test_parse_when_several_are_wrong_then_names_all_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        Config.parse({"lora_rank": "4", "bf16": "maybe", "stage": "9"})
    assert str(caught.value).startswith("4 problems:")
    assert all(word in str(caught.value) for word in ("--lora_rank", "--bf16", "--stage", "--base_model"))


def test_parse_when_flag_did_nothing_in_the_old_scripts_then_notes_it() -> None:
    config = parse(use_parallel_adapter="False", bottleneck_size=256, dora_simple=True, local_rank="1")
    assert len(config.notes) == 4
    assert all("no effect" in note for note in config.notes)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("micro_batch_size", "per_device_train_batch_size"),
        ("evaluation_strategy", "eval_strategy"),
        ("per-device-train-batch-size", "per_device_train_batch_size"),
    ],
)
def test_parse_when_an_older_name_is_used_then_sets_the_flag(old: str, new: str) -> None:
    value = "epoch" if "strategy" in old else "2"
    assert str(getattr(parse(**{old: value}), new)) == value


def test_parse_when_two_names_of_a_flag_differ_then_refuses() -> None:
    with pytest.raises(UsageError, match="are the same flag"):
        parse(micro_batch_size=2, per_device_train_batch_size=4)


@pytest.mark.parametrize("flags", [("target_modules", "lora_target_modules"), ("lora_target_modules", "target_modules")])
def test_older_name_when_it_says_nothing_then_the_other_one_counts(flags: tuple[str, str]) -> None:
    said = {"target_modules": "[q_proj,k_proj]", "lora_target_modules": "None"}
    assert parse(**{name: said[name] for name in flags}).target_modules == ("q_proj", "k_proj")


def test_sources_when_flag_and_file_meet_then_the_flag_wins() -> None:
    config = Config.parse({"base_model": "m", "lora_r": "4", "config": "run.yaml"}, file_values={"lora_r": 64, "lora_alpha": 128})
    assert (config.lora_r, config.source("lora_r")) == (4, "flag")
    assert (config.lora_alpha, config.source("lora_alpha")) == (128.0, "file run.yaml")
    assert config.source("seed") == "default"


def test_help_when_printed_then_names_every_flag_once() -> None:
    text = cli.help_text()
    assert [name for name in FLAGS if text.count(f"  --{name}=") != 1] == []
