"""surefoot/script.py: words in, flags out, through Fire; and the sign of life over long work."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from surefoot import script
from surefoot.script import REQUIRED, flag
from tests.conftest import ROOT


@dataclass(frozen=True, kw_only=True)
class Flags:
    style: str = flag(REQUIRED, "text", is_bare=True)
    in_: str = flag("x", "a name that Python keeps for itself")
    files: tuple[str, ...] = flag((), "a list")
    seed: int | None = flag(None, "a number or nothing")
    rate: float = flag(1.5, "a number")
    overwrite: bool = flag(False, "a switch")


@dataclass(frozen=True, kw_only=True)
class Folders:
    folders: tuple[str, ...] = flag((), "a list", is_bare=True)
    out: str = flag("", "text")


def started(kind: type, words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[object]]:
    """The exit code, and the flags that the script's run() was given."""
    given: list[object] = []
    monkeypatch.setattr(sys, "argv", ["some.py", *words])
    return script.main(kind, "usage", given.append), given


@pytest.mark.parametrize(
    "text",
    ['["Short", 2]', "None", "1e5", "007", "a=b", "-", "- -", "a 'b' \"c\"\n\\n{}", "(1,)", "\udcff", "--x=1", "True", "#c", "", "1+1"],
)
def test_text_when_it_goes_through_fire_then_stays_exact(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"--style={text}", f"--in={text}", "--files", "a,b", "1", "[2]", "--rate=-2.5e-8", "--seed=-3", "--overwrite"]
    expected = Flags(style=text, in_=text, files=("a,b", "1", "[2]"), seed=-3, rate=-2.5e-8, overwrite=True)
    assert started(Flags, words, monkeypatch) == (0, [expected])


def test_words_when_no_flag_stands_before_them_then_go_to_the_bare_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert started(Flags, ["--overwrite", "no", "Be brief."], monkeypatch) == (0, [Flags(style="Be brief.")])
    assert started(Folders, ["a,b", "--out", "x", "[c]"], monkeypatch) == (0, [Folders(folders=("a,b", "[c]"), out="x")])
    assert started(Folders, [], monkeypatch) == (0, [Folders()])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "some.py: --style is missing\n"),
        (["--style"], "some.py: --style needs a value\n"),
        (["Be", "brief."], "some.py: stray word 'brief.': flags begin with --, and values with spaces need quotes\n"),
        (["--style=x", "y"], "some.py: stray word 'y'"),
        (["--stile=x", "--seed=1.5"], "some.py: 3 problems:\n  - --stile is not a flag. Did you mean --style?\n  - --seed=1.5 must be"),
        (["--style=x", "--in_=y"], "some.py: --in_ is not a flag. Did you mean --in?\n"),
    ],
)
def test_words_when_wrong_then_are_named_together_with_exit_code_2(
    words: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert started(Flags, words, monkeypatch) == (2, [])
    assert capsys.readouterr().err.startswith(says)


def test_work_when_it_takes_long_then_lines_say_how_much_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "PATIENCE_S", -1.0)
    assert list(script.told("abc", 3, "merged", "tensor")) == ["a", "b", "c"]
    assert capsys.readouterr().err.splitlines() == [f"merged: {done} of 3 tensors" for done in (1, 2, 3)]


def test_words_when_another_programs_flags_stand_among_them_then_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []
    words = ["--base_model", "x", "--out=y", "--targets", "a", "b", "--folders", "c", "d"]
    monkeypatch.setattr(sys, "argv", ["some.py", *words])
    assert script.main(Folders, "usage", lambda flags, rest: given.extend((flags, rest)) or 4, passes_on=True) == 4
    assert given == [Folders(folders=("c", "d"), out="y"), ["--base_model", "x", "--targets", "a", "b"]]


@pytest.mark.parametrize(("number", "code", "said"), [(signal.SIGINT, 130, "some.py: stopped by Ctrl-C\n"), (signal.SIGTERM, 143, "")])
def test_script_when_told_to_stop_then_cleans_up_and_says_so_in_a_line(number: int, code: int, said: str, tmp_path: Path) -> None:
    program = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
sys.argv[0] = "some.py"
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
from surefoot import script
from surefoot.export import place
from tests.test_script import Folders
def run(flags):
    with place.staged(Path({str(tmp_path / "out")!r})) as folder:
        (folder / "half").touch()
        os.kill(os.getpid(), {int(number)})
        input()
sys.exit(script.main(Folders, "usage", run))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (code, said)
    assert list(tmp_path.iterdir()) == []
