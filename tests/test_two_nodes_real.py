"""launch/node.sh on two hosts: network namespaces with addresses of their own; run as root with -m slow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from surefoot.launch import manifests
from tests import real
from tests.conftest import ROOT

pytestmark = pytest.mark.slow
NETWORK = ROOT / "tests/network.sh"
Node = subprocess.Popen[str]


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    tag = f"sf{os.getpid() % 1000}"
    subprocess.run([NETWORK, "up", tag], check=True)
    yield f"{tag}1", f"{tag}2"
    subprocess.run([NETWORK, "down", tag], check=True)


def start(hosts: tuple[str, str], flags: list[str]) -> list[Node]:
    """node.sh on each host, one process each."""
    shared = {
        "PYTHON": sys.executable,
        "PROFILE": "cpu_2proc",
        "NODES": "2",
        "GPUS": "1",
        "MASTER_ADDR": "10.77.0.1",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{host}", ROOT / "launch/node.sh", *flags],
            env={**os.environ, **shared, "NODE_RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, host in enumerate(hosts)
    ]  # fmt: skip


def processes(host: str) -> list[int]:
    return [int(word) for word in subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True).stdout.split()]


def ends(nodes: list[Node]) -> list[int]:
    output = [node.communicate(timeout=150)[0] for node in nodes]
    print("\n".join(text[-2000:] for text in output))
    return [node.returncode for node in nodes]


def test_two_nodes_when_one_is_told_to_stop_then_both_end_with_75_and_go_on_exactly(hosts: tuple[str, str], tmp_path: Path) -> None:
    left_alone, stopped = tmp_path / "left_alone", tmp_path / "stopped"
    assert ends(start(hosts, real.flags(left_alone))) == [0, 0]
    nodes = start(hosts, real.flags(stopped))
    real.wait_for(lambda: real.steps_done(stopped) >= 3, "three steps")
    nodes[1].send_signal(signal.SIGTERM)
    assert ends(nodes) == [75, 75]
    assert real.steps_done(stopped) < real.STEPS
    assert ends(start(hosts, [*real.flags(stopped), "--resume"])) == [0, 0]
    real.assert_same_run(stopped, left_alone)


def test_two_nodes_when_one_is_lost_then_the_other_ends_with_a_code_that_is_tried_again(hosts: tuple[str, str], tmp_path: Path) -> None:
    nodes = start(hosts, real.flags(tmp_path / "run", max_steps=1000))
    real.wait_for(lambda: real.steps_done(tmp_path / "run") >= 3, "three steps")
    for process in processes(hosts[1]):
        os.kill(process, signal.SIGKILL)
    survivor, _ = ends(nodes)
    assert survivor not in {0, *manifests.MISTAKES}
