"""docker/: the locks hold the pins, the Dockerfiles are clean, and the check of the loaded stack fails closed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from surefoot.doctor import pinned
from surefoot.doctor.stack import Library, Stack
from surefoot.errors import BackendError, UsageError
from surefoot.stages import STAGES
from tests.conftest import ROOT, TRAIN_ROWS
from tests.runs import logs, quick, words

LOCKS = [*sorted((ROOT / "docker").glob("*.lock"))]
DOCKERFILES = [ROOT / f"docker/stage{number}.Dockerfile" for number in STAGES]
TOOLS = Path(sys.executable).parent  # hadolint, shellcheck and shfmt are installed beside Python
WANTED = {
    1: {"torch": "2.6.0", "CUDA": "12.4", "cuDNN": "9.1.0.70", "NCCL": "2.21.5"},
    2: {"torch": "2.8.0", "CUDA": "12.8", "cuDNN": "9.10.2.21", "NCCL": "2.27.3"},
    3: {"torch": "2.11.0", "CUDA": "13.0", "cuDNN": "9.19.0.56", "NCCL": "2.28.9"},
}


def lock(number: int) -> str:
    return (ROOT / f"docker/stage{number}.lock").read_text()


def as_loaded(number: int, **changes: object) -> Stack:
    pins = pinned.pins(lock(number))
    found = [
        Library("cudnn", ("/site/libcudnn.so.9",), pins["cuDNN"].rpartition(".")[0]),
        Library("nccl", ("/site/libnccl.so.2",), pins["NCCL"]),
    ]
    values = {"torch": pins["torch"] + "+cu124", "cuda": ".".join(pins["CUDA"].split(".")[:2]), "libraries": tuple(found)}
    return Stack(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("number", STAGES)
def test_lock_when_read_then_holds_the_pins_of_its_stage(number: int) -> None:
    pins = pinned.pins(lock(number))
    assert {**pins, "CUDA": ".".join(pins["CUDA"].split(".")[:2])} == WANTED[number]
    assert Version(pins["CUDA"]) >= Version(STAGES[number].cuda_floor)
    assert Version(pins["cuDNN"]) >= Version(STAGES[number].cudnn_floor)
    asked = re.findall(r"^(\S+==\S+)$", (ROOT / f"docker/stage{number}.in").read_text(), re.MULTILINE)
    assert len(asked) >= 8
    assert [pin for pin in asked if f"\n{pin} \\\n" not in lock(number)] == []


@pytest.mark.parametrize("number", STAGES)
def test_lock_when_compared_with_the_tested_set_then_has_its_training_packages(number: int) -> None:
    tested = dict(re.findall(r"^(\S+?)==(\S+)$", (ROOT / "scripts/dev.lock").read_text(), re.MULTILINE))
    for name in ("transformers", "peft", "accelerate", "bitsandbytes", "datasets", "tokenizers", "safetensors", "fire"):
        assert f"\n{name}=={tested[name]} \\\n" in lock(number)


@pytest.mark.parametrize("number", STAGES)
def test_lock_when_compared_with_setup_cfg_then_has_what_it_asks_for(number: int) -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    texts = (setup["options"]["install_requires"], extras["gpu"], extras["unsloth"])
    asked = [Requirement(line) for line in "\n".join(texts).split("\n") if line]
    held = dict(re.findall(r"^(\S+?)==(\S+) ", lock(number), re.MULTILINE))
    assert len(asked) >= 20
    assert [str(one) for one in asked if one.name not in held or held[one.name] not in one.specifier] == []


@pytest.mark.parametrize("file", LOCKS, ids=lambda file: file.name)
def test_lock_when_read_then_every_package_has_its_hashes(file: Path) -> None:
    requirements = re.split(r"\n(?=[A-Za-z])", file.read_text().partition("docker/lock.sh\n")[2])
    assert requirements
    assert [text for text in requirements if not re.fullmatch(r"[\w.-]+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+\n?", text)] == []


@pytest.mark.slow
def test_locks_when_made_again_then_are_the_same(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{TOOLS}:{os.environ['PATH']}"}
    subprocess.run([ROOT / "docker/lock.sh", tmp_path], env=environment, check=True)
    assert len(LOCKS) == 5
    assert [file.name for file in LOCKS if (tmp_path / file.name).read_text() != file.read_text()] == []


@pytest.mark.slow
@pytest.mark.parametrize("number", STAGES)
def test_lock_when_installed_then_loads_its_own_stack_and_trains(number: int, tmp_path: Path) -> None:
    locked = ROOT / f"docker/stage{number}.lock"
    flags = words(quick(data_path=TRAIN_ROWS, output_dir=tmp_path / "run", stage=number, eval_strategy="no", save_strategy="no"))
    with TemporaryDirectory() as folder:  # 6 GB
        python, environment = f"{folder}/bin/python", {"UV_CACHE_DIR": f"{folder}/cache", **os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(
            [TOOLS / "uv", "venv", "--quiet", "--python", sys.executable, "--allow-existing", folder], env=environment, check=True
        )
        sync = [TOOLS / "uv", "pip", "sync", "--quiet", "--python", python, "--require-hashes", locked]
        subprocess.run(sync, env=environment, check=True)
        loaded = subprocess.run([python, "-m", "surefoot.doctor.pinned", locked], env=environment, capture_output=True, text=True)
        assert loaded.stdout.startswith(f"stack as pinned: torch {WANTED[number]['torch']}, CUDA {WANTED[number]['CUDA']}."), loaded.stderr
        done = subprocess.run([python, ROOT / "finetune.py", *flags], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(logs(tmp_path / "run", "loss")) == 6


@pytest.mark.parametrize("number", STAGES)
def test_dockerfile_when_read_then_is_short_pinned_and_of_its_stage(number: int) -> None:
    text = (ROOT / f"docker/stage{number}.Dockerfile").read_text()
    assert len(text.splitlines()) <= 40
    base = re.search(r"^ARG BASE=nvidia/cuda:(\d+\.\d+)\.\d+-devel-ubuntu22\.04@sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    assert base is not None
    assert base[1] == WANTED[number]["CUDA"]
    assert f"ARG LOCK=docker/stage{number}.lock" in text
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE) == ["1000:1000"]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_dockerfile_when_linted_then_is_clean(file: Path) -> None:
    done = subprocess.run([TOOLS / "hadolint", "--config", ROOT / "docker/hadolint.yaml", file], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_lint_when_a_dockerfile_is_bad_then_sees_it(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM ubuntu:latest\nRUN cd /tmp && echo $1\n")
    done = subprocess.run(
        [TOOLS / "hadolint", "--config", ROOT / "docker/hadolint.yaml", tmp_path / "Dockerfile"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "DL3007" in done.stdout


def scripts() -> list[Path]:
    folders = ("docker", "examples", "launch", "scripts", "tests", "workflows")
    return [*(file for folder in folders for file in ROOT.glob(f"{folder}/*.sh")), ROOT / "launch/slurm.sbatch", ROOT / ".ci/run"]


def test_scripts_when_linted_then_are_clean_and_formatted() -> None:
    assert len(scripts()) >= 20
    subprocess.run([TOOLS / "shellcheck", "--external-sources", "--source-path=SCRIPTDIR", *scripts()], check=True)
    subprocess.run([TOOLS / "shfmt", "--indent", "2", "--case-indent", "--diff", *scripts()], check=True)


def test_build_when_the_stage_is_unknown_then_names_the_stages() -> None:
    done = subprocess.run([ROOT / "docker/build.sh", "stage4"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "'stage4' is no stage. Use stage1, stage2 or stage3" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["docker/lock.sh", "--help"], 0, "lock.sh [FOLDER]: writes *.lock"),
        (["docker/lock.sh", "--check"], 2, "lock.sh: --check is no option"),
        (["docker/lock.sh", "/gone"], 2, "lock.sh: /gone is no folder"),
        (["docker/system.sh", "--help"], 0, "system.sh build|run:"),
        (["docker/system.sh", "stage1"], 2, "system.sh: 'stage1' is neither build nor run"),
        (["docker/flash_attn.sh", "wheel"], 2, "flash_attn.sh: 'wheel' is neither source nor none"),
        (["docker/build.sh", "--help"], 0, "build.sh stage1|stage2|stage3"),
    ],
)
def test_script_when_asked_for_help_or_a_word_is_unknown_then_answers_and_does_nothing(words: list[str], code: int, said: str) -> None:
    done = subprocess.run([ROOT / words[0], *words[1:]], capture_output=True, text=True, timeout=10)
    assert done.returncode == code
    assert (done.stderr if code else done.stdout).startswith(said)
    assert code == 0 or done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", STAGES)
def test_stack_when_it_is_the_pinned_one_then_nothing_is_said(number: int) -> None:
    assert list(pinned.differences(pinned.pins(lock(number)), as_loaded(number))) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"problem": "no such file"}, "torch cannot be loaded"),
        ({"torch": "2.8.1"}, "torch is 2.8.1, pinned is 2.8.0"),
        ({"torch": "2.8.0a0+git"}, "torch is 2.8.0a0+git"),
        ({"cuda": None}, "torch is built for CUDA None, pinned is 12.8"),
        ({"libraries": ()}, "NCCL is not loaded"),
        ({"libraries": (Library("cudnn", ("/usr/lib/libcudnn.so.9",), "9.8.0"),)}, "cuDNN is 9.8.0 from /usr/lib/libcudnn.so.9, pinned is 9.10.2.21"),
        ({"libraries": (Library("cudnn", ("/usr/lib/libcudnn.so.9",), None),)}, "cuDNN is of an untold version"),
    ],
)  # fmt: skip
def test_stack_when_it_differs_then_the_difference_is_named(changes: dict[str, object], said: str) -> None:
    assert any(said in sentence for sentence in pinned.differences(pinned.pins(lock(2)), as_loaded(2, **changes)))


def test_check_when_this_machine_is_not_the_image_then_fails_with_5(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="--no_check") as refused:
        pinned.check(ROOT / "docker/stage1.lock")
    assert refused.value.exit_code == 5
    with pytest.raises(UsageError, match="does not exist"):
        pinned.check(tmp_path / "none.lock")


def test_sbom_when_made_then_lists_what_is_installed() -> None:
    made = json.loads(subprocess.run([sys.executable, ROOT / "docker/sbom.py"], capture_output=True, text=True, check=True).stdout)
    assert (made["bomFormat"], made["specVersion"]) == ("CycloneDX", "1.6")
    assert {"cpython", "transformers", "peft"} <= {component["name"] for component in made["components"]}
    form = re.compile(r"pkg:(generic/cpython|pypi/[^@]+|deb/[a-z]+/[^@]+)@[\w.%~-]+(\?distro=[\w.-]+)?")
    assert [component["purl"] for component in made["components"] if not form.fullmatch(component["purl"])] == []
