"""Signals, a stop file, a full disk and a rank that stalls, met by real processes."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from surefoot import checkpoint, signals
from tests.conftest import ROOT
from tests.runs import quick, words

WAITING = """
import time
from surefoot import signals
with signals.heeded({file!r}, watches_launcher=False) as request:
    {begin}
    print("ready", flush=True)
    {then}
    while not request.is_asked() or {deaf}:
        time.sleep(0.01)
    print("asked by", request.asked, flush=True)
"""


def waiting(
    *, file: str | None = None, begun: bool = True, deaf: bool = False, then: str = "pass", new_group: bool = False
) -> subprocess.Popen[str]:
    """A process that heeds signals and has said that it is ready."""
    code = WAITING.format(file=file, begin="request.begin()" if begun else "pass", deaf=deaf, then=then)
    env, pipe = {**os.environ, "PYTHONPATH": str(ROOT)}, subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=new_group)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_when_a_step_is_under_way_then_is_noted_and_the_step_goes_on(number: signal.Signals) -> None:
    process = waiting()
    process.send_signal(number)
    said, errors = process.communicate(timeout=20)
    assert (process.returncode, said) == (0, f"asked by {number.name}\n")
    assert "a checkpoint follows at the end of this step" in errors


def test_signal_when_no_step_is_done_yet_then_leaves_at_once_with_75() -> None:
    process = waiting(begun=False)
    process.send_signal(signal.SIGTERM)
    assert "nothing is lost" in process.communicate(timeout=20)[1]
    assert process.returncode == 75


def test_signal_when_the_process_is_stuck_in_c_before_its_first_step_then_leaves_with_75() -> None:
    lock = "libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64); [libc.pthread_mutex_lock(lock) for _ in range(2)]"
    process = waiting(begun=False, then=f"import ctypes; {lock}")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75


def test_signal_when_it_goes_to_the_process_group_then_the_processes_that_load_data_stay(tmp_path: Path) -> None:
    child = f"child = os.fork(); child or (time.sleep(1), open({str(tmp_path / 'alive')!r}, 'w').close(), os._exit(0))"
    process = waiting(then=f"import os; {child}", new_group=True)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "asked by SIGTERM\n"
    time.sleep(1.2)
    assert (tmp_path / "alive").exists()


def test_signal_when_it_comes_again_then_stops_at_once_but_not_for_an_echo() -> None:
    process = waiting(deaf=True)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert process.poll() is None
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    assert "SIGINT after SIGTERM: stopped at once" in process.communicate(timeout=20)[1]
    assert process.returncode == 75


def test_stop_file_when_it_is_laid_then_is_found(tmp_path: Path) -> None:
    process = waiting(file=str(tmp_path / "stop"))
    (tmp_path / "stop").touch()
    assert process.communicate(timeout=20)[0] == f"asked by the stop file {tmp_path}/stop\n"


def until(happens: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def launch(*words_of_accelerate: str, flags: dict[str, object]) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    profile = ["--config_file", str(ROOT / "profiles/cpu_2proc.yaml"), "--main_process_port", str(port)]
    return [sys.executable, "-m", *words_of_accelerate, *profile, str(ROOT / "finetune.py"), *words(flags)]


def test_two_processes_when_their_launcher_gets_a_signal_then_all_save_the_same_step_and_it_exits_75(rows: Path, tmp_path: Path) -> None:
    flags = quick(data_path=rows, output_dir=tmp_path / "run", max_steps=500, eval_strategy="no", save_step=500)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = launch("surefoot.launcher", flags=flags)
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run/metrics.jsonl"
    until(lambda: metrics.exists() and bool(metrics.read_text()), process)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors[-3000:]
    assert "stopped by the stop file" in errors
    (saved,) = checkpoint.newest_whole(tmp_path / "run").checkpoints
    assert {path.name for path in saved.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert (record["status"], f"after step {saved.name[11:]} of 500" in record["reason"]) == ("preempted", True)


@pytest.mark.slow
def test_two_processes_when_accelerates_own_launcher_hides_their_75_then_rank_0_says_so(rows: Path, tmp_path: Path) -> None:
    flags = quick(data_path=rows, output_dir=tmp_path / "run", max_steps=500, eval_strategy="no", save_step=500)
    command = launch("accelerate.commands.launch", flags=flags)
    env = {name: value for name, value in os.environ.items() if name != signals.STOP_FILE}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run/metrics.jsonl"
    until(lambda: metrics.exists() and bool(metrics.read_text()), process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.count("`python -m surefoot.launcher` in place of `accelerate launch`") == 1, errors[-3000:]
    assert errors.count("The same command with --resume goes on") == 1
    assert len(checkpoint.newest_whole(tmp_path / "run").checkpoints) == 1


def test_disk_when_full_in_the_middle_of_a_save_then_exits_5_with_one_line_and_no_checkpoint_is_half(rows: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the adapter and the tokenizer fit, the optimizer's state does not."""
    flags = words(quick(data_path=rows, output_dir=tmp_path / "run", val_set_size=0, lora_r=8))
    limit = 700 * 1024

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, str(ROOT / "finetune.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, preexec_fn=small_disk)
    assert done.returncode == 5, done.stderr[-3000:]
    assert "the checkpoint of step 3 cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").glob("checkpoint-*"))


SLEEPER = """
import os, sys
if os.environ.get("RANK") == "1" and "finetune.py" in " ".join(sys.argv):
    import time
    from torch.utils.data import dataloader
    fetch, calls = dataloader._SingleProcessDataLoaderIter._next_data, []
    def slow(self):
        calls.append(1)
        if len(calls) == 4:
            time.sleep(600)
        return fetch(self)
    dataloader._SingleProcessDataLoaderIter._next_data = slow
"""


@pytest.mark.slow
def test_two_processes_when_one_stalls_then_all_stop_and_it_is_named_with_its_stack(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLEEPER)
    flags = quick(data_path=rows, output_dir=tmp_path / "run", eval_strategy="no", hang_timeout_s=6)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(launch("surefoot.launcher", flags=flags), env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 5, done.stderr[-3000:]
    assert done.stderr.count("and holds up the run (--hang_timeout_s=6)") == 1
    assert "finetune.py: rank 1 (" in done.stderr
    assert " in data and holds up the run" in done.stderr
    assert " in slow\n" in (tmp_path / "run/heartbeats/stacks-of-rank-1.txt").read_text()
    assert (tmp_path / "run/heartbeats/stacks-of-rank-0.txt").stat().st_size > 0
