"""Our GGUF files in llama.cpp itself: it splits text, fills the chat template and answers as the adapter did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import xllamacpp
from transformers import AutoTokenizer

from surefoot.export import formats, judge, parity, prompts, source
from tests.export_runs import trained

__all__ = ["trained"]
Trained = Callable[[str], Path]


class Server:
    """llama.cpp's server in this process, on a port of its own."""

    def __init__(self, file: Path) -> None:
        asked = xllamacpp.CommonParams()
        asked.model.path = str(file)
        asked.n_ctx, asked.n_parallel, asked.cpuparams.n_threads = 1024, 1, 1
        asked.warmup, asked.verbosity = False, -1
        self.server = xllamacpp.Server(asked)

    def post(self, path: str, **body: Any) -> Any:
        asked = Request(self.server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(asked, timeout=60) as answer:
            return json.load(answer)

    def greedy(self, ids: list[int], count: int) -> list[int]:
        answer = self.post("/completion", prompt=ids, n_predict=count, temperature=0, return_tokens=True, cache_prompt=False)
        tokens: list[int] = answer["tokens"]
        return tokens


@pytest.mark.parametrize(
    ("method", "form"), [("dora", "gguf-f16"), ("lora", "gguf-q8_0"), pytest.param("qdora", "gguf-bf16", marks=pytest.mark.slow)]
)
def test_gguf_when_llama_cpp_runs_it_then_says_what_the_adapter_said(trained: Trained, tmp_path: Path, method: str, form: str) -> None:
    found = source.read(str(trained(method)))
    formats.of_adapter(found, formats.Job(tmp_path / "out", form, False, False, "", ""), lambda _: None)
    (file,) = (tmp_path / "out").glob("*.gguf")
    server, (reference,) = Server(file), judge.observe(found).references.values()
    ends = {AutoTokenizer.from_pretrained(trained(method)).eos_token_id}
    flips = []
    for ids, start, logits in zip(reference.rows, reference.starts, reference.logits, strict=True):
        expected = ids[start:]
        said = server.greedy(ids[:start], parity.NEW_TOKENS)
        parts = next((n for n, (one, other) in enumerate(zip(expected, said, strict=False)) if one != other), None)
        if parts is not None:
            row = logits[start - 1 + parts]
            flips.append(float(row[expected[parts]] - row[said[parts]]))
        else:
            assert len(said) == len(expected) or set(expected[len(said) :]) <= ends
    assert len(flips) <= 4
    assert max(flips, default=0.0) < 0.5  # where it parts, two tokens were nearly as likely


def test_gguf_when_llama_cpp_reads_text_then_has_the_ids_and_the_prompt_of_training(trained: Trained, tmp_path: Path) -> None:
    formats.of_adapter(source.read(str(trained("dora"))), formats.Job(tmp_path / "out", "gguf-q8_0", False, False, "", ""), lambda _: None)
    (file,) = (tmp_path / "out").glob("*.gguf")
    server, tokenizer = Server(file), AutoTokenizer.from_pretrained(trained("dora"))
    for text in prompts.PROMPTS:
        assert server.post("/tokenize", content=text, add_special=True)["tokens"] == tokenizer(text)["input_ids"]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"}]
    turns += [{"role": "assistant", "content": "Two."}, {"role": "user", "content": "  Three?\n"}]
    expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    prompt = server.post("/apply-template", messages=turns)["prompt"]  # without BOS, which llama.cpp puts before every text
    assert tokenizer.bos_token + prompt == expected
    read = server.post("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]
    assert read == tokenizer(expected, add_special_tokens=False)["input_ids"]
