"""Files to rows: every ending, and what is said about a file that cannot be read."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from surefoot.data.loading import read_rows
from surefoot.errors import DataError, UsageError

ROWS = [{"instruction": "Say\u2028one.", "output": 'one, "1"'}, {"instruction": "Say\ntwo.", "output": "two"}]


def write(path: Path, content: bytes) -> str:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def as_csv(path: Path) -> bytes:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["instruction", "output"])
        writer.writeheader()
        writer.writerows(ROWS)
    return path.read_bytes()


def as_parquet(path: Path) -> bytes:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path.read_bytes()


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", json.dumps(ROWS, indent=2).encode()),
        ("data.json", json.dumps({"version": "1", "data": ROWS}).encode()),
        ("lines.json", lines(ROWS)),
        ("lines.jsonl", b"\n" + lines(ROWS)),
        ("list.jsonl", json.dumps(ROWS).encode()),
        ("bom.jsonl", b"\xef\xbb\xbf" + lines(ROWS)),
        ("crlf.jsonl", lines(ROWS).replace(b"\n", b"\r\n")),
        ("rows.csv", None),
        ("rows.parquet", None),
    ],
)
def test_file_when_of_a_known_ending_then_gives_its_rows(tmp_path: Path, name: str, content: bytes | None, ending: str) -> None:
    if content is None:
        content = as_csv(tmp_path / "plain") if name.endswith(".csv") else as_parquet(tmp_path / "plain")
    path = write(tmp_path / (name + ending), content)
    assert [row.columns for row in read_rows([path], "train")] == ROWS


def test_files_when_several_then_follow_each_other_and_rows_know_their_place(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", b"\n" + lines(ROWS))
    second = write(tmp_path / "b.json", json.dumps(ROWS).encode())
    assert [row.where for row in read_rows([first, second], "train")] == [f"{first}:2", f"{first}:3", f"{second}:1", f"{second}:2"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", b'[{"instruction": "a",\n "output"', "a.json:2: not valid JSON: Expecting ':' delimiter at column 10"),
        ("a.jsonl", b'{"a": "b"}\n{oops\n', "a.jsonl:2: not valid JSON: Expecting property name"),
        ("a.jsonl", '{"a": "b"}\n{"a": "caf\xe9"}\n'.encode("latin-1"), "not UTF-8: byte 0xe9 at offset 21 (line 2)"),
        ("a.jsonl", '{"a": "b"}\n'.encode("utf-16"), "If it is UTF-16, convert it: iconv -f UTF-16 -t UTF-8"),
        ("a.json", b"", "a.json is empty (0 bytes)"),
        ("a.json", b"[]", "a.json: 0 rows"),
        ("a.json", b" \n", "a.json: 0 rows"),
        ("a.jsonl", b"\n\n", "a.jsonl: 0 rows"),
        ("a.csv", b"instruction,output\n", "a.csv: 0 rows"),
        ("a.json", b"[1, 2]", "a.json:1: a row must be an object with named columns, found a number (1)"),
        ("a.jsonl", b'{"a": "b"}\n["c"]\n', "a.jsonl:2: a row must be an object with named columns, found a list of 1"),
        ("a.json", b'"text"', "a.json: holds text (text), where a list of rows is needed"),
        ("a.csv", b"a,b\n1,2,3\n", "a.csv:2: 3 cells, where the header has 2 columns (a, b)"),
        ("a.csv", b"a,a\n1,2\n", "a.csv:1: the header names a column twice"),
        ("a.csv", b'a,b\n"1,2\n', "not valid CSV"),
        ("a.parquet", b"not parquet", "a.parquet: not a readable parquet file"),
    ],
)
def test_file_when_it_cannot_be_read_then_is_named_with_place_and_reason(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    with pytest.raises(DataError) as caught:
        read_rows([write(tmp_path / name, content)], "train")
    assert says in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_gzip_file_when_cut_off_or_no_gzip_then_is_refused(tmp_path: Path, keep: float) -> None:
    whole = gzip.compress(lines(ROWS * 50))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: int(len(whole) * keep)] or b"no gzip")
    with pytest.raises(DataError, match="not a whole gzip file"):
        read_rows([str(tmp_path / "a.jsonl.gz")], "train")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing.json", "does not exist"),
        ("./missing", "does not exist"),
        ("/nowhere/a/b", "does not exist"),
        ("rows.txt", "unknown ending .txt. Known: .json, .jsonl, .csv, .parquet, each also with .gz"),
        ("folder", "is a folder"),
    ],
)
def test_path_when_wrong_then_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.txt").write_text("hello")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError) as caught:
        read_rows([name], "train")
    assert says in str(caught.value)
    assert caught.value.exit_code == 2


def test_hub_id_when_offline_then_says_to_download_first(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"--data_path=nobody/nothing is no file here.*download it first and give its files"):
        read_rows(["nobody/nothing"], "train")
