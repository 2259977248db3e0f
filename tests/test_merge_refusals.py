"""What is not merged: a reason for every adapter, base, folder and flag that the merge refuses."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from scripts import merge as script_file
from surefoot import script
from surefoot.errors import NumericsError, UsageError
from surefoot.export import place, source
from tests.conftest import SMALL_MODEL
from tests.export_runs import merge, trained, untrained_adapter

__all__ = ["trained"]
Trained = Callable[[str], Path]


def changed(folder: Path, file: str, **values: Any) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | values))


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("backend.json", {"backend": "unsloth"}, "backend unsloth loads the base in its own way"),
        ("backend.json", {"quantization": "gptq"}, "quantization gptq is not known"),
        (
            "backend.json",
            {"adapter": {"method": "lora", "r": 16, "alpha": 8.0, "rslora": False}},
            "are of two runs (method lora there, dora here; r 16",
        ),
        ("adapter_config.json", {"peft_type": "LOHA"}, "only LoRA and DoRA"),
        ("adapter_config.json", {"init_lora_weights": "loftq"}, "init_lora_weights=loftq changed the base weights"),
        ("adapter_config.json", {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4 changed"),
        ("adapter_config.json", {"lora_bias": True}, "lora_bias=True is not merged"),
        ("adapter_config.json", {"trainable_token_indices": [1]}, "trainable_token_indices=[1] is not merged"),
    ],
)
def test_run_when_its_records_speak_against_the_merge_then_is_refused(
    trained: Trained, tmp_path: Path, file: str, values: dict[str, Any], said: str
) -> None:
    run = shutil.copytree(trained("dora"), tmp_path / "run")
    changed(run, file, **values)
    with pytest.raises(UsageError) as refused:
        source.read(str(run))
    assert said in str(refused.value)


def test_base_when_another_than_the_run_named_then_is_refused(trained: Trained, tmp_path: Path) -> None:
    other = shutil.copytree(SMALL_MODEL, tmp_path / "other")
    with pytest.raises(UsageError, match=r"which is here\. Drop --base_model"):
        source.read(str(trained("dora")), str(other))
    run = shutil.copytree(trained("dora"), tmp_path / "run")
    changed(run, "backend.json", base_model="/gone/model")
    assert any("the records name /gone/model" in note for note in source.read(str(run), str(other)).notes)
    changed(other, "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(UsageError, match=r"itself stored quantized \(gptq\)"):
        source.read(str(run), str(other))


def test_base_when_of_another_shape_then_the_layer_is_named(tmp_path: Path) -> None:
    adapter = untrained_adapter(tmp_path / "adapter", target_modules=["gate_proj"])
    wrong = shutil.copytree(SMALL_MODEL, tmp_path / "wrong")
    tensors = load_file(wrong / "model.safetensors")
    save_file(
        {name: tensor[:, :100].contiguous() if "gate_proj" in name else tensor for name, tensor in tensors.items()},
        wrong / "model.safetensors",
    )
    changed(adapter, "adapter_config.json", base_model_name_or_path=str(wrong))
    with pytest.raises(UsageError, match=r"gate_proj.lora_A.weight: shape \(4, 256\) in the file, \(4, 100\) for this base"):
        merge(adapter, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_adapter_when_not_finite_or_too_large_for_fp16_then_is_refused(tmp_path: Path) -> None:
    adapter = untrained_adapter(tmp_path / "adapter", target_modules=["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    save_file(tensors | {name: tensors[name] * 1e7}, adapter / "adapter_model.safetensors")
    with pytest.raises(NumericsError, match="beyond fp16's 65504: use --dtype=bf16"):
        merge(adapter, tmp_path / "out", "fp16")
    save_file(tensors | {name: tensors[name] * float("nan")}, adapter / "adapter_model.safetensors")
    with pytest.raises(NumericsError, match=r"is not finite\. The training broke"):
        merge(adapter, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_output_when_in_use_then_only_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    foreign, ours = tmp_path / "foreign", tmp_path / "ours"
    for folder, name in ((foreign, "notes.txt"), (ours, "surefoot_meta.json")):
        folder.mkdir()
        (folder / name).write_text("{}")
    with pytest.raises(UsageError, match="exists: give --overwrite"):
        place.check(ours, overwrites=False)
    with pytest.raises(UsageError, match="nothing that this program exported"):
        place.check(foreign, overwrites=True)
    place.check(ours, overwrites=True)
    with pytest.raises(FileNotFoundError), place.staged(ours) as folder:
        (folder / "half" / "gone").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "ours"]
    assert (ours / "surefoot_meta.json").is_file()
    with place.staged(ours) as folder:
        (folder / "new").touch()
    assert [file.name for file in ours.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "ours"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--adaptr=x"], "--adaptr is not a flag. Did you mean --adapter?"),
        (["x"], "stray word 'x'"),
        (["--adapter=/gone"], "--adapter=/gone does not exist"),
        ([f"--adapter={SMALL_MODEL}"], "is a whole model, there is nothing to merge"),
        (["--dtype=int4", "--adapter=x"], "--dtype=int4 is not one of fp16, bf16, fp32"),
        (["--shard_gib=-1"], "--shard_gib=-1.0 is too small"),
        (["--dtype=bf16"], "give --adapter"),
        ([f"--verify={SMALL_MODEL}"], "is no folder that this script merged"),
    ],
)
def test_script_when_a_flag_is_wrong_then_says_so_in_one_line(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["merge.py", *words])
    assert script.main(script_file.Flags, script_file.USAGE, script_file.run) == 2
    assert said in capsys.readouterr().err
