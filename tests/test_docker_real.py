"""The images and launch/docker.sh under a real Docker engine; run as root with -m slow (Debian's docker.io and debootstrap)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests import docker_engine, real
from tests.conftest import ROOT
from tests.docker_engine import environment

pytestmark = pytest.mark.slow
SCRIPT = ROOT / "launch/docker.sh"


@pytest.fixture(scope="module")
def engine() -> Iterator[Path]:
    with docker_engine.engine() as folder:
        docker_engine.import_base(folder)
        for number in (1, 2, 3):
            docker_engine.build(folder, number)
        yield folder


def run(engine: Path, cwd: Path, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """launch/docker.sh on a CPU."""
    variables = {"GPUS": "0", "MOUNTS": str(ROOT), **variables}
    return subprocess.run([SCRIPT, *map(str, words)], cwd=cwd, env=environment(engine, **variables), capture_output=True, text=True)


def docker(engine: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([docker_engine.DOCKER, *words], env=environment(engine), capture_output=True, text=True)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_image_when_built_then_is_labelled_listed_and_without_root(engine: Path, stage: int) -> None:
    (image,) = json.loads(docker(engine, "image", "inspect", f"surefoot:stage{stage}").stdout)
    assert image["Config"]["User"] == "1000:1000"
    assert image["Config"]["Labels"]["org.opencontainers.image.title"] == f"surefoot stage {stage}"
    assert "LD_LIBRARY_PATH=/usr/local/nvidia/lib64" in image["Config"]["Env"]
    compiled = "/surefoot/.venv/lib/python3.11/site-packages/transformers/__pycache__/__init__.cpython-311.pyc"
    script = f'cat /surefoot/sbom.cdx.json; dpkg-query -W -f "\\${{Package}}\n" >&2; test -f {compiled}'
    shown = docker(engine, "run", "--rm", "--entrypoint", "sh", f"surefoot:stage{stage}", "-c", script)
    assert shown.returncode == 0
    assert {"libibverbs1", "ibverbs-providers"} <= set(shown.stderr.split())
    components = [(part["name"], part["purl"]) for part in json.loads(shown.stdout)["components"]]
    assert {"transformers", "torch"} <= {name for name, _ in components}
    assert {name for name, url in components if url.startswith("pkg:deb/")} == set(shown.stderr.split())


def test_image_when_started_then_has_checked_its_stack_and_has_a_doctor(engine: Path, tmp_path: Path) -> None:
    done = run(engine, tmp_path, "scripts/doctor.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"stack as pinned: torch {docker_engine.torch_version()}" in done.stdout
    assert "fit for stage 1 on a CPU" in done.stdout


def test_image_when_another_stack_is_pinned_then_nothing_starts_unless_told(engine: Path) -> None:
    other = ("run", "--rm", "--volume", f"{ROOT}/docker/stage1.lock:/surefoot/stack.lock:ro", "surefoot:stage1")
    refused = docker(engine, *other, "--help")
    assert refused.returncode == 5
    assert "cuDNN is not loaded, pinned is 9.1.0.70" in refused.stderr
    assert docker(engine, *other, "--no_check", "--help").returncode == 0


def test_image_when_the_hosts_python_comes_along_then_keeps_to_its_own(engine: Path) -> None:
    hosts = ("--env", "PYTHON=/no/python", "--env", "PYTHONPATH=/no/packages")
    done = docker(engine, "run", "--rm", *hosts, "surefoot:stage1", "--no_check", "--help")
    assert done.returncode == 0, done.stderr


def test_script_when_started_by_a_plain_user_then_writes_where_the_users_groups_may(engine: Path) -> None:
    user, group = 12345, 4242
    with TemporaryDirectory() as folder:  # pytest's own are for root alone
        home, shared = Path(folder, "home"), Path(folder, "shared")
        for place, owner, mode in ((Path(folder), 0, 0o755), (home, user, 0o755), (shared, 0, 0o2770)):
            place.mkdir(exist_ok=True)
            os.chown(place, owner, group)
            place.chmod(mode)
        (home / "write.py").write_text(f"open('{shared}/written', 'w')")
        engine.chmod(0o755)
        os.chown(engine / "docker.sock", 0, group)
        command = ["setpriv", f"--reuid={user}", f"--regid={user}", f"--groups={group}", SCRIPT, "--no_check", home / "write.py"]
        variables = environment(engine, GPUS="0", HOME=str(home), CACHE=str(home), MOUNTS=str(shared))
        done = subprocess.run(command, cwd=home, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        made = (shared / "written").stat()
    assert (made.st_uid, made.st_gid) == (user, group)


def test_demo_when_run_in_the_image_then_learns(engine: Path, tmp_path: Path) -> None:
    done = run(engine, tmp_path, "scripts/demo.py", f"--output_dir={tmp_path}/demo")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "demo/adapter_model.safetensors").exists()


def test_run_when_docker_stops_it_then_ends_with_75_and_goes_on_exactly(engine: Path, tmp_path: Path) -> None:
    left_alone, stopped = tmp_path / "left_alone", tmp_path / "stopped"
    two = {"GPUS": "2", "PROFILE": "cpu_2proc"}
    assert run(engine, tmp_path, *real.flags(left_alone), **two).returncode == 0
    command = [SCRIPT, *real.flags(stopped)]
    started = subprocess.Popen(command, cwd=tmp_path, env=environment(engine, **two, MOUNTS=str(ROOT)), stderr=subprocess.PIPE, text=True)
    real.wait_for(lambda: real.steps_done(stopped) >= 3, "three steps")
    started.send_signal(signal.SIGTERM)
    started.communicate(timeout=120)
    assert started.returncode == 75
    assert real.steps_done(stopped) < real.STEPS
    assert run(engine, tmp_path, *real.flags(stopped), "--resume", **two).returncode == 0
    real.assert_same_run(stopped, left_alone)


def test_container_when_stopped_before_the_run_began_then_ends_with_75(engine: Path) -> None:
    name = docker(engine, "run", "--detach", "--init", "surefoot:stage1", "--help").stdout.strip()
    time.sleep(0.5)  # the check of the stack takes seconds
    assert docker(engine, "stop", "--time", "60", name).returncode == 0
    assert docker(engine, "inspect", "--format", "{{.State.ExitCode}}", name).stdout == "75\n"
    docker(engine, "rm", name)


def test_mistake_when_made_in_the_container_then_its_exit_code_comes_out(engine: Path, tmp_path: Path) -> None:
    done = run(engine, tmp_path, "--no_check", *real.flags(tmp_path / "out"), "--lora_rr=3")
    assert done.returncode == 2
    assert "Did you mean --lora_r?" in done.stderr


def test_gpus_when_asked_for_then_the_engine_gets_them(engine: Path, tmp_path: Path) -> None:
    (tmp_path / "show.py").write_text("import os; print(os.environ['NVIDIA_VISIBLE_DEVICES'], os.environ['GPUS'])")
    assert run(engine, tmp_path, "--no_check", "show.py", GPUS="2", CUDA_VISIBLE_DEVICES="").stdout == "0,1 2\n"
    done = run(engine, tmp_path, "--no_check", "show.py", GPUS="3")
    assert (done.returncode, done.stdout) == (2, "")
    assert "GPUS=3 but this machine has 2" in done.stderr


def test_compose_when_brought_up_then_every_stage_ends_well(engine: Path, tmp_path: Path) -> None:
    compose = Path(sys.executable).parent / "docker-compose"
    tmp_path.chmod(0o777)  # compose starts the image's own user
    variables = environment(engine, RUNS=str(tmp_path), COMPOSE_PROJECT_NAME="stages")
    done = subprocess.run(
        [compose, "--file", ROOT / "docker/compose.yaml", "up", "--no-build"], env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("stack as pinned: torch") == 3
    shown = [compose, "--file", ROOT / "docker/compose.yaml", "ps", "--all", "--format", "json"]
    states = [
        json.loads(line) for line in subprocess.run(shown, env=variables, capture_output=True, text=True, check=True).stdout.splitlines()
    ]
    assert sorted((state["Service"], state["ExitCode"]) for state in states) == [("stage1", 0), ("stage2", 0), ("stage3", 0)]
    subprocess.run([compose, "--file", ROOT / "docker/compose.yaml", "down", "--volumes"], env=variables, check=True, capture_output=True)


def test_launch_when_submitted_to_docker_then_runs_there(engine: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "surefoot.launch",
        "docker",
        "--gpus",
        "0",
        "--submit",
        "--",
        *real.flags(tmp_path / "out", max_steps=2),
    ]
    variables = environment(engine, MOUNTS=str(ROOT), PYTHONPATH=str(ROOT))
    assert subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True).returncode == 0
    assert (tmp_path / "out/adapter_model.safetensors").exists()
    assert os.stat(tmp_path / "out/run.json").st_uid == os.getuid()
