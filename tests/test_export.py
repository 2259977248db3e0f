"""Exports: GGUF and 4-bit judged against the adapter, prompts told to servers as they were trained on, pushes only said."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoTokenizer

from scripts import export as script_file
from surefoot import script
from surefoot.errors import BackendError, UsageError
from surefoot.export import formats, gguf_file, gguf_vocab, hub, merge, serving, source
from tests.conftest import SMALL_MODEL
from tests.export_runs import trained

__all__ = ["trained"]
Trained = Callable[[str], Path]


def export(run: Path, out: Path, form: str, **changes: Any) -> list[str]:
    said: list[str] = []
    job = formats.Job(out, form, overwrites=False, checks_parity=True, prompt_file="", converter="")._replace(**changes)
    formats.of_adapter(source.read(str(run)), job, said.append)
    return said


@pytest.mark.parametrize(
    ("method", "form"), [("dora", "gguf-f32"), ("dora", "gguf-q8_0"), ("lora", "gguf-bf16"), ("qdora", "gguf-f16"), ("dora", "bnb-4bit")]
)
def test_export_when_loaded_back_then_says_what_the_adapter_said(trained: Trained, tmp_path: Path, method: str, form: str) -> None:
    said = export(trained(method), tmp_path / "out", form)
    assert any(line.startswith("parity holds") for line in said)
    record = json.loads((tmp_path / "out/parity.json").read_text())
    (found,) = record["against"].values()
    assert record["tokenizer_differences"] == []
    assert found["greedy_equal"] >= (1 if form == "bnb-4bit" else 28)
    assert found["relative_max"] < {"gguf-f32": 1e-4}.get(form, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert any("DoRA adapters cannot be served unmerged" in line for line in said) is (method != "lora")


def test_gguf_when_written_then_holds_the_tokenizer_and_its_template(trained: Trained, tmp_path: Path) -> None:
    export(trained("dora"), tmp_path / "out", "gguf-q8_0", checks_parity=False)
    fields = GGUFReader(tmp_path / "out/out.Q8_0.gguf").fields
    tokenizer = AutoTokenizer.from_pretrained(trained("dora"))
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens == tokenizer.convert_ids_to_tokens(range(4096))
    assert fields["tokenizer.ggml.pre"].contents() == "llama-bpe"
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.token_type"].contents()[4084] == gguf_vocab.CONTROL
    assert fields["llama.attention.head_count_kv"].contents() == 4


def test_gguf_when_its_tokenizer_is_another_then_it_is_said(trained: Trained, tmp_path: Path) -> None:
    export(trained("lora"), tmp_path / "out", "gguf-f16", checks_parity=False)
    file = tmp_path / "out/out.F16.gguf"
    folder = shutil.copytree(SMALL_MODEL, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(trained("lora"))
    tokenizer.save_pretrained(folder)
    assert gguf_file.differences(file, folder) == []
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.eos_token = "<|eot_id|>"
    tokenizer.save_pretrained(folder)
    assert gguf_file.differences(file, folder) == ["chat template of the GGUF is another", "eos id of the GGUF is another"]


def test_rope_factors_when_scaled_as_llama3_then_divide_the_frequencies() -> None:
    config = json.loads((SMALL_MODEL / "config.json").read_text())
    assert gguf_file.rope_factors(config) is None
    config["head_dim"] = 128
    config["rope_parameters"] = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    factors = gguf_file.rope_factors(config)
    assert factors is not None
    assert factors.shape == (64,)
    assert factors[:20] == pytest.approx(1.0)  # short wavelengths stay
    assert factors[-20:] == pytest.approx(8.0)  # long ones are divided by the factor
    assert all(one <= other + 1e-6 for one, other in itertools.pairwise(factors))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mamba"}, "a GGUF of model type mamba is not written here (known: llama, mistral, qwen2, qwen3)"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope type yarn is not written here"),
        ({"sliding_window": 128}, "sliding_window=128 is not written here"),
    ],
)
def test_gguf_when_the_model_is_not_known_then_the_converter_is_named(changes: dict[str, Any], said: str) -> None:
    config = json.loads((SMALL_MODEL / "config.json").read_text())
    with pytest.raises(UsageError) as refused:
        gguf_file.check(Path("model"), config | changes)
    assert said in str(refused.value)
    assert "--converter=convert_hf_to_gguf.py" in str(refused.value)


def test_gguf_when_the_tokenizer_splits_in_an_unknown_way_then_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(SMALL_MODEL, tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += "|x"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"splits text in a way whose name in llama\.cpp is not known here"):
        gguf_vocab.read(folder, 4096)


def test_export_when_it_cannot_end_well_then_is_refused_before_the_merge(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "write", lambda *_, **__: pytest.fail("merged all the same"))
    run = shutil.copytree(trained("lora"), tmp_path / "run")
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
        with pytest.raises(BackendError, match=r"needs 0\.0 GiB of disk, and 0\.0 are free"):
            export(run, tmp_path / "out", "gguf-q8_0")
    content = json.loads((run / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += "|x"
    (run / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="splits text in a way"):
        export(run, tmp_path / "out", "gguf-q8_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_converter_when_given_then_writes_the_gguf_or_its_last_word_is_passed_on(tmp_path: Path) -> None:
    converter = tmp_path / "convert_hf_to_gguf.py"
    file = tmp_path / "model.gguf"
    converter.write_text("import sys, pathlib; a = sys.argv; pathlib.Path(a[a.index('--outfile') + 1]).write_text(' '.join(a[-2:]))")
    gguf_file.convert(str(converter), SMALL_MODEL, file, "gguf-q8_0")
    assert file.read_text() == "--outtype q8_0"
    converter.write_text("raise NotImplementedError('BPE pre-tokenizer was not recognized')")
    with pytest.raises(BackendError, match=r"failed \(exit 1\): NotImplementedError: BPE pre-tokenizer was not recognized"):
        gguf_file.convert(str(converter), SMALL_MODEL, file, "gguf-q8_0")


QWEN = (
    "{% if messages[0].role != 'system' %}{{ '<|start_header_id|>system\\nYou are kind.<|eot_id|>' }}{% endif %}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '\\n' + m.content + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize("template", [None, QWEN], ids=["llama", "default_system"])
def test_modelfile_when_made_from_a_chat_template_then_writes_its_text(template: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SMALL_MODEL)
    tokenizer.chat_template = template or tokenizer.chat_template
    found = serving.pieces(tokenizer, "chat")
    assert found is not None
    text = serving.modelfile("./x.gguf", found, tokenizer, adds_bos=True, system="Be kind.")
    assert 'SYSTEM """Be kind."""\n' in text
    assert "SYSTEM" not in serving.modelfile("./x.gguf", found, tokenizer, adds_bos=True)
    template_text = text.split('"""')[1]
    for system in ("", "Be brief."):
        turns = [("system", system)] * bool(system) + [("user", "One?"), ("assistant", "Two."), ("user", "Three?")]
        messages = [{"role": role, "content": said} for role, said in turns]
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.bos_token * (template is None) + go_template(template_text, turns, system) == expected
    assert 'PARAMETER stop "<|eot_id|>"\nPARAMETER stop "<|end_of_text|>"' in text


