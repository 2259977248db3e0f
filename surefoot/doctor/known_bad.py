"""Versions that are known to give wrong numbers or to fail, each with the thread that says so. Data and its matching."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from surefoot.doctor.check import Check

TOPIC = "known bad"
HOPPER = 9  # major compute capability of H100 and H200
CANARY = "cuDNN attention runs only where the attention canary passed it, and never at stage 1"
OTHER_BACKENDS = "the hf and bnb backends do not import Unsloth"


class KnownBad(NamedTuple):
    """versions: package (or cudnn: the loaded one) to specifier, all of which must hold; capability: the GPUs' major version;
    device: gpu or cpu. spared: why a run of this program is right all the same; empty: it is not."""

    versions: dict[str, str]
    symptom: str
    source: str
    way_out: str
    spared: str = ""
    capability: int | None = None
    device: str | None = None


def _outside_unsloth(package: str, specifier: str, way_out: str) -> KnownBad:
    return KnownBad(
        versions={"unsloth": ">=2026.10.7,<=2026.10.9", package: specifier},
        symptom=f"Unsloth does not take this {package}",
        source="requirements of unsloth 2026.10.9",
        way_out=way_out,
        spared=OTHER_BACKENDS,
    )


TABLE = (
    KnownBad(
        versions={"torch": "==2.5.0"},
        symptom="cuDNN attention is the default, and gradients are NaN from the first step",
        source="huggingface/diffusers#9768, pytorch/pytorch#138354",
        way_out="torch 2.6 or newer",
        spared=CANARY,
        capability=HOPPER,
    ),
    KnownBad(
        versions={"torch": "==2.9.*", "cudnn": "<9.15.1"},
        symptom="cuDNN attention is SDPA's first choice, and accesses illegal memory at lengths that are no multiple of 128",
        source="pytorch/pytorch#169849",
        way_out="torch 2.10 or newer",
        spared=CANARY,
        capability=HOPPER,
    ),
    KnownBad(
        versions={"torch": ">=2.11", "cudnn": ">=9.19,<9.26"},
        symptom="cuDNN attention is SDPA's first choice; with a mask, length % 128 == 64 and log-sum-exp below -88.7 gradients are NaN",
        source="pytorch/pytorch#196678, huggingface/trl#7181",
        way_out="",
        spared=f"no mask is passed where none is needed, and {CANARY}",
        capability=HOPPER,
    ),
    KnownBad(
        versions={"cudnn": ">=9.25.1,<=9.26.0"},
        symptom="cuDNN attention's gradients of key and value are NaN for one query against 128 keys",
        source="NVIDIA/cudnn-frontend#1072",
        way_out="",
        spared="training attends whole rows to themselves, never one query to many keys",
        capability=HOPPER,
    ),
    KnownBad(
        versions={"cudnn": "==9.12.*"},
        symptom="cuDNN attention's gradients are NaN at some lengths without a padding mask",
        source="NVIDIA/cudnn-frontend#160",
        way_out="Reinstall torch with its own cuDNN: no release of torch brings 9.12",
        spared=CANARY,
        capability=HOPPER,
    ),
    KnownBad(
        versions={"flash-attn": "==2.8.*", "torch": "==2.6.*"},
        symptom="wheels of flash-attn 2.8 for torch 2.6 do not import: undefined symbol",
        source="Dao-AILab/flash-attention#1783, #1717",
        way_out="pip install flash-attn==2.7.4.post1 --no-build-isolation",
        spared="the attention canary tries it first, and the plan steps down to sdpa",
    ),
    KnownBad(
        versions={"deepspeed": "==0.19.2"},
        symptom="ZeRO-3 with fp32 adapters on a bf16 model fails at the first step: output tensor must have the same type as input tensor",
        source="deepspeedai/DeepSpeed#8072",
        way_out="pip install 'deepspeed>=0.19.8'",
    ),
    KnownBad(
        versions={"deepspeed": ">=0.18", "torch": ">=2.10"},
        symptom="LoRA leaves the optimizer's undecayed group empty, DeepSpeed drops it, and the scheduler fails on the count",
        source="OpenRLHF/OpenRLHF#1225, MakazhanAlpamys/Soup#336",
        way_out="",
        spared="the trainer removes empty groups before DeepSpeed sees them",
    ),
    KnownBad(
        versions={"transformers": "==5.17.0"},
        symptom="resuming with several CPU processes fails: don't know how to restore data location of an UntypedStorage",
        source="transformers 5.17.0, trainer.py, _load_optimizer_and_scheduler (map_location is the device cpu:0)",
        way_out="",
        spared="torch is taught to read such files anywhere before a run goes on",
        device="cpu",
    ),
    KnownBad(
        versions={"trl": "==1.15.0"},
        symptom="its trainers do not train on a CPU: 'NoneType' object has no attribute 'apply'",
        source="trl 1.15.0, trl/trainer/utils.py, _fused_forward",
        way_out="pip install trl==1.14.2",
        spared="the hf and bnb backends do not use TRL's trainers",
        device="cpu",
    ),
    _outside_unsloth("transformers", ">5.17.0", "pip install transformers==5.17.0"),
    _outside_unsloth("trl", ">1.15.0", "pip install trl==1.14.2"),
    _outside_unsloth("datasets", ">=5", "pip install 'datasets>=4.8,<5'"),
    _outside_unsloth("torch", ">=2.15", "pip install 'torch<2.15'"),
)


def matches(entry: KnownBad, versions: Mapping[str, str], capabilities: Collection[int]) -> bool:
    """Whether an entry is about these versions and GPUs.

    Args:
        versions: package to installed version, and cudnn to the loaded one; the packages that are not there are left out.
        capabilities: major compute capabilities of the visible GPUs; empty on a CPU.
    """
    if entry.capability is not None and entry.capability not in capabilities:
        return False
    if entry.device is not None and (entry.device == "gpu") != bool(capabilities):
        return False
    return all(name in versions and _within(versions[name], specifier) for name, specifier in entry.versions.items())


def _within(version: str, specifier: str) -> bool:
    try:
        return SpecifierSet(specifier).contains(Version(version).public, prereleases=True)
    except InvalidVersion:
        return False


def checks(versions: Mapping[str, str], capabilities: Collection[int]) -> Iterator[Check]:
    """One an entry that matches, or a line that none does."""
    found = [entry for entry in TABLE if matches(entry, versions, capabilities)]
    for entry in found:
        name = ", ".join(f"{package} {versions[package]}" for package in entry.versions)
        fact = f"{entry.symptom} ({entry.source})"
        if entry.spared:
            fact += f". In this program {entry.spared}"
        yield Check(TOPIC, name, "warn" if entry.spared else "bad", fact, entry.way_out)
    if not found:
        yield Check(TOPIC, "versions", "ok", f"none of the {len(TABLE)} known cases")
