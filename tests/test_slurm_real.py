"""launch/slurm.sbatch under a real Slurm (Debian's slurm-wlm and munge) on this machine; run as root with -m slow."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import launching, real
from tests.conftest import ROOT

pytestmark = pytest.mark.slow
CLUSTER = ROOT / "tests/slurm_cluster.sh"
PORT = 20000 + os.getpid() % 10000


class Cluster:
    """Runs Slurm's clients against the test's own daemons."""

    def __init__(self, folder: Path) -> None:
        self.environment = {
            **os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PYTHON": sys.executable, "SUREFOOT": str(ROOT), "GPUS": "2",
            "PROFILE": "cpu_2proc", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def __call__(self, *words: object, cwd: Path | None = None, **variables: str) -> str:
        environment = {**self.environment, **variables}
        return subprocess.run([*map(str, words)], cwd=cwd, env=environment, check=True, capture_output=True, text=True).stdout.strip()

    def submit(self, folder: Path, *words: object, **variables: str) -> str:
        """The job's number; its log is folder/surefoot-NUMBER.log."""
        return self("sbatch", "--parsable", *words, cwd=folder, **variables)

    def state(self, job: str) -> str:
        found = re.search(r"JobState=(\w+)", self("scontrol", "show", "job", job))
        return found[1] if found else ""

    def finish(self, job: str, folder: Path) -> None:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL")
        real.wait_for(lambda: self.state(job) in ended, f"job {job} ends", 200)
        log = (folder / f"surefoot-{job}.log").read_text()
        assert self.state(job) == "COMPLETED", log[-3000:]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    subprocess.run([CLUSTER, "start", folder, str(PORT)], check=True)
    yield Cluster(folder)
    subprocess.run([CLUSTER, "stop", folder], check=True)


def test_job_when_preempted_then_is_requeued_and_ends_as_if_left_alone(slurm: Cluster, tmp_path: Path) -> None:
    left_alone, preempted = tmp_path / "left_alone", tmp_path / "preempted"
    script = ROOT / "launch/slurm.sbatch"
    slurm.finish(slurm.submit(tmp_path, script, *real.flags(left_alone)), tmp_path)
    job = slurm.submit(tmp_path, script, *real.flags(preempted))
    real.wait_for(lambda: real.steps_done(preempted) >= 3, "three steps")
    slurm("scancel", "--batch", "--signal=USR1", job)
    real.wait_for(lambda: "Restarts=1" in slurm("scontrol", "show", "job", job), "the job is requeued")
    assert 3 <= real.steps_done(preempted) < real.STEPS
    slurm.finish(job, tmp_path)
    real.assert_same_run(preempted, left_alone)
    assert not list(tmp_path.glob(".surefoot-stop-*"))


def test_words_when_given_to_sbatch_then_reach_the_program_unchanged(slurm: Cluster, tmp_path: Path) -> None:
    words = [word for seed in range(4) for word in launching.words(seed)]
    program = launching.recorder(tmp_path, "python")
    slurm.finish(slurm.submit(tmp_path, ROOT / "launch/slurm.sbatch", *words, PYTHON=str(program), PROFILE="single", GPUS="1"), tmp_path)
    assert launching.recorded(tmp_path, "python")[1:] == words


def test_launch_when_submitted_to_slurm_then_the_program_has_the_cores_asked_for(slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "python").write_text('#!/bin/sh\nenv >"$0.env"\n')
    (tmp_path / "python").chmod(0o755)
    words = [
        "slurm",
        "--profile",
        "cpu_2proc",
        "--gpus",
        "2",
        "--cpus",
        "3",
        "--memory",
        "5",
        "--submit",
        "--",
        *real.flags(tmp_path / "out"),
    ]
    shown = slurm(sys.executable, "-m", "surefoot.launch", *words, cwd=tmp_path, PYTHONPATH=str(ROOT), PYTHON=f"{tmp_path}/python")
    job = shown.split()[-1]
    slurm.finish(job, tmp_path)
    assert "MinMemoryNode=10G" in slurm("scontrol", "show", "job", job)
    given = (tmp_path / "python.env").read_text().splitlines()
    assert {"SLURM_CPUS_ON_NODE=6", "SLURM_CPUS_PER_TASK=6", "PROFILE=cpu_2proc", "NODES=1", "GPUS=2"} <= set(given)


def test_gpus_when_not_in_the_cluster_then_nothing_is_submitted(slurm: Cluster, tmp_path: Path) -> None:
    flags = real.flags(tmp_path / "out")
    command = [
        sys.executable,
        "-m",
        "surefoot.launch",
        "slurm",
        "--gpus",
        "3",
        "--submit",
        "--",
        *flags,
        "--per_device_train_batch_size=1",
        "--batch_size=9",
    ]
    done = subprocess.run(command, cwd=tmp_path, env={**slurm.environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Requested node configuration is not available" in done.stderr
    assert slurm("squeue", "--noheader") == ""


def test_mistake_when_the_job_runs_then_it_fails_with_its_code_and_is_not_requeued(slurm: Cluster, tmp_path: Path) -> None:
    job = slurm.submit(tmp_path, ROOT / "launch/slurm.sbatch", *real.flags(tmp_path / "out"), "--lora_rr=3", PROFILE="single", GPUS="1")
    real.wait_for(lambda: slurm.state(job) == "FAILED", "the job fails")
    shown = slurm("scontrol", "show", "job", job)
    assert "ExitCode=2:0" in shown
    assert "Restarts=0" in shown