def go_template(text: str, turns: list[tuple[str, str]], system: str) -> str:
    """What Ollama makes of the few constructs used here: `if not .System`, `range .Messages`, `if eq .Role`."""
    text = re.sub(r"\{\{ if not \.System \}\}(.*?)\{\{ end \}\}", lambda found: "" if system else found[1], text, flags=re.S)
    start, _, rest = text.partition("{{ range .Messages }}")
    body, _, asks = rest.rpartition("{{ end }}")
    branches = dict(re.findall(r'\{\{ if eq \.Role "(\w+)" \}\}(.*?)\{\{ end \}\}', body, flags=re.S))
    return start + "".join(branches[role].replace("{{ .Content }}", said) for role, said in turns) + asks


def test_pieces_when_a_template_treats_turns_by_their_place_then_there_are_none() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SMALL_MODEL)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ loop.index }}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
    )
    assert serving.pieces(tokenizer, "chat") is None
    tokenizer.chat_template = None
    assert serving.pieces(tokenizer, "chat") is None


def test_serving_when_trained_on_alpaca_then_writes_that_prompt_and_not_the_chat_template(trained: Trained, tmp_path: Path) -> None:
    export(trained("dora"), tmp_path / "out", "gguf-f16", checks_parity=False)
    text = (tmp_path / "out/Modelfile").read_text()
    assert text.startswith("FROM ./out.F16.gguf")
    assert "### Instruction:\n{{ .Content }}\n\n### Response:\n{{ end }}" in text
    assert "{{ .Content }}<|end_of_text|>" in text
    assert "<|start_header_id|>" not in text
    tokenizer = AutoTokenizer.from_pretrained(trained("dora"))
    found = serving.pieces(tokenizer, "alpaca")
    assert found is not None
    tokenizer.chat_template = serving.jinja(found, adds_bos=True)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True)
    assert asked == f"<|begin_of_text|>{found.user[0]}Why?{found.user[1]}"
    assert asked.endswith("### Instruction:\nWhy?\n\n### Response:\n")


