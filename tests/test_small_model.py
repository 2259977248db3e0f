"""The shipped small model, its sample rows, and the script that makes both."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "small_model"
DATA = ROOT / "examples" / "data"
SCRIPT = ROOT / "scripts" / "make_small_model.py"
MAX_MODEL_BYTES = 10_000_000
MAX_DATA_BYTES = 700_000
# Measured 3.14 nats a token on these 40 held-out questions; an untrained model gives ln(4096) = 8.32.
MAX_QUESTION_LOSS = 4.0
PROMPT = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True, dtype=torch.float32).eval()


def sample(name: str) -> list[dict[str, str]]:
    path = DATA / f"commonsense_{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def question(row: dict[str, str]) -> str:
    """The question without case and punctuation."""
    return re.sub(r"\W+", " ", question_text(row).lower()).strip()


def question_text(row: dict[str, str]) -> str:
    """The question in the words of its data set, which is how the model saw questions."""
    body = row["instruction"].split(": ", 1)[1]
    return re.split(r"\s*Answer(?:1:| format:)", body)[0]


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_folders_as_shipped_stay_small() -> None:
    sizes = {folder: sum(p.stat().st_size for p in folder.iterdir()) for folder in (MODEL, DATA)}
    assert 0 < sizes[MODEL] <= MAX_MODEL_BYTES
    assert 0 < sizes[DATA] <= MAX_DATA_BYTES


def test_model_when_loaded_is_a_tied_llama_with_grouped_queries(model: PreTrainedModel) -> None:
    config = model.config
    assert config.model_type == "llama"
    assert config.tie_word_embeddings
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.max_position_embeddings >= 1024


def test_model_on_shipped_questions_has_a_loss_far_below_uniform(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    losses = []
    for row in sample("heldout")[:40]:
        asked = question_text(row)
        ids = tokenizer(asked, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    mean = sum(losses) / len(losses)
    assert mean < MAX_QUESTION_LOSS < math.log(model.config.vocab_size) / 2


def test_tokenizer_when_loaded_has_no_pad_but_llama3s_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.pad_token is None
    assert "<|finetune_right_pad_id|>" in tokenizer.get_vocab()
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")


def test_tokenizer_when_called_adds_bos_and_no_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "Réponse 42: naïve\n\n  two"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids[1:]) == text


def test_chat_template_with_generation_prompt_renders_llama3_headers(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert shown == PROMPT + "<|start_header_id|>assistant<|end_header_id|>\n\n"


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_sample_rows_when_read_are_whole_and_answered(name: str) -> None:
    rows = sample(name)
    assert len(rows) >= 300
    for row in rows:
        assert set(row) == {"instruction", "input", "output", "answer", "task"}
        assert row["instruction"]
        assert row["input"] == ""
        assert row["output"] == f"the correct answer is {row['answer']}"
        assert row["answer"] in row["instruction"].split("Answer format:")[1]


def test_sample_rows_of_train_and_heldout_share_no_question() -> None:
    train, heldout = ({question(row) for row in sample(name)} for name in ("train", "heldout"))
    assert train
    assert heldout
    assert not train & heldout


def test_data_licence_as_shipped_names_every_task() -> None:
    text = (DATA / "LICENSE").read_text(encoding="utf-8")
    assert "ODC-By" in text
    for source in ("Social IQa", "BoolQ", "OpenBookQA"):
        assert source in text


def test_script_with_tiny_corpus_and_three_steps_writes_model_and_sample(tmp_path: Path) -> None:
    rows = [row for row in sample("train") if row["task"] == "social_i_qa"][:12]
    write_lines(tmp_path / "corpus.jsonl", [*rows, *sample("heldout")[:1]])
    write_lines(tmp_path / "test_social_i_qa.jsonl", sample("heldout")[:4])
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": "Say hello.", "input": "", "output": "Hello."}]), encoding="utf-8")
    script = tmp_path / "scripts" / SCRIPT.name
    script.parent.mkdir()
    # Half of the corpus stays for pretraining: as shipped, the script would take all 12 rows as the sample.
    script.write_text(SCRIPT.read_text(encoding="utf-8").replace("(480, 300)", "(6, 4)"), encoding="utf-8")
    command = [
        sys.executable,
        str(script),
        f"--corpus={tmp_path / 'corpus.jsonl'}",
        f"--alpaca={tmp_path / 'alpaca.json'}",
        f"--out={tmp_path / 'model'}",
        f"--sample_out={tmp_path / 'data'}",
        "--steps=3",
        "--device=cpu",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "6 of 13 rows" in done.stdout
    assert "step 3/3 loss" in done.stdout
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) > 256
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    counts = [len((tmp_path / "data" / f"commonsense_{n}.jsonl").read_text().splitlines()) for n in ("train", "heldout")]
    assert counts == [6, 4]
