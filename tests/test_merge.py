"""The merge: the same model as the adapter on the base it saw, for every kind of adapter that is merged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune import train
from surefoot import inference, row_sets
from tests.called import call
from tests.conftest import ROOT, SMALL_MODEL
from tests.export_runs import METHODS, distance, logits, merge, reference, saved, trained, untrained_adapter
from tests.runs import quick

__all__ = ["trained"]
Trained = Callable[[str], Path]


@pytest.mark.parametrize("method", METHODS)
def test_merged_model_when_reloaded_then_equals_the_adapter_on_the_base_it_saw(trained: Trained, tmp_path: Path, method: str) -> None:
    run = trained(method)
    merge(run, tmp_path / "out")
    expected = logits(reference(run, is_4bit=method == "qdora"))
    assert distance(expected, logits(tmp_path / "out")) < 1e-5
    assert distance(expected, logits(SMALL_MODEL)) > 1e-2  # the adapter changed something


def test_qdora_when_merged_onto_the_16bit_base_then_is_another_model_and_says_so(trained: Trained, tmp_path: Path) -> None:
    run = trained("qdora")
    said = merge(run, tmp_path / "out", onto="16bit")
    assert any("into the unquantized base as asked" in line for line in said)
    assert distance(logits(reference(run)), logits(tmp_path / "out")) < 1e-5
    assert distance(logits(reference(run, is_4bit=True)), logits(tmp_path / "out")) > 1e-2


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        {
            "target_modules": ["q_proj", "v_proj"],
            "use_dora": True,
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
        },
        {"target_modules": ["up_proj"], "init_lora_weights": "pissa"},
        {"target_modules": ["up_proj"], "init_lora_weights": "olora"},
        {"target_modules": ["embed_tokens", "o_proj"]},
        {"target_modules": ["lm_head", "o_proj"], "use_dora": True},
        {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["rslora", "patterns", "pissa", "olora", "embedding", "head", "saved_head"],
)
def test_adapters_of_other_programs_when_merged_then_equal_peft(tmp_path: Path, settings: dict[str, Any]) -> None:
    adapter = untrained_adapter(tmp_path / "adapter", **settings)
    said = merge(adapter, tmp_path / "out")
    expected = logits(reference(adapter))
    assert distance(expected, logits(tmp_path / "out")) < 1e-4
    assert distance(expected, logits(SMALL_MODEL)) > 1e-3
    is_untied = bool({"embed_tokens", "lm_head"} & {*settings["target_modules"], *settings.get("modules_to_save", ())})
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is not is_untied
    assert any("no backend.json" in line for line in said)


@pytest.mark.parametrize("is_file", [False, True], ids=["style", "jinja"])
def test_merged_model_when_asked_then_gets_the_prompt_that_training_gave(rows: Path, tmp_path: Path, is_file: bool) -> None:
    jinja = tmp_path / "own.jinja"
    jinja.write_text("Q: {{ instruction }}\nA: ")
    flags = quick(prompt_style=jinja if is_file else "alpaca_indented", max_steps=10, learning_rate=2e-2, eval_strategy="no")
    run = train(**flags | {"data_path": rows, "output_dir": tmp_path / "run"})
    jinja.unlink()  # the run and its export hold what they need
    assert call("merge.py", f"--adapter={run}", "--dtype=fp32", "--parity=False", "--out=merged", cwd=tmp_path).returncode == 0
    shutil.move(tmp_path / "merged", tmp_path / "elsewhere")
    question = json.loads(rows.read_text().splitlines()[0])["instruction"]
    asked = [call("infer.py", f"--lora_weights={of}", f"--prompt={question}", cwd=tmp_path) for of in (run, tmp_path / "elsewhere")]
    assert [done.returncode for done in asked] == [0, 0], asked[0].stderr + asked[1].stderr
    assert asked[0].stdout == asked[1].stdout
    trained, merged = (inference.open_model(inference.find(None, str(of))) for of in (run, tmp_path / "elsewhere"))
    example = row_sets.of_file(rows)[0]
    (ids,) = merged.prompt_ids([example], 8)
    assert [ids] == trained.prompt_ids([example], 8)
    assert merged.decode(ids).startswith(f"Q: {question}" if is_file else "Below is an instruction")
    assert merged.source.identity()["run"]["adapter"]["method"] == "dora"
    assert row_sets.held_out(merged.source) == row_sets.held_out(trained.source)


def test_shards_when_many_then_hold_the_same_tensors_as_one(trained: Trained, tmp_path: Path) -> None:
    merge(trained("dora"), tmp_path / "one", "bf16")
    merge(trained("dora"), tmp_path / "many", "bf16", shard_bytes=1 << 20)
    one, many = saved(tmp_path / "one"), saved(tmp_path / "many")
    files = list((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 4
    assert all(file.stat().st_size < (1 << 20) + 4096 or len(load_file(file)) == 1 for file in files)
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    again = untrained_adapter(tmp_path / "adapter", tmp_path / "many", target_modules=["q_proj"])
    merge(again, tmp_path / "from_shards")
    assert distance(logits(reference(again, tmp_path / "many")), logits(tmp_path / "from_shards")) < 1e-5


def test_vocabulary_when_pad_was_added_then_grows_and_no_new_row_wins(tmp_path: Path) -> None:
    adapter = untrained_adapter(tmp_path / "adapter", target_modules=["q_proj"])
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.add_special_tokens({"pad_token": "<|new_pad|>"})
    tokenizer.save_pretrained(adapter)
    said = merge(adapter, tmp_path / "out")
    found = logits(tmp_path / "out")
    assert any("vocabulary: 4096 -> 4160 rows" in line for line in said)
    assert found.shape[-1] == 4160 == json.loads((tmp_path / "out/config.json").read_text())["vocab_size"]
    assert distance(logits(reference(adapter)), found[..., :4096]) < 1e-5
    assert int(found.argmax(-1).max()) < 4096
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token_id == 4096


def test_everything_beside_the_weights_when_merged_then_is_carried_over(trained: Trained, tmp_path: Path) -> None:
    run = trained("dora")
    merge(run, tmp_path / "out", "fp16")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (run / name).read_bytes()
    modes = {file.stat().st_mode for folder in (run, tmp_path / "out") for file in folder.iterdir() if file.is_file()}
    assert len(modes) == 1  # whoever may read the config may read the weights
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["eos_token_id"] == 4081
    assert {tensor.dtype for tensor in saved(tmp_path / "out").values()} == {torch.float16}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float16"
    meta = json.loads((tmp_path / "out/surefoot_meta.json").read_text())
    assert meta["adapter"]["method"] == "DoRA"
    assert meta["base"]["merged_onto"] == "none"
    assert meta["run"]["data"]["fingerprint"] == json.loads((run / "run.json").read_text())["data"]["fingerprint"]
    assert meta["parity"].startswith("not checked")


def test_memory_when_a_model_of_several_shards_is_merged_then_stays_at_a_shard_and_the_adapter(tmp_path: Path) -> None:
    config = json.loads((SMALL_MODEL / "config.json").read_text())
    config |= {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 8, "num_key_value_heads": 8,
               "head_dim": 64}  # fmt: skip
    base = tmp_path / "base"
    shutil.copytree(SMALL_MODEL, base, ignore=shutil.ignore_patterns("*.safetensors"))
    (base / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        from transformers import AutoConfig

        names = {name: part.shape for name, part in AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).named_parameters()}
    names.pop("lm_head.weight", None)
    save_file({name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in names.items()}, base / "model.safetensors")
    size_mib = (base / "model.safetensors").stat().st_size / 2**20
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    layers = [name.removesuffix(".weight") for name, shape in names.items() if "_proj" in name]
    tensors = {f"base_model.model.{name}.lora_A.weight": torch.full((4, names[f"{name}.weight"][1]), 0.01) for name in layers}
    tensors |= {f"base_model.model.{name}.lora_B.weight": torch.full((names[f"{name}.weight"][0], 4), 0.01) for name in layers}
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "base_model_name_or_path": str(base)})
    )
    adapter_mib = (adapter / "adapter_model.safetensors").stat().st_size / 2**20
    code = """