def test_push_when_not_confirmed_then_lists_and_sends_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "model.safetensors").write_bytes(bytes(1234))
    with pytest.raises(UsageError, match=r"it has no parity\.json"):
        hub.push(tmp_path, "me/model", is_confirmed=False, say=said.append)
    (tmp_path / "parity.json").write_text('{"verdict": "beyond the band"}')
    with pytest.raises(UsageError, match="its parity verdict is: beyond the band"):
        hub.push(tmp_path, "me/model", is_confirmed=True, say=said.append)
    (tmp_path / "parity.json").write_text('{"verdict": "holds"}')
    hub.push(tmp_path, "me/model", is_confirmed=False, say=said.append)
    assert said[0] == "dry run: would push 2 files to me/model (private; made if it does not exist)"
    assert any("1,234 bytes  model.safetensors" in line for line in said)
    assert said[-1] == "nothing was sent; --confirm_push sends it"
    with pytest.raises(BackendError, match="the Hub refused"):  # the tests are offline
        hub.push(tmp_path, "me/model", is_confirmed=True, say=said.append)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--format=gguf-f16"], "give one of --adapter and --model"),
        (["--format=gguf-q4_k_m", "--adapter=x"], "K-quants are made from gguf-f16 by llama.cpp's llama-quantize"),
        (["--adapter=x"], "give --format: one of bf16"),
        (["--format=bf16", "--model=x"], "--model=x is whole already"),
        (["--model=x", "--push_to_hub=name"], "--push_to_hub=name must be OWNER/NAME"),
        (["--model=x", "--confirm_push", "--format=bnb-4bit"], "--confirm_push has a meaning only with --push_to_hub"),
        (["--adapter=x", "--format=gguf-f16", "--converter=/gone.py"], "--converter=/gone.py does not exist: give the path of llama.cpp's"),
        (["--adapter=x", "--format=bf16", "--converter=/gone.py"], "--converter has a meaning only with a GGUF format"),
        (["--model=/gone", "--format=bnb-4bit"], "--model=/gone is no model folder"),
        (["--formt=bf16", "--adapter=x"], "--formt is not a flag. Did you mean --format?"),
    ],
)
def test_script_when_a_flag_is_wrong_then_says_so(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["export.py", *words])
    assert script.main(script_file.Flags, script_file.USAGE, script_file.run) == 2
    assert said in capsys.readouterr().err


@pytest.mark.gpu
def test_nf4_when_seen_on_the_gpu_then_the_merge_equals_the_live_adapter(trained: Trained, tmp_path: Path) -> None:
    assert torch.cuda.is_available()
    said = export(trained("qdora"), tmp_path / "out", "gguf-f32")
    assert any(line.startswith("parity holds") for line in said)
