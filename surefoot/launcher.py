"""python -m surefoot.launcher WORDS: accelerate launch with the run's own exit code (surefoot.launch, for schedulers, ends here).

WORDS are accelerate launch's own. It (1.15) answers whatever a run's processes say with exit code 1, lets SIGUSR1 kill it and leave them
behind, and gives them 30 s after SIGTERM. Here the first SIGTERM, SIGINT or SIGUSR1 becomes a stop file that the processes look for in
each step, and a second one kills them.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

import yaml

from surefoot import terminal
from surefoot.errors import BackendError, Preempted, UsageError
from surefoot.signals import ECHO_S, STOP_FILE, STOPS

USAGE = "python -m surefoot.launcher [--config_file profiles/NAME.yaml] [--num_processes N] [...] finetune.py FLAGS"
MEANING = "Takes the words of accelerate launch (its --help has them all) and passes on stop signals and the run's own exit code."
PROFILES = Path(__file__).resolve().parent.parent / "profiles"


def main(words: list[str]) -> int:
    """The exit code of the run: 75 where a process was preempted, else the first failed process's own, 128 + N where signal N ended it."""
    if not words or words[0] in ("-h", "--help"):
        print(f"{terminal.text(USAGE)}\n\n{terminal.text(MEANING)}")
        return 0
    complaint = _complaint(words)
    if complaint is not None:
        print(f"surefoot.launcher: {complaint}", file=sys.stderr)
        return UsageError.exit_code
    with tempfile.TemporaryDirectory(prefix="surefoot-stop-") as folder:
        return _launch(words, Path(os.environ.get(STOP_FILE) or Path(folder) / "stop"))


def _launch(words: list[str], file: Path) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ[STOP_FILE] = str(file)
    asked = _pass_on_signals(file)
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"  # torchrun's own handlers would replace those made here
    try:
        parser = launch_command_parser()
        parser.usage = USAGE  # of its own errors: accelerate's runs over 100 lines
        launch_command(parser.parse_args(words))
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        return exit_code((failure.exitcode for failure in failures), was_asked=bool(asked))
    except subprocess.CalledProcessError as error:
        return exit_code([error.returncode], was_asked=bool(asked))
    except SignalException as error:
        return 128 + error.sigval
    except ConnectionError as error:  # of several machines; on one of them accelerate looks for a free port itself
        print(f"surefoot.launcher: --main_process_port: {str(error).splitlines()[0]}", file=sys.stderr)
        return BackendError.exit_code
    finally:
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)  # nothing is left that could be stopped
        file.unlink(missing_ok=True)  # obeyed; it must not stop the next start
    return 0


def _complaint(words: list[str]) -> str | None:
    """What accelerate answers with a traceback (no such profile), or not at all (one process where several were asked for)."""
    parser = argparse.ArgumentParser(prog="surefoot.launcher", usage=USAGE, add_help=False, allow_abbrev=False)
    parser.add_argument("--config_file")
    parser.add_argument("--num_processes", type=int)
    program = next((place for place, word in enumerate(words) if word.endswith(".py")), len(words))
    own, _ = parser.parse_known_args(words[:program])
    if own.config_file is None:
        return None
    profile = Path(own.config_file)
    if not profile.is_file():
        ours = ", ".join(sorted(file.stem for file in PROFILES.glob("*.yaml")))
        return f"--config_file={profile} does not exist (looked in {Path.cwd()}). {PROFILES} has {ours}"
    try:
        content = yaml.safe_load(profile.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return f"--config_file={profile} is not valid YAML: {' '.join(str(error).split())}"
    if isinstance(content, dict) and content.get("distributed_type") == "NO" and (own.num_processes or 1) > 1:
        way_out = "Use profiles/ddp.yaml, without GPUs profiles/cpu_2proc.yaml"
        return f"--num_processes={own.num_processes}: {profile} starts one process. {way_out}"
    return None


def exit_code(codes: Iterable[int], *, was_asked: bool) -> int:
    """Of a run whose processes failed with these codes, the first to fail first; was_asked: a stop signal was passed on to them."""
    found = list(codes)
    if Preempted.exit_code in found or (was_asked and found[0] < 0):
        return Preempted.exit_code
    return found[0] if found[0] > 0 else 128 - found[0]


def _pass_on_signals(file: Path) -> list[float]:
    """Returns the times of the signals to come."""
    asked: list[float] = []

    def pass_on(_number: int, _frame: FrameType | None) -> None:
        asked.append(time.monotonic())
        file.touch()
        if asked[-1] - asked[0] > ECHO_S:
            for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)  # checkpoints are whole or not there

    for number in STOPS:
        signal.signal(number, pass_on)
    return asked


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
