"""python -m surefoot.launch as a user starts it: what it refuses, how fast it answers, what it hands over."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from surefoot.config import FLAGS
from surefoot.errors import SurefootError
from surefoot.launch.ask import Ask, parse, profiles, settled
from surefoot.launch.check import check, launched
from tests import launching
from tests.conftest import ROOT, SMALL_MODEL, TRAIN_ROWS

FLAGS_ON_A_VOLUME = ("--base_model", "org/model", "--data_path", "rows.jsonl", "--output_dir", "/runs/out")
FLAGS_OF_A_RUN = ("--base_model", str(SMALL_MODEL), "--data_path", str(TRAIN_ROWS), "--output_dir", "out")


def launch(*words: object, cwd: Path, path: str = os.environ["PATH"], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "surefoot.launch", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["slurmm", "--", "--base_model", "m"], "'slurmm' is no world. Use local, docker, slurm, k8s, sky"),
        (["local"], "no flags for finetune.py"),
        (["local", "--stage", "4", "--", "--base_model", "m"], "--stage=4 is none of 1, 2, 3"),
        (["local", "--profile", "dpp", "--", "--base_model", "m"], f"--profile=dpp is none of {', '.join(profiles())}"),
        (["local", "--gpu", "4", "--", "--base_model", "m"], "--gpu is no option of surefoot.launch. Did you mean --gpus?"),
        (["local", "--kind", "job", "--", "--base_model", "m"], "--kind means nothing under local"),
        (["k8s", "--image", "i", "--kind", "pod", "--", "--base_model", "m"], "--kind=pod is none of job, jobset, trainjob"),
        (["k8s", "--image", "i", "--name", "My_Run", "--", "--base_model", "m"], "--name='My_Run' must be"),
        (["k8s", "--", "--base_model", "m"], "--image is missing: k8s pulls it from a registry"),
        (["sky", "--image", "i", "--", "--base_model", "m"], "--bucket is missing: its name is taken for the whole world"),
        (["local", "--gpus", "2", "--base_model", "m"], "-- is missing before --base_model: first the world and its options, then --"),
        (["slurm", "--partition", "gpu", "--", "--base_model", "m"], "sbatch's own are set as SBATCH_PARTITION, SBATCH_ACCOUNT and the like"),
        (["slurm", "--time", "tomorrow", "--", "--base_model", "m"], "--time='tomorrow' must be MINUTES, HOURS:MINUTES:SECONDS"),
        (["k8s", "--image", "my registry/i", "--", "--base_model", "m"], "--image='my registry/i' must not hold blanks"),
        (["sky", "--image", "i", "--bucket", "My_Bucket", "--", "--base_model", "m"], "--bucket='My_Bucket' must be 3 to 63 lower-case letters"),
        (["slurm", "--container", "pyxis", "--", "--base_model", "m"], "--container needs --image under slurm"),
        (["slurm", "--image", "i", "--", "--base_model", "m"], "--image needs --container under slurm"),
        (["slurm", "--profile", "cpu", "--gpus", "2", "--", "--base_model", "m"], "--profile=cpu starts one process, not 1 x 2"),
        (["local", "--submit=false", "--", "--base_model", "m"], "--submit takes no value: leave it away to submit nothing"),
        (["docker", "--stage", "2", "--", "--base_model", "m", "--stage=3"], "--stage=3 after -- is not the image's, --stage=2. Give it before --, for both"),
        (["local", "--", "--help"], "`python finetune.py --help` shows its flags"),
        (["local", "--nodes", "0", "--", "--base_model", "m"], "--nodes=0 must be a whole number from 1 on"),
        (["local", "--gpus", "--", "--base_model", "m"], "--gpus needs a value"),
        (["slurm", "--", *FLAGS_OF_A_RUN, "--lora_rr", "4"], "--lora_rr is not a flag. Did you mean --lora_r?"),
        (["slurm", "--", *FLAGS_OF_A_RUN, "--overwrite"], "--overwrite under slurm would remove the run's own checkpoints"),
        (["slurm", "--", *FLAGS_OF_A_RUN, "--grace_s", "9"], "--grace_s after -- is not what slurm would keep to"),
        (["docker", "--", *FLAGS_OF_A_RUN], f"--data_path={TRAIN_ROWS} are not in the container, which has this folder and MOUNTS. "
         f"Set MOUNTS={SMALL_MODEL.parent}:{TRAIN_ROWS.parent}\n"),
        (["slurm", "--container", "pyxis", "--image", "i", "--", *FLAGS_OF_A_RUN, "--output_dir", "/tmp/o"], "/tmp/o is not in the container"),
        (["slurm", "--container", "apptainer", "--image", "no.sif", "--", *FLAGS_OF_A_RUN], "--image=no.sif does not exist. Make it with: apptainer pull no.sif"),
        (["k8s", "--image", "i", "--", *FLAGS_ON_A_VOLUME, "--output_dir", "/tmp/out"], "--output_dir=/tmp/out is not below /runs"),
        (["k8s", "--image", "i", "--", "--config", str(ROOT / "configs/run_bnb.yaml")], "run_bnb.yaml is a file of this machine"),
        (["docker", "--", "--config", str(ROOT / "configs/run_bnb.yaml")], f"Set MOUNTS={ROOT}/configs"),
        (["sky", "--image", "i", "--bucket", "runs", "--", *FLAGS_ON_A_VOLUME, "--data_path", "../d.json"], "--data_path=../d.json is not below /runs"),
        (["slurm", "--nodes", "3", "--", *FLAGS_OF_A_RUN, "--batch_size", "128"], "--batch_size=128 cannot be split"),
        (["slurm", "--", *FLAGS_OF_A_RUN, "--data_path", "none.jsonl"], "none.jsonl does not exist"),
    ],
)  # fmt: skip
def test_command_when_wrong_then_one_message_and_exit_2(words: list[str], said: str, tmp_path: Path) -> None:
    done = launch(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_help_when_asked_for_after_the_world_then_is_shown(tmp_path: Path) -> None:
    done = launch("slurm", "--gpus", 2, "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--container" in done.stdout


def test_option_when_unknown_then_its_value_is_not_another_problem(tmp_path: Path) -> None:
    done = launch("slurm", "--partition", "gpu", "--", *FLAGS_OF_A_RUN, cwd=tmp_path)
    assert done.stderr.count("is no option of surefoot.launch") == 1


def test_mount_when_it_does_not_exist_then_is_refused_before_anything_is_shown(tmp_path: Path) -> None:
    done = launch("docker", "--", *FLAGS_OF_A_RUN, cwd=tmp_path, MOUNTS=f"{ROOT}:/no/such")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "surefoot.launch: MOUNTS: /no/such does not exist\n"


def test_files_when_the_world_has_its_own_then_are_not_looked_for_here() -> None:
    flags = ("--base_model", "/runs/model", "--data_path", "/runs/rows.jsonl", "--output_dir", "/runs/out", "--load_4bit", "--bf16", "True")
    assert check(settled(Ask(world="k8s", nodes=2, gpus=8, flags=flags))).train.batch_size == 128
    with pytest.raises(SurefootError, match=r"/runs/rows\.jsonl does not exist"):
        check(settled(Ask(world="slurm", nodes=2, gpus=8, flags=flags)))


@pytest.mark.parametrize("profile", profiles())
def test_profile_when_asked_for_then_its_engine_is_planned(profile: str) -> None:
    processes = 1 if profile in ("single", "cpu") else 2
    ask = settled(Ask(world="slurm", gpus=processes, profile=profile, flags=FLAGS_OF_A_RUN))
    here = check(ask).machine
    assert here.world_size == processes
    assert here.engine == {"ds": "deepspeed", "fs": "fsdp"}.get(profile[:2], "ddp" if processes > 1 else "single")
    assert ("WORLD_SIZE" in launched(ask)) == (processes > 1)


def test_answer_when_nothing_is_submitted_then_takes_a_second_at_most(tmp_path: Path) -> None:
    def seconds() -> float:
        """Of CPU, which other work on the machine does not lengthen as it does the clock's."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert launch("k8s", "--image", "i", "--nodes", 2, "--gpus", 8, "--", *FLAGS_ON_A_VOLUME, cwd=tmp_path).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) <= 1


