"""scripts/preview_data.py: rows as the collator batches them, on a terminal, without one, and as a page."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from surefoot import tokens
from surefoot.data.preview import first_rows, pieces, visible, worst_rows
from surefoot.data.rows import Collator
from tests.conftest import ROOT, SMALL_MODEL, TRAIN_ROWS
from tests.data_tokenizer import EOS, make_tokenizer
from tests.test_data_prepare import alpaca, plan, prepare, texts, write

SCRIPT = [sys.executable, str(ROOT / "scripts/preview_data.py"), "--base_model", str(SMALL_MODEL)]
ROWS = [
    alpaca("one ", "<script>alert(1)</script> \u001b[31m"),
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello\n\tyou"}]},
    {"text": "  the cat"},
    *texts(20),
    alpaca("", "<b>nothing</b>"),
]  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write(tmp_path / "rows.jsonl", ROWS)


def preview(*words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SCRIPT, *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=200)


def test_rows_when_shown_without_a_terminal_then_have_brackets_specials_padding_and_their_facts(tmp_path: Path, path: str) -> None:
    done = preview("--data_path", path, "--val_set_size=0", "--rows", 3, "--output_dir", tmp_path / "run", "--bf16", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    report, first, second, third = done.stdout.split("\n\n")
    assert "audit: passed; 4.2 % (1) of the rows hold no answer to train on" in report.splitlines()
    facts, *lines = first.splitlines()
    assert facts.startswith(f"{path}:1 | trained | ")
    assert facts.endswith(" of them trained | format alpaca, prompt alpaca")
    assert lines[0].startswith("<|begin_of_text|>Below is an instruction")
    assert lines[3] == "<script>alert(1)</script> \\x1b[31m\u21b5"
    assert lines[-1].startswith("\u27e6one\u00b7<|end_of_text|>\u27e7 [<|finetune_right_pad_id|> x ")
    assert "\u27e6Hello\u21b5\n\u2192\tyou<|eot_id|><|end_of_text|>\u27e7" in second
    assert third.splitlines()[1].startswith("<|begin_of_text|>\u27e6\u00b7\u00b7the cat<|end_of_text|>\u27e7 [")
    assert "\033" not in done.stdout
    assert not (tmp_path / "run").exists()


def test_rows_when_shown_on_a_terminal_then_are_coloured(tmp_path: Path, path: str) -> None:
    ours, theirs = pty.openpty()
    command = [*SCRIPT, "--data_path", path, "--val_set_size=0", "--rows=1"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    said = b""
    try:
        while chunk := os.read(ours, 4096):
            said += chunk
    except OSError:  # Linux: the other end was closed
        pass
    os.close(ours)
    assert process.wait(timeout=200) == 0
    assert "\033[32mone\u00b7\033[0m\033[1m\033[32m<|end_of_text|>\033[0m" in said.decode()
    assert b"\xe2\x9f\xa6" not in said


class Page(HTMLParser):
    """The tags of a page, and the text of each class."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.texts: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "span":
            self.open.append(dict(attrs)["class"] or "")

    def handle_endtag(self, tag: str) -> None:
        if tag == "span":
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]] = self.texts.get(self.open[-1], "") + data


