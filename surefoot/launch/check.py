"""The flags of finetune.py tried on the machines they are meant for, without them: what --dry_run would refuse there is refused here."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from surefoot import cli, inputs, machine
from surefoot.config import Config
from surefoot.errors import UsageError, joined
from surefoot.inputs import Inputs, RunFolder
from surefoot.launch.ask import ALONE, ROOT, Ask
from surefoot.launch.manifests import RUNS
from surefoot.machine import Gpu, Machine
from surefoot.plan import Plan, make_plan

ELSEWHERE = ("k8s", "sky")  # worlds whose files are not this machine's
ASSUMED = Gpu(name="an assumed GPU", memory_gib=80.0, capability=(9, 0))


def check(ask: Ask) -> Plan:
    """The plan that rank 0 would make.

    Raises:
        SurefootError: what finetune.py would say, all of it.
    """
    values = _values(ask.flags)
    if "config" in values and ask.world in ELSEWHERE:
        raise UsageError(f"--config={values['config']} is a file of this machine, which {ask.world} would not find. Give its flags instead")
    if ask.image and str(values.get("stage", ask.stage)) != str(ask.stage):
        raise UsageError(f"--stage={values['stage']} after -- is not the image's, --stage={ask.stage}. Give it before --, for both")
    config = cli.parse(values)
    here = _machine(ask)
    if hidden := list(_hidden(ask, config, values.get("config"))):
        raise UsageError(joined(hidden))
    found = _unseen(config) if ask.world in ELSEWHERE else inputs.inspect(config)
    return make_plan(config, here, found)


def _values(flags: tuple[str, ...]) -> dict[str, Any]:
    import fire

    values: dict[str, Any] = {}
    fire.Fire(lambda **given: values.update(given), command=cli.tidy(flags), serialize=lambda _: None)
    return values


def _hidden(ask: Ask, config: Config, file: str | None) -> Iterator[str]:
    """What is said of the image, and of paths that the run would not find, or would not find again, where it runs."""
    if ask.container == "apptainer" and "://" not in str(ask.image) and not os.path.exists(str(ask.image)):
        yield f"--image={ask.image} does not exist. Make it with: apptainer pull {ask.image} docker://REGISTRY/surefoot:stage{ask.stage}"
    if ask.world in ELSEWHERE:
        if unseen := _outside([RUNS], config, file):
            yield f"{_are(unseen)} not below {RUNS}, which is all that {ask.world} keeps and every node sees. Put it there"
    elif ask.world == "docker" or ask.container:
        mounts = [folder for folder in re.split("[:\n]", os.environ.get("MOUNTS", "")) if folder]
        yield from (f"MOUNTS: {folder} must be an absolute path" for folder in mounts if not folder.startswith("/"))
        yield from (f"MOUNTS: {folder} does not exist" for folder in mounts if not os.path.exists(folder))
        if unseen := _outside([*_mounted(ask, os.environ), *mounts], config, file):
            wanted = shlex.quote(":".join(dict.fromkeys([*filter(os.path.exists, mounts), *unseen.values()])))
            yield f"{_are(unseen)} not in the container, which has this folder and MOUNTS. Set MOUNTS={wanted}"


def _outside(seen: Sequence[str], config: Config, file: str | None) -> dict[str, str]:
    """Each `--flag=path` outside the folders that the run sees, the first of which it works in, to the folder that holds it."""
    files = [("data_path", path) for path in config.data_path] + [("val_data_path", path) for path in config.val_data_path or ()]
    named = [("config", file), ("base_model", config.base_model), ("local_dir", config.local_dir), ("prompt_style", config.prompt_style)]
    found = {}
    for flag, path in [*named, *files, ("resume_from_checkpoint", config.checkpoint), ("output_dir", config.output_dir)]:
        place = Path(os.path.normpath(os.path.join(seen[0], path or "")))
        if not any(place.is_relative_to(folder) for folder in seen):
            found[f"--{flag}={path}"] = str(place.parent)
    return found


def _are(flags: Collection[str]) -> str:
    return f"{', '.join(flags)} {'is' if len(flags) == 1 else 'are'}"


def _mounted(ask: Ask, env: Mapping[str, str]) -> list[str]:
    """What docker.sh and slurm.sbatch mount beside MOUNTS, first the working folder, and its name where it was entered through a link."""
    linked = env.get("PWD", "")
    here = [os.getcwd(), *([linked] if linked and os.path.exists(linked) and os.path.samefile(linked, os.getcwd()) else [])]
    own = str(ROOT) if ask.container else env.get("CACHE") or str(Path.home() / ".cache")
    return [*here, own, *filter(None, [env.get("HF_HOME")])]


def _unseen(config: Config) -> Inputs:
    folder = RunFolder(status="absent")
    return Inputs(
        model_path=config.base_model, model_config=None, weights_dtypes=(), run_folder=folder, resume_stamp=None, problems=()
    )  # fmt: skip


def _machine(ask: Ask) -> Machine:
    """This machine as rank 0 would see it there: as many processes, an assumed GPU each, an image's packages where it runs in one."""
    with _environment({**launched(ask), "CUDA_VISIBLE_DEVICES": ""}):
        here = machine.probe()
    versions = {**here.versions, **_image_versions(ask.stage)} if ask.image else here.versions
    return dataclasses.replace(here, gpus=() if ask.is_cpu else (ASSUMED,) * ask.gpus, versions=versions)


def launched(ask: Ask) -> dict[str, str]:
    """What accelerate launch puts into rank 0's environment under the profile."""
    if ask.profile in ALONE:
        return {"ACCELERATE_USE_CPU": "true"} if ask.profile == "cpu" else {}
    given = {"WORLD_SIZE": str(ask.nodes * ask.processes), "LOCAL_WORLD_SIZE": str(ask.processes), "RANK": "0", "LOCAL_RANK": "0"}
    profile = yaml.safe_load((ROOT / f"profiles/{ask.profile}.yaml").read_text())
    if profile["distributed_type"] == "DEEPSPEED":
        stage = str(profile["deepspeed_config"]["zero_stage"])
        given |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}
    elif profile["distributed_type"] == "FSDP":
        given |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": str(profile["fsdp_config"]["fsdp_version"])}
    return given


def _image_versions(stage: int) -> dict[str, str]:
    lock = (ROOT / f"docker/stage{stage}.lock").read_text()
    return {name: version for name, version in re.findall(r"^([\w.-]+)==(\S+)", lock, re.MULTILINE) if name in machine.PACKAGES}


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
