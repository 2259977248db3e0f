"""What surefoot.launch renders: complete golden files, and values that survive every hop."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from surefoot.launch import __main__ as launch
from surefoot.launch import command, manifests
from surefoot.launch.ask import Ask, parse, settled
from tests import launching
from tests.conftest import ROOT

GOLDEN = [*sorted((ROOT / "launch/k8s").glob("*job*.yaml")), ROOT / "launch/skypilot.yaml"]
LINES = ROOT / "tests/golden/launch.txt"
SEEDS = range(6)


def ask(world: str, seed: int, **changes: object) -> Ask:
    return settled(Ask(world=world, flags=tuple(launching.words(seed)), **changes))  # type: ignore[arg-type]


def words_of(line: str) -> list[str]:
    """The words of a shown `python -m surefoot.launch ...` line, without the first three."""
    return shlex.split(line)[3:]


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.name)
def test_shipped_manifest_when_its_command_is_rendered_then_is_the_text(file: Path) -> None:
    first, text = file.read_text().split("\n", 1)
    assert launch.shown(launch.completed(parse(words_of(first.removeprefix("# "))))) == text


def test_golden_files_when_listed_then_are_all_kinds() -> None:
    assert [file.name for file in GOLDEN] == ["job.yaml", "jobset.yaml", "trainjob.yaml", "skypilot.yaml"]


def test_lines_when_rendered_then_are_the_golden_ones() -> None:
    pairs = LINES.read_text().strip().split("\n\n")
    assert len(pairs) == 5
    for pair in pairs:
        asked, line = pair.split("\n")
        assert launch.shown(launch.completed(parse(words_of(asked)))).strip().replace(str(ROOT), "CHECKOUT") == line


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("world", ["local", "docker", "slurm"])
def test_line_when_run_by_a_shell_then_hands_over_every_word(world: str, seed: int, tmp_path: Path) -> None:
    job = launch.COMMANDS[world](ask(world, seed))
    line = command.Command(variables=job.variables, words=(str(launching.recorder(tmp_path, "got")), *job.words)).text()
    subprocess.run(["sh", "-c", line], check=True)
    assert launching.recorded(tmp_path, "got") == list(job.words)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["job", "jobset", "trainjob"])
def test_manifest_when_the_kubelet_reads_it_then_args_are_the_words(kind: str, seed: int) -> None:
    wanted = ask("k8s", seed, kind=kind)
    args = next(found for document in yaml.safe_load_all(launch.document(wanted)) for found in args_of(document))
    assert [launching.kubelet(word) for word in args] == list(wanted.flags)


def args_of(document: object) -> list[list[str]]:
    """Every value under a key `args`, however deep."""
    if isinstance(document, list):
        return [found for part in document for found in args_of(part)]
    if not isinstance(document, dict):
        return []
    return [value for key, value in document.items() if key == "args"] + [found for value in document.values() for found in args_of(value)]


@pytest.mark.parametrize("seed", SEEDS)
def test_sky_task_when_its_script_runs_then_hands_over_every_word(seed: int, tmp_path: Path) -> None:
    wanted = ask("sky", seed, image="i", bucket="b")
    task = yaml.safe_load(launch.document(wanted))
    script = (
        task["run"]
        .replace("$HOME/sky_workdir/launch/docker.sh", str(launching.recorder(tmp_path, "got")))
        .replace(f"cd {manifests.RUNS}\n", "")
    )
    subprocess.run(
        ["bash", "-euc", script],
        check=True,
        env={**os.environ, "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "10.0.0.1"},
    )
    assert launching.recorded(tmp_path, "got") == list(wanted.flags)


@pytest.mark.parametrize("seed", SEEDS)
def test_docker_script_when_run_then_the_container_gets_every_word(seed: int, tmp_path: Path) -> None:
    launching.recorder(tmp_path, "docker")
    flags = launching.words(seed)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "GPUS": "0",
        "CACHE": str(tmp_path / "cache"),
        "MOUNTS": str(ROOT),
    }
    subprocess.run([ROOT / "launch/docker.sh", *flags], check=True, env=environment, cwd=tmp_path)
    got = launching.recorded(tmp_path, "docker")
    assert got[got.index("surefoot:stage1") + 1 :] == flags
    assert f"{ROOT}:{ROOT}" in got


def batch(folder: Path, flags: list[str], **variables: str) -> None:
    """launch/slurm.sbatch as the first node runs it, under the programs in `folder`."""
    (folder / "scontrol").write_text("#!/bin/sh\necho n1\n")
    (folder / "scontrol").chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1"}
    environment = {
        **os.environ,
        **slurm,
        "SUREFOOT": str(ROOT),
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PROFILE": "single",
        "HF_HOME": "",
        **variables,
    }
    subprocess.run([ROOT / "launch/slurm.sbatch", *flags], check=True, env=environment, cwd=folder)


def bound(*folders: Path) -> str:
    return ",".join(f"{folder}:{folder}" for folder in folders)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("container", ["", "apptainer"])
def test_batch_script_when_run_then_every_node_gets_every_word(container: str, seed: int, tmp_path: Path) -> None:
    program = container or "python"
    launching.recorder(tmp_path, program)
    (tmp_path / "srun").write_text('#!/bin/sh\nexport SLURM_NODEID=0\nwhile [ "$1" != bash ]; do shift; done\nexec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    flags = launching.words(seed)
    batch(tmp_path, flags, CONTAINER=container, IMAGE="an image.sif", MOUNTS=f"{ROOT / 'tests'}:{ROOT}")
    inside = ["exec", "--nv", "--bind", bound(tmp_path, ROOT, ROOT / "tests"), "an image.sif", "/surefoot/docker/entrypoint.sh"]
    assert launching.recorded(tmp_path, program) == [*(inside if container else [str(ROOT / "finetune.py")]), *flags]


def test_batch_script_when_under_pyxis_then_srun_starts_the_image_with_its_mounts(tmp_path: Path) -> None:
    launching.recorder(tmp_path, "srun")
    flags = launching.words(0)
    batch(tmp_path, flags, CONTAINER="pyxis", IMAGE="registry#surefoot:stage1", MOUNTS=str(ROOT / "tests"))
    got = launching.recorded(tmp_path, "srun")
    assert got[got.index("--container-image") + 1] == "registry#surefoot:stage1"
    assert got[got.index("--container-mounts") + 1] == bound(tmp_path, ROOT, ROOT / "tests")
    assert got[-len(flags) - 1 :] == ["/surefoot/docker/entrypoint.sh", *flags]
