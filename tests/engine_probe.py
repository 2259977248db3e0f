"""Started by accelerate in finetune.py's place: trains as it does, and each process writes what its live engine holds to PROBE.RANK (JSON).

Of one layer's A, B and magnitude: the dtype in the layer's forward pass, of the gradient, of what the optimizer updates and of Adam's first
moment, whether that has moved, and how many elements this process keeps between the steps; of its base weight dtype and shape in the forward pass; how often its norms were made in each step.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from surefoot.config import Config
from surefoot.ops.renewal import Norms
from surefoot.run import run
from surefoot.training.loop import SurefootTrainer

LAYER = "layers.1.self_attn.o_proj"
KINDS = ("lora_A", "lora_B", "lora_magnitude_vector")
plain_step, plain_renew = SurefootTrainer.training_step, Norms.renew
tensors: dict[str, dict[str, Any]] = {kind: {} for kind in (*KINDS, "base_layer")}
renewals: Counter[int] = Counter()
trainers: list[SurefootTrainer] = []
layers: list[Any] = []


def weight(kind: str) -> Any:
    part = getattr(layers[0], kind)
    return (part if kind == "base_layer" else part["default"]).weight


def watch(trainer: SurefootTrainer, model: Any) -> None:
    """Hooks the layer, once the engine has prepared the model."""
    trainers.append(trainer)
    layers.append(next(module for name, module in model.named_modules() if name.endswith(LAYER)))
    layers[0].register_forward_hook(lambda *_: [note_forward(kind) for kind in tensors] and None)
    for kind in KINDS:
        weight(kind).register_hook(lambda gradient, kind=kind: tensors[kind].update(gradient=str(gradient.dtype)))


def note_forward(kind: str) -> None:
    tensors[kind] |= {"forward": str(weight(kind).dtype), "shape": list(weight(kind).shape)}


def note_rest(trainer: SurefootTrainer) -> None:
    """Behind a pass; from the second step on there are moments."""
    for kind in KINDS:
        parameter = weight(kind)
        piece = parameter.to_local() if hasattr(parameter, "to_local") else getattr(parameter, "ds_tensor", parameter)
        tensors[kind]["kept"] = piece.numel()
        if parameter.grad is not None:
            tensors[kind]["gradient"] = str(parameter.grad.dtype)
        if trainer.state.global_step:
            master, moment = kept_by_optimizer(trainer, parameter)
            tensors[kind] |= {"master": str(master.dtype), "moment": str(moment.dtype), "moves": bool(moment.any())}


def kept_by_optimizer(trainer: SurefootTrainer, parameter: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What this process's optimizer updates of a parameter, and its first moment.

    DeepSpeed's are read off its own flat tensors: safe_get_full_fp32_param and safe_get_full_optimizer_state copy into fp32 whatever is
    kept, and ZeRO-2 (0.19.8) links the state of each parameter once its first group has stepped, when the other groups have none yet.
    """
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if trainer.engine != "deepspeed":
        return parameter, optimizer.state[parameter]["exp_avg"]
    if hasattr(parameter, "ds_id"):
        flat = optimizer.fp32_partitioned_groups_flat[optimizer.grad_position[optimizer.get_param_id(parameter)][0]]
    else:
        groups = [any(one is parameter for one in group) for group in optimizer.bit16_groups]
        flat = optimizer.single_partition_of_fp32_groups[groups.index(True)]
    return flat, optimizer.optimizer.state[flat]["exp_avg"]


def training_step(self: SurefootTrainer, model: Any, *args: Any, **named: Any) -> Any:
    if not trainers:
        watch(self, self.accelerator.unwrap_model(model))
    loss = plain_step(self, model, *args, **named)
    note_rest(self)
    return loss


def renew(self: Norms, *args: Any) -> None:
    before = self.renewals
    plain_renew(self, *args)
    if self.renewals > before and any(layer is layers[0] for layer in self.layers):
        renewals[trainers[0].state.global_step] += 1


SurefootTrainer.training_step, Norms.renew = training_step, renew  # type: ignore[method-assign]
run(Config.parse(dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])))
Path(f"{os.environ['PROBE']}.{os.environ['RANK']}").write_text(json.dumps({"tensors": tensors, "norms": renewals}))
