"""The flags of finetune.py tried on the machines they are meant for, without them: what --dry_run would refuse there is refused here."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import yaml

from surefoot import cli, inputs, machine
from surefoot.config import Config
from surefoot.inputs import Inputs, RunFolder
from surefoot.launch.ask import ROOT, Ask
from surefoot.machine import Gpu, Machine
from surefoot.plan import Plan, make_plan

ELSEWHERE = ("k8s", "sky")  # worlds whose files are not this machine's
ASSUMED = Gpu(name="an assumed GPU", memory_gib=80.0, capability=(9, 0))


def check(ask: Ask) -> Plan:
    """The plan that rank 0 would make.

    Raises:
        SurefootError: what finetune.py would say, all of it.
    """
    config = _config(ask.flags)
    here = _machine(ask)
    found = _unseen(config) if ask.world in ELSEWHERE else inputs.inspect(config)
    return make_plan(config, here, found)


def _config(flags: tuple[str, ...]) -> Config:
    import fire

    values: dict[str, Any] = {}
    fire.Fire(lambda **given: values.update(given), command=cli.tidy(flags), serialize=lambda _: None)
    return cli.parse(values)


def _unseen(config: Config) -> Inputs:
    folder = RunFolder(status="absent")
    return Inputs(
        model_path=config.base_model, model_config=None, weights_dtypes=(), run_folder=folder, resume_stamp=None, problems=()
    )  # fmt: skip


def _machine(ask: Ask) -> Machine:
    """This machine as rank 0 would see it there: as many processes, an assumed GPU each, an image's packages where it runs in one."""
    with _environment({**launched(ask), "CUDA_VISIBLE_DEVICES": ""}):
        here = machine.probe()
    versions = here.versions if ask.world in ("local", "slurm") else {**here.versions, **_image_versions(ask.stage)}
    return dataclasses.replace(here, gpus=() if ask.is_cpu else (ASSUMED,) * ask.gpus, versions=versions)


def launched(ask: Ask) -> dict[str, str]:
    """What accelerate launch puts into rank 0's environment under the profile."""
    if ask.profile in ("single", "cpu"):
        return {}
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
