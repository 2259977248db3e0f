"""tidy(): what Fire would swallow, guess or ignore becomes exact, or an error."""

from __future__ import annotations

import shlex

import pytest

from surefoot import cli
from surefoot.errors import UsageError


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--base_model=m --lora_r 8", {"base_model": "m", "lora_r": "8"}),
        ("--base_model m --target_modules q_proj k_proj v_proj --bf16 True", {"base_model": "m", "target_modules": ["q_proj", "k_proj", "v_proj"], "bf16": "True"}),
        ("--base_model m --target_modules '[\"q_proj\", \"k_proj\"]'", {"base_model": "m", "target_modules": '["q_proj", "k_proj"]'}),
        ("--base_model m --bf16 --load_4bit", {"base_model": "m", "bf16": True, "load_4bit": True}),
        ("--base_model m --max_steps -1", {"base_model": "m", "max_steps": "-1"}),
        ("--base_model m --output_dir 1.10 --run_name=a=b", {"base_model": "m", "output_dir": "1.10", "run_name": "a=b"}),
        ("--base_model m --run_name \"it's; $x\"", {"base_model": "m", "run_name": "it's; $x"}),
    ],
)  # fmt: skip
def test_tidy_when_line_is_good_then_fire_gets_exact_literals(line: str, expected: dict[str, object]) -> None:
    assert cli.tidy(shlex.split(line)) == [f"--{name}={value!r}" for name, value in expected.items()]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--base_model m stray", "stray word 'stray'"),
        ("--base_model m --lora_r --bf16", "--lora_r needs a value"),
        ("--base_model m --target_modules", "--target_modules needs a value"),
        ("--base_model m -lr 3", "-lr begins with one hyphen. Did you mean --lr?"),
        ("--base_model m -x 3", "stray word '-x'"),
        ("--base_model m --lora_r 8 --lora_rank 4 stray", "--lora_rank is not a flag"),
    ],
)
def test_tidy_when_line_is_wrong_then_refuses_it(line: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        cli.tidy(shlex.split(line))
    assert says in str(caught.value)