def test_page_when_rows_hold_markup_then_it_is_text_and_nothing_is_fetched(tmp_path: Path, path: str) -> None:
    target = tmp_path / "rows.html"
    words = ["--data_path", path, "--val_set_size=0", "--html", target]
    for more in ([], ["--worst"]):
        done = preview(*words, *more, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith(f"written: {target}\n")
        source = target.read_text(encoding="utf-8")
        page = Page()
        page.feed(source)
        assert not {"script", "link", "img", "iframe"} & page.tags
        assert "b" not in page.tags
        assert not any(word in source for word in ("http", "url(", "@import", "\x1b"))
        assert "prefers-color-scheme: dark" in source
        assert "<td>empty</td>" in source
        assert source.index("<td>empty</td>") < source.index('<div class="row">')
        if more:
            assert page.texts["source"] == '{"instruction": "<b>nothing</b>", "output": ""}'
        else:
            assert "<script>alert(1)</script>" in page.texts["read"]
            assert page.texts["trained"].startswith("trainedone\u00b7Hello")


def test_worst_rows_when_asked_for_then_are_those_of_the_audit_and_the_gate_still_refuses(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*texts(4), texts(1)[0], alpaca("")])
    done = preview("--data_path", path, "--val_set_size=0", "--worst", folder=tmp_path)
    assert done.returncode == 3
    assert f"\n{path}:6 | dropped: an empty answer | 0 tokens, 0 of them trained | format alpaca, prompt none | empty\n" in done.stdout
    assert f"\n{path}:5 | trained | " in done.stdout
    assert "| duplicated\n<|begin_of_text|>\u27e6row 0 one<|end_of_text|>\u27e7" in done.stdout
    assert done.stderr.startswith("preview_data.py: --audit=fail: the rows do not pass:\n  - 16.7 % (1) of 6 rows hold no answer")
    warned = preview("--data_path", path, "--val_set_size=0", "--audit=warn", folder=tmp_path)
    assert (warned.returncode, warned.stderr) == (0, "")
    assert "(from the cache)" in warned.stdout.splitlines()[0]
    assert "--audit=warn: the rows do not pass:" in warned.stdout


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (
            ["--rows=0", "--worst=maybe"],
            2,
            "  - --rows=0 is too small: the least is 1\n  - --worst=maybe must be True or False",
        ),
        (["--html", "no/where.html"], 2, "--html=no/where.html cannot be written: no is no folder"),
        (["--html=rows.jsonl"], 2, "--html=rows.jsonl must end in .html"),
        (["--row=3"], 2, "--row is not a flag"),
        (["--data_path=none.jsonl"], 2, "--data_path=none.jsonl does not exist"),
        (["--data_path", str(TRAIN_ROWS), "--prompt_style=none"], 2, "--prompt_style=none is neither auto"),
    ],
)
def test_command_when_wrong_then_one_message_and_finetunes_exit_code(tmp_path: Path, words: list[str], code: int, says: str) -> None:
    done = preview(*words, folder=tmp_path)
    assert done.returncode == code
    assert done.stderr.startswith("preview_data.py: ")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_page_when_it_cannot_be_written_then_says_so(tmp_path: Path, path: str) -> None:
    (tmp_path / "page.html").mkdir()
    done = preview("--data_path", path, "--html=page.html", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("preview_data.py: --html=page.html cannot be written: Is a directory")


def test_pieces_when_joined_then_are_the_row_and_its_answers() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SMALL_MODEL)
    collator = Collator(pad_token_id=tokens.settle(tokenizer).token_id)
    data = prepare(plan(str(TRAIN_ROWS), cutoff_len=4096, audit="fail"), tokenizer)
    answers = [json.loads(line)["output"] for line in TRAIN_ROWS.read_text().splitlines()][:40]
    shown = first_rows(data, collator, tokenizer, 40, 4)
    assert ["".join(piece.text for piece in row.pieces if piece.kind == "trained") for row in shown] == [
        visible(answer) + tokenizer.eos_token for answer in answers
    ]
    width = max(data.train.lengths[:4])
    padding = [row.pieces[-1].text.rpartition(" x ")[2] if row.pieces[-1].kind == "padding" else "0" for row in shown[:4]]
    assert [int(count) + length for count, length in zip(padding, data.train.lengths, strict=False)] == [-(-width // 8) * 8] * 4


def test_pieces_when_a_character_has_tokens_on_both_sides_then_it_is_shown_once() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("\u732b")["input_ids"]
    shown = list(pieces([*ids, tokenizer.eos_token_id], [False, False, *[True] * (len(ids) - 1)], len(ids) + 1, tokenizer))
    assert "".join(piece.text for piece in shown) == tokenizer.bos_token + "\u732b" + EOS


def test_worst_rows_when_nothing_was_found_then_there_are_none(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    data = prepare(plan(write(tmp_path / "rows.jsonl", texts(4))), tokenizer)
    assert worst_rows(data, Collator(pad_token_id=0), tokenizer, 5) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" a b ", "\u00b7a b\u00b7"),
        ("a  \n  b", "a\u00b7\u00b7\u21b5\n\u00b7\u00b7b"),
        ("a\tb", "a\u2192\tb"),
        ("\x1b[2J\u202e\u00a0\x9b", "\\x1b[2J\\u202e\\xa0\\x9b"),
        ("\u732b \u00e9", "\u732b \u00e9"),
    ],
)
def test_white_space_and_control_characters_when_shown_then_are_seen_and_not_obeyed(text: str, shown: str) -> None:
    assert visible(text) == shown
