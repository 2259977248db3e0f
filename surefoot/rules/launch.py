"""How the program was launched: whether processes, GPUs, profile and flags agree, and if not, what to type."""

from __future__ import annotations

import shlex

from surefoot.decoder import decoder_of
from surefoot.machine import Machine
from surefoot.memory import GIB, WEIGHT_BYTES
from surefoot.rules.desk import Choice, Desk
from surefoot.support import ENGINES

PROFILES = {"single": "single", "ddp": "ddp", "zero2": "ds_zero2", "zero3": "ds_zero3", "fsdp2": "fsdp2"}
WHOLE_SHARE = 0.5  # of a GPU's memory: the most that weights may fill before an engine cuts them


def command(machine: Machine, profile: str, processes: int) -> str:
    """What to type: this command line under `profile` with so many processes on each machine."""
    machines = machine.world_size // machine.local_world_size
    words = ["accelerate", "launch", "--config_file", f"profiles/{profile}.yaml"]
    words += [] if profile in ("single", "cpu") else ["--num_processes", str(processes * machines)]
    words += ["--num_machines", str(machines), "--machine_rank", "R", "--main_process_ip", "HOST"] if machines > 1 else []
    return shlex.join([*words, "finetune.py", *machine.command[1:]]) if machine.command else f"{shlex.join(words)} finetune.py ..."


def processes(desk: Desk) -> None:
    """A process without a GPU, a GPU without a process, a group of one: each ends the run with the command to type."""
    m = desk.machine
    gpus, local = len(m.gpus), m.local_world_size
    profile = "ds_zero3_offload" if m.strategy == "zero3" and m.offloads else PROFILES.get(m.strategy, "ddp")
    grouped = profile if profile != "single" else "ddp"
    fitting = command(m, grouped, gpus) if gpus > 1 or m.world_size > local else command(m, "single", 1)
    if gpus and local > gpus:
        desk.problems.append(f"{local - gpus} of {local} processes have no GPU: {gpus} visible. Type: {fitting}")
    elif m.has_profile and gpus > local:
        some = ",".join(map(str, range(local)))
        desk.problems.append(
            f"{gpus - local} of {gpus} GPUs would be idle under {local} process{'es' if local > 1 else ''}. Type: {fitting} "
            f"(or hide them: put CUDA_VISIBLE_DEVICES={some} before your command)"
        )
    elif m.is_cut_short:
        several = "" if gpus else ", or with profiles/cpu_2proc.yaml for two processes"
        desk.problems.append(
            "accelerate was asked for several processes and started one, as this profile makes it do. "
            f"Type: {command(m, 'single' if gpus else 'cpu', 1)}{several}"
        )
    elif m.is_launched and m.world_size == 1 and not m.offloads:
        alone = "single" if gpus else "cpu"
        desk.problems.append(f"a profile for many processes was launched with one. Type: {command(m, alone, 1)}")
    elif gpus > 1 and m.world_size == 1:
        desk.notes.append(f"1 process uses 1 of {gpus} GPUs. For all: {fitting}")


def profile_and_flags(desk: Desk, accumulation: int, precision: str) -> None:
    """What the profile says beside what the flags come to."""
    m, c = desk.machine, desk.config
    if m.strategy not in ENGINES:
        asked = "ds_zero2" if m.engine == "deepspeed" else "fsdp2"
        desk.problems.append(
            f"the launcher's profile asks for {m.strategy}, which is not supported. Type: {command(m, asked, m.local_world_size)}"
        )
    if m.launcher_accumulation not in (None, accumulation):
        desk.problems.append(
            f"the launcher's profile says gradient_accumulation_steps: {m.launcher_accumulation}, the flags come to {accumulation}. "
            f"Set it to auto in the profile, or give --gradient_accumulation_steps={m.launcher_accumulation}"
        )
    if m.launcher_clipping not in (None, c.max_grad_norm):
        desk.problems.append(
            f"the launcher's profile says gradient_clipping: {m.launcher_clipping:g}, the flags say {c.max_grad_norm:g}. "
            f"Set it to auto in the profile, or give --max_grad_norm={m.launcher_clipping:g}"
        )
    if m.engine not in ("deepspeed", "fsdp"):
        return
    if m.launcher_precision != "no":
        desk.problems.append(
            f"the launcher's profile says {m.launcher_precision}: {m.strategy} would cast the adapters too, and master weights "
            "are fp32. Set mixed_precision: 'no' there (and no bf16 or fp16 in a DeepSpeed JSON) and let the flags decide: "
            f"--{m.launcher_precision}=True"
        )
    if precision == "fp16":
        desk.problems.append(
            f"--fp16=True needs a loss scaler, which {m.strategy} has only with fp16 masters. Use --bf16=True, or profiles/ddp.yaml"
        )


def loading(desk: Desk, frozen_dtype: str, quantization: str) -> Choice:
    """Where a process reads the weights: onto its GPU if they fit there whole, else into host memory, where an engine cuts them."""
    m, whole = desk.machine, _weights_gib(desk, frozen_dtype, quantization)
    name = "loads_on_gpu"
    if m.gpu is None:
        return Choice(name, False, "auto", "no GPU")
    if not m.cuts_weights:
        return Choice(name, True, "auto", "the GPU holds the whole model")
    if whole is not None and whole <= WHOLE_SHARE * m.gpu.memory_gib:
        return Choice(
            name, True, "auto", f"{whole:,.1f} GiB of weights, at most {WHOLE_SHARE:.0%} of the GPU; {m.strategy} cuts them there"
        )
    return Choice(name, False, "auto", f"{m.strategy} cuts them in host memory")


def host_memory(desk: Desk, frozen_dtype: str, quantization: str, loads_on_gpu: bool) -> None:
    """A model that is cut in host memory is there once for each process; offloading keeps one more."""
    m, whole = desk.machine, _weights_gib(desk, frozen_dtype, quantization)
    if not m.cuts_weights or whole is None:
        return
    needed = whole * ((0 if loads_on_gpu else m.local_world_size) + m.offloads)
    if needed > m.memory_gib:
        kept = ", and one is kept there" if m.offloads else ""
        desk.problems.append(
            f"{needed:,.0f} GiB of host memory are needed, {m.memory_gib:,.0f} are there: each of {m.local_world_size} processes reads "
            f"{whole:,.1f} GiB of weights{kept}. Use fewer processes a machine, --load_4bit=True, or profiles/ds_zero2.yaml on larger GPUs"
        )


def _weights_gib(desk: Desk, frozen_dtype: str, quantization: str) -> float | None:
    """Of the whole base model; None where its sizes are not known."""
    decoder = decoder_of(desk.inputs.model_config)
    if decoder is None:
        return None
    linears = decoder.layers * sum(one.weights for one in decoder.linears)
    embeddings = decoder.vocabulary * decoder.hidden * (1 if decoder.is_tied else 2)
    stored = frozen_dtype if quantization == "none" else quantization
    return (linears * WEIGHT_BYTES[stored] + embeddings * WEIGHT_BYTES[frozen_dtype]) / GIB
