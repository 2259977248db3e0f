"""The parity verdict: rounding is inside the bands, wrong merges are outside, and what is outside is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from surefoot.errors import NumericsError, UsageError
from surefoot.export import formats, judge, parity, prompts, source, story
from surefoot.export.judge import Subject
from surefoot.export.parity import BANDS, Band, Difference
from tests.conftest import ROOT, SMALL_MODEL
from tests.export_runs import job, trained

__all__ = ["trained"]
Trained = Callable[[str], Path]


def merged(run: Path, out: Path, dtype: str) -> Path:
    story.merge_adapter(source.read(str(run)), job(out, dtype), lambda _: None)
    return out


def spoil(folder: Path, part: str, factor: float) -> None:
    """Every tensor whose name has `part`, times a factor."""
    tensors = load_file(folder / "model.safetensors")
    wrong = {name: (tensor * factor if part in name else tensor) for name, tensor in tensors.items()}
    save_file(wrong, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("method", "dtype"), [("dora", "bf16"), ("qdora", "fp16"), ("lora", "fp32")])
def test_verdict_when_only_rounded_then_holds_with_room(trained: Trained, tmp_path: Path, method: str, dtype: str) -> None:
    out = merged(trained(method), tmp_path / "out", dtype)
    verdict = judge.of_adapter(source.read(str(trained(method))), Subject(out, dtype))
    assert verdict.holds
    (found,) = verdict.record["against"].values()
    assert found["prompts"] == 32
    assert found["relative_max"] < BANDS[dtype].logits / 2
    assert found["kl_mean"] < BANDS[dtype].kl / 2
    assert found["greedy_equal"] >= 28


def test_bands_when_read_then_are_those_that_were_measured() -> None:
    record = json.loads((ROOT / "benchmarks/results/export_bands_cpu.json").read_text())
    measured = {form: Band(one["band"]["relative_max"], one["band"]["kl_mean"]) for form, one in record["bands"].items()}
    assert measured == BANDS
    caught = [told["fp32"].split(" of ") for told in record["wrong_exports_outside"].values()]
    assert all(one == every for one, every in caught)


@pytest.mark.parametrize(("method", "dtype", "form"), [("dora", "bf16", ""), ("qdora", "fp32", "gguf-q8_0"), ("lora", "bf16", "bnb-4bit")])
def test_verdict_when_one_layers_adapter_is_lost_then_its_tensor_tells(
    trained: Trained, tmp_path: Path, method: str, dtype: str, form: str
) -> None:
    spoilt, folder = shutil.copytree(trained(method), tmp_path / "run"), tmp_path / "merged"
    tensors = load_file(spoilt / "adapter_model.safetensors")
    name = next(name for name in tensors if "layers.1.mlp.down_proj.lora_B" in name)
    save_file(tensors | {name: tensors[name] * 0}, spoilt / "adapter_model.safetensors")
    merged(spoilt, folder, dtype)
    subject = rounded(folder, tmp_path / "out", form) if form else Subject(folder, dtype)
    verdict = judge.of_adapter(source.read(str(trained(method))), subject, few(tmp_path))
    assert verdict.record["tensor_differences"] == [
        f"1 of {verdict.record['tensor_differences'][0].split()[2]} tensors are not those of merged but for {dtype}'s rounding, "
        "first model.layers.1.mlp.down_proj.weight"
    ]
    assert not verdict.holds


@pytest.mark.parametrize("form", ["gguf-q8_0", "bnb-4bit"])
def test_verdict_when_the_export_is_of_other_tensors_then_they_are_told(trained: Trained, tmp_path: Path, form: str) -> None:
    folder = merged(trained("lora"), tmp_path / "merged", "bf16")
    other = shutil.copytree(folder, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    one, two = (f"model.layers.{n}.mlp.up_proj.weight" for n in (1, 2))
    save_file(tensors | {one: tensors[two], two: tensors[one].clone()}, other / "model.safetensors", metadata={"format": "pt"})
    found = source.read(str(trained("lora")))
    right = judge.of_adapter(found, rounded(folder, tmp_path / "right", form), few(tmp_path))
    assert right.record["tensor_differences"] == []
    wrong = rounded(other, tmp_path / "wrong", form)._replace(made_from=folder)
    (said,) = judge.of_adapter(found, wrong, few(tmp_path)).record["tensor_differences"]
    assert said.startswith("2 of ")


def few(folder: Path) -> str:
    """A file of two prompts: tensors need none."""
    file = folder / "prompts.txt"
    file.write_text("\n".join(prompts.PROMPTS[:2]))
    return str(file)


def rounded(folder: Path, out: Path, form: str) -> Subject:
    """The model in `folder` exported, not judged yet."""
    formats.of_model(folder, formats.Job(out, form, False, False, "", ""), lambda _: None)
    file = next((path.name for path in out.glob("*.gguf")), None)
    return Subject(out, formats.BAND_OF[form], file, folder)


def test_verdict_when_a_qdora_adapter_is_merged_onto_the_wrong_base_then_does_not_hold(trained: Trained, tmp_path: Path) -> None:
    found = source.read(str(trained("qdora")), onto="16bit")
    story.merge_adapter(found, job(tmp_path / "out", "bf16"), lambda _: None)
    as_asked = judge.of_adapter(found, Subject(tmp_path / "out", "bf16"))
    assert as_asked.holds
    assert len(as_asked.record["against"]) == 2  # the second is how far it is from what was trained
    as_trained = judge.of_adapter(source.read(str(trained("qdora"))), Subject(tmp_path / "out", "bf16"))
    assert not as_trained.holds


def test_merge_when_its_result_is_wrong_then_is_put_aside_with_exit_code_4(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    judged = judge.of_adapter

    def on_a_bad_disk(found: source.Source, subject: Subject, prompt_file: str = "") -> judge.Verdict:
        spoil(subject.folder, "o_proj", 3.0)
        return judged(found, subject, prompt_file)

    monkeypatch.setattr(judge, "of_adapter", on_a_bad_disk)
    with pytest.raises(NumericsError, match=r"It is kept in .*out\.refused") as refused:
        story.merge_adapter(source.read(str(trained("dora"))), job(out, "bf16", checks_parity=True), lambda _: None)
    assert refused.value.exit_code == 4
    assert not out.exists()
    record = json.loads((tmp_path / "out.refused/parity.json").read_text())
    assert record["verdict"] == "beyond the band"
    assert "largest logit difference" in record["reasons"][0]


def test_tokenizers_when_template_or_special_tokens_differ_then_it_is_said(tmp_path: Path) -> None:
    before = AutoTokenizer.from_pretrained(SMALL_MODEL)
    assert parity.tokenizer_differences(before, AutoTokenizer.from_pretrained(SMALL_MODEL), prompts.PROMPTS) == []
    other = AutoTokenizer.from_pretrained(SMALL_MODEL)
    other.chat_template = other.chat_template + " "
    other.eos_token = "<|eot_id|>"
    found = parity.tokenizer_differences(before, other, prompts.PROMPTS)
    assert found == ["the chat template is another", "eos_token ('<|end_of_text|>', 4081) -> ('<|eot_id|>', 4084)"]
    folder = shutil.copytree(SMALL_MODEL, tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    found = parity.tokenizer_differences(before, AutoTokenizer.from_pretrained(folder), prompts.PROMPTS)
    assert len(found) == 32  # without its BOS


def difference(**changes: float) -> Difference:
    values = {"max_logit": 0.1, "mean_logit": 0.01, "relative_max": 0.01, "kl_mean": 1e-4, "kl_max": 1e-3, "greedy_equal": 32, "prompts": 32,
              "widest_flip": 0.0}  # fmt: skip
    return Difference(**{**values, **changes})  # type: ignore[arg-type]


def test_difference_when_not_finite_then_is_beyond_every_band() -> None:
    assert difference().beyond(BANDS["bf16"]) == []
    assert len(difference(relative_max=0.2, kl_mean=0.1).beyond(BANDS["bf16"])) == 2
    for band in BANDS.values():
        assert len(difference(relative_max=math.nan, kl_mean=math.nan).beyond(band)) == 2
    assert json.loads(json.dumps(difference(kl_max=math.inf).record(), allow_nan=False))["kl_max"] == "inf"


class Speaker:
    """A model whose logits are given."""

    device = torch.device("cpu")

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def __call__(self, input_ids: torch.Tensor) -> Speaker:
        return self


def test_comparison_when_logits_are_known_then_gives_their_numbers() -> None:
    expected = torch.tensor([[4.0, 0.0, 0.0], [4.0, 0.0, 0.0], [0.0, 2.0, 1.0], [4.0, 0.0, 0.0]])
    other = expected.clone()
    other[2] = torch.tensor([0.0, 1.0, 2.0])
    reference = parity.Reference([[0, 0, 0, 0]], [2], [expected])
    found = parity.compare(reference, Speaker(other[None]))
    assert (found.max_logit, found.relative_max, found.greedy_equal) == (1.0, 0.25, 0)
    assert found.widest_flip == 1.0
    p, q = expected[2].softmax(-1), other[2].softmax(-1)
    assert found.kl_max == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    assert found.kl_mean == pytest.approx(found.kl_max / 4, rel=1e-9)
    wider = torch.cat([expected, torch.tensor([[0.0], [0.0], [9.0], [0.0]])], dim=1)  # an added row wins
    assert parity.compare(reference, Speaker(wider[None])).widest_flip == math.inf
    assert (
        parity.compare(reference, Speaker(expected[None])).record()
        == difference(max_logit=0, mean_logit=0, relative_max=0, kl_mean=0, kl_max=0, greedy_equal=1, prompts=1).record()
    )


def test_prompts_when_given_as_a_file_then_are_its_first_32_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"line {n}" for n in range(40)))
    assert prompts.load(str(file))[-1] == "line 31"
    assert len(prompts.load("")) == 32
    file.write_text("\n\n")
    with pytest.raises(UsageError, match="holds no prompt"):
        prompts.load(str(file))
    with pytest.raises(UsageError, match="cannot be read"):
        prompts.load(str(tmp_path / "gone"))