@pytest.mark.parametrize(("world", "client"), [("slurm", "sbatch"), ("k8s", "kubectl"), ("sky", "sky"), ("docker", "docker")])
def test_submit_when_there_is_no_client_then_says_so(world: str, client: str, tmp_path: Path) -> None:
    options = {"k8s": ["--image", "i"], "sky": ["--image", "i", "--bucket", "runs"]}.get(world, [])
    flags = FLAGS_ON_A_VOLUME if options else FLAGS_OF_A_RUN
    done = launch(world, *options, "--submit", "--", *flags, cwd=tmp_path, path=str(tmp_path), MOUNTS=str(ROOT))
    assert done.returncode == 2
    assert f"--submit needs {client}, which is not installed here. Nothing was submitted" in done.stderr


def test_submit_when_there_is_a_client_then_it_gets_what_was_shown(tmp_path: Path) -> None:
    launching.recorder(tmp_path, "sbatch")
    words = [*FLAGS_OF_A_RUN, *launching.words(1, count=1)]
    done = launch("slurm", "--time", "1:00:00", "--submit", "--", *words, cwd=tmp_path, path=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 0
    assert launching.recorded(tmp_path, "sbatch")[-len(words) - 2 :] == [str(ROOT / "launch/slurm.sbatch"), *words, "--grace_s=180"]


def test_submit_when_the_client_fails_then_its_code_is_passed_on(tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\nexit 7\n")
    (tmp_path / "sbatch").chmod(0o755)
    assert launch("slurm", "--submit", "--", *FLAGS_OF_A_RUN, cwd=tmp_path, path=f"{tmp_path}:{os.environ['PATH']}").returncode == 7


def script(name: str, cwd: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / name, *words], cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"GPUS": "4"}, "GPUS=4 but this node has 0. Use GPUS=1, or a cpu profile"),
        ({"GPUS": "two"}, "GPUS=two must be a number from 1 on"),
        ({"PROFILE": "dpp"}, "PROFILE=dpp is none of"),
        ({"NODES": "2", "PROFILE": "cpu_2proc"}, "NODES=2 needs MASTER_ADDR, the address of node 0"),
        ({"NODES": "2", "NODE_RANK": "2", "PROFILE": "cpu_2proc"}, "NODE_RANK=2 is not below NODES=2"),
    ],
)
def test_node_when_its_variables_are_wrong_then_says_so(variables: dict[str, str], said: str, tmp_path: Path) -> None:
    done = script("launch/node.sh", tmp_path, **variables)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"STAGE": "4"}, "STAGE=4 is no stage. Use 1, 2 or 3"),
        ({"GPUS": "2"}, "GPUS=2 but this machine has 0"),
        ({"MOUNTS": "/no/such/folder", "GPUS": "0"}, "MOUNTS: /no/such/folder does not exist"),
    ],
)
def test_docker_script_when_its_variables_are_wrong_then_starts_nothing(variables: dict[str, str], said: str, tmp_path: Path) -> None:
    (tmp_path / "docker").write_text('#!/bin/sh\n[ "$1" = image ]\n')
    (tmp_path / "docker").chmod(0o755)
    done = script("launch/docker.sh", tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", CACHE=str(tmp_path), **variables)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Error response from daemon: No such image: surefoot:stage2", "the image surefoot:stage2 is not here. Use docker/build.sh stage2"),
        ("permission denied while trying to connect to the docker API", "docker does not answer: permission denied while trying"),
    ],
)
def test_docker_script_when_the_image_cannot_be_seen_then_says_why(answer: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "docker").write_text(f"#!/bin/sh\necho '{answer}' >&2\nexit 1\n")
    (tmp_path / "docker").chmod(0o755)
    done = script("launch/docker.sh", tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", STAGE="2")
    assert done.returncode == 2
    assert f"docker.sh: {said}" in done.stderr


def test_batch_script_when_overwrite_is_given_then_ends_before_it_starts_anything(tmp_path: Path) -> None:
    done = script("launch/slurm.sbatch", tmp_path, "--overwrite=True", SLURM_SUBMIT_DIR=str(ROOT))
    assert done.returncode == 2
    assert "would remove this job's own checkpoints" in done.stderr


def test_recipe_when_launch_is_set_then_goes_through_the_launcher(tmp_path: Path) -> None:
    recipe = ROOT / "examples/llama3_8B_DoRA.sh"
    changes = {"LAUNCH": "k8s --image i --gpus 8", "PYTHON": sys.executable, "DATA_PATH": "/runs/commonsense_170k.json"}
    command = ["sh", str(recipe), "32", "64", "/runs/dora", "0", "--micro_batch_size", "2"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **changes}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nvidia.com/gpu: '8'" in done.stdout
    assert "- /runs/commonsense_170k.json\n" in done.stdout


def test_every_recipe_when_launched_in_any_world_then_is_accepted(tmp_path: Path) -> None:
    recipes = [file for file in sorted((ROOT / "examples").glob("*.sh")) if file.name != "commonsense.sh"]
    assert len(recipes) >= 4
    for recipe, world in zip(recipes, ("local", "docker", "slurm", "sky --image i --bucket runs"), strict=False):
        data, out = ("rows.json", "out") if world.startswith("sky") else (str(TRAIN_ROWS), str(tmp_path / "out"))
        changes = {"LAUNCH": world, "PYTHON": sys.executable, "DATA_PATH": data, "MOUNTS": str(ROOT)}
        command = ["sh", str(recipe), "8", "16", out, "0"]
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **changes}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "lora_alpha" in done.stdout


def test_flags_that_the_launcher_adds_when_listed_then_exist() -> None:
    assert {"stage", "resume", "grace_s", "overwrite"} <= FLAGS.keys()


def test_parse_when_given_both_forms_then_reads_the_same() -> None:
    assert parse(["k8s", "--image=i", "--nodes=2", "--gpus", "8", "--", "--a", "b"]) == parse(
        ["k8s", "--image", "i", "--nodes", "2", "--gpus=8", "--", "--a", "b"]
    )
