"""Engines: what DeepSpeed and FSDP2 need so that they are what the profile names, masters stay fp32 and layers compute on whole weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, distribute_tensor

from surefoot.errors import BackendError
from surefoot.machine import Machine
from surefoot.plan import Plan
from surefoot.training import pace
from surefoot.training.arguments import casts_itself
from surefoot.training.health import trainable

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
OWN = (  # of each machine
    "train.run_name", "data.cache_dir", "data.data_path", "data.val_data_path", "model.path", "model.loads_on_gpu", "model.spares_down",
)  # fmt: skip
LIVE = {"single": ("NO",), "ddp": ("MULTI_GPU", "MULTI_CPU"), "deepspeed": ("DEEPSPEED",), "fsdp": ("FSDP",)}


def prepare(plan: Plan, model: Any, accelerator: Any) -> dict[str, Any]:
    """Makes model and engine ready for each other, before the engine takes the model; returns what really runs, for run.json.

    Raises:
        BackendError: the engine or the number of processes is not the plan's.
    """
    live = _live(plan.machine, accelerator)
    if casts_itself(plan) and plan.train.precision in DTYPES:
        model.forward = _under_autocast(model.forward, accelerator.device.type, DTYPES[plan.train.precision])
    if plan.machine.engine == "ddp":
        accelerator.ddp_handler.gradient_as_bucket_view = True  # else every gradient is copied back out of its bucket
    if plan.machine.engine == "deepspeed":
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        pace.spare_deepspeeds_waits(config)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        config["zero_optimization"].setdefault("reduce_bucket_size", min(trained, 500_000_000))  # its own is 2 GB, made anew at each step
    if plan.machine.strategy == "zero3":
        _gather_by_layer(model, accelerator.state.deepspeed_plugin)
    return live


def _live(machine: Machine, accelerator: Any) -> dict[str, Any]:
    """accelerate's own word for what it set up: some configurations silently become another one."""
    kind, processes = accelerator.distributed_type.value, accelerator.num_processes
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    stage = plugin.zero_stage if plugin is not None else None
    named = LIVE[machine.engine] if machine.world_size > 1 or machine.engine in ("deepspeed", "fsdp") else (*LIVE["single"], *LIVE["ddp"])
    if kind not in named or processes != machine.world_size or (machine.engine == "deepspeed" and f"zero{stage}" != machine.strategy):
        raise BackendError(
            f"{machine.strategy} with {machine.world_size} processes was launched, and accelerate made {kind} with {processes} of it. "
            "Use a profile of profiles/ unchanged"
        )
    return {"strategy": machine.strategy, "distributed_type": kind, "processes": processes, "zero_stage": stage}


def check_ranks(plan: Plan, fingerprint: str, parameters: int) -> None:
    """All processes must train the same thing: the same rows in the same order, settings and versions, as many parameters.

    Raises:
        BackendError: what differs, and between whom; on every process.
    """
    if plan.machine.world_size == 1:
        return
    facts = {"rows (fingerprint)": fingerprint[:12], "trainable parameters": str(parameters), "Python": plan.machine.python}
    everyone = gather_object([(plan.machine.hostname, facts | plan.machine.versions | _settings(plan))])
    first_host, first = everyone[0]
    for rank, (host, theirs) in enumerate(everyone):
        differing = [name for name in first | theirs if first.get(name) != theirs.get(name)]
        if differing:
            told = "; ".join(f"{name} {first.get(name, 'none')} and {theirs.get(name, 'none')}" for name in differing)
            raise BackendError(
                f"process 0 ({first_host}) and process {rank} ({host}) do not train the same: {told}. "
                "Give all machines the same files, flags and packages (scripts/dev.lock)"
            )


def _settings(plan: Plan) -> dict[str, str]:
    parts = {"model": plan.model, "adapter": plan.adapter, "data": plan.data, "train": plan.train}
    values = {f"{part}.{name}": str(value) for part, plans in parts.items() for name, value in dataclasses.asdict(plans).items()}
    return {name: value for name, value in values.items() if name not in OWN}


def _under_autocast(forward: Callable[..., Any], device: str, dtype: torch.dtype) -> Callable[..., Any]:
    """DeepSpeed switches autocast off around the model it was given, so it is switched on inside."""

    def cast(*args: Any, **named: Any) -> Any:
        with torch.autocast(device, dtype):
            return forward(*args, **named)

    return cast


def _gather_by_layer(model: Any, plugin: Any) -> None:
    """Lets ZeRO-3 gather a decoder layer as one: DoRA and the fused layers read weights that no module's own forward would gather."""
    from deepspeed.utils import set_z3_leaf_modules

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = getattr(base.get_decoder(), "layers", None)
    if layers is None:
        raise BackendError(f"{type(base).__name__} has no `layers`, which ZeRO-3 would gather one by one. Use profiles/ds_zero2.yaml")
    set_z3_leaf_modules(model, [type(layers[0])])
    layers[0].register_forward_pre_hook(_make_input_need_gradient)
    size = sum(parameter.numel() for parameter in layers[0].parameters())
    zero = plugin.deepspeed_config["zero_optimization"]
    zero["stage3_param_persistence_threshold"] = 0  # every tensor in pieces, small ones too
    zero.setdefault("stage3_prefetch_bucket_size", size)  # the next layer while one computes
    zero.setdefault("stage3_max_live_parameters", max(10**9, 3 * size))


def _make_input_need_gradient(_layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    """ZeRO-3 would reduce the gradients of a layer whose input needs none before they are made."""
    if torch.is_grad_enabled() and not inputs[0].requires_grad:
        inputs[0].requires_grad_()


def know_deepspeeds_constants() -> None:
    """Lets torch.load, which reads tensors and numbers only, read the few classes that DeepSpeed 0.19 puts beside them."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])


def whole_trainables(model: Any) -> dict[str, torch.Tensor]:
    """The trainable tensors by name, whole and on the host, also where they are kept in pieces. Every rank must call it."""
    return {name: _whole(parameter) for name, parameter in trainable(model)}


def _whole(parameter: Any) -> torch.Tensor:
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().cpu().clone()  # type: ignore[no-any-return]
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return whole.detach().cpu().clone()  # type: ignore[no-any-return]


@torch.no_grad()
def put_trainables(model: PeftModel, folder: Path) -> None:
    """Sets an adapter's tensors from its files, each process its pieces. Every rank must call it and read the same files."""
    found = load_file(folder / "adapter_model.safetensors")
    parameters = list(trainable(model))
    tags = {name: torch.tensor(place) for place, (name, _) in enumerate(parameters)}
    keys = get_peft_model_state_dict(model, state_dict=tags, save_embedding_layers=False)  # the files' names for them
    for key, place in keys.items():
        _put(parameters[int(place)][1], found[key])


def _put(parameter: Any, value: torch.Tensor) -> None:
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
    elif isinstance(parameter, DTensor):
        parameter.copy_(distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None))
    else:
        parameter.copy_(value)
