"""decisions(): every rule once, in the order of the printed table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from surefoot.rules import attention, backend, fast, launch, memory, model, packing, process, resume, supported, training
from surefoot.rules.desk import Choice, Desk

if TYPE_CHECKING:
    from surefoot.plan import Plan

NOT_SETTINGS = ("config", "dry_run", "plan_json", "resume", "overwrite", "strict_backend", "local_dir")


def decisions(desk: Desk) -> dict[str, Choice]:
    """Every decided value by name."""
    decided = {choice.name: choice for choice in _decide(desk)}
    values = {name: choice.value for name, choice in decided.items()}
    launch.profile_and_flags(desk, values["gradient_accumulation_steps"], values["precision"])
    launch.host_memory(desk, values["frozen_dtype"], values["quantization"], values["loads_on_gpu"])
    supported.check(desk, values)
    recomputed = memory.recompute(desk, values)
    return decided | {choice.name: choice for choice in recomputed}


def _decide(desk: Desk) -> Iterator[Choice]:
    yield model.revision(desk)
    quantization = model.quantization(desk)
    precision = model.precision(desk)
    chosen = backend.backend(desk, quantization.value)
    yield chosen
    yield quantization
    yield precision
    yield model.compute_dtype(desk, chosen.value, quantization.value, precision.value)
    yield from model.method(desk, chosen.value)
    yield model.targets(desk)
    yield model.initial_weights(desk, quantization.value)
    implementation = attention.implementation(desk)
    yield implementation
    yield from attention.kernels(desk, implementation.value)
    yield attention.compiling(desk)
    yield from fast.fused(desk)
    frozen_dtype = fast.frozen_dtype(desk, quantization.value, precision.value)
    yield frozen_dtype
    yield launch.loading(desk, frozen_dtype.value, quantization.value)
    yield from packing.packing(desk, implementation.value)
    yield from training.batch(desk)
    yield training.warmup(desk)
    yield training.optimizer(desk)
    yield from training.evaluation(desk)
    yield training.trackers(desk)
    yield resume.resume_from(desk)
    yield process.environment(desk)
    training.steps(desk)
    launch.processes(desk)
    process.floors(desk)


def stamp(plan: Plan) -> dict[str, Any]:
    """The part of a plan that a resumed run must share with its first half."""
    adapter = plan.adapter
    return {
        "backend": plan.backend,
        "dtype": plan.train.precision,
        "attn_impl": plan.model.attn_implementation,
        "quantization": plan.model.quantization,
        "base_model": plan.model.path,
        "revision": plan.model.revision,
        "adapter": {
            "method": adapter.method,
            "r": adapter.lora_r,
            "alpha": adapter.lora_alpha,
            "dropout": adapter.lora_dropout,
            "rslora": adapter.use_rslora,
            "target_modules": list(adapter.target_modules) if adapter.target_modules else None,
        },
        "engine": plan.machine.strategy,
        "offloads": plan.machine.offloads,
        "world_size": plan.machine.world_size,
        "batch_size": plan.train.batch_size,
        "group_by_length": plan.train.group_by_length,
        "seed": plan.train.seed,
    }
