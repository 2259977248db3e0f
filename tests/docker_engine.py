"""A Docker engine of the test's own (Debian's docker.io), and a base of Debian under the real base's name that the real Dockerfiles build on.

The base stands in for nvidia/cuda: it has no CUDA, so the images get torch's CPU build through --build-arg LOCK. SUREFOOT_TEST_ENGINE names a
folder that keeps the engine's images and layers from one run of the tests to the next.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import ROOT
from tests.real import wait_for

DOCKER = "/usr/bin/docker"  # Debian's; a newer client wants the buildx plug-in
PACKAGES = "ca-certificates,python3,python3-venv,gcc,g++,libc6-dev"
NOT_ON_A_CPU = re.compile(r"nvidia-|cuda-|triton|torch|xformers|unsloth|trl|diffusers|bitsandbytes|liger|cut-cross|sentencepiece")


def environment(folder: Path, **changes: str) -> dict[str, str]:
    """Variables under which `docker` is the test engine's client, and which nvidia-smi says two GPUs."""
    path = f"{folder}/bin:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "DOCKER_HOST": f"unix://{folder}/docker.sock", "MEMLOCK": "", "CACHE": f"{folder}/cache", **changes}


@contextmanager
def engine() -> Iterator[Path]:
    """The engine's folder. Its rights are those of a machine without CAP_SYS_RESOURCE and without iptables."""
    kept = os.environ.get("SUREFOOT_TEST_ENGINE")
    folder = Path(kept or tempfile.mkdtemp(prefix="docker-"))
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    stub(folder, "docker", f'exec {DOCKER} "$@"')
    stub(folder, "nvidia-container-runtime-hook", "exit 0")  # lets `--gpus` pass
    stub(folder, "nvidia-smi", 'printf "GPU 0: a\\nGPU 1: b\\n"')
    settings = {
        "data-root": f"{folder}/data", "exec-root": f"{folder}/exec", "pidfile": f"{folder}/docker.pid", "hosts": [f"unix://{folder}/docker.sock"],
        "iptables": False, "ip6tables": False, "bridge": "none", "storage-driver": "overlay2",
        "default-ulimits": {"nofile": {"Name": "nofile", "Hard": 1024, "Soft": 1024}},
    }  # fmt: skip
    (folder / "daemon.json").write_text(json.dumps(settings))
    log = (folder / "log").open("w")
    command = ["dockerd", "--config-file", folder / "daemon.json"]
    daemon = subprocess.Popen(command, env=environment(folder), stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: subprocess.run([DOCKER, "version"], env=environment(folder), capture_output=True).returncode == 0, "an engine")
        yield folder
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait()
        log.close()
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


def stub(folder: Path, name: str, script: str) -> None:
    (folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin" / name).chmod(0o755)


def torch_version() -> str:
    found = re.search(r"^torch==(\S+)", (ROOT / "scripts/dev.lock").read_text(), re.MULTILINE)
    assert found is not None
    return found[1] + "+cpu"


def import_base(folder: Path) -> None:
    """The stand-in base, with torch's CPU wheel in /wheels, under the names that the Dockerfiles ask for."""
    shutil.rmtree(folder / "checkout", ignore_errors=True)
    base = f"base:{torch_version().replace('+', '-')}"
    if subprocess.run([DOCKER, "image", "inspect", base], env=environment(folder), capture_output=True).returncode:
        make_base(folder, base)
    for number in (1, 2, 3):
        subprocess.run([DOCKER, "tag", base, base_of(number)], env=environment(folder), check=True)


def make_base(folder: Path, name: str) -> None:
    root, wheels = folder / "root", folder / "wheels"
    if not (root / "usr").exists():
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", root]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels, f"torch=={torch_version()}"]
    subprocess.run(download, check=True)
    certificates = "etc/ssl/certs/ca-certificates.crt"
    shutil.copy(f"/{certificates}", root / certificates)  # the host's, for indexes behind its own authorities
    variables = f"ENV SSL_CERT_FILE=/{certificates} PIP_CERT=/{certificates} UV_FIND_LINKS=/wheels"
    path = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    left_out = ["--exclude=./var/cache/apt", "--exclude=./etc/resolv.conf", "--exclude=./etc/hosts", "--exclude=./wheels"]
    files = subprocess.Popen(["tar", *left_out, "-c", "-C", root, ".", "-C", folder, "wheels"], stdout=subprocess.PIPE)
    subprocess.run([DOCKER, "import", "-c", variables, "-c", path, "-", name], stdin=files.stdout, env=environment(folder), check=True)
    assert files.wait() == 0


def base_of(number: int) -> str:
    """The real base's name without its digest, which a stand-in cannot have."""
    found = re.search(r"^ARG BASE=(.+)@", (ROOT / f"docker/stage{number}.Dockerfile").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def build(folder: Path, number: int) -> None:
    """docker/build.sh in a copy of this checkout that has a lock for CPUs and no `# syntax=` line, whose frontend is a download."""
    copy = folder / "checkout"
    if not copy.exists():
        listed = subprocess.run(
            ["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for name in listed.split("\0"):
            if name and (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
        for file in (copy / "docker").glob("*.Dockerfile"):
            file.write_text(file.read_text().partition("\n")[2])
        (copy / "docker/cpu.lock").write_text(cpu_lock(next((folder / "wheels").glob("torch-*.whl"))))
    arguments = {"BASE": base_of(number), "PYTHON": "3.11", "LOCK": "docker/cpu.lock", **({"FLASH_ATTN": "none"} if number == 2 else {})}
    options = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
    subprocess.run([copy / "docker/build.sh", f"stage{number}", "--network", "host", *options], env=environment(folder), check=True)


def cpu_lock(wheel: Path) -> str:
    """Stage 3's lock with torch's CPU build in place of what only a GPU uses."""
    packages = re.split(r"\n(?=[a-z])", (ROOT / "docker/stage3.lock").read_text())
    kept = [text for text in packages if not NOT_ON_A_CPU.match(text)]
    return "\n".join([*kept, f"torch=={torch_version()} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}", ""])