import sys, threading, time
from pathlib import Path
from surefoot.export import merge, source
work = merge.prepare(source.read(sys.argv[1]), "bf16")
first = next(iter(work.adapter.layers))
merge.made(work, next(output for output in merge.outputs(work) if output.name == first + ".weight"))  # torch's own set-up
out = Path(sys.argv[2]); out.mkdir()
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
status = lambda name: next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)) / 1024
before = status("VmRSS")
assert sum(1 for _ in merge.write(work, out, shard_bytes=16 << 20)) == len(work.stored)
print(status("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(adapter), str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown_mib = float(done.stdout)
    assert size_mib > 300
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 15
    matrix_mib = 4 * 512 * 2048 * 4 / 2**20  # four fp32 copies of the largest matrix; 40 MiB for the allocator and the pages of a file
    assert grown_mib < 16 + adapter_mib + matrix_mib + 40, f"{grown_mib:.0f} MiB for a model of {size_mib:.0f} MiB"


def script(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/merge.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ}, timeout=200, cwd=ROOT)


def test_script_when_run_then_merges_judges_and_verifies_again(trained: Trained, tmp_path: Path) -> None:
    run = shutil.copytree(trained("dora"), tmp_path / "run")
    done = script("--adapter", run, "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    assert "parity holds" in done.stdout
    out = run / "merged-bf16"
    record = json.loads((out / "parity.json").read_text())
    assert record["verdict"] == "holds"
    assert record["tokenizer_differences"] == []
    tensors = load_file(out / "model.safetensors")
    name = next(name for name in tensors if "down_proj" in name)
    save_file(tensors | {name: tensors[name] * 1.5}, out / "model.safetensors", metadata={"format": "pt"})
    spoilt = script("--verify", out)
    assert spoilt.returncode == 4
    assert "is not what was trained" in spoilt.stderr.splitlines()[-1]
    assert json.loads((out / "parity.json").read_text())["verdict"] == "beyond the band"
